"""One model, any latency budget: settings, what they cost, and who chooses among them."""

from .controller import (
    BestStatic,
    Controller,
    QualityRegression,
    TwoStagePolicy,
    feasible_settings,
    load_controller,
    matched_random,
    oracle,
    run_within,
    save_controller,
)
from .detector import DetectorSubject
from .grpo import GRPO, GRPOConfig
from .latency_table import LatencyTable, fingerprint, measure_table
from .outcomes import Outcomes
from .reward import REWARDS, NotesReward, QualityReward, soft_f1
from .subject import Setting, Space, Subject, grid, key_of

__all__ = [
    "GRPO",
    "REWARDS",
    "BestStatic",
    "Controller",
    "DetectorSubject",
    "GRPOConfig",
    "LatencyTable",
    "NotesReward",
    "Outcomes",
    "QualityRegression",
    "QualityReward",
    "Setting",
    "Space",
    "Subject",
    "TwoStagePolicy",
    "feasible_settings",
    "fingerprint",
    "grid",
    "key_of",
    "load_controller",
    "matched_random",
    "measure_table",
    "oracle",
    "run_within",
    "save_controller",
    "soft_f1",
]

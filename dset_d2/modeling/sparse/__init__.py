"""Sparse mechanisms, each written once and used by every part that can be sparse."""

from .moe import MoE, MoEConfig, MoERecord, make_ffn, moe_layers
from .pruning import (
    MemoryPruner,
    MemoryPruningConfig,
    PruningConfig,
    PruningRecord,
    TokenPruner,
    ViTPruningConfig,
)
from .swap import (
    SwapConfig,
    report_coactivation,
    restore_ffn,
    swap_config,
    swap_ffn_for_moe,
    swap_ffns,
)
from .upcycling import initialize_from_pretrained_ffn

__all__ = [
    "MemoryPruner",
    "MemoryPruningConfig",
    "MoE",
    "MoEConfig",
    "MoERecord",
    "PruningConfig",
    "PruningRecord",
    "SwapConfig",
    "TokenPruner",
    "ViTPruningConfig",
    "initialize_from_pretrained_ffn",
    "make_ffn",
    "moe_layers",
    "report_coactivation",
    "restore_ffn",
    "swap_config",
    "swap_ffn_for_moe",
    "swap_ffns",
]

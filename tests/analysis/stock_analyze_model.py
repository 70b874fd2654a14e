"""Behaves as Detectron2's own ``tools/analyze_model.py`` does with a LazyConfig, which its package
lacks: the same calls for each of its tasks, and nothing of this project's analysis."""

from collections import Counter
from itertools import islice

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser
from detectron2.utils.analysis import (
    FlopCountAnalysis,
    activation_count_operators,
    parameter_count_table,
)
from fvcore.nn import flop_count_str, flop_count_table

TASKS = ("flop", "activation", "parameter", "structure")


def load_model(cfg):
    model = instantiate(cfg.model)
    model.to(cfg.train.device)
    DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    return model.eval()


def count_flops(cfg, num_inputs: int) -> str:
    loader, model = instantiate(cfg.dataloader.test), load_model(cfg)
    by_operator, totals = Counter(), []
    for data in islice(loader, num_inputs):
        flops = FlopCountAnalysis(model, data)
        by_operator += flops.by_operator()
        totals.append(flops.total())
    means = {name: count / len(totals) / 1e9 for name, count in by_operator.items()}
    return "\n".join(
        [
            flop_count_table(flops),
            flop_count_str(flops),
            f"by operator (G): {means}",
            f"total (G): {np.mean(totals) / 1e9} +- {np.std(totals) / 1e9}",
        ]
    )


def count_activations(cfg, num_inputs: int) -> str:
    loader, model = instantiate(cfg.dataloader.test), load_model(cfg)
    by_operator, totals = Counter(), []
    for data in islice(loader, num_inputs):
        counts = activation_count_operators(model, data)
        by_operator += counts
        totals.append(sum(counts.values()))
    means = {name: count / len(totals) for name, count in by_operator.items()}
    return f"by operator (M): {means}\ntotal (M): {np.mean(totals)} +- {np.std(totals)}"


def main(words: list[str]) -> dict[str, str]:
    """What each task would print."""
    parser = default_argument_parser()
    parser.add_argument("--tasks", choices=TASKS, required=True, nargs="+")
    parser.add_argument("--num-inputs", type=int, default=100)
    args = parser.parse_args(words)
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    tasks = {
        "flop": lambda: count_flops(cfg, args.num_inputs),
        "activation": lambda: count_activations(cfg, args.num_inputs),
        "parameter": lambda: parameter_count_table(load_model(cfg), max_depth=5),
        "structure": lambda: str(load_model(cfg)),
    }
    return {task: tasks[task]() for task in args.tasks}

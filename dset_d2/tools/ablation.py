"""Train variants of a small config with equal budget and several seeds, and set them side by side.

    python -m dset_d2.tools.ablation --config-file projects/dset/configs/dset_r18_roadside.py \\
        --variant "DSET:" --variant "dense: model.encoder.moe=null model.decoder.moe=null" \\
        --seeds 0 1 --output output/ablation

A variant is a name, a colon and the overrides that make it; a first word that ends in .py is its
config instead of --config-file. The first variant is what GMACs and latencies are relative to.
Writes table.txt, results.json and curves.png, with what the last evaluation of each run found. Runs
that have come to it are not repeated, others go on from their last checkpoint.
"""

import argparse
import functools
import json
import math
import operator
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..analysis import count_flops
from ..analysis.latency import measure
from ..checkpoint import load_upstream
from ..files import write_atomically
from ..modeling import forward_context
from ..modeling.sparse import PruningRecord
from . import plot_curves
from .common import (
    ConfigToolParser,
    UsageError,
    build,
    build_model,
    entry_point,
    evaluated_names,
    read_config,
    write_json,
)


class Variant(NamedTuple):
    """One of the models that are compared."""

    name: str
    config_file: str | None  # None: that of --config-file
    overrides: list[str]


def parse_variant(text: str) -> Variant:
    """``name: [config.py] key=value ...``"""
    name, colon, rest = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 'name: overrides'")
    if set(name) & set("/\\="):
        raise argparse.ArgumentTypeError(f"{name!r} names a folder and a curve: no / \\ or = in it")
    words = rest.split()
    config_file = words.pop(0) if words and words[0].endswith(".py") else None
    return Variant(name.strip(), config_file, words)


class Run(NamedTuple):
    """One training: a variant with a seed."""

    config_file: str
    overrides: list[str]
    folder: Path


def claim(run: Run) -> None:
    """Note the run's settings in its folder.

    Raises:
        UsageError: if the folder holds another run.
    """
    file = run.folder / "settings.json"
    settings = {"config": run.config_file, "overrides": run.overrides}
    if (run.folder / "last_checkpoint").exists():
        if not file.exists() or json.loads(file.read_text()) != settings:
            raise UsageError(f"{run.folder} holds a run with other settings, see {file}")
    else:
        write_json(file, settings)


def train(run: Run, device: str | None = None) -> None:
    """Run our launcher in a process of its own, or what is left of it."""
    config_file, overrides, folder = run
    if final_metrics(folder):
        return
    command = [sys.executable, "-W", "ignore", "-m", "dset_d2.tools.lazyconfig_train_net"]
    begun = (folder / "last_checkpoint").exists()
    command += ["--config-file", config_file, "--resume" if begun else "--overwrite"]
    command += ["train.report=false", *overrides, f"train.output_dir={folder}"]
    command += [f"train.device={device}"] if device else []
    with open(folder / "stdout.txt", "a") as log:
        failed = subprocess.run(command, stdout=log, stderr=log).returncode
    if failed:
        raise RuntimeError(f"training failed; {folder / 'stdout.txt'} says why")
    if not final_metrics(folder):
        raise RuntimeError(f"no evaluation at the end; {folder / 'stdout.txt'} may say why")


def final_metrics(folder: Path) -> dict[str, float] | None:
    """The last value of every metric of a run whose last iteration was evaluated, else None.

    The last checkpoint alone may stand before that evaluation, and a metric before the last
    checkpoint.
    """
    file = folder / "metrics.json"
    if not file.exists() or not (folder / "model_final.pth").exists():
        return None
    # A run that was resumed may have logged an iteration twice: the later attempt counts.
    rows = sorted(plot_curves.read_metrics(file), key=lambda row: row["iteration"])
    last = [row for row in rows if row["iteration"] == rows[-1]["iteration"]]
    if not any("bbox/AP" in row for row in last):
        return None
    return functools.reduce(operator.or_, rows)


def trained(cfg: DictConfig, folder: Path) -> nn.Module:
    model = build_model(cfg).eval()
    load_upstream(model, folder / "model_final.pth")
    return model


def untrained(cfg: DictConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(cfg).eval()


@torch.no_grad()
def foreground_recall(model: nn.Module, cfg: DictConfig) -> tuple[float, float] | None:
    """Share of the foreground tokens of the test set that are kept, and of all tokens.

    The second is what a random choice would keep of the foreground. None without a pruner.
    """
    mapper = instantiate(cfg.dataloader.test.mapper)
    mapper.is_train = True  # with the boxes, but the augmentation of the test
    found, wanted, kept, total = 0, 0, 0, 0
    for dataset_dict in instantiate(cfg.dataloader.test.dataset):
        inputs = mapper(dataset_dict)
        with forward_context(record=True) as context:
            model([inputs])
        pruning = [r for r in context.records.values() if isinstance(r, PruningRecord)]
        if not pruning:
            return None
        keep, mask = pruning[0].kept_cells(), pruning[0].foreground([model.target(inputs)])
        found, wanted = found + int((mask & keep).sum()), wanted + int(mask.sum())
        kept, total = kept + int(keep.sum()), total + keep.numel()
    return found / max(wanted, 1), kept / total


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ConfigToolParser(__doc__)
    parser.add_argument("--variant", type=parse_variant, action="append", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--latency-rounds", type=int, default=30)
    parser.add_device()
    args = parser.parse_args(argv)

    for option, values in (("--variant", [v.name for v in args.variant]), ("--seeds", args.seeds)):
        if repeated := sorted({str(x) for x in values if values.count(x) > 1}):
            parser.error(f"{option}: given more than once: {', '.join(repeated)}")
    variants = [v._replace(config_file=v.config_file or args.config_file) for v in args.variant]
    runs = [
        Run(config_file, [*own, *args.opts, f"train.seed={seed}"], args.output / f"{name}_{seed}")
        for seed in args.seeds
        for name, config_file, own in variants
    ]
    configs = [read_config(file, [*own, *args.opts], args.device) for _, file, own in variants]
    for cfg in configs:
        if len(names := evaluated_names(cfg)) > 1:
            raise UsageError(f"dataloader.test names {', '.join(names)}: name one to compare by")
        build_model(cfg)  # what is wrong shall not come out hours later
    for run in runs:
        claim(run)
    for run in tqdm(runs, desc="training", unit="run"):
        train(run, args.device)

    calls, rows = {}, []
    for (name, *_), cfg in zip(variants, configs):
        folders = [args.output / f"{name}_{seed}" for seed in args.seeds]
        model = trained(cfg, folders[0])
        mapper = build(cfg, "dataloader.test.mapper")
        inputs = [[mapper(x)] for x in build(cfg, "dataloader.test.dataset")[:8]]
        calls[name] = functools.partial(model, inputs[0])
        metrics = [final_metrics(folder) for folder in folders]
        rows.append(
            {
                "variant": name,
                "AP": [m["bbox/AP"] for m in metrics],
                "AP50": [m["bbox/AP50"] for m in metrics],
                "GMACs": float(np.mean([count_flops(model, x).total for x in inputs])) / 1e9,
                "parameters_M": sum(p.numel() for p in model.parameters()) / 1e6,
                "training_s_per_step": [m.get("time", math.nan) for m in metrics],
                "foreground_recall": [foreground_recall(trained(cfg, f), cfg) for f in folders],
                "foreground_recall_untrained": [
                    foreground_recall(untrained(cfg, seed), cfg) for seed in args.seeds
                ],
            }
        )
    with torch.no_grad():
        latencies = measure(calls, args.latency_rounds, warmup=5)
    for row in rows:
        row["latency_ratio"] = latencies[row["variant"]].ratio
        row["latency_ratio_quartiles"] = latencies[row["variant"]].ratio_quartiles
    report(rows, args)


def report(rows: list[dict], args: argparse.Namespace) -> None:
    """Write and print the table, write the numbers and the curves."""
    table = tabulate(
        [
            (
                row["variant"],
                " ".join(f"{x:.1f}" for x in row["AP"]),
                " ".join(f"{x:.1f}" for x in row["AP50"]),
                f"{row['GMACs']:.3f}",
                f"{row['GMACs'] / rows[0]['GMACs']:.3f}",
                f"{row['parameters_M']:.2f}",
                f"{row['latency_ratio']:.3f}",
                f"{np.mean(row['training_s_per_step']):.2f}",
                recall_text(row),
            )
            for row in rows
        ],
        headers=("variant", "AP per seed", "AP50 per seed", "GMACs", "ratio", "M parameters",
                 "latency ratio", "training s/step", "foreground kept | chance | untrained"),
    )  # fmt: skip
    write_atomically(args.output / "table.txt", lambda f: f.write(f"{table}\n".encode()))
    write_json(args.output / "results.json", rows)
    folders = [f"{n}={args.output}/{n}_{seed}" for n, *_ in args.variant for seed in args.seeds]
    curves = ["--output", str(args.output / "curves.png")]
    curves += ["--metrics", "total_loss", "bbox/AP", "bbox/AP50"]
    plot_curves.main(["--runs", *folders, *curves])
    print(table)


def recall_text(row: dict) -> str:
    """Means over the seeds; blank without a pruner."""
    if row["foreground_recall"][0] is None:
        return ""
    kept, chance = np.mean(row["foreground_recall"], axis=0)
    before, _ = np.mean(row["foreground_recall_untrained"], axis=0)
    return f"{kept:.3f} | {chance:.3f} | {before:.3f}"


if __name__ == "__main__":
    main()

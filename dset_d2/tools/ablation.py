"""Train variants of a small config with equal budget and several seeds, and set them side by side.

    python -m dset_d2.tools.ablation --config-file projects/dset/configs/dset_r18_roadside.py \\
        --variant "DSET:" --variant "dense: model.encoder.moe=null model.decoder.moe=null" \\
        --seeds 0 1 --output output/ablation

A variant is a name, a colon and the overrides that make it; a first word that ends in .py is its
config instead of --config-file. The first variant is what AP, GMACs and latencies are relative to.
--jobs N trains and evaluates N runs side by side, each with one thread, in training on a core of
its own.

With --keep-ratios 0.7 0.5 the trained weights of every variant that prunes tokens are evaluated at
these ratios and at 1 as well, in rows such as "DSET @0.5"; their AP is relative to that of the same
weights at 1. --scorers learned attention does so with each of these scorers, where tokens are
pruned in a backbone.

Writes table.txt, results.json, curves.png of the trainings, and tradeoff.png: AP against time, with
a curve for the ratios of one variant and for variants whose names differ in a number at the end.
Runs that have come to their last evaluation are not repeated, others go on from their last
checkpoint; evaluations of trained weights are kept beside them, in evaluations.json.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from ..analysis import count_flops
from ..analysis.latency import measure
from ..checkpoint import load_upstream
from ..files import write_atomically
from ..modeling import Knobs, forward_context
from ..modeling.sparse import PruningRecord, TokenPruner
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
from .preparation import check_data
from .trainings import Run, claim, final_metrics, train, usable_cores

SCORERS = ("learned", "attention")
TRACED = 2  # test images whose multiply-adds are counted
WEIGHTS, EVALUATIONS = "model_final.pth", "evaluations.json"
NUMBERED = re.compile(r"(.+?)\s+(\d+(?:\.\d+)?)")  # the name of one of several on a curve


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ConfigToolParser(__doc__)
    parser.add_variants(required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[], metavar="RATIO")
    parser.add_argument(
        "--scorers", nargs="+", choices=SCORERS, default=[], help="default: as configured"
    )
    parser.add_argument("--latency-rounds", type=int, default=30)
    parser.add_device()
    args = parser.parse_args(argv)
    if repeated := sorted({str(seed) for seed in args.seeds if args.seeds.count(seed) > 1}):
        parser.error(f"--seeds: given more than once: {', '.join(repeated)}")
    if args.latency_rounds < 1:
        parser.error(f"--latency-rounds {args.latency_rounds} must be positive")
    cores = len(usable_cores())
    if not 1 <= args.jobs <= cores:
        parser.error(f"--jobs {args.jobs} must lie in 1..{cores}, one for each core that is free")
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            parser.error(f"--keep-ratios {ratio:g} must lie in (0, 1]")
    if args.scorers and not args.keep_ratios:
        parser.error("--scorers needs --keep-ratios, at which they choose tokens")
    return args


class Setting(NamedTuple):
    """How trained weights are used: as configured, or otherwise without more training."""

    keep_ratio: float | None = None
    scorer: str | None = None

    @property
    def knobs(self) -> Knobs:
        return Knobs(keep_ratio=self.keep_ratio)

    def __str__(self) -> str:
        if self.keep_ratio is None:
            return "as configured"
        return f"@{self.keep_ratio:.12g}" + (f" {self.scorer}" if self.scorer else "")


def settings_of(model: nn.Module, args: argparse.Namespace) -> list[Setting]:
    """The settings that a variant's trained weights are evaluated at; the first is its own."""
    own = Setting()
    if not args.keep_ratios or "keep_ratio" not in model.knob_limits:
        return [own]
    scorers: list[str | None] = [None]
    configured = {pruner.config.scorer for pruner in scoring_pruners(model)}
    if args.scorers and configured:
        # What was trained with another scorer has no learned one.
        learned = configured == {"learned"}
        usable = [x for x in dict.fromkeys(args.scorers) if learned or x != "learned"]
        scorers = [None if configured == {x} else x for x in usable]
    ratios = sorted({1.0, *args.keep_ratios}, reverse=True)
    return [own, *(Setting(ratio, scorer) for scorer in scorers for ratio in ratios)]


def scoring_pruners(model: nn.Module) -> list[TokenPruner]:
    """The backbone's pruners, whose scorer can be chosen; an encoder's is the learned one."""
    return [part for part in model.backbone.modules() if isinstance(part, TokenPruner)]


class Candidate(NamedTuple):
    """A variant's runs, one for each seed, and the settings that they are evaluated at."""

    name: str
    runs: list[Run]
    settings: list[Setting]


def candidates_of(args: argparse.Namespace) -> list[Candidate]:
    """The variants, once all of their models could be built: what is wrong shall not come out
    hours later.

    Raises:
        UsageError: if one has several test sets, or none has what is to be evaluated.
    """
    candidates, scored = [], False
    for name, config_file, own in args.variant:
        file, overrides = config_file or args.config_file, [*own, *args.opts]
        cfg = read_config(file, overrides, args.device)
        if len(names := evaluated_names(cfg)) > 1:
            raise UsageError(f"dataloader.test names {', '.join(names)}: name one to compare by")
        model = build_model(cfg)
        runs = [
            Run(file, [*overrides, f"train.seed={seed}"], args.output / f"{name}_{seed}")
            for seed in args.seeds
        ]
        candidates.append(Candidate(name, runs, settings_of(model, args)))
        scored = scored or bool(args.scorers and scoring_pruners(model))
    if args.keep_ratios and all(len(x.settings) == 1 for x in candidates):
        raise UsageError(
            "--keep-ratios: no variant has the knob keep_ratio, which token pruning has"
        )
    if args.scorers and not scored:
        raise UsageError("--scorers: no variant prunes tokens in its backbone by a scorer")
    return candidates


def trained(cfg: DictConfig, folder: Path, scorer: str | None) -> nn.Module:
    """A run's model, with another scorer if one is named."""
    model = build_model(cfg).eval()
    load_upstream(model, folder / WEIGHTS)
    if scorer:
        choose_scorer(model, scorer)
    return model


def choose_scorer(model: nn.Module, scorer: str) -> None:
    """Let the backbone's pruners choose tokens by another scorer, one that needs no weights."""
    # A prior is a part of the learned one.
    changes: dict[str, Any] = {"scorer": scorer, "spatial_prior": None}
    for pruner in scoring_pruners(model):
        pruner.config = dataclasses.replace(pruner.config, **changes)


def untrained(cfg: DictConfig) -> nn.Module:
    torch.manual_seed(cfg.train.seed)
    return build_model(cfg).eval()


def detections(model: nn.Module, inputs: list[dict], knobs: Knobs) -> Any:
    with forward_context(knobs=knobs):
        return model(inputs)


def stored_evaluations(folder: Path) -> dict[str, dict]:
    """What was found of the present weights of a run, by setting."""
    file = folder / EVALUATIONS
    if not file.exists() or file.stat().st_mtime_ns < (folder / WEIGHTS).stat().st_mtime_ns:
        return {}
    return json.loads(file.read_text())


def evaluate_all(candidates: list[Candidate], args: argparse.Namespace) -> None:
    """Evaluate all runs at all settings, as many side by side as were trained so; what is stored in
    their folders is not repeated."""
    pending = [
        (run, setting)
        for _, runs, settings in candidates
        for run in runs
        for setting in settings
        if str(setting) not in stored_evaluations(run.folder)
    ]
    work = functools.partial(evaluate, args=args)
    with ExitStack() as stack:
        results: Iterable[dict] = map(work, pending)
        if args.jobs > 1:
            # Not multiprocessing's Pool, whose processes may not have a loader's workers.
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,))
            results = stack.enter_context(pool).map(work, pending)
        bar = tqdm(results, desc="evaluating", unit="evaluation", total=len(pending))
        for (run, setting), result in zip(pending, bar):
            found = stored_evaluations(run.folder)
            found[str(setting)] = result
            write_json(run.folder / EVALUATIONS, found)


def evaluate(task: tuple[Run, Setting], args: argparse.Namespace) -> dict:
    """What a row says of one run."""
    run, setting = task
    cfg = read_config(run.config_file, run.overrides, args.device)
    # Evaluators write there what would else replace the training's own detections.
    cfg.train.output_dir = str(args.output / "evaluations" / f"{run.folder.name} {setting}")
    model = trained(cfg, run.folder, setting.scorer)
    macs = [count_flops(model, [x], setting.knobs).total for x in first_inputs(cfg, TRACED)]
    found: dict[str, Any] = {"GMACs": float(np.mean(macs)) / 1e9}
    with forward_context(knobs=setting.knobs):
        found["foreground_recall"] = foreground_recall(model, cfg)
        if setting != Setting():
            metrics = check_data(cfg, None)(model)["bbox"]
            return found | {"AP": metrics["AP"], "AP50": metrics["AP50"]}
    found["foreground_recall_untrained"] = foreground_recall(untrained(cfg), cfg)
    metrics = final_metrics(run.folder)
    found |= {"AP": metrics["bbox/AP"], "AP50": metrics["bbox/AP50"]}
    return found | {"training_s_per_step": metrics.get("time", math.nan)}


def first_inputs(cfg: DictConfig, count: int) -> list[dict]:
    """The detector's inputs of so many images of the test set."""
    mapper = build(cfg, "dataloader.test.mapper")
    return [mapper(x) for x in build(cfg, "dataloader.test.dataset")[:count]]


@torch.no_grad()
def foreground_recall(model: nn.Module, cfg: DictConfig) -> tuple[float, float] | None:
    """Share of the foreground tokens of the test set that are kept, and of all tokens.

    The second is what a random choice would keep of the foreground. None without a pruner; of
    several the first. Knobs are those of the surrounding context.
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


def measure_rows(candidates: list[Candidate], args: argparse.Namespace) -> list[dict]:
    """A row for each variant at each setting: what its runs were found to be, and their times."""
    rows, calls = [], {}
    for name, runs, settings in candidates:
        cfg = read_config(runs[0].config_file, runs[0].overrides, args.device)
        inputs = first_inputs(cfg, 1)
        scorers = {setting.scorer for setting in settings}
        models = {scorer: trained(cfg, runs[0].folder, scorer) for scorer in scorers}
        stored = [stored_evaluations(run.folder) for run in runs]
        for setting in settings:
            model = models[setting.scorer]
            found = [evaluations[str(setting)] for evaluations in stored]
            row: dict[str, Any] = {**labels(name, setting, candidates[0].name)}
            row |= {key: [values[key] for values in found] for key in found[0]}
            row["GMACs"] = float(np.mean(row["GMACs"]))
            row["parameters_M"] = sum(p.numel() for p in model.parameters()) / 1e6
            calls[row["variant"]] = functools.partial(detections, model, inputs, setting.knobs)
            rows.append(row)
    with torch.no_grad():
        latencies = measure(calls, args.latency_rounds, warmup=5)
    for row in rows:
        row["latency_ratio"] = latencies[row["variant"]].ratio
        row["latency_ratio_quartiles"] = latencies[row["variant"]].ratio_quartiles
    add_differences(rows)
    return rows


def labels(name: str, setting: Setting, first: str) -> dict[str, str]:
    """What a row is called, the curve of the picture that it is a point of and its label there,
    and the row that its AP is compared with."""
    if setting == Setting():
        numbered = NUMBERED.fullmatch(name)
        curve, point = numbered.groups() if numbered else (name, "")
        return {"variant": name, "curve": curve, "point": point, "reference": first}
    row, curve = f"{name} {setting}", f"{name} {setting.scorer or ''}".strip()
    whole = setting._replace(keep_ratio=1.0)
    reference = first if setting == whole else f"{name} {whole}"
    return {
        "variant": row,
        "curve": curve,
        "point": f"{setting.keep_ratio:g}",
        "reference": reference,
    }


def add_differences(rows: list[dict]) -> None:
    """Add each row's difference of AP to its reference, seed by seed."""
    aps = {row["variant"]: row["AP"] for row in rows}
    for row in rows:
        row["AP_difference"] = np.subtract(row["AP"], aps[row["reference"]]).tolist()


def report(rows: list[dict], args: argparse.Namespace) -> None:
    """Write and print the table, write the numbers, the curves and the picture of AP and time."""
    table = tabulate(
        [
            (
                row["variant"],
                " ".join(f"{x:.1f}" for x in row["AP"]),
                difference_text(row),
                row["reference"] if row["reference"] != row["variant"] else "",
                " ".join(f"{x:.1f}" for x in row["AP50"]),
                f"{row['GMACs']:.3f}",
                f"{row['GMACs'] / rows[0]['GMACs']:.3f}",
                f"{row['parameters_M']:.2f}",
                f"{row['latency_ratio']:.3f}",
                mean_text(row.get("training_s_per_step")),
                recall_text(row),
            )
            for row in rows
        ],
        headers=("variant", "AP per seed", "AP difference (spread)", "to", "AP50 per seed", "GMACs",
                 "ratio", "M parameters", "latency ratio", "training s/step",
                 "foreground kept | chance | untrained"),
        disable_numparse=True,
    )  # fmt: skip
    text = f"{table}\n\n{shortcomings(rows)}\n"
    write_atomically(args.output / "table.txt", lambda f: f.write(text.encode()))
    write_json(args.output / "results.json", rows)
    folders = [f"{n}={args.output}/{n}_{seed}" for n, *_ in args.variant for seed in args.seeds]
    curves = ["--output", str(args.output / "curves.png")]
    curves += ["--metrics", "total_loss", "bbox/AP", "bbox/AP50"]
    plot_curves.main(["--runs", *folders, *curves])
    figure = draw_tradeoff(rows)
    write_atomically(args.output / "tradeoff.png", lambda f: figure.savefig(f, format="png"))
    print(text)


def mean_text(values: list[float] | None) -> str:
    return f"{np.mean(values):.2f}" if values else ""


def spread(values: list[float]) -> float:
    """Between the seeds: the greatest less the least."""
    return max(values) - min(values)


def difference_text(row: dict) -> str:
    """Mean over the seeds of the difference to another row with the same seed, and its spread."""
    values = row["AP_difference"]
    if row["reference"] == row["variant"]:
        return ""
    return f"{np.mean(values):+.1f}" + (f" ({spread(values):.1f})" if len(values) > 1 else "")


def recall_text(row: dict) -> str:
    """Means over the seeds; blank without a pruner, and where nothing was measured."""
    if row["foreground_recall"][0] is None:
        return ""
    shares = np.mean(row["foreground_recall"], axis=0).tolist()
    if "foreground_recall_untrained" in row:
        shares.append(np.mean(row["foreground_recall_untrained"], axis=0)[0])
    return " | ".join(f"{share:.3f}" for share in shares)


def shortcomings(rows: list[dict]) -> str:
    """What the table cannot show."""
    count = len(rows[0]["AP"])
    if count == 1:
        return (
            "1 seed: how far two trainings of one variant differ is not known, so no difference "
            "between trainings means anything."
        )
    widest = max(rows, key=lambda row: spread(row["AP"]))
    return (
        f"{count} seeds: those of one row differ by up to {spread(widest['AP']):.1f} AP "
        f"({widest['variant']}). A smaller difference between trainings means nothing, nor one "
        "between evaluations of the same weights that is within its own spread."
    )


def draw_tradeoff(rows: list[dict]) -> Figure:
    """AP against time: large marks are means over the seeds, small ones are the seeds."""
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, curve in enumerate(dict.fromkeys(row["curve"] for row in rows)):
        points = [row for row in rows if row["curve"] == curve]
        points.sort(key=lambda row: row["latency_ratio"])
        times = [row["latency_ratio"] for row in points]
        means = [np.mean(row["AP"]) for row in points]
        style = plot_curves.style(index)
        axes.plot(times, means, markersize=6, linewidth=1.5, label=curve, **style)
        seeds = np.array([row["AP"] for row in points])
        axes.plot(times, seeds, linestyle="", marker=".", markersize=4, color=style["color"])
        for row, time, mean in zip(points, times, means):
            axes.annotate(
                row["point"], (time, mean), (4, 4), textcoords="offset points",
                fontsize="x-small", color=style["color"],
            )  # fmt: skip
    axes.set_xlabel(f"time for an image / that of {rows[0]['variant']}")
    axes.set_ylabel("AP, % (small: each seed)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


@entry_point
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    candidates = candidates_of(args)
    # Seed by seed, so that a study which is cut short has compared all variants once.
    runs = [run for same_seed in zip(*(x.runs for x in candidates)) for run in same_seed]
    for run in runs:
        claim(run)
    train(runs, args.device, args.jobs)
    evaluate_all(candidates, args)
    report(measure_rows(candidates, args), args)


if __name__ == "__main__":
    main()

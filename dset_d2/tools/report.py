"""Several runs in one table, and the report that our launcher ends each run with.

    python -m dset_d2.tools.report output/dense output/sparse --output runs.md --json runs.json

sets the folders' AP, AP50 and AP75, parameters, those that work on one token, multiply-adds (GMACs,
1 multiply-add = 1) and images per second side by side, as their report.json have them. Of a run
without one, metrics.json tells the AP of its best evaluation; what was not measured is blank.
"""

import copy
import fnmatch
import gc
import json
import logging
import math
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import nn

from ..analysis import count_flops, count_parameters, measure
from ..checkpoint import load_upstream
from ..data.checks import dataset_names
from ..data.mapper import read_picture
from ..engine.console import ORDER, kind_of
from ..engine.folder import CONFIG
from ..files import write_atomically
from ..modeling.sparse import MemoryPruner, MoE, TokenPruner
from ..synthetic.dataset import MARKER
from ..visualization import (
    detection_picture,
    mean_statistics,
    observe,
    plot_routing,
    rendered,
    routing_records,
    sparsity_pictures,
)
from .common import (
    ToolParser,
    UsageError,
    build,
    build_model,
    check_output,
    class_names,
    describe_device,
    entry_point,
    in_one_line,
    write_json,
)
from .plot_curves import Curve, curve_of, draw_curves, read_metrics

logger = logging.getLogger(__name__)

REPORT, TEXT = "report.json", "report.md"
TRACED, PICTURED = 2, 3  # test images whose multiply-adds are counted, and that are drawn
ROUNDS, WARMUP = 8, 2  # calls that are timed, and that come before
WIDTH = 1600  # of pictures, in pixels, at most
SPARSE = (MoE, TokenPruner, MemoryPruner)
USAGE = re.compile(r"moe/(.+)/usage_(\d+)")
KEEP = re.compile(r"(?:pruning|memory)/(.+)/keep_ratio")
# What the table shows, by the names in report.json: heading, scale and digits.
COLUMNS = {
    "AP": ("AP", 1, 1),
    "AP50": ("AP50", 1, 1),
    "AP75": ("AP75", 1, 1),
    "parameters": ("parameters (M)", 1e-6, 2),
    "active_parameters": ("active (M)", 1e-6, 2),
    "macs": ("GMACs", 1e-9, 2),
    "images_per_second": ("images/s", 1, 1),
}
SETTINGS = (
    "train.epochs",
    "train.max_iter",
    "train.images",
    "train.seed",
    "train.amp.enabled",
    "train.ema",
    "train.init_checkpoint",
    "train.best_metric",
    "dataloader.train.dataset.names",
    "dataloader.test.dataset.names",
    "dataloader.train.total_batch_size",
    "dataloader.image_size",
    "optimizer.lr",
    "optimizer.params.rules",
    "model.folder",
    "model.prompts",
    "model.backbone.pruning",
    "model.backbone.moe",
    "model.backbone.windows",
    "model.backbone.scale",
    "model.encoder.pruning",
    "model.encoder.moe",
    "model.decoder.moe",
    "model.decoder.memory_pruning",
    "model.decoder.num_queries",
    "model.decoder.num_classes",
)
FILES = {
    "report.md": "this report",
    "report.json": "its numbers, for dset_d2.tools.report",
    "report_*": "its pictures",
    "config.yaml": "the whole config, overrides included",
    "metrics.json": "every logged number, a line per logged step",
    "log.txt*": "the log: environment, model, all messages, tables of evaluations",
    "events.out.tfevents.*": "the same numbers, and pictures, for TensorBoard",
    "model_best.pth": "weights of the best evaluation, averaged ones included",
    "model_final.pth": "weights after the last step, and all that --resume needs",
    "model_0*.pth": "checkpoints on the way",
    "last_checkpoint": "the name of the one that --resume starts from",
    "coco_instances_results.json": "detections of the last evaluation, in COCO's format",
    "instances_predictions.pth": "the same as Detectron2 keeps them",
    "*_coco_format.json": "the test set's annotations, in COCO's format",
}
# DAIR-V2X-I, val, in percent: model, AP, AP50, AP75; None where nothing was published.
PUBLISHED = (
    ("RT-DETR-R18", 58.51, 80.77, 66.58),
    ("DSET-R18", 57.80, 80.54, 65.54),
    ("RT-DETR-R34", 58.98, 81.46, 66.54),
    ("DSET-R34", 59.60, 81.85, 67.66),
    ("MoE-RTDETR-R34", 59.8, 82.0, None),
    ("YOLOv8-S", 58.4, 83.2, None),
)


def write_report(cfg: DictConfig, config_file: str, overrides: Sequence[str]) -> None:
    """Write report.md, report.json and pictures of a finished run to its folder.

    What fails is left out with a warning; nothing of it ends the run.

    Args:
        cfg: of the run.
        config_file, overrides: how it was asked for.
    """
    try:
        make_report(cfg, config_file, overrides)
    except Exception as error:
        logger.warning("no report: %s", in_one_line(error))


def make_report(cfg: DictConfig, config_file: str, overrides: Sequence[str]) -> None:
    """As :func:`write_report`, but what concerns all parts of the report is an error."""
    start = time.perf_counter()
    folder = Path(cfg.train.output_dir)
    gc.collect()  # what is left of the training takes memory and time
    report: dict[str, Any] = {
        "run": folder.name,
        "config": config_file,
        "overrides": list(overrides),
    }
    report |= {"settings": settings_of(cfg), "missing": []}

    def add(part: Callable, *args) -> Any:
        try:
            return part(*args)
        except Exception as error:  # of whatever kind: the run itself went well
            reason = f"{part.__name__}: {in_one_line(error)}"
            logger.warning("the report lacks %s", reason)
            report["missing"].append(reason)
            return None

    report |= add(trained, folder, cfg.train.best_metric) or {}
    add(draw_history, folder)
    images = add(test_images, cfg)
    if images:
        report |= {"generated_scenes": generated(images[0])}
        model = add(load_best, cfg, folder)
        if model is not None:
            mapper = build(cfg, "dataloader.test.mapper")
            report |= add(measured, model, [mapper(x) for x in images[:TRACED]]) or {}
            add(draw_images, model, images, mapper, class_names(cfg), folder)
    names = dataset_names(cfg.dataloader.test.get("dataset", {}))
    report |= {"published": published(report, names), "seconds": time.perf_counter() - start}
    report = finite(report)
    write_json(folder / REPORT, report)
    text = "\n\n".join(sections(report, folder))
    write_atomically(folder / TEXT, lambda file: file.write(f"{text}\n".encode()))
    logger.info("Report: %s (made in %.0f s)", folder / TEXT, report["seconds"])


# What a run's files tell.


def settings_of(cfg: DictConfig) -> dict[str, object]:
    """Those of :data:`SETTINGS` that the config has."""
    found = {}
    for key in SETTINGS:
        value = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
            for group in value if isinstance(value, list) else [value]:
                if isinstance(group, dict):
                    group.pop("_target_", None)
        if value is not None:
            found[key] = value
    return found


def curves_in(folder: Path) -> dict[str, Curve]:
    """The curves of all metrics in a run's metrics.json.

    Raises:
        UsageError: if there is none, or nothing in it.
    """
    path = folder / "metrics.json"
    rows = read_metrics(path)
    names = set().union(*rows) - {"iteration"}
    return {name: curve_of(path, rows, name) for name in sorted(names)}


def trained(folder: Path, best_metric: str) -> dict:
    """Metrics of the best evaluation, when it was, and how long a step took.

    All keys have None where the run has no such thing, as without evaluations.
    """
    curves = curves_in(folder)
    scores = {i: x for i, x in curves.get(best_metric, {}).items() if math.isfinite(x)}
    best = max(scores, key=scores.get, default=None)
    metrics = {name: curve[best] for name, curve in curves.items() if best in curve}
    prefix = best_metric.rpartition("/")[0] + "/"
    own = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
    last = {name: next(reversed(curve.values())) for name, curve in curves.items()}
    usage: dict[str, dict] = defaultdict(dict)
    for name, value in last.items():
        if match := USAGE.fullmatch(name):
            usage[match[1]][int(match[2])] = value
    return {
        **{name: own.get(name) for name in ("AP", "AP50", "AP75")},
        "per_class": {k.removeprefix("AP-"): v for k, v in own.items() if k.startswith("AP-")},
        "metrics": {k: v for k, v in metrics.items() if "/AP" in k},
        "best_metric": best_metric,
        "best_step": None if best is None else best + 1,
        "best_epoch": curves.get("epoch", {}).get(best),
        "steps": 1 + max(next(reversed(curve)) for curve in curves.values()),
        "epochs": last.get("epoch"),
        "seconds_per_step": median(curves.get("time")),
        "total_loss": last.get("total_loss"),
        "validation_loss": last.get("validation/total_loss"),
        "expert_usage": {place: [x[i] for i in sorted(x)] for place, x in usage.items()},
        "keep_ratio": {m[1]: x for name, x in last.items() if (m := KEEP.fullmatch(name))},
    }


def median(curve: Curve | None) -> float | None:
    return float(np.median(list(curve.values()))) if curve else None


def panels_of(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """The panels of the report's curves by their titles, each with its curves by name."""
    panels: dict[str, dict] = defaultdict(dict)
    for name, title, key in (
        ("total_loss", "loss", "training"),
        ("validation/total_loss", "loss", "validation"),
        ("lr", "learning rate", "lr"),
    ):
        if name in curves:
            panels[title][key] = curves[name]
    kinds: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for name, curve in sorted(curves.items(), key=lambda item: natural(item[0])):
        task, _, metric = name.rpartition("/")
        if name.startswith("loss_"):
            for iteration, value in curve.items():
                kinds[kind_of(name)][iteration] += value
        elif metric in ("AP", "AP50", "AP75"):
            panels[f"{task}, %"][metric] = curve
        elif match := USAGE.fullmatch(name):
            panels[f"usage of experts, {match[1]}"][f"expert {match[2]}"] = curve
        elif match := KEEP.fullmatch(name):
            panels["keep ratio"][match[1]] = curve
    panels["training loss by kind"] = {kind: kinds[kind] for kind in ORDER if kind in kinds}
    return {title: panel for title, panel in panels.items() if panel}


def natural(name: str) -> list[str | int]:
    """A key to sort names by, of whose numbers the lower come first."""
    return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)]


def draw_history(folder: Path) -> None:
    """report_curves.png: losses, metrics, rates; experts and kept tokens over time."""
    panels = panels_of(curves_in(folder))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.6 * lines), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, index)
        arrays = {k: (np.array(list(c)), np.array([list(c.values())])) for k, c in curves.items()}
        draw_curves(axes, arrays)
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
        if title.startswith("usage"):
            axes.axhline(1 / len(curves), color="black", linewidth=0.8, linestyle="--")
    write_atomically(folder / "report_curves.png", lambda f: figure.savefig(f, format="png"))


# What its best weights do.


def test_images(cfg: DictConfig) -> list[dict]:
    """The test set's first dataset dicts."""
    dataset = build(cfg, "dataloader.test.dataset")
    return [copy.deepcopy(dataset[i]) for i in range(min(len(dataset), max(TRACED, PICTURED)))]


def generated(dataset_dict: dict) -> bool:
    """Whether an image is of this package's generated scenes."""
    folders = Path(dataset_dict["file_name"]).absolute().parents
    return any((folder / MARKER).exists() for folder in folders[:4])


def load_best(cfg: DictConfig, folder: Path) -> nn.Module:
    """The model with its best weights, else its last ones."""
    names = ("model_best.pth", "model_final.pth")
    weights = next((folder / name for name in names if (folder / name).exists()), None)
    if weights is None:
        raise UsageError(f"{folder}: neither {' nor '.join(names)}")
    model = build_model(cfg).eval()
    load_upstream(model, weights, whole=True)
    return model


@torch.no_grad()
def measured(model: nn.Module, inputs: list[dict]) -> dict:
    """Parameters, multiply-adds of the whole and of its parts, and speed, batch 1 in float32."""
    counts = count_parameters(model, inputs[:1])[""]
    flops = [count_flops(model, [x]).by_module for x in inputs]
    macs = {name: sum(x[name] for x in flops) / len(flops) for name in flops[0]}
    parts = [name for name, _ in model.named_children() if macs[name]]
    for name, module in model.named_modules():
        if isinstance(module, SPARSE):
            parts.append(name)
    latency = measure({"": partial(model, inputs[:1])}, ROUNDS, WARMUP)[""]
    return {
        "parameters": counts.total,
        "active_parameters": counts.active,
        "macs": macs[""],
        "macs_by_part": {name: macs[name] for name in parts},
        "traced_images": len(inputs),
        "images_per_second": 1 / latency.median,
        "latency": {k: v for k, v in asdict(latency).items() if "ratio" not in k},
        "device": describe_device(str(model.device)),
    }


def draw_images(
    model: nn.Module,
    images: list[dict],
    mapper: Callable,
    classes: Sequence[str],
    folder: Path,
) -> None:
    """Detections beside the ground truth; of the first image what sparse parts did with it."""
    routings = defaultdict(list)
    for index, dataset_dict in enumerate(images[:PICTURED], 1):
        image = read_picture(dataset_dict).image
        seen = observe(model, mapper(dataset_dict))
        truth = dataset_dict.get("annotations")
        pictures = {f"detections_{index}": detection_picture(image, seen.instances, truth, classes)}
        if index == 1:
            pictures |= sparsity_pictures(image, seen.records, seen.outputs)
        for name, picture in pictures.items():
            save(picture, folder / f"report_{name}.jpg")
        for place, routing in routing_records(seen.records).items():
            routings[place].append(routing)
    if routings:
        save(rendered(plot_routing(mean_statistics(routings))), folder / "report_experts.jpg")


def save(picture: np.ndarray, path: Path) -> None:
    """Write (H, W, 3) RGB uint8 as JPEG, not wider than :data:`WIDTH`."""
    height, width = picture.shape[:2]
    if width > WIDTH:
        size = WIDTH, round(height * WIDTH / width)
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    code = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    write_atomically(path, lambda file: file.write(code.tobytes()))


def published(report: dict, names: Sequence[str]) -> list[dict]:
    """Others' figures on the data set of the run, if there are any."""
    if list(names) != ["dair_v2x_i_val"] or report.get("generated_scenes", True):
        return []
    return [dict(zip(("model", "AP", "AP50", "AP75"), row)) for row in PUBLISHED]


# The text.


def sections(report: Mapping, folder: Path) -> Iterator[str]:
    """The parts of report.md; of what the report lacks there is none."""
    get = report.get
    yield f"# {report['run']}"
    yield table_of([row_of(report)])
    yield notes(report)
    if get("per_class"):
        yield "## Classes\n\n" + pipe(get("per_class").items(), ("class", "AP, %"), ".1f")
    others = {k: v for k, v in (get("metrics") or {}).items() if "-" not in k}
    if others:
        yield "## All metrics\n\n" + pipe(others.items(), ("metric", "%"), ".1f")
    if get("macs"):
        rows = [
            (name, x / 1e9, f"{x / get('macs'):.1%}") for name, x in get("macs_by_part").items()
        ]
        yield "## Multiply-adds\n\n" + pipe(rows, ("part", "GMACs", "share"), ".3f")
        yield (
            f"Mean of {get('traced_images')} test images; 1 multiply-add = 1. A sparse part's own; "
            "what it spares others shows in the part around it."
        )
    usage, kept = get("expert_usage") or {}, get("keep_ratio") or {}
    if usage or kept:
        shown = [(f"usage of experts, {k}", shares(v)) for k, v in usage.items()]
        shown += [(f"tokens kept, {k}", shares([x])) for k, x in kept.items()]
        yield "## Sparse parts, as logged last\n\n" + pipe(shown, ("what", "share"))
    if get("published"):
        rows = [tuple(row.values()) for row in get("published")]
        yield "## Published\n\n" + pipe(rows, ("model", "AP", "AP50", "AP75"))
        yield (
            "These are not of this run: they are the figures on DAIR-V2X-I val that the documents "
            "behind DSET publish of its models and of those it was compared with, in percent. "
            "Nothing of them was measured here."
        )
    elif get("generated_scenes"):
        yield "The scenes are generated: no published figure compares with these."
    pictures = sorted(folder.glob("report_*.*"))
    if pictures:
        yield "## Pictures\n\n" + "\n\n".join(f"![{p.stem}]({p.name})" for p in pictures)
    yield f"## Settings\n\n`{report['config']}` with these overrides:"
    yield "\n".join(["```", *report["overrides"], "```"])
    settings = get("settings").items()
    shown = [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in settings]
    yield pipe(shown, ("setting", "value"))
    present = sorted({path.name for path in folder.iterdir()} | {TEXT})
    found = [(", ".join(fnmatch.filter(present, key)), text) for key, text in FILES.items()]
    yield "## Files\n\n" + pipe([row for row in found if row[0]], ("file", "what it is"))
    yield f"Made in {report['seconds']:.0f} s; train.report=false leaves it out."


def notes(report: Mapping) -> str:
    """When the best evaluation was, how fast training and inference were, what is missing."""
    get = report.get
    lines = []
    if get("steps"):
        text = f"{get('steps')} steps"
        text += f" ({get('epochs'):.1f} epochs)" if get("epochs") else ""
        text += f", {get('seconds_per_step'):.3f} s each" if get("seconds_per_step") else ""
        lines.append(f"Trained for {text}.")
    if get("best_step"):
        epoch = f", epoch {get('best_epoch'):.1f}" if get("best_epoch") else ""
        best = f"by {get('best_metric')}, after step {get('best_step')}{epoch}"
        lines.append(f"AP of the best evaluation, {best}.")
    else:
        lines.append("No evaluation gave the metric that tells the best one.")
    if get("images_per_second"):
        lines.append(f"Images/s of single images in float32 on {get('device')}.")
    lines += [f"Missing: {reason}." for reason in get("missing")]
    return "\n".join(f"- {line}" for line in lines)


def shares(values: Sequence[float | None]) -> str:
    return " ".join("" if x is None else f"{x:.0%}" for x in values)


def pipe(rows: Iterable[Sequence], columns: Sequence[str], digits: str = "g") -> str:
    """A Markdown table; None is blank."""
    return tabulate(rows, columns, tablefmt="pipe", floatfmt=digits)


def finite(value: Any) -> Any:
    """NaN and infinity, which JSON has not, as None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Several runs.


def row_of(report: Mapping) -> dict:
    """What the table shows of a report; None where it says nothing.

    Raises:
        ValueError: if it holds something else than numbers; names it.
    """
    row = {"run": report.get("run"), "device": report.get("device")}
    for name in COLUMNS:
        value = row[name] = report.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} is {value!r}, not a number")
    return row


def table_of(rows: Sequence[Mapping]) -> str:
    """Runs in a table; blank where nothing is known."""
    lines = []
    for row in rows:
        cells = [row["run"]]
        for name, (_, scale, digits) in COLUMNS.items():
            known = row[name] is not None and math.isfinite(row[name])
            cells.append(f"{row[name] * scale:.{digits}f}" if known else "")
        lines.append(cells)
    heads = ("run", *(head for head, _, _ in COLUMNS.values()))
    align = ["left"] + ["right"] * len(COLUMNS)
    return tabulate(lines, heads, tablefmt="pipe", colalign=align, disable_numparse=True)


def read_run(folder: Path) -> dict:
    """A row for :func:`table_of`; a broken report is named, and other files are asked."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    path = folder / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError("not a report")
        return row_of(report) | {"run": str(folder)}
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        warn(f"{path}: {in_one_line(error)}")
    try:
        report = trained(folder, best_metric(folder))
    except UsageError as error:
        warn(error)
        report = {}
    return row_of(report) | {"run": str(folder)}


def best_metric(folder: Path) -> str:
    """By which a run chose its best weights, as its config says, else AP."""
    path, metric = folder / CONFIG, None
    try:
        # Read as data alone: an unknown folder's file shall run no code.
        metric = OmegaConf.select(OmegaConf.load(path), "train.best_metric")
    except FileNotFoundError:
        pass
    except Exception as error:  # of the parser's many kinds
        warn(f"{path}: {in_one_line(error)}")
    return metric if isinstance(metric, str) else "bbox/AP"


def warn(message: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, help="Markdown file for the table")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    outputs = [path for path in (args.output, args.json) if path]
    for output in outputs:
        check_output(output, [run / name for run in args.runs for name in FILES])
    rows = [read_run(folder) for folder in args.runs]
    table = table_of(rows)
    devices = sorted({row["device"] for row in rows if row["images_per_second"] is not None})
    if devices:
        table += f"\n\nimages/s: single images in float32 on {'; on '.join(devices)}"
    print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, lambda file: file.write(f"{table}\n".encode()))
    if args.json:
        write_json(args.json, finite(rows))


if __name__ == "__main__":
    main()

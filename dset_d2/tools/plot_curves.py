"""Training curves of several runs in one figure, from Detectron2's metrics.json.

    python -m dset_d2.tools.plot_curves --runs dense=output/dense_0 dense=output/dense_1 \\
        sparse=output/sparse --metrics total_loss bbox/AP --epoch-iters 120 --output curves.png

draws one panel for each metric. Every name has a colour, dashes and a mark of its own, and stands
at the end of its curve. Runs of one name, such as seeds, are averaged over the iterations that all
of them logged, and shaded from their least to their greatest value.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from ..files import write_atomically
from ..visualization import PALETTE
from .common import ToolParser, UsageError, entry_point

METRICS = ("total_loss", "bbox/AP", "bbox/AP50")
PANEL = (6.4, 4.0)  # inches
COLUMNS = 3
MARKED = 30  # curves of at most this many points show them all
COLOURS = PALETTE / 255
DASHES = ("-", "--", "-.", ":")
MARKS = "osD^vPX"
LABEL_GAP = 0.05  # between labels, as a share of a panel's height

Curve = dict[int, float]  # value by iteration, in order


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.json; broken ones, as a killed run leaves them, with a warning.

    Raises:
        UsageError: if there is no such file, or no line of it is of a metrics.json.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    rows, broken = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("iteration"), int):
            rows.append(row)
        else:
            broken.append(number)
    if not rows:
        raise UsageError(f"{path}: holds no line of metrics")
    if broken:
        numbers = ", ".join(map(str, broken))
        print(f"warning: {path}: left out broken lines: {numbers}", file=sys.stderr)
    return rows


def curve_of(path: Path, rows: list[dict], metric: str) -> Curve:
    """One metric of one run; what a resumed run went through again replaces the first attempt."""
    curve: Curve = {}
    for row in rows:
        if metric not in row:
            continue
        iteration, value = row["iteration"], row[metric]
        if not isinstance(value, (int, float)):
            raise UsageError(f"{path}: metric {metric!r} is {value!r} at iteration {iteration}")
        while curve and next(reversed(curve)) >= iteration:
            curve.popitem()
        curve[iteration] = float(value)
    if not curve:
        known = sorted(set().union(*rows) - {"iteration"})
        close = difflib.get_close_matches(metric, known) or known
        raise UsageError(f"{path}: no metric {metric!r}; there is: {', '.join(close)}")
    return curve


def merge(name: str, metric: str, curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Iterations (n,) that all runs of a name have logged, and the runs' values (runs, n)."""
    common = [i for i in curves[0] if all(i in curve for curve in curves)]
    if not common:
        raise UsageError(f"runs of {name!r} have no iteration in common with metric {metric!r}")
    ends = {next(reversed(curve)) for curve in curves}
    if len(ends) > 1:
        print(
            f"warning: {metric!r} of {name!r} is drawn to iteration {common[-1]} only; its runs"
            f" end at {', '.join(map(str, sorted(ends)))}",
            file=sys.stderr,
        )
    return np.array(common), np.array([[curve[i] for i in common] for curve in curves])


def load_runs(runs: Sequence[tuple[str, Path]], metrics: Sequence[str]) -> dict[str, dict]:
    """By metric and name: iterations and values as :func:`merge` gives them."""
    rows = [(name, path, read_metrics(path)) for name, path in runs]
    loaded = {}
    for metric in metrics:
        curves: dict[str, list[Curve]] = {}
        for name, path, content in rows:
            curves.setdefault(name, []).append(curve_of(path, content, metric))
        loaded[metric] = {name: merge(name, metric, group) for name, group in curves.items()}
    return loaded


def draw(loaded: dict[str, dict], epoch_iters: int | None = None) -> Figure:
    """A panel for each metric, with a curve for each name.

    Args:
        loaded: of :func:`load_runs`.
        epoch_iters: iterations of an epoch, for a second axis on top.
    """
    columns = min(COLUMNS, len(loaded))
    lines = -(-len(loaded) // columns)
    size = (PANEL[0] * columns, PANEL[1] * lines)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (metric, curves) in enumerate(loaded.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        draw_curves(axes, curves)
        axes.set_title(f"{metric}, %" if metric.rpartition("/")[2].startswith("AP") else metric)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
        if epoch_iters:
            # Iteration 0 is the first, so that an epoch ends at epoch_iters - 1.
            to_epoch = (lambda x: (x + 1) / epoch_iters, lambda x: x * epoch_iters - 1)
            top = axes.secondary_xaxis("top", functions=to_epoch)
            top.set_xlabel("epoch")
    return figure


def style(index: int) -> dict[str, Any]:
    """How the curve of that number looks, unlike those near it."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKS[index % len(MARKS)],
    }


def draw_curves(axes: Axes, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Curves that differ in colour, dashes and marks, with their names at their ends.

    Args:
        curves: by name iterations (n,) and values (runs, n).
    """
    ends = {}
    for index, (name, (iterations, values)) in enumerate(curves.items()):
        label = name if len(values) == 1 else f"{name} (mean of {len(values)})"
        mean, colour = values.mean(0), style(index)["color"]
        axes.plot(
            iterations,
            mean,
            **style(index),
            markevery=max(1, len(iterations) // MARKED),
            markersize=3,
            linewidth=1.5,
        )
        if len(values) > 1:
            low, high = values.min(0), values.max(0)
            axes.fill_between(iterations, low, high, color=colour, alpha=0.15, linewidth=0)
        if finite := np.flatnonzero(np.isfinite(mean)).tolist():
            ends[label] = (iterations[finite[-1]], mean[finite[-1]], colour)
    name_ends(axes, ends)


def name_ends(axes: Axes, ends: dict[str, tuple[float, float, np.ndarray]]) -> None:
    """Write names beside the panel, each at the height of its point and apart from the others.

    Args:
        ends: x, y and colour by name.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = apart([(y - low) / (high - low) for _, y, _ in ends.values()], LABEL_GAP)
    for (name, (x, y, colour)), height in zip(ends.items(), heights):
        axes.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords="axes fraction",
            color=colour,
            fontsize="small",
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in the same order, moved until neighbours are ``gap`` apart, around the same mean."""
    order = np.argsort(heights, kind="stable")
    places = np.array(heights, dtype=float)[order]
    steps = gap * np.arange(len(places))
    # Without the gaps, heights that may touch but not fall: the isotonic regression.
    moved = np.empty(len(places))
    moved[order] = isotonic_regression(places - steps).x + steps
    return moved.tolist()


def named_run(text: str) -> tuple[str, Path]:
    """``name=DIR`` to the name and the run's metrics.json."""
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=DIR")
    return name, Path(folder) / "metrics.json"


@entry_point
def main(argv: list[str] | None = None) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument(
        "--runs", type=named_run, nargs="+", required=True, metavar="name=DIR",
        help="folders with a metrics.json; repeat a name for the seeds of one run",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="image file, by its suffix")
    parser.add_argument("--metrics", nargs="+", default=METRICS, help="default: %(default)s")
    parser.add_argument("--epoch-iters", type=int, metavar="N", help="adds an axis of epochs")
    args = parser.parse_args(argv)
    if args.epoch_iters is not None and args.epoch_iters < 1:
        parser.error(f"--epoch-iters {args.epoch_iters} must be positive")
    kind = args.output.suffix[1:].lower()
    if kind not in FigureCanvasAgg.get_supported_filetypes():
        parser.error(f"--output {args.output}: cannot write files of type {kind!r}")
    loaded = load_runs(args.runs, args.metrics)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure = draw(loaded, args.epoch_iters)
    write_atomically(args.output, lambda file: figure.savefig(file, format=kind))
    print(f"drawn to {args.output}")


if __name__ == "__main__":
    main()

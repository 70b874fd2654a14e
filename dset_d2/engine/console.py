"""What a run shows on the console, a line at a time; its log file holds all the rest."""

import functools
import logging
import re
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import torch
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils.events import CommonMetricPrinter, EventStorage, get_event_storage
from detectron2.utils.logger import setup_logger

logger = logging.getLogger(__name__)

LOGGERS = ("fvcore", "detectron2", "dset_d2")
# Libraries' own messages that are of use to whoever watches a run; their warnings always are.
TELLING = ("dset_d2", "fvcore.common.checkpoint", "detectron2.engine.hooks")
COLOUR = re.compile(r"\x1b\[[\d;]*m")
DATE = "%m/%d %H:%M:%S"

# Kinds of losses, each with a pattern of their names; the first that is found counts.
KINDS = {
    "denoising": r"_dn_",
    "fgl": r"^loss_fgl",  # D-FINE's, of the edges' distributions, of all layers
    "ddf": r"^loss_ddf",
    "aux": r"_(aux|enc)_\d+$|_pre$",
    "class": r"^loss_(vfl|mal|focal|bce|ce|class)$",
    "box": r"^loss_bbox$",
    "iou": r"^loss_giou$",
    "sparse": r"^loss_(balance|z|foreground|sparsity|diversity)_",
}
ORDER = ("class", "box", "iou", "fgl", "ddf", "denoising", "aux", "sparse", "other")


class PlainFormatter(logging.Formatter):
    """Without the colours that Detectron2 puts into some of its messages."""

    def format(self, record: logging.LogRecord) -> str:
        return COLOUR.sub("", super().format(record))


class ConsoleFormatter(PlainFormatter):
    """The time and the message; what is no mere information says so."""

    def format(self, record: logging.LogRecord) -> str:
        self._style._fmt = "%(asctime)s  %(message)s"
        if record.levelno > logging.INFO:
            self._style._fmt = "%(asctime)s  %(levelname)s: %(message)s"
        return super().format(record)


class Selection(logging.Filter):
    """Passes our messages, those of libraries that tell something, and all warnings.

    What is said of data is said once, though evaluators and pictures load data sets again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.startswith("dset_d2.data"):
            text = record.getMessage()
            if text in self.said:
                return False
            self.said.add(text)
        return record.levelno > logging.INFO or record.name.startswith(TELLING)


@functools.cache
def console_handler() -> logging.Handler:
    """The process's one handler for the console: our messages, libraries' warnings."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(logging.INFO)
    handler.setFormatter(ConsoleFormatter(datefmt=DATE))
    handler.addFilter(Selection())
    return handler


def set_up_logs(folder: str, rank: int) -> None:
    """Log everything, without colours, to the folder's log.txt; the console gets a selection.

    Args:
        rank: of the process; only the first has a console, others' files have a number.
    """
    for name in LOGGERS:
        log = setup_logger(folder, rank, name=name, configure_stdout=False)
        for handler in log.handlers:
            text = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
            handler.setFormatter(PlainFormatter(text, DATE))
        if rank == 0:
            log.addHandler(console_handler())
    # Of machines with CUDA's compiler and no GPU, when the environment is looked at.
    torch_log = logging.getLogger("torch.utils.cpp_extension")
    torch_log.addFilter(lambda record: "No CUDA runtime is found" not in record.getMessage())


@contextmanager
def printed_to_log() -> Iterator[None]:
    """What is printed inside, as by pycocotools, goes to the log file."""
    with redirect_stdout(StringIO()) as printed:
        try:
            yield
        finally:
            if text := printed.getvalue().strip():
                logger.debug("Printed:\n%s", text)


def kind_of(loss: str) -> str:
    """The kind of a loss by its name, "other" if it is of none."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, loss)), "other")


def sums_by_kind(losses: Mapping[str, float]) -> dict[str, float]:
    """Losses, added up by their kinds, in the order in which these are shown."""
    sums: dict[str, float] = defaultdict(float)
    for name, value in losses.items():
        sums[kind_of(name)] += value
    return {kind: sums[kind] for kind in ORDER if kind in sums}


def loss_text(total: float, kinds: Mapping[str, float]) -> str:
    """``loss 12.30  class 0.512 ...``"""
    losses = {"loss": total, **kinds}.items()
    return "  ".join(f"{name} {value:z.{2 if abs(value) >= 1 else 3}f}" for name, value in losses)


def evaluation_lines(results: Mapping[str, Mapping]) -> list[str]:
    """AP, AP50 and AP75 of each task in one line; all metrics of a task without AP.

    Args:
        results: nested metrics as evaluators return them.
    """
    tasks: dict[str, dict] = defaultdict(dict)
    for name, value in flatten_results_dict(results).items():
        task, _, metric = name.rpartition("/")
        tasks[task][metric] = value
    lines = []
    for task, metrics in tasks.items():
        chosen = ("AP", "AP50", "AP75") if "AP" in metrics else metrics
        text = "  ".join(f"{x} {number(metrics[x])}" for x in chosen if x in metrics)
        lines.append(f"{task}: {text}" if task else text)
    return lines


def number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


class ConsoleWriter(CommonMetricPrinter):
    """One line per log period: losses by kind, rate, time left, memory.

    Losses are means over the steps since the line before, of at most ``window_size`` steps, so
    that the kinds add up to the total. Every single term is in metrics.json and TensorBoard.
    """

    def __init__(self, max_iter: int, window_size: int = 20) -> None:
        super().__init__(max_iter, window_size)
        self.shown = -1

    def write(self) -> None:
        storage = get_event_storage()
        # Detectron2 writes once more after the last step, also after one that failed.
        if storage.iter in (self._max_iter, self.shown) or "total_loss" not in storage.latest():
            return
        window = min(self._window_size, storage.iter - self.shown)
        self.shown = storage.iter
        logger.info("%s", self.line(storage, window))

    def line(self, storage: EventStorage, window: int) -> str:
        def mean(name: str) -> float:
            return storage.history(name).avg(storage.count_samples(name, window))

        latest = {name: value for name, (value, _) in storage.latest().items()}
        parts = [f"step {storage.iter + 1}/{self._max_iter}"]
        if "epoch" in latest:
            parts.append(f"epoch {latest['epoch']:.1f}")
        losses = {name: mean(name) for name in latest if name.startswith("loss_")}
        parts.append(loss_text(mean("total_loss"), sums_by_kind(losses)))
        if "lr" in latest:
            parts.append(f"lr {latest['lr']:.2g}")
        if eta := self._get_eta(storage):
            parts.append(f"ETA {eta}")
        parts.append(f"{peak_memory() / 2**30:.1f} GiB")
        return "  ".join(parts)


def peak_memory() -> int:
    """Bytes that this process had at its peak: of the GPU if it has one, else of its own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux

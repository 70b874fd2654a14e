"""Hooks of our launcher: averaged weights, epochs, evaluation, checkpoints, early stopping."""

import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from detectron2.config import LazyConfig
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import nearest
from ..data.mapper import read_picture
from ..visualization import (
    detection_picture,
    mean_statistics,
    observe,
    plot_routing,
    rendered,
    routing_records,
    sparsity_pictures,
)
from .checkpointer import AtomicCheckpointer
from .console import loss_text, sums_by_kind
from .ema import ModelEMA

logger = logging.getLogger(__name__)

NUMBERED = r"model_\d{7}\.pth"


def is_due(trainer: TrainerBase, period: int) -> bool:
    """Whether something is to happen now that happens every ``period`` steps and after the last.

    What comes after the last step happens within it, too, so that its checkpoint knows of it.
    """
    done = trainer.iter + 1
    return done == trainer.max_iter or (period > 0 and done % period == 0)


class EMAHook(HookBase):
    """Updates the average after every step."""

    def __init__(self, ema: ModelEMA, model: nn.Module) -> None:
        self.ema = ema
        self.model = model

    def after_step(self) -> None:
        self.ema.update(self.model)


class EpochReporter(HookBase):
    """Logs the passes over the training set, for people who think in epochs.

    Args:
        steps: of one pass; images per batch, which need not be a whole number.
    """

    def __init__(self, steps: float) -> None:
        self.steps = steps

    def after_step(self) -> None:
        done = (self.trainer.iter + 1) / self.steps
        self.trainer.storage.put_scalar("epoch", done, smoothing_hint=False)
        if int(done) > int(self.trainer.iter / self.steps):
            total = self.trainer.max_iter / self.steps
            logger.info("Epoch %d of %g is done", int(done), round(total, 2))


class Pictures(HookBase):
    """Shows in TensorBoard, every ``period`` steps, what a model finds in one image, and what its
    sparse parts do with it.

    Args:
        dataset_dict: of the image.
        mapper: makes it the model's input.
        classes: their names.
    """

    def __init__(
        self,
        period: int,
        model: nn.Module,
        dataset_dict: dict,
        mapper: Callable,
        classes: Sequence[str],
    ) -> None:
        self.period = period
        self.model = model
        self.dataset_dict = dataset_dict
        self.mapper = mapper
        self.classes = classes

    def after_step(self) -> None:
        if self.period <= 0 or (self.trainer.iter + 1) % self.period:
            return
        self.model.eval()
        seen = observe(self.model, self.mapper(self.dataset_dict))
        self.model.train()
        image = read_picture(self.dataset_dict).image
        truth = self.dataset_dict.get("annotations")
        pictures = sparsity_pictures(image, seen.records, seen.outputs)
        pictures["detections"] = detection_picture(image, seen.instances, truth, self.classes)
        if routing := routing_records(seen.records):
            statistics = mean_statistics({place: [x] for place, x in routing.items()})
            pictures["experts"] = rendered(plot_routing(statistics))
        for name, picture in pictures.items():
            self.trainer.storage.put_image(name, picture.transpose(2, 0, 1))


def average_statistics(model: nn.Module, *followers: nn.Module) -> None:
    """Give all processes the mean of their BatchNorm statistics, where these are their own.

    Args:
        model: in training mode.
        followers: copies of the model, such as its average, whose statistics are treated alike.
    """
    own = [
        isinstance(m, _BatchNorm)
        and not isinstance(m, nn.SyncBatchNorm)
        and m.training
        and m.track_running_stats
        for m in model.modules()
    ]
    norms = [m for copy in (model, *followers) for m, is_own in zip(copy.modules(), own) if is_own]
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    if not buffers or comm.get_world_size() == 1:
        return
    together = torch.cat(buffers)
    torch.distributed.all_reduce(together)
    together /= comm.get_world_size()
    for buffer, mean in zip(buffers, together.split([len(b) for b in buffers])):
        buffer.copy_(mean)


class StatisticsHook(HookBase):
    """Averages BatchNorm statistics over processes before these evaluate or save.

    Else each would evaluate another model, and the checkpoint would know the first one's data only.

    Args:
        periods: of evaluations and checkpoints, before whose hooks this one must come.
    """

    def __init__(self, periods: Sequence[int], model: nn.Module, ema: ModelEMA | None) -> None:
        self.periods = periods
        self.models = [model, ema.module] if ema else [model]

    def after_step(self) -> None:
        if any(is_due(self.trainer, period) for period in self.periods):
            average_statistics(*self.models)


class ConfigSaver(HookBase):
    """Saves the config once the first step went well: before, there is no run to speak of."""

    def __init__(self, cfg: DictConfig, path: str) -> None:
        self.cfg = cfg
        self.path = path

    def after_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter:
            LazyConfig.save(self.cfg, self.path)


class Evaluation(HookBase):
    """Evaluates every ``period`` steps and after the last.

    Args:
        evaluate: returns nested metrics, on the main process at least.
        metric: which of them others rely on.
    """

    def __init__(self, period: int, evaluate: Callable[[], dict], metric: str) -> None:
        self.period = period
        self.evaluate = evaluate
        self.metric = metric

    def after_step(self) -> None:
        if not is_due(self.trainer, self.period):
            return
        results = flatten_results_dict(self.evaluate())
        if results and self.metric not in results:
            logger.warning("%s", no_metric(self.metric, results))
        self.trainer.storage.put_scalars(**results, smoothing_hint=False)
        comm.synchronize()


class ValidationLoss(HookBase):
    """Logs, whenever an evaluation is due, losses on images that the model is not trained on.

    Args:
        losses: returns ``total_loss`` and the losses that make it up, on the main process at least.
    """

    def __init__(self, period: int, losses: Callable[[], dict[str, float]]) -> None:
        self.period = period
        self.losses = losses

    def after_step(self) -> None:
        if not is_due(self.trainer, self.period):
            return
        losses = self.losses()
        if comm.is_main_process():
            total = losses.pop("total_loss")
            kinds = sums_by_kind(losses)
            values = {f"validation/{name}": x for name, x in {"total_loss": total, **kinds}.items()}
            self.trainer.storage.put_scalars(**values, smoothing_hint=False)
            logger.info("validation: %s", loss_text(total, kinds))


def no_metric(metric: str, known: Iterable[str]) -> str:
    return f"train.best_metric={metric!r} is no metric{nearest(metric, known)}"


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, but a resumed run remembers the best metric so far, the last one included."""

    best_metric: float | None

    def after_step(self) -> None:
        if is_due(self.trainer, self._period):
            self._best_checking()

    def after_train(self) -> None:
        pass

    def _best_checking(self) -> None:
        value, iteration = self.trainer.storage.latest().get(self._val_metric, (math.nan, -1))
        best = -math.inf if self.best_metric is None else self.best_metric
        if iteration == self.trainer.iter and value > best:
            self.best_metric, self.best_iter = value, iteration
            state = {"iteration": iteration, "best": self.state_dict()}
            self._checkpointer.save(self._file_prefix, **state)
            logger.info("Best %s so far: %.4f", self._val_metric, value)

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict) -> None:
        # The best that is in the folder: it may be newer than the checkpoint that the run resumes
        # from, and there is none where a run goes on in another folder.
        path = Path(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if path.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True).get("best") or state
            best = max(
                state,
                saved,
                key=lambda s: -math.inf if s["best_metric"] is None else s["best_metric"],
            )
            self.best_metric, self.best_iter = best["best_metric"], best["best_iter"]


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's, but counts what earlier parts of a run have left towards ``max_to_keep``."""

    def __init__(
        self, checkpointer: AtomicCheckpointer, period: int, max_to_keep: int | None = None
    ) -> None:
        # fvcore's divides by the period; 0 saves after the last step alone, as evaluations do.
        super().__init__(checkpointer, period if period > 0 else sys.maxsize)
        self.keep = max_to_keep

    def before_train(self) -> None:
        super().before_train()
        self.clean()

    def after_step(self) -> None:
        super().after_step()
        if is_due(self.trainer, self.period):
            self.clean()

    def clean(self) -> None:
        """Remove the oldest checkpoints, but not what a resumed run starts from."""
        folder = Path(self.checkpointer.save_dir)
        for path in folder.glob("model_*.pth.tmp"):  # of a run that was killed
            path.unlink()
        last = Path(self.checkpointer.get_checkpoint_file()).name
        numbered = [p for p in folder.glob("model_*.pth") if re.fullmatch(NUMBERED, p.name)]
        found = [path for path in numbered if path.name != last]
        if self.keep:
            found.sort(key=lambda path: path.stat().st_mtime)
            spared = self.keep - bool(re.fullmatch(NUMBERED, last))
            for path in found[: max(0, len(found) - spared)]:
                path.unlink()


class EarlyStopping(HookBase):
    """Stops training when a metric has not improved for ``patience`` evaluations.

    Must come after the hook that evaluates. A metric that is NaN has not improved; one that is
    absent stops nothing and is warned of.
    """

    def __init__(self, eval_period: int, metric: str, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1")
        self.eval_period = eval_period
        self.metric = metric
        self.patience = patience
        self.best = -math.inf
        self.evaluations_since = 0

    def after_step(self) -> None:
        if not is_due(self.trainer, self.eval_period):
            return
        value, iteration = self.trainer.storage.latest().get(self.metric, (math.nan, -1))
        if iteration != self.trainer.iter:
            if comm.is_main_process():
                logger.warning("No metric %r in the evaluation to stop early by", self.metric)
        elif value > self.best:
            self.best = value
            self.evaluations_since = 0
        else:
            self.evaluations_since += 1
        # Only the main process knows the metric; all must stop together.
        if any(comm.all_gather(comm.is_main_process() and self.enough)):
            logger.info(
                "Stopping early: %s did not rise above %.4f in %d evaluations",
                self.metric,
                self.best,
                self.patience,
            )
            self.trainer.stop_early()

    @property
    def enough(self) -> bool:
        return self.evaluations_since >= self.patience

    def state_dict(self) -> dict:
        return {"best": self.best, "evaluations_since": self.evaluations_since}

    def load_state_dict(self, state: dict) -> None:
        self.best = state["best"]
        self.evaluations_since = state["evaluations_since"]

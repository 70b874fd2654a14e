"""Hooks of our launcher: averaged weights, epochs, the best checkpoint, early stopping."""

import logging
import math
from collections.abc import Callable

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from ..data.mapper import read_picture
from ..modeling import forward_context
from ..visualization import (
    mean_statistics,
    plot_routing,
    rendered,
    routing_records,
    sparsity_pictures,
)
from .ema import ModelEMA

logger = logging.getLogger(__name__)


class EMAHook(HookBase):
    """Updates the average after every step."""

    def __init__(self, ema: ModelEMA, model: nn.Module) -> None:
        self.ema = ema
        self.model = model

    def after_step(self) -> None:
        self.ema.update(self.model)


class EpochReporter(HookBase):
    """Logs the passes over the training set, for people who think in epochs."""

    def __init__(self, epoch_iters: int) -> None:
        self.epoch_iters = epoch_iters

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        self.trainer.storage.put_scalar("epoch", done / self.epoch_iters, smoothing_hint=False)
        if done % self.epoch_iters == 0:
            total = self.trainer.max_iter / self.epoch_iters
            logger.info("Epoch %d of %g is done", done // self.epoch_iters, round(total, 2))


class SparsityPictures(HookBase):
    """Shows in TensorBoard, every ``period`` steps, what a sparse model does with one image.

    Args:
        dataset_dict: of the image.
        mapper: makes it the model's input.
    """

    def __init__(self, period: int, model: nn.Module, dataset_dict: dict, mapper: Callable) -> None:
        self.period = period
        self.model = model
        self.dataset_dict = dataset_dict
        self.mapper = mapper

    @torch.no_grad()
    def after_step(self) -> None:
        if self.period <= 0 or (self.trainer.iter + 1) % self.period:
            return
        self.model.eval()
        with forward_context(record=True) as context:
            self.model([self.mapper(self.dataset_dict)])
        self.model.train()
        pictures = sparsity_pictures(read_picture(self.dataset_dict).image, context.records)
        if routing := routing_records(context.records):
            statistics = mean_statistics({place: [x] for place, x in routing.items()})
            pictures["experts"] = rendered(plot_routing(statistics))
        for name, picture in pictures.items():
            self.trainer.storage.put_image(name, picture.transpose(2, 0, 1))


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, but a resumed run remembers the best metric so far."""

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict) -> None:
        self.best_metric = state["best_metric"]
        self.best_iter = state["best_iter"]


class EarlyStopping(HookBase):
    """Stops training when a metric has not improved for ``patience`` evaluations.

    Must come after the hook that evaluates. A metric that is NaN has not improved; one that is
    absent, as if misspelt, stops nothing and is warned of.
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
        done = self.trainer.iter + 1
        # At the end there is nothing to stop; the last evaluation is still to come.
        if self.eval_period <= 0 or done % self.eval_period or done == self.trainer.max_iter:
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

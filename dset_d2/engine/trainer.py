"""Detectron2's trainers with an early end."""

import logging
import math

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import Tensor

logger = logging.getLogger(__name__)


class _EarlyEnd:
    """Adds :meth:`stop_early` to a Detectron2 trainer."""

    stopped = False

    def stop_early(self) -> None:
        """End training after the present step as if it were the last one."""
        self.stopped = True

    def train(self, start_iter: int, max_iter: int) -> None:
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self.stopped:
                        break
                else:
                    self.iter += 1
            finally:
                self.after_train()

    def _write_metrics(self, loss_dict: dict[str, Tensor], *args, **kwargs) -> None:
        try:
            super()._write_metrics(loss_dict, *args, **kwargs)
        except FloatingPointError:
            bad = {k: float(v) for k, v in loss_dict.items() if not math.isfinite(v)}
            where = "" if bad else " on another process"
            message = f"training stops at iteration {self.iter}: losses not finite{where}: {bad}"
            raise FloatingPointError(message) from None


class Trainer(_EarlyEnd, SimpleTrainer):
    pass


class MixedPrecisionTrainer(_EarlyEnd, AMPTrainer):
    """Half precision with scaled gradients; needs a GPU."""


class BFloat16Trainer(_EarlyEnd, SimpleTrainer):
    """bfloat16 autocast, which needs no scaling; runs on CPUs, too."""

    def run_step(self) -> None:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16):
            super().run_step()


def trainer_class(amp: bool, device: str) -> type[SimpleTrainer]:
    """The trainer for a precision and a device."""
    if not amp:
        return Trainer
    return MixedPrecisionTrainer if torch.device(device).type == "cuda" else BFloat16Trainer

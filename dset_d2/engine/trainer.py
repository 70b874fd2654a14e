"""Detectron2's trainers with an early end, and a checkpointer that never leaves half a file."""

import logging
import math
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..files import write_atomically

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


class SafeCheckpointer(DetectionCheckpointer):
    """Reads no pickles, which could run code; torch reads others as plain weights only."""

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):
            raise ValueError(f"{filename}: pickle files are not read, as they may run code")
        return super()._load_file(filename)


class AtomicCheckpointer(SafeCheckpointer):
    """Writes a checkpoint beside its place and moves it there when it is complete.

    A run that is killed while saving keeps its previous checkpoint.

    Args:
        tag_last: whether ``--resume`` shall find what this saves.
    """

    def __init__(
        self, model: nn.Module, save_dir: str, *, tag_last: bool = True, **checkpointables
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.tag_last = tag_last

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        data |= kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file))
        if self.tag_last:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))


class InitialCheckpointer(SafeCheckpointer):
    """Reads the weights that a new run starts from: a checkpoint's averaged ones, if it has any.

    The count of training steps starts anew, and all schedules with it. What does not fit stays
    fresh, with warnings; it is an error if nothing fits.
    """

    def _load_file(self, filename: str) -> dict:
        checkpoint = super()._load_file(filename)
        averaged = checkpoint.pop("ema", None)
        if averaged:
            checkpoint["model"] = averaged["module"]
        if "clock.steps" in checkpoint["model"]:
            checkpoint["model"]["clock.steps"] = torch.tensor(0)
        return checkpoint

    def _log_incompatible_keys(self, incompatible) -> None:
        super()._log_incompatible_keys(incompatible)
        if {name for name, _ in self.model.named_parameters()} <= set(incompatible.missing_keys):
            raise ValueError("train.init_checkpoint: none of its parameters fits the model")

"""Checkpointers that run no code, never leave half a file, and start new runs from averages."""

import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..files import write_atomically


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

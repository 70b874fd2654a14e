"""A checkpointer that never leaves half a file, and runs no code that a file may hold."""

import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..checkpoint.reading import check_finite
from ..files import write_atomically


class AtomicCheckpointer(DetectionCheckpointer):
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

    def _load_file(self, filename: str) -> dict:
        checkpoint = torch.load(filename, map_location="cpu", weights_only=True)
        if "trainer" in self.checkpointables and "trainer" not in checkpoint:
            raise ValueError(
                "holds weights alone, no optimizer and no clock; train.init_checkpoint starts a "
                "new run from them"
            )
        check_finite(checkpoint["model"], filename)
        return checkpoint

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))

"""The count of training steps, which all schedules read."""

import pickle
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawValue

import torch
from torch import nn


class SharedStep:
    """A step number that data-loading workers, forked or spawned, share with the trainer.

    They run in other processes, where no trainer and no model exist. What they see may lag by the
    batches that wait in the queue.
    """

    def __init__(self, memory=None) -> None:
        self.memory = RawValue("q", 0) if memory is None else memory

    @property
    def value(self) -> int:
        return self.memory.value

    @value.setter
    def value(self, step: int) -> None:
        self.memory.value = step

    def __reduce__(self):
        # Detectron2 pickles mappers by cloudpickle, which cannot share memory; this can.
        return _attach, (bytes(ForkingPickler.dumps(self.memory)),)


def _attach(memory: bytes) -> SharedStep:
    return SharedStep(pickle.loads(memory))


shared_step = SharedStep()


class TrainingClock(nn.Module):
    """Counts training steps in a persistent buffer.

    Checkpoints, averaged weights and foreign training loops therefore agree on it. The buffer
    stays on the CPU wherever the model goes, so that reading it makes no GPU wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        # Workers of a resumed run prepare batches before its first step.
        self.register_load_state_dict_post_hook(TrainingClock.share)

    def share(self, *_) -> None:
        shared_step.value = int(self.steps)

    def _apply(self, fn, recurse: bool = True) -> "TrainingClock":
        return self

    def __int__(self) -> int:
        """Steps that have begun."""
        return int(self.steps)

    def tick(self) -> int:
        """Begin a training step and return how many were begun before it."""
        step = int(self.steps)
        self.steps += 1
        shared_step.value = step
        return step

"""The count of training steps, and values that change over it."""

import pickle
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawValue
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


def ramp(step: int | None, start: int, end: int, first: float, last: float) -> float:
    """``first`` before step ``start``, ``last`` from step ``end``, linear between.

    ``step`` counts the training steps that are done; None is past all schedules.
    """
    if step is None or step >= end:
        return last
    if step <= start:
        return first
    return first + (last - first) * (step - start) / (end - start)


def check_ramp(name: str, start: int, end: int) -> None:
    """Raise a ``ValueError`` unless the steps are ordered."""
    if not 0 <= start <= end:
        raise ValueError(
            f"{name}: start_step={start} and end_step={end} must satisfy 0 <= start <= end"
        )


class SharedStep:
    """A step number that data-loading workers, forked or spawned, share with the trainer.

    They run in other processes, where no trainer and no model exist. What they see may lag by the
    batches that wait in the queue. Each process has one, :data:`shared_step`: copies of it, and
    what is unpickled, are that one.
    """

    def __init__(self) -> None:
        self.memory = RawValue("q", 0)

    @property
    def value(self) -> int:
        return self.memory.value

    @value.setter
    def value(self, step: int) -> None:
        self.memory.value = step

    def __reduce__(self):
        if get_spawning_popen() is None:  # memory can be handed to a process that starts, only
            return "shared_step"
        # Detectron2 pickles mappers by cloudpickle, which cannot share memory; this can.
        return _attach, (bytes(ForkingPickler.dumps(self.memory)),)


def _attach(memory: bytes) -> SharedStep:
    """Let the process that has just started follow the one that started it."""
    shared_step.memory = pickle.loads(memory)
    return shared_step


shared_step = SharedStep()


class TrainingClock(nn.Module):
    """Counts the training steps that are done, in a persistent buffer.

    Checkpoints, averaged weights and foreign training loops therefore agree on it. A step is a
    step of an optimizer that holds parameters of the clock's model, whatever forwards it took:
    a hook on all optimizers counts them (:func:`count_step`). Several optimizers that step after
    one forward make one step.

    Attributes:
        steps: the buffer; stays on the CPU wherever the model goes.
        step: its value, which may be read without a wait and inside of compiled graphs; these are
            compiled anew when it changes.
        due: whether the model was trained on since the last step.
    """

    # The clock that data-loading workers follow.
    _leader: ReferenceType | None = None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.step = 0
        self.due = False
        self.register_load_state_dict_post_hook(TrainingClock.read)

    def read(self, *_) -> None:
        """Take over a value that was written to the buffer."""
        self.set(int(self.steps))

    def set(self, step: int) -> None:
        self.step = step
        self.steps.fill_(step)
        if TrainingClock._leader is not None and TrainingClock._leader() is self:
            shared_step.value = step

    def lead(self) -> None:
        """Let data-loading workers follow this clock, also when it is loaded."""
        TrainingClock._leader = ref(self)
        shared_step.value = self.step

    def tick(self) -> None:
        """Count a step."""
        self.set(self.step + 1)

    def _apply(self, fn, recurse: bool = True) -> "TrainingClock":
        return self


# Models that have begun to train, and those that each optimizer was seen to train.
_training: WeakKeyDictionary[nn.Module, TrainingClock] = WeakKeyDictionary()
_trained_by: WeakKeyDictionary[Optimizer, list] = WeakKeyDictionary()


def begin_training(model: nn.Module, clock: TrainingClock) -> None:
    """Count a model's steps from now on, and show them to the data-loading workers."""
    if model not in _training:
        _training[model] = clock
        _trained_by.clear()  # optimizers may hold it as well
        clock.lead()


# Steps of all optimizers. Fused ones change weights behind the back of torch's version counters.
optimizer_steps = 0


def count_step(optimizer: Optimizer, *_) -> None:
    """Tick the clocks of the models that an optimizer trains, after its step."""
    global optimizer_steps
    optimizer_steps += 1
    clocks = _trained_by.get(optimizer)
    if clocks is None:
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        clocks = [
            ref(clock)
            for model, clock in _training.items()
            if any(id(p) in known for p in model.parameters())
        ]
        if clocks:  # else its model may still begin to train
            _trained_by[optimizer] = clocks
    for clock in filter(None, (weak() for weak in clocks)):
        if clock.due:
            clock.due = False
            clock.tick()


register_optimizer_step_post_hook(count_step)

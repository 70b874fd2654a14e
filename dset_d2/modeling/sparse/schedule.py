"""Values that change over training steps."""

from torch import nn


def ramp(step: int, start: int, end: int, first: float, last: float) -> float:
    """``first`` before step ``start``, ``last`` from step ``end``, linear between."""
    if step >= end:
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


class Scheduled(nn.Module):
    """A module whose behaviour depends on the training step, which the detector sets.

    A module that is used without a detector behaves as at the end of its schedule.
    """

    step: int | None = None

    def ramped(self, start: int, end: int, first: float, last: float) -> float:
        return last if self.step is None else ramp(self.step, start, end, first, last)


def set_step(model: nn.Module, step: int | None) -> None:
    """Tell all scheduled parts of a model the training step; None means after the schedules."""
    for module in model.modules():
        if isinstance(module, Scheduled):
            module.step = step

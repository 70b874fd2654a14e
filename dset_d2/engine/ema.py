"""Exponential moving average of a model's weights, as the published recipes evaluate it."""

import copy
import math
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from ..clock import TrainingClock


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those included that no state dict holds."""
    return chain(model.parameters(), model.buffers())


class ModelEMA:
    """Averages parameters and buffers; integer buffers are copied.

    The average starts as the weights at the first update. Its decay grows from 0 to ``decay``
    like ``decay * (1 - exp(-updates / warmup))``, so that early averages forget fast.

    Args:
        model: the model to follow, not wrapped for distributed training.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: float = 2000) -> None:
        if not 0 <= decay < 1 or warmup <= 0:
            raise ValueError(f"decay={decay} must lie in [0, 1) and warmup={warmup} above 0")
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.clocks = [m for m in self.module.modules() if isinstance(m, TrainingClock)]
        self.decay = decay
        self.warmup = warmup
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's present weights."""
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.warmup))
        if self.updates == 1:
            decay = 0.0
        averages, current = [], []
        for average, value in zip(tensors(self.module), tensors(model), strict=True):
            if value.is_floating_point():
                averages.append(average)
                current.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, current, 1 - decay)
        for clock in self.clocks:
            clock.read()

    def state_dict(self) -> dict:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]

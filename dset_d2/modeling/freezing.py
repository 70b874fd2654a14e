"""Parameters that are trained from some training step on, and held until then.

Optimizers and DDP take their parameters once, before training; freezing by ``requires_grad`` in
the middle of a run reaches neither. Instead a held parameter takes part from the start: no
gradient flows to it, DDP gets zeros in its place, and the optimizer drops those zeros before its
step (:func:`dset_d2.engine.optimizer.build_adamw`). AdamW passes over a parameter without a
gradient, whereas one of zeros would decay its weight and age its moments.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class FreezeConfig:
    """Which part of a ViT is trained, and when; the rest never is.

    Args:
        unfreeze_step: training step from which the last blocks and the final norm are trained;
            None for never.
        unfreeze_blocks: how many blocks.
    """

    unfreeze_step: int | None = None
    unfreeze_blocks: int = 4

    def __post_init__(self) -> None:
        if self.unfreeze_step is not None and self.unfreeze_step < 0:
            raise ValueError(f"unfreeze_step={self.unfreeze_step} must not be negative")
        if self.unfreeze_blocks < 1:
            raise ValueError(f"unfreeze_blocks={self.unfreeze_blocks} must be at least 1")


def hold(parameters: Iterable[nn.Parameter], held: bool) -> None:
    """Tell the optimizer whether to leave these parameters as they are."""
    for parameter in parameters:
        parameter.held = held


def drop_held_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Take the gradients of held parameters away."""
    for parameter in parameters:
        if getattr(parameter, "held", False):
            parameter.grad = None


class _ZeroGradients(torch.autograd.Function):
    """The identity in its first argument; the others get gradients of zero."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros_like(parameter) for parameter in ctx.saved_tensors]
        return (gradient if ctx.needs_input_grad[0] else None, *zeros)


def zero_gradients(x: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """``x``, through which the parameters get gradients of zero where DDP waits for some."""
    if parameters and dist.is_available() and dist.is_initialized() and torch.is_grad_enabled():
        return _ZeroGradients.apply(x, *parameters)
    return x

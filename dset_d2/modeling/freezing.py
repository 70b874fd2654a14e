"""Parameters that are never trained, and such that are from some training step on and dormant until
then.

Optimizers and DDP take their parameters once, before training; freezing by ``requires_grad`` in
the middle of a run reaches neither. Instead a dormant parameter takes part from the start: no
gradient flows to it, DDP gets zeros in its place, and the optimizer drops those zeros before its
step (:func:`dset_d2.engine.optimizer.build_adamw`), as it does those that come where low-rank
updates in front are trained. AdamW passes over a parameter without a
gradient, whereas one of zeros would decay its weight and age its moments.

Two marks on a parameter make it dormant: ``dormant``, which :class:`Phases` sets, and ``waiting``,
which routers of layers set that do not route yet (:mod:`dset_d2.modeling.sparse.swap`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .lora import is_lora


@dataclass(frozen=True)
class FreezeConfig:
    """Which part of a ViT is trained, and when; the rest never is.

    Args:
        unfreeze_step: training step from which the last block and the final norm are trained;
            None for never.
        unfreeze_blocks: how many of the last blocks are trained in the end.
        unfreeze_every: steps until the next block below is trained, too; 0 for all at once.
    """

    unfreeze_step: int | None = None
    unfreeze_blocks: int = 4
    unfreeze_every: int = 0

    def __post_init__(self) -> None:
        if self.unfreeze_step is not None and self.unfreeze_step < 0:
            raise ValueError(f"unfreeze_step={self.unfreeze_step} must not be negative")
        if self.unfreeze_blocks < 1:
            raise ValueError(f"unfreeze_blocks={self.unfreeze_blocks} must be at least 1")
        if self.unfreeze_every < 0:
            raise ValueError(f"unfreeze_every={self.unfreeze_every} must not be negative")

    def block_steps(self) -> list[int]:
        """The training steps from which blocks are trained: the last block's, then downwards."""
        if self.unfreeze_step is None:
            return []
        return [
            self.unfreeze_step + index * self.unfreeze_every
            for index in range(self.unfreeze_blocks)
        ]


class Phases:
    """What of a ViT is trained at a training step.

    Args:
        vit: with ``blocks`` and a final ``norm``.
        config: None trains all of it from the start.
        first_lora: index of the first block with low-rank updates, which are always trained.
    """

    def __init__(self, vit: nn.Module, config: FreezeConfig | None, first_lora: int) -> None:
        self.blocks = vit.blocks
        self.config = config
        self.first_lora = first_lora
        self.late: list[tuple[int, nn.Module]] = []  # what is trained from which step on
        if config is None:
            return
        if config.unfreeze_blocks > len(vit.blocks):
            raise ValueError(
                f"unfreeze_blocks={config.unfreeze_blocks} exceeds the {len(vit.blocks)} blocks"
            )
        if config.unfreeze_step is not None:
            self.late = [(config.unfreeze_step, vit.norm)]
            self.late += zip(config.block_steps(), reversed(vit.blocks))
        vit.requires_grad_(False)
        for _, part in self.late:
            part.requires_grad_(True)
        for name, parameter in vit.named_parameters():
            if is_lora(name):
                parameter.requires_grad = True

    def unfrozen(self, step: int | None) -> bool:
        """Whether the norm and blocks are trained; outside of training steps (None) none are."""
        return self.config is None or any(begun(start, step) for start, _ in self.late)

    def begin_step(self, step: int | None) -> None:
        """Follow the training step."""
        for start, part in self.late:
            part.train(begun(start, step))
            for name, parameter in part.named_parameters():
                parameter.dormant = not begun(start, step) and not is_lora(name)

    def dormant_parameters(self) -> list[nn.Parameter]:
        """Those that are trained from a later step on; low-rank updates are from the first."""
        late = (parameter for _, part in self.late for parameter in part.parameters())
        return [parameter for parameter in late if is_dormant(parameter)]

    def first_trained(self, step: int | None) -> int:
        """Index of the first block that gradients flow through; -1 if they go beyond."""
        if self.config is None:
            return -1
        count = sum(begun(start, step) for start in self.config.block_steps())
        return min(len(self.blocks) - count, self.first_lora)


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze all parameters but those whose names patterns (``fnmatch``) find.

    What was frozen before stays so. A parameter of several names, such as a head that all layers
    share, is found by each of them.

    Raises:
        ValueError: if there is no pattern, or one that finds no parameter.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not patterns:
        raise ValueError("trainable=[] must have patterns of parameters' names, or be None for all")
    named = dict(model.named_parameters(remove_duplicate=False))
    found: set[nn.Parameter] = set()
    for pattern in patterns:
        own = {parameter for name, parameter in named.items() if fnmatchcase(name, pattern)}
        if not own:
            raise ValueError(
                f"trainable: {pattern!r} finds no parameter; they have names such as "
                f"{', '.join(list(named)[:: max(1, len(named) // 4)])}"
            )
        found |= own
    for parameter in {*named.values()} - found:
        parameter.requires_grad = False


def rest_frozen(module: nn.Module) -> None:
    """Put whatever has parameters and trains none of them in evaluation mode: statistics of norms
    would move and dropout would be noise that nothing learns."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    if trained and not any(trained):
        module.eval()
        return
    for child in module.children():
        rest_frozen(child)


def begun(start: int, step: int | None) -> bool:
    return step is not None and step >= start


def is_dormant(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "dormant", False) or getattr(parameter, "waiting", False)


def drop_dormant_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Take the gradients of dormant parameters away."""
    for parameter in parameters:
        if is_dormant(parameter):
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


def zero_gradients(x: Tensor, parameters: list[nn.Parameter], always: bool = False) -> Tensor:
    """``x``, through which the parameters get gradients of zero where DDP waits for some.

    Args:
        always: also where it does not, so that a step is the same with any number of processes.
    """
    waited_for = always or (dist.is_available() and dist.is_initialized())
    if parameters and waited_for and torch.is_grad_enabled():
        return _ZeroGradients.apply(x, *parameters)
    return x

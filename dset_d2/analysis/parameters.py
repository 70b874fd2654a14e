"""Parameters that a model has, and those that work on a token."""

from dataclasses import dataclass

from torch import nn

from ..modeling import Knobs, forward_context
from .tracing import Inputs, count_kernels


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one module.

    Attributes:
        active: those that inference uses for one token; None inside of a module that declares
            its own number as a whole.
    """

    total: int
    active: int | None


def count_parameters(
    model: nn.Module, inputs: Inputs, knobs: Knobs | None = None
) -> dict[str, ParameterCount]:
    """Parameters per module name; "" is the whole, and shared parameters count once.

    What no kernel reads while the inputs are processed is not active: training-only heads,
    decoder layers above the one that is evaluated. A module of which only a part works on each
    token, such as a mixture of experts, declares that part by ``active_parameters() -> int``.
    """
    read = count_kernels(model, inputs, knobs).read
    counts = {}
    declared: tuple[
        str, ...
    ] = ()  # names begin with these inside of a module that declares its number
    with forward_context(knobs=knobs or Knobs()):
        for name, module in model.named_modules():
            total = sum(p.numel() for p in module.parameters())
            if name.startswith(declared):
                counts[name] = ParameterCount(total, None)
                continue
            counts[name] = ParameterCount(total, active_parameters(module, read, set()))
            if hasattr(module, "active_parameters"):
                declared += (f"{name}." if name else "",)
    return counts


def active_parameters(module: nn.Module, read: set[int], seen: set[int]) -> int:
    """Parameters of a module that were read, or its declared number if any was."""
    if hasattr(module, "active_parameters"):
        return module.active_parameters() if any(id(p) in read for p in module.parameters()) else 0
    own = {id(p): p.numel() for p in module._parameters.values() if p is not None}
    new = (own.keys() & read) - seen
    seen |= new
    children = sum(active_parameters(child, read, seen) for child in module.children())
    return sum(own[key] for key in new) + children

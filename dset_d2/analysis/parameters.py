"""Parameters that a model has, and those that work on a token."""

from dataclasses import dataclass

from torch import nn

from ..modeling.encoder.fusion_blocks import RepVggBlock
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


def count_parameters(model: nn.Module, inputs: Inputs) -> dict[str, ParameterCount]:
    """Parameters per module name; "" is the whole, and shared parameters count once.

    What no kernel reads while the inputs are processed is not active: training-only heads,
    decoder layers above the one that is evaluated. A module of which only a part works on each
    token, such as a mixture of experts, declares that part by ``active_parameters() -> int``.
    """
    read = count_kernels(model, inputs).read
    counts = {}
    declared = ()  # names begin with these inside of a module that declares its number
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


def deployed_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters of a detector in training and deployed, by part; "" is the whole.

    Deployed, it has no denoising queries, no decoder layers above the one that is evaluated, no
    scores of the layers below; and a RepVGG block is one 3x3 convolution with a bias.
    """
    gone = {}  # parameters that deployment takes away, by module name
    evaluated = model.decoder.eval_idx
    for name, module in model.named_modules():
        total = sum(p.numel() for p in module.parameters())
        parent, _, index = name.rpartition(".")
        if name == "decoder.denoising_class_embed":
            gone[name] = total
        elif parent in ("decoder.dec_score_head", "decoder.decoder.lqe_layers"):
            gone[name] = total if int(index) != evaluated else 0
        elif parent in ("decoder.dec_bbox_head", "decoder.decoder.layers"):
            gone[name] = total if int(index) > evaluated else 0
        elif isinstance(module, RepVggBlock):
            kernel = module.conv1.conv.weight
            gone[name] = total - kernel.numel() - len(kernel)
    counts = {}
    for name in ("", "backbone", "backbone.dinov3", "backbone.adapter", "encoder", "decoder"):
        try:
            total = sum(p.numel() for p in model.get_submodule(name).parameters())
        except AttributeError:  # another backbone's parts
            continue
        less = sum(n for key, n in gone.items() if not name or key.startswith(f"{name}."))
        counts[name] = (total, total - less)
    return counts

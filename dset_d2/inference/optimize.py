"""A trained model as it is deployed: the same outputs from less work."""

import copy
from typing import TypeVar

import torch
from torch import nn

from ..modeling import MetaArch
from ..modeling.layers import fold_neighbours

Model = TypeVar("Model", bound=MetaArch)


def optimize_for_inference(model: Model) -> Model:
    """A copy of a model for inference alone, which keeps no part that inference does not use.

    Norms become part of convolutions, RepVGG branches one of them, low-rank updates part of their
    weights; denoising, losses, heads and layers that are not evaluated are gone. Weights of
    convolutions, and so what these put out, lie channels last. Outputs differ by rounding alone;
    schedules stay where they are, and so do all knobs but the number of decoder layers.

    The copy takes no gradients and cannot be trained. What it kept of the model, such as the
    ``predict`` that :func:`torch.compile` takes, is its own.

    Args:
        model: is left as it is.
    """
    model = copy.deepcopy(model).eval()  # in which alone norms are folded
    with model.context():
        fuse(model)
    model.name_parts()
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def fuse(module: nn.Module) -> nn.Module:
    """What computes the same in inference, once its parts do; the module itself if it can.

    A module that has a shorter form returns it by a method ``fuse()``, and is not used any more
    if that is another module.
    """
    for name, part in module.named_children():
        module.register_module(name, fuse(part))
    if isinstance(module, nn.Sequential):
        fold_neighbours(module)
    return module.fuse() if hasattr(module, "fuse") else module


def deployed_parameters(model: MetaArch) -> dict[str, tuple[int, int]]:
    """Parameters of a detector as it is trained, and of what
    :func:`optimize_for_inference` makes of it, by part; "" is the whole."""
    deployed = optimize_for_inference(model)
    counts = {}
    for name in ("", "backbone", "backbone.dinov3", "backbone.adapter", "encoder", "decoder"):
        try:
            parts = model.get_submodule(name), deployed.get_submodule(name)
        except AttributeError:  # another backbone's parts
            continue
        trained, kept = (sum(p.numel() for p in part.parameters()) for part in parts)
        counts[name] = trained, kept
    return counts

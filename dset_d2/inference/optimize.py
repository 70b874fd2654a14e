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

"""Small layers and functions that several parts of the detectors share."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


def activation(name: str | None) -> nn.Module:
    """A fresh activation module by name (``None`` is the identity).

    Raises:
        ValueError: for a name that is not in :data:`ACTIVATIONS`.
    """
    if name is None:
        return nn.Identity()
    check_choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def activation_name(module: nn.Module) -> str:
    """The name by which :func:`activation` makes a module with the same outputs.

    Other libraries have classes of their own, and a GELU may be one of several approximations.

    Raises:
        ValueError: if there is none.
    """
    x = torch.linspace(-4, 4, 65, device="cpu")  # also where a model is built on another
    for name, kind in ACTIVATIONS.items():
        if not [*module.parameters()] and torch.allclose(module(x), kind()(x), rtol=0, atol=1e-6):
            return name
    raise ValueError(f"the activation {module} is not one of {sorted(ACTIVATIONS)}")


def check_choice(name: str, value: object, allowed) -> None:
    """Raise a ``ValueError`` that names the setting, its value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {sorted(allowed)}")


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Without a bias, as a norm follows; an odd kernel keeps a map's size up to the stride."""
    padding = (kernel_size - 1) // 2
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
    )


def folded(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """One convolution with the outputs of a convolution and a norm behind it in evaluation mode.

    ``norm`` is a batch norm, plain or frozen, or the identity. Neither of the two is changed.
    """
    return conv if isinstance(norm, nn.Identity) else fuse_conv_bn_eval(conv, norm)


def fold_neighbours(sequence: nn.Sequential) -> None:
    """Fold the batch norms of a sequence into the convolutions in front of them, in place."""
    for index, (conv, norm) in enumerate(pairwise(sequence)):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
            sequence[index], sequence[index + 1] = folded(conv, norm), nn.Identity()


class ConvNorm(nn.Module):
    """Bias-free convolution, batch norm and activation, with upstream's names."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: str | None = None,
    ) -> None:
        super().__init__()
        self.conv = convolution(in_channels, out_channels, kernel_size, stride, groups)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def fuse(self) -> "ConvNorm":
        """For inference: the norm within the convolution; the activation overwrites its input."""
        self.conv, self.norm = folded(self.conv, self.norm), nn.Identity()
        if isinstance(self.act, nn.ReLU | nn.SiLU):
            self.act.inplace = True
        return self


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution and batch norm without activation."""
    conv = convolution(in_channels, out_channels, 1)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(out_channels)))


class MLP(nn.Module):
    """``num_layers`` linear layers with ReLU between them: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(map(nn.Linear, dims[:-1], dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of probabilities, clamped so that 0 and 1 stay finite."""
    return torch.logit(x, eps=1e-5)


def constant(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache a function of sizes and a device whose tensor never changes (anchors, positions).

    The values are made outside inference mode, so that one made during evaluation may take part
    in a later training step. Graph captures get fresh tensors.
    """
    cached = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def wrapper(*args) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return function(*args)
        with torch.inference_mode(False), torch.no_grad():
            return cached(*args)

    return wrapper

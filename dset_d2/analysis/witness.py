"""A second opinion on the trace: the same inference, watched from below all modules."""

from math import prod

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..modeling import Knobs
from .tracing import Inputs, bind, inference, tensors_in

# Where the two factors stand among the arguments of a product.
FACTORS = {
    "aten::_grouped_mm": 0,
    "aten::addmm": 1,
    "aten::baddbmm": 1,
    "aten::bmm": 0,
    "aten::convolution": 0,
    "aten::dot": 0,
    "aten::mm": 0,
    "aten::mv": 0,
}


class Witness(TorchDispatchMode):
    """Sees every kernel that runs.

    Attributes:
        products: multiply-adds of convolutions and matrix products.
        read: ids of the tensors that some kernel was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.read: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.read.update(id(x) for x in tensors_in([*args, *kwargs.values()]))
        result = func(*args, **kwargs)
        name = func._schema.name
        if name in FACTORS:
            left, right = args[FACTORS[name] :][:2]
            if name == "aten::convolution":
                pixels = left if args[6] else result  # transposed
                self.products += pixels.numel() * prod(right.shape[1:])
            elif name == "aten::_grouped_mm" and left.dim() == right.dim() == 2:
                self.products += left.shape[0] * right.numel()
            else:
                self.products += result.numel() * left.shape[-1]
        return result


def observe(model: nn.Module, inputs: Inputs, knobs: Knobs | None = None) -> Witness:
    """Run inference untraced and report what it did."""
    run = bind(model, inputs, knobs)
    with inference(model), Witness() as witness:
        run()
    return witness

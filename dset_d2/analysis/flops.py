"""Multiply-adds of the traced real forward; one multiply-add counts as one.

Counted exactly: convolutions, linear layers, matrix products (also batched, grouped and einsum)
and both products of attention, masked or not, since kernels compute masked scores as well.
Counted by fvcore's conventions, each under its own operator: normalisation (batch norm 2, with
scale and shift; layer, group and instance norm 5 per element), upsampling (nearest 1, bilinear 4
per output), adaptive pooling (1 per input); and grid sampling by the values that are weighted
per sampled element (bilinear in 2-D: 4).
Not counted, like in fvcore: what works element by element (activations, sums, the gates and the
weights that multiply samples), softmax, reductions, other pooling, sorting, and moving data
(gather, index, pad). Work whose result nobody reads is counted, for it runs.
Any other operator is an error, and so is a trace whose products differ from the untraced run's.
"""

from dataclasses import dataclass
from math import ceil, prod

from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_handles import generic_activation_jit, get_shape
from torch import nn

from ..modeling import Knobs
from .tracing import Inputs, analyse, count_kernels

# Operators that hold no multiply-adds, or only those that the module's docstring leaves out;
# fvcore's own list of such operators comes on top.
FREE = """
    abs add add_ all amax amin any argmax argmin argsort atan2 avg_pool2d bincount bitwise_and
    bitwise_or broadcast_to ceil clamp_max clamp_min clone cos cummax cummin cumsum diff div div_
    dropout_ elu embedding empty_like erf exp expand_as expm1 eye fill_ flip floor_ frac gelu
    hardsigmoid hardswish hardswish_ hardtanh hardtanh_ index_add index_add_ index_copy index_copy_
    index_fill index_select isfinite isin isinf isnan item le leaky_relu leaky_relu_ lift_fresh
    linspace log log1p log2 log_softmax logical_and logical_not logical_or logit logsumexp lt
    masked_fill_ masked_scatter masked_select max_pool2d maximum mean meshgrid min minimum mish
    mish_ movedim mul mul_ ne neg new_ones new_tensor norm one_hot ones_like outer pad permute_
    pixel_shuffle pixel_unshuffle pow prelu prod rand randn reciprocal repeat repeat_interleave
    reshape_as round rsqrt rsub scalar_tensor scatter scatter_ scatter_add scatter_add_
    scatter_reduce searchsorted sigmoid sigmoid_ sign silu silu_ sin softmax softplus sort sqrt std
    sub sub_ sum take_along_dim tanh tensor_split threshold tile topk tril triu unflatten unfold
    unsafe_chunk var view_as where zero_ __or__ __xor__
""".split()


@dataclass(frozen=True)
class FlopReport:
    """Multiply-adds of one inference.

    Attributes:
        by_module: module name -> multiply-adds of all that ran inside of its calls; "" is the
            whole. A module that is never called (a list, say) has those of its children.
        by_operator: operator name -> multiply-adds.
    """

    total: int
    by_module: dict[str, int]
    by_operator: dict[str, int]


def matmul(inputs, outputs) -> int:
    """Product of matrices or vectors; batches are broadcast.

    Also a linear layer's, whose weight may be a vector: fvcore's handle squares its length.
    """
    return prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


def baddbmm(inputs, outputs) -> int:
    return matmul(inputs[1:], outputs)


def einsum(inputs, outputs) -> int:
    """Contraction of two operands: every combination of their indices once."""
    equation = inputs[0].toIValue().replace(" ", "")
    shapes = [get_shape(value) for value in inputs[1].node().inputs()]
    terms, _, result = equation.partition("->")
    operands = terms.split(",")
    if len(operands) > 2 or "." in equation or "->" not in equation:
        raise ValueError(
            f"einsum {equation!r} is not counted: write out the indices of two operands"
        )
    if len(operands) == 1:
        return 0
    shared = set(operands[0]) & set(operands[1])
    if shared <= set(result):
        return 0  # factors meet element by element
    met = shared | set(result)  # an index of one operand alone is summed before they meet
    sizes: dict[str, int] = {}
    for operand, shape in zip(operands, shapes):
        for index, size in zip(operand, shape):
            sizes[index] = max(size, sizes.get(index, 1))
    return prod(size for index, size in sizes.items() if index in met)


def attention(inputs, outputs) -> int:
    """Queries times keys and probabilities times values, masked pairs included."""
    query, key = get_shape(inputs[0]), get_shape(inputs[1])
    *batch, length, value_dim = get_shape(outputs[0])
    return prod(batch) * length * key[-2] * (query[-1] + value_dim)


def grouped_mm(inputs, outputs) -> int:
    """One product per group.

    Shapes suffice: groups divide the rows (or columns, or the inner dimension) of an operand,
    so that their products add up to one as large as the whole.
    """
    left, right = get_shape(inputs[0]), get_shape(inputs[1])
    rows, inner, columns = left[-2], left[-1], right[-1]
    groups = left[0] if len(left) == len(right) == 3 else 1
    return groups * rows * inner * columns


def grid_sampler(inputs, outputs) -> int:
    """Weighted values per sampled element: of a cell's corners, none if only the nearest."""
    dims = len(get_shape(inputs[0])) - 2
    weighted = (2**dims, 0, 4**dims)[inputs[2].toIValue()]  # bilinear, nearest, bicubic
    return prod(get_shape(outputs[0])) * weighted


def antialiased(inputs, outputs) -> int:
    """Weighted values of a triangle's width, along rows and then along columns."""
    (*batch, height, width), (*_, rows, columns) = get_shape(inputs[0]), get_shape(outputs[0])
    across, down = (2 * max(1, ceil(n / m)) for n, m in ((width, columns), (height, rows)))
    return prod(batch) * columns * (height * across + rows * down)


HANDLES = {f"aten::{name}": None for name in FREE} | {
    "aten::_grouped_mm": grouped_mm,
    "aten::_upsample_bilinear2d_aa": antialiased,
    "aten::baddbmm": baddbmm,
    "aten::einsum": einsum,
    "aten::grid_sampler": grid_sampler,
    "aten::linear": matmul,
    "aten::matmul": matmul,
    "aten::scaled_dot_product_attention": attention,
}

PRODUCTS = {
    "_grouped_mm",
    "addmm",
    "baddbmm",
    "bmm",
    "conv",
    "einsum",
    "linear",
    "matmul",
    "mm",
    "scaled_dot_product_attention",
}


def count_flops(model: nn.Module, inputs: Inputs, knobs: Knobs | None = None) -> FlopReport:
    """Count the multiply-adds of a model's inference on real inputs, whatever mode it is in.

    Args:
        inputs: a list of Detectron2's dicts; a (B, 3, H, W) normalised batch for the ``predict``
            of a detector; else the argument of any module, or a tuple of them.
        knobs: what the call changes.

    Raises:
        ValueError: on an operator that is neither counted nor known to hold no multiply-adds,
            or if the model computes other products while it is traced.
    """
    counts, unknown = analyse(FlopCountAnalysis, model, inputs, HANDLES, knobs)
    if unknown[""]:
        name = min(unknown[""])
        module = max((m for m in unknown if name in unknown[m]), key=len)
        raise ValueError(
            f"operator {name} in module {module!r} ({type(model.get_submodule(module)).__name__}) "
            "is neither counted nor known to hold no multiply-adds"
        )
    by_module = {name: int(sum(c.values())) for name, c in counts.items()}
    by_operator = {name: int(count) for name, count in counts[""].most_common()}
    traced = sum(count for name, count in by_operator.items() if name in PRODUCTS)
    real = count_kernels(model, inputs, knobs).products
    if traced != real:
        raise ValueError(
            f"traced, the model's products take {traced} multiply-adds, untraced {real}: does a "
            "module ask whether it is traced, or decide at random?"
        )
    return FlopReport(by_module[""], by_module, by_operator)


def count_activations(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Elements that convolutions and matrix products put out, per module; "" is the whole."""
    handles = {f"aten::{name}": generic_activation_jit() for name in PRODUCTS - {"conv"}}
    counts, _ = analyse(ActivationCountAnalysis, model, inputs, handles)
    return {name: int(sum(c.values())) for name, c in counts.items()}

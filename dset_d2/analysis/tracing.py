"""Inference of a model, traced or watched kernel by kernel; the model is left as it was."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
from fvcore.nn.jit_analysis import JitModelAnalysis
from fvcore.nn.jit_handles import Handle
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..modeling import Knobs, MetaArch, forward_context

Inputs = Tensor | tuple | list[dict]

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


def bind(model: nn.Module, inputs: Inputs, knobs: Knobs | None = None) -> Callable[[], object]:
    """The call that inference makes.

    Args:
        inputs: a list of Detectron2's dicts; a (B, 3, H, W) batch for the ``predict`` of a
            detector; else the argument of any other module, or a tuple of them.
        knobs: of the call.
    """
    if isinstance(model, MetaArch):
        # Batches are made here: ImageList pads in another way while it is traced.
        batches: list[tuple] = [(inputs,)]
        if isinstance(inputs, list):
            groups = model.groups(inputs)
            batches = [model.preprocess([inputs[i] for i in group]) for group in groups]
        return lambda: [model.predict(*batch, knobs=knobs) for batch in batches]  # type: ignore[misc]
    args = inputs if isinstance(inputs, tuple) else (inputs,)

    def call() -> object:
        with forward_context(knobs=knobs or Knobs()):
            return model(*args)

    return call


def tensors_in(values) -> Iterator[Tensor]:
    """The tensors among arguments or results, those in lists and tuples included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; attention from its parts, as fused kernels hide products. What
    a detector keeps from call to call is there before.

    The model is as before at the end. Its training flags are set one by one, because a module
    may do more in ``train()`` than set its flag; hooks that a failed trace left are removed.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    tables = [t for m in modules for t in (m._forward_pre_hooks, m._forward_hooks)]
    hooks = [set(table) for table in tables]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modules:
            module.training = False
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            if isinstance(model, MetaArch):
                model.warm_up()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, flag in zip(modules, training):
            module.training = flag
        for table, known in zip(tables, hooks):
            for key in set(table) - known:
                del table[key]


class KeepAlive(TorchFunctionMode):
    """Ties every result to the trace's outputs, or the tracer drops work that nobody reads.

    Work whose result is thrown away costs as much as any other. The ties are empty tensors, so
    that no result outlives its use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ties: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.ties += [x.new_empty(0) for x in tensors_in([result]) if x.is_floating_point()]
        return result


class Forward(nn.Module):
    """A model's call without arguments and with only tensors returned, as tracing needs it."""

    def __init__(self, model: nn.Module, inputs: Inputs, knobs: Knobs | None) -> None:
        super().__init__()
        self.model = model
        self.run = bind(model, inputs, knobs)

    def forward(self) -> tuple[Tensor, ...]:
        with KeepAlive() as alive:
            self.run()
        return tuple(alive.ties)


def analyse(
    kind: type[JitModelAnalysis],
    model: nn.Module,
    inputs: Inputs,
    handles: Mapping[str, Handle | None],
    knobs: Knobs | None = None,
) -> tuple[dict[str, Counter], dict[str, Counter]]:
    """Trace inference and count with one of fvcore's analyses.

    Returns:
        Per module name ("" is the whole) the counts of each operator, and how often each
        operator was met that is neither counted nor declared free.
    """
    analysis = kind(Forward(model, inputs, knobs), ()).set_op_handle(**handles)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with inference(model):
        counts = analysis.by_module_and_operator()
    # The model is a child of Forward, whose own name holds also what ran beside its call.
    names = {name.removeprefix("model."): name for name in counts if name != "model"}
    return (
        {name: counts[full] for name, full in names.items()},
        {name: analysis.unsupported_ops(full) for name, full in names.items()},
    )


class KernelCounter(TorchDispatchMode):
    """Sees every kernel that runs, below all modules and whatever a trace makes of them.

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


def count_kernels(model: nn.Module, inputs: Inputs, knobs: Knobs | None = None) -> KernelCounter:
    """Run inference untraced under a counter of its kernels."""
    run = bind(model, inputs, knobs)
    with inference(model), KernelCounter() as counter:
        run()
    return counter

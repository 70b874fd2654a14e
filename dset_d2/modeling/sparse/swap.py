"""Experts in the place of a trained model's FFNs, in place and back: of our detectors and ViTs, and
of transformers' models.

:func:`swap_ffn_for_moe` changes a model at hand, which :func:`restore_ffn` undoes. A config's
``model.swap`` (:class:`SwapConfig`) builds it with experts at once, which then start from the dense
FFNs of a checkpoint, and lets one layer after the other begin to route while it is trained.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...arguments import arguments, build, naming_keys
from ..context import current, name_parts
from ..ffn import Seam, find_ffns, put
from ..freezing import zero_gradients
from ..layers import activation_name, check_choice
from .coactivation import (
    SplitReport,
    capture_inputs,
    initialize_from_coactivation,
    report_splits,
)
from .moe import MoE, MoEConfig
from .upcycling import FFNWeights, expert_width, ffn_weights, initialize_from_pretrained_ffn

METHODS = ("paper", "slots", "copies", "coactivation")


@dataclass(frozen=True)
class SwapConfig:
    """Experts in the place of a model's FFNs from when it is built on.

    They start by the method from the dense FFNs that a model has loaded itself, or from those of a
    checkpoint (``train.init_checkpoint``). Those of "coactivation" need images: they start from a
    checkpoint of a model that :func:`swap_ffn_for_moe` has changed.

    Before its turn a layer runs as the dense FFN that its experts are parts or copies of, at that
    FFN's cost: copies count by their mean and get equal gradients, so that they stay equal and are
    trained as the dense FFN would be; the router is dormant (:mod:`dset_d2.modeling.freezing`) and
    leaves no record. (What a step does to the second layer is ``1 / top_k`` as much in "paper" and
    "slots", whose copies of it are that much larger.) At its turn nothing is copied, and in the
    first three methods no output changes. Parameters are the same at every step, as optimizers,
    DDP, averaged weights and resumed runs need it.

    Args:
        moe: the experts; see :func:`swap_ffn_for_moe`.
        method: how they start; see there.
        layers: patterns of the FFNs' names, which take their turns in the order of the patterns;
            None takes all in the model's order.
        start_step: training step from which the first layer routes.
        every: steps until the next one does; 0 for all at once.
        keep_dense: patterns of layers among these that never route. A run can be resumed with
            others; copies that have become different then count by their mean.
    """

    moe: MoEConfig
    method: str = "paper"
    layers: tuple[str, ...] | None = None
    start_step: int = 0
    every: int = 0
    keep_dense: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        for name in ("start_step", "every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


class SwappedFFN(MoE):
    """Experts that a dense FFN was divided into, or copied to.

    Args:
        method: one of :data:`METHODS`.
        begin: training step from which tokens are routed; None for never. Before, all of them go
            through the dense FFN.

    Attributes:
        dense: attributes of the block around it that were replaced, to be put back; None if they
            were not kept. They follow the experts to other devices and into copies of the model,
            and are in no state dict and no optimizer.
    """

    def __init__(
        self,
        config: MoEConfig,
        dim: int,
        dim_feedforward: int,
        act: str,
        dropout: float,
        method: str,
        begin: int | None = 0,
    ) -> None:
        super().__init__(config, dim, dim_feedforward, act, dropout)
        self.construction = method
        self.shards = dim_feedforward // self.experts.w1.shape[1]
        self.begin = begin
        self.dense: dict[str, object] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        waits = self.waits()
        if self.training and torch.is_grad_enabled():
            for parameter in self.router.parameters():
                parameter.waiting = waits
        if not waits:
            return super().forward(x)
        ffn = self.merged()
        hidden = self.experts.activate(F.linear(x, ffn.w1, ffn.b1))
        return zero_gradients(F.linear(hidden, ffn.w2, ffn.b2), list(self.router.parameters()))

    def waits(self) -> bool:
        """Whether tokens go through the dense FFN; outside of training steps all turns are over."""
        step = current().step
        return self.begin is None or (step is not None and step < self.begin)

    def merged(self) -> FFNWeights:
        """The dense FFN, of whose units each is the mean of its copies."""
        copies = self.config.num_experts // self.shards
        by_shard = self.construction == "slots"

        def mean(weights: Tensor) -> Tensor:
            """(E, ...) -> (shards, ...)."""
            if by_shard:
                return weights.unflatten(0, (self.shards, copies)).mean(1)
            return weights.unflatten(0, (copies, self.shards)).mean(0)

        experts = self.experts
        w2 = mean(experts.w2).transpose(0, 1).flatten(1)
        return FFNWeights(
            w1=mean(experts.w1).flatten(0, 1),
            b1=mean(experts.b1).flatten(),
            w2=w2 / self.shards if self.config.combine == "mean" else w2,
            b2=experts.b2.mean(0),
        )

    def active_parameters(self) -> int:
        """Parameters that one token uses, or all of the dense FFN's."""
        if self.waits():
            _, width, dim = self.experts.w1.shape
            hidden = self.shards * width
            return 2 * hidden * dim + hidden + dim
        return super().active_parameters()

    def _apply(self, fn, recurse: bool = True) -> "SwappedFFN":
        for kept in modules_of(self.dense):
            kept._apply(fn, recurse)
        return super()._apply(fn, recurse)


def modules_of(attributes: dict[str, object] | None) -> list[nn.Module]:
    return [value for value in (attributes or {}).values() if isinstance(value, nn.Module)]


def swap_ffn_for_moe(
    model: nn.Module,
    config: MoEConfig,
    method: str = "paper",
    layers: Sequence[str] | None = None,
    calibration: Callable[[], object] | None = None,
) -> list[str]:
    """Put experts that start from them in the place of a model's dense FFNs, in place.

    ==============  ===============================================  ==========================
    method          experts                                          outputs, FLOPs
    ==============  ===============================================  ==========================
    "paper"         ``num_experts / top_k`` copies of each of        equal, equal
                    ``top_k`` shards (Dynamic-DINO)
    "slots"         ``num_experts / slots`` copies of each of        equal whatever the router
                    ``slots`` shards; ``slots=1`` becomes ``top_k``  does, ``top_k / slots``
    "copies"        ``num_experts`` whole FFNs                       equal whatever the router
                                                                     does, ``top_k``
    "coactivation"  ``num_experts`` groups of hidden units that are  close, ``top_k /
                    active together; their outputs are summed        num_experts``
    ==============  ===============================================  ==========================

    The block around the FFN, its norm and dropout stay as they are, and so does the layout of its
    tokens, (B, L, C) or (L, B, C). The dense FFNs are kept aside for :func:`restore_ffn`, and are
    in no state dict. Checkpoints hold the experts: they are loaded into a model that was changed
    in the same way. Optimizers are to be built afterwards.

    Experts of a frozen FFN are frozen. With "coactivation" the balance loss works against the
    split, some of whose groups are hardly ever needed: it wants ``balance_weight=0``.

    Args:
        model: a whole model, not a part or wrapper: names of records and knobs are given anew.
        config: ``expert_dim=None`` is what the method wants; ``layers`` must be None.
        layers: patterns (``fnmatch``) of names of :func:`~dset_d2.modeling.find_ffns`, such as
            ``"*decoder*"``; None takes all FFNs.
        calibration: runs the model, which should be in evaluation mode, on some images; what is
            active together is seen there. For "coactivation".

    Returns:
        The names of the FFNs that were replaced.

    Raises:
        ValueError: if a pattern finds no FFN, or the settings do not fit one; the model is then
            as it was.
    """
    check_choice("method", method, METHODS)
    if (method == "coactivation") != (calibration is not None):
        raise ValueError(f"calibration goes with method='coactivation' alone, not {method!r}")
    seams = choose_ffns(model, layers)
    made = make_experts(seams, config, method)
    if calibration is None:
        for name, moe in made.items():
            initialize_from_pretrained_ffn(moe, seams[name].linear1, seams[name].linear2)
    else:
        inputs = capture_inputs({name: seams[name].linear1 for name in seams}, calibration)
        for name, moe in made.items():
            initialize_from_coactivation(moe, weights_of(seams[name]), inputs[name])
    place(model, seams, made, keep=True)
    return list(made)


def swap_ffns(model: nn.Module, config: SwapConfig) -> None:
    """Build a model's FFNs as experts, in place.

    Units that shall be active together are dealt out in their order until a checkpoint is loaded.

    Raises:
        ValueError: if a pattern finds no FFN, or the settings do not fit one.
    """
    seams = choose_ffns(model, config.layers)
    dense = matching(seams, config.keep_dense, "keep_dense")
    made = make_experts(seams, config.moe, config.method)
    for index, (name, moe) in enumerate(made.items()):
        start = "split" if config.method == "coactivation" else config.method
        initialize_from_pretrained_ffn(moe, seams[name].linear1, seams[name].linear2, start)
        moe.begin = None if name in dense else config.start_step + index * config.every
    place(model, seams, made, keep=False)


def swap_config(cfg) -> SwapConfig | None:
    """``MODEL.SWAP`` of a ``CfgNode``."""
    if not cfg.MODEL.SWAP.MOE.NUM_EXPERTS:
        return None
    moe = build(MoEConfig, cfg, "MODEL.SWAP.MOE")
    with naming_keys(cfg, "MODEL.SWAP"):
        return SwapConfig(moe, **arguments(SwapConfig, cfg, "MODEL.SWAP"))


def restore_ffn(model: nn.Module) -> list[str]:
    """Put the dense FFNs back that :func:`swap_ffn_for_moe` has replaced, in place: the model gives
    its old outputs, whatever its experts have learned.

    Returns:
        Their names.

    Raises:
        ValueError: if there are none, or experts that the model was built with.
    """
    found = [
        (name, block, child)
        for name, block in model.named_modules()
        for child in block.children()
        if isinstance(child, SwappedFFN)
    ]
    if not found:
        raise ValueError("the model has no experts that swap_ffn_for_moe has put in")
    if built := [name for name, _, moe in found if moe.dense is None]:
        raise ValueError(
            f"{', '.join(built)} were built with experts; a config without `swap` builds dense FFNs"
        )
    for _, block, moe in found:
        for kept in modules_of(moe.dense):
            kept.train(moe.training)
        put(block, moe.dense)
    name_anew(model)
    return [name for name, _, _ in found]


def report_coactivation(
    model: nn.Module,
    num_experts: int,
    calibration: Callable[[], object],
    layers: Sequence[str] | None = None,
) -> dict[str, SplitReport]:
    """What a split by co-activation of a model's dense FFNs would be worth; arguments as of
    :func:`swap_ffn_for_moe`.

    Returns:
        By name of the FFN, how many hidden units fire, and the errors of its output beside those
        of other splits.
    """
    seams = choose_ffns(model, layers)
    inputs = capture_inputs({name: seams[name].linear1 for name in seams}, calibration)
    return {
        name: report_splits(weights_of(seam), seam.activation, inputs[name], num_experts)
        for name, seam in seams.items()
    }


def choose_ffns(model: nn.Module, layers: Sequence[str] | None) -> dict[str, Seam]:
    """A model's dense FFNs whose names patterns find, in the order of the patterns."""
    seams = find_ffns(model)
    if layers is None:
        layers = ["*"]
    names = matching(seams, [layers] if isinstance(layers, str) else layers, "layers")
    return {name: seams[name] for name in names}


def matching(names: Collection[str], patterns: Sequence[str], setting: str) -> list[str]:
    """The names that patterns find, each once, by pattern.

    Raises:
        ValueError: on a pattern that finds none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names_found = [name for name in names if fnmatchcase(name, pattern)]
        if not names_found:
            there = ", ".join(names) or "none"
            raise ValueError(f"{setting}: {pattern!r} finds no dense FFN; there is: {there}")
        found |= dict.fromkeys(names_found)
    return list(found)


def make_experts(seams: dict[str, Seam], config: MoEConfig, method: str) -> dict[str, SwappedFFN]:
    """Fresh experts of the sizes of dense FFNs, on their devices."""
    if config.layers is not None:
        raise ValueError(f"layers={config.layers} of the experts: patterns choose the FFNs here")
    config = replace(config, layers=tuple(range(len(seams))))  # that share a mean
    if method == "slots" and config.slots == 1:
        config = replace(config, slots=config.top_k)
    if method == "coactivation":
        config = replace(config, combine="sum")
    made = {}
    for name, seam in seams.items():
        hidden, dim = seam.linear1.weight.shape
        try:
            width = swapped_width(config, method, hidden)
            if config.expert_dim not in (None, width):
                raise ValueError(f"expert_dim={config.expert_dim} must be {width} or None")
            made[name] = SwappedFFN(
                replace(config, expert_dim=width),
                dim,
                hidden,
                activation_name(seam.activation),
                seam.dropout,
                method,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        made[name].to(seam.linear1.weight).train(seam.block.training)
        made[name].requires_grad_(seam.linear1.weight.requires_grad)
    return made


def swapped_width(config: MoEConfig, method: str, hidden: int) -> int:
    """Hidden units of an expert."""
    if method != "coactivation":
        return expert_width(method, config, hidden)
    if hidden % config.num_experts:
        raise ValueError(
            f"{hidden} hidden units cannot be divided by num_experts={config.num_experts}"
        )
    return hidden // config.num_experts


def weights_of(seam: Seam) -> FFNWeights:
    return ffn_weights(seam.linear1, seam.linear2)


def place(
    model: nn.Module, seams: dict[str, Seam], made: dict[str, SwappedFFN], keep: bool
) -> None:
    """Put experts in their places, and name all parts anew."""
    before = {name: seams[name].replace(moe) for name, moe in made.items()}
    try:
        name_anew(model)
    except ValueError:
        for name, attributes in before.items():
            seams[name].put(attributes)
        raise
    if keep:
        for name, moe in made.items():
            moe.dense = before[name]


def name_anew(model: nn.Module) -> None:
    """Name the records of a model's parts, and let a detector learn its knobs."""
    if hasattr(model, "name_parts"):
        model.name_parts()
    else:
        name_parts(model)

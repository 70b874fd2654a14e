"""Experts that start from a trained dense FFN instead of from noise (sparse upcycling,
https://arxiv.org/abs/2212.05055).

A construction says which hidden units of the FFN each expert takes: as copies each expert takes
all of them, in a split (https://arxiv.org/abs/2110.01786) each unit goes to one expert. Between
them, the FFN is divided into shards and each is copied: in "paper", that of Dynamic-DINO
(https://arxiv.org/abs/2507.17436), shards of one copy share a row of the router, in "slots"
copies of one shard compete with each other alone.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import check_choice
from .moe import MoE, MoEConfig

CONSTRUCTIONS = ("auto", "copies", "split", "paper", "slots")


class FFNWeights(NamedTuple):
    """Of a dense FFN, as its linear layers have them, or of E experts, stacked in front."""

    w1: Tensor  # (hidden, dim)
    b1: Tensor  # (hidden,)
    w2: Tensor  # (dim, hidden)
    b2: Tensor  # (dim,)


def initialize_from_pretrained_ffn(
    moe: MoE, linear1: nn.Linear, linear2: nn.Linear, construction: str = "auto"
) -> None:
    """Start a mixture of experts from the trained FFN of two linear layers, in place.

    The activation between them must be that of ``moe``. For the constructions see
    :func:`upcycle`.

    Raises:
        ValueError: if the construction, or the FFN, does not fit the experts.
    """
    with torch.no_grad():
        state = upcycle(moe, ffn_weights(linear1, linear2), construction)
        moe.load_state_dict(state, strict=False)


def ffn_weights(linear1: nn.Linear, linear2: nn.Linear) -> FFNWeights:
    """The weights of two linear layers; biases that they lack are 0."""
    b1, b2 = (
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        for linear in (linear1, linear2)
    )
    return FFNWeights(linear1.weight, b1, linear2.weight, b2)


def upcycle(moe: MoE, ffn: FFNWeights, construction: str = "auto") -> dict[str, Tensor]:
    """Entries of the state dict of a mixture of experts that start it from a dense FFN.

    ==========  ==================================  ============================================
    name        experts                             equals the dense FFN
    ==========  ==================================  ============================================
    "copies"    ``num_experts`` of all units        whatever the router does
    "slots"     of each of ``slots`` shards,        whatever the router does
                ``num_experts / slots`` copies
    "paper"     of each of ``top_k`` shards,        until a token takes shards of several copies
                ``num_experts / top_k`` copies
    "split"     of each unit, one                   if all experts are chosen with equal gates,
                                                    or their outputs are summed
    ==========  ==================================  ============================================

    Slot s holds the copies of shard s, of which a token always takes one or a mean. In "paper"
    one copy's shards stand side by side and share a row of the router, so that they tie and a
    token takes one whole copy; their first row is kept, repeated. This ends with the first
    training step, and noise on the logits of single experts breaks it from the start.

    The router has a gradient from the start where a token takes different shards, or one expert
    (per slot). Gates of equal copies of the same units cancel until the copies differ: then
    balance and z-loss alone train it at first.

    Args:
        ffn: of the same activation.
        construction: "auto" is the experts' own if they have one, else the first that fits their
            width: "slots" if the config has any, "copies", "split", which has the
            ``num_experts``-th part of the units, rounded as :meth:`MoEConfig.width` does. Of
            experts whose outputs are summed it is "split".

    Raises:
        ValueError: if the construction does not fit the experts, or the FFN has other channels; if
            the experts' own one needs images.
    """
    check_choice("upcycling", construction, CONSTRUCTIONS)
    config = moe.config
    num_experts, expert_dim, dim = moe.experts.w1.shape
    hidden = len(ffn.w1)
    if ffn.w1.shape != (hidden, dim) or ffn.w2.shape != (dim, hidden):
        shapes = f"{tuple(ffn.w1.shape)} and {tuple(ffn.w2.shape)}"
        raise ValueError(f"an FFN of weights {shapes} does not fit experts of {dim} channels")
    names = [moe.construction if construction == "auto" else construction]
    if names == ["coactivation"]:
        raise ValueError("what is active together, images tell: swap_ffn_for_moe sees them")
    if names == ["auto"] and config.combine == "sum":
        names = ["split"]
    elif names == ["auto"]:
        slots = config.slots > 1 and hidden % config.slots == 0
        names = [*(["slots"] if slots else []), "copies", "split"]
    widths = {name: expert_width(name, config, hidden) for name in names}
    fitting = [name for name, width in widths.items() if width == expert_dim]
    if not fitting:
        wanted = " or ".join(f"{width} ({name})" for name, width in widths.items())
        raise ValueError(
            f"{num_experts} experts from {hidden} hidden units need expert_dim={wanted}, "
            f"not {expert_dim}"
        )
    chosen = fitting[0]
    if chosen == "split":
        units = split_units(ffn, num_experts, expert_dim)
    else:
        shards = torch.arange(hidden).view(-1, expert_dim)
        copies = num_experts // len(shards)
        if chosen == "paper":
            units = shards.repeat(copies, 1)
        else:
            units = shards.repeat_interleave(copies, dim=0)
    experts = take_units(ffn, units, config)
    state = {f"experts.{name}": value for name, value in experts._asdict().items()}
    if chosen == "paper":
        rows = moe.router.weight.detach()[:: config.top_k]
        state["router.weight"] = rows.repeat_interleave(config.top_k, dim=0)
    return state


def expert_width(construction: str, config: MoEConfig, hidden: int) -> int:
    """Hidden units of one expert that starts from an FFN of ``hidden``.

    Raises:
        ValueError: if there is no such construction for these settings.
    """
    if construction == "split":
        return replace(config, expert_dim=None).width(hidden)
    if config.combine == "sum":
        raise ValueError(f"construction {construction!r} needs combine='mean': copies are no parts")
    if construction == "copies":
        return hidden
    if construction == "slots" and config.slots == 1:
        raise ValueError("construction 'slots' needs slots above 1, not slots=1")
    if construction == "paper":
        if config.slots > 1:
            raise ValueError(f"construction 'paper' needs slots=1, not slots={config.slots}")
        if config.num_experts % config.top_k:
            raise ValueError(
                f"construction 'paper' needs num_experts={config.num_experts} to be a multiple of "
                f"top_k={config.top_k}"
            )
    setting = {"paper": "top_k", "slots": "slots"}[construction]
    shards = getattr(config, setting)
    if hidden % shards:
        raise ValueError(f"{hidden} hidden units cannot be divided by {setting}={shards}")
    return hidden // shards


def split_units(ffn: FFNWeights, num_experts: int, expert_dim: int) -> Tensor:
    """(E, expert_dim) indices of the hidden units that each expert takes, dealt out in order.

    If there is room for a few more, the first units go to two experts; if it lacks for some, those
    with the smallest weights are left out.
    """
    hidden, room = len(ffn.w1), num_experts * expert_dim
    if room < hidden:
        size = ffn.w1.norm(dim=1) * ffn.w2.norm(dim=0)
        units = size.topk(room).indices.sort().values
    else:
        units = torch.arange(room) % hidden
    return units.view(num_experts, expert_dim)


def take_units(ffn: FFNWeights, units: Tensor, config: MoEConfig) -> FFNWeights:
    """Experts that take the given hidden units of a dense FFN.

    Output biases are averaged, so every expert has the whole one, which then enters once. Outputs
    are scaled so that units count as in the dense FFN: it is equalled if to each unit come gates
    of the same sum. If ``top_k`` of a split's experts are, their units
    count once each and the others are missing. (Scaled up in their place, they would be further
    from the dense output than no output is: on random weights by 1.02 of its norm at half of the
    experts, against 0.72.) Where outputs are summed this holds for any number of experts.

    Args:
        units: (E, d) indices.
    """
    holders = torch.bincount(units.flatten(), minlength=len(ffn.w1))
    once = len(units) if config.combine == "mean" else 1  # of a unit that one expert holds
    scale = (once / holders[units]).clamp(max=config.top_k)  # (E, d)
    return FFNWeights(
        w1=ffn.w1[units],
        b1=ffn.b1[units],
        w2=(ffn.w2[:, units] * scale.to(ffn.w2)).transpose(0, 1).contiguous(),
        b2=ffn.b2.repeat(len(units), 1),
    )

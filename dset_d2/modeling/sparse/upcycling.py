"""Experts that start from a trained dense FFN instead of from noise (sparse upcycling,
https://arxiv.org/abs/2212.05055).

A construction says which hidden units of the FFN each expert takes: as copies each expert takes
all of them, in a split (https://arxiv.org/abs/2110.01786) each unit goes to one expert.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import check_choice
from .moe import MoEConfig

CONSTRUCTIONS = ("auto", "copies", "split")


class FFNWeights(NamedTuple):
    """Of a dense FFN, as its linear layers have them, or of E experts, stacked in front."""

    w1: Tensor  # (hidden, dim)
    b1: Tensor  # (hidden,)
    w2: Tensor  # (dim, hidden)
    b2: Tensor  # (dim,)


def upcycle(
    ffn: FFNWeights, config: MoEConfig, expert_dim: int, construction: str = "auto"
) -> FFNWeights:
    """Weights of :class:`GroupedExperts` that start from a dense FFN.

    Args:
        expert_dim: hidden units of one expert.
        construction: "copies", where an expert is as wide as the FFN; "split", where it has the
            ``num_experts``-th part of its units, rounded as :meth:`MoEConfig.width` does; "auto":
            the one that fits.

    Raises:
        ValueError: if the construction does not fit the width.
    """
    check_choice("upcycling", construction, CONSTRUCTIONS)
    hidden = len(ffn.w1)
    widths = {"copies": hidden, "split": replace(config, expert_dim=None).width(hidden)}
    if construction != "auto":
        widths = {construction: widths[construction]}
    if expert_dim not in widths.values():
        wanted = " or ".join(f"{width} ({name})" for name, width in widths.items())
        raise ValueError(
            f"{config.num_experts} experts from {hidden} hidden units need expert_dim={wanted}, "
            f"not {expert_dim}"
        )
    if widths.get("copies") == expert_dim:
        units = torch.arange(hidden).expand(config.num_experts, hidden)
    else:
        units = split_units(ffn, config.num_experts, expert_dim)
    return take_units(ffn, units, config.top_k)


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


def take_units(ffn: FFNWeights, units: Tensor, top_k: int) -> FFNWeights:
    """Experts that take the given hidden units of a dense FFN.

    Gates sum to 1, so every expert has the whole output bias, which then enters once. Outputs are
    scaled so that units count as in the dense FFN: copies equal it at any gates, a split equals it
    if all experts are chosen with equal gates. If ``top_k`` of a split's experts are, their units
    count once each and the others are missing. (Scaled up in their place, they would be further
    from the dense output than no output is: on random weights by 1.02 of its norm at half of the
    experts, against 0.72.)

    Args:
        units: (E, d) indices.
        top_k: experts per token.
    """
    holders = torch.bincount(units.flatten(), minlength=len(ffn.w1))
    scale = (len(units) / holders[units]).clamp(max=top_k)  # (E, d)
    return FFNWeights(
        w1=ffn.w1[units],
        b1=ffn.b1[units],
        w2=(ffn.w2[:, units] * scale.to(ffn.w2)).transpose(0, 1).contiguous(),
        b2=ffn.b2.repeat(len(units), 1),
    )

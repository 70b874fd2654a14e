"""Anchors of the encoder's tokens and the selection of those that become queries."""

import torch
from torch import Tensor

from ..layers import constant
from ..tokens import Padding


@constant
def cell_centres(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(1, sum H_l * W_l, 4): centre x, y in [0, 1] of the padded map, and base w, h per level."""
    levels = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(
            (torch.arange(height, device=device) + 0.5) / height,
            (torch.arange(width, device=device) + 0.5) / width,
            indexing="ij",
        )
        size = torch.full_like(x, 0.05 * 2**level)
        levels.append(torch.stack([x, y, size, size], dim=-1).flatten(0, 1))
    return torch.cat(levels)[None]


@constant
def square_anchors(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    return anchor_logits(cell_centres(shapes, device))


def anchor_logits(anchors: Tensor) -> Tensor:
    """Logits of anchor boxes; infinite where a coordinate is within 1 % of the border."""
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    return torch.logit(anchors).masked_fill(~valid, torch.inf)


def make_anchors(
    shapes: list[tuple[int, int]], device: torch.device, padding: Padding | None = None
) -> Tensor:
    """Anchor boxes of all tokens as logits, (1 or B, sum H_l * W_l, 4).

    Coordinates are relative to the image, not to its padding; an anchor on padding lies outside
    of [0, 1] and so counts as invalid (infinite), like those close to the border.
    """
    sizes = tuple((height, width) for height, width in shapes)
    if padding is None:
        return square_anchors(sizes, device)
    centres = cell_centres(sizes, device)
    xy = centres[..., :2] / padding.ratio[:, None]
    return anchor_logits(torch.cat([xy, centres[..., 2:].expand_as(xy)], dim=-1))

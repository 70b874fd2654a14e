"""Multi-scale deformable attention (https://arxiv.org/abs/2010.04159), RT-DETRv2's variant
with a number of points per level and a sampling without interpolation
(https://arxiv.org/abs/2407.17140)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import check_choice
from ..tokens import Padding, restore


class Memory(NamedTuple):
    """What cross-attention reads: the tokens of all levels, flattened and joined.

    Attributes:
        tokens: (B, sum H_l * W_l, dim), or (B, K, dim) of those in ``kept``.
        shapes: (H_l, W_l) of every level.
        kept: (B, K) indices of the tokens that were not pruned; the others' values are 0.
        valid: (B, sum H_l * W_l) bool, False where nothing may be read.
        padding: which of the batch is image.
    """

    tokens: Tensor
    shapes: list[tuple[int, int]]
    kept: Tensor | None = None
    valid: Tensor | None = None
    padding: Padding | None = None


def sample_bilinear(value: Tensor, locations: Tensor, cells: Tensor | None) -> Tensor:
    """Bilinear samples of one level; zero outside of the map.

    Args:
        value: (N, C, H, W).
        locations: (N, Q, P, 2) x, y in [0, 1] of the map.
        cells: (N, 2) columns and rows that are image, not padding; None: all.

    Returns:
        (N, C, Q, P)
    """
    return F.grid_sample(value, 2 * locations - 1, align_corners=False)


def sample_discrete(value: Tensor, locations: Tensor, cells: Tensor | None) -> Tensor:
    """Values of single cells, for runtimes without ``grid_sample``; arguments as above.

    Upstream rounds ``location * size`` to the nearest integer, which lies half a cell beside the
    bilinear sample; released weights expect that. It clamps x by the height, which only squares
    forgive; here each axis has its own bound.
    """
    nearest = []
    for axis, size in enumerate((value.shape[3], value.shape[2])):
        cell = (locations[..., axis] * size + 0.5).long().clamp(0, size - 1)
        if cells is not None:
            cell = torch.minimum(cell, cells[:, axis, None, None] - 1)
        nearest.append(cell)
    x, y = nearest
    index = (y * value.shape[3] + x).flatten(1)[:, None]
    samples = value.flatten(2).gather(2, index.expand(-1, value.shape[1], -1))
    return samples.unflatten(2, locations.shape[1:3])


SAMPLERS = {"default": sample_bilinear, "discrete": sample_discrete}


class MSDeformableAttention(nn.Module):
    """Every query reads a few learned points around its reference box on every level.

    Args:
        dim: channels of queries and values.
        num_heads: attention heads; divides ``dim``.
        num_points: sampling points per level, one number for each level.
        method: "default" (bilinear) or "discrete"; the latter freezes the offsets.
        offset_scale: offsets of 1 move a point by this share of the box's size times
            ``1 / num_points``.
        project: linear layers before and after the sampling; D-FINE does without them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_points: tuple[int, ...],
        method: str = "default",
        offset_scale: float = 0.5,
        project: bool = True,
    ) -> None:
        super().__init__()
        check_choice("cross_attn_method", method, SAMPLERS)
        self.num_heads = num_heads
        self.num_points = list(num_points)
        self.offset_scale = offset_scale
        self.sample = SAMPLERS[method]
        points = sum(num_points)
        scale = torch.cat([torch.full((n,), 1 / n) for n in num_points])
        self.register_buffer("num_points_scale", scale, persistent=False)
        self.sampling_offsets = nn.Linear(dim, num_heads * points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * points)
        self.value_proj = nn.Linear(dim, dim) if project else nn.Identity()
        self.output_proj = nn.Linear(dim, dim) if project else nn.Identity()
        self.reset_parameters()
        if method == "discrete":
            self.sampling_offsets.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Heads start by looking in evenly spread directions, points at growing distance."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().max(-1, keepdim=True).values
        distance = torch.cat([torch.arange(1, n + 1) for n in self.num_points])
        with torch.no_grad():
            bias = direction[:, None] * distance[None, :, None]
            self.sampling_offsets.bias.copy_(bias.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, reference: Tensor, memory: Memory) -> Tensor:
        """Attend from queries to the flattened levels.

        Args:
            query: (B, Q, dim).
            reference: (B, Q, 4) boxes cx, cy, w, h in [0, 1] of the image.

        Returns:
            (B, Q, dim)
        """
        batch, queries = query.shape[:2]
        heads, shapes, padding = self.num_heads, memory.shapes, memory.padding
        value = self.value_proj(memory.tokens)
        if memory.kept is not None:
            empty = value.new_zeros(batch, sum(h * w for h, w in shapes), value.shape[2])
            value = restore(empty, memory.kept, value)
        if memory.valid is not None:
            value = value * memory.valid[..., None]
        value = value.transpose(1, 2).reshape(batch * heads, -1, value.shape[1])

        offsets = self.sampling_offsets(query).view(batch, queries, heads, -1, 2)
        weights = self.attention_weights(query).view(batch, queries, heads, -1).softmax(-1)
        weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        # Locations stay in fp32 under autocast: half precision moves a point by whole cells.
        reference = reference.float()[:, :, None, None]
        scale = self.num_points_scale[:, None] * self.offset_scale
        locations = reference[..., :2] + offsets.float() * scale * reference[..., 2:]
        if padding is not None:
            locations = locations * padding.ratio[:, None, None, None]
        locations = locations.transpose(1, 2).flatten(0, 1)

        sampled = []
        levels = value.float().split([h * w for h, w in shapes], dim=2)
        for level, points, shape in zip(levels, locations.split(self.num_points, dim=2), shapes):
            cells = None if padding is None else padding.cells(*shape).repeat_interleave(heads, 0)
            sampled.append(self.sample(level.unflatten(2, shape), points, cells))
        output = (torch.cat(sampled, dim=-1) * weights).sum(-1).to(value.dtype)
        return self.output_proj(output.view(batch, -1, queries).transpose(1, 2))

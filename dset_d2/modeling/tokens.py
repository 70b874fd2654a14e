"""Tokens of a feature map: which are image, which are kept, and where they stand."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Padding(NamedTuple):
    """What of a padded batch is image, in whole pixels.

    ``sizes`` and ``padded`` may both be of another scale than the images at hand: only their
    ratio counts.
    """

    sizes: Tensor  # (B, 2) width and height of each image
    padded: tuple[int, int]  # width and height of the batch

    @property
    def ratio(self) -> Tensor:
        """(B, 2) share of the padded width and height that each image fills."""
        return self.sizes / self.sizes.new_tensor(self.padded)

    def cells(self, height: int, width: int) -> Tensor:
        """(B, 2) columns and rows of a feature map that hold some of the image."""
        scaled = self.sizes * self.sizes.new_tensor([width, height])
        padded = self.sizes.new_tensor(self.padded)
        return (scaled + padded - 1) // padded

    def valid_tokens(self, height: int, width: int) -> Tensor:
        """(B, height * width) bool, row-major: which tokens of a map hold some of the image."""
        columns, rows = self.cells(height, width).split(1, dim=1)
        x = torch.arange(width, device=columns.device) < columns
        y = torch.arange(height, device=rows.device) < rows
        return (y[:, :, None] & x[:, None, :]).flatten(1)


def as_tokens(feature: Tensor) -> Tensor:
    """A feature map (B, C, H, W) as tokens (B, H * W, C)."""
    if feature.requires_grad and len(feature) == 1:
        # Of one image the gradient comes back in an order that BatchNorm on CPUs takes for another
        # one, and gives wrong gradients (torch 2.15).
        feature.register_hook(Tensor.contiguous)
    return feature.flatten(2).transpose(1, 2)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, C), index (B, K) -> (B, K, C)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def mean_and_deviation(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Of tokens (B, N, C), those that are ``valid`` (B, N), None: all: (B, 2 * C)."""
    if valid is None:
        variance, mean = torch.var_mean(tokens, dim=1, correction=0)
    else:
        weight = (valid / valid.sum(1, keepdim=True).clamp(min=1))[..., None].to(tokens.dtype)
        mean = (tokens * weight).sum(1)
        variance = ((tokens - mean[:, None]) ** 2 * weight).sum(1)
    return torch.cat([mean, variance.sqrt()], dim=1)


def prune(tokens: Tensor | None, index: Tensor | None) -> Tensor | None:
    """Keep some of the tokens, or of what belongs to them: positions, rotations, padding.

    Args:
        tokens: (B or 1, N, C) or (B or 1, N).
        index: (B, K) of those to keep; None keeps all.

    Returns:
        (B, K, C) or (B, K).
    """
    if tokens is None or index is None:
        return tokens
    tokens = tokens.expand(len(index), *tokens.shape[1:])
    return tokens.gather(1, index) if tokens.dim() == 2 else gather_tokens(tokens, index)


def restore(full: Tensor, index: Tensor | None, tokens: Tensor) -> Tensor:
    """Put kept tokens (B, K, C) back to their places ``index`` among all, ``full`` (B, N, C)."""
    if index is None:
        return tokens
    return full.scatter(1, index[..., None].expand_as(tokens), tokens.to(full.dtype))


def to_windows(tokens: Tensor, shape: tuple[int, int], rows: int, columns: int) -> Tensor:
    """The tokens of a map by its windows, of which there are ``rows`` below each other and
    ``columns`` side by side: (B, H * W, C) -> (B * rows * columns, n, C)."""
    height, width = shape
    grid = tokens.unflatten(1, (rows, height // rows, columns, width // columns))
    return grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(tokens: Tensor, shape: tuple[int, int], rows: int, columns: int) -> Tensor:
    """What :func:`to_windows` undoes: (B * rows * columns, n, C) -> (B, H * W, C)."""
    height, width = shape
    grid = tokens.unflatten(1, (height // rows, width // columns)).unflatten(0, (-1, rows, columns))
    return grid.transpose(2, 3).flatten(1, 4)


@dataclass(frozen=True)  # torch 2.10 compiles no property of a NamedTuple
class TokenMap:
    """Where tokens stand: on which cells of a feature map.

    Attributes:
        shape: (H, W) of the map.
        padding: which of the map is image; None: all of it.
        index: (B, N) row-major cells of the tokens; None: one token on each cell, in order.
        prefix: tokens in front of these that stand on no cell, such as a ViT's class token.
    """

    shape: tuple[int, int]
    padding: Padding | None = None
    index: Tensor | None = None
    prefix: int = 0

    @property
    def maps(self) -> tuple["TokenMap", ...]:
        """As :class:`TokenLevels` has them."""
        return (self,)

    @property
    def valid(self) -> Tensor | None:
        """(B, prefix + N) bool, False for tokens on padding; None if there is none."""
        if self.padding is None:
            return None
        valid = prune(self.padding.valid_tokens(*self.shape), self.index)
        return F.pad(valid, (self.prefix, 0), value=True)

    def prune(self, index: Tensor | None) -> "TokenMap":
        """The map of the tokens that an index (B, K) keeps of these."""
        if index is None:
            return self
        index = index if self.index is None else self.index.gather(1, index)
        return replace(self, index=index)

    def regions(self, size: int, batch: int, device: torch.device) -> "Regions":
        """The tokens of a batch by the squares of ``size`` x ``size`` cells that they stand in.

        Each image has regions of its own, so has its padding, and a token on no cell is one.
        """
        height, width = self.shape
        rows, columns = -(-height // size), -(-width // size)
        cells = self.index
        if cells is None:
            cells = torch.arange(height * width, device=device).expand(batch, -1)
        index = cells // width // size * columns + cells % width // size
        own = rows * columns + torch.arange(self.prefix, device=device).expand(batch, -1)
        index, each = torch.cat([own, index], dim=1), rows * columns + self.prefix
        index = index + torch.arange(batch, device=device)[:, None] * each
        count = batch * each
        if self.padding is None:
            return Regions(index.flatten(), count)
        return Regions((index + ~self.valid * count).flatten(), 2 * count)


@dataclass(frozen=True)
class TokenLevels:
    """Where the tokens of several feature maps stand, one map's after the other's.

    Attributes:
        maps: of one batch, without prefix.
    """

    maps: tuple[TokenMap, ...]

    @property
    def valid(self) -> Tensor | None:
        """(B, N) bool, False for tokens on padding; None if there is none."""
        masks = [tokens.valid for tokens in self.maps]
        return None if masks[0] is None else torch.cat(masks, dim=1)

    def regions(self, size: int, batch: int, device: torch.device) -> "Regions":
        """As :meth:`TokenMap.regions`; each map has regions of its own."""
        indices, count = [], 0
        for tokens in self.maps:
            regions = tokens.regions(size, batch, device)
            indices.append(regions.index.unflatten(0, (batch, -1)) + count)
            count += regions.count
        return Regions(torch.cat(indices, dim=1).flatten(), count)


@dataclass(frozen=True)
class Regions:
    """Which of T tokens belong together."""

    index: Tensor  # (T,) in 0..count - 1
    count: int  # of regions; some may have no token

    def mean(self, values: Tensor) -> Tensor:
        """(T, C) -> (T, C): of each token its region's mean."""
        index = self.index[:, None].expand_as(values)
        means = values.new_zeros(self.count, values.shape[1])
        means = means.scatter_reduce(0, index, values, "mean", include_self=False)
        return means.gather(0, index)

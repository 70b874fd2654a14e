"""What a run of a ViT's blocks works on: all tokens, those that are kept, or all by windows."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from ..sparse import TokenPruner
from ..tokens import TokenMap, from_windows, prune, restore, to_windows


@dataclass(frozen=True)
class WindowConfig:
    """Windowed attention in all but a few blocks: less compute, whatever the image shows.

    Blocks behind each other share their windows. Every window has class and register tokens of its
    own, so that a block stays one batch of dense attentions; all windows of a run of blocks start
    from the same ones, and the mean of what they become goes on.

    Args:
        rows, columns: windows below each other and side by side. Images are padded until they
            divide a map.
        global_blocks: indices of the blocks that attend to the whole map.
    """

    rows: int = 2
    columns: int = 2
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Layout(NamedTuple):
    """What a run of blocks works on.

    Attributes:
        tokens: (B, prefix + N, C), or as many for each window.
        rope: rotations of the N patches, (N, 2 * head_dim) or (B, 1, N, 2 * head_dim).
        where: where the tokens stand; None by windows.
        whole: puts what the blocks make of them back, into (B, prefix + H * W, C).
    """

    tokens: Tensor
    rope: Tensor
    where: TokenMap | None
    whole: Callable[[Tensor], Tensor]


def whole_layout(tokens: Tensor, rope: Tensor, where: TokenMap) -> Layout:
    """All tokens (B, prefix + H * W, C) of a map with their rotations (H * W, 2 * head_dim)."""
    return Layout(tokens, rope, where, lambda x: x)


def pruned_layout(
    pruner: TokenPruner, block: nn.Module, tokens: Tensor, rope: Tensor, where: TokenMap
) -> Layout:
    """Those of all tokens that a pruner keeps, and the prefix; ``block`` is the next one."""
    prefix, scores = where.prefix, None
    if pruner.config.scorer == "attention":
        scores = attention_received(block, tokens, rope, prefix)
    kept, gate = pruner(tokens[:, prefix:], replace(where, prefix=0), scores)
    index, chosen = None, tokens
    if kept is not None:
        always = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
        index = torch.cat([always, kept + prefix], dim=1)
        chosen, rope = prune(tokens, index), prune(rope[None], kept)[:, None]
    if gate is not None:
        chosen = chosen * F.pad(gate, (0, 0, prefix, 0), value=1.0)
    full = tokens if pruner.config.restore == "bypass" else torch.zeros_like(tokens)
    return Layout(chosen, rope, where.prune(kept), lambda x: restore(full, index, x))


def windowed_layout(windows: WindowConfig, tokens: Tensor, rope: Tensor, where: TokenMap) -> Layout:
    """All tokens by windows, (B * windows, prefix + n, C), with the prefix in each."""
    grid, count = (where.shape, windows.rows, windows.columns), windows.rows * windows.columns
    prefix, patches = tokens[:, : where.prefix], tokens[:, where.prefix :]
    split = torch.cat([prefix.repeat_interleave(count, 0), to_windows(patches, *grid)], dim=1)
    rope = to_windows(rope[None], *grid).repeat(tokens.shape[0], 1, 1)[:, None]

    def whole(x: Tensor) -> Tensor:
        prefix = x[:, : where.prefix].unflatten(0, (-1, count)).mean(1)
        return torch.cat([prefix, from_windows(x[:, where.prefix :], *grid)], dim=1)

    return Layout(split, rope, None, whole)


@torch.no_grad()
def attention_received(block: nn.Module, tokens: Tensor, rope: Tensor, prefix: int) -> Tensor:
    """(B, N) shares of the attention that the prefix tokens pay to each of N patches in a block.

    Means over the prefix tokens and the heads; with what these pay to each other they sum to 1.

    Args:
        block: of timm's EVA models, with one matrix for queries, keys and values.
        tokens: (B, prefix + N, C).
    """
    attention = block.attn
    heads = (attention.num_heads, -1)
    query_weight, key_weight, _ = attention.qkv.weight.chunk(3)
    tokens = block.norm1(tokens)
    queries = F.linear(tokens[:, :prefix], query_weight, attention.q_bias)
    queries = queries.unflatten(2, heads).transpose(1, 2)
    keys = F.linear(tokens, key_weight).unflatten(2, heads).transpose(1, 2)
    patches = apply_rot_embed_cat(keys[:, :, prefix:], rope, half=attention.rotate_half)
    keys = torch.cat([keys[:, :, :prefix], patches], dim=2)
    shares = (queries * attention.scale @ keys.transpose(2, 3)).softmax(-1)
    return shares[..., prefix:].mean((1, 2))

"""Low-rank adaptation of linear layers (https://arxiv.org/abs/2106.09685)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of low-rank adaptation.

    Args:
        rank: of the update of each weight.
        alpha: the update is scaled by ``alpha / rank``.
        blocks: how many of the last blocks are adapted; None for all.
    """

    rank: int = 8
    alpha: float = 16.0
    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha} must be positive")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks={self.blocks} must be at least 1, or None for all")


class LoRALinear(nn.Module):
    """A linear layer with the weight W + alpha / rank * B A, which starts as W exactly.

    W keeps its name in the state dict, so that pretrained weights load as without adaptation.
    ``weight`` is the sum, for some attentions read it past :meth:`forward`.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        # Not by assignment, since the property of the same name stands in its way.
        self._parameters["weight"] = linear.weight
        self.register_parameter("bias", linear.bias)
        rows, columns = linear.weight.shape
        self.lora_a = nn.Parameter(linear.weight.new_empty(rank, columns))
        self.lora_b = nn.Parameter(linear.weight.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"] + self.scale * (self.lora_b @ self.lora_a)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """A plain layer with the same outputs."""
        weight, old = self.weight, self._parameters["weight"]
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, self.bias is not None, weight.device, weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        linear.bias = self.bias
        return linear


def add_lora(blocks: nn.ModuleList, config: LoRAConfig) -> int:
    """Adapt the attention of the last blocks in place; returns the first one's index."""
    count = len(blocks) if config.blocks is None else config.blocks
    if count > len(blocks):
        raise ValueError(f"blocks={count} of LoRAConfig exceeds the {len(blocks)} blocks")
    for block in blocks[len(blocks) - count :]:
        for name in ("qkv", "proj"):
            linear = getattr(block.attn, name)
            setattr(block.attn, name, LoRALinear(linear, config.rank, config.alpha))
    return len(blocks) - count


def merge_lora(model: nn.Module) -> None:
    """Replace all adapted layers by plain ones with the same outputs, in place, for inference."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoRALinear):
                setattr(module, name, child.fuse())


def is_lora(name: str) -> bool:
    """Whether a parameter's name is that of a low-rank update."""
    return name.rpartition(".")[2].startswith("lora_")

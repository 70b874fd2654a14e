"""Sparse mechanisms, each written once and used by every part that can be sparse."""

from .moe import MoE, MoEConfig, MoERecord, moe_layers
from .pruning import (
    MemoryPruner,
    MemoryPruningConfig,
    PruningConfig,
    PruningRecord,
    TokenPruner,
)
from .upcycling import initialize_from_pretrained_ffn

__all__ = [
    "MemoryPruner",
    "MemoryPruningConfig",
    "MoE",
    "MoEConfig",
    "MoERecord",
    "PruningConfig",
    "PruningRecord",
    "TokenPruner",
    "initialize_from_pretrained_ffn",
    "moe_layers",
]

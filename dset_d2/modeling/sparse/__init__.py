"""Sparse mechanisms, each written once and used by every part that can be sparse."""

from .collect import clear_records, sparse_losses, sparse_statistics
from .moe import MoE, MoEConfig, moe_layers
from .pruning import MemoryPruner, MemoryPruningConfig, PruningConfig, TokenPruner
from .schedule import set_step

__all__ = [
    "MemoryPruner",
    "MemoryPruningConfig",
    "MoE",
    "MoEConfig",
    "PruningConfig",
    "TokenPruner",
    "clear_records",
    "moe_layers",
    "set_step",
    "sparse_losses",
    "sparse_statistics",
]

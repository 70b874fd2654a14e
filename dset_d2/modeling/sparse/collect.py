"""Gathers what the sparse modules of a model left in a training forward."""

from torch import Tensor, nn

from .moe import MoE
from .pruning import TokenPruner


def recorded(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(short name, module) of all sparse modules that ran in training."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MoE | TokenPruner) and module.record is not None:
            found.append((short_name(name), module))
    return found


def short_name(name: str) -> str:
    """``encoder.encoder.0.layers.0.moe`` -> ``encoder_0_0``; the numbers tell the place."""
    parts = name.split(".")
    return "_".join([parts[0], *(part for part in parts if part.isdecimal())])


def sparse_losses(model: nn.Module, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Weighted losses of all sparse modules, e.g. ``loss_balance_decoder_1``.

    Empty for a dense model.
    """
    losses = {}
    for name, module in recorded(model):
        terms = module.losses() if isinstance(module, MoE) else module.losses(targets)
        losses |= {f"loss_{term}_{name}": value for term, value in terms.items()}
    return losses


def sparse_statistics(model: nn.Module) -> dict[str, dict]:
    """Statistics per sparse module, by kind and short name, e.g. ``moe/decoder_1``."""
    return {
        f"{'moe' if isinstance(module, MoE) else 'pruning'}/{name}": module.statistics()
        for name, module in recorded(model)
    }


def clear_records(model: nn.Module) -> None:
    """Let go of what the last training forward left, and of the graph behind it."""
    for _, module in recorded(model):
        module.record = None

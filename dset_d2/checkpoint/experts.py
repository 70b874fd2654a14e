"""Experts of a model that start from the dense FFNs of a checkpoint."""

import logging
from collections.abc import Collection, Iterator

from torch import Tensor, nn

from ..modeling.layers import check_choice
from ..modeling.sparse import MoE
from ..modeling.sparse.upcycling import CONSTRUCTIONS, FFNWeights, upcycle

logger = logging.getLogger(__name__)


def layers_of(place: str) -> Iterator[tuple[str, str]]:
    """Names that the two layers of a dense FFN may have whose place experts take."""
    yield f"{place}.linear1", f"{place}.linear2"
    yield f"{place}.fc1", f"{place}.fc2"  # of timm's ViTs
    if place.rpartition(".")[2] == "fc1":  # of transformers' layers
        yield place, f"{place[:-1]}2"


def check_upcycling(value: str) -> None:
    check_choice("upcycling", value, (*CONSTRUCTIONS, "none"))


def upcycle_ffns(
    model: nn.Module, state: dict[str, Tensor], name: str, upcycling: str
) -> dict[str, Tensor]:
    """A state dict with experts in the place of dense FFNs where the model has experts.

    Args:
        name: what errors and warnings call the checkpoint.
        upcycling: a construction of :func:`~dset_d2.modeling.sparse.upcycling.upcycle`, or
            "none", which changes nothing.

    Raises:
        ValueError: if a construction other than "auto" does not fit the experts.
    """
    state = dict(state)
    if upcycling == "none":
        return state
    for place, keys in dense_ffns(model, state).items():
        moe, ffn = model.get_submodule(place), FFNWeights(*(state[key] for key in keys))
        try:
            start = upcycle(moe, ffn, upcycling)
        except ValueError as error:
            if upcycling != "auto":
                raise ValueError(f"{name}: {place}: {error}") from error
            logger.warning("%s: the experts of %s stay fresh: %s", name, place, error)
            continue
        hidden = len(ffn.w1)
        used = min(moe.experts.w1.shape[:2].numel(), hidden)
        logger.log(
            logging.INFO if used == hidden else logging.WARNING,
            "%s: the experts of %s start from %d of its %d hidden units",
            *(name, place, used, hidden),
        )
        for key in keys:
            del state[key]
        state |= {f"{place}.{key}": value for key, value in start.items()}
    return state


def dense_ffns(model: nn.Module, state: dict[str, Tensor]) -> dict[str, list[str]]:
    """The dense FFNs that a state dict has in the place of a model's experts: of each place the
    keys, in the order of :class:`FFNWeights`. One of other channels is another network's."""
    found = {}
    for place, moe in model.named_modules():
        if not isinstance(moe, MoE):
            continue
        for layers in layers_of(place):
            keys = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
            if not state.keys() >= set(keys):
                continue
            if state[keys[0]].shape[1:] == moe.experts.w1.shape[2:]:
                found[place] = keys
    return found


def warn_of_keys(name: str, what: str, keys: Collection[str]) -> None:
    """Say how many of a checkpoint's or a model's keys are left, and name the first."""
    if keys:
        some = sorted(keys)[:10] + ["..."] * (len(keys) > 10)
        logger.warning("%s: %d %s: %s", name, len(keys), what, ", ".join(some))

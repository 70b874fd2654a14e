"""What one forward needs beside its tensors, and what it leaves for losses, logs and pictures.

A module keeps nothing of a forward. Blocks of other libraries call their FFN with the tokens
alone, so the rest cannot be handed down as arguments; as with Detectron2's ``EventStorage``, a
detector opens a context around a forward, and sparse parts look at the innermost one::

    with forward_context(record=True) as context:
        model([inputs])  # one forward: records of a second one would bear the same names
    context.records  # {"pruning/encoder_0": PruningRecord(...), "moe/decoder_1": MoERecord(...)}
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from .tokens import Padding, TokenLevels, TokenMap


@dataclass(frozen=True)
class Knobs:
    """What one call may change of how much a detector computes; None is as configured.

    Args:
        keep_ratio: share of the tokens that every token pruner keeps, in (0, 1]; a pruner's
            ``min_tokens`` stay in any case.
        memory_ratio: share of the tokens that the decoder's cross-attention can read, in (0, 1];
            as many as there are queries stay in any case.
        top_k: experts per token of every mixture of experts, but for those in the first block of
            a ViT, which runs as configured.
        decoder_layers: decoder layers that run.
        num_queries: queries of the decoder.
        vit_blocks: blocks of a ViT that run; the first and those at its taps do in any case.
    """

    keep_ratio: float | None = None
    memory_ratio: float | None = None
    top_k: int | None = None
    decoder_layers: int | None = None
    num_queries: int | None = None
    vit_blocks: int | None = None

    def __post_init__(self) -> None:
        for knob in fields(self):
            value = getattr(self, knob.name)
            if value is None:
                continue
            if knob.name.endswith("ratio"):
                if not 0 < value <= 1:
                    raise ValueError(f"{knob.name}={value} must lie in (0, 1]")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{knob.name}={value} must be a whole number of at least 1")

    def check(self, limits: Mapping[str, float]) -> None:
        """Raise a ``ValueError`` for a knob that a model has no part for, or beyond its limit."""
        for knob in fields(self):
            value = getattr(self, knob.name)
            if value is None:
                continue
            if knob.name not in limits:
                raise ValueError(
                    f"{knob.name}={value}: the model has no part for this knob; "
                    f"it has {', '.join(sorted(limits)) or 'none'}"
                )
            if value > limits[knob.name]:
                raise ValueError(f"{knob.name}={value} exceeds the model's {limits[knob.name]}")


class Record(Protocol):
    """What a sparse part leaves of a forward."""

    def losses(self, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weighted losses; ``targets`` are as in :meth:`DETRDetector.compute_losses`."""

    def statistics(self) -> Mapping[str, Tensor | float]:
        """What is logged."""


class Accumulation(NamedTuple):
    """The whole batch whose parts are forwarded in turn, their mean loss being the batch's.

    Attributes:
        parts: how many.
        boxes: ground-truth boxes in all of them.
    """

    parts: int
    boxes: int


@dataclass(frozen=True)
class ForwardContext:
    """The surroundings of one forward.

    Attributes:
        step: training steps that are done, which schedules follow; None: past all of them.
        knobs: what this call changes.
        padding: which of the images is image; None: all of it.
        tokens: where the tokens that blocks work on stand; None for queries.
        records: what parts leave, by name; None if nobody wants it.
        accumulation: the batch that this forward is a part of; None if it is all.
    """

    step: int | None = None
    knobs: Knobs = field(default_factory=Knobs)
    padding: Padding | None = None
    tokens: TokenMap | TokenLevels | None = None
    records: dict[str, Record] | None = None
    accumulation: Accumulation | None = None

    def leave(self, name: str, record: Record) -> None:
        """Keep a record until the context ends.

        Raises:
            RuntimeError: if the name has left one before: one of the two would be lost.
        """
        if name in self.records:
            raise RuntimeError(f"{name} leaves a second record in one forward")
        self.records[name] = record


class _Stack(threading.local):
    """The open contexts of a thread, innermost last."""

    def __init__(self) -> None:
        self.contexts = [ForwardContext()]


_stack = _Stack()


def current() -> ForwardContext:
    """The innermost context; outside of all, one without step, knobs and records."""
    return _stack.contexts[-1]


@contextmanager
def forward_context(*, record: bool = False, **changes) -> Iterator[ForwardContext]:
    """Open a context, which has of the surrounding one what is not given.

    Args:
        record: collect records afresh; else they go where the surrounding context's go.
        changes: fields of :class:`ForwardContext`.
    """
    if record:
        changes["records"] = {}
    _stack.contexts.append(replace(current(), **changes))
    try:
        yield current()
    finally:
        _stack.contexts.pop()


class _Again:
    """Enters a context once more, as often as a graph is run backwards; records nothing."""

    def __init__(self, context: ForwardContext) -> None:
        self.context = replace(context, records=None)

    def __enter__(self) -> None:
        _stack.contexts.append(self.context)

    def __exit__(self, *exception) -> None:
        _stack.contexts.pop()


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`.

    The backward pass runs a block again when its context has ended: under the same settings, and
    recording nothing a second time.
    """
    return nullcontext(), _Again(current())


# Names of parts, and the knobs that they have.


# The first of these that a path has. A backbone may have an encoder; Grounding DINO's has text
# layers beside those of the image.
PARTS = ("text_enhancer_layer", "backbone", "encoder", "decoder")


class Part(nn.Module):
    """A module that leaves records or answers to knobs.

    ``kind`` begins the names of its records. Its place is told to it once, by
    :func:`name_parts`; a part that stands alone has none.
    """

    kind: str
    place = ""

    @property
    def record_name(self) -> str:
        return f"{self.kind}/{self.place}" if self.place else self.kind

    def knob_limits(self) -> dict[str, float]:
        """The knobs that it answers to, and the largest value of each."""
        return {}


def place_of(path: str) -> str:
    """``encoder.encoder.0.layers.0.ffn`` -> ``encoder_0_0``: the detector's part, then numbers."""
    words = path.split(".")
    main = next((part for part in PARTS if part in words), words[0])
    return "_".join([main, *(word for word in words if word.isdecimal())])


def name_parts(model: nn.Module) -> dict[str, float]:
    """Name the parts of a model by their places; returns its knobs with the least limit of each.

    Raises:
        ValueError: if two parts would leave records of one name.
    """
    limits: dict[str, float] = {}
    paths: dict[str, str] = {}
    for path, part in model.named_modules():
        if not isinstance(part, Part):
            continue
        part.place = place_of(path)
        if part.record_name in paths:
            raise ValueError(
                f"{path} and {paths[part.record_name]} would both leave records of the name "
                f"{part.record_name!r}"
            )
        paths[part.record_name] = path
        for knob, limit in part.knob_limits().items():
            limits[knob] = min(limit, limits.get(knob, limit))
    return limits

"""What every encoder returns."""

from typing import NamedTuple

from torch import Tensor

from ..tokens import Padding


class Encoded(NamedTuple):
    """A batch of images between encoder and decoder.

    Attributes:
        features: (B, C_l, H_l, W_l) per level, finest first.
        padding: which of the batch is image; None: all of it.
        dropped: (B, H_l * W_l) bool per level, True where no decoder shall read a token; None for
            all of a level, or of all levels, to be read.
    """

    features: list[Tensor]
    padding: Padding | None = None
    dropped: list[Tensor | None] | None = None

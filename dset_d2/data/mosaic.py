"""Mosaic and mixup: training images that are made of several images of the data set.

Detectron2's mapper is given one dataset dict at a time. Here the data set draws further ones, and
``DETRMapper``, which alone reads files, puts them together before its own augmentations. Configs
switch it on by ``dataloader.mosaic.prob`` and ``dataloader.mosaic.mixup_prob``.

``UntilStep(..., on_mosaic=False)`` leaves such images out of an augmentation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetFromList
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ..arguments import arguments
from ..clock import shared_step
from .mapper import Picture

CENTRE = (0.3, 0.7)  # where the four images meet, as shares of its sides
BLEND = (0.4, 0.6)  # weight of the second image in a mixup


@dataclass(frozen=True)
class Composition:
    """The dataset dicts that one training image is made of, and how.

    It travels in a dataset dict under "composition". The image has the size of the first one's, so
    that later augmentations meet what they would meet without a mosaic.

    Args:
        collages: one, or two that are blended; of four dataset dicts, whose images lie around a
            random centre, or of a single one, whose image fills the whole.
        scale, min_visible, min_side: see :class:`Mosaic`.
    """

    collages: tuple[tuple[dict, ...], ...]
    scale: tuple[float, float]
    min_visible: float
    min_side: float

    def __call__(self, read: Callable[[dict], Picture]) -> Picture:
        """Put the image together from what ``read`` makes of the dataset dicts."""
        first, *others = self.collages
        picture = read(first[0])
        if len(first) > 1:
            canvas = np.zeros_like(picture.image)
            picture = self._lay([picture, *map(read, first[1:])], canvas)
        for collage in others:
            # Laid over a copy, so that blending changes nothing where the collage has no image.
            other = self._lay([*map(read, collage)], picture.image.copy())
            first_image, second_image = map(Image.fromarray, (picture.image, other.image))
            blended = np.array(Image.blend(first_image, second_image, _uniform(*BLEND)))
            picture = Picture(blended, *map(np.concatenate, zip(picture[1:], other[1:])))
        return picture

    def _lay(self, pictures: list[Picture], canvas: np.ndarray) -> Picture:
        """Draw one collage's pictures on the canvas (H, W, 3), in place."""
        height, width = canvas.shape[:2]
        if len(pictures) == 1:
            objects = [self._place(pictures[0], canvas, (0, 0, width, height), 1.0)]
        else:
            x, y = round(width * _uniform(*CENTRE)), round(height * _uniform(*CENTRE))
            windows = (0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)
            objects = [
                self._place(picture, canvas, window, _uniform(*self.scale))
                for picture, window in zip(pictures, windows)
            ]
        return Picture(canvas, *map(np.concatenate, zip(*objects)))

    def _place(
        self, picture: Picture, canvas: np.ndarray, window: tuple[int, int, int, int], scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw a picture somewhere in a window (x1, y1, x2, y2) of the canvas.

        At scale 1 it would just fit into the canvas. Returns its boxes (n, 4) and classes (n,) that
        are left.
        """
        height, width = picture.image.shape[:2]
        scale *= min(canvas.shape[0] / height, canvas.shape[1] / width)
        w, h = max(1, round(width * scale)), max(1, round(height * scale))
        x1, y1, x2, y2 = window
        left, top = x1 + _slide(x2 - x1 - w), y1 + _slide(y2 - y1 - h)
        x1, y1, x2, y2 = max(x1, left), max(y1, top), min(x2, left + w), min(y2, top + h)
        if x1 >= x2 or y1 >= y2:  # the window of a tiny canvas
            return picture.boxes[:0], picture.classes[:0]

        gain, corner = np.array([w / width, h / height] * 2), np.array([left, top] * 2)
        # Only what the window shows is resampled.
        source = ((x1, y1, x2, y2) - corner) / gain
        source = np.minimum(source, [width, height] * 2).tolist()  # against rounding
        tile = Image.fromarray(picture.image).resize(
            (x2 - x1, y2 - y1), Image.Resampling.BILINEAR, source
        )
        canvas[y1:y2, x1:x2] = tile

        whole = picture.boxes.clip(0, [width, height] * 2) * gain + corner
        boxes = whole.clip([x1, y1] * 2, [x2, y2] * 2)
        sides = boxes[:, 2:] - boxes[:, :2]
        area = (whole[:, 2:] - whole[:, :2]).prod(axis=1)
        kept = (sides >= self.min_side).all(axis=1) & (
            sides.prod(axis=1) >= self.min_visible * area
        )
        return boxes[kept].astype(np.float32), picture.classes[kept]


class Mosaic(Dataset):
    """A data set whose items may ask for further images, for Detectron2's training loader.

    An item is a dataset dict of ``dataset`` or, during training steps before ``end``, a copy that
    has a :class:`Composition` with further ones, drawn uniformly. The mapper has to be
    :class:`DETRMapper`; others see the first image alone. Draws follow torch's seed, which
    Detectron2 sets in each worker. The serialised dataset dicts are in memory once for all workers,
    however these are started.

    Args:
        dataset: dataset dicts, or a map-style data set of them.
        end: training step from which items are plain dataset dicts, also in workers; batches that
            are already queued when it is reached stay as they are.
        prob: probability that four images are laid around a random centre.
        mixup_prob: probability that a second result, a mosaic or not, is blended in; the objects
            of both are kept.
        scale: range of the size of a mosaic's images; at 1 one alone would fill the result.
        min_visible: a box is dropped if a smaller share of its area is left.
        min_side: a box is dropped if a side of what is left is shorter, in pixels of the result.
    """

    @configurable
    def __init__(
        self,
        dataset: list[dict] | Dataset,
        end: int,
        prob: float = 0.5,
        mixup_prob: float = 0.0,
        scale: tuple[float, float] = (0.5, 1.0),
        min_visible: float = 0.3,
        min_side: float = 2.0,
    ) -> None:
        for name, value in (("prob", prob), ("mixup_prob", mixup_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1]")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] < float("inf"):
            raise ValueError(
                f"scale={tuple(scale)} must be two positive numbers, the smaller first"
            )
        if not 0 <= min_visible <= 1:
            raise ValueError(f"min_visible={min_visible} must lie in [0, 1]")
        for name, value in (("min_side", min_side), ("end", end)):
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            kind = type(dataset).__name__
            raise ValueError(f"dataset={kind} must be a list or a map-style data set")
        if len(dataset) == 0:  # type: ignore[arg-type]  # a Dataset declares no length
            raise ValueError("dataset is empty")
        if isinstance(dataset, list):
            dataset = DatasetFromList(dataset, copy=False)
        self.dataset = dataset
        self.end = end
        self.prob = prob
        self.mixup_prob = mixup_prob
        self.scale = (scale[0], scale[1])
        self.min_visible = min_visible
        self.min_side = min_side
        # Kept on the instance, so that a worker started by spawning gets the shared counter.
        self.step = shared_step

    @classmethod
    def from_config(cls, cfg, dataset: list[dict] | Dataset) -> dict:
        told = {"dataset": dataset, "end": cfg.INPUT.STRONG_AUGMENTATION_END}
        return arguments(cls, cfg, "INPUT.MOSAIC") | told

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict:
        dataset_dict = self.dataset[index]
        if self.step.value >= self.end:
            return dataset_dict
        collages = [self._collage(index)]
        # Blended with itself, an image would have every object twice.
        if len(self) > 1 and torch.rand(()) < self.mixup_prob:
            collages.append(self._collage(self._other(index)))
        if len(collages) == len(collages[0]) == 1:
            return dataset_dict
        composition = Composition(tuple(collages), self.scale, self.min_visible, self.min_side)
        return dataset_dict | {"composition": composition}

    def _collage(self, index: int) -> tuple[dict, ...]:
        indices = [index]
        if torch.rand(()) < self.prob:
            indices += [self._other(index) for _ in range(3)]
        return tuple(self.dataset[i] for i in indices)

    def _other(self, index: int) -> int:
        """An index other than the given one, if there is any."""
        others = len(self) - 1
        return (index + 1 + int(torch.randint(others, ()))) % len(self) if others else index


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _slide(gap: int) -> int:
    """A random offset at which a side touches or overlaps both ends of a window.

    With room to spare (``gap`` > 0) the picture lies anywhere in the window; else it covers it.
    """
    return int(torch.randint(min(gap, 0), max(gap, 0) + 1, ()))

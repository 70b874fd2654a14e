"""From a dataset dict to the detector's input."""

import copy
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from ..arguments import arguments, build
from ..modeling.layers import check_choice
from .augmentation import RandomIoUCrop, RandomPhotometric, RandomZoomOut, UntilStep
from .reading import DataError, UnreadableImage, read_image

logger = logging.getLogger(__name__)

# By Detectron2's values of INPUT.RANDOM_FLIP.
FLIPS: dict[str, list[dict]] = {  # arguments of RandomFlip, by Detectron2's names in configs
    "none": [],
    "horizontal": [{}],
    "vertical": [{"horizontal": False, "vertical": True}],
}


class Picture(NamedTuple):
    """An image and its objects.

    ``image``: (H, W, 3) RGB uint8; ``boxes``: (n, 4) x1 y1 x2 y2 float32; ``classes``: (n,) int64.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray


def read_picture(dataset_dict: dict) -> Picture:
    """Read a dataset dict's image and its objects; regions marked ``iscrowd`` are left out.

    Gives the dict the image's ``height`` and ``width`` if it has none.
    """
    size = dataset_dict.get("height"), dataset_dict.get("width")
    image = read_image(dataset_dict["file_name"], None if None in size else size)
    dataset_dict["height"], dataset_dict["width"] = image.shape[:2]
    try:
        return Picture(image, *read_objects(dataset_dict.get("annotations", [])))
    except Exception as error:  # annotations may be of any kind
        raise DataError(f"{dataset_dict['file_name']}: wrong annotations: {error!r}") from error


def read_objects(annotations: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and classes as in :class:`Picture`.

    Raises:
        ValueError: on what no object has. Augmentations would set an inverted box right, or cut it
            away, and nobody would know.
    """
    annotations = [a for a in annotations if not a.get("iscrowd", 0)]
    converted = [utils.BoxMode.convert(a["bbox"], a["bbox_mode"], 0) for a in annotations]
    boxes = np.asarray(converted, dtype=np.float32).reshape(-1, 4)
    classes = np.asarray([a["category_id"] for a in annotations], dtype=np.int64)
    wrong = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    if wrong.any():
        raise ValueError(f"box {boxes[wrong][0].tolist()} is not x1 <= x2, y1 <= y2")
    if (classes < 0).any():
        raise ValueError(f"class {classes.min()} is below 0")
    return boxes, classes


class DETRMapper:
    """Reads, augments and packs one image for training or inference.

    Args:
        is_train: keep annotations, as ``instances``; regions marked ``iscrowd`` are left out.
        augmentations: Detectron2 augmentations, in order.
        min_box_size: boxes whose side is shorter after augmentation are dropped, in pixels.
        skip_unreadable: in training, warn of a missing or damaged file instead of ending the run,
            and take the image before it, augmented anew, in its place, or a black one where none
            was read yet. (A mapper may also return None, but Detectron2's search for another image
            fails since Python 3.11.)
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        augmentations: list[T.Augmentation],
        min_box_size: float = 1.0,
        skip_unreadable: bool = False,
    ) -> None:
        if skip_unreadable and not is_train:
            raise ValueError("skip_unreadable=True: an evaluation without some images is another")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.min_box_size = min_box_size
        self.skip_unreadable = skip_unreadable
        self.skipped = 0
        self.readable: dict | None = None  # the last dataset dict whose image was

    @classmethod
    def from_config(cls, cfg, is_train: bool = True) -> dict:
        size = cfg.INPUT.IMAGE_SIZE
        if len(size) != 2:
            raise ValueError(f"INPUT.IMAGE_SIZE={list(size)} must be a height and a width")
        resize = T.Resize(size)
        if not is_train:
            return {"is_train": False, "augmentations": [resize]}
        end, flip = cfg.INPUT.STRONG_AUGMENTATION_END, cfg.INPUT.RANDOM_FLIP
        check_choice("INPUT.RANDOM_FLIP", flip, FLIPS)
        return arguments(cls, cfg, "INPUT") | {
            "is_train": True,
            "augmentations": [
                UntilStep(build(RandomPhotometric, cfg, "INPUT.RANDOM_PHOTOMETRIC"), end),
                UntilStep(build(RandomZoomOut, cfg, "INPUT.RANDOM_ZOOM_OUT"), end, on_mosaic=False),
                UntilStep(build(RandomIoUCrop, cfg, "INPUT.RANDOM_IOU_CROP"), end, on_mosaic=False),
                *(T.RandomFlip(**settings) for settings in FLIPS[flip]),
                resize,
            ],
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """Adds ``image`` (3, H, W) uint8 RGB and, in training, ``instances``."""
        if not self.skip_unreadable:
            return self.pack(dataset_dict)
        try:
            result = self.pack(dataset_dict)
        except (FileNotFoundError, UnreadableImage) as error:
            self.skipped += 1
            if self.readable is None and self.skipped > 10:  # a wrong folder, not a bad file
                raise
            logger.warning("skipped %d unreadable images in this process: %s", self.skipped, error)
            return self.pack(self.readable or dataset_dict | {"composition": _black})
        self.readable = dataset_dict
        return result

    def pack(self, dataset_dict: dict) -> dict:
        result = copy.deepcopy(dataset_dict)
        compose = result.pop("composition", None)
        if compose is None:
            picture = read_picture(result)
        else:  # Mosaic asks for an image that is made of several others
            picture = compose(read_picture)
            result["height"], result["width"] = picture.image.shape[:2]
        result.pop("annotations", None)
        aug_input = T.AugInput(picture.image, boxes=picture.boxes)
        aug_input.composed = compose is not None  # for UntilStep
        self.augmentations(aug_input)
        image = np.ascontiguousarray(aug_input.image.transpose(2, 0, 1))
        result["image"] = torch.from_numpy(image)
        if self.is_train:
            result["instances"] = self.instances(aug_input.boxes, picture.classes, image.shape[1:])
        return result

    def instances(
        self, boxes: np.ndarray, classes: np.ndarray, size: tuple[int, int]
    ) -> utils.Instances:
        """Ground truth inside of the augmented image, without what became too small."""
        instances = utils.Instances(tuple(size))
        instances.gt_boxes = utils.Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.gt_boxes.clip(instances.image_size)
        instances.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
        return instances[instances.gt_boxes.nonempty(self.min_box_size)]


def _black(read: Callable[[dict], Picture]) -> Picture:
    return Picture(np.zeros((64, 64, 3), np.uint8), *read_objects([]))

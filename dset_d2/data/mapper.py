"""From a dataset dict to the detector's input."""

import copy
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T


def read_image(path: str) -> np.ndarray:
    """Read an image as (H, W, 3) RGB uint8, judged by its bytes, not by its suffix.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image or is damaged; the message names the file.
    """
    try:
        return utils.read_image(path, format="RGB")
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise ValueError(f"{path}: cannot read this image: {error}") from error


class Picture(NamedTuple):
    """An image and its objects.

    ``image``: (H, W, 3) RGB uint8; ``boxes``: (n, 4) x1 y1 x2 y2 float32; ``classes``: (n,) int64.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray


def read_picture(dataset_dict: dict) -> Picture:
    """Read a dataset dict's image and its objects; regions marked ``iscrowd`` are left out."""
    image = read_image(dataset_dict["file_name"])
    utils.check_image_size(dataset_dict, image)
    annotations = [a for a in dataset_dict.get("annotations", []) if not a.get("iscrowd", 0)]
    boxes = [utils.BoxMode.convert(a["bbox"], a["bbox_mode"], 0) for a in annotations]
    classes = [a["category_id"] for a in annotations]
    return Picture(
        image,
        np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        np.asarray(classes, dtype=np.int64),
    )


class DETRMapper:
    """Reads, augments and packs one image for training or inference.

    Args:
        is_train: keep annotations, as ``instances``; regions marked ``iscrowd`` are left out.
        augmentations: Detectron2 augmentations, in order.
        min_box_size: boxes whose side is shorter after augmentation are dropped, in pixels.
    """

    def __init__(
        self, is_train: bool, augmentations: list[T.Augmentation], min_box_size: float = 1.0
    ) -> None:
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.min_box_size = min_box_size

    def __call__(self, dataset_dict: dict) -> dict:
        """Adds ``image`` (3, H, W) uint8 RGB and, in training, ``instances``."""
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

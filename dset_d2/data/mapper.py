"""From a dataset dict to the detector's input."""

import copy

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
        image = read_image(result["file_name"])
        utils.check_image_size(result, image)
        annotations = [a for a in result.pop("annotations", []) if not a.get("iscrowd", 0)]
        boxes = [utils.BoxMode.convert(a["bbox"], a["bbox_mode"], 0) for a in annotations]
        boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
        aug_input = T.AugInput(image, boxes=boxes)
        self.augmentations(aug_input)
        image = np.ascontiguousarray(aug_input.image.transpose(2, 0, 1))
        result["image"] = torch.from_numpy(image)
        if self.is_train:
            classes = [a["category_id"] for a in annotations]
            result["instances"] = self.instances(aug_input.boxes, classes, image.shape[1:])
        return result

    def instances(
        self, boxes: np.ndarray, classes: list[int], size: tuple[int, int]
    ) -> utils.Instances:
        """Ground truth inside of the augmented image, without what became too small."""
        instances = utils.Instances(tuple(size))
        instances.gt_boxes = utils.Boxes(torch.as_tensor(boxes, dtype=torch.float32))
        instances.gt_boxes.clip(instances.image_size)
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        return instances[instances.gt_boxes.nonempty(self.min_box_size)]

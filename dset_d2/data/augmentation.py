"""RT-DETR's augmentations as Detectron2 ones; the policies are torchvision's."""

import numpy as np
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, NoOpTransform, PadTransform, Transform
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..clock import shared_step


class UntilStep(T.Augmentation):
    """Applies an augmentation during training steps before ``end`` only.

    Works in data-loading workers; batches that are already queued when the step is reached keep
    their augmentation.

    Args:
        on_mosaic: whether it is applied to images that ``Mosaic`` made of several ones, too. Their
            objects are small and cut already.
    """

    def __init__(self, augmentation: T.Augmentation, end: int, on_mosaic: bool = True) -> None:
        super().__init__()
        self.augmentation = augmentation
        self.end = end
        self.on_mosaic = on_mosaic
        # Kept on the instance, so that a worker started by spawning gets the shared counter.
        self.step = shared_step

    def __call__(self, aug_input: T.AugInput) -> Transform:
        left_out = getattr(aug_input, "composed", False) and not self.on_mosaic
        if left_out or self.step.value >= self.end:
            return NoOpTransform()
        return self.augmentation(aug_input)


class RandomPhotometric(T.Augmentation):
    """Random brightness, contrast, saturation, hue and channel order, each with ``prob``."""

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__()
        self.prob = prob
        self.distort = v2.RandomPhotometricDistort(p=prob)

    def get_transform(self, image: np.ndarray) -> Transform:
        return T.ColorTransform(self._distort)

    def _distort(self, image: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return self.distort(tensor).numpy().transpose(1, 2, 0)


class RandomZoomOut(T.Augmentation):
    """With probability ``prob``, puts the image on a black canvas of up to ``max_scale`` sides."""

    def __init__(self, prob: float = 0.5, max_scale: float = 4.0) -> None:
        super().__init__()
        self.prob = prob
        self.max_scale = max_scale
        self.policy = v2.RandomZoomOut(fill=0, side_range=(1.0, max_scale))

    def get_transform(self, image: np.ndarray) -> Transform:
        if torch.rand(()) >= self.prob:
            return NoOpTransform()
        height, width = image.shape[:2]
        canvas = torch.empty(3, height, width, device="meta")
        left, top, right, bottom = self.policy.make_params([tv_tensors.Image(canvas)])["padding"]
        return PadTransform(left, top, right, bottom, width, height, pad_value=0)


class CentreCropTransform(CropTransform):
    """A crop in which boxes whose centre is cut away become empty."""

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        box = super().apply_box(box)
        centre = (box[:, :2] + box[:, 2:]) / 2
        inside = ((centre > 0) & (centre < (self.w, self.h))).all(axis=1, keepdims=True)
        return np.where(inside, box, 0)


class RandomIoUCrop(T.Augmentation):
    """With probability ``prob``, a crop that overlaps the boxes by a random least IoU (SSD)."""

    def __init__(self, prob: float = 0.8) -> None:
        super().__init__()
        self.prob = prob
        self.policy = v2.RandomIoUCrop()

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> Transform:
        if len(boxes) == 0 or torch.rand(()) >= self.prob:
            return NoOpTransform()
        height, width = image.shape[:2]
        canvas = tv_tensors.Image(torch.empty(3, height, width, device="meta"))
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(boxes), format="XYXY", canvas_size=(height, width)
        )
        crop = self.policy.make_params([canvas, boxes])
        if not crop:  # the policy drew "keep the whole image"
            return NoOpTransform()
        return CentreCropTransform(crop["left"], crop["top"], crop["width"], crop["height"])

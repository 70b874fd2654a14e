"""One way to use a detector, whatever runs it: pictures in, instances out."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn

from ..data.frames import Frame, find_sources, read_frames
from ..data.reading import read_image
from .export import ExportedDetector


class Prediction(NamedTuple):
    """What was found in a picture; boxes in its own pixels."""

    frame: Frame
    instances: Instances


class Predictor:
    """Finds objects in pictures::

        predictor = Predictor.from_file("model.onnx")  # or Predictor(model)
        predictor("photo.jpg").pred_boxes
        for frame, instances in predictor.stream("photos", "crossing.mp4"):
            ...

    Args:
        detector: a model, which is put into evaluation mode, or an :class:`ExportedDetector`.
        resize: how pictures are resized, ``dataloader.image_size`` of the model's config; None
            leaves them as they are.
        classes: names of the classes, if they are known.
    """

    def __init__(
        self,
        detector: nn.Module | Callable[[list[dict]], list[dict]],
        resize: T.Augmentation | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.detector = detector.eval() if isinstance(detector, nn.Module) else detector
        self.resize = T.NoOpTransform() if resize is None else resize
        self.classes = tuple(classes)

    @classmethod
    def from_file(cls, path: str | Path, threads: int | None = None) -> "Predictor":
        """That of a file that ``dset_d2.tools.export`` wrote for onnxruntime or OpenVINO.

        Raises:
            FileNotFoundError, ValueError: as :class:`ExportedDetector`.
        """
        exported = ExportedDetector(path, threads)
        return cls(exported, T.Resize(exported.info.image_size), exported.info.classes)

    @torch.no_grad()
    def __call__(self, image: np.ndarray | str | Path) -> Instances:
        """Detections in a file or an (H, W, 3) RGB uint8 picture, best first.

        Raises:
            FileNotFoundError, UnreadableImage: if there is no such file, or it is no image.
            ValueError: if the picture is of another kind.
        """
        if not isinstance(image, np.ndarray):
            image = read_image(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"an image of shape {image.shape} and type {image.dtype}: must be (H, W, 3) uint8"
            )
        picture = T.AugInput(image)
        T.AugmentationList([self.resize])(picture)
        pixels = torch.from_numpy(np.ascontiguousarray(picture.image.transpose(2, 0, 1)))
        height, width = image.shape[:2]
        return self.detector([{"image": pixels, "height": height, "width": width}])[0]["instances"]

    def stream(self, *sources: str | Path) -> Iterator[Prediction]:
        """Detections in images, folders, patterns of names, videos and streams of video.

        Sources that cannot be read are left out, and counted and named in one warning.

        Raises:
            DataError: if there is no such source, or none that can be read.
        """
        for frame in read_frames(find_sources(sources)):
            yield Prediction(frame, self(frame.image))


def as_record(prediction: Prediction, classes: Sequence[str], threshold: float) -> dict:
    """What was found, for JSON: boxes are x1, y1, x2, y2 in pixels; classes go by their names.

    Args:
        threshold: least score.
    """
    frame, instances = prediction
    kept = instances[instances.scores >= threshold].to("cpu")
    found = zip(kept.pred_boxes.tensor.tolist(), kept.scores.tolist(), kept.pred_classes.tolist())
    height, width = instances.image_size
    return {
        "source": frame.source,
        "frame": frame.number,
        "height": height,
        "width": width,
        "detections": [
            {
                "box": [round(side, 2) for side in box],
                "score": round(score, 4),
                "class": classes[label],
            }
            for box, score, label in found
        ],
    }

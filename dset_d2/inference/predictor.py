"""One way to use a detector, whatever runs it: pictures in, instances out."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances
from torch import nn

from ..analysis.latency import synchronised_time
from ..budget import Controller, DetectorSubject, LatencyTable, load_controller, run_within
from ..data.frames import Frame, find_sources, read_frames
from ..data.reading import read_image
from ..modeling import DETRDetector
from .export import ExportedDetector

logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """What was found in a picture, and how.

    Attributes:
        instances: boxes in pixels of the picture as it was given.
        milliseconds: measured, from the resized picture to the detections, a choice included.
        setting: of the knobs; None without a budget.
        expected: the latency table's p95 of the setting.
    """

    instances: Instances
    milliseconds: float
    setting: dict | None = None
    expected: float | None = None


class Predictor:
    """Finds objects in pictures, with a latency table also within a budget that a call names::

        predictor = Predictor.from_file("model.onnx")  # or Predictor(model)
        predictor("photo.jpg").instances.pred_boxes
        for frame, found in predictor.stream("photos", "crossing.mp4"):
            ...
        Predictor(model, "table.json", "controller.pth")("photo.jpg", budget_ms=40).setting

    Args:
        detector: a model, which is put into evaluation mode, or an :class:`ExportedDetector`.
        table: of the model, on this device with these threads; or its file.
        controller: who chooses; or its file. None takes the slowest setting that fits.
        resize: how pictures are resized, ``dataloader.image_size`` of the model's config. None:
            to the table's size; without a table they are left as they are.
        classes: names of the classes, if they are known.

    Raises:
        ValueError: if the table is of another model, device or number of threads, or the
            controller of other settings.
    """

    def __init__(
        self,
        detector: nn.Module | Callable[[list[dict]], list[dict]],
        table: LatencyTable | str | Path | None = None,
        controller: Controller | str | Path | None = None,
        resize: T.Augmentation | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.detector = detector.eval() if isinstance(detector, nn.Module) else detector
        self.resize = resize or T.NoOpTransform()
        self.classes = tuple(classes)
        self.table: LatencyTable | None = None
        if table is None:
            return
        if not isinstance(detector, DETRDetector):
            raise ValueError(
                f"a latency table is for a DETRDetector, not {type(detector).__name__}"
            )
        self.table = table if isinstance(table, LatencyTable) else LatencyTable.load(table)
        size = self.table.about["subject"]["image_size"]
        self.table.check(DetectorSubject(detector, size, []))
        self.subject = DetectorSubject(detector, size, self.table.settings)
        if isinstance(controller, (str, Path)):
            controller = load_controller(controller)
        if controller is not None and controller.space.settings != self.table.settings:
            raise ValueError("the controller chooses among other settings than the latency table's")
        self.controller = controller
        self.resize = resize or T.Resize(self.subject.image_size)

    @classmethod
    def from_file(cls, path: str | Path, threads: int | None = None) -> "Predictor":
        """That of a file that ``dset_d2.tools.export`` wrote for onnxruntime or OpenVINO.

        Raises:
            FileNotFoundError, ValueError: as :class:`ExportedDetector`.
        """
        exported = ExportedDetector(path, threads)
        info = exported.info
        return cls(exported, resize=T.Resize(info.image_size), classes=info.classes)

    def __call__(
        self, image: np.ndarray | str | Path, budget_ms: float | None = None
    ) -> Prediction:
        """Detections in a file or an (H, W, 3) RGB uint8 picture, best first.

        A budget below the fastest setting runs that one, with a warning.

        Raises:
            FileNotFoundError, UnreadableImage: if there is no such file, or it is no image.
            ValueError: if the picture is of another kind, or there is no table for the budget.
        """
        return self.predict(self.inputs(image), budget_ms)

    def inputs(self, image: np.ndarray | str | Path) -> dict:
        """A picture, resized, as detectors take it."""
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
        return {"image": pixels, "height": height, "width": width}

    @torch.no_grad()
    def predict(self, inputs: dict, budget_ms: float | None = None) -> Prediction:
        """As a call, of one of Detectron2's dicts."""
        if budget_ms is None:
            start = synchronised_time()
            (found,) = self.detector([inputs])
            return Prediction(found["instances"], 1e3 * (synchronised_time() - start))
        if self.table is None:
            raise ValueError(f"budget_ms={budget_ms} needs a latency table")
        if budget_ms <= 0:
            raise ValueError(f"budget_ms={budget_ms} must be positive")
        ran = run_within(self.subject, self.table, self.controller, inputs, budget_ms)
        if ran.expected > budget_ms:
            logger.warning(
                "budget_ms=%.4g is below the fastest setting's %.4g ms, which ran all the same",
                budget_ms,
                ran.expected,
            )
        setting = self.table.settings[ran.setting]
        return Prediction(ran.output, ran.milliseconds, setting, ran.expected)

    def stream(
        self, *sources: str | Path, budget_ms: float | None = None
    ) -> Iterator[tuple[Frame, Prediction]]:
        """What was found in images, folders, patterns of names, videos and streams of video.

        Sources that cannot be read are left out, and counted and named in one warning.

        Raises:
            DataError: if there is no such source, or none that can be read.
        """
        for frame in read_frames(find_sources(sources)):
            yield frame, self(frame.image, budget_ms)


def as_record(frame: Frame, instances: Instances, classes: Sequence[str], threshold: float) -> dict:
    """What was found, for JSON: boxes are x1, y1, x2, y2 in pixels; classes go by their names.

    Args:
        threshold: least score.
    """
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

"""Detections within a latency budget."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances

from ..budget import Controller, DetectorSubject, LatencyTable, load_controller, run_within
from ..data.mapper import read_image
from ..modeling import DETRDetector

logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """What was found in an image, and how.

    Attributes:
        instances: boxes in pixels of the image as it was given.
        setting: of the knobs.
        milliseconds: measured, from the resized image to the detections, the choice included.
        expected: the table's p95 of the setting.
    """

    instances: Instances
    setting: dict
    milliseconds: float
    expected: float


class Predictor:
    """Detects within a budget that each call names.

    Args:
        model: is put into evaluation mode.
        table: of it, on this device with these threads; or its file.
        controller: who chooses; or its file. None takes the slowest setting that fits.

    Raises:
        ValueError: if the table is of another model, device or number of threads, or the
            controller of other settings.
    """

    def __init__(
        self,
        model: DETRDetector,
        table: LatencyTable | str | Path,
        controller: Controller | str | Path | None = None,
    ) -> None:
        table = table if isinstance(table, LatencyTable) else LatencyTable.load(table)
        self.table = table
        size = table.about["subject"]["image_size"]
        table.check(DetectorSubject(model, size, []))
        self.subject = DetectorSubject(model.eval(), size, table.settings)
        if isinstance(controller, (str, Path)):
            controller = load_controller(controller)
        if controller is not None and controller.space.settings != table.settings:
            raise ValueError("the controller chooses among other settings than the latency table's")
        self.controller = controller
        self.resize = T.Resize(self.subject.image_size)

    def __call__(self, image: str | Path | np.ndarray, budget_ms: float) -> Prediction:
        """Detect in an image, a file or (H, W, 3) RGB uint8.

        A budget below the fastest setting runs that one, with a warning.
        """
        if budget_ms <= 0:
            raise ValueError(f"budget_ms={budget_ms} must be positive")
        if not isinstance(image, np.ndarray):
            image = read_image(str(image))
        height, width = image.shape[:2]
        resized = self.resize(T.AugInput(image)).apply_image(image)
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return self.predict({"image": tensor, "height": height, "width": width}, budget_ms)

    def predict(self, item: dict, budget_ms: float) -> Prediction:
        """As a call, of one of Detectron2's dicts with an image of the table's size."""
        found = run_within(self.subject, self.table, self.controller, item, budget_ms)
        if found.expected > budget_ms:
            logger.warning(
                "budget_ms=%.4g is below the fastest setting's %.4g ms, which ran all the same",
                budget_ms,
                found.expected,
            )
        setting = self.table.settings[found.setting]
        return Prediction(found.output, setting, found.milliseconds, found.expected)

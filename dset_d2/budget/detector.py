"""Detectors as what a budget's controllers choose settings for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

from ..modeling import DETRDetector, Knobs
from ..modeling.context import Part
from ..modeling.detector import Begun
from ..modeling.meta_arch import original_size
from .latency_table import fingerprint
from .reward import soft_f1
from .subject import Setting, grid

SCALE = "scale"
# What decides how much a sparse part computes.
CONFIGURED = ("keep_ratio", "min_tokens", "scorer", "placement", "top_k", "slots", "dispatch")
STRIDE = 16  # pixels between those that the brightness is the mean of


class DetectorState(NamedTuple):
    """Images behind the first stage, and the (height, width) of their originals."""

    begun: Begun
    sizes: list[tuple[int, int]]

    @property
    def features(self) -> Tensor:
        """(D,), of several images their mean."""
        return self.begun.features.mean(0).float().cpu()


class DetectorSubject:
    """A detector under settings of ``scale``, the input's size, and of its :class:`Knobs`.

    An item is one of Detectron2's dicts with an ``image`` (3, H, W) of ``image_size``, as the
    config's test mapper makes it, for which the result is its ``Instances``; or a list of such,
    which run as one batch and give a list. Times are from these images to detections.

    Args:
        model: in evaluation mode.
        image_size: (height, width) that the largest scale stands for.
        settings: all that can be chosen, the full one first; ``scale`` is a share of the
            image's sides.
    """

    tier = SCALE

    def __init__(
        self, model: DETRDetector, image_size: Sequence[int], settings: Sequence[Setting]
    ) -> None:
        for setting in settings:
            if not 0 < setting.get(SCALE, 0) <= 1:
                raise ValueError(f"scale={setting.get(SCALE)} must lie in (0, 1]")
            knobs_of(setting).check(model.knob_limits)
        self.model = model
        self.image_size = tuple(image_size)
        self.settings = [dict(setting) for setting in settings]

    @classmethod
    def of(
        cls, model: DETRDetector, image_size: Sequence[int], scales: Sequence[float]
    ) -> "DetectorSubject":
        """With all settings of these scales and of the knobs that the model is trained for.

        Decoder layers learn by losses of their own, also without a supernet.
        """
        layers = range(1, model.decoder.eval_idx + 2)
        choices = {} if model.supernet is None else model.supernet.choices
        return cls(model, image_size, grid({SCALE: scales, "decoder_layers": layers} | choices))

    @property
    def device(self) -> str:
        return str(self.model.device)

    def fingerprint(self) -> str:
        """Of the parameters, and of what else decides what is computed where no knob says it."""
        model = self.model
        settings: list[Any] = [model.knob_limits, model.decoder.eval_idx]
        settings += [getattr(model.backbone, name, None) for name in ("taps", "windows", "scale")]
        for name, part in model.named_modules():
            if isinstance(part, Part) and (config := getattr(part, "config", None)):
                settings.append([name, *(getattr(config, key, None) for key in CONFIGURED)])
        return fingerprint(model, *settings)

    def describe(self) -> dict:
        return {"image_size": list(self.image_size)}

    def known(self, item: Any) -> Tensor:
        """Brightness and contrast in [0, 1], of every 16th pixel in both directions."""
        images = [x["image"][:, ::STRIDE, ::STRIDE].float() / 255 for x in as_batch(item)]
        pixels = torch.cat([image.flatten() for image in images])
        return torch.stack([pixels.mean(), pixels.std()])

    def shape(self, item: Any, setting: Setting) -> str:
        batch = as_batch(item)
        divisor = self.model.size_divisibility
        sides = zip(*(x["image"].shape[1:] for x in batch))
        padded = (-(-max(side) // divisor) * divisor for side in sides)
        height, width = self.scaled(tuple(padded), setting)
        return f"{len(batch)}x3x{height}x{width}"

    def scaled(self, size: Sequence[int], setting: Setting) -> tuple[int, int]:
        """The (height, width) that an input is resized to."""
        return scaled_size(size, setting[SCALE], self.model.size_divisibility)

    @torch.no_grad()
    def begin(self, item: Any, setting: Setting) -> DetectorState:
        batch = as_batch(item)
        images, padding = self.model.preprocess(batch)
        size = self.scaled(tuple(images.shape[2:]), setting)
        if size != tuple(images.shape[2:]):
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return DetectorState(self.model.begin(images, padding), [original_size(x) for x in batch])

    @torch.no_grad()
    def finish(self, state: DetectorState, setting: Setting) -> Instances | list[Instances]:
        outputs = self.model.finish(state.begun, knobs_of(setting))
        found = self.model.postprocess(outputs, state.sizes)
        return found if len(found) > 1 else found[0]

    def quality(self, output: Instances, item: dict) -> float:
        """Soft F1 of the item's ``annotations``."""
        return soft_f1(output, item["annotations"])


def as_batch(item: Any) -> list[dict]:
    return item if isinstance(item, list) else [item]


def scaled_size(size: Sequence[int], scale: float, divisor: int) -> tuple[int, int]:
    """A (height, width) at a scale, in whole multiples of the divisor."""
    height, width = (max(1, round(side * scale / divisor)) * divisor for side in size)
    return height, width


def knobs_of(setting: Setting) -> Knobs:
    return Knobs(**{name: value for name, value in setting.items() if name != SCALE})

"""Real-time detection transformers: backbone, encoder, decoder and criterion as one model."""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn

from ..arguments import arguments, build, naming_keys
from .backbone import DINOv3
from .context import Knobs, forward_context
from .criterion.set_criterion import box_divisor
from .encoder import Encoded
from .layers import check_choice
from .meta_arch import MetaArch
from .registry import build_criterion, build_decoder, build_encoder
from .sparse import SwapConfig, swap_config, swap_ffns
from .supernet import KNOBS, SupernetConfig, distillation
from .tokens import Padding, as_tokens, mean_and_deviation


class Begun(NamedTuple):
    """Images half way through a detector: what no knob changes is done.

    Attributes:
        progress: the backbone's, or all of its features.
        features: (B, D) from which the rest's knobs may be chosen.
    """

    progress: Any
    padding: Padding | None
    features: Tensor


@META_ARCH_REGISTRY.register()
class DETRDetector(MetaArch):
    """A real-time detection transformer: backbone, encoder, decoder, criterion.

    Args:
        backbone: image -> dict of features.
        encoder: list of features -> :class:`Encoded`; its ``in_features`` names what it reads.
        decoder: :class:`Encoded` -> predictions.
        criterion: predictions and targets -> losses.
        pixel_mean, pixel_std: normalisation of the RGB input; the default is RGB / 255.
        max_detections, multi_scale, multi_scale_end: see :class:`MetaArch`.
        swap: experts in the place of the dense FFNs, wherever they stand.
        supernet: the settings that it is trained for beside the configured one.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        criterion: nn.Module,
        pixel_mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        pixel_std: tuple[float, ...] = (255.0, 255.0, 255.0),
        max_detections: int = 300,
        multi_scale: tuple[int, ...] = (),
        multi_scale_end: int = 0,
        swap: SwapConfig | None = None,
        supernet: SupernetConfig | None = None,
    ) -> None:
        super().__init__(pixel_mean, pixel_std, max_detections, multi_scale, multi_scale_end)
        for name in encoder.in_features:
            check_choice("in_features", name, backbone.output_shape())
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.criterion = criterion
        if swap is not None:
            swap_ffns(self, swap)
        self.name_parts()
        self.supernet = supernet
        if supernet is not None:
            supernet.largest.check(self.knob_limits)

    @classmethod
    def from_config(cls, cfg) -> dict:
        keys = cfg.MODEL.BACKBONE.NAME.upper()  # of a backbone of this project
        with naming_keys(cfg, f"MODEL.{keys if keys in cfg.MODEL else 'BACKBONE'}"):
            backbone = build_backbone(cfg)
        decoder, supernet = build_decoder(cfg), None
        if any(cfg.MODEL.SUPERNET[name.upper()] for name in KNOBS):
            supernet = build(SupernetConfig, cfg, "MODEL.SUPERNET")
        return arguments(cls, cfg, "MODEL") | {
            "backbone": backbone,
            "encoder": build_encoder(cfg, backbone.output_shape()),
            "decoder": decoder,
            "criterion": build_criterion(cfg, decoder),
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "swap": swap_config(cfg),
            "supernet": supernet,
        }

    @property
    def size_divisibility(self) -> int:  # type: ignore[override]
        # A backbone may ask for nothing, but the encoder's maps halve from one to the next.
        shapes = self.backbone.output_shape()
        strides = [shapes[name].stride or 1 for name in self.encoder.in_features]
        return math.lcm(max(1, self.backbone.size_divisibility), *strides)

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.decoder.num_classes

    # A forward in two stages, between which a controller may choose the knobs.

    def begin(self, images: Tensor, padding: Padding | None = None) -> Begun:
        """What no knob changes: of a ViT the first block, of another backbone all.

        Args:
            images: (B, 3, H, W) normalised; H and W divisible by ``size_divisibility``.
            padding: which of them is image; None: all.
        """
        with self.context(Knobs()), forward_context(padding=padding):
            if isinstance(self.backbone, DINOv3):
                progress = self.backbone.begin(images)
                return Begun(progress, padding, progress.features)
            features = self.backbone(images)
            last = features[self.encoder.in_features[-1]]
            valid = None if padding is None else padding.valid_tokens(*last.shape[2:])
            return Begun(features, padding, mean_and_deviation(as_tokens(last), valid))

    def finish(self, begun: Begun, knobs: Knobs | None = None) -> dict[str, Tensor]:
        """The rest of :meth:`predict` under these knobs; may be called again with others."""
        features, padding = begun.progress, begun.padding
        with self.context(knobs), forward_context(padding=padding):
            if isinstance(self.backbone, DINOv3):
                features = self.backbone.finish(features)
            return self.decode(self.encode_features(features, padding))

    # A forward.

    def encode(
        self, images: Tensor, padding: Padding | None = None, knobs: Knobs | None = None
    ) -> Encoded:
        """Backbone and encoder.

        Args:
            images: (B, 3, H, W) normalised; H and W divisible by ``size_divisibility``.
            padding: which of them is image; None: all.
            knobs: of this call; :meth:`decode` may be given others.
        """
        with self.context(knobs), forward_context(padding=padding):
            return self.encode_features(self.backbone(images), padding)

    def encode_features(self, features: dict[str, Tensor], padding: Padding | None) -> Encoded:
        return self.encoder([features[name] for name in self.encoder.in_features], padding)

    def decode(
        self,
        encoded: Encoded,
        targets: list[dict[str, Tensor]] | None = None,
        knobs: Knobs | None = None,
    ) -> dict:
        """What the decoder makes of encoded images; needs targets in training only."""
        with self.context(knobs):
            return self.decoder(encoded, targets)

    def predict(
        self, images: Tensor, padding: Padding | None = None, knobs: Knobs | None = None
    ) -> dict[str, Tensor]:
        """Raw predictions; arguments as of :meth:`encode`.

        Returns:
            ``pred_logits`` (B, Q, C), ``pred_boxes`` (B, Q, 4) cx, cy, w, h in [0, 1].
        """
        return self.decode(self.encode(images, padding, knobs), knobs=knobs)

    def losses(
        self, images: Tensor, targets: list[dict[str, Tensor]], padding: Padding | None
    ) -> dict[str, Tensor]:
        if self.supernet is None or not self.training:
            return self.criterion(self.decode(self.encode(images, padding), targets), targets)
        settings = self.supernet.draw(self.clock.step)
        losses: dict[str, Tensor] = {}
        teacher: dict[str, Tensor] = {}
        for index, knobs in enumerate(settings):
            # Names of records are given once in a step.
            with nullcontext() if index == 0 else forward_context(records=None):
                encoded = self.encode(images, padding, knobs)
                outputs = self.decode(encoded, targets, knobs)
            terms = self.criterion(outputs, targets)
            if index:
                terms["loss_distillation"] = self.distillation(outputs, teacher, targets)
            else:
                teacher = outputs
            for name, loss in terms.items():
                losses[name] = losses.get(name, 0) + loss / len(settings)
        return losses

    def distillation(
        self, outputs: dict[str, Tensor], teacher: dict[str, Tensor], targets: list[dict]
    ) -> Tensor:
        """Of a smaller setting from the largest, weighted, per ground-truth box as other losses."""
        with torch.autocast(self.device.type, enabled=False):
            criterion, weight = self.criterion, self.supernet.distillation_weight
            divisor = box_divisor(targets, self.device)
            loss = distillation(outputs, teacher, criterion.matcher, criterion.weights)
            return weight / divisor * loss

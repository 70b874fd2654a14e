"""Real-time detection transformers: backbone, encoder, decoder and criterion as one model."""

import math

from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from torch import Tensor, nn

from ..arguments import arguments, naming_keys
from .context import Knobs, forward_context
from .encoder import Encoded
from .layers import check_choice
from .meta_arch import MetaArch
from .registry import build_criterion, build_decoder, build_encoder
from .sparse import SwapConfig, swap_config, swap_ffns
from .tokens import Padding


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

    @classmethod
    def from_config(cls, cfg) -> dict:
        keys = cfg.MODEL.BACKBONE.NAME.upper()  # of a backbone of this project
        with naming_keys(cfg, f"MODEL.{keys if keys in cfg.MODEL else 'BACKBONE'}"):
            backbone = build_backbone(cfg)
        decoder = build_decoder(cfg)
        return arguments(cls, cfg, "MODEL") | {
            "backbone": backbone,
            "encoder": build_encoder(cfg, backbone.output_shape()),
            "decoder": decoder,
            "criterion": build_criterion(cfg, decoder),
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
            "swap": swap_config(cfg),
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
            features = self.backbone(images)
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
        return self.criterion(self.decode(self.encode(images, padding), targets), targets)

"""Registry of encoders, which Detectron2 has no registry for."""

from fvcore.common.registry import Registry
from torch import nn

ENCODER_REGISTRY = Registry("ENCODER")
ENCODER_REGISTRY.__doc__ = """
Encoders turn a backbone's features into the decoder's.

A registered object is called with a ``CfgNode`` and the backbone's output shapes
(dict of :class:`detectron2.layers.ShapeSpec`) and returns an ``nn.Module``.
"""


def build_encoder(cfg, input_shape) -> nn.Module:
    """Build the encoder that ``cfg.MODEL.ENCODER.NAME`` names."""
    return ENCODER_REGISTRY.get(cfg.MODEL.ENCODER.NAME)(cfg, input_shape)

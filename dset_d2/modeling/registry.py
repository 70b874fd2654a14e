"""Registries of the parts that Detectron2 has none for; an outside package may add to them."""

from fvcore.common.registry import Registry
from torch import nn

ENCODER_REGISTRY = Registry("ENCODER")
ENCODER_REGISTRY.__doc__ = """
Encoders turn a backbone's features into the decoder's.

A registered object is called with a ``CfgNode`` and the backbone's output shapes
(dict of :class:`detectron2.layers.ShapeSpec`) and returns a module that is called with a list of
features and their :class:`~dset_d2.modeling.tokens.Padding`, and returns
:class:`~dset_d2.modeling.encoder.Encoded`.
"""

DECODER_REGISTRY = Registry("DECODER")
DECODER_REGISTRY.__doc__ = """
Decoders turn an :class:`~dset_d2.modeling.encoder.Encoded` into predictions.

A registered object is called with a ``CfgNode`` and returns a module that is called with the
encoded images and their targets (None in inference). Its ``criterion`` names the criterion that
fits it, its ``num_classes`` the number of classes.
"""

CRITERION_REGISTRY = Registry("CRITERION")
CRITERION_REGISTRY.__doc__ = """
Criteria turn a decoder's predictions and the targets into weighted losses.

A registered object is called with a ``CfgNode`` and returns such a module.
"""


def build_encoder(cfg, input_shape) -> nn.Module:
    """Build the encoder that ``cfg.MODEL.ENCODER.NAME`` names."""
    return ENCODER_REGISTRY.get(cfg.MODEL.ENCODER.NAME)(cfg, input_shape)


def build_decoder(cfg) -> nn.Module:
    """Build the decoder that ``cfg.MODEL.DECODER.NAME`` names."""
    return DECODER_REGISTRY.get(cfg.MODEL.DECODER.NAME)(cfg)


def build_criterion(cfg, name: str) -> nn.Module:
    """Build the criterion of a name."""
    return CRITERION_REGISTRY.get(name)(cfg)

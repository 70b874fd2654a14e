"""Registries of the parts that Detectron2 has none for; an outside package may add to them."""

from collections.abc import Callable

from fvcore.common.registry import Registry
from torch import nn

from ..arguments import naming_keys

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
encoded images and their targets (None in inference). Its ``num_classes`` is the number of classes;
its ``criterion`` names the criterion that fits it, for configs that name none.
"""

CRITERION_REGISTRY = Registry("CRITERION")
CRITERION_REGISTRY.__doc__ = """
Criteria turn a decoder's predictions and the targets into weighted losses.

A registered object is called with a ``CfgNode`` and returns such a module.
"""


def build_encoder(cfg, input_shape) -> nn.Module:
    """Build the encoder that ``cfg.MODEL.ENCODER.NAME`` names."""
    encoder = find(ENCODER_REGISTRY, "MODEL.ENCODER.NAME", cfg.MODEL.ENCODER.NAME)
    with naming_keys(cfg, "MODEL.ENCODER"):
        return encoder(cfg, input_shape)


def build_decoder(cfg) -> nn.Module:
    """Build the decoder that ``cfg.MODEL.DECODER.NAME`` names."""
    decoder = find(DECODER_REGISTRY, "MODEL.DECODER.NAME", cfg.MODEL.DECODER.NAME)
    with naming_keys(cfg, "MODEL.DECODER"):
        return decoder(cfg)


def build_criterion(cfg, decoder: nn.Module) -> nn.Module:
    """Build the criterion that ``cfg.MODEL.CRITERION.NAME`` names, if empty the decoder's own."""
    name = cfg.MODEL.CRITERION.NAME or decoder.criterion
    criterion = find(CRITERION_REGISTRY, "MODEL.CRITERION.NAME", name)
    with naming_keys(cfg, "MODEL.CRITERION"):
        return criterion(cfg)


def find(registry: Registry, key: str, name: str) -> Callable:
    """What is registered under the name that a config's key holds."""
    try:
        return registry.get(name)
    except KeyError as error:
        known = ", ".join(sorted(name for name, _ in registry))
        raise KeyError(f"{key}: {error.args[0]} There is: {known}") from error

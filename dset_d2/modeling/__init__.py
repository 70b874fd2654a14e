from .backbone import HGNetv2, PResNet
from .criterion import DFINECriterion, HungarianMatcher, SetCriterion
from .decoder import DFINEDecoder, RTDETRDecoder
from .detector import DETRDetector
from .encoder import ENCODER_REGISTRY, HybridEncoder, build_encoder

__all__ = [
    "DFINECriterion",
    "DFINEDecoder",
    "DETRDetector",
    "ENCODER_REGISTRY",
    "HGNetv2",
    "HungarianMatcher",
    "HybridEncoder",
    "PResNet",
    "RTDETRDecoder",
    "SetCriterion",
    "build_encoder",
]

from .backbone import DINOv3, HGNetv2, PlainAdapter, PResNet, SpatialTuningAdapter
from .criterion import DFINECriterion, HungarianMatcher, SetCriterion
from .decoder import DFINEDecoder, RTDETRDecoder
from .detector import DETRDetector
from .encoder import ENCODER_REGISTRY, HybridEncoder, build_encoder
from .freezing import FreezeConfig
from .lora import LoRAConfig, merge_lora

__all__ = [
    "DFINECriterion",
    "DFINEDecoder",
    "DETRDetector",
    "DINOv3",
    "ENCODER_REGISTRY",
    "FreezeConfig",
    "HGNetv2",
    "HungarianMatcher",
    "HybridEncoder",
    "LoRAConfig",
    "PResNet",
    "PlainAdapter",
    "RTDETRDecoder",
    "SetCriterion",
    "SpatialTuningAdapter",
    "build_encoder",
    "merge_lora",
]

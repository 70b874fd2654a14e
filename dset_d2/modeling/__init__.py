from .backbone import (
    DINOv3,
    HGNetv2,
    PlainAdapter,
    PResNet,
    SpatialTuningAdapter,
    WindowConfig,
)
from .context import Knobs, forward_context
from .criterion import (
    DFINECriterion,
    HungarianMatcher,
    SetCriterion,
    TokenCriterion,
    TokenMatcher,
)
from .decoder import DFINEDecoder, RTDETRDecoder
from .detector import DETRDetector
from .encoder import Encoded, HybridEncoder
from .ffn import FFN, find_ffns
from .freezing import FreezeConfig
from .grounding_dino import GroundingDINO
from .lora import LoRAConfig, merge_lora
from .meta_arch import MetaArch
from .registry import (
    CRITERION_REGISTRY,
    DECODER_REGISTRY,
    ENCODER_REGISTRY,
    build_criterion,
    build_decoder,
    build_encoder,
)
from .supernet import SupernetConfig

__all__ = [
    "CRITERION_REGISTRY",
    "DECODER_REGISTRY",
    "DFINECriterion",
    "DFINEDecoder",
    "DETRDetector",
    "DINOv3",
    "ENCODER_REGISTRY",
    "Encoded",
    "FFN",
    "FreezeConfig",
    "GroundingDINO",
    "HGNetv2",
    "HungarianMatcher",
    "HybridEncoder",
    "Knobs",
    "LoRAConfig",
    "MetaArch",
    "PResNet",
    "PlainAdapter",
    "RTDETRDecoder",
    "SetCriterion",
    "SpatialTuningAdapter",
    "SupernetConfig",
    "TokenCriterion",
    "TokenMatcher",
    "WindowConfig",
    "build_criterion",
    "build_decoder",
    "build_encoder",
    "find_ffns",
    "forward_context",
    "merge_lora",
]

from .build import ENCODER_REGISTRY, build_encoder
from .hybrid_encoder import HybridEncoder

__all__ = ["ENCODER_REGISTRY", "HybridEncoder", "build_encoder"]

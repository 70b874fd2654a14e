from .base import Encoded
from .hybrid_encoder import HybridEncoder

__all__ = ["Encoded", "HybridEncoder"]

from .dfine import DFINEDecoder
from .rtdetr import RTDETRDecoder

__all__ = ["DFINEDecoder", "RTDETRDecoder"]

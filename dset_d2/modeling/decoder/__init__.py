from .rtdetr import RTDETRDecoder

__all__ = ["RTDETRDecoder"]

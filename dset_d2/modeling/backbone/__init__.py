from .hgnetv2 import HGNetv2
from .presnet import PResNet

__all__ = ["HGNetv2", "PResNet"]

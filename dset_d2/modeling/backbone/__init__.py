from .adapters import PlainAdapter, SpatialTuningAdapter
from .dinov3 import DINOv3
from .hgnetv2 import HGNetv2
from .layouts import WindowConfig
from .presnet import PResNet

__all__ = ["DINOv3", "HGNetv2", "PResNet", "PlainAdapter", "SpatialTuningAdapter", "WindowConfig"]

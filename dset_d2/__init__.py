"""Real-time detection transformers with sparse compute, for Detectron2."""

from importlib.util import find_spec

if find_spec("detectron2") is None or find_spec("cv2") is None:
    raise ModuleNotFoundError(
        "dset_d2 needs Detectron2, from its own repository, and OpenCV: pip install opencv-python, "
        "or opencv-python-headless where there is no display"
    )

from . import data, modeling
from .config import add_detr_config, get_config

__version__ = "0.1.0"
__all__ = ["add_detr_config", "data", "get_config", "modeling"]

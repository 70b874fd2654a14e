"""Real-time detection transformers with sparse compute, for Detectron2."""

import warnings
from importlib.util import find_spec

if find_spec("detectron2") is None or find_spec("cv2") is None:
    raise ModuleNotFoundError(
        "dset_d2 needs Detectron2, from its own repository, and OpenCV: pip install opencv-python, "
        "or opencv-python-headless where there is no display"
    )

with warnings.catch_warnings():  # of what it does when it is imported
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    import detectron2.modeling  # noqa: F401

from . import data, modeling
from .cfgnode import add_detr_config
from .config import get_config

__version__ = "0.1.0"
__all__ = ["add_detr_config", "data", "get_config", "modeling"]

"""Real-time detection transformers with sparse compute, for Detectron2."""

import warnings

with warnings.catch_warnings():  # of what it does when it is imported
    warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
    import detectron2.modeling  # noqa: F401

from . import data, modeling
from .cfgnode import add_detr_config
from .config import get_config

__version__ = "0.1.0"
__all__ = ["add_detr_config", "data", "get_config", "modeling"]

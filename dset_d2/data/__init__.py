"""Data sets and their way to the detector. Importing registers DAIR-V2X, and reads nothing."""

from . import dair_v2x
from .mapper import DETRMapper
from .mosaic import Mosaic

__all__ = ["DETRMapper", "Mosaic", "dair_v2x"]

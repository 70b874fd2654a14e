"""Data sets and their way to the detector. Importing registers DAIR-V2X, and reads nothing."""

from . import dair_v2x
from .mapper import DETRMapper

__all__ = ["DETRMapper", "dair_v2x"]

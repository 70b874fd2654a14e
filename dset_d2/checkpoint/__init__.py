"""Weights released by others, into our models; and safe loading."""

from .dinov3 import load_dinov3
from .reading import read_state_dict
from .upstream import load_initial, load_upstream

__all__ = ["load_dinov3", "load_initial", "load_upstream", "read_state_dict"]

"""Roadside-camera scenes drawn from a seed, in DAIR-V2X's single-infrastructure layout.

The genuine frames may not be redistributed; these stand in for them in demos and tests, and go
through the same reader.
"""

from .dataset import CAMERAS, camera_seed, frame_seed, write_dataset
from .scenes import CATEGORIES, Scene, SceneObject, render_scene, render_sequence

__all__ = ["CAMERAS", "CATEGORIES", "Scene", "SceneObject", "camera_seed", "frame_seed"]
__all__ += ["render_scene", "render_sequence", "write_dataset"]

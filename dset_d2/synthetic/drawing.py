"""Camera, light and solids, drawn with OpenCV.

World frame, metres: x right, y ahead of the camera, z up; the ground is z = 0 and the camera hangs
over the origin. Model frame: x ahead of the model, y to its left, z up from the ground. All solids
are convex, so that painting their visible faces from far to near needs no depth buffer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

SCALE = 2  # of the canvas, averaged later: OpenCV's antialiasing leaves seams between faces
NEAR = 1.0  # metres along the optical axis
SHIFT = 3  # fractional bits of the pixel coordinates handed to OpenCV
Colour = tuple[float, float, float]


class Camera(NamedTuple):
    """Pinhole camera over the origin, looking along +y.

    ``height`` is in metres, ``pitch`` in radians below the horizon, ``focal`` and the principal
    point ``centre`` (x, y) in pixels of the canvas. Pixel i spans [i, i + 1).
    """

    height: float
    pitch: float
    focal: float
    centre: tuple[float, float]

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points (..., 3) to pixels (..., 2) and depths (...) along the optical axis."""
        cos, sin = math.cos(self.pitch), math.sin(self.pitch)
        x, y, below = points[..., 0], points[..., 1], self.height - points[..., 2]
        depth = y * cos + below * sin
        plane = np.stack([x, below * cos - y * sin], -1)
        return plane * (self.focal / depth)[..., None] + self.centre, depth

    def ground_depth(self, height: int) -> np.ndarray:
        """(H,) depth of the ground in the rows of an image; infinite above the horizon."""
        rows = ((np.arange(height) + 0.5) * SCALE - self.centre[1]) / self.focal
        fall = rows * math.cos(self.pitch) + math.sin(self.pitch)
        return np.divide(self.height, fall, out=np.full(height, np.inf), where=fall > 1e-4)


class Light(NamedTuple):
    """Light of a scene.

    ``ambient`` and ``diffuse`` are the shares of a colour that are seen in the shade, and added
    when it faces the unit vector ``sun``; ``shadow`` is the share that a cast shadow takes away.
    Haze hides 63 % of a colour after ``visibility`` metres. ``lamps`` of vehicles may be on.
    """

    sun: np.ndarray
    ambient: float
    diffuse: float
    shadow: float
    zenith: Colour
    horizon: Colour
    visibility: float
    lamps: bool


class Face(NamedTuple):
    """A convex polygon, (n, 3) counter-clockwise from outside; a lamp shines when lights are on."""

    points: np.ndarray
    colour: Colour
    lamp: bool = False


class Rod(NamedTuple):
    """A round rod along points (limbs, tubes, rims); a ball where there is one point."""

    points: Sequence[tuple[float, float, float]]
    thickness: float
    colour: Colour


class Model(NamedTuple):
    """Solids in layers: later layers cover earlier ones, nearer solids their layer's others.

    A solid is a rod, or the faces of a convex body with what is painted on each after it.
    ``size`` is length, width and height in metres, ``colour`` the name of the paint's colour where
    it says more than the category.
    """

    layers: Sequence[Sequence[Rod | list[Face]]]
    size: tuple[float, float, float]
    colour: str | None = None


class Patch(NamedTuple):
    """A polygon ready for OpenCV: fixed-point pixels, its colour, a line's thickness or 0."""

    points: np.ndarray
    colour: Colour
    thickness: int = 0


def fixed_point(pixels: np.ndarray) -> np.ndarray:
    """Pixel coordinates to OpenCV's fixed point, whose integers are pixel centres."""
    return np.rint((np.clip(pixels, -2e4, 2e4) - 0.5) * (1 << SHIFT)).astype(np.int32)


def paint(image: np.ndarray, patches: Sequence[Patch], value: int | None = None) -> None:
    """Fill ``patches`` into ``image`` with their own colours, or all with ``value``."""
    for points, colour, thickness in patches:
        ink = colour if value is None else value
        if thickness:
            cv2.polylines(image, [points], False, ink, thickness, cv2.LINE_8, SHIFT)
        else:
            cv2.fillConvexPoly(image, points, ink, cv2.LINE_8, SHIFT)


def bounds(patches: Sequence[Patch]) -> np.ndarray:
    """(2, 2) pixels: least and greatest x, y of the whole silhouette, not clipped."""
    unit = 1 << SHIFT
    low = np.min([p.points.min(0) - p.thickness * unit / 2 for p in patches], 0)
    high = np.max([p.points.max(0) + p.thickness * unit / 2 for p in patches], 0)
    return np.stack([low, high]) / unit + 0.5


def draw(
    model: Model, position: np.ndarray, heading: float, camera: Camera, light: Light
) -> list[Patch] | None:
    """Place ``model`` on the ground at world x, y, and project it.

    ``heading`` is in radians, counter-clockwise from the world's x axis. Returns the patches from
    far to near, or None when the model reaches behind the camera's near plane.
    """
    cos, sin = math.cos(heading), math.sin(heading)
    turn, origin = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]), np.array([*position, 0.0])
    haze = 1 - math.exp(-float(camera.project(origin)[1]) / light.visibility)
    patches = []

    def fill(pixels: np.ndarray, colour: Colour, gain: float, thickness: int = 0) -> None:
        red, green, blue = (
            min(255.0, c * gain) * (1 - haze) + s * haze for c, s in zip(colour, light.horizon)
        )
        patches.append(Patch(fixed_point(pixels), (red, green, blue), thickness))

    for layer in model.layers:
        views = []
        for solid in layer:
            if isinstance(solid, Rod):
                points = np.array(solid.points)
            else:
                points = np.concatenate([face.points for face in solid])
            points = points @ turn + origin
            pixels, depth = camera.project(points)
            if depth.min() < NEAR:
                return None
            views.append((depth.mean(), solid, points, pixels))
        for depth, solid, points, pixels in sorted(views, key=lambda view: -view[0]):
            if isinstance(solid, Rod):
                thickness = max(1, round(solid.thickness * camera.focal / depth))
                line = np.concatenate([pixels, pixels[-1:]])  # OpenCV draws no single point
                fill(line, solid.colour, light.ambient + 0.5 * light.diffuse, thickness)
                continue
            ends = np.cumsum([len(face.points) for face in solid])
            starts = np.concatenate([[0], ends[:-1]])
            first, second, last = points[starts], points[starts + 1], points[ends - 1]
            normals = np.cross(second - first, last - first)
            normals /= np.linalg.norm(normals, axis=1, keepdims=True)
            visible = (((0, 0, camera.height) - first) * normals).sum(1) > 0
            gains = light.ambient + light.diffuse * np.maximum(normals @ light.sun, 0)
            for i in np.flatnonzero(visible):
                gain = 1.0 if solid[i].lamp and light.lamps else gains[i]
                fill(pixels[starts[i] : ends[i]], solid[i].colour, gain)
    return patches

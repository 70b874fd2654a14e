"""Camera, solids, traffic participants and street furniture of the generated roadside scenes.

World frame, metres: x right, y ahead of the camera, z up; the ground is z = 0 and the camera hangs
over the origin. Model frame: x ahead of the model, y to its left, z up from the ground.
A model is a list of convex parts, so that painting their faces far to near needs no depth buffer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np

NEAR = 1.0  # metres along the optical axis
SHIFT = 3  # fractional bits of the pixel coordinates handed to OpenCV
Colour = tuple[float, float, float]

GLASS: Colour = (48, 58, 70)
TYRE: Colour = (24, 24, 26)
HUB: Colour = (128, 130, 134)
DARK: Colour = (38, 39, 42)
PLATE: Colour = (205, 210, 215)
HEADLIGHT: Colour = (255, 246, 222)
TAILLIGHT: Colour = (196, 24, 26)
SKIN: Colour = (196, 150, 122)


@dataclass(frozen=True)
class Camera:
    """Pinhole camera over the origin, looking along +y and down.

    Args:
        height: metres above the ground.
        pitch: radians below the horizon.
        roll: radians.
        focal: pixels.
        centre: principal point, pixels (x, y); pixel i spans [i, i + 1).
    """

    height: float
    pitch: float
    roll: float
    focal: float
    centre: tuple[float, float]

    @cached_property
    def rotation(self) -> np.ndarray:
        """(3, 3) rows: the camera's right, down and forward axes in the world frame."""
        cos, sin = math.cos(self.pitch), math.sin(self.pitch)
        level = np.array([[1, 0, 0], [0, -sin, -cos], [0, cos, -sin]])
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) @ level

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points (..., 3) to pixels (..., 2) and depths (...) along the optical axis."""
        rays = (points - (0, 0, self.height)) @ self.rotation.T
        depth = rays[..., 2]
        return rays[..., :2] * (self.focal / depth)[..., None] + self.centre, depth

    def ground(self, height: int, width: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """What every ``stride``-th pixel sees of the ground plane.

        Returns:
            (h, w, 2) world x, y in metres and (h, w) depth, which is infinite above the horizon.
        """
        u = (np.arange(0, width, stride) + stride / 2 - self.centre[0]) / self.focal
        v = (np.arange(0, height, stride) + stride / 2 - self.centre[1]) / self.focal
        rays = np.stack([*np.meshgrid(u, v), np.ones((len(v), len(u)))], -1).astype(np.float32)
        rays = rays @ self.rotation.astype(np.float32)
        depth = np.full(rays.shape[:2], np.inf, np.float32)
        np.divide(-self.height, rays[..., 2], out=depth, where=rays[..., 2] < -1e-4)
        return rays[..., :2] * np.minimum(depth, 3000)[..., None], depth


@dataclass(frozen=True)
class Light:
    """Light of a scene.

    Args:
        sun: unit vector towards the sun (or the brightest sky), z > 0.
        ambient, diffuse: share of a colour seen in the shade, and added when facing the sun.
        shadow: share of light that a cast shadow takes away.
        softness: blur of shadows, metres at 20 m.
        sky: colour at the zenith and at the horizon.
        tint: gain per channel over the whole frame.
        visibility: metres after which haze hides 63 % of a colour.
        lamps: whether vehicles and street lamps have their lights on.
        night: whether they are the light there is.
    """

    sun: np.ndarray
    ambient: float
    diffuse: float
    shadow: float
    softness: float
    sky: tuple[Colour, Colour]
    tint: Colour
    visibility: float
    lamps: bool
    night: bool


class Decal(NamedTuple):
    """A convex patch on a prism: in metres (x, z) on the sides, in unit (u, v) on an edge face."""

    face: str | int  # "sides", "left", "right", or the index of the profile's edge
    points: Sequence[tuple[float, float]]
    colour: Colour
    glow: float = 0.0  # radius of the light it gives at night, metres


class Prism(NamedTuple):
    """A convex profile in the x-z plane, stretched to both sides along y.

    ``profile`` runs counter-clockwise with x to the right and z up. The half width shrinks by
    ``taper`` per metre of height. ``smooth`` parts show one colour for their whole outline.
    Parts of a higher ``rank`` are painted later, whatever their depth.
    """

    profile: Sequence[tuple[float, float]]
    half_width: float
    colour: Colour
    taper: float = 0.0
    offset: float = 0.0
    rank: int = 0
    smooth: bool = False
    decals: Sequence[Decal] = ()


class Ball(NamedTuple):
    centre: tuple[float, float, float]
    radius: float
    colour: Colour
    rank: int = 0
    glow: float = 0.0


class Stroke(NamedTuple):
    """A line of constant thickness: limbs, tubes, rims."""

    points: Sequence[tuple[float, float, float]]
    thickness: float
    colour: Colour
    rank: int = 0


Part = Prism | Ball | Stroke


class Model(NamedTuple):
    parts: list[Part]
    size: tuple[float, float, float]  # length, width, height in metres


class Patch(NamedTuple):
    """A polygon ready for OpenCV: fixed-point pixels, its colour, a line's thickness or 0."""

    points: np.ndarray
    colour: Colour
    thickness: int = 0


class Glow(NamedTuple):
    centre: np.ndarray  # (2,) pixels
    radius: float  # pixels
    colour: Colour


class Drawing(NamedTuple):
    """A model seen by the camera."""

    patches: list[Patch]
    bounds: tuple[float, float, float, float]  # of the whole silhouette, not clipped
    shadows: list[Patch]  # of each part, on the ground
    glows: list[Glow]


class Pose(NamedTuple):
    """Model frame to world: ``points @ turn + origin``."""

    turn: np.ndarray
    origin: np.ndarray


def paint(
    image: np.ndarray, patches: Sequence[Patch], value: int | None = None, shift: int = SHIFT
) -> None:
    """Fill ``patches`` into ``image`` with their own colours, or all with ``value``.

    A ``shift`` of ``SHIFT + 1`` paints at half the size.
    """
    for points, colour, thickness in patches:
        ink = colour if value is None else value
        if thickness:
            cv2.polylines(image, [points], False, ink, thickness, cv2.LINE_8, shift)
        else:
            cv2.fillConvexPoly(image, points, ink, cv2.LINE_8, shift)


def fixed_point(pixels: np.ndarray) -> np.ndarray:
    """Pixel coordinates to OpenCV's fixed point, whose integers are pixel centres."""
    return np.rint((pixels - 0.5) * (1 << SHIFT)).astype(np.int32)


def draw(
    model: Model, position: np.ndarray, heading: float, camera: Camera, light: Light
) -> Drawing | None:
    """Place ``model`` on the ground and project it.

    Args:
        position: (2,) world x, y of its origin.
        heading: radians, counter-clockwise from the world's x axis.

    Returns:
        None when the model reaches behind the camera's near plane.
    """
    cos, sin = math.cos(heading), math.sin(heading)
    pose = Pose(np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]), np.array([*position, 0.0]))
    solids = [_outline(part) @ pose.turn + pose.origin for part in model.parts]
    views = [camera.project(points) for points in solids]
    if min(depth.min() for _, depth in views) < NEAR:
        return None
    haze = 1 - math.exp(-float(camera.project(pose.origin)[1]) / light.visibility)
    out = Drawing([], (0, 0, 0, 0), [], [])
    ranks = [(part.rank, -view[1].mean()) for part, view in zip(model.parts, views, strict=True)]
    for index in sorted(range(len(ranks)), key=ranks.__getitem__):
        part, points, (pixels, depth) = model.parts[index], solids[index], views[index]
        scale = camera.focal / depth.mean()
        if isinstance(part, Prism):
            _draw_prism(part, points, pixels, pose, camera, light, haze, out)
        elif isinstance(part, Ball):
            _draw_ball(part, pixels[0], part.radius * scale, light, haze, out)
            points = points[0] + part.radius * _SPHERE
        else:
            thickness = max(1, round(part.thickness * scale))
            colour = _shade(part.colour, light.ambient + 0.5 * light.diffuse, light, haze)
            out.patches.append(Patch(fixed_point(pixels), colour, thickness))
        fallen = points - points[:, 2:] * (light.sun / light.sun[2])
        pixels, depth = camera.project(fallen)
        if depth.min() > NEAR:
            hull = cv2.convexHull(np.clip(pixels, -2e4, 2e4).astype(np.float32))[:, 0]
            out.shadows.append(Patch(fixed_point(hull), (255, 255, 255)))
    unit = 1 << SHIFT
    low = np.min([p.points.min(0) - p.thickness * unit / 2 for p in out.patches], 0)
    high = np.max([p.points.max(0) + p.thickness * unit / 2 for p in out.patches], 0)
    return out._replace(bounds=(*(low / unit + 0.5), *(high / unit + 0.5)))


_CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 14)), np.sin(np.linspace(0, 2 * np.pi, 14))])
_CIRCLE = _CIRCLE.T[:-1]
_SPHERE = np.concatenate([np.eye(3), -np.eye(3), np.c_[_CIRCLE, np.zeros(13)] * 0.95])


def _outline(part: Part) -> np.ndarray:
    """Points of a part in the model frame: a prism's right side, then its left; a ball's centre."""
    if isinstance(part, Ball):
        return np.array([part.centre], float)
    if isinstance(part, Stroke):
        return np.array(part.points, float)
    profile = np.array(part.profile, float)
    half = _half_width(part, profile[:, 1])
    out = np.empty((2, len(profile), 3))  # right, left
    out[..., 0], out[..., 2] = profile.T[:, None]
    out[0, :, 1], out[1, :, 1] = part.offset - half, part.offset + half
    return out.reshape(-1, 3)


def _half_width(prism: Prism, z: np.ndarray) -> np.ndarray:
    return prism.half_width - prism.taper * (z - min(low for _, low in prism.profile))


def _shade(colour: Colour, gain: float, light: Light, haze: float) -> Colour:
    return tuple(
        min(255.0, c * gain) * (1 - haze) + sky * haze
        for c, sky in zip(colour, light.sky[1], strict=True)
    )


def _draw_prism(
    part: Prism, points: np.ndarray, pixels: np.ndarray, pose: Pose, camera: Camera, light: Light,
    haze: float, out: Drawing,
) -> None:  # fmt: skip
    if part.smooth:
        hull = cv2.convexHull(pixels.astype(np.float32))[:, 0]
        gain = light.ambient + 0.6 * light.diffuse
        out.patches.append(Patch(fixed_point(hull), _shade(part.colour, gain, light, haze)))
        return
    n = len(part.profile)
    index = np.arange(n)
    edges = np.stack([index, n + index, n + (index + 1) % n, (index + 1) % n], 1)
    corners = points[edges]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    across = pose.turn[1]
    faces: list[tuple[str | int, np.ndarray, np.ndarray]] = [
        *((i, pixels[edges[i]], normals[i]) for i in range(n)),
        ("right", pixels[:n], -across),
        ("left", pixels[: n - 1 : -1], across),
    ]
    for face, ring, normal in faces:
        x, y = (ring[1:] - ring[0]).T
        if (x[:-1] * y[1:] - y[:-1] * x[1:]).sum() >= 0:
            continue  # faces away
        gain = light.ambient + light.diffuse * max(0.0, float(normal @ light.sun))
        out.patches.append(Patch(fixed_point(ring), _shade(part.colour, gain, light, haze)))
        side = face in ("left", "right")
        decals = [d for d in part.decals if d.face == face or (side and d.face == "sides")]
        if not decals:
            continue
        flat = np.concatenate([decal.points for decal in decals])
        if side:
            lateral = part.offset + _half_width(part, flat[:, 1]) * (1 if face == "left" else -1)
            local = np.stack([flat[:, 0], lateral, flat[:, 1]], -1) @ pose.turn + pose.origin
        else:
            u, v = flat[:, :1], flat[:, 1:]
            a, b, c, d = corners[face]
            local = (a * (1 - u) + b * u) * (1 - v) + (d * (1 - u) + c * u) * v
        spots, depth = camera.project(local)
        end = 0
        for decal in decals:
            start, end = end, end + len(decal.points)
            lit = light.lamps and decal.glow > 0
            colour = decal.colour if lit else _shade(decal.colour, gain, light, haze)
            out.patches.append(Patch(fixed_point(spots[start:end]), colour))
            if lit:
                radius = decal.glow * camera.focal / depth[start]
                out.glows.append(Glow(spots[start:end].mean(0), radius, decal.colour))


def _draw_ball(
    part: Ball, centre: np.ndarray, radius: float, light: Light, haze: float, out: Drawing
) -> None:
    dim = _shade(part.colour, light.ambient + 0.35 * light.diffuse, light, haze)
    bright = _shade(part.colour, light.ambient + 0.9 * light.diffuse, light, haze)
    out.patches.append(Patch(fixed_point(centre + radius * _CIRCLE), dim))
    towards = np.array([light.sun[0], -light.sun[2]]) * 0.3 * radius
    out.patches.append(Patch(fixed_point(centre + towards + 0.62 * radius * _CIRCLE), bright))
    if part.glow and light.lamps:
        out.glows.append(Glow(centre, part.glow * radius / part.radius, part.colour))


# Shapes that the models share


def _quad(x0: float, x1: float, z0: float, z1: float) -> list[tuple[float, float]]:
    return [(x0, z0), (x1, z0), (x1, z1), (x0, z1)]


def _ring(x: float, z: float, radius: float) -> list[tuple[float, float]]:
    return [(x + radius * c, z + radius * s) for c, s in _CIRCLE]


def _mirror(
    face: int, u0: float, u1: float, v0: float, v1: float, colour: Colour, glow: float = 0.0
) -> list[Decal]:
    """The same rectangle on the right and the left of an edge face."""
    return [Decal(face, _quad(a, b, v0, v1), colour, glow) for a, b in ((u0, u1), (1 - u1, 1 - u0))]


def _wheels(radius: float, *at: float) -> list[Decal]:
    tyres = [Decal("sides", _ring(x, radius, radius), TYRE) for x in at]
    return tyres + [Decal("sides", _ring(x, radius, 0.55 * radius), HUB) for x in at]


def _pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 14.0) -> Colour:
    colour = np.array(colours[rng.integers(len(colours))])
    colour = colour + rng.normal(0, spread) + rng.normal(0, spread / 3, 3)
    return tuple(np.clip(colour, 8, 245).tolist())


def scaled(colour: Colour, gain: float) -> Colour:
    return tuple(min(255.0, c * gain) for c in colour)


# Traffic participants, one function per category

# Every category favours liveries of its own, as fleets do; street furniture borrows them all.
CAR_PAINTS = [
    (30, 31, 34), (160, 164, 170), (92, 96, 104), (150, 28, 32), (176, 36, 40), (30, 31, 34),
    (118, 84, 58),
]  # fmt: skip
VAN_PAINTS = [(232, 233, 234), (238, 238, 232), (226, 228, 234)]
BUS_PAINTS = [(46, 142, 82), (60, 160, 70), (40, 150, 110)]
CAB_PAINTS = [(222, 160, 36), (230, 140, 30), (214, 168, 40)]
CARGO_PAINTS = [(64, 92, 138), (50, 84, 150), (90, 110, 150)]
CLOTHES = [
    (40, 42, 50), (52, 78, 140), (226, 224, 218), (92, 96, 88), (120, 66, 120), (140, 80, 150),
    (70, 100, 150),
]  # fmt: skip
HIGH_VISIBILITY = [(206, 226, 46), (190, 216, 60)]
MOTORCYCLE_JACKETS = [(206, 40, 40), (220, 60, 36)]
TROUSERS = [(34, 38, 54), (60, 62, 66), (30, 30, 32), (110, 98, 80), (54, 74, 112)]


def car(rng: np.random.Generator) -> Model:
    length, width = rng.uniform(4.1, 4.8), rng.uniform(1.76, 1.9)
    height, livery = rng.uniform(1.42, 1.7), _pick(rng, CAR_PAINTS)
    half, belt = length / 2, 0.57 * height
    tall = height > 1.55  # hatchbacks and SUVs carry their roof to the tail
    body = Prism(
        [(-half + 0.1, 0.22), (half - 0.1, 0.22), (half, 0.42), (half - 0.14, belt - 0.14),
         (0.4 * half, belt), (-half + 0.04, belt), (-half, 0.5)],
        width / 2, livery, 0.06, decals=[
            Decal(1, _quad(0.1, 0.9, 0, 1), DARK),
            Decal(2, _quad(0.3, 0.7, 0.1, 0.6), DARK),
            *_mirror(2, 0.03, 0.27, 0.3, 0.9, HEADLIGHT, 0.8),
            *_mirror(5, 0.03, 0.26, 0.1, 0.75, TAILLIGHT, 0.45),
            Decal(5, _quad(0.38, 0.62, 0.4, 0.85), PLATE),
            Decal("sides", _quad(-0.86 * half, 0.86 * half, 0.22, 0.34), DARK),
            *_wheels(0.34, -0.58 * half, 0.6 * half)])  # fmt: skip
    tail, rear = (-0.97, -0.82) if tall else (-0.8, -0.5)
    nose, front = 0.44, 0.1
    middle = (rear + front) / 2 * half
    low, top = belt + 0.06, height - 0.09
    cabin = Prism(
        [(tail * half, belt), (nose * half, belt), (front * half, height), (rear * half, height)],
        width / 2 - 0.06, livery, 0.3, rank=1, decals=[
            Decal(1, _quad(0.07, 0.93, 0.06, 0.94), GLASS),
            Decal(3, _quad(0.09, 0.91, 0.1, 0.85), GLASS),
            Decal("sides", [(middle + 0.06, low), (nose * half - 0.16, low),
                            (front * half, top), (middle + 0.06, top)], GLASS),
            Decal("sides", [(tail * half + 0.22, low), (middle - 0.06, low),
                            (middle - 0.06, top), (rear * half + 0.08, top)], GLASS)])  # fmt: skip
    parts: list[Part] = [body, cabin]
    if rng.random() < 0.1:  # taxi sign
        parts.append(Prism(_quad(-0.5, -0.2, height, height + 0.14), 0.3, (240, 190, 40), rank=2))
    return Model(parts, (length, width, height))


def van(rng: np.random.Generator) -> Model:
    length, width, height = rng.uniform(4.8, 5.5), rng.uniform(1.9, 2.05), rng.uniform(2.1, 2.45)
    half, livery = length / 2, _pick(rng, VAN_PAINTS, 8)
    low, top = 0.55 * height, 0.87 * height
    decals = [
        Decal(2, _quad(0.28, 0.72, 0.2, 0.7), DARK),
        *_mirror(2, 0.03, 0.25, 0.3, 0.9, HEADLIGHT, 0.8),
        Decal(4, _quad(0.07, 0.93, 0.02, 0.9), GLASS),
        *_mirror(6, 0.01, 0.1, 0.45, 0.85, TAILLIGHT, 0.45),
        *_mirror(6, 0.14, 0.48, 0.1, 0.45, GLASS),
        Decal(6, _quad(0.38, 0.62, 0.66, 0.8), PLATE),
        Decal("sides", _quad(-0.9 * half, 0.9 * half, 0.25, 0.4), DARK),
        Decal("sides", [(0.34 * half, low), (0.74 * half, low), (0.58 * half, top),
                        (0.34 * half, top)], GLASS),
        *_wheels(0.36, -0.6 * half, 0.64 * half),
    ]  # fmt: skip
    if rng.random() < 0.5:  # minibus with windows, else a closed panel
        decals.append(Decal("sides", _quad(-0.9 * half, -0.36 * half, low, top), GLASS))
        decals.append(Decal("sides", _quad(-0.3 * half, 0.26 * half, low, top), GLASS))
    profile = [
        (-half, 0.25), (half - 0.1, 0.25), (half, 0.45), (half - 0.06, 0.4 * height),
        (0.8 * half, 0.53 * height), (0.56 * half, height), (-half + 0.05, height),
    ]  # fmt: skip
    return Model([Prism(profile, width / 2, livery, 0.07, decals=decals)], (length, width, height))


def bus(rng: np.random.Generator) -> Model:
    length, width, height = rng.uniform(9.0, 11.5), 2.5, rng.uniform(3.0, 3.3)
    half, livery = length / 2, _pick(rng, BUS_PAINTS, 8)
    panes = np.linspace(-0.95 * half, 0.9 * half, 8)
    decals = [
        Decal(1, _quad(0.06, 0.94, 0.34, 0.9), GLASS),
        Decal(1, _quad(0.3, 0.7, 0.91, 0.98), (236, 150, 50)),
        *_mirror(1, 0.04, 0.2, 0.12, 0.22, HEADLIGHT, 0.9),
        Decal(3, _quad(0.15, 0.85, 0.1, 0.42), GLASS),
        *_mirror(3, 0.03, 0.13, 0.6, 0.85, TAILLIGHT, 0.5),
        Decal("sides", _quad(-half, half, 0.95, 1.3), (232, 232, 230)),
        *(Decal("sides", _quad(a + 0.07, b - 0.07, 1.45, 0.86 * height), GLASS)
          for a, b in zip(panes, panes[1:], strict=False)),
        *(Decal("right", _quad(x - 0.6, x + 0.6, 0.4, 0.84 * height), (70, 80, 92))
          for x in (0.8 * half, 0.02 * half)),
        *_wheels(0.5, -0.5 * half, 0.55 * half),
    ]  # fmt: skip
    body = Prism(_quad(-half, half, 0.3, height), width / 2, livery, 0.03, decals=decals)
    units = [
        Prism(_quad(x * half, x * half + 1.6, height, height + 0.25), 0.8, (206, 208, 208), rank=1)
        for x in (-0.6, 0.15)
    ]
    return Model([body, *units], (length, width, height + 0.25))


def truck(rng: np.random.Generator) -> Model:
    length, width, height = rng.uniform(6.2, 9.0), rng.uniform(2.3, 2.5), rng.uniform(2.8, 3.5)
    half, cab_height = length / 2, min(height - 0.3, rng.uniform(2.3, 2.7))
    livery, back = _pick(rng, CAB_PAINTS, 8), half - 1.9
    axles = [-0.66 * half, half - 1.0] + ([-0.66 * half + 1.15] if length > 7.5 else [])
    chassis = Prism(
        _quad(-half, back + 0.2, 0.5, 1.0), width / 2 - 0.1, DARK,
        decals=[*_mirror(3, 0.02, 0.18, 0.1, 0.8, TAILLIGHT, 0.5),
                Decal(3, _quad(0.4, 0.6, 0.2, 0.8), PLATE), *_wheels(0.5, *axles)])  # fmt: skip
    cab = Prism(
        [(back + 0.1, 0.45), (half, 0.45), (half, 0.5 * cab_height), (half - 0.2, cab_height),
         (back + 0.1, cab_height)],
        width / 2 - 0.08, livery, 0.04, rank=1, decals=[
            Decal(1, _quad(0.18, 0.82, 0.3, 0.85), DARK),
            *_mirror(1, 0.02, 0.16, 0.1, 0.45, HEADLIGHT, 0.9),
            Decal(2, _quad(0.06, 0.94, 0.05, 0.85), GLASS),
            Decal("sides", _quad(half - 1.3, half - 0.3, 0.55 * cab_height, 0.86 * cab_height),
                  GLASS),
            Decal("sides", _ring(half - 1.0, 0.5, 0.5), TYRE),
            Decal("sides", _ring(half - 1.0, 0.5, 0.27), HUB)])  # fmt: skip
    cargo_paint = _pick(rng, CARGO_PAINTS, 8)
    stripe = scaled(cargo_paint, 0.72)
    if rng.random() < 0.65:  # closed box
        ribs = np.arange(-half + 0.7, back - 0.2, 1.1)
        decals = [Decal("sides", _quad(x, x + 0.12, 1.05, height - 0.05), stripe) for x in ribs] + [
            Decal(3, _quad(0.48, 0.52, 0.02, 0.98), DARK),
            Decal(3, _quad(0, 1, 0, 0.04), DARK),
        ]
    else:  # tipper with its load
        height = rng.uniform(2.0, 2.4)
        load = _pick(rng, [(128, 104, 74), (70, 70, 72), (150, 146, 138)])
        ribs = np.arange(-half + 0.5, back - 0.1, 0.7)
        decals = [Decal("sides", _quad(x, x + 0.14, 1.0, height), stripe) for x in ribs]
        decals.append(Decal(2, _quad(0.06, 0.94, 0.04, 0.96), load))
    cargo = Prism(_quad(-half, back, 0.95, height), width / 2, cargo_paint, rank=1, decals=decals)
    return Model([chassis, cab, cargo], (length, width, max(height, cab_height)))


def pedestrian(rng: np.random.Generator) -> Model:
    height, shirt = rng.uniform(1.55, 1.85), _pick(rng, CLOTHES)
    trousers, stride = _pick(rng, TROUSERS), rng.uniform(0.05, 0.3)
    hip, shoulder = 0.48 * height, 0.82 * height
    legs = [
        Stroke([(0, y, hip), (x, y, 0.04)], 0.15, trousers)
        for x, y in ((stride, 0.09), (-stride, -0.09))
    ]
    arms = [
        Stroke([(0, y, shoulder - 0.05), (x, 1.15 * y, hip)], 0.1, scaled(shirt, 0.85), rank=1)
        for x, y in ((-0.8 * stride, 0.24), (0.8 * stride, -0.24))
    ]
    profile = [(-0.12, hip - 0.1), (0.12, hip - 0.1), (0.15, shoulder), (-0.15, shoulder)]
    torso = Prism(profile, 0.19, shirt, -0.1, rank=2)
    hair = _pick(rng, [(30, 26, 24), (60, 44, 34), (120, 116, 110)], 6)
    head = [
        Ball((0.03, 0, height - 0.14), 0.13, SKIN, rank=3),
        Ball((-0.02, 0, height - 0.09), 0.12, hair, rank=4),
    ]
    parts: list[Part] = [*legs, *arms, torso, *head]
    if rng.random() < 0.3:  # backpack
        pack = _quad(-0.34, -0.14, hip + 0.1, shoulder)
        parts.append(Prism(pack, 0.16, _pick(rng, CLOTHES), rank=2))
    return Model(parts, (0.65, 0.6, height))


def _rider(
    rng: np.random.Generator,
    seat: float,
    foot: tuple[float, float],
    lean: float,
    jackets: list[Colour],
) -> list[Part]:
    """Legs, torso and arms of somebody sitting at (0, 0, ``seat``), hands at x = 0.45."""
    shirt, trousers = _pick(rng, jackets), _pick(rng, TROUSERS)
    neck = seat + 0.58
    legs = [
        Stroke([(-0.1, y, seat), (0.26, y, seat - 0.12), (foot[0] + x, y, foot[1] + z)], 0.15,
               trousers, rank=1)
        for y, x, z in ((0.13, 0.0, 0.0), (-0.13, 0.06, 0.14))
    ]  # fmt: skip
    torso = Prism(
        [(-0.24, seat - 0.05), (0.06, seat - 0.05), (lean + 0.1, neck), (lean - 0.16, neck)],
        0.19, shirt, -0.08, rank=2)  # fmt: skip
    arms = [
        Stroke([(lean, y, neck - 0.08), (0.45, 1.1 * y, seat + 0.2)], 0.1, shirt, rank=3)
        for y in (0.22, -0.22)
    ]
    return [*legs, torso, *arms]


def _rim(x: float, radius: float, thickness: float, colour: Colour) -> Stroke:
    points = [(a, 0.0, b) for a, b in _ring(x, radius, radius - thickness / 2)]
    return Stroke([*points, points[0]], thickness, colour)


def cyclist(rng: np.random.Generator) -> Model:
    frame = _pick(rng, [(200, 40, 44), (40, 110, 190), (30, 30, 32), (70, 170, 90)])
    if rng.random() < 0.35:  # rental bicycle
        frame = _pick(rng, [(250, 190, 30), (60, 190, 220)], 6)
    seat, lean = rng.uniform(0.92, 1.0), rng.uniform(0.1, 0.26)
    bicycle = [
        _rim(-0.52, 0.34, 0.07, TYRE),
        _rim(0.54, 0.34, 0.07, TYRE),
        Stroke([(-0.52, 0, 0.34), (-0.14, 0, 0.84), (0.4, 0, 0.82), (0.0, 0, 0.3),
                (-0.14, 0, 0.84)], 0.07, frame),
        Stroke([(0.54, 0, 0.34), (0.4, 0, 0.95), (0.44, 0, 1.1)], 0.06, frame),
        Stroke([(-0.52, 0, 0.34), (0.0, 0, 0.3)], 0.06, frame),
    ]  # fmt: skip
    hair = _pick(rng, [(34, 28, 26), (226, 226, 220), (60, 44, 34)], 6)
    head = [
        Ball((lean + 0.06, 0, seat + 0.72), 0.125, SKIN, rank=4),
        Ball((lean + 0.02, 0, seat + 0.77), 0.12, hair, rank=5),
    ]
    parts = [*bicycle, *_rider(rng, seat, (0.05, 0.2), lean, HIGH_VISIBILITY), *head]
    return Model(parts, (1.75, 0.55, seat + 0.89))


def motorcyclist(rng: np.random.Generator) -> Model:
    livery = _pick(rng, [(30, 90, 200), (206, 36, 36), (32, 34, 36), (232, 232, 230)])
    seat, lean = rng.uniform(0.76, 0.84), rng.uniform(-0.04, 0.1)
    scooter = [
        *(Prism(_ring(x, 0.29, 0.29), 0.09, TYRE,
                decals=[Decal("sides", _ring(x, 0.29, 0.13), HUB)]) for x in (-0.62, 0.66)),
        Prism([(-0.9, 0.42), (-0.2, 0.26), (0.0, 0.3), (0.0, 0.7), (-0.85, 0.74)], 0.2, livery,
              decals=[Decal(4, _quad(0.2, 0.8, 0.15, 0.6), TAILLIGHT, 0.35)]),
        Prism(_quad(-0.2, 0.45, 0.24, 0.36), 0.19, DARK),
        Prism([(0.42, 0.3), (0.62, 0.34), (0.5, 0.98), (0.36, 0.98)], 0.24, livery, rank=1,
              decals=[Decal(1, _quad(0.3, 0.7, 0.72, 0.95), HEADLIGHT, 0.6)]),
        Stroke([(0.4, -0.32, 1.05), (0.4, 0.32, 1.05)], 0.07, DARK, rank=1),
    ]  # fmt: skip
    if rng.random() < 0.5:  # delivery box
        colour = _pick(rng, [(250, 196, 36), (40, 130, 220), (40, 42, 46)], 8)
        scooter.append(Prism(_quad(-1.0, -0.42, 0.76, 1.22), 0.26, colour, rank=1))
    helmet = _pick(rng, [(240, 240, 238), (240, 200, 40), (200, 36, 40), (40, 90, 190), DARK], 8)
    head = [
        Ball((lean + 0.1, 0, seat + 0.68), 0.13, SKIN, rank=4),
        Ball((lean + 0.02, 0, seat + 0.73), 0.17, helmet, rank=5),
    ]
    parts = [*scooter, *_rider(rng, seat, (0.3, 0.36), lean, MOTORCYCLE_JACKETS), *head]
    return Model(parts, (1.95, 0.7, seat + 0.9))


def traffic_cone(rng: np.random.Generator) -> Model:
    height, orange = rng.uniform(0.7, 0.95), _pick(rng, [(240, 84, 24)], 8)
    bands = [0.05, 0.28 * height, 0.46 * height, 0.62 * height, 0.78 * height, height]
    parts: list[Part] = [Prism(_quad(-0.24, 0.24, 0, 0.05), 0.24, scaled(orange, 0.6))]
    for i, (low, high) in enumerate(zip(bands, bands[1:], strict=False)):
        a, b = (0.2 - 0.16 * z / height for z in (low, high))
        colour = orange if i % 2 == 0 else (238, 238, 234)
        taper = (a - b) / (high - low)
        band = Prism([(-a, low), (a, low), (b, high), (-b, high)], a, colour, taper, rank=1 + i)
        parts.append(band._replace(smooth=True))
    return Model(parts, (0.48, 0.48, height))


def crowd(rng: np.random.Generator) -> Model:
    """People too many and too close to tell apart."""
    parts: list[Part] = []
    for _ in range(rng.integers(7, 12)):
        x, y, height = rng.uniform(-0.7, 0.7), rng.uniform(-2, 2), rng.uniform(1.5, 1.8)
        coat = Prism(_quad(x - 0.2, x + 0.2, 0, height - 0.2), 0.26, _pick(rng, CLOTHES), 0.05, y)
        parts.append(coat._replace(smooth=True))
        parts.append(Ball((x, y, height - 0.1), 0.13, (90, 70, 60), rank=1))
    return Model(parts, (1.8, 4.6, 1.8))


PARTICIPANTS: dict[str, Callable[[np.random.Generator], Model]] = {
    "Car": car, "Truck": truck, "Van": van, "Bus": bus, "Pedestrian": pedestrian,
    "Cyclist": cyclist, "Motorcyclist": motorcyclist, "Trafficcone": traffic_cone,
    "PedestrianIgnore": crowd,
}  # fmt: skip


# Street furniture: clutter with the colours and proportions of traffic, but no label


def tree(rng: np.random.Generator) -> Model:
    height, spread = rng.uniform(3.2, 6.5), rng.uniform(1.3, 2.4)
    leaf = _pick(rng, [(58, 92, 44), (84, 110, 52), (40, 74, 46), (150, 120, 50)], 8)
    parts: list[Part] = [Stroke([(0, 0, 0), (0.1, 0, height)], 0.24, (84, 68, 54))]
    for i in range(16):  # dark and low ones first, then smaller and lighter ones above
        up, (x, y) = i / 15, rng.uniform(-0.75, 0.75, 2) * spread
        z = height + (1.1 * up - 0.3 + rng.uniform(-0.2, 0.2)) * spread
        radius = spread * (rng.uniform(0.34, 0.5) - 0.16 * up)
        colour = scaled(leaf, 0.7 + 0.45 * up + rng.uniform(-0.1, 0.1))
        parts.append(Ball((x, y, z), radius, colour, rank=1 + i // 4))
    return Model(parts, (1.6, 1.6, height + spread))


def hedge(rng: np.random.Generator) -> Model:
    length, height = rng.uniform(3, 9), rng.uniform(0.5, 1.1)
    colour = _pick(rng, [(56, 86, 42), (74, 92, 50), (104, 88, 52)], 8)
    spots = []
    for _ in range(10):
        spot = _ring(rng.uniform(-0.45, 0.45) * length, rng.uniform(0.3, 0.8) * height, 0.18)
        spots.append(Decal("sides", spot, scaled(colour, rng.uniform(0.7, 1.3))))
    box = Prism(_quad(-length / 2, length / 2, 0, height), 0.5, colour, 0.1, decals=spots)
    return Model([box], (length, 1.0, height))


def container(rng: np.random.Generator) -> Model:
    """A closed box as large as a vehicle: kiosk, skip or site hut."""
    length, width, height = rng.uniform(1.6, 6), rng.uniform(1.4, 2.4), rng.uniform(1.1, 2.6)
    colour = _pick(rng, CAR_PAINTS + CARGO_PAINTS + BUS_PAINTS)
    decals = [
        Decal("sides", _quad(x, x + 0.12, 0.1, height - 0.1), scaled(colour, 0.8))
        for x in np.arange(-length / 2 + 0.3, length / 2 - 0.2, 0.6)
    ]
    if rng.random() < 0.4:
        decals.append(Decal(1, _quad(0.3, 0.7, 0.0, 0.75), DARK))
    body = Prism(_quad(-length / 2, length / 2, 0, height), width / 2, colour, decals=decals)
    return Model([body], (length, width, height))


def bollard(rng: np.random.Generator) -> Model:
    """A post with the proportions of a person or a cone."""
    height, colour = rng.uniform(0.8, 1.7), _pick(rng, [(70, 72, 74), (40, 60, 46), (224, 190, 60)])
    radius = rng.uniform(0.07, 0.16)
    parts: list[Part] = [
        Prism(_quad(-radius, radius, 0, height), radius, colour, smooth=True),
        Prism(_quad(-radius, radius, 0.7 * height, 0.8 * height), radius, DARK, rank=1),
    ]
    if rng.random() < 0.5:
        parts.append(Ball((0, 0, height), 1.25 * radius, scaled(colour, 1.2), rank=2))
    return Model(parts, (0.3, 0.3, height))


def lamp(rng: np.random.Generator) -> Model:
    height, arm = rng.uniform(7, 10), rng.uniform(1, 2.2)
    pole = Stroke([(0, 0, 0), (0, 0, height), (arm, 0, height + 0.3)], 0.17, (120, 124, 128))
    head = Ball((arm, 0, height + 0.2), 0.2, (255, 226, 170), rank=1, glow=1.6)
    return Model([pole, head], (0.4, 0.4, height))


def sign(rng: np.random.Generator) -> Model:
    """A traffic light or a sign on its post."""
    height = rng.uniform(2.4, 4.5)
    post = Stroke([(0, 0, 0), (0, 0, height)], 0.11, (134, 138, 140))
    if rng.random() < 0.4:
        colours = [(220, 40, 36), (230, 170, 40), (50, 210, 120)]
        on = rng.integers(3)
        lamps = [
            Decal(1, _quad(0.25, 0.75, 0.7 - 0.3 * i, 0.9 - 0.3 * i),
                  c if i == on else scaled(c, 0.25), 0.35 * (i == on))
            for i, c in enumerate(colours)
        ]  # fmt: skip
        board = Prism(_quad(-0.12, 0.12, height - 1.0, height), 0.16, DARK, rank=1, decals=lamps)
    else:
        colour = _pick(rng, [(30, 84, 180), (200, 36, 36), (30, 124, 76), (236, 196, 40)], 8)
        decals = [Decal(1, _quad(0.12, 0.88, 0.12, 0.88), scaled(colour, 1.15)),
                  Decal(1, _quad(0.25, 0.75, 0.4, 0.55), (232, 232, 230))]  # fmt: skip
        half = rng.uniform(0.3, 0.9)
        board = Prism(_quad(-0.03, 0.03, height - 0.8, height), half, colour, rank=1, decals=decals)
    return Model([post, board], (0.3, 0.3, height))


def building(rng: np.random.Generator) -> Model:
    length, width, height = rng.uniform(10, 26), rng.uniform(8, 16), rng.uniform(6, 26)
    wall = _pick(rng, [(178, 168, 152), (150, 96, 76), (196, 196, 192), (128, 134, 142)])
    pane, floors = _pick(rng, [(70, 82, 96), (52, 58, 66)], 6), int(height / 3.2)
    columns = int(length / 3.5)
    windows = [
        Decal("sides", _quad(x - 0.8, x + 0.8, 3.2 * i + 1.2, 3.2 * i + 2.8), pane)
        for x in np.linspace(-0.42, 0.42, columns) * length
        for i in range(floors)
    ]
    windows += [
        Decal(face, _quad(u, u + 0.1, (i + 0.3) / floors, (i + 0.8) / floors), pane)
        for face in (1, 3)
        for u in np.linspace(0.06, 0.84, 5)
        for i in range(floors)
    ]
    shop = Decal("sides", _quad(-0.45 * length, 0.45 * length, 0.3, 2.6), _pick(rng, CLOTHES))
    body = Prism(_quad(-length / 2, length / 2, 0, height), width / 2, wall)
    return Model([body._replace(decals=[*windows, shop])], (length, width, height))

"""Roadside-camera scenes drawn from a seed, stored in DAIR-V2X's single-infrastructure layout.

The genuine frames may not be redistributed; these stand in for them in demos and tests, and go
through the same reader. See ``roadside_draw`` for the camera and the things in a scene.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from .roadside_draw import (
    PARTICIPANTS,
    SHIFT,
    Camera,
    Colour,
    Drawing,
    Light,
    Model,
    bollard,
    building,
    container,
    draw,
    fixed_point,
    hedge,
    lamp,
    paint,
    scaled,
    sign,
    tree,
)

CATEGORIES = tuple(name for name in PARTICIPANTS if not name.endswith("Ignore"))
SCALE = 2  # scenes are painted larger by this, then averaged
MIN_HEIGHT = 0.1  # share of the image; lower participants are not placed
MIN_VISIBLE = 0.25  # share of the silhouette; participants hidden further carry no label
JPEG_QUALITY = 92
MARKER = "generated.json"
VERSION = 8  # of the drawing: a change makes written datasets stale

FREQUENCY = {
    "Car": 0.32, "Truck": 0.1, "Van": 0.1, "Bus": 0.08, "Pedestrian": 0.13, "Cyclist": 0.09,
    "Motorcyclist": 0.08, "Trafficcone": 0.1,
}  # fmt: skip
CAMERAS = 3  # sites among which the frames of a data set take turns
EMPTY_SHARE = 0.07
CROWD_SHARE = 0.08
GROUND_NEAR = 4.0  # metres; the camera sees no ground nearer than this
ROAD_END = 170.0  # metres to which roads are marked
CONTACT_SHADOW = 0.55  # share of light missing under a vehicle


class SceneObject(NamedTuple):
    """A labelled traffic participant.

    ``box`` bounds the whole silhouette, hidden parts included, clipped to the image: (xmin, ymin,
    xmax, ymax) in pixels. States are DAIR-V2X's: 0 none, 1 less than half, 2 more. ``location``
    is the centre in metres (ahead, left, up) from the ground below the camera, ``dimensions`` are
    (length, width, height) in metres, ``rotation`` is counter-clockwise from straight ahead.
    ``category`` is a DAIR-V2X type, one of ``CATEGORIES`` or "PedestrianIgnore".
    """

    category: str
    box: tuple[float, float, float, float]
    occluded_state: int
    truncated_state: int
    location: tuple[float, float, float]
    dimensions: tuple[float, float, float]
    rotation: float
    depth: float


class Scene(NamedTuple):
    """``image``: (H, W, 3) uint8 RGB."""

    image: np.ndarray
    objects: list[SceneObject]


@dataclass(frozen=True)
class Road:
    """A straight road; ``s`` runs along it from ``origin``, ``t`` to its right, in metres.

    Args:
        origin: (2,) world x, y.
        bearing: radians, clockwise from the world's y axis.
        lanes: per direction.
    """

    origin: np.ndarray
    bearing: float
    lanes: int
    lane_width: float

    @property
    def half_width(self) -> float:
        return self.lanes * self.lane_width + 0.5

    @property
    def heading(self) -> float:
        return math.pi / 2 - self.bearing

    @property
    def axes(self) -> np.ndarray:
        """(2, 2) rows: along and right."""
        sin, cos = math.sin(self.bearing), math.cos(self.bearing)
        return np.array([[sin, cos], [cos, -sin]])

    def place(self, st: np.ndarray) -> np.ndarray:
        """(..., 2) s, t to world x, y."""
        return self.origin + np.asarray(st, float) @ self.axes

    def locate(self, xy: np.ndarray) -> np.ndarray:
        """World (..., 2) x, y to s, t."""
        return (np.asarray(xy, float) - self.origin) @ self.axes.T


@dataclass(frozen=True)
class Layout:
    """The main road, perhaps a crossing one, and zebra crossings as (road, s)."""

    main: Road
    cross: Road | None
    junction: float
    zebras: list[tuple[Road, float]]

    @property
    def roads(self) -> list[Road]:
        return [self.main] if self.cross is None else [self.main, self.cross]

    def gap(self, road: Road) -> tuple[float, float]:
        """Stretch of ``road`` that the junction takes up, zebra crossings included."""
        if self.cross is None:
            return (ROAD_END, ROAD_END)
        other = self.cross if road is self.main else self.main
        middle = self.junction if road is self.main else 0.0
        return middle - other.half_width - 5.5, middle + other.half_width + 5.5


class Thing(NamedTuple):
    """Something placed in the scene; street furniture has no category."""

    category: str | None
    model: Model
    position: np.ndarray
    heading: float
    footprint: np.ndarray  # (4, 2) world x, y, counter-clockwise
    drawing: Drawing


@dataclass(frozen=True)
class Stage:
    """A scene in the making; ``size`` is the image's (height, width).

    ``site`` draws what a camera sees day after day, ``rng`` what is new in every frame.
    """

    site: np.random.Generator
    rng: np.random.Generator
    size: tuple[int, int]
    camera: Camera
    light: Light
    layout: Layout
    things: list[Thing]


def render_scene(seed: int, height: int, width: int, site: int | None = None) -> Scene:
    """Draw one scene.

    Args:
        seed: decides about traffic and light; not negative.
        height, width: pixels of the image.
        site: decides about the camera, the roads and what stands beside them; by default every
            seed has a site of its own.

    Raises:
        ValueError: for a negative seed or a size that is not positive.
    """
    _check(1, height=height, width=width)
    _check(0, seed=seed)
    rng = np.random.default_rng(seed)
    place = np.random.default_rng([seed if site is None else site, 1])
    camera = _camera(place, height, width)
    stage = Stage(place, rng, (height, width), camera, _light(rng), _layout(place), [])
    _furnish(stage)
    _populate(stage)

    ground, depth = stage.camera.ground(height * SCALE, width * SCALE, SCALE)
    canvas = cv2.resize(_background(stage, ground, depth), None, fx=SCALE, fy=SCALE)
    ids = np.zeros(canvas.shape[:2], np.uint8)
    for index in paint_order(np.array([thing.footprint for thing in stage.things])):
        thing = stage.things[index]
        paint(canvas, thing.drawing.patches)
        paint(ids, thing.drawing.patches, index + 1 if thing.category else 0)
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    image = _expose(stage, image, ids, ground)
    labels = [_label(stage, index, ids) for index, t in enumerate(stage.things) if t.category]
    return Scene(image, [label for label in labels if label is not None])


# What a scene is made of


def _camera(rng: np.random.Generator, height: int, width: int) -> Camera:
    return Camera(
        height=rng.uniform(5.8, 9.0),
        pitch=math.radians(rng.uniform(9, 18)),
        roll=math.radians(rng.normal(0, 0.8)),
        focal=rng.uniform(0.95, 1.3) * width * SCALE,
        centre=(width * SCALE / 2, height * SCALE / 2),
    )


# share, sun's elevation (degrees), ambient, diffuse, shadow, softness, zenith, horizon, tint
_LIGHTS = {
    "day": (0.52, (28, 65), 0.58, 0.52, 0.5, 0.06, (104, 156, 220), (206, 222, 234), (1, 1, 1)),
    "overcast": (
        0.26, (60, 85), 0.76, 0.24, 0.16, 0.8, (182, 188, 194), (212, 216, 218), (0.95, 0.98, 1),
    ),
    "dusk": (
        0.14, (13, 22), 0.56, 0.42, 0.34, 0.2, (92, 104, 150), (228, 190, 160), (1, 0.94, 0.87),
    ),
    "night": (0.08, (60, 85), 0.9, 0.14, 0.1, 0.8, (14, 16, 28), (34, 36, 46), (0.92, 0.96, 1.08)),
}  # fmt: skip


def _light(rng: np.random.Generator) -> Light:
    hour = rng.choice(list(_LIGHTS), p=[row[0] for row in _LIGHTS.values()])
    _, (low, high), ambient, diffuse, shadow, softness, zenith, horizon, tint = _LIGHTS[hour]
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(low, high))
    level = math.cos(elevation)
    sun = (level * math.cos(azimuth), level * math.sin(azimuth), math.sin(elevation))
    foggy = rng.random() < 0.08
    return Light(
        sun=np.array(sun),
        ambient=ambient,
        diffuse=diffuse,
        shadow=shadow * (0.3 if foggy else 1.0),
        softness=softness,
        sky=(horizon, horizon) if foggy else (zenith, horizon),
        tint=tint,
        visibility=rng.uniform(70, 130) if foggy else rng.uniform(350, 900),
        lamps=hour == "night" or (hour == "dusk" and rng.random() < 0.5),
        night=hour == "night",
    )


def _layout(rng: np.random.Generator) -> Layout:
    main = Road(
        origin=np.array([rng.uniform(-4, 4), 0.0]),
        bearing=rng.uniform(-0.2, 0.2),
        lanes=int(rng.integers(1, 4)),
        lane_width=rng.uniform(3.2, 3.7),
    )
    if rng.random() < 0.4:
        zebras = [(main, rng.uniform(16, 38))] if rng.random() < 0.6 else []
        return Layout(main, None, math.inf, zebras)
    junction = rng.uniform(24, 46)
    bearing = main.bearing + math.pi / 2 + rng.uniform(-0.15, 0.15)
    cross = Road(main.place([junction, 0]), bearing, int(rng.integers(1, 3)), main.lane_width)
    zebras = [(main, junction + side * (cross.half_width + 3)) for side in (-1, 1)]
    zebras += [(cross, side * (main.half_width + 3)) for side in (-1, 1)]
    return Layout(main, cross, junction, zebras)


def _put(
    stage: Stage,
    category: str | None,
    model: Model,
    position: np.ndarray,
    heading: float,
    accept: Callable[[Drawing], bool] = lambda drawing: True,
) -> bool:
    """Add a thing unless it is out of sight, stands in another, or ``accept`` refuses its view."""
    (column, _), depth = stage.camera.project(np.array([*position, 0.0]))
    if depth < GROUND_NEAR or abs(column / (stage.size[1] * SCALE) - 0.5) > 1:
        return False
    cos, sin = math.cos(heading), math.sin(heading)
    axes, half = np.array([[cos, sin], [-sin, cos]]), np.array(model.size[:2]) / 2
    corners = np.array([[1, -1], [1, 1], [-1, 1], [-1, -1]])
    footprint = position + corners * half @ axes
    roomy = position + (corners * (half + 0.2) @ axes)[None]
    if stage.things:
        others = np.array([thing.footprint for thing in stage.things])
        apart = (_clearance(roomy, others)[0] > 0).any(0)
        apart |= (_clearance(others, roomy)[..., 0] > 0).any(1)
        if not apart.all():
            return False
    drawing = draw(model, position, heading, stage.camera, stage.light)
    if drawing is None or not accept(drawing):
        return False
    stage.things.append(Thing(category, model, position, heading, footprint, drawing))
    return True


def _furnish(stage: Stage) -> None:
    """Line the roads with street furniture, nearest to the kerb first."""
    rng, roads = stage.site, stage.layout.roads
    rows = [  # what, how many, metres from the kerb
        (lamp, (1, 5), (0.5, 0.8)), (sign, (1, 6), (0.4, 1.2)), (bollard, (2, 9), (0.4, 3.4)),
        (hedge, (1, 6), (3.6, 5)), (tree, (4, 15), (3.6, 12)), (container, (1, 5), (4, 9)),
        (building, (3, 8), (14, 34)),
    ]  # fmt: skip
    for build, (fewest, most), (near, far) in rows:
        for _ in range(rng.integers(fewest, most)):
            road, side = roads[rng.integers(len(roads))], rng.choice([-1, 1])
            s = 8 * 11 ** rng.random() if road is roads[0] else rng.uniform(-45, 45)
            position = road.place([s, side * (road.half_width + rng.uniform(near, far))])
            heading = road.heading
            if build is lamp:  # its arm reaches over the road
                heading += side * math.pi / 2
            elif build is sign:  # its face towards the camera
                heading = -math.pi / 2 + rng.normal(0, 0.5)
            model = build(rng)
            clear = max(model.size[:2]) / 2 + 3
            if all(r is road or abs(r.locate(position)[1]) > r.half_width + clear for r in roads):
                _put(stage, None, model, position, heading)


def _populate(stage: Stage) -> None:
    """Place traffic where it belongs, large enough in the image to be labelled."""
    rng, (height, width) = stage.rng, stage.size

    def accept(least: float, drawing: Drawing) -> bool:
        x0, y0, x1, y1 = (value / SCALE for value in drawing.bounds)
        inside_x, inside_y = min(x1, width) - max(x0, 0), min(y1, height) - max(y0, 0)
        share = max(inside_x, 0) * max(inside_y, 0) / max(1, (x1 - x0) * (y1 - y0))
        return share > 0.35 and inside_y >= least and inside_x >= least / 3

    count = 0 if rng.random() < EMPTY_SHARE else int(rng.triangular(1, 6, 13))
    names = list(rng.choice(list(FREQUENCY), size=count, p=list(FREQUENCY.values())))
    if count and rng.random() < CROWD_SHARE:
        names.append("PedestrianIgnore")
    last: dict[str, tuple[Road, float, float, float]] = {}
    for name in sorted(names, key=["Bus", "Truck"].count, reverse=True):  # the long ones need room
        model = PARTICIPANTS[name](rng)
        gap = {"Trafficcone": 2.2, "Pedestrian": 0.9}.get(name, 2 + model.size[0])
        kind = name if gap < 2.5 else "queue"
        least = height * MIN_HEIGHT * (0.6 if name == "Trafficcone" else 1)
        for _ in range(14):
            if kind in last and rng.random() < 0.35:
                road, s, t, heading = last[kind]
                s += gap * rng.uniform(1.0, 1.5) * rng.choice([-1, 1])
                t += rng.normal(0, 0.15)
            else:
                road, s, t, heading = _pose(rng, name, stage.layout)
            if _put(stage, name, model, road.place([s, t]), heading, partial(accept, least)):
                last[kind] = (road, s, t, heading)
                break


def _pose(rng: np.random.Generator, name: str, layout: Layout) -> tuple[Road, float, float, float]:
    """Where a participant of a kind would be: its road, s and t there, and its heading."""
    roads = layout.roads
    road = roads[0] if len(roads) == 1 or rng.random() < 0.65 else roads[1]
    farthest = {"Trafficcone": 15, "Pedestrian": 22, "Cyclist": 26, "Motorcyclist": 26}.get(
        name, 42
    )
    s = 9 * (farthest / 9) ** rng.random() if road is layout.main else rng.uniform(-28, 28)
    side = rng.choice([-1, 1])
    heading = road.heading + (0 if side > 0 else math.pi)
    kerb = road.half_width
    if name in ("Pedestrian", "PedestrianIgnore"):
        if layout.zebras and name == "Pedestrian" and rng.random() < 0.5:
            road, at = layout.zebras[rng.integers(len(layout.zebras))]
            across = road.heading + side * math.pi / 2 + rng.normal(0, 0.2)
            return road, at + rng.uniform(-1.5, 1.5), rng.uniform(-1, 1) * road.half_width, across
        return road, s, side * (kerb + rng.uniform(0.6, 3.2)), heading + rng.normal(0, 0.5)
    if name in ("Cyclist", "Motorcyclist"):
        wrong_way = math.pi if rng.random() < 0.2 else 0
        t = side * (kerb - rng.uniform(0.4, 2.4))
        return road, s, t, heading + wrong_way + rng.normal(0, 0.2)
    if name == "Trafficcone":
        return road, s, side * (kerb - rng.uniform(-0.6, 3.2)), rng.uniform(0, math.pi)
    t = side * (rng.integers(road.lanes) + 0.5) * road.lane_width + rng.normal(0, 0.2)
    low, high = layout.gap(road)
    turning = low + 4 < s < high - 4 and rng.random() < 0.3
    return road, s, t, heading + rng.normal(0, 0.6 if turning else 0.03)


# Painting


def _clearance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far polygons lie beyond each other's edges.

    Args:
        first: (n, e, 2) convex polygons, counter-clockwise.
        second: (m, k, 2) points.

    Returns:
        (n, e, m): the smallest signed distance of m's points outwards of n's edge e.
    """
    edges = np.roll(first, -1, 1) - first
    normals = np.stack([edges[..., 1], -edges[..., 0]], -1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    offsets = (normals * first).sum(-1)
    return np.einsum("nec,mkc->nemk", normals, second).min(-1) - offsets[..., None]


def paint_order(footprints: np.ndarray) -> list[int]:
    """Order in which to paint things, so that the one in front comes later.

    Two footprints that an edge's line separates cannot hide each other the wrong way round: the
    one on the camera's side of that line is in front. Comparing depths alone fails beside buses.

    Args:
        footprints: (n, 4, 2) world x, y, counter-clockwise; the camera is over the origin.
    """
    if not len(footprints):
        return []
    separated = _clearance(footprints, footprints) >= 0  # (i, edge, j)
    beyond = _clearance(footprints, np.zeros((1, 1, 2))) >= 0  # (i, edge, 1): camera outside
    cannot_hide = (separated & beyond).any(1) | (separated & ~beyond).any(1).T
    distance = np.linalg.norm(footprints.mean(1), axis=1)
    hides = ~cannot_hide
    hides &= ~hides.T | (distance[:, None] < distance[None])
    order, left = [], np.ones(len(footprints), bool)
    while left.any():
        free = left & ~(hides & left).any(1)
        candidates = np.flatnonzero(free if free.any() else left)
        order.append(int(candidates[np.argmax(distance[candidates])]))
        left[order[-1]] = False
    return order


def _fill_ground(image: np.ndarray, camera: Camera, polygons: np.ndarray, colour) -> None:
    """Fill (n, k, 2) polygons of the ground plane that do not overlap one another."""
    polygons = np.asarray(polygons, float)
    points = np.concatenate([polygons, np.zeros((*polygons.shape[:2], 1))], -1)
    depth = camera.project(points)[1]
    rings = [
        _clip_near(ring, d) for ring, d in zip(points, depth, strict=True) if d.max() > GROUND_NEAR
    ]
    pixels = [camera.project(ring)[0] / SCALE for ring in rings]
    cv2.fillPoly(image, [fixed_point(p) for p in pixels], colour, cv2.LINE_AA, SHIFT)


def _clip_near(ring: np.ndarray, depth: np.ndarray, near: float = GROUND_NEAR) -> np.ndarray:
    """Cut the part of a (k, 3) polygon off that is closer than ``near`` along the optical axis."""
    if depth.min() >= near:
        return ring
    out = []
    for a, b, da, db in zip(ring, np.roll(ring, -1, 0), depth, np.roll(depth, -1), strict=True):
        if da >= near:
            out.append(a)
        if (da >= near) != (db >= near):
            out.append(a + (b - a) * (near - da) / (db - da))
    return np.array(out)


def _background(stage: Stage, ground: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Sky, skyline, ground, roads and shadows: (H, W, 3) uint8."""
    (height, width), light = stage.size, stage.light
    zenith, horizon = np.array(light.sky, np.float32)
    on_ground = np.isfinite(depth)
    rows = np.arange(height) / max(1, np.argmax(on_ground[:, width // 2]))
    sky = zenith + (horizon - zenith) * np.clip(rows, 0, 1)[:, None] ** 1.5
    image = np.repeat(sky[:, None], width, 1).astype(np.uint8)
    _paint_skyline(stage, image)
    _paint_roads(stage, image)

    gain = _texture(stage.site, ground, depth) * (1 - _shadows(stage))
    clear = np.where(on_ground, np.exp(-depth / light.visibility), 1)
    image = image * np.where(on_ground, gain * clear, 1)[..., None]
    image += (1 - clear)[..., None] * horizon
    return np.clip(image, 0, 255).astype(np.uint8)


def _paint_skyline(stage: Stage, image: np.ndarray) -> None:
    """Far blocks and woods along the horizon."""
    rng, light = stage.site, stage.light
    haze = 0.25 + 0.75 * (1 - math.exp(-400 / light.visibility))
    for near, tones, width, tall in (
        (500, [(150, 150, 150), (120, 104, 96), (170, 176, 184)], 40, 70),
        (300, [(70, 88, 62), (58, 76, 58), (92, 92, 66)], 12, 14),
    ):
        for x in rng.uniform(-0.8, 0.8, 30) * near:
            half, top = width * rng.uniform(0.3, 1), tall * rng.uniform(0.3, 1)
            shape = [(-half, -5), (half, -5), (half, top), (-half, top)]
            if near == 300:
                shape[2:] = [(half, 0.6 * top), (0.5 * half, top), (-0.4 * half, top),
                             (-half, 0.7 * top)]  # fmt: skip
            points = np.array([(x + dx, near, z) for dx, z in shape])
            tone = np.array(tones[rng.integers(3)]) * light.ambient * (1 - haze)
            pixels = stage.camera.project(points)[0] / SCALE
            colour = (tone + haze * np.array(light.sky[1])).tolist()
            cv2.fillConvexPoly(image, fixed_point(pixels), colour, cv2.LINE_AA, SHIFT)


def _paint_roads(stage: Stage, image: np.ndarray) -> None:
    rng, layout = stage.site, stage.layout
    level = stage.light.ambient + stage.light.diffuse * stage.light.sun[2]

    def colour(*rgb: float, spread: float = 6) -> Colour:
        return scaled(np.array(rgb) + rng.normal(0, spread), level)

    def strips(road: Road, spans: Sequence, ink: Colour) -> None:
        """Rectangles (n, 4) of s0, s1, t0, t1."""
        spans = np.asarray(spans, float).reshape(-1, 4)
        corners = road.place(spans[:, [[0, 2], [1, 2], [1, 3], [0, 3]]])
        _fill_ground(image, stage.camera, corners, ink)

    soil = [(104, 122, 78), (128, 124, 96), (150, 148, 142)][rng.integers(3)]
    everywhere = [[(-900, -50), (900, -50), (900, 3000), (-900, 3000)]]
    _fill_ground(image, stage.camera, everywhere, colour(*soil))
    grey, pavement = rng.uniform(72, 108), rng.uniform(3.2, 4.2)
    asphalt = colour(grey, grey, grey + 3)
    worn = scaled(asphalt, rng.uniform(0.9, 0.97))
    for margin, ink in (
        (pavement, colour(166, 160, 152)), (0.25, colour(190, 190, 186)), (0, asphalt),
    ):  # fmt: skip
        for road in layout.roads:  # layer by layer, so that the junction merges
            edge = road.half_width + margin
            strips(road, [-250, 600, -edge, edge], ink)
    white, yellow = colour(222, 222, 216, spread=12), colour(222, 176, 60, spread=12)
    for road in layout.roads:
        low, high = layout.gap(road)
        width, kerb, lanes = road.lane_width, road.half_width, range(road.lanes)
        for a, b in [(-60, low), (high, ROAD_END)]:
            if a >= b:
                continue
            tracks = [
                (k + 0.5) * width + d for k in range(-road.lanes, road.lanes) for d in (-1, 0.5)
            ]
            strips(road, [(a, b, t, t + 0.5) for t in tracks], worn)
            strips(road, [(a, b, t, t + 0.13) for t in (-0.2, 0.07)], yellow)
            strips(road, [(a, b, t, t + 0.14) for t in (-kerb + 0.3, kerb - 0.44)], white)
            edges = [side * k * width for k in lanes[1:] for side in (-1, 1)]
            strips(road, [(s, min(s + 2.6, b), t - 0.07, t + 0.07)
                          for s in np.arange(a, b, 6.0) for t in edges], white)  # fmt: skip
        if layout.cross:
            strips(road, [(low - 0.9, low - 0.5, 0.2, kerb - 0.4),
                          (high + 0.5, high + 0.9, 0.4 - kerb, -0.2)], white)  # fmt: skip
            for k in lanes:
                for side, s in ((1, low - 9), (-1, high + 9)):
                    arrow = _arrow(road, s, side, (k + 0.5) * width)
                    _fill_ground(image, stage.camera, arrow, white)
    for road, s in layout.zebras:
        bars = np.arange(-road.half_width + 0.4, road.half_width - 0.6, 1.0)
        strips(road, [(s - 1.7, s + 1.7, t, t + 0.5) for t in bars], white)
    for _ in range(rng.integers(0, 7)):  # repairs
        s, t = 9 * 8 ** rng.random(), rng.uniform(-1, 1) * layout.main.half_width * 0.8
        patch = [s, s + rng.uniform(0.6, 5), t, t + rng.uniform(0.5, 1.6)]
        strips(layout.main, patch, scaled(asphalt, rng.uniform(0.8, 1.08)))


def _arrow(road: Road, s: float, side: int, t: float) -> np.ndarray:
    """(1, 7, 2) arrow painted on a lane, pointing the way the lane goes."""
    shape = [(-1.6, -0.12), (0.4, -0.12), (0.4, -0.45), (1.8, 0), (0.4, 0.45), (0.4, 0.12),
             (-1.6, 0.12)]  # fmt: skip
    return road.place(np.array(shape) * side + (s, side * t))[None]


def _texture(rng: np.random.Generator, ground: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(H, W) gain of the ground's grain and stains, fixed to the ground plane."""
    tile = rng.standard_normal((64, 64), np.float32)
    stains = cv2.GaussianBlur(np.tile(tile, (3, 3)), None, 2)[64:128, 64:128]
    gain = np.ones(depth.shape, np.float32)
    fade = 1 / (1 + depth / 40)
    for layer, scale, strength in ((tile, 9.0, 0.035), (stains / stains.std(), 2.0, 0.05)):
        x, y = cv2.split(np.clip(ground * np.float32(scale), -3e4, 3e4))
        gain += strength * fade * cv2.remap(layer, x, y, cv2.INTER_LINEAR, None, cv2.BORDER_WRAP)
    return gain


def _shadows(stage: Stage) -> np.ndarray:
    """(H, W) share of light that shadows take from the ground."""
    light, pixels = stage.light, stage.camera.focal / SCALE / 20
    cast, contact = np.zeros(stage.size, np.uint8), np.zeros(stage.size, np.uint8)
    for thing in stage.things:
        paint(cast, thing.drawing.shadows, shift=SHIFT + 1)
    footprints = np.array([t.footprint for t in stage.things if t.category]).reshape(-1, 4, 2)
    _fill_ground(contact, stage.camera, footprints, 255)
    size = 1 + 2 * round(light.softness * pixels)
    cast = cv2.blur(cv2.blur(cast, (size, size)), (size, size))
    contact = cv2.GaussianBlur(contact, None, max(0.5, 0.12 * pixels))
    return np.maximum(
        cast * np.float32(light.shadow / 255), contact * np.float32(CONTACT_SHADOW / 255)
    )


def _expose(stage: Stage, image: np.ndarray, ids: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Lamps, exposure, optics and noise: (H, W, 3) uint8."""
    rng, (height, width), light = stage.rng, stage.size, stage.light
    image = image.astype(np.float32)
    if light.night:
        image *= _lamplight(stage, ground)[..., None]
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width)
    vignette = 1 - rng.uniform(0, 0.22) * (x**2 + y**2) / 2
    gain = rng.uniform(0.82, 1.14) * np.array(light.tint) * rng.normal(1, 0.02, 3)
    image *= vignette.astype(np.float32)[..., None]
    image *= gain.astype(np.float32)
    for index, thing in enumerate(stage.things):
        for glow in thing.drawing.glows:
            column, row = glow.centre.astype(int)
            inside = 0 <= row < ids.shape[0] and 0 <= column < ids.shape[1]
            if inside and ids[row, column] == (index + 1 if thing.category else 0):
                colour = np.array(glow.colour) * (0.8 if light.night else 0.35)
                _add_glow(image, glow.centre / SCALE, glow.radius / SCALE, colour)
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, None, rng.uniform(0.3, 0.8) * width / 512)
    strength = rng.uniform(3, 6) if light.night else rng.uniform(0.5, 3.5)
    grain = rng.standard_normal((height, width, 1), np.float32)
    colour_grain = rng.integers(-8, 9, (height, width, 3), np.int8) * np.float32(0.08)
    image += strength * (grain + colour_grain)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _lamplight(stage: Stage, ground: np.ndarray) -> np.ndarray:
    """(H, W) gain under street lamps and headlights at night."""
    rng = stage.rng
    level = np.full(stage.size, rng.uniform(0.36, 0.52), np.float32)
    for s in np.arange(rng.uniform(8, 20), 90, rng.uniform(22, 30)):
        offset = ground - np.array([rng.uniform(-9, 9), s], np.float32)
        level += 0.42 * np.exp((offset**2).sum(-1) / -100)
    beams, reach = np.zeros(stage.size, np.uint8), [(0, -0.7), (9, -2.4), (9, 2.4), (0, 0.7)]
    for thing in stage.things:
        if thing.category in ("Car", "Van", "Bus", "Truck", "Motorcyclist"):
            cos, sin = math.cos(thing.heading), math.sin(thing.heading)
            ahead = np.array(reach) + (thing.model.size[0] / 2, 0)
            beam = thing.position + ahead @ np.array([[cos, sin], [-sin, cos]])
            _fill_ground(beams, stage.camera, beam[None], 255)
    return level + cv2.GaussianBlur(beams, None, stage.size[1] / 100) * np.float32(0.4 / 255)


def _add_glow(image: np.ndarray, centre: np.ndarray, radius: float, colour: np.ndarray) -> None:
    reach = math.ceil(2.5 * radius) + 1
    (x0, y0), (x1, y1) = np.maximum(centre.astype(int) - reach, 0), centre.astype(int) + reach
    view = image[y0:y1, x0:x1]
    y, x = np.ogrid[y0 : y0 + view.shape[0], x0 : x0 + view.shape[1]]
    square = (x + 0.5 - centre[0]) ** 2 + (y + 0.5 - centre[1]) ** 2
    view += np.exp(-square / (2 * (0.5 * radius) ** 2 + 0.3))[..., None] * colour


# Labels


def _label(stage: Stage, index: int, ids: np.ndarray) -> SceneObject | None:
    """Box and states of a participant, None when too little of it is to be seen."""
    thing, (height, width) = stage.things[index], ids.shape
    x0, y0 = (math.floor(value) - 1 for value in thing.drawing.bounds[:2])
    x1, y1 = (math.ceil(value) + 2 for value in thing.drawing.bounds[2:])
    mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
    corner = np.array([x0, y0], np.int32) << SHIFT
    paint(mask, [p._replace(points=p.points - corner) for p in thing.drawing.patches], 1)
    left, top = max(0, -x0), max(0, -y0)
    inside = mask[top : height - y0, left : width - x0]
    here = ids[y0 + top :, x0 + left :][: inside.shape[0], : inside.shape[1]]
    present = np.count_nonzero(inside)
    visible = np.count_nonzero((here == index + 1) & (inside > 0))
    if visible < max(1, MIN_VISIBLE * present):
        return None
    cut = 1 - present / np.count_nonzero(mask)
    box = np.array(thing.drawing.bounds)
    if cut > 0:  # what is left may be narrower than the clipped bounds
        x, y, w, h = cv2.boundingRect(inside)
        box = np.array([x, y, x + w, y + h]) + (x0 + left, y0 + top, x0 + left, y0 + top)
    box = np.clip(box, 0, (width, height, width, height)) / SCALE
    x, y = thing.position.tolist()
    half = thing.model.size[2] / 2
    return SceneObject(
        category=str(thing.category),
        box=tuple(box.tolist()),
        occluded_state=_state(1 - visible / present, 0.04),
        truncated_state=_state(cut, 0.01),
        location=(y, -x, half),
        dimensions=thing.model.size,
        rotation=math.remainder(thing.heading - math.pi / 2, 2 * math.pi),
        depth=float(stage.camera.project(np.array([x, y, half]))[1]),
    )


def _state(share: float, negligible: float) -> int:
    return 0 if share <= negligible else 1 if share < 0.5 else 2


# Writing


def write_dataset(
    root: Path,
    num_train: int,
    num_val: int,
    height: int,
    width: int,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Write ``root/dair-v2x`` in DAIR-V2X's single-infrastructure layout.

    Frame i depends on (``seed``, i) and the size alone; training frames come first. All frames
    are of :data:`CAMERAS` fixed cameras. A dataset
    already written with the same arguments is kept, an interrupted one is completed.

    Args:
        root: folder that gets ``dair-v2x/single-infrastructure-side`` and ``.../split_datas``.
        num_train, num_val: frames in either split.
        height, width: pixels.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a size that is not positive, or a negative count or seed.
        FileExistsError: when the folder holds a dataset that this function did not write.
    """
    _check(1, height=height, width=width)
    _check(0, num_train=num_train, num_val=num_val, seed=seed)
    base = Path(root) / "dair-v2x"
    side, marker = base / "single-infrastructure-side", base / MARKER
    split = base / "split_datas" / "single-infrastructure-split-data.json"
    arguments = {
        "version": VERSION, "num_train": num_train, "num_val": num_val, "height": height,
        "width": width, "seed": seed,
    }  # fmt: skip
    if marker.exists():
        found = json.loads(marker.read_text())
        if found == {"arguments": arguments, "complete": True}:
            return
        if found["arguments"] != arguments:
            _write_json(marker, {"arguments": None, "complete": False})  # half deleted is not whole
            for folder in (side / "image", side / "label"):
                shutil.rmtree(folder, ignore_errors=True)
            for stale in (side / "data_info.json", split):
                stale.unlink(missing_ok=True)
    elif (side / "image").exists() or (side / "data_info.json").exists():
        raise FileExistsError(f"{side} holds a dataset that was not generated; choose another root")
    _write_json(marker, {"arguments": arguments, "complete": False})

    names = [f"{index:06d}" for index in range(num_train + num_val)]
    bar = tqdm(names, desc="drawing scenes", unit="frame", disable=not progress)
    for index, name in enumerate(bar):
        label = side / "label" / "camera" / f"{name}.json"
        if label.exists():  # written after its image
            continue
        scene = render_scene(frame_seed(seed, index), height, width, camera_seed(seed, index))
        ok, code = cv2.imencode(
            ".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        )
        if not ok:
            raise OSError(f"OpenCV cannot encode frame {name}")
        _write(side / "image" / f"{name}.jpg", code.tobytes())
        _write_json(label, [to_dair(item) for item in scene.objects])
    records = [
        {"image_path": f"image/{n}.jpg", "label_camera_std_path": f"label/camera/{n}.json"}
        for n in names
    ]
    _write_json(side / "data_info.json", records)
    _write_json(split, {"train": names[:num_train], "val": names[num_train:], "test": []})
    _write_json(marker, {"arguments": arguments, "complete": True})


def frame_seed(seed: int, index: int) -> int:
    """Seed of frame ``index`` for :func:`render_scene`, independent of the number of frames."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


def camera_seed(seed: int, index: int) -> int:
    """Site of frame ``index``: a few fixed cameras take turns, as at a real crossing."""
    return int(np.random.SeedSequence([seed, index % CAMERAS, 1]).generate_state(1, np.uint64)[0])


def to_dair(item: SceneObject) -> dict:
    """An entry of a DAIR-V2X label file, whose numbers are strings."""

    def named(keys: str, values: tuple[float, ...]) -> dict[str, str]:
        return {key: f"{value:.5f}" for key, value in zip(keys.split(), values, strict=True)}

    return {
        "type": item.category,
        "truncated_state": str(item.truncated_state),
        "occluded_state": str(item.occluded_state),
        "2d_box": named("xmin ymin xmax ymax", item.box),
        "3d_dimensions": named("l w h", item.dimensions),
        "3d_location": named("x y z", item.location),
        "rotation": f"{item.rotation:.5f}",
    }


def _write_json(path: Path, value: object) -> None:
    _write(path, json.dumps(value, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _check(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")

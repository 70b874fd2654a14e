"""Crossings with traffic on them, seen by a roadside camera: placed, painted and labelled."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple

import cv2
import numpy as np

from . import models
from .drawing import NEAR, SCALE, SHIFT, Camera, Light, Patch, bounds, draw, fixed_point, paint

MIN_HEIGHT = 0.115  # share of the image; lower participants are not placed
MIN_VISIBLE = 0.25  # share of the silhouette; participants hidden further carry no label
EMPTY_SHARE = 0.07
CROWD_SHARE = 0.08
LANE = 3.5  # metres
CONTACT_SHADOW = 0.55  # share of light missing under a participant


class Habit(NamedTuple):
    """How a category behaves.

    ``share`` is of all participants. It may be up to ``reach`` metres along the main road, ``kerb``
    (a range) metres inwards from the kerb or, by default, in a lane, and its heading strays from
    the road's by ``wander`` radians. ``speed`` is a range in m/s.
    """

    build: Callable[[np.random.Generator], models.Model]
    share: float
    reach: float = 42.0
    kerb: tuple[float, float] | None = None
    wander: float = 0.05
    speed: tuple[float, float] = (6, 12)


HABITS = {
    "Car": Habit(models.car, 0.32),
    "Truck": Habit(models.truck, 0.1),
    "Van": Habit(models.van, 0.1),
    "Bus": Habit(models.bus, 0.08),
    "Pedestrian": Habit(models.pedestrian, 0.13, 24, (-3.2, -0.6), 0.5, (0.9, 1.7)),
    "Cyclist": Habit(models.cyclist, 0.09, 26, (0.4, 2.4), 0.2, (3, 6)),
    "Motorcyclist": Habit(models.motorcyclist, 0.08, 26, (0.4, 2.4), 0.2),
    "Trafficcone": Habit(models.traffic_cone, 0.1, 18, (-0.6, 3.2), 1.0, (0, 0)),
    "PedestrianIgnore": Habit(models.crowd, 0, 30, (-3.2, -1.0), 0.5, (0, 0)),
}
CATEGORIES = tuple(name for name, habit in HABITS.items() if habit.share)

# Street furniture: how many, and how far from the kerb (metres).
FURNITURE = ((models.post, 10, (0.4, 3.4)), (models.tree, 12, (3.6, 20)))

# Share of frames, the sun's elevation (degrees), and Light's fields from ambient on.
HOURS = (
    (0.5, (28, 65), (0.58, 0.52, 0.5, (104, 156, 220), (206, 222, 234), 600, False)),  # day
    (0.22, (60, 85), (0.74, 0.24, 0.16, (182, 188, 194), (210, 215, 218), 400, False)),  # clouds
    (0.08, (60, 85), (0.72, 0.24, 0.08, (206, 212, 216), (206, 212, 216), 100, False)),  # fog
    (0.12, (13, 22), (0.52, 0.42, 0.34, (92, 104, 150), (228, 190, 160), 500, True)),  # dusk
    (0.08, (60, 85), (0.5, 0.1, 0.1, (8, 9, 16), (18, 20, 28), 500, True)),  # night
)


class SceneObject(NamedTuple):
    """A labelled traffic participant.

    ``box`` bounds the whole silhouette, hidden parts included, clipped to the image: (xmin, ymin,
    xmax, ymax) in pixels. States are DAIR-V2X's: 0 none, 1 less than half, 2 more. ``location``
    is the centre in metres (ahead, left, up) from the ground below the camera, ``dimensions`` are
    (length, width, height) in metres, ``rotation`` is counter-clockwise from straight ahead.
    ``category`` is a DAIR-V2X type, one of ``CATEGORIES`` or "PedestrianIgnore". ``colour`` is that
    of a car's paint, one of ``models.CAR_COLOURS``, whatever the light; others have none.
    """

    category: str
    box: tuple[float, float, float, float]
    occluded_state: int
    truncated_state: int
    location: tuple[float, float, float]
    dimensions: tuple[float, float, float]
    rotation: float
    depth: float
    colour: str | None


class Scene(NamedTuple):
    """``image``: (H, W, 3) uint8 RGB."""

    image: np.ndarray
    objects: list[SceneObject]


class Road(NamedTuple):
    """A straight road; ``s`` runs along it from ``origin``, ``t`` to its right, in metres.

    It has as many ``lanes`` in either direction, is painted over ``span``, and gives ``gap`` to the
    junction, zebra crossings included (ranges of s). ``heading`` is in radians from world x.
    """

    origin: np.ndarray
    heading: float
    lanes: int
    span: tuple[float, float]
    gap: tuple[float, float]

    @property
    def half_width(self) -> float:
        return self.lanes * LANE + 0.5

    def place(self, st: np.ndarray | Sequence) -> np.ndarray:
        """(..., 2) s, t to world x, y."""
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        return self.origin + np.asarray(st, float) @ [[cos, sin], [sin, -cos]]


class Thing(NamedTuple):
    """Something placed in the scene; street furniture has no category."""

    category: str | None
    model: models.Model
    position: np.ndarray
    heading: float
    footprint: np.ndarray  # (4, 2) float32 world x, y, counter-clockwise, with a margin
    patches: list[Patch]


class Stage(NamedTuple):
    """A scene in the making; ``size`` is the image's (height, width).

    ``site`` draws what a camera sees day after day, ``rng`` what is new in every frame. Roads are
    the main one, which leads away from the camera, and the one that crosses it.
    """

    site: np.random.Generator
    rng: np.random.Generator
    size: tuple[int, int]
    camera: Camera
    light: Light
    roads: tuple[Road, Road]
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
    stage = _set_stage(seed, height, width, site)
    return _shoot(stage, stage.rng)


def render_sequence(
    seed: int, frames: int, height: int, width: int, site: int | None = None, rate: float = 10.0,
    noise: bool = True,
) -> Iterator[Scene]:  # fmt: skip
    """Draw consecutive frames of one camera, which begin with what :func:`render_scene` shows.

    Camera, surroundings, light and exposure stay. Participants drive or walk on along the road
    that they face, each at a speed of its own, and wait while something stands in their way; none
    comes after those who leave, so that sequences of seconds are meant. Cones and crowds stand.

    Args:
        seed, height, width, site: see :func:`render_scene`.
        frames: how many.
        rate: frames per second.
        noise: of the sensor, drawn anew in each frame; without it only what moves changes.

    Raises:
        ValueError: as :func:`render_scene`, or for less than one frame or no positive rate.
    """
    check_least(1, frames=frames)
    if not rate > 0:
        raise ValueError(f"rate={rate} must be positive")
    stage = _set_stage(seed, height, width, site)
    return _roll(stage, frames, rate, np.random.default_rng([seed, 2]), noise)


def check_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")


def _set_stage(seed: int, height: int, width: int, site: int | None) -> Stage:
    check_least(1, height=height, width=width)
    check_least(0, seed=seed)
    rng = np.random.default_rng(seed)
    place = np.random.default_rng([seed if site is None else site, 1])
    camera = Camera(
        height=place.uniform(5.8, 9.0),
        pitch=math.radians(place.uniform(9, 18)),
        focal=place.uniform(0.95, 1.3) * width * SCALE,
        centre=(width * SCALE / 2, height * SCALE / 2),
    )
    stage = Stage(place, rng, (height, width), camera, _light(rng), _roads(place), [])
    _furnish(stage)
    _populate(stage)
    return stage


def _shoot(stage: Stage, noise: np.random.Generator | None) -> Scene:
    """Take the picture; advances the stage's generators, and that of the noise if there is any."""
    height, width = stage.size
    canvas = cv2.resize(_background(stage), None, fx=SCALE, fy=SCALE)
    ids = np.zeros(canvas.shape[:2], np.uint8)
    for index in paint_order(np.array([thing.footprint for thing in stage.things])):
        paint(canvas, stage.things[index].patches)
        paint(ids, stage.things[index].patches, index + 1)
    image = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    image = _expose(stage, image, noise)
    labels = [_label(stage, index, ids) for index, t in enumerate(stage.things) if t.category]
    return Scene(image, [label for label in labels if label is not None])


def _roll(
    stage: Stage, frames: int, rate: float, rng: np.random.Generator, noise: bool
) -> Iterator[Scene]:
    """Take pictures of a stage whose participants move."""
    speeds = [rng.uniform(*HABITS[t.category].speed) if t.category else 0.0 for t in stage.things]
    for _ in range(frames):
        # Copies of the generators draw the same asphalt, stains and exposure in each frame.
        still = stage._replace(site=deepcopy(stage.site), rng=deepcopy(stage.rng))
        yield _shoot(still, rng if noise else None)
        for index, speed in enumerate(speeds):
            _advance(stage, index, speed / rate)


def _advance(stage: Stage, index: int, distance: float) -> None:
    """Move a thing along the road that it faces, in metres, unless another is in the way."""
    thing = stage.things[index]
    courses = [road.heading + turn for road in stage.roads for turn in (0, math.pi)]
    course = min(courses, key=lambda c: abs(math.remainder(thing.heading - c, 2 * math.pi)))
    step = distance * np.array([math.cos(course), math.sin(course)])
    footprint = (thing.footprint + step).astype(np.float32)
    others = stage.things[:index] + stage.things[index + 1 :]
    if not distance or _meets(footprint, others):
        return
    position = thing.position + step
    patches = draw(thing.model, position, thing.heading, stage.camera, stage.light) or []
    stage.things[index] = thing._replace(position=position, footprint=footprint, patches=patches)


def _meets(footprint: np.ndarray, things: Sequence[Thing]) -> bool:
    return any(cv2.intersectConvexConvex(footprint, thing.footprint)[0] for thing in things)


def _light(rng: np.random.Generator) -> Light:
    _, elevations, fields = HOURS[rng.choice(len(HOURS), p=[share for share, *_ in HOURS])]
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(*elevations))
    level = math.cos(elevation)
    sun = (level * math.cos(azimuth), level * math.sin(azimuth), math.sin(elevation))
    return Light(np.array(sun), *fields)


def _roads(rng: np.random.Generator) -> tuple[Road, Road]:
    lanes, cross_lanes = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    middle = rng.uniform(22, 50)
    half, cross_half = lanes * LANE + 6, cross_lanes * LANE + 6
    heading, origin = math.pi / 2 + rng.uniform(-0.2, 0.2), np.array([rng.uniform(-4, 4), 0])
    main = Road(origin, heading, lanes, (4, 170), (middle - cross_half, middle + cross_half))
    heading += rng.uniform(-0.15, 0.15) - math.pi / 2
    return main, Road(main.place([middle, 0]), heading, cross_lanes, (-45, 45), (-half, half))


def _furnish(stage: Stage) -> None:
    """Line the roads with street furniture, outside of their junction."""
    rng = stage.site
    for build, count, kerb in FURNITURE:
        for _ in range(count):
            index, side, model = int(rng.integers(2)), rng.choice([-1, 1]), build(rng)
            road, margin = stage.roads[index], max(model.size[:2]) / 2
            s = rng.uniform(*road.span) if index else 8 * 11 ** rng.random()
            position = road.place([s, side * (road.half_width + rng.uniform(*kerb))])
            heading = road.heading + (math.pi / 2 if build is models.post else 0)
            if not road.gap[0] - margin < s < road.gap[1] + margin:
                _put(stage, None, model, position, heading)


def _populate(stage: Stage) -> None:
    """Place traffic where it belongs."""
    rng = stage.rng
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.triangular(1, 6, 13))
    shares = [habit.share for habit in HABITS.values()]
    names = rng.choice(list(HABITS), size=count, p=shares).tolist()
    if count and rng.random() < CROWD_SHARE:
        names.append("PedestrianIgnore")
    crew = [(name, HABITS[name].build(rng)) for name in names]
    for name, model in sorted(crew, key=lambda one: -one[1].size[0]):  # the long ones need room
        for _ in range(40):  # near the camera, little of the road is in sight
            if _put(stage, name, model, *_pose(stage, name)):
                break


def _pose(stage: Stage, name: str) -> tuple[np.ndarray, float]:
    """World x, y and heading of a participant."""
    rng, habit = stage.rng, HABITS[name]
    main, side = rng.random() < 0.65, rng.choice([-1, 1])
    road = stage.roads[0 if main else 1]
    s = 9 * (habit.reach / 9) ** rng.random() if main else rng.uniform(-28, 28)
    heading = road.heading + (0 if side > 0 else math.pi) + rng.normal(0, habit.wander)
    if name == "Pedestrian" and rng.random() < 0.5:  # on a zebra crossing
        s = rng.choice((road.gap[0] + 2.5, road.gap[1] - 2.5)) + rng.uniform(-1.5, 1.5)
        return road.place([s, rng.uniform(-1, 1) * road.half_width]), heading + math.pi / 2
    if habit.kerb:
        return road.place([s, side * (road.half_width - rng.uniform(*habit.kerb))]), heading
    if road.gap[0] + 4 < s < road.gap[1] - 4 and rng.random() < 0.3:  # turning
        heading += rng.normal(0, 0.6)
    t = side * (rng.integers(road.lanes) + 0.5) * LANE + rng.normal(0, 0.2)
    return road.place([s, t]), heading


def _put(
    stage: Stage, category: str | None, model: models.Model, position: np.ndarray, heading: float
) -> bool:
    """Add a thing unless it is out of sight, too small for a label, or stands in another."""
    cos, sin = math.cos(heading), math.sin(heading)
    turn, corners = [[cos, sin], [-sin, cos]], np.array(models.quad(-0.5, 0.5, -0.5, 0.5))
    base = position + corners * model.size[:2] @ turn
    footprint = (position + corners * np.add(model.size[:2], 0.3) @ turn).astype(np.float32)
    solid = np.concatenate([np.c_[base, np.full(4, z)] for z in (0, model.size[2])])
    pixels, depth = stage.camera.project(solid)
    low, high, end = pixels.min(0) / SCALE, pixels.max(0) / SCALE, stage.size[::-1]
    inside = np.maximum(np.minimum(high, end) - np.maximum(low, 0), 0)
    least = stage.size[0] * MIN_HEIGHT * (0.65 if category == "Trafficcone" else 1)
    large = inside[1] >= least and inside[0] >= least / 3
    central = inside.prod() > 0.35 * (high - low).prod()
    if depth.min() < NEAR or not inside.all() or (category and not (large and central)):
        return False
    if _meets(footprint, stage.things):
        return False
    patches = draw(model, position, heading, stage.camera, stage.light)
    if patches:
        stage.things.append(Thing(category, model, position, heading, footprint, patches))
    return bool(patches)


def paint_order(footprints: np.ndarray) -> list[int]:
    """Order in which to paint things, so that the one in front comes later.

    Two footprints that an edge's line separates cannot hide each other the wrong way round: the
    one on the camera's side of that line is in front. Comparing depths alone fails beside buses.
    Footprints are (n, 4, 2) world x, y, counter-clockwise; the camera is over the origin.
    """
    if not len(footprints):
        return []
    edges = np.roll(footprints, -1, 1) - footprints
    normals = edges[..., ::-1] * (1, -1)  # outwards
    others = np.concatenate([footprints, np.zeros((1, 4, 2))])
    heights = np.einsum("iec,jkc->iejk", normals, others)
    outside = (heights >= (normals * footprints).sum(-1)[..., None, None]).all(-1)
    separated, camera = outside[..., :-1], outside[..., -1:]  # (i, edge, j), (i, edge, 1)
    hides = ~((separated & camera).any(1) | (separated & ~camera).any(1).T)
    distance = np.linalg.norm(footprints.mean(1), axis=1)
    hides &= ~hides.T | (distance[:, None] < distance[None])
    order, left = [], np.ones(len(footprints), bool)
    while left.any():
        free = left & ~(hides & left).any(1)
        candidates = np.flatnonzero(free if free.any() else left)
        order.append(int(candidates[np.argmax(distance[candidates])]))
        left[order[-1]] = False
    return order


def _fill_ground(camera: Camera, image: np.ndarray, polygons: np.ndarray, colour: object) -> None:
    """Fill those (n, k, 2) polygons of the ground that lie ahead; they may not overlap."""
    flat = np.concatenate([polygons, np.zeros((*polygons.shape[:2], 1))], -1)
    pixels, depth = camera.project(flat)
    rings = fixed_point(pixels[(depth > NEAR).all(-1)] / SCALE)
    cv2.fillPoly(image, list(rings), colour, cv2.LINE_AA, SHIFT)


def _background(stage: Stage) -> np.ndarray:
    """Sky, ground, roads and shadows: (H, W, 3) uint8."""
    (height, width), light = stage.size, stage.light
    depth = stage.camera.ground_depth(height)
    top = int(np.count_nonzero(np.isinf(depth)))  # rows above the horizon
    zenith, horizon = np.array([light.zenith, light.horizon], np.float32)
    sky = zenith + (horizon - zenith) * np.linspace(0, 1, top, dtype=np.float32)[:, None] ** 1.5
    image = np.zeros((height, width, 3), np.uint8)
    image[:top] = sky[:, None]
    _paint_roads(stage, image, top)

    cast, contact = np.zeros(stage.size, np.uint8), np.zeros(stage.size, np.uint8)
    for thing in stage.things:
        shift = light.sun[:2] * (-thing.model.size[2] / light.sun[2])
        hull = cv2.convexHull(np.array([*thing.footprint, *(thing.footprint + shift)], np.float32))
        _fill_ground(stage.camera, cast, hull.swapaxes(0, 1), 255)
        if thing.category:
            _fill_ground(stage.camera, contact, thing.footprint[None], 255)
    cast, contact = (cv2.GaussianBlur(layer, None, 0.006 * width) for layer in (cast, contact))
    shadow = np.maximum(cast * (light.shadow / 255), contact * (CONTACT_SHADOW / 255))
    stains = cv2.resize(stage.site.normal(1, 0.04, (24, 12)), (width, height))
    clear = np.exp(-depth / light.visibility)[:, None]
    gain, haze = stains * (1 - shadow) * clear, (1 - clear)[..., None] * horizon
    image[top:] = np.clip(image * gain[..., None] + haze, 0, 255)[top:]
    return image


def _paint_roads(stage: Stage, image: np.ndarray, top: int) -> None:
    """Soil, pavements, asphalt and markings into the rows of ``image`` from ``top`` on."""
    rng, light = stage.site, stage.light
    level = light.ambient + light.diffuse * light.sun[2]

    def strips(road: Road, spans: Sequence, rgb: Sequence[float]) -> None:
        """Rectangles (n, 4) of s0, s1, t0, t1."""
        corners = np.reshape(spans, (-1, 4))[:, [[0, 2], [1, 2], [1, 3], [0, 3]]]
        _fill_ground(stage.camera, image, road.place(corners), np.multiply(rgb, level).tolist())

    soil = ((104, 122, 78), (128, 124, 96), (150, 148, 142))[rng.integers(3)]
    image[top:] = np.multiply(soil, level)
    asphalt, white = [rng.uniform(72, 108)] * 3, [rng.uniform(205, 230)] * 3
    for margin, rgb in ((3.7, (166, 160, 152)), (0.25, (190, 190, 186)), (0, asphalt)):
        for road in stage.roads:  # layer by layer, so that the junction merges
            edge = road.half_width + margin
            strips(road, [*road.span, -edge, edge], rgb)
    for road in stage.roads:
        kerb, lines = road.half_width, LANE * np.arange(1, road.lanes)
        for a, b in ((road.span[0], road.gap[0]), (road.gap[1], road.span[1])):
            strips(road, [(a, b, t, t + 0.13) for t in (-0.2, 0.07)], (222, 176, 60))
            strips(road, [(a, b, t, t + 0.14) for t in (0.3 - kerb, kerb - 0.44)], white)
            dashes = [(s, t) for s in np.arange(a, b - 2.6, 6.0) for t in (*lines, *-lines)]
            strips(road, [(s, s + 2.6, t - 0.07, t + 0.07) for s, t in dashes], white)
        bars = np.arange(0.4 - kerb, kerb - 0.6, 1.0)
        for s in (road.gap[0] + 0.8, road.gap[1] - 4.2):
            strips(road, [(s, s + 3.4, t, t + 0.5) for t in bars], white)


def _expose(stage: Stage, image: np.ndarray, noise: np.random.Generator | None) -> np.ndarray:
    """Lamps, exposure, optics and noise, if it is given: (H, W, 3) uint8."""
    rng, width, lamps = stage.rng, stage.size[1], stage.light.lamps
    image = image.astype(np.float32)
    if lamps:  # what is as bright as a lamp shines over its surroundings
        bright = image * (image.max(-1, keepdims=True) > 225)
        image += cv2.GaussianBlur(bright, None, 0.01 * width)
    image *= (rng.uniform(0.82, 1.14) * rng.normal(1, 0.025, 3)).astype(np.float32)
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, None, rng.uniform(0.3, 0.8) * width / 512)
    level = np.float32(rng.uniform(0.5, 3.5) + 2 * lamps)
    if noise is not None:
        image += level * noise.standard_normal((*stage.size, 1), np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _label(stage: Stage, index: int, ids: np.ndarray) -> SceneObject | None:
    """Box and states of a participant, None when too little of it is to be seen."""
    thing, mask = stage.things[index], np.zeros_like(ids)
    paint(mask, thing.patches, 1)
    present, visible = np.count_nonzero(mask), np.count_nonzero(mask & (ids == index + 1))
    if visible < max(1, MIN_VISIBLE * present):
        return None
    whole = bounds(thing.patches)
    inside = np.clip(whole, 0, ids.shape[::-1])
    cut = 1 - np.diff(inside, axis=0).prod() / np.diff(whole, axis=0).prod()
    if cut > 0:  # what is left may be narrower than the clipped bounds
        x, y, w, h = cv2.boundingRect(mask)
        inside = np.array([[x, y], [x + w, y + h]])
    (x, y), half = thing.position.tolist(), thing.model.size[2] / 2
    return SceneObject(
        category=str(thing.category),
        box=tuple((inside / SCALE).ravel().tolist()),
        occluded_state=_state(1 - visible / present, 0.04),
        truncated_state=_state(cut, 0.01),
        location=(y, -x, half),
        dimensions=thing.model.size,
        rotation=math.remainder(thing.heading - math.pi / 2, 2 * math.pi),
        depth=float(stage.camera.project(np.array([x, y, half]))[1]),
        colour=thing.model.colour,
    )


def _state(share: float, negligible: float) -> int:
    return 0 if share <= negligible else 1 if share < 0.5 else 2

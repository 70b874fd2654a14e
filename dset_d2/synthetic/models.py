"""Traffic participants and street furniture as solids; each function builds one at random.

Every category favours colours of its own, as fleets do, so that a small detector learns them in
minutes; street furniture borrows them all.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .drawing import Colour, Face, Model, Rod

Points = Sequence[tuple[float, float]]

GLASS, TYRE, HUB, DARK = (48, 58, 70), (24, 24, 26), (128, 130, 134), (38, 39, 42)
HEADLIGHT, TAILLIGHT, PALE, SKIN = (255, 246, 222), (236, 24, 26), (232, 232, 230), (196, 150, 122)
CARS = [(30, 31, 34), (160, 164, 170), (92, 96, 104), (165, 32, 36), (118, 84, 58)]
CAR_COLOURS = ("black", "silver", "grey", "red", "brown")
VANS, BUSES, CABS, CARGO = [(234, 235, 233)], [(50, 150, 84)], [(222, 156, 36)], [(66, 92, 145)]
CLOTHES = [(40, 42, 50), (56, 84, 145), (226, 224, 218), (92, 96, 88), (130, 74, 132)]
YELLOW, RED, ORANGE = [(200, 222, 52)], [(212, 48, 38)], [(240, 84, 24)]
TROUSERS, HAIR = [(34, 38, 54), (60, 62, 66), (110, 98, 80)], [(30, 26, 24), (90, 80, 70)]
LEAVES = [(50, 80, 40), (84, 110, 52), (150, 120, 50)]
FRAMES, HELMETS = [(200, 40, 44), (40, 110, 190), (250, 190, 30)], [PALE, (240, 200, 40)]


class Decal(NamedTuple):
    """A convex patch on a prism.

    ``face`` is the index of the profile's edge, with points (u, v) in the unit square, u to the
    model's left, v along the edge; or None for both sides, with points (x, z) in metres.
    """

    face: int | None
    points: Points
    colour: Colour
    lamp: bool = False


def prism(
    profile: Points, half_width: float, colour: Colour, decals: Sequence[Decal] = (),
    taper: float = 0,
) -> list[Face]:  # fmt: skip
    """A convex x-z profile, counter-clockwise, stretched to both sides along y.

    The half width shrinks by ``taper`` per metre of height.
    """
    low = min(z for _, z in profile)

    def side(points: Points, sign: int) -> np.ndarray:
        x, z = np.array(points, float).T
        return np.stack([x, sign * (half_width - taper * (z - low)), z], 1)[::-sign]

    right, left = side(profile, -1), side(profile, 1)[::-1]
    faces = []
    rings = zip(right, left, np.roll(left, -1, 0), np.roll(right, -1, 0))
    for index, (a, b, c, d) in enumerate(rings):
        faces.append(Face(np.array([a, b, c, d]), colour))
        for decal in decals:
            if decal.face == index:
                u, v = np.array(decal.points)[:, :, None].swapaxes(0, 1)
                spot = (a * (1 - u) + b * u) * (1 - v) + (d * (1 - u) + c * u) * v
                faces.append(Face(spot, decal.colour, decal.lamp))
    for sign in (-1, 1):
        faces.append(Face(side(profile, sign), colour))
        faces += [Face(side(d.points, sign), d.colour) for d in decals if d.face is None]
    return faces


def pick(rng: np.random.Generator, colours: Sequence[Colour], spread: float = 10.0) -> Colour:
    """One of ``colours``, a little lighter or darker."""
    colour = np.add(colours[int(rng.integers(len(colours)))], rng.normal(0, spread))
    return tuple(np.clip(colour, 8, 245).tolist())


def name_colour(paint: Colour) -> str:
    """The nearest one of ``CAR_COLOURS``."""
    return min(zip(CAR_COLOURS, CARS), key=lambda named: math.dist(named[1], paint))[0]


def quad(x0: float, x1: float, z0: float, z1: float) -> Points:
    return [(x0, z0), (x1, z0), (x1, z1), (x0, z1)]


def ring(x: float, z: float, radius: float) -> Points:
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False).tolist()
    return [(x + radius * math.cos(a), z + radius * math.sin(a)) for a in angles]


def wheels(radius: float, *at: float) -> list[Decal]:
    sizes = ((radius, TYRE), (0.55 * radius, HUB))
    return [Decal(None, ring(x, radius, size), colour) for x in at for size, colour in sizes]


def lamps(face: int, low: float, high: float, colour: Colour) -> list[Decal]:
    """Lamps in both corners of an edge's face, between ``low`` and ``high`` along the edge."""
    return [Decal(face, quad(u, u + 0.2, low, high), colour, True) for u in (0.03, 0.77)]


def car(rng: np.random.Generator) -> Model:
    length, width, height = rng.uniform((4.1, 1.76, 1.42), (4.8, 1.9, 1.7)).tolist()
    half, belt, paint = length / 2, 0.57 * height, pick(rng, CARS, 14)
    rear = -0.82 if height > 1.55 else -0.5  # tall ones carry their roof to the tail
    body = prism(
        [(-half + 0.1, 0.22), (half - 0.1, 0.22), (half, 0.42), (half - 0.14, belt - 0.14),
         (0.4 * half, belt), (-half + 0.04, belt), (-half, 0.5)],
        width / 2, paint, [
            Decal(2, quad(0.3, 0.7, 0.1, 0.6), DARK), *lamps(2, 0.25, 0.85, HEADLIGHT),
            *lamps(5, 0.15, 0.8, TAILLIGHT), *wheels(0.34, -0.58 * half, 0.6 * half)])  # fmt: skip
    tail, top = (rear - 0.2) * half, height - 0.09
    cabin = prism(
        [(tail, belt), (0.44 * half, belt), (0.1 * half, height), (rear * half, height)],
        width / 2 - 0.06, paint, [
            Decal(1, quad(0.07, 0.93, 0.06, 0.94), GLASS),
            Decal(3, quad(0.09, 0.91, 0.1, 0.85), GLASS),
            Decal(None, [(tail + 0.22, belt + 0.06), (0.44 * half - 0.16, belt + 0.06),
                         (0.1 * half, top), (rear * half + 0.08, top)], GLASS)], 0.3)  # fmt: skip
    return Model([[body], [cabin]], (length, width, height), name_colour(paint))


def van(rng: np.random.Generator) -> Model:
    length, width, height = rng.uniform((4.8, 1.9, 2.1), (5.5, 2.05, 2.45)).tolist()
    half, low, top = length / 2, 0.55 * height, 0.87 * height
    window = [(0.3 * half, low), (0.74 * half, low), (0.58 * half, top), (0.3 * half, top)]
    body = prism(
        [(-half, 0.25), (half - 0.1, 0.25), (half, 0.45), (half - 0.06, 0.4 * height),
         (0.8 * half, 0.53 * height), (0.56 * half, height), (-half + 0.05, height)],
        width / 2, pick(rng, VANS), [
            Decal(2, quad(0.28, 0.72, 0.2, 0.7), DARK), *lamps(2, 0.3, 0.9, HEADLIGHT),
            Decal(4, quad(0.07, 0.93, 0.02, 0.9), GLASS), Decal(None, window, GLASS),
            Decal(6, quad(0.14, 0.86, 0.1, 0.4), GLASS), *lamps(6, 0.55, 0.8, TAILLIGHT),
            *wheels(0.36, -0.6 * half, 0.64 * half)], 0.07)  # fmt: skip
    return Model([[body]], (length, width, height))


def bus(rng: np.random.Generator) -> Model:
    length, width, height = rng.uniform((9.0, 2.45, 3.0), (11.5, 2.55, 3.3)).tolist()
    half = length / 2
    panes = [Decal(None, quad(x * half, (x + 0.22) * half, 1.45, 0.86 * height), GLASS)
             for x in np.linspace(-0.95, 0.7, 7).tolist()]  # fmt: skip
    body = prism(quad(-half, half, 0.3, height), width / 2, pick(rng, BUSES), [
        Decal(1, quad(0.06, 0.94, 0.34, 0.9), GLASS), *lamps(1, 0.1, 0.22, HEADLIGHT),
        Decal(3, quad(0.15, 0.85, 0.1, 0.42), GLASS), *lamps(3, 0.6, 0.85, TAILLIGHT),
        Decal(None, quad(-half, half, 0.95, 1.3), PALE), *panes,
        *wheels(0.5, -0.5 * half, 0.55 * half)])  # fmt: skip
    return Model([[body]], (length, width, height))


def truck(rng: np.random.Generator) -> Model:
    length, width, height = rng.uniform((6.2, 2.3, 2.8), (9.0, 2.5, 3.5)).tolist()
    half, back, roof, paint = length / 2, length / 2 - 1.9, 2.45, pick(rng, CARGO)
    cab = prism(
        [(back + 0.1, 0.45), (half, 0.45), (half, 1.2), (half - 0.2, roof), (back + 0.1, roof)],
        width / 2 - 0.08, pick(rng, CABS), [
            Decal(1, quad(0.24, 0.76, 0.3, 0.85), DARK), *lamps(1, 0.1, 0.45, HEADLIGHT),
            Decal(2, quad(0.06, 0.94, 0.05, 0.85), GLASS),
            Decal(None, quad(half - 1.3, half - 0.3, 1.35, 2.1), GLASS),
            *wheels(0.5, half - 1.0)], 0.04)  # fmt: skip
    cargo = prism(quad(-half, back, 0.5, height), width / 2, paint, [
        *lamps(3, 0.82, 0.97, TAILLIGHT), Decal(None, quad(-half, back, 0.5, 0.95), DARK),
        *(Decal(None, quad(x, x + 0.12, 1.05, height), DARK)
          for x in np.arange(-half + 0.7, back - 0.2, 1.6)),
        *wheels(0.5, -0.66 * half, 1.15 - 0.66 * half)])  # fmt: skip
    return Model([[cab, cargo]], (length, width, height))


def person(
    rng: np.random.Generator, hip: float, feet: Points, hands: Points, bend: float, lean: float,
    coats: Sequence[Colour], hats: Sequence[Colour],
) -> list[list[Rod]]:  # fmt: skip
    """Somebody whose hip is at (0, 0, ``hip``) and whose head ends 0.84 m above it.

    ``feet`` and ``hands`` are (x, z) of the left and the right one; ``bend`` and ``lean`` say how
    far the knees and the neck are ahead of a straight body. All in metres.
    """
    coat, trousers, neck = pick(rng, coats), pick(rng, TROUSERS), hip + 0.56
    legs, arms = [], []
    for side, (x, z), hand in zip((1, -1), feet, hands):
        knee = (x / 2 + bend, 0.13 * side, (hip + z + bend) / 2)
        legs.append(Rod([(0, 0.1 * side, hip), knee, (x, 0.1 * side, z)], 0.15, trousers))
        elbow = (lean, 0.2 * side, neck - 0.06)
        arms.append(Rod([elbow, (hand[0], 0.25 * side, hand[1])], 0.1, coat))
    torso = Rod([(0.02, 0, hip + 0.12), (lean, 0, neck - 0.12)], 0.38, coat)
    face = Rod([(lean + 0.05, 0, hip + 0.69)], 0.25, SKIN)
    hat = Rod([(lean + 0.01, 0, hip + 0.72)], 0.25, pick(rng, hats))
    return [legs, [torso], [*arms, face], [hat]]


def pedestrian(rng: np.random.Generator) -> Model:
    hip, step = rng.uniform((0.74, 0.05), (0.96, 0.3)).tolist()
    feet, hands = [(step, 0.05), (-step, 0.05)], [(-0.8 * step, hip), (0.8 * step, hip)]
    walker = person(rng, hip, feet, hands, 0.05, 0, CLOTHES, HAIR)
    return Model(walker, (0.65, 0.6, hip + 0.84))


def rider(
    rng: np.random.Generator, seat: float, frame: Points, thickness: float, rim: float,
    foot: tuple[float, float], coats: Sequence[Colour], hats: Sequence[Colour],
) -> Model:  # fmt: skip
    """Somebody on two wheels; the ``frame`` is one tube of this ``thickness``, in metres."""
    circle = ring(0, 0.33, 0.33 - rim / 2)
    vehicle = [Rod([(x + c, 0, z) for c, z in [*circle, circle[0]]], rim, TYRE)
               for x in (-0.55, 0.57)]  # fmt: skip
    vehicle.append(Rod([(x, 0, z) for x, z in frame], thickness, pick(rng, FRAMES)))
    feet, hands = [foot, (foot[0] + 0.05, foot[1] + 0.12)], [(0.45, seat + 0.2)] * 2
    body = person(rng, seat, feet, hands, 0.22, rng.uniform(0, 0.2), coats, hats)
    return Model([vehicle, *body], (1.8, 0.6, seat + 0.84))


def cyclist(rng: np.random.Generator) -> Model:
    frame = [(-0.55, 0.34), (-0.14, 0.84), (0.4, 0.82), (0.0, 0.3), (-0.14, 0.84), (0.4, 0.82),
             (0.57, 0.34), (0.4, 0.95), (0.44, 1.1)]  # fmt: skip
    return rider(rng, rng.uniform(0.92, 1.0), frame, 0.07, 0.07, (0.05, 0.2), YELLOW, HAIR)


def motorcyclist(rng: np.random.Generator) -> Model:
    frame = [(-0.7, 0.62), (-0.1, 0.5), (0.3, 0.35), (0.45, 0.9)]
    return rider(rng, rng.uniform(0.76, 0.84), frame, 0.32, 0.2, (0.3, 0.36), RED, HELMETS)


def traffic_cone(rng: np.random.Generator) -> Model:
    height, orange = rng.uniform(0.8, 1.05), pick(rng, ORANGE)
    rings = [
        [Rod([(0, 0, z * height), (0, 0, (z + 0.14) * height)], 0.5 - 0.45 * z, colour)]
        for z, colour in zip((0.2, 0.36, 0.52, 0.68, 0.82), (orange, PALE) * 3)
    ]
    return Model(rings, (0.44, 0.44, height))


def crowd(rng: np.random.Generator) -> Model:
    """People too many and too close to tell apart."""
    bodies, heads = [], []
    for _ in range(rng.integers(7, 12)):
        x, y, top = rng.uniform((-0.7, -2, 1.5), (0.7, 2, 1.8)).tolist()
        bodies.append(Rod([(x, y, 0.2), (x, y, top - 0.4)], 0.42, pick(rng, CLOTHES)))
        heads.append(Rod([(x, y, top - 0.13)], 0.26, HAIR[1]))
    return Model([bodies, heads], (1.8, 4.6, 1.8))


def tree(rng: np.random.Generator) -> Model:
    height, spread = rng.uniform((3.2, 1.3), (6.5, 2.4)).tolist()
    leaf, centre = pick(rng, LEAVES), (0, 0, height)
    spots = centre + rng.uniform(-0.75, 0.75, (14, 3)) * spread
    leaves = [Rod([spot], 0.75 * spread, pick(rng, [leaf], 14)) for spot in spots.tolist()]
    trunk = Rod([(0, 0, 0), centre], 0.24, (84, 68, 54))
    return Model([[trunk], leaves], (1.6, 1.6, height + spread))


def post(rng: np.random.Generator) -> Model:
    """A bollard, with the proportions of a person or a cone, a sign or a lamp post."""
    height = (1.2, 3.2, 8.5)[rng.integers(3)] * rng.uniform(0.7, 1.3)
    pole = Rod([(0, 0, 0), (0, 0, height)], rng.uniform(0.12, 0.25), pick(rng, CARS))
    half = rng.uniform(0.25, 0.9) if 2 < height < 5 else 0.1
    board = prism(quad(-0.03, 0.03, 0.75 * height, height), half, pick(rng, FRAMES))
    return Model([[pole], [board]], (0.3, 0.3, height))

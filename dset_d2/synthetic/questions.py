"""Questions about generated scenes, each with an answer of one word."""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from .models import CAR_COLOURS
from .scenes import CATEGORIES, SceneObject

NAMES = {name: {"Trafficcone": "cone"}.get(name, name.lower()) for name in CATEGORIES}
NUMBERS = ("zero", "one", "two", "three", "four", "many")
KINDS = ("exists", "count", "side", "nearest", "colour")
CROWD = "PedestrianIgnore"  # pedestrians that nobody counted

# Every word of a question or an answer; nouns have one form.
WORDS = tuple(
    dict.fromkeys(
        (
            *"is there a count every on which side is the nearest what is nearest colour".split(),
            *"yes no left right nothing".split(),
            *NUMBERS,
            *NAMES.values(),
            *CAR_COLOURS,
        )
    )
)


class Participant(NamedTuple):
    """A labelled participant: its DAIR-V2X type, its box (xmin, ymin, xmax, ymax) in pixels, how
    far from the camera it stands, in metres, and a car's colour."""

    category: str
    box: tuple[float, float, float, float]
    distance: float
    colour: str | None = None


class TextQuestion(NamedTuple):
    """Words, separated by spaces, the word that answers them, and one of ``KINDS``."""

    text: str
    answer: str
    kind: str


def participants(objects: Sequence[SceneObject]) -> list[Participant]:
    """Those of a scene."""
    return [
        Participant(one.category, one.box, math.hypot(*one.location[:2]), one.colour)
        for one in objects
    ]


def mirrored(seen: Sequence[Participant], width: int) -> list[Participant]:
    """The participants of an image that is mirrored, left for right."""
    return [p._replace(box=(width - p.box[2], p.box[1], width - p.box[0], p.box[3])) for p in seen]


def ask(seen: Sequence[Participant], width: int, rng: random.Random) -> list[TextQuestion]:
    """Questions about an image of that width in pixels, in random order.

    As many say yes as no, and at most one count is zero. Pedestrians are not asked for where a
    crowd stands, nor is what is nearest if that is a crowd. Only cars have several colours.
    """
    categories = [p.category for p in seen]
    unknown = {"Pedestrian"} if CROWD in categories else set()
    present = sorted(set(categories) & set(CATEGORIES) - unknown)
    absent = sorted(set(CATEGORIES) - set(categories) - unknown)
    rng.shuffle(present)
    rng.shuffle(absent)
    asked = []
    for category in (*present[:2], *absent[: min(2, len(present))]):
        answer = "yes" if category in present else "no"
        asked.append(TextQuestion(f"is there a {NAMES[category]}", answer, "exists"))
    for category in (*present[-3:], *absent[-1:]):
        number = NUMBERS[min(categories.count(category), len(NUMBERS) - 1)]
        asked.append(TextQuestion(f"count every {NAMES[category]}", number, "count"))
    nearest = {p.category: p for p in sorted(seen, key=distance, reverse=True)}
    for category in present[1:3]:
        left, _, right, _ = nearest[category].box
        side = "left" if left + right < width else "right"
        text = f"on which side is the nearest {NAMES[category]}"
        asked.append(TextQuestion(text, side, "side"))
    colour = nearest["Car"].colour if "Car" in nearest else None
    if colour:
        asked.append(TextQuestion("what colour is the nearest car", colour, "colour"))
    first = min(seen, key=distance).category if seen else "nothing"
    if first != CROWD:
        asked.append(TextQuestion("what is nearest", NAMES.get(first, first), "nearest"))
    rng.shuffle(asked)
    return asked


def distance(participant: Participant) -> float:
    return participant.distance

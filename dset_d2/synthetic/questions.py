"""Questions about generated scenes, each with an answer of one word."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .scenes import CATEGORIES

NAMES = {name: {"Trafficcone": "cone"}.get(name, name.lower()) for name in CATEGORIES}
NUMBERS = ("zero", "one", "two", "three", "four", "many")
KINDS = ("exists", "count", "side", "nearest")
CROWD = "PedestrianIgnore"  # pedestrians that nobody counted

# Every word of a question or an answer; nouns have one form.
WORDS = tuple(
    dict.fromkeys(
        (
            *"is there a count every on which side is the nearest what is nearest".split(),
            *"yes no left right nothing".split(),
            *NUMBERS,
            *NAMES.values(),
        )
    )
)


class Participant(NamedTuple):
    """A labelled participant: its DAIR-V2X type, its box (xmin, ymin, xmax, ymax) in pixels, and
    how far from the camera it stands, in metres."""

    category: str
    box: tuple[float, float, float, float]
    distance: float


class TextQuestion(NamedTuple):
    """Words, separated by spaces, the word that answers them, and one of ``KINDS``."""

    text: str
    answer: str
    kind: str


def read_labels(file: Path) -> list[Participant]:
    """The participants of a DAIR-V2X label file."""
    found = []
    for entry in json.loads(file.read_text()):
        xmin, ymin, xmax, ymax = (float(entry["2d_box"][k]) for k in "xmin ymin xmax ymax".split())
        place = entry["3d_location"]
        distance = math.hypot(float(place["x"]), float(place["y"]))
        found.append(Participant(entry["type"], (xmin, ymin, xmax, ymax), distance))
    return found


def mirrored(participants: Sequence[Participant], width: int) -> list[Participant]:
    """The participants of an image that is mirrored, left for right."""
    return [
        p._replace(box=(width - p.box[2], p.box[1], width - p.box[0], p.box[3]))
        for p in participants
    ]


def ask(participants: Sequence[Participant], width: int, rng: random.Random) -> list[TextQuestion]:
    """Questions about an image of that width in pixels, in random order.

    Of each kind there are as many that say yes as no, and at most one count is zero. Pedestrians
    are not asked for where a crowd stands, nor is what is nearest if that is a crowd.
    """
    categories = [p.category for p in participants]
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
    for category in present[1:3]:
        nearest = min((p for p in participants if p.category == category), key=distance)
        side = "left" if nearest.box[0] + nearest.box[2] < width else "right"
        text = f"on which side is the nearest {NAMES[category]}"
        asked.append(TextQuestion(text, side, "side"))
    first = min(participants, key=distance).category if participants else "nothing"
    if first != CROWD:
        asked.append(TextQuestion("what is nearest", NAMES.get(first, first), "nearest"))
    rng.shuffle(asked)
    return asked


def distance(participant: Participant) -> float:
    return participant.distance

"""Questions about generated scenes: what is asked, and that the answers are right."""

import math
import random

from dset_d2.synthetic.models import CAR_COLOURS
from dset_d2.synthetic.questions import KINDS, WORDS, Participant, ask, mirrored, participants
from dset_d2.synthetic.scenes import render_scene


def participant(category, left, distance, colour=None) -> Participant:
    return Participant(category, (left, 10.0, left + 20.0, 30.0), distance, colour)


SCENE = [
    participant("Car", 10, 30.0, "black"),
    participant("Car", 60, 12.0, "red"),
    participant("Trafficcone", 5, 8.0),
    *[participant("Pedestrian", x, 20.0 + x) for x in (10, 20, 30, 40, 50, 60)],
]


def answers(scene, width=100, seeds=40) -> dict[str, str]:
    """All questions that are ever asked, with their answers, which depend on no chance."""
    found: dict[str, str] = {}
    for seed in range(seeds):
        for asked in ask(scene, width, random.Random(seed)):
            assert found.setdefault(asked.text, asked.answer) == asked.answer
            assert asked.kind in KINDS
            assert set(asked.text.split()) | {asked.answer} <= set(WORDS)
    return found


def test_answers_are_what_the_labels_say():
    found = answers(SCENE)
    assert found["is there a car"] == "yes" and found["is there a bus"] == "no"
    assert found["count every car"] == "two" and found["count every cone"] == "one"
    assert found["count every pedestrian"] == "many" and found["count every bus"] == "zero"
    side = "on which side is the nearest"
    assert found[f"{side} car"] == "right"  # the other one is farther away
    assert found[f"{side} cone"] == found[f"{side} pedestrian"] == "left"
    assert found["what is nearest"] == "cone"
    assert found["what colour is the nearest car"] == "red"
    assert not any(text.startswith(side) and text.endswith("bus") for text in found)


def test_as_many_say_yes_as_no_and_the_same_seed_asks_the_same():
    for seed in range(20):
        asked = ask(SCENE, 100, random.Random(seed))
        exists = [question.answer for question in asked if question.kind == "exists"]
        assert sorted(exists) == ["no", "no", "yes", "yes"]
        assert sum(question.answer == "zero" for question in asked) == 1
        assert asked == ask(SCENE, 100, random.Random(seed))
        assert len({question.text for question in asked}) == len(asked)


def test_nobody_asks_for_what_was_not_labelled():
    crowded = [*SCENE, participant("PedestrianIgnore", 40, 5.0)]
    found = answers(crowded)
    assert not any(text.endswith("pedestrian") for text in found)
    assert "what is nearest" not in found
    empty = answers([])
    assert empty["what is nearest"] == "nothing"
    assert set(empty.values()) == {"nothing", "zero"}


def test_a_mirrored_scene_swaps_left_and_right_only():
    before, after = answers(SCENE), answers(mirrored(SCENE, 100))
    swap = {"left": "right", "right": "left"}
    assert after == {text: swap.get(answer, answer) for text, answer in before.items()}


def test_participants_are_those_of_the_scene():
    objects = [item for seed in range(6) for item in render_scene(seed, 96, 160).objects]
    assert len({item.category for item in objects}) > 2
    for one, item in zip(participants(objects), objects, strict=True):
        assert (one.category, one.box, one.colour) == (item.category, item.box, item.colour)
        assert one.distance == math.hypot(*item.location[:2])
        assert (one.colour in CAR_COLOURS) == (one.category == "Car")

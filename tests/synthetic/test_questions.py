"""Questions about generated scenes: what is asked, and that the answers are right."""

import json
import math
import random

import pytest

from dset_d2.synthetic.dataset import to_dair
from dset_d2.synthetic.questions import KINDS, WORDS, Participant, ask, mirrored, read_labels
from dset_d2.synthetic.scenes import render_scene


def participant(category, left, distance) -> Participant:
    return Participant(category, (left, 10.0, left + 20.0, 30.0), distance)


SCENE = [
    participant("Car", 10, 30.0),
    participant("Car", 60, 12.0),
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


def test_labels_are_read_as_they_were_drawn(tmp_path):
    objects = [item for seed in range(4) for item in render_scene(seed, 96, 160).objects]
    assert len({item.category for item in objects}) > 2
    file = tmp_path / "label.json"
    file.write_text(json.dumps([to_dair(item) for item in objects]))
    for read, item in zip(read_labels(file), objects, strict=True):
        assert read.category == item.category
        assert read.box == pytest.approx(item.box, abs=1e-4)
        assert read.distance == pytest.approx(math.hypot(*item.location[:2]), abs=1e-4)

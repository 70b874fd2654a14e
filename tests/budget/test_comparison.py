"""Controllers beside each other, where the best choices are known."""

import json

import numpy as np
import pytest
import torch

from dset_d2.budget import GRPOConfig, Outcomes
from dset_d2.budget.comparison import (
    CURVES,
    compare,
    conclusions,
    draw_curves,
    draw_tradeoff,
    overhead,
    spaced_budgets,
    teach,
)

from .toy import outcomes, table

TAUGHT = (11.0, 28.0, 43.0)
CONFIG = GRPOConfig(steps=120, lr=1e-2)


def score(found: Outcomes, settings: torch.Tensor) -> float:
    return 100 * float(found.quality[torch.arange(len(found.items)), settings].mean())


def test_budgets_lie_over_the_tables_range_and_others_between_them():
    seen, unseen = spaced_budgets(table(), 3)
    low, high = table().range()
    assert seen[0] == pytest.approx(1.02 * low) and seen[-1] == pytest.approx(1.02 * high)
    assert (np.diff(sorted([*seen, *unseen])) > 0).all() and len(unseen) == 2
    assert all(a < b < c for a, b, c in zip(seen, unseen, seen[1:]))


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controllers")
    return folder, teach(outcomes().run_all(), TAUGHT, folder, CONFIG)


def test_what_is_taught_is_kept(taught):
    folder, controllers = taught
    assert list(controllers) == ["static", "regression", "GRPO", "GRPO, notes"]
    file = folder / "quality" / "grpo.pth"
    before = file.read_bytes(), len(json.loads((folder / "quality" / "grpo.json").read_text()))
    again = teach(outcomes().run_all(), TAUGHT, folder, CONFIG)
    after = file.read_bytes(), len(json.loads((folder / "quality" / "grpo.json").read_text()))
    assert before[1] == after[1] == CONFIG.steps
    weights = controllers["GRPO"].state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in again["GRPO"].state_dict().items())
    assert set(CURVES) <= set(json.loads((folder / "quality" / "grpo.json").read_text())[0])
    assert len(draw_curves([folder]).axes) == len(CURVES)


def test_a_comparison_knows_who_chooses_best(taught):
    _, controllers = taught
    found = outcomes().run_all()
    rows = compare(found, controllers, ([22.0, 43.0], [26.0]), 0, score, timed=4)
    by = {(row["who"], row["budget"]): row for row in rows}
    assert len(rows) == 3 * len({row["who"] for row in rows}) == 21
    # At 26 ms either the large input or the deep model fits, and controllers see which is needed.
    assert by["GRPO", 26.0]["score"] > by["static", 26.0]["score"] + 5
    assert not by["GRPO", 26.0]["seen"] and by["GRPO", 22.0]["seen"]
    for (who, budget), row in by.items():
        assert who == "full" or row["score"] <= by["oracle", budget]["score"] + 1e-4
        assert row["measured_ms"] > 0 and 0 <= row["violations"] <= 1
    # The same mix of settings, dealt to other items.
    mixed, chosen = by["random", 26.0], by["GRPO", 26.0]
    assert mixed["expected_ms"] == pytest.approx(chosen["expected_ms"])
    assert mixed["score"] < chosen["score"]
    assert set(overhead(found, controllers)) == set(controllers)
    assert draw_tradeoff(rows, "quality").axes[0].get_ylabel() == "quality, %"


def test_conclusions_are_means_over_budgets_and_seeds():
    def row(seed, budget, who, score, measured):
        return dict(
            seed=seed, budget=budget, who=who, score=score, measured_ms=measured, violations=0.0
        )

    rows = [row(s, b, "full", 50.0, 40.0) for s in (0, 1) for b in (10.0, 20.0)]
    rows += [row(s, b, "static", 40.0 + b / 2, b) for s in (0, 1) for b in (10.0, 20.0)]
    for seed, gain in ((0, 1.0), (1, 3.0)):
        rows += [row(seed, 10.0, "clever", 45.0 + gain, 10.0)]
        rows += [row(seed, 20.0, "clever", 50.0 - gain / 20, 16.0)]
    full, static, clever = conclusions(rows)
    assert (static["to_static"], static["spread"], static["saved"]) == (0, 0, 0.5)
    assert clever["to_static"] == pytest.approx((0.95 + 2.85) / 4)
    assert clever["spread"] == pytest.approx((2.85 - 0.95) / 2)
    assert clever["least"] == pytest.approx(-0.1) and clever["saved"] == pytest.approx(0.6)
    assert full["saved"] == 0
    worse = [x | {"score": 1.0} if x["who"] == "clever" else x for x in rows]
    assert conclusions(worse)[-1]["saved"] is None

"""Who chooses settings."""

import pytest
import torch

from dset_d2.budget import (
    BestStatic,
    QualityRegression,
    Space,
    TwoStagePolicy,
    feasible_settings,
    grid,
    load_controller,
    matched_random,
    oracle,
    save_controller,
)
from dset_d2.budget.controller import ridge

from .toy import Toy, optimum, outcomes

BUDGETS = (9.0, 12.0, 22.0, 26.0, 50.0)


def test_what_is_feasible_and_the_fastest_in_any_case():
    p95 = torch.tensor([[40.0, 20.0, 10.0], [8.0, 6.0, 7.0]])
    found = feasible_settings(p95, torch.tensor([15.0, 5.0]))
    assert found.tolist() == [[False, False, True], [False, True, False]]


def test_settings_have_an_order():
    space = Space(Toy.settings, "size")
    assert space.settings[0] == {"size": 2, "depth": 2} and space.tiers == [2, 1]
    assert space.tier_of.tolist() == [0, 0, 1, 1]
    assert space.complexity.tolist() == [1, 0.75, 0.75, 0.5]
    assert space.first(1)["size"] == 1
    assert grid({"a": (1, 3, 2)}) == [{"a": 3}, {"a": 2}, {"a": 1}]
    with pytest.raises(ValueError, match="must all have the same knobs, 'size' among them"):
        Space([{"size": 1}, {"depth": 1}], "size")


def test_each_pair_runs_once_and_a_tier_begins_once(tmp_path):
    subject = Toy()
    found = outcomes(subject, 8, file=tmp_path / "outcomes.npz").run_all()
    assert (subject.begun, subject.finished) == (8 * 2, 8 * 4)
    assert found.quality[3].tolist() == pytest.approx([1.0, 0.6, 0.6, 0.2])
    again = outcomes(subject, 8, file=tmp_path / "outcomes.npz")
    assert torch.equal(again.run_all().quality, found.quality)
    assert torch.equal(again.look(torch.arange(8)), found.look(torch.arange(8)))
    assert subject.finished == 8 * 4
    with pytest.raises(ValueError, match="outcomes.npz: holds outcomes of other items"):
        outcomes(subject, 9, file=tmp_path / "outcomes.npz")


def test_the_best_static_setting_of_each_budget():
    found = outcomes().run_all()
    items = torch.arange(64)
    # The larger input and the deeper model are worth the same, but the former takes longer.
    for budget, setting in zip(BUDGETS, (3, 3, 2, 1, 0)):
        chosen = BestStatic.fit(found).decide(found, items, torch.full((64,), budget))
        assert (chosen == setting).all()


def test_regression_takes_the_best_of_what_fits():
    """Where one alone fits 26 ms, of a large input or a deep model, it takes what the item needs:
    the tier by what is known, the depth by the features."""
    found = outcomes().run_all()
    regression = QualityRegression.fit(found)
    items = torch.arange(64)
    for budget in BUDGETS:
        budgets = torch.full((64,), budget)
        chosen = regression.decide(found, items, budgets)
        assert (found.p95[items, chosen] <= budget).all() or budget < 10
        if budget >= 10:
            gap = optimum(found, budget) - found.quality[items, chosen]
            assert gap.max() < 1e-5, budget


def test_oracle_and_the_same_mix_by_chance():
    found = outcomes().run_all()
    feasible = feasible_settings(found.p95, torch.full((64,), 50.0))
    chosen = oracle(found.quality, found.p50, feasible)
    # Nothing needed, a large input, a deep model, or both: the fastest that has it.
    assert chosen[:4].tolist() == [3, 1, 2, 0]
    times = found.p95.clone()
    times[32:] += 1
    shuffled = matched_random(chosen, times, torch.Generator().manual_seed(0))
    assert not torch.equal(shuffled, chosen)
    for half in (slice(32), slice(32, 64)):
        assert torch.equal(shuffled[half].sort().values, chosen[half].sort().values)


def test_ridge_recovers_a_line_and_ignores_noise():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1]) + 5
    weights = torch.tensor([[2.0, 0.0], [0.3, -1.0], [5.0, 1.0]])
    y = x @ weights + 7 + 0.01 * torch.randn(400, 2, generator=generator)
    found = ridge(x, y)
    torch.testing.assert_close(found[:3], weights, rtol=0.02, atol=0.03)
    noise = torch.randn(30, 50, generator=generator)
    target = torch.randn(30, 1, generator=generator)
    assert ridge(noise, target)[:-1].abs().max() < 0.05


def policy_of(found, **settings) -> TwoStagePolicy:
    torch.manual_seed(0)
    return TwoStagePolicy.start(found, (10.0, 45.0), **settings)


def test_a_policy_starts_from_the_best_static_setting():
    found = outcomes().run_all()
    policy, static = policy_of(found), BestStatic.fit(found)
    items = torch.arange(64)
    for budget in BUDGETS:
        budgets = torch.full((64,), budget)
        expected = static.decide(found, items, budgets)
        assert torch.equal(policy.decide(found, items, budgets), expected)
        feasible = feasible_settings(found.p95, budgets)
        log_p = policy.log_probabilities(found.known, found.look(items), budgets, feasible)
        torch.testing.assert_close(log_p.exp().sum(1), torch.ones(64))
        assert (log_p.isfinite() == feasible).all()
        assert (log_p.argmax(1) == expected).all()


def test_probabilities_are_those_of_both_decisions():
    found = outcomes().run_all()
    policy = policy_of(found, trust=0.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_()
    budgets = torch.full((64,), 26.0)
    feasible = feasible_settings(found.p95, budgets)
    features = found.look(torch.arange(64))
    log_p = policy.log_probabilities(found.known, features, budgets, feasible)
    tiers = policy.tier_scores(found.known, budgets, feasible).softmax(1)
    for tier, members in enumerate(found.space.members):
        torch.testing.assert_close(log_p.exp()[:, members].sum(1), tiers[:, tier])
        scores = policy.setting_scores(
            features[:, tier], torch.full((64,), tier), budgets, feasible
        )
        scores = scores.masked_fill(~(feasible & members), -torch.inf)
        expected = tiers[:, tier, None] * scores.softmax(1)
        torch.testing.assert_close(log_p.exp()[:, members], expected[:, members])


@pytest.mark.parametrize("kind", [BestStatic, QualityRegression, policy_of])
def test_a_controller_comes_back_from_its_file(kind, tmp_path):
    found = outcomes().run_all()
    controller = kind(found) if kind is policy_of else kind.fit(found)
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter.normal_()
    save_controller(tmp_path / "controller.pth", controller)
    again = load_controller(tmp_path / "controller.pth")
    assert type(again) is type(controller)
    items = torch.arange(64)
    for budget in BUDGETS:
        budgets = torch.full((64,), budget)
        expected = controller.decide(found, items, budgets)
        assert torch.equal(again.decide(found, items, budgets), expected)
    torch.save({"model": {}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights.pth: not a controller"):
        load_controller(tmp_path / "weights.pth")

"""Training of the policy, where the best choices, and the gradients, are known."""

import itertools

import pytest
import torch

from dset_d2.budget import (
    GRPO,
    BestStatic,
    GRPOConfig,
    NotesReward,
    TwoStagePolicy,
    feasible_settings,
)
from dset_d2.budget.grpo import advantages, divergence, entropy, surrogate

from .toy import Toy, optimum, outcomes

RANGE = (10.5, 45.0)


def trainer(found=None, **settings) -> GRPO:
    torch.manual_seed(0)
    found = found or outcomes().run_all()
    settings = {"steps": 150, "lr": 1e-2} | settings
    policy = TwoStagePolicy.start(found, RANGE)
    return GRPO(policy, found, RANGE, GRPOConfig(**settings))


def test_it_finds_the_optimum_that_no_static_setting_has():
    grpo = trainer()
    found = grpo.outcomes
    policy, static = grpo.train(), BestStatic.fit(found)
    items = torch.arange(64)
    for budget in (12.0, 22.0, 26.0, 43.0):
        budgets = torch.full((64,), budget)
        chosen, fixed = (c.decide(found, items, budgets) for c in (policy, static))
        assert (found.p95[items, chosen] <= budget).all()
        best = optimum(found, budget).mean()
        assert found.quality[items, chosen].mean() > best - 0.01, budget
        if budget == 26:  # either the large input or the deep model fits
            assert found.quality[items, fixed].mean() < best - 0.05
    assert grpo.history[-1]["reward"] > grpo.history[0]["reward"]


def test_the_mean_of_all_groups_gradients_is_that_of_the_expected_reward():
    """But for a factor: a group's mean holds each of its own members."""
    torch.manual_seed(0)
    logits = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([0.3, 0.9, 0.1, 0.5], dtype=torch.float64)
    log_p = logits.log_softmax(1)
    (expected,) = torch.autograd.grad((log_p.exp() * worth).sum(), logits)
    group, total = 3, torch.zeros_like(logits)
    for drawn in itertools.product(range(4), repeat=group):
        chance = log_p.detach().exp()[0, list(drawn)].prod()
        drawn = torch.tensor([drawn])
        rewards = worth[drawn]
        advantage = rewards - rewards.mean(1, keepdim=True)
        present = logits.log_softmax(1)
        objective, _ = surrogate(present, present.detach(), drawn, advantage, clip=0.2)
        total += chance * torch.autograd.grad(objective.sum(), logits)[0]
    torch.testing.assert_close(total, expected * (1 - 1 / group))


def test_the_clip_holds_what_has_moved_far_enough():
    old = torch.tensor([[0.5, 0.5]]).log()
    new = torch.tensor([[0.8, 0.2]]).log().requires_grad_()
    drawn = torch.tensor([[0, 1]])
    for advantage, held in (([1.0, -1.0], 1.0), ([-1.0, 1.0], 0.0)):
        objective, share = surrogate(new, old, drawn, torch.tensor([advantage]), 0.2)
        (gradient,) = torch.autograd.grad(objective.sum(), new)
        assert share == held and bool(gradient.any()) == (not held)


def test_advantages_are_relative_and_groups_without_variance_teach_nothing():
    rewards = torch.tensor([[0.0, 1.0, 0.5], [0.7, 0.7, 0.7], [0.2, 0.4, 0.3]])
    found, teaching = advantages(rewards)
    assert teaching.tolist() == [True, False, True]
    assert not found[1].any()
    torch.testing.assert_close(found.sum(1), torch.zeros(3))
    torch.testing.assert_close(found[teaching].square().mean().sqrt(), torch.tensor(1.0))
    torch.testing.assert_close(found[0] / 5, found[2][[0, 1, 2]], rtol=0, atol=1e-6)


def test_entropy_and_divergence_where_some_things_are_impossible():
    log_p = torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]).log().requires_grad_()
    reference = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    found = entropy(log_p)
    expected = torch.distributions.Categorical(torch.tensor([0.25, 0.75])).entropy()
    torch.testing.assert_close(found, torch.stack([expected, torch.zeros(())]))
    distance = divergence(log_p, reference)
    pair = [torch.distributions.Categorical(torch.tensor(p)) for p in ([0.25, 0.75], [0.5, 0.5])]
    kl = torch.distributions.kl_divergence(*pair)
    torch.testing.assert_close(distance, torch.stack([kl, torch.zeros(())]))
    (found + distance).sum().backward()
    assert log_p.grad.isfinite().all()


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path):
    whole = trainer(steps=12)
    whole.train()
    first = trainer(steps=12)
    first.train(until=5)
    first.save(tmp_path)
    again = trainer(steps=12)
    again.load(tmp_path)
    assert again.step == 5
    again.train()
    assert again.history == whole.history
    for a, b in zip(again.policy.parameters(), whole.policy.parameters()):
        assert torch.equal(a, b)


def test_settings_run_when_they_are_drawn_and_never_twice():
    subject = Toy()
    grpo = trainer(outcomes(subject, 16), steps=40)
    grpo.train()
    shares = [row["executed"] for row in grpo.history]
    assert shares == sorted(shares) and 0.5 < shares[-1] <= 1
    assert subject.finished == int(grpo.outcomes.quality.isfinite().sum())


def test_budgets_are_drawn_from_a_list_or_a_range():
    generator = torch.Generator().manual_seed(0)
    listed = trainer(budgets=(20.0, 30.0)).draw_budgets(generator)
    assert set(listed.tolist()) == {20.0, 30.0}
    drawn = trainer(batch_size=500).draw_budgets(generator)
    assert RANGE[0] <= drawn.min() < 11 and 43 < drawn.max() <= RANGE[1]


def test_what_no_budget_fits_runs_the_fastest():
    found = outcomes().run_all()
    policy = trainer(found).policy
    feasible = feasible_settings(found.p95, torch.full((64,), 1.0))
    chosen = policy.decide(found, torch.arange(64), torch.full((64,), 1.0))
    assert (chosen == 3).all() and (feasible.sum(1) == 1).all()


def test_the_notes_reward_trains_too():
    found = outcomes().run_all()
    torch.manual_seed(0)
    grpo = GRPO(
        TwoStagePolicy.start(found, RANGE), found, RANGE, GRPOConfig(steps=5), NotesReward()
    )
    grpo.train()
    assert all(row["reward"] < row["quality"] for row in grpo.history)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size=1 must be at least 2"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must not be negative"),
        ({"budgets": (0.0,)}, r"budgets=\(0.0,\) must be positive"),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**settings)

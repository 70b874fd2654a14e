"""Experts of hidden units that are active together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dset_d2.analysis import count_flops
from dset_d2.modeling import FFN, Knobs, find_ffns, forward_context
from dset_d2.modeling.sparse import (
    MoE,
    MoEConfig,
    coactivation,
    report_coactivation,
    swap_ffn_for_moe,
)
from dset_d2.modeling.sparse.coactivation import (
    balanced_groups,
    capture_inputs,
    fit_router,
    initialize_from_coactivation,
    report_splits,
    split_by_coactivation,
)
from dset_d2.modeling.sparse.upcycling import FFNWeights, ffn_weights
from dset_d2.modeling.tokens import Padding, TokenMap

DIM, HIDDEN, GROUPS = 16, 48, 6


class Block(nn.Module):
    """A layer whose FFN the seam finds."""

    def __init__(self, ffn: FFN) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


def made(act: str = "relu") -> tuple[FFN, Tensor, Tensor]:
    """An FFN of whose hidden units those of one kind, 8 of each, fire together; tokens that each
    have two of the six kinds; and the kinds of the units, which are in no order."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kinds = torch.arange(HIDDEN).remainder(GROUPS)[torch.randperm(HIDDEN, generator=generator)]
    directions = nn.init.orthogonal_(torch.empty(DIM, DIM), generator=generator)[:GROUPS]
    ffn = FFN(DIM, HIDDEN, act).requires_grad_(False)
    ffn.linear1.weight.copy_(directions[kinds] * (1 + 0.2 * draw(HIDDEN, 1)) + 0.03 * draw(48, DIM))
    ffn.linear1.bias.fill_(-0.8)
    ffn.linear2.weight.copy_(draw(DIM, HIDDEN) / 4)
    ffn.linear2.bias.copy_(draw(DIM) / 10)
    present = torch.rand(3000, GROUPS, generator=generator).argsort(1) < 2
    amounts = present * (2 + draw(3000, GROUPS).abs())
    return ffn, amounts @ directions + 0.3 * draw(3000, DIM), kinds


def weights(ffn: FFN) -> FFNWeights:
    return ffn_weights(ffn.linear1, ffn.linear2)


def split(ffn: FFN, x: Tensor, top_k: int = 2) -> MoE:
    moe = MoE(MoEConfig(GROUPS, top_k, combine="sum"), DIM, HIDDEN, "relu")
    initialize_from_coactivation(moe, weights(ffn), x)
    return moe


def error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_units_that_fire_together_are_found(act):
    ffn, x, kinds = made(act)
    units = split_by_coactivation(weights(ffn), ffn.activation, x, GROUPS)
    assert units.shape == (GROUPS, HIDDEN // GROUPS)
    assert units.flatten().sort().values.tolist() == list(range(HIDDEN))
    assert all(len(kinds[group].unique()) == 1 for group in units)
    again = split_by_coactivation(weights(ffn), ffn.activation, x, GROUPS)
    assert torch.equal(units, again)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_groups_are_equal_whatever_the_products(groups, size, rank, seed):
    """Also of units that never fire, of which half are, and of equal ones."""
    generator = torch.Generator().manual_seed(seed)
    activity = torch.rand(groups * size, rank, generator=generator)
    activity[: groups * size // 2] = 0
    units = balanced_groups(activity @ activity.T, groups)
    assert units.shape == (groups, size)
    assert units.flatten().sort().values.tolist() == list(range(groups * size))


def spread(activity: Tensor, units: Tensor) -> float:
    """Sum of the squared distances from the groups' means."""
    members = activity[units]
    return float((members - members.mean(1, keepdim=True)).square().sum())


def test_large_ffns_change_places_in_blocks(monkeypatch):
    """Here as well as all at once."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 20, generator=generator)
    activity = centres.repeat(16, 1) + 0.1 * torch.randn(128, 20, generator=generator)
    found = []
    for block in (128, 64):
        monkeypatch.setattr(coactivation, "BLOCK", block)
        found.append(spread(activity, balanced_groups(activity @ activity.T, 8)))
    in_order = spread(activity, torch.arange(128).view(8, 16))
    assert found[0] == pytest.approx(0.01 * 120 * 20, rel=0.2)  # the noise alone
    assert found[1] < 1.1 * found[0] < 0.02 * in_order


def test_error_falls_with_the_number_of_groups():
    ffn, x, _ = made()
    moe, errors = split(ffn, x[:2000]), []
    assert moe.experts.w1.shape == (GROUPS, HIDDEN // GROUPS, DIM)
    for top_k in range(1, GROUPS + 1):
        with torch.no_grad(), forward_context(knobs=Knobs(top_k=top_k)):
            errors.append(error(moe(x[2000:]), ffn(x[2000:])))
    assert all(after < before + 1e-6 for before, after in zip(errors, errors[1:]))
    assert errors[0] > 0.3 and errors[1] < 0.1 and errors[-1] < 1e-6
    torch.testing.assert_close(moe.experts.b2, ffn.linear2.bias.expand(GROUPS, -1))


def test_a_router_says_what_groups_add():
    """Standardised, and in order for nearly all tokens that it has not seen."""
    ffn, x, _ = made()
    units = split_by_coactivation(weights(ffn), ffn.activation, x[:2000], GROUPS)
    weight, bias = fit_router(weights(ffn), ffn.activation, x[:2000], units)
    logits = x @ weight.T + bias
    assert logits[:2000].mean() == pytest.approx(0, abs=1e-4)
    assert logits[:2000].std() == pytest.approx(1, abs=1e-3)
    hidden = ffn.activation(ffn.linear1(x)) * ffn.linear2.weight.norm(dim=0)
    added = hidden[:, units].sum(-1)
    best = logits.topk(2).indices.sort().values == added.topk(2).indices.sort().values
    assert best[2000:].all(1).float().mean() > 0.95


def test_constant_tokens_have_a_router():
    """Nothing to regress on: any choice, but a finite one."""
    ffn, x, _ = made()
    moe = split(ffn, x[:1].expand(50, -1))
    assert all(p.isfinite().all() for p in moe.parameters())
    assert moe(x).isfinite().all()


def test_report_compares_splits():
    ffn, x, _ = made()
    report = report_splits(weights(ffn), ffn.activation, x, GROUPS)
    errors = report.errors
    assert list(errors) == ["coactivation", "random", "order"]
    half = GROUPS // 2 - 1
    assert errors["coactivation"][half] < 0.5 * min(errors["random"][half], errors["order"][half])
    for values in errors.values():
        assert len(values) == GROUPS and values[-1] < 1e-6
    hidden = ffn.linear1(x)
    assert report.firing == pytest.approx(float((hidden > 0).any(0).float().mean()))
    assert report.firing_per_token == pytest.approx(float((hidden > 0).float().mean()))
    # As by experts with such a router, which are tried on the second half of the tokens.
    moe = split(ffn, x[:1500])
    for top_k in (1, 3):
        with torch.no_grad(), forward_context(knobs=Knobs(top_k=top_k)):
            found = error(moe(x[1500:]), ffn(x[1500:]))
        assert errors["coactivation"][top_k - 1] == pytest.approx(found, abs=1e-5)


def test_units_that_never_fire_are_counted():
    ffn, x, kinds = made()
    ffn.linear1.bias[kinds == 0] = -100
    report = report_splits(weights(ffn), ffn.activation, x, GROUPS)
    assert report.firing == pytest.approx(5 / 6)
    ffn, x, _ = made("gelu")
    size = ffn.activation(ffn.linear1(x)).abs()
    report = report_splits(weights(ffn), ffn.activation, x, GROUPS)
    fired = size > size.mean()
    assert report.firing_per_token == pytest.approx(float(fired.float().mean()), abs=1e-4)
    assert report.firing == 1


def test_report_of_a_model():
    ffn, x, _ = made()
    model = nn.Sequential(Block(ffn), nn.LayerNorm(DIM), Block(made()[0]))
    reports = report_coactivation(model, GROUPS, lambda: model(x), layers=["0"])
    assert list(reports) == ["0"] and reports["0"].errors["coactivation"][-1] < 1e-6
    assert list(find_ffns(model)) == ["0", "2"]


def test_swapped_experts_save_compute_and_are_trained():
    ffn, x, _ = made()
    model = Block(ffn.requires_grad_(True))
    dense = count_flops(model, x).total
    expected = model(x)
    assert swap_ffn_for_moe(
        model, MoEConfig(GROUPS, 2), "coactivation", None, lambda: model(x)
    ) == [""]
    assert error(model(x), expected) < 0.1
    counts = [count_flops(model, x, Knobs(top_k=k)).total for k in range(1, GROUPS + 1)]
    router = len(x) * DIM * GROUPS
    assert counts == [router + dense * k // GROUPS for k in range(1, GROUPS + 1)]
    model(x).square().sum().backward()
    assert model.ffn.router.weight.grad.norm() > 1e-2
    assert model.ffn.router.bias.grad.norm() > 1e-2


# Calibration.


class Padded(nn.Module):
    """Runs a block on a map of 1 x 4 cells, of which the second image fills two."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(made()[0])

    def forward(self, x: Tensor) -> Tensor:
        padding = Padding(torch.tensor([[4, 1], [2, 1]]), (4, 1))
        with forward_context(tokens=TokenMap((1, 4), padding)):
            return self.block(x)


def linear1(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: seam.linear1 for name, seam in find_ffns(model).items()}


def test_inputs_are_captured_but_for_padding():
    model, x = Padded(), torch.randn(2, 4, DIM)

    def calibration() -> None:
        model(x)
        model(x + 100)

    found = capture_inputs(linear1(model), calibration)["block"]
    wanted = torch.cat([x[0], x[1, :2], x[0] + 100, x[1, :2] + 100])
    assert sorted(found.tolist()) == sorted(wanted.tolist())
    fewer = capture_inputs(linear1(model), calibration, tokens=7)["block"]
    assert fewer.shape == (7, DIM)
    assert {tuple(row) for row in fewer.tolist()} <= {tuple(row) for row in wanted.tolist()}
    assert (fewer > 50).any() and (fewer < 50).any()
    assert not model.block.ffn.linear1._forward_pre_hooks


def test_an_ffn_that_calibration_does_not_run_is_named():
    model = nn.ModuleDict({"used": Block(made()[0]), "idle": Block(made()[0])})
    x = torch.randn(5, DIM)
    with pytest.raises(ValueError, match="calibration runs no token through idle"):
        capture_inputs(linear1(model), lambda: model["used"](x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        capture_inputs(linear1(model), lambda: model["used"](x[:, :3]))
    assert not model["used"].ffn.linear1._forward_pre_hooks


# What does not fit.


def test_settings_that_do_not_fit_are_named():
    ffn, x, _ = made()
    with pytest.raises(ValueError, match="48 hidden units cannot be divided by num_experts=7"):
        split_by_coactivation(weights(ffn), ffn.activation, x, 7)
    moe = MoE(MoEConfig(GROUPS, 2), DIM, HIDDEN, "relu")
    with pytest.raises(ValueError, match="needs combine='sum', not 'mean'"):
        initialize_from_coactivation(moe, weights(ffn), x)
    moe = MoE(MoEConfig(GROUPS, 2, expert_dim=6, combine="sum"), DIM, HIDDEN, "relu")
    with pytest.raises(ValueError, match="6 experts from 48 hidden units need expert_dim=8, not 6"):
        initialize_from_coactivation(moe, weights(ffn), x)

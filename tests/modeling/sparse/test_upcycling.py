"""Experts that start from a dense FFN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dset_d2.modeling import FFN, Knobs, forward_context
from dset_d2.modeling.sparse import MoE, MoEConfig, initialize_from_pretrained_ffn
from dset_d2.modeling.sparse.moe import route
from dset_d2.modeling.sparse.upcycling import FFNWeights, split_units, take_units

DIM = 16


def dense(hidden: int = 48, act: str = "gelu") -> FFN:
    torch.manual_seed(0)
    ffn = FFN(DIM, hidden, act)
    for linear in (ffn.linear1, ffn.linear2):
        torch.nn.init.normal_(linear.bias)
    return ffn.requires_grad_(False)


def weights(ffn: FFN) -> FFNWeights:
    return FFNWeights(ffn.linear1.weight, ffn.linear1.bias, ffn.linear2.weight, ffn.linear2.bias)


def experts_of(ffn: FFN, act: str = "gelu", construction: str = "auto", **config) -> MoE:
    hidden = len(ffn.linear1.weight)
    moe = MoE(MoEConfig(**config), DIM, hidden, act).requires_grad_(False)
    initialize_from_pretrained_ffn(moe, ffn.linear1, ffn.linear2, construction)
    return moe


def error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


def equal_gates(moe: MoE) -> MoE:
    torch.nn.init.zeros_(moe.router.weight)
    return moe


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 37, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("act", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copies_equal_the_dense_ffn_for_any_router(x, act, top_k):
    ffn = dense(act=act)
    moe = experts_of(ffn, act, num_experts=4, top_k=top_k, expert_dim=48)
    torch.nn.init.normal_(moe.router.weight)
    torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=1e-6)
    with forward_context(knobs=Knobs(top_k=3)):
        torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("hidden", [48, 44])  # 44: 4 experts of 11; both fit exactly
def test_split_equals_the_dense_ffn_with_all_experts_at_equal_gates(x, hidden):
    ffn = dense(hidden)
    moe = equal_gates(experts_of(ffn, num_experts=4, top_k=4))
    assert moe.experts.w1.shape == (4, hidden // 4, DIM)
    torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_chosen_experts_of_a_split_count_as_in_the_dense_ffn(x, top_k):
    """Their units once each, the others not at all, the output's bias once."""
    ffn = dense()
    moe = equal_gates(experts_of(ffn, num_experts=4, top_k=top_k))
    chosen = moe.router(x.flatten(0, 1), top_k).experts.view(2, 37, top_k)
    units = torch.arange(48) // 12
    used = (chosen[..., None] == units).any(-2)
    hidden = ffn.activation(ffn.linear1(x)) * used
    torch.testing.assert_close(moe(x), ffn.linear2(hidden), rtol=0, atol=2e-6)


def test_more_room_than_units_changes_nothing(x):
    """6 experts of 88 / 6 units, rounded to 16: the first 8 units are shared by two experts."""
    ffn = dense(88)
    moe = equal_gates(experts_of(ffn, num_experts=6, top_k=6))
    assert moe.experts.w1.shape == (6, 16, DIM)
    torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=3e-6)


def test_less_room_leaves_the_smallest_units_out(x):
    """6 experts of 52 / 6 units, rounded to 8."""
    ffn = dense(52)
    small = torch.tensor([3, 17, 40, 51])
    ffn.linear1.weight[small] *= 1e-3
    moe = equal_gates(experts_of(ffn, num_experts=6, top_k=6))
    assert moe.experts.w1.shape == (6, 8, DIM)
    units = split_units(weights(ffn), 6, 8)
    assert units.flatten().tolist() == [i for i in range(52) if i not in small]
    ffn.linear2.weight[:, small] = 0
    torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=3e-6)


def test_units_that_some_experts_share(x):
    """Any dealing of all units equals the dense FFN at equal gates over all experts."""
    ffn = dense(12)
    units = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 11]])
    moe = equal_gates(MoE(MoEConfig(2, 2, expert_dim=8), DIM, 12, "gelu"))
    moe.requires_grad_(False)
    moe.experts.load_state_dict(take_units(weights(ffn), units, moe.config)._asdict())
    torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("construction", ["auto", "split"])
def test_a_split_whose_outputs_are_summed_equals_the_dense_ffn_for_any_router(x, construction):
    ffn = dense()
    moe = experts_of(ffn, num_experts=4, top_k=2, combine="sum", construction=construction)
    with forward_context(knobs=Knobs(top_k=4)):
        torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=2e-6)
    assert error(moe(x), ffn(x)) > 0.1


# Copies of shards.

# num_experts, top_k and the slots of the slot-wise construction.
SHARDED = [(4, 2, 2), (6, 3, 3), (16, 4, 2), (12, 6, 3), (4, 4, 4)]
DISPATCHES = ["sorted", "grouped_mm", "dense"]


def sharded(construction: str, num_experts: int, top_k: int, slots: int, **config) -> MoE:
    """Experts of :func:`dense`, which has 48 hidden units."""
    shards = {"paper": top_k, "slots": slots}[construction]
    config |= dict(num_experts=num_experts, top_k=top_k, expert_dim=48 // shards)
    config |= {"slots": slots} if construction == "slots" else {}
    return experts_of(dense(), construction=construction, **config)


def routed(moe: MoE, x: Tensor, logits: Tensor) -> Tensor:
    """The output for other logits than the router's own."""
    config = moe.config
    return moe.experts(x, route(logits, config.top_k, config.slots), "sorted")


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("sizes", SHARDED)
@pytest.mark.parametrize("construction", ["paper", "slots"])
def test_shards_equal_the_dense_ffn(x, construction, sizes, dispatch, scale):
    """Also with another scale of the router, and for tokens whose logits all tie."""
    moe = sharded(construction, *sizes, dispatch=dispatch)
    moe.router.weight *= scale
    x[0, :5] = 0
    assert error(moe(x), dense()(x)) < 1e-6
    used = moe.router(x.flatten(0, 1), sizes[1]).experts.unique()
    assert len(used) == (sizes[0] if scale else sizes[1])


@pytest.mark.parametrize("act", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("construction", ["paper", "slots"])
def test_shards_of_every_activation(x, construction, act):
    ffn = dense(act=act)
    config = dict(num_experts=8, top_k=2, slots=2 if construction == "slots" else 1, expert_dim=24)
    moe = experts_of(ffn, act, construction, **config)
    assert error(moe(x), ffn(x)) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHARDED), st.integers(0, 999), st.floats(0, 1e4))
def test_slots_equal_the_dense_ffn_for_any_logits(sizes, seed, scale):
    moe = sharded("slots", *sizes)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(31, DIM, generator=generator)
    logits = torch.randn(31, sizes[0], generator=generator) * scale
    assert error(routed(moe, x, logits), dense()(x)) < 1e-6


@pytest.mark.parametrize("top_k", [2, 4, 6, 8])
def test_slots_equal_the_dense_ffn_for_any_knob(x, top_k):
    moe = sharded("slots", 8, 4, 2)
    with forward_context(knobs=Knobs(top_k=top_k)):
        assert error(moe(x), dense()(x)) < 1e-6


@pytest.mark.parametrize("sizes", SHARDED[:-1])  # the last has one copy
def test_noise_on_the_router_breaks_paper_and_not_slots(x, sizes):
    x = x.flatten(0, 1)
    generator = torch.Generator().manual_seed(2)
    errors = {}
    for construction in ("paper", "slots"):
        moe = sharded(construction, *sizes)
        logits = moe.router(x, sizes[1]).logits
        noise = torch.randn(logits.shape, generator=generator)
        assert error(routed(moe, x, logits), dense()(x)) < 1e-6
        errors[construction] = error(routed(moe, x, logits + 0.1 * noise), dense()(x))
    assert errors["paper"] > 0.1 and errors["slots"] < 1e-6


@pytest.mark.parametrize("sizes", SHARDED)
def test_a_coarse_router_breaks_neither(x, sizes):
    """Where rounding lets several copies tie, a token takes the first; noise is what mixes."""
    x = x.flatten(0, 1)
    for construction in ("paper", "slots"):
        moe = sharded(construction, *sizes)
        low = nn.functional.linear(x.bfloat16(), moe.router.weight.bfloat16()).float()
        for logits in (low, low.sign()):
            assert error(routed(moe, x, logits), dense()(x)) < 1e-6


def test_rows_of_the_router(x):
    """In "paper" the shards of one copy share one; else they stay as they are."""
    torch.manual_seed(4)
    for construction, config in {
        "paper": dict(num_experts=6, top_k=3, expert_dim=16),
        "slots": dict(num_experts=6, top_k=3, slots=3, expert_dim=16),
        "copies": dict(num_experts=6, top_k=3, expert_dim=48),
    }.items():
        moe = MoE(MoEConfig(**config), DIM, 48, "gelu")
        before = moe.router.weight.detach().clone()
        ffn = dense()
        initialize_from_pretrained_ffn(moe, ffn.linear1, ffn.linear2, construction)
        expected = before[[0, 0, 0, 3, 3, 3]] if construction == "paper" else before
        assert torch.equal(moe.router.weight, expected)


def router_gradient(moe: MoE, x: Tensor) -> float:
    moe.requires_grad_(True).zero_grad()
    moe(x).square().sum().backward()
    return float(moe.router.weight.grad.norm() / moe.experts.w1.grad.norm())


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_the_task_trains_the_router_from_the_start(x, dispatch):
    assert router_gradient(sharded("paper", 8, 2, 2, dispatch=dispatch), x) > 1e-2
    assert router_gradient(sharded("slots", 8, 2, 2, dispatch=dispatch), x) > 1e-2


def test_gates_of_equal_copies_cancel_until_these_differ(x):
    for moe in (
        sharded("slots", 8, 4, 2),
        experts_of(dense(), num_experts=4, top_k=2, expert_dim=48),
    ):
        assert router_gradient(moe, x) < 1e-6
        torch.optim.SGD(moe.parameters(), lr=1e-3).step()
        assert router_gradient(moe, x) > 1e-4


def test_auto_takes_the_first_that_fits():
    """Slots before copies before a split; each as if it had been asked for."""
    for construction, config in {
        "slots": dict(slots=2, expert_dim=24),
        "copies": dict(slots=2, expert_dim=48),
        "split": dict(slots=2, expert_dim=12),
    }.items():
        chosen, asked = (
            experts_of(dense(), construction=name, num_experts=4, top_k=2, **config).experts
            for name in ("auto", construction)
        )
        torch.testing.assert_close(chosen.state_dict(), asked.state_dict(), rtol=0, atol=0)
    # Slots that do not divide the units leave the others.
    copies = experts_of(dense(), num_experts=5, top_k=5, slots=5, expert_dim=48)
    assert torch.equal(copies.experts.w1[4], dense().linear1.weight)


def test_linear_layers_without_biases(x):
    layers = [nn.Linear(*sizes, bias=False).requires_grad_(False) for sizes in ((16, 48), (48, 16))]
    for config in (dict(), dict(slots=2, expert_dim=24)):
        moe = MoE(MoEConfig(4, 2, **{"expert_dim": 48} | config), DIM, 48, "gelu")
        initialize_from_pretrained_ffn(moe.requires_grad_(False), *layers)
        expected = layers[1](nn.functional.gelu(layers[0](x)))
        assert error(moe(x), expected) < 1e-6


# What does not fit.


@pytest.mark.parametrize(
    ("construction", "config", "wanted"),
    [
        ("auto", dict(expert_dim=20), r"expert_dim=48 \(copies\) or 12 \(split\), not 20"),
        ("copies", dict(expert_dim=12), r"expert_dim=48 \(copies\), not 12"),
        ("split", dict(expert_dim=48), r"expert_dim=12 \(split\), not 48"),
        ("paper", dict(expert_dim=12), r"expert_dim=24 \(paper\), not 12"),
        ("slots", dict(expert_dim=48, slots=2), r"expert_dim=24 \(slots\), not 48"),
        (
            "auto",
            dict(expert_dim=20, slots=2),
            r"expert_dim=24 \(slots\) or 48 \(copies\) or 12 \(split\), not 20",
        ),
        ("slots", dict(expert_dim=48), "'slots' needs slots above 1, not slots=1"),
        ("paper", dict(expert_dim=24, slots=2), "'paper' needs slots=1, not slots=2"),
        (
            "paper",
            dict(num_experts=5, expert_dim=24),
            "'paper' needs num_experts=5 to be a multiple of top_k=2",
        ),
        (
            "paper",
            dict(num_experts=10, top_k=5, expert_dim=9),
            "48 hidden units cannot be divided by top_k=5",
        ),
        (
            "slots",
            dict(num_experts=10, top_k=5, slots=5, expert_dim=9),
            "48 hidden units cannot be divided by slots=5",
        ),
        ("copies", dict(expert_dim=48, combine="sum"), "'copies' needs combine='mean'"),
        ("paper", dict(expert_dim=24, combine="sum"), "'paper' needs combine='mean'"),
        ("clone", dict(expert_dim=48), "upcycling='clone'"),
    ],
)
def test_settings_that_do_not_fit_are_named(construction, config, wanted):
    with pytest.raises(ValueError, match=wanted):
        experts_of(dense(), construction=construction, **dict(num_experts=4, top_k=2) | config)


def test_an_ffn_of_other_channels_is_named():
    moe = MoE(MoEConfig(4, 2), 32, 48, "gelu")
    ffn = dense()
    wanted = r"\(48, 16\) and \(16, 48\) does not fit experts of 32 channels"
    with pytest.raises(ValueError, match=wanted):
        initialize_from_pretrained_ffn(moe, ffn.linear1, ffn.linear2)


@pytest.mark.parametrize("construction", ["copies", "paper", "slots"])
def test_experts_are_trained_apart(construction):
    """They share no memory, neither with each other nor with the dense FFN."""
    shards = 1 if construction == "copies" else 2
    config = dict(num_experts=4, top_k=2, expert_dim=48 // shards)
    config |= {"slots": 2} if construction == "slots" else {}
    ffn = dense()
    before = [p.clone() for p in ffn.parameters()]
    moe = experts_of(ffn, construction=construction, **config)
    for value in moe.parameters():
        assert not torch.equal(value[0].fill_(9), value[1])
    for parameter, value in zip(ffn.parameters(), before):
        assert torch.equal(parameter, value)

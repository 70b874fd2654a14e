"""Experts that start from a dense FFN."""

import pytest
import torch

from dset_d2.modeling import FFN, Knobs, forward_context
from dset_d2.modeling.sparse import MoE, MoEConfig
from dset_d2.modeling.sparse.upcycling import FFNWeights, split_units, take_units, upcycle

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
    expert_dim = moe.experts.w1.shape[1]
    experts = upcycle(weights(ffn), moe.config, expert_dim, construction)
    moe.experts.load_state_dict(experts._asdict())
    return moe


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
    moe.experts.load_state_dict(take_units(weights(ffn), units, top_k=2)._asdict())
    torch.testing.assert_close(moe(x), ffn(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("expert_dim", "construction", "wanted"),
    [
        (20, "auto", r"expert_dim=48 \(copies\) or 12 \(split\), not 20"),
        (12, "copies", r"expert_dim=48 \(copies\), not 12"),
        (48, "split", r"expert_dim=12 \(split\), not 48"),
    ],
)
def test_widths_that_do_not_fit_are_named(expert_dim, construction, wanted):
    config = MoEConfig(num_experts=4, top_k=2, expert_dim=expert_dim)
    with pytest.raises(ValueError, match=wanted):
        upcycle(weights(dense()), config, expert_dim, construction)
    with pytest.raises(ValueError, match="upcycling='clone'"):
        upcycle(weights(dense()), config, expert_dim, "clone")


def test_experts_are_trained_apart():
    """Copies share no memory, neither with each other nor with the dense FFN."""
    ffn = dense()
    experts = upcycle(weights(ffn), MoEConfig(4, 2), 48)
    before = ffn.linear1.weight.clone()
    for value in experts:
        assert not torch.equal(value[0].fill_(9), value[1])
    assert torch.equal(ffn.linear1.weight, before)

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dset_d2.analysis import count_flops
from dset_d2.modeling import FFN, Knobs, forward_context
from dset_d2.modeling.sparse.moe import (
    MoE,
    MoEConfig,
    MoERecord,
    Routing,
    balance_loss,
    largest,
    moe_layers,
    route,
    routing_statistics,
    z_loss,
)
from dset_d2.modeling.tokens import Padding, TokenMap

from ...conftest import in_two_processes, tiny_model

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def make(
    num_experts=4, top_k=2, act="relu", dim=16, dim_feedforward=32, dropout=0.0, **settings
) -> MoE:
    torch.manual_seed(0)
    moe = MoE(MoEConfig(num_experts, top_k, **settings), dim, dim_feedforward, act, dropout)
    with torch.no_grad():  # biases start at 0 and would hide mistakes
        for parameter in moe.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return moe


def recorded(moe: MoE, x: torch.Tensor) -> MoERecord:
    with forward_context(record=True) as context:
        moe(x)
    return context.records["moe"]


def by_definition(moe: MoE, x: torch.Tensor, regions: list[int] | None = None) -> torch.Tensor:
    """Token by token, as the papers write it; regions share the mean of their logits."""
    routing = moe.router(x, moe.config.top_k)
    if regions is not None:
        members = torch.tensor(regions)[:, None] == torch.tensor(regions)
        logits = torch.stack([routing.logits[row].mean(0) for row in members])
        gates, experts = logits.softmax(-1).topk(moe.config.top_k)
        routing = routing._replace(gates=gates / gates.sum(-1, keepdim=True), experts=experts)
    rows = []
    for token, gates, experts in zip(x, routing.gates, routing.experts):
        row = torch.zeros_like(token)
        for gate, e in zip(gates, experts.tolist()):
            w = moe.experts
            hidden = w.act(F.linear(token, w.w1[e], w.b1[e]))
            bias = w.b2[e] / (len(gates) if moe.config.combine == "sum" else 1)
            row = row + gate * F.linear(hidden, w.w2[e], bias)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dispatch", ["sorted", "grouped_mm", "dense"])
@pytest.mark.parametrize(
    ("experts", "top_k", "slots"),
    [(4, 2, 1), (6, 3, 1), (5, 1, 1), (3, 3, 1), (4, 2, 2), (8, 4, 2), (6, 3, 3), (6, 3, "sum")],
)
def test_dispatches_equal_the_definition(dispatch, act, experts, top_k, slots):
    combine = {"combine": "sum"} if slots == "sum" else {"slots": slots}
    moe = make(experts, top_k, act, dispatch=dispatch, expert_dim=8, **combine)
    x = torch.randn(23, 16)
    outputs, gradients = [], []
    for run in (moe, lambda t: by_definition(moe, t)):
        moe.zero_grad()
        inputs = x.clone().requires_grad_()
        output = run(inputs)
        (output**2).sum().backward()
        outputs.append(output.detach())
        gradients.append([inputs.grad, *(p.grad.clone() for p in moe.parameters())])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(g.abs().sum() > 0 for g in gradients[0])


# Two images on a map of 3 x 5 cells, the second of them 3 x 2; of its cells some are pruned.
PADDED = Padding(torch.tensor([[5, 3], [2, 3]]), (5, 3))
CELLS = torch.tensor([[0, 1, 4, 5, 7, 9, 10, 13, 14], [0, 1, 2, 3, 5, 8, 10, 11, 12]])


def regions_of(cells: list[int], columns: int, first: int = 0) -> list[int]:
    """Squares of 2 x 2 of a map 5 cells wide; cells beyond the columns of an image lie apart."""
    numbers = [cell // 5 // 2 * 3 + cell % 5 // 2 for cell in cells]
    return [first + n + (100 if cell % 5 >= columns else 0) for n, cell in zip(numbers, cells)]


@pytest.mark.parametrize("dispatch", ["sorted", "grouped_mm", "dense"])
@pytest.mark.parametrize("padding", [None, PADDED])
@pytest.mark.parametrize("index", [None, CELLS])
def test_tokens_of_a_region_share_their_route(dispatch, padding, index):
    """On whole and pruned maps, with and without padding: values and gradients."""
    moe = make(6, 3, dispatch=dispatch, expert_dim=8, patch_size=2)
    where = TokenMap((3, 5), padding, index)
    cells = CELLS.tolist() if index is not None else [list(range(15))] * 2
    columns = (5, 5) if padding is None else (5, 2)
    regions = regions_of(cells[0], columns[0]) + regions_of(cells[1], columns[1], first=1000)
    x = torch.randn(2, len(cells[0]), 16)
    outputs, gradients = [], []

    def run(inputs):
        with forward_context(tokens=where):
            return moe(inputs)

    def define(inputs):
        return by_definition(moe, inputs.flatten(0, 1), regions).view_as(inputs)

    for function in (run, define):
        moe.zero_grad()
        inputs = x.clone().requires_grad_()
        output = function(inputs)
        (output**2).sum().backward()
        outputs.append(output.detach())
        gradients.append([inputs.grad, *(p.grad.clone() for p in moe.parameters())])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    with forward_context(tokens=where):
        routing = recorded(moe, x).routing
        alone = recorded(make(6, 3, expert_dim=8), x).routing
    together = torch.tensor(regions)[:, None] == torch.tensor(regions)
    same = (routing.experts[:, None] == routing.experts).all(-1)
    assert same[together].all() and not same.all()
    assert not torch.equal(routing.experts, alone.experts)


def test_padding_and_other_images_do_not_change_a_route():
    moe = make(patch_size=2)
    x = torch.randn(2, 15, 16)
    with forward_context(tokens=TokenMap((3, 5), PADDED)):
        before = moe(x)
        valid = PADDED.valid_tokens(3, 5)
        x[~valid] += 10
        x[0] += 10
        after = moe(x)
    assert torch.equal(after[1][valid[1]], before[1][valid[1]])
    assert not torch.equal(after[0], before[0])


def test_a_patch_of_one_cell_changes_nothing():
    x = torch.randn(2, 15, 16)
    moe = make(patch_size=1)
    with forward_context(tokens=TokenMap((3, 5))):
        assert torch.equal(moe(x), make()(x))
    # Nor do squares that hold one token each, up to the order of sums.
    cells = torch.arange(15) // 5 * 3 * 15 + torch.arange(15) % 5 * 3
    apart = TokenMap((9, 15), index=cells.expand(2, -1))
    with forward_context(tokens=apart):
        torch.testing.assert_close(make(patch_size=3)(x), make()(x))


def test_queries_share_no_route():
    with pytest.raises(ValueError, match="patch_size=2: these tokens stand on no feature map"):
        make(patch_size=2)(torch.randn(3, 16))
    with pytest.raises(ValueError, match="patch_size=2: queries stand on no feature map"):
        tiny_model(moe=MoEConfig(4, 2, patch_size=2))


def test_shared_routes_are_counted_and_exported():
    moe = make(patch_size=2).eval()
    x = torch.randn(2, 15, 16)
    with forward_context(tokens=TokenMap((3, 5), PADDED)):
        assert count_flops(moe, (x,)).total == hand_count(30, 2, 16, 8, 4)
        exported = torch.export.export(moe, (x,)).module()
        torch.testing.assert_close(exported(x), moe(x))


@pytest.mark.parametrize("dispatch", ["sorted", "grouped_mm", "dense"])
def test_dropout_is_that_of_the_ffn(dispatch):
    """One expert leaves out the very hidden units that the FFN of its weights does."""
    moe = make(1, 1, dispatch=dispatch, dropout=0.5)
    ffn = FFN(16, 32, "relu", 0.5)
    w = moe.experts
    with torch.no_grad():
        for ours, theirs in zip((w.w1, w.b1, w.w2, w.b2), ffn.parameters()):
            theirs.copy_(ours[0])
    x = torch.randn(7, 16)
    outputs = []
    for module in (ffn, moe):
        torch.manual_seed(3)
        outputs.append(module(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(moe.eval()(x), ffn.eval()(x))
    assert not torch.allclose(outputs[1], moe(x))


@pytest.mark.parametrize("dispatch", ["sorted", "grouped_mm", "dense"])
def test_dropout_of_everything_leaves_the_second_bias(dispatch):
    moe = make(4, 2, dispatch=dispatch, dropout=1.0)
    x = torch.randn(9, 16)
    routing = moe.router(x, 2)
    expected = (routing.gates[..., None] * moe.experts.b2[routing.experts]).sum(1)
    torch.testing.assert_close(moe(x), expected)
    torch.testing.assert_close(moe.eval()(x), make(4, 2, dispatch=dispatch)(x))


def test_activation_is_the_ffns_or_the_configs():
    assert isinstance(make(act="gelu").experts.act, nn.GELU)
    own = MoE(MoEConfig(4, 2, act="silu"), 16, 32, "gelu")
    assert isinstance(own.experts.act, nn.SiLU)
    layers = tiny_model(moe=MoEConfig(4, 2), dropout=0.1).decoder.decoder.layers
    assert isinstance(layers[0].ffn.experts.act, nn.ReLU)
    assert layers[0].ffn.experts.dropout.p == 0.1
    layers = tiny_model(moe=MoEConfig(4, 2, act="gelu")).decoder.decoder.layers
    assert isinstance(layers[0].ffn.experts.act, nn.GELU)


def test_auto_chooses_by_device_dtype_and_capture():
    x = torch.randn(9, 16)
    moe = make()
    with torch.no_grad():
        expected = moe(x)
        exported = torch.export.export(moe.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    y = torch.randn(9, 16)  # another routing through the same graph
    torch.testing.assert_close(exported(y), moe(y).detach())


def test_one_expert_is_an_ffn():
    moe = make(1, 1)
    w = moe.experts
    x = torch.randn(2, 5, 16)
    expected = F.linear(F.linear(x, w.w1[0], w.b1[0]).relu(), w.w2[0], w.b2[0])
    torch.testing.assert_close(moe(x), expected)
    assert moe.experts.w1.shape == (1, 32, 16)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000))
def test_identical_experts_are_an_ffn_for_any_routing(top_k, seed):
    moe = make(4, top_k)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter).clone())
        moe.router.weight.normal_()
    w = moe.experts
    x = torch.randn(7, 16)
    expected = F.linear(F.linear(x, w.w1[0], w.b1[0]).relu(), w.w2[0], w.b2[0])
    torch.testing.assert_close(moe(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dispatch", ["sorted", "grouped_mm", "dense"])
def test_tokens_do_not_see_each_other(dispatch):
    moe = make(dispatch=dispatch)
    x = torch.randn(3, 11, 16)
    order, batch = torch.randperm(11), torch.tensor([2, 0, 1])
    torch.testing.assert_close(moe(x)[:, order], moe(x[:, order]))
    torch.testing.assert_close(moe(x)[batch], moe(x[batch]))
    torch.testing.assert_close(moe(x)[1:2, :4], moe(x[1:2, :4]))


# Slots, and what is chosen.


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_slot_is_softmax_and_top_k(top_k):
    """Bit for bit, and so are the gradients."""
    logits = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(500, top_k)
    found = []
    for plain in (True, False):
        inputs = logits.clone().requires_grad_()
        if plain:
            probabilities = (inputs / 1.5).softmax(-1)
            gates, experts = probabilities.topk(top_k, dim=-1)
            gates = gates / (gates.detach() if top_k == 1 else gates.sum(-1, keepdim=True))
        else:
            _, probabilities, gates, experts = route(inputs, top_k, temperature=1.5)
        ((gates * weights).sum() + probabilities.square().sum()).backward()
        found.append((probabilities.detach(), gates.detach(), experts, inputs.grad))
    for theirs, ours in zip(*found):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("num_experts", "top_k", "slots"), [(4, 2, 2), (6, 3, 3), (12, 6, 2)])
def test_every_slot_chooses_by_itself(num_experts, top_k, slots):
    """As a router of its own would, or the probabilities of all experts, renormalised."""
    logits = torch.randn(50, num_experts) * 3
    routing = route(logits, top_k, slots)
    size, each = num_experts // slots, top_k // slots
    everyone = logits.softmax(-1)
    for slot in range(slots):
        part = slice(slot * size, (slot + 1) * size)
        alone = route(logits[:, part], each)
        mine = slice(slot * each, (slot + 1) * each)
        assert torch.equal(routing.experts[:, mine], alone.experts + slot * size)
        torch.testing.assert_close(routing.gates[:, mine], alone.gates / slots)
        torch.testing.assert_close(routing.probabilities[:, part], alone.probabilities / slots)
        gates = everyone.gather(1, routing.experts[:, mine])
        torch.testing.assert_close(routing.gates[:, mine], gates / gates.sum(1)[:, None] / slots)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 99), st.floats(0, 1e5))
def test_outputs_that_are_summed_count_once(top_k, seed, scale):
    """Also where probabilities underflow; the router has the gradient of their logarithm."""
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(seed)) * scale
    logits.requires_grad_()
    routing = route(logits, top_k, combine="sum")
    assert torch.equal(routing.gates, torch.ones(20, top_k))
    routing.gates.sum().backward()
    expected = F.one_hot(routing.experts, 5).sum(1) - top_k * logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("dispatch", ["sorted", "grouped_mm", "dense"])
def test_parts_of_an_ffn_add_up_for_any_knob(dispatch):
    """The hidden units of the chosen once each, the others not at all, the output's bias once."""
    moe = make(6, 2, dispatch=dispatch, expert_dim=8, combine="sum").requires_grad_(False)
    w = moe.experts
    w.b2[:] = w.b2[0]
    x = torch.randn(23, 16)
    hidden = w.act(F.linear(x, w.w1.flatten(0, 1), w.b1.flatten())).unflatten(1, (6, 8))
    for top_k in (1, 2, 6):
        with forward_context(knobs=Knobs(top_k=top_k)):
            chosen = F.one_hot(moe.router(x, top_k).experts, 6).sum(1)
            expected = torch.einsum("teh,te,eoh->to", hidden, chosen.float(), w.w2) + w.b2[0]
            torch.testing.assert_close(moe(x), expected, rtol=1e-5, atol=1e-5)


def test_no_balance_is_asked_of_one_summed_expert():
    record = recorded(make(4, 1, combine="sum", balance_weight=0.0), torch.randn(9, 16))
    assert record.losses([])["balance"] == 0
    record = recorded(make(4, 1, balance_weight=0.0), torch.randn(9, 16))
    assert record.losses([])["balance"] > 0.05


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.floats(0, 1e5))
def test_gates_of_any_logits(slots, each, seed, scale):
    """Also where all probabilities of a slot would underflow beside another slot's."""
    logits = torch.randn(20, 3 * slots, generator=torch.Generator().manual_seed(seed)) * scale
    routing = route(logits, slots * each, slots)
    sums = routing.gates.unflatten(1, (slots, -1)).sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, 1 / slots))
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(20))
    assert all(len(set(row)) == slots * each for row in routing.experts.tolist())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=16), st.integers(1, 4))
def test_of_equal_probabilities_the_first_are_chosen(values, k):
    probabilities = torch.tensor(values) / 4
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert largest(probabilities[None], k).tolist() == [order[:k]]


def test_slots_are_balanced_each_for_itself():
    """The loss is the mean of the slots': one that collapsed is not helped by the others."""
    logits = torch.randn(40, 12)
    logits[:, 0] += 9
    whole = route(logits, 6, 3)
    parts = [route(part, 2) for part in logits.split(4, dim=1)]
    values = [torch.stack([f(part) for part in parts]) for f in (balance_loss, z_loss)]
    torch.testing.assert_close(balance_loss(whole), values[0].mean())
    torch.testing.assert_close(z_loss(whole, slots=3), values[1].mean())
    shifted = torch.cat([logits[:, :4] - 50, logits[:, 4:]], dim=1)
    torch.testing.assert_close(balance_loss(route(shifted, 6, 3)), balance_loss(whole))
    valid = torch.arange(40) < 10
    torch.testing.assert_close(z_loss(whole, valid, 3), z_loss(route(logits[:10], 6, 3), slots=3))


def test_slots_are_exported():
    moe = make(6, 3, slots=3).eval()
    exported = torch.export.export(moe, (torch.randn(9, 16),)).module()
    x = torch.randn(9, 16)
    torch.testing.assert_close(exported(x), moe(x))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balanced_routing_gives_exactly_one(top_k):
    experts, tokens = 6, 12
    chosen = torch.arange(tokens)[:, None] + torch.arange(top_k)
    even = torch.full((tokens, experts), 1 / experts)
    gates = torch.full((tokens, top_k), 1 / top_k)
    routing = Routing(even.log(), even, gates, chosen % experts)
    assert float(balance_loss(routing)) == pytest.approx(1.0, abs=1e-6)
    one = torch.zeros(tokens, experts)
    one[:, 0] = 1
    collapsed = Routing(one, one, torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.long))
    assert float(balance_loss(collapsed)) == experts


def test_balance_loss_balances():
    """Its gradient alone spreads a collapsed router over the experts."""
    moe = make(4, 1)
    with torch.no_grad():
        moe.router.weight[0] += 0.5
    x = torch.randn(256, 16) + 0.5
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    usage = []
    for _ in range(100):
        record = recorded(moe, x)
        usage.append(record.statistics()["usage"].max().item())
        loss = record.losses([])["balance"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert usage[0] > 0.9 and usage[-1] < 0.5


def test_task_trains_the_router_also_at_top_1():
    for top_k, slots in ((1, 1), (2, 1), (2, 2), (4, 2)):
        moe = make(8, top_k, slots=slots)
        moe(torch.randn(9, 16)).square().sum().backward()
        assert moe.router.weight.grad.abs().sum() > 0


def test_losses_and_their_weights():
    moe = make(4, 2, balance_weight=0.05, z_loss_weight=0.01)
    record = recorded(moe, torch.randn(30, 16))
    losses = record.losses([])
    torch.testing.assert_close(losses["balance"], 0.05 * balance_loss(record.routing))
    expected = 0.01 * (record.routing.logits.exp().sum(-1).log() ** 2).mean()
    torch.testing.assert_close(losses["z"], expected)
    single = recorded(make(4, 1, balance_weight=0.05), torch.randn(30, 16))
    torch.testing.assert_close(single.losses([])["balance"], 0.1 * balance_loss(single.routing))


@pytest.mark.parametrize(("top_k", "weight"), [(2, 0.1), (4, 0.05)])
def test_losses_of_slots(top_k, weight):
    """One expert of each slot is as one expert of all."""
    moe = make(8, top_k, slots=2, balance_weight=0.05, z_loss_weight=0.01)
    record = recorded(moe, torch.randn(30, 16))
    losses = record.losses([])
    torch.testing.assert_close(losses["balance"], weight * balance_loss(record.routing))
    torch.testing.assert_close(losses["z"], 0.01 * z_loss(record.routing, slots=2))


def test_balance_losses_of_a_stack_are_summed_or_averaged():
    x = torch.randn(30, 16)
    for top_k, weight in ((2, 0.05), (1, 0.1)):
        values = {}
        for reduction in ("sum", "mean"):
            config = MoEConfig(4, top_k, balance_weight=0.05, balance_reduction=reduction)
            first, dense, second = moe_layers(replace(config, layers=(2, 0)), 3)
            assert first == second and dense is None
            torch.manual_seed(0)
            record = recorded(MoE(first, 16, 32, "relu"), x)
            values[reduction] = record.losses([])
        torch.testing.assert_close(values["sum"]["balance"], weight * balance_loss(record.routing))
        torch.testing.assert_close(values["mean"]["balance"], values["sum"]["balance"] / 2)
        torch.testing.assert_close(values["mean"]["z"], values["sum"]["z"])
    every = moe_layers(MoEConfig(4, 2, balance_reduction="mean"), 3)
    assert every == [MoEConfig(4, 2, balance_reduction="mean", layers=(0, 1, 2))] * 3


def test_padding_counts_for_nothing():
    moe = make()
    x = torch.randn(2, 6, 16)
    where = TokenMap((1, 6), Padding(torch.tensor([[6, 1], [2, 1]]), (6, 1)))
    with forward_context(tokens=where):
        padded = recorded(moe, x)
    plain = recorded(moe, torch.cat([x[0], x[1, :2]]))
    for part in ("losses", "statistics"):
        arguments = ([],) if part == "losses" else ()
        values = [getattr(record, part)(*arguments) for record in (padded, plain)]
        torch.testing.assert_close(*values)


def test_statistics():
    experts = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 2]])
    even = torch.full((4, 3), 1 / 3)
    found = routing_statistics(Routing(even, even, torch.full((4, 2), 0.5), experts))
    assert float(found["balance"]) == pytest.approx(1)
    sure = torch.tensor([0.5, 0.3, 0.2]).expand(4, 3)
    uneven = routing_statistics(Routing(sure, sure, torch.full((4, 2), 0.5), experts))
    assert float(uneven["balance"]) == pytest.approx(3 * (0.5 * 3 + 0.3 * 3 + 0.2 * 2) / 8)
    torch.testing.assert_close(found["usage"], torch.tensor([3, 3, 2]) / 8)
    torch.testing.assert_close(found["entropy"], torch.tensor(3.0).log())
    expected = torch.tensor([[3, 2, 1], [2, 3, 1], [1, 1, 2]]) / 4
    torch.testing.assert_close(found["coactivation"], expected)


def test_temperature_follows_its_schedule():
    moe = make(4, 2, temperature=4.0, start_step=10, end_step=20)
    x = torch.randn(50, 16)
    entropy = []
    for step in (0, 15, 20, None):
        with forward_context(step=step):
            entropy.append(float(recorded(moe, x).statistics()["entropy"]))
    assert entropy[0] > entropy[1] > entropy[2] == entropy[3]


def test_a_module_keeps_nothing_of_a_forward():
    moe = make()
    before = set(vars(moe))
    recorded(moe, torch.randn(3, 16))
    assert set(vars(moe)) == before
    copy.deepcopy(moe)


def test_top_k_follows_its_knob():
    """Fewer experts, whose gates still sum to 1; parameters and FLOPs follow."""
    x = torch.randn(9, 16)
    for top_k in (1, 3):
        moe, other = make(4, 2), make(4, top_k)
        knobs = Knobs(top_k=top_k)
        with forward_context(knobs=knobs):
            record = recorded(moe, x)
            torch.testing.assert_close(moe(x), other(x))
            assert moe.active_parameters() == other.active_parameters()
        assert record.routing.experts.shape == (9, top_k)
        torch.testing.assert_close(record.routing.gates.sum(1), torch.ones(9))
        assert count_flops(moe, (x,), knobs) == count_flops(other, (x,))
        assert recorded(moe, x).routing.experts.shape == (9, 2)


def test_a_knob_that_slots_cannot_share_is_named():
    moe = make(8, 4, slots=2)
    x = torch.randn(9, 16)
    for top_k in (1, 3):
        with forward_context(knobs=Knobs(top_k=top_k)):
            with pytest.raises(ValueError, match=f"top_k={top_k} must be a multiple of slots=2"):
                moe(x)
    with forward_context(knobs=Knobs(top_k=2)):
        torch.testing.assert_close(moe(x), make(8, 2, slots=2)(x))


def test_router_stays_in_fp32_under_autocast():
    moe = make()
    x = torch.randn(40, 16)
    plain = moe.router(x, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = moe(x)
        assert torch.equal(moe.router(x, 2).experts, plain.experts)
        assert recorded(moe, x).routing.logits.dtype == torch.float32
    torch.testing.assert_close(output.float(), moe(x), rtol=0.05, atol=0.05)


def hand_count(tokens: int, top_k: int, dim: int, width: int, experts: int) -> int:
    return tokens * (top_k * 2 * dim * width + experts * dim)


def test_flops_of_a_known_routing():
    """Fine-grained: k / E of the dense FFN; full width: k dense FFNs; plus the router."""
    x = torch.randn(50, 16)
    dense = 50 * 2 * 16 * 32
    for expert_dim, width in ((None, 8), (32, 32)):
        moe = make(4, 2, expert_dim=expert_dim, dispatch="sorted").eval()
        total = count_flops(moe, (x,)).total
        assert total == hand_count(50, 2, 16, width, 4)
        assert total - 50 * 4 * 16 == dense * 2 * width // 32


def test_active_parameters():
    moe = make(4, 2)
    expert = sum(p.numel() for p in moe.experts.parameters()) // 4
    assert moe.active_parameters() == 4 * 16 + 2 * expert


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_experts": 0}, "num_experts=0"),
        ({"top_k": 5}, r"top_k=5 must lie in 1..num_experts=4"),
        ({"expert_dim": 0}, "expert_dim=0"),
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"combine": "max"}, "combine='max' is not one of"),
        ({"combine": "sum", "slots": 2}, "combine='sum' needs slots=1, not slots=2"),
        ({"slots": 2, "num_experts": 5}, "num_experts=5 must be a multiple of slots=2"),
        ({"slots": 2, "top_k": 3}, "top_k=3 must be a multiple of slots=2"),
        ({"balance_weight": -1}, "balance_weight=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"act": "tanh"}, "act='tanh' is not one of"),
        ({"balance_reduction": "max"}, "balance_reduction='max' is not one of"),
        ({"dispatch": "fast"}, "dispatch='fast' is not one of"),
        ({"start_step": 9, "end_step": 3}, "start_step=9 and end_step=3"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": 4, "top_k": 2} | wrong)


def test_widths_and_layers_that_do_not_fit():
    assert MoEConfig(6, 3).width(1024) == 168  # 170.7, in rows of 16 bytes
    assert MoEConfig(4, 2).width(1024) == 256 and MoEConfig(4, 2, expert_dim=7).width(32) == 7
    with pytest.raises(ValueError, match=r"layers=\[0, 7\] names none of 3 layers: \[7\]"):
        moe_layers(MoEConfig(4, 2, layers=(0, 7)), 3)
    config = MoEConfig(4, 2, layers=(1,))
    assert moe_layers(config, 3) == [None, config, None]


def test_config_overrides_and_survives_yaml(tmp_path):
    cfg = DictConfig({"moe": L(MoEConfig)(num_experts=4, top_k=2)}, flags={"allow_objects": True})
    LazyConfig.apply_overrides(cfg, ["moe.top_k=1", "moe.num_experts=6"])
    LazyConfig.save(cfg, str(tmp_path / "c.yaml"))
    moe = instantiate(LazyConfig.load(str(tmp_path / "c.yaml")).moe)
    assert moe == MoEConfig(num_experts=6, top_k=1)


def worker(rank: int, folder: str) -> None:
    moe = DistributedDataParallel(make())
    for _ in range(2):
        # Each process leaves some experts unused; the next step would hang or fail.
        x = torch.full((6, 16), 1.0 - 2 * rank)
        moe.zero_grad()
        with forward_context(record=True) as context:
            loss = moe(x).square().sum()
        record = context.records["moe"]
        (loss + sum(record.losses([]).values())).backward()
    value = balance_loss(record.routing).item()
    torch.save((value, moe.module.router.weight.grad), f"{folder}/{rank}.pt")


def test_two_processes_share_the_balance(tmp_path):
    in_two_processes(worker, str(tmp_path))
    (first, grad), (second, same) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert torch.equal(grad, same)
    # Mean over the processes of E * sum f P, with f of both, is the joined batch's.
    joined_record = recorded(make(), torch.cat([torch.ones(6, 16), -torch.ones(6, 16)]))
    joined = balance_loss(joined_record.routing).item()
    assert (first + second) / 2 == pytest.approx(joined, rel=1e-5)

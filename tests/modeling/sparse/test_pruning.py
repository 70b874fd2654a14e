import math

import pytest
import torch
from detectron2.utils import logger
from detectron2.utils.events import EventStorage

from dset_d2.analysis import count_flops
from dset_d2.clock import ramp
from dset_d2.modeling import forward_context
from dset_d2.modeling.decoder.deformable_attention import Memory
from dset_d2.modeling.encoder.hybrid_encoder import (
    TransformerEncoder,
    TransformerEncoderLayer,
    position_embedding,
)
from dset_d2.modeling.sparse import (
    MemoryPruningConfig,
    PruningConfig,
    PruningRecord,
    TokenPruner,
)
from dset_d2.modeling.sparse.pruning import best_tokens, foreground, keep_count
from dset_d2.modeling.tokens import Padding, TokenMap, prune, restore

from ...conftest import make_inputs, make_targets, sparse_model, tiny_model

SHAPE = (6, 8)
MAP = TokenMap(SHAPE)


def encoder(dim=16, **pruning) -> TransformerEncoder:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(dim, 4, 32, 0.0, "gelu")
    pruner = TokenPruner(PruningConfig(**pruning), dim) if pruning else None
    return TransformerEncoder([layer], pruner)


def recorded(pruner: TokenPruner, tokens: torch.Tensor, where: TokenMap = MAP) -> PruningRecord:
    with forward_context(record=True) as context:
        pruner(tokens, where)
    return context.records["pruning"]


def inputs(dim=16) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    position = position_embedding(*SHAPE, dim, 10000.0, torch.device("cpu"))
    return torch.randn(2, 48, dim), position


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_keep_ratio_1_is_dense_bit_for_bit(training, placement):
    dense = encoder()
    pruned = encoder(keep_ratio=1.0, placement=placement)
    pruned.load_state_dict(dense.state_dict(), strict=False)
    x, position = inputs()
    outputs = [e.train(training)(x, position, MAP)[0] for e in (dense, pruned)]
    assert torch.equal(*outputs)


def test_whole_model_at_ratio_1_is_dense_bit_for_bit():
    dense = tiny_model()
    sparse = sparse_model(moe=False, keep_ratio=1.0, memory=1.0)
    sparse.load_state_dict(dense.state_dict(), strict=False)
    images = torch.rand(1, 3, 96, 128)
    found = [m.predict(images) for m in (dense, sparse)]
    for name in found[0]:
        assert torch.equal(found[0][name], found[1][name])


@pytest.mark.parametrize("restore", ["bypass", "zero"])
def test_kept_tokens_attend_among_themselves(restore):
    pruned = encoder(keep_ratio=0.5, min_tokens=1, restore=restore).eval()
    x, position = inputs()
    output, dropped = pruned(x, position, MAP)
    index, gate = pruned.pruner(x, MAP)
    assert dropped is None and gate is None and index.shape == (2, 24)
    assert (index.diff(dim=1) > 0).all()  # spatial order
    for image in range(2):
        kept = index[image]
        alone = pruned.run(x[image, kept][None], position[:, kept], MAP)[0]
        torch.testing.assert_close(output[image, kept], alone)
        rest = torch.ones(48, dtype=torch.bool).index_fill(0, kept, False)
        expected = x[image, rest] if restore == "bypass" else torch.zeros(24, 16)
        assert torch.equal(output[image, rest], expected)


def test_after_the_layer_all_attend_and_the_output_is_thinned():
    pruned = encoder(keep_ratio=0.25, min_tokens=1, placement="after", restore="zero").eval()
    x, position = inputs()
    dense = pruned.run(x, position, MAP)
    output, _ = pruned(x, position, MAP)
    kept = output.abs().sum(-1) > 0
    assert kept.sum(1).tolist() == [12, 12]
    torch.testing.assert_close(output[kept], dense[kept])


def test_after_the_layer_the_decoder_neither_reads_nor_selects_the_pruned():
    model = sparse_model(moe=False, memory=1.0, placement="after", keep_ratio=0.25)
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        features = list(model.backbone(images).values())
        encoded = model.encoder(features)
        found = model.decoder(encoded)
        *finer, dropped = encoded.dropped
        assert finer == [None, None]
        assert dropped.sum(1).tolist() == [9, 9]  # of 3 x 4 tokens
        other = encoded._replace(features=[x.clone() for x in encoded.features])
        other.features[2].flatten(2).transpose(1, 2)[dropped] = 100.0
        torch.testing.assert_close(model.decoder(other), found)
        read = model.decoder(other._replace(dropped=None))
        assert not torch.equal(read["pred_boxes"], found["pred_boxes"])
        torch.testing.assert_close(model.predict(images), found)


def test_the_scorer_chooses():
    pruned = encoder(keep_ratio=0.5, min_tokens=1).eval()
    x, _ = inputs()
    scores = pruned.pruner.scores(x, MAP)
    index, _ = pruned.pruner(x, MAP)
    worst_kept = scores.gather(1, index).min(1).values
    dropped = scores.scatter(1, index, -torch.inf).max(1).values
    assert (worst_kept >= dropped).all()


@pytest.mark.parametrize("foreground_weight", [0.0, 1.0])
@pytest.mark.parametrize("gate", [False, True])
def test_gradients_of_the_scorer(gate, foreground_weight):
    """From the task through the gate alone, and from its own loss alone."""
    settings = {"gate": gate, "foreground_weight": foreground_weight}
    pruned = encoder(keep_ratio=0.5, min_tokens=1, **settings).train()
    x, position = inputs()
    with forward_context(record=True) as context:
        loss = pruned(x, position, MAP)[0].square().sum()
    own = context.records["pruning"].losses(make_targets(2, 3))
    assert bool(own) == bool(foreground_weight)
    if gate:
        loss.backward()
    elif own:
        own["foreground"].backward()
    gradient = pruned.pruner.scorer.layers[0].weight.grad
    assert (gradient is not None and gradient.abs().sum() > 0) == (gate or bool(own))


def test_task_reaches_the_scorer_through_the_whole_model():
    model = sparse_model(foreground_weight=0.0).train()
    losses = model.compute_losses(torch.rand(2, 3, 96, 128), make_targets(2, 3))
    sum(v for k, v in losses.items() if "balance" not in k and "loss_z" not in k).backward()
    for parameter in model.encoder.encoder[0].pruner.scorer.parameters():
        assert parameter.grad.abs().sum() > 0


def test_prune_and_restore():
    x = torch.randn(2, 6, 3)
    index = torch.tensor([[0, 2, 5], [1, 2, 3]])
    kept = prune(x, index)
    assert torch.equal(kept[1, 0], x[1, 1]) and kept.shape == (2, 3, 3)
    assert torch.equal(prune(x[:1], index)[1], x[0, index[1]])  # what all images share
    assert torch.equal(prune(x[..., 0], index), kept[..., 0])
    assert prune(x, None) is x and prune(None, index) is None
    assert torch.equal(restore(x, index, kept), x)
    assert restore(x, None, kept) is kept
    zero = restore(torch.zeros_like(x), index, kept)
    assert torch.equal(zero[0, [0, 2, 5]], kept[0]) and not zero[0, [1, 3, 4]].any()


def test_a_second_place_scores_what_the_first_kept():
    """Its prior, its foreground and its own choice follow the tokens, wherever they stand."""
    pruned = encoder(keep_ratio=0.5, min_tokens=1, spatial_prior="flat")
    second = encoder(keep_ratio=0.25, min_tokens=1, spatial_prior="flat").pruner
    with torch.no_grad():
        second.prior.copy_(torch.arange(16.0).view(1, 1, 16, 1) * 100)  # lower rows win
    x, _ = inputs()
    index, _ = pruned.pruner(x, MAP)
    where = MAP.prune(index)
    record = recorded(second, prune(x, index), where)
    assert record.scores.shape == (2, 24) and record.kept.index.shape == (2, 12)
    for image in range(2):
        kept = record.kept.index[image]
        assert torch.isin(kept, index[image]).all()
        assert torch.equal(kept // 8, index[image][-12:] // 8)  # the lowest rows
        assert torch.equal(record.kept_cells()[image].nonzero().flatten(), kept)
    assert record.statistics() == {"keep_ratio": 0.25}
    targets = make_targets(2, 3)
    expected = foreground(targets, SHAPE).gather(1, index)
    assert torch.equal(record.foreground(targets), expected)
    assert record.losses(targets)["foreground"] > 0


def test_schedules():
    assert [ramp(s, 10, 20, 1.0, 0.5) for s in (0, 10, 15, 20, 99)] == [1, 1, 0.75, 0.5, 0.5]
    assert ramp(0, 0, 0, 1.0, 0.5) == 0.5
    from_the_start = encoder(keep_ratio=0.5, min_tokens=1, end_step=10).pruner
    waits = encoder(keep_ratio=0.5, min_tokens=1, start_step=10, end_step=20).pruner
    ratios = []
    for step in (0, 5, 10, 15, 20, None):
        with forward_context(step=step):
            ratios.append((from_the_start.ratio(), waits.ratio()))
    assert ratios == [(1, 1), (0.75, 1), (0.5, 1), (0.5, 0.75), (0.5, 0.5), (0.5, 0.5)]


def test_the_detectors_clock_drives_the_schedule():
    model = sparse_model(moe=False, end_step=4)
    kept = []
    pruner = model.encoder.encoder[0].pruner
    pruner.register_forward_hook(lambda m, x, y: kept.append(16 if y[0] is None else len(y[0][0])))
    model.predict(torch.rand(1, 3, 128, 128))
    assert kept == [8]  # as configured, before any training
    for _ in range(6):
        model.train()(make_inputs([(128, 128)]))
        model.clock.tick()
        model.eval().predict(torch.rand(1, 3, 128, 128))
    assert kept[1::2] == [16, 14, 12, 10, 8, 8]  # the first step is step 0
    assert kept[2::2] == [14, 12, 10, 8, 8, 8]


def test_at_least_min_tokens_stay():
    assert keep_count(0.1, 400, 100) == 100
    assert keep_count(0.7, 400, 100) == 280
    assert keep_count(0.7, 60, 100) == 60
    assert keep_count(0.333, 10, 1) == math.ceil(3.33)
    assert keep_count(0.55, 400, 100) == 220
    assert keep_count(0.3, torch.tensor(400), 100) == 120


def test_spatial_prior_moves_the_choice():
    pruner = encoder(keep_ratio=0.5, min_tokens=1, spatial_prior="flat").pruner.eval()
    with torch.no_grad():
        pruner.prior[..., :8, :] = 100  # the upper half of the picture
    index, _ = pruner(inputs()[0], MAP)
    assert (index < 24).all()


def test_spatial_prior_starts_where_it_is_told_and_learns():
    starts = {}
    for start in ("flat", "centre", "lower"):
        pruner = encoder(keep_ratio=0.5, min_tokens=1, spatial_prior=start).pruner.train()
        starts[start] = pruner.prior[0, 0].detach().clone()
        with torch.no_grad():
            pruner.scorer.layers[-1].weight.zero_()  # the prior alone
        index, _ = pruner(inputs()[0], MAP)
        if start == "lower":
            assert (index // 8 >= 3).all()
        if start == "centre":
            assert torch.isin(torch.tensor([19, 20, 27, 28]), index[0]).all()  # the four inmost
            assert not torch.isin(torch.tensor([0, 7, 40, 47]), index).any()  # the corners
        recorded(pruner, inputs()[0]).losses(make_targets(2, 3))["foreground"].backward()
        assert pruner.prior.grad.abs().sum() > 0
    assert not starts["flat"].any()
    for start in ("centre", "lower"):
        assert 0.8 < starts[start].max() < 1 and -1 < starts[start].min() < -0.7


def test_foreground_marks_touched_cells_also_of_padded_images():
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.9, 0.9, 0.01, 0.01]])
    mask = foreground([{"boxes": boxes}, {"boxes": boxes[:0]}], (4, 4)).view(2, 4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, :2] = True
    expected[3, 3] = True
    assert torch.equal(mask[0], expected) and not mask[1].any()
    padding = Padding(torch.tensor([[4, 4]]), (8, 4))  # the image fills the left half
    mask = foreground([{"boxes": boxes[:1]}], (4, 8), padding).view(4, 8)
    assert mask[:2, :2].all() and mask.sum() == 4


def test_padding_is_never_kept_before_the_image():
    pruner = encoder(keep_ratio=0.5, min_tokens=1).pruner.eval()
    where = TokenMap(SHAPE, Padding(torch.tensor([[5, 6]] * 2), (8, 6)))
    index, _ = pruner(inputs()[0], where)
    assert (index % 8 < 5).all()
    assert where.prune(index).valid.all() and not where.valid.all()


def test_sparsity_and_diversity_losses():
    pruned = encoder(
        keep_ratio=0.5, min_tokens=1, foreground_weight=0, sparsity_weight=2.0, diversity_weight=3.0
    ).train()
    x, position = inputs()
    losses = recorded(pruned.pruner, x).losses(make_targets(2, 3))
    worth = pruned.pruner.scores(x, MAP).sigmoid()
    torch.testing.assert_close(losses["sparsity"], 2 * worth.mean())
    weight = worth / worth.sum(1, keepdim=True)
    unit = x / x.norm(dim=-1, keepdim=True)
    pairs = (weight[:, :, None] * weight[:, None] * (unit @ unit.mT) ** 2).sum((1, 2))
    torch.testing.assert_close(losses["diversity"], 3 * pairs.mean())
    sum(losses.values()).backward()
    assert pruned.pruner.scorer.layers[0].weight.grad.abs().sum() > 0


def test_memory_pruning_projects_and_reads_the_best_tokens_only():
    model = sparse_model(moe=False, memory=0.25, keep_ratio=1.0)
    rows = []
    attention = model.decoder.decoder.layers[0].cross_attn
    attention.value_proj.register_forward_hook(lambda m, x, y: rows.append(x[0].shape[1]))
    model.predict(torch.rand(1, 3, 128, 128))
    total = 16 * 16 + 8 * 8 + 4 * 4
    assert rows == [keep_count(0.25, total, 30)] == [84]
    scores = torch.rand(1, 10)
    assert torch.equal(best_tokens(scores, 4)[0], scores[0].topk(4).indices.sort().values)


def test_memory_pruning_equals_zeroed_values():
    """Against the dense path whose values are set to zero by hand."""
    model = sparse_model(moe=False, memory=0.25, keep_ratio=1.0)
    attention = model.decoder.decoder.layers[0].cross_attn
    memory, query = torch.randn(2, 336, 32), torch.randn(2, 7, 32)
    reference = torch.rand(2, 7, 4) * 0.4 + 0.3
    shapes = [(16, 16), (8, 8), (4, 4)]
    kept = best_tokens(torch.rand(2, 336), 84)
    gathered = memory.gather(1, kept[..., None].expand(-1, -1, 32))
    found = attention(query, reference, Memory(gathered, shapes, kept))
    mask = torch.zeros(2, 336, dtype=torch.bool).scatter(1, kept, True)
    expected = attention(query, reference, Memory(memory, shapes, valid=mask))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sizes", [[(96, 128)] * 3, [(96, 128), (160, 100), (70, 90)]])
def test_sparse_detections_do_not_depend_on_the_batch(sizes):
    model = sparse_model()
    batch = make_inputs(sizes)
    with torch.no_grad():
        together = [x["instances"].scores for x in model(batch)]
        alone = [model([x])[0]["instances"].scores for x in batch]
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [0, 3])
def test_every_parameter_of_a_sparse_model_gets_a_gradient(count):
    model = sparse_model(spatial_prior="flat").train()
    losses = model(make_inputs([(96, 128), (128, 96)], boxes_per_image=count))
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_losses_and_statistics_are_collected_by_place():
    model = sparse_model().train()
    images, targets = torch.rand(2, 3, 96, 128), make_targets(2, 3)
    losses = model.compute_losses(images, targets)
    places = {name for name in losses if name.split("_")[1] in ("balance", "z", "foreground")}
    assert places == {
        "loss_foreground_encoder_0",
        "loss_balance_encoder_0_0",
        "loss_z_encoder_0_0",
        *(f"loss_{term}_decoder_{i}" for i in range(3) for term in ("balance", "z")),
    }
    assert all(value.requires_grad for name, value in losses.items() if name in places)


def test_records_are_left_by_place_where_they_are_wanted():
    model = sparse_model()
    with forward_context(record=True) as context:
        model.predict(torch.rand(2, 3, 96, 128))
    assert context.records.keys() == {
        "pruning/encoder_0",
        "moe/encoder_0_0",
        *(f"moe/decoder_{i}" for i in range(3)),
    }
    assert context.records["pruning/encoder_0"].statistics() == {"keep_ratio": 0.5}
    assert context.records["moe/decoder_1"].statistics()["usage"].shape == (4,)
    assert context.records["moe/encoder_0_0"].tokens.index.shape == (2, 6)
    assert context.records["moe/decoder_1"].tokens is None


def test_the_log_gets_statistics_and_a_warning_of_a_greedy_expert(caplog, monkeypatch):
    monkeypatch.setattr(logger, "_LOG_TIMER", {})
    model = sparse_model().train()
    router = model.decoder.decoder.layers[0].ffn.router
    with torch.no_grad():
        router.weight.zero_()  # ties go to the same two experts
    with EventStorage() as storage:
        model(make_inputs([(96, 128)]))
        latest = storage.latest()
    assert latest["pruning/encoder_0/keep_ratio"][0] == 0.5
    assert latest["moe/decoder_0/max_usage"][0] == 0.5
    usage = [latest[f"moe/decoder_0/usage_{expert}"][0] for expert in range(4)]
    assert sorted(usage) == [0, 0, 0.5, 0.5]
    assert latest["moe/decoder_0/balance"][0] == pytest.approx(1)  # ties: equal probabilities
    assert latest["moe/encoder_0_0/balance"][0] > 1
    assert latest["moe/decoder_1/entropy"][0] > 0
    assert "one expert takes too many of the tokens" in caplog.text
    assert "moe/decoder_0: 100% by expert" in caplog.text


def test_flops_of_a_pruned_layer():
    dense, pruned = encoder().eval(), encoder(keep_ratio=0.5, min_tokens=1).eval()
    x, position = inputs()

    def layer(tokens: int) -> int:
        attention = 4 * tokens * 16 * 16 + 2 * tokens**2 * 16
        return attention + 2 * tokens * 16 * 32

    found = {}
    for module in (dense, pruned):
        report = count_flops(module, (x[:1], position, MAP))
        found[module] = report.total - report.by_operator.get("layer_norm", 0)
    scorer = 48 * (16 * 128 + 128)
    assert found[dense] == layer(48)
    assert found[pruned] == layer(24) + scorer


def test_bfloat16_autocast():
    model = sparse_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(make_inputs([(96, 128)]))
    assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (PruningConfig, {"keep_ratio": 0}, r"keep_ratio=0 must lie in \(0, 1\]"),
        (PruningConfig, {"keep_ratio": 0.5, "min_tokens": 0}, "min_tokens=0"),
        (PruningConfig, {"keep_ratio": 0.5, "restore": "mean"}, "restore='mean'"),
        (PruningConfig, {"keep_ratio": 0.5, "placement": "inside"}, "placement='inside'"),
        (PruningConfig, {"keep_ratio": 0.5, "spatial_prior": True}, "spatial_prior=True is not"),
        (PruningConfig, {"keep_ratio": 0.5, "start_step": 5}, "start_step=5 and end_step=0"),
        (PruningConfig, {"keep_ratio": 0.5, "sparsity_weight": -1}, "sparsity_weight=-1"),
        (MemoryPruningConfig, {"keep_ratio": 1.5}, "keep_ratio=1.5"),
    ],
)
def test_wrong_settings(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)

import math

import pytest
import torch
from detectron2.utils.events import EventStorage

from dset_d2.analysis import count_flops
from dset_d2.modeling.encoder.hybrid_encoder import (
    TransformerEncoder,
    TransformerEncoderLayer,
    position_embedding,
)
from dset_d2.modeling.sparse import (
    MemoryPruningConfig,
    PruningConfig,
    TokenPruner,
    clear_records,
    sparse_losses,
    sparse_statistics,
)
from dset_d2.modeling.sparse.pruning import best_tokens, foreground, keep_count
from dset_d2.modeling.sparse.schedule import ramp

from ...conftest import make_inputs, make_targets, sparse_model, tiny_model

SHAPE = (6, 8)


def encoder(dim=16, **pruning) -> TransformerEncoder:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(dim, 4, 32, 0.0, "gelu")
    pruner = TokenPruner(PruningConfig(**pruning), dim) if pruning else None
    return TransformerEncoder([layer], pruner)


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
    outputs = [e.train(training)(x, position, SHAPE) for e in (dense, pruned)]
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
    output = pruned(x, position, SHAPE)
    index, gate = pruned.pruner(x, SHAPE)
    assert gate is None and index.shape == (2, 24)
    assert (index.diff(dim=1) > 0).all()  # spatial order
    for image in range(2):
        kept = index[image]
        alone = pruned.run(x[image, kept][None], position[:, kept], None)[0]
        torch.testing.assert_close(output[image, kept], alone)
        rest = torch.ones(48, dtype=torch.bool).index_fill(0, kept, False)
        expected = x[image, rest] if restore == "bypass" else torch.zeros(24, 16)
        assert torch.equal(output[image, rest], expected)


def test_after_the_layer_all_attend_and_the_output_is_thinned():
    pruned = encoder(keep_ratio=0.25, min_tokens=1, placement="after", restore="zero").eval()
    x, position = inputs()
    dense = pruned.run(x, position, None)
    output = pruned(x, position, SHAPE)
    kept = output.abs().sum(-1) > 0
    assert kept.sum(1).tolist() == [12, 12]
    torch.testing.assert_close(output[kept], dense[kept])


def test_after_the_layer_the_decoder_neither_reads_nor_selects_the_pruned():
    model = sparse_model(moe=False, memory=1.0, placement="after", keep_ratio=0.25)
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        features = list(model.backbone(images).values())
        encoded = model.encoder(features)
        found = model.decoder(encoded, dropped=model.encoder.dropped)
        dropped = model.encoder.dropped[2]
        assert model.encoder.dropped[:2] == [None, None]
        assert dropped.sum(1).tolist() == [9, 9]  # of 3 x 4 tokens
        other = [x.clone() for x in encoded]
        other[2].flatten(2).transpose(1, 2)[dropped] = 100.0
        changed = model.decoder(other, dropped=model.encoder.dropped)
        torch.testing.assert_close(changed, found)
        assert not torch.equal(model.decoder(other)["pred_boxes"], found["pred_boxes"])
        torch.testing.assert_close(model.predict(images), found)


def test_the_scorer_chooses():
    pruned = encoder(keep_ratio=0.5, min_tokens=1).eval()
    x, _ = inputs()
    scores = pruned.pruner.scores(x, SHAPE)
    index, _ = pruned.pruner(x, SHAPE)
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
    loss = pruned(x, position, SHAPE).square().sum()
    own = pruned.pruner.losses(make_targets(2, 3))
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


def test_schedules():
    assert [ramp(s, 10, 20, 1.0, 0.5) for s in (0, 10, 15, 20, 99)] == [1, 1, 0.75, 0.5, 0.5]
    assert ramp(0, 0, 0, 1.0, 0.5) == 0.5
    from_the_start = encoder(keep_ratio=0.5, min_tokens=1, end_step=10).pruner
    waits = encoder(keep_ratio=0.5, min_tokens=1, start_step=10, end_step=20).pruner
    ratios = []
    for step in (0, 5, 10, 15, 20, None):
        from_the_start.step = waits.step = step
        ratios.append((from_the_start.ratio(), waits.ratio()))
    assert ratios == [(1, 1), (0.75, 1), (0.5, 1), (0.5, 0.75), (0.5, 0.5), (0.5, 0.5)]


def test_the_detectors_clock_drives_the_schedule():
    model = sparse_model(moe=False, end_step=4).train()
    ratios = []
    for _ in range(5):
        model(make_inputs([(128, 128)]))
        ratios.append(model.encoder.encoder[0].pruner.ratio())
    assert ratios == [0.875, 0.75, 0.625, 0.5, 0.5]
    fresh = sparse_model(moe=False, end_step=4)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items()})
    fresh.clock.steps.fill_(2)  # a checkpoint from the middle
    fresh.eval().predict(torch.rand(1, 3, 128, 128))
    assert fresh.encoder.encoder[0].pruner.ratio() == 0.75


def test_at_least_min_tokens_stay():
    assert keep_count(0.1, 400, 100) == 100
    assert keep_count(0.7, 400, 100) == 280
    assert keep_count(0.7, 60, 100) == 60
    assert keep_count(0.333, 10, 1) == math.ceil(3.33)
    assert keep_count(0.55, 400, 100) == 220
    assert keep_count(0.3, torch.tensor(400), 100) == 120


def test_spatial_prior_moves_the_choice():
    pruner = encoder(keep_ratio=0.5, min_tokens=1, spatial_prior=True).pruner.eval()
    with torch.no_grad():
        pruner.prior[..., :8, :] = 100  # the upper half of the picture
    index, _ = pruner(inputs()[0], SHAPE)
    assert (index < 24).all()


def test_foreground_marks_touched_cells_also_of_padded_images():
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.9, 0.9, 0.01, 0.01]])
    mask = foreground([{"boxes": boxes}, {"boxes": boxes[:0]}], (4, 4)).view(2, 4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[:2, :2] = True
    expected[3, 3] = True
    assert torch.equal(mask[0], expected) and not mask[1].any()
    ratio = torch.tensor([[0.5, 1.0]])  # the image fills the left half
    mask = foreground([{"boxes": boxes[:1]}], (4, 8), ratio).view(4, 8)
    assert mask[:2, :2].all() and mask.sum() == 4


def test_padding_is_never_kept_before_the_image():
    pruner = encoder(keep_ratio=0.5, min_tokens=1).pruner.eval()
    valid = torch.zeros(2, *SHAPE, dtype=torch.bool)
    valid[:, :, :5] = True
    index, _ = pruner(inputs()[0], SHAPE, valid.flatten(1))
    assert valid.flatten(1).gather(1, index).all()


def test_sparsity_and_diversity_losses():
    pruned = encoder(
        keep_ratio=0.5, min_tokens=1, foreground_weight=0, sparsity_weight=2.0, diversity_weight=3.0
    ).train()
    x, position = inputs()
    pruned(x, position, SHAPE)
    losses = pruned.pruner.losses(make_targets(2, 3))
    worth = pruned.pruner.scores(x, SHAPE).sigmoid()
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
    found = attention(query, reference, gathered, shapes, kept=kept)
    mask = torch.zeros(2, 336, dtype=torch.bool).scatter(1, kept, True)
    torch.testing.assert_close(found, attention(query, reference, memory, shapes, valid=mask))


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
    model = sparse_model(spatial_prior=True).train()
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
    statistics = sparse_statistics(model)
    assert statistics["pruning/encoder_0"] == {"keep_ratio": 0.5}
    assert statistics["moe/decoder_1"]["usage"].shape == (4,)
    clear_records(model)
    assert sparse_statistics(model) == {} == sparse_losses(model, targets)
    model.eval().predict(images)
    assert sparse_statistics(model) == {}


def test_the_log_gets_statistics_and_a_warning_of_a_greedy_expert(caplog):
    model = sparse_model().train()
    router = model.decoder.decoder.layers[0].moe.router
    with torch.no_grad():
        router.weight.zero_()  # ties go to the same two experts
    with EventStorage() as storage:
        model(make_inputs([(96, 128)]))
        latest = storage.latest()
    assert latest["pruning/encoder_0/keep_ratio"][0] == 0.5
    assert latest["moe/decoder_0/max_usage"][0] == 0.5
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
        report = count_flops(module, (x[:1], position, SHAPE))
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
        (PruningConfig, {"keep_ratio": 0.5, "start_step": 5}, "start_step=5 and end_step=0"),
        (PruningConfig, {"keep_ratio": 0.5, "sparsity_weight": -1}, "sparsity_weight=-1"),
        (MemoryPruningConfig, {"keep_ratio": 1.5}, "keep_ratio=1.5"),
    ],
)
def test_wrong_settings(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)

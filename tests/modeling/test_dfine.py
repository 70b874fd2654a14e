"""D-FINE's own parts: distributions of edges, their losses, and what only training runs."""

import math

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model

import dset_d2
from dset_d2.modeling import DFINECriterion, DFINEDecoder, Encoded, HungarianMatcher
from dset_d2.modeling.criterion.dfine_criterion import (
    Mixture,
    distillation,
    fine_grained,
    unite,
)
from dset_d2.modeling.criterion.matcher import Matches
from dset_d2.modeling.criterion.set_criterion import pair
from dset_d2.modeling.decoder.dfine import LQE, Gate
from dset_d2.modeling.decoder.distribution import EdgeDistribution
from dset_d2.modeling.sparse import MemoryPruningConfig
from dset_d2.modeling.tokens import Padding

from ..conftest import make_inputs, make_targets, tiny_config, tiny_model

N, S = "configs/dfine/dfine_n_coco.py", "configs/dfine/dfine_s_coco.py"
WEIGHTS = {"vfl": 1.0, "mal": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}


def one_match(*rows) -> Matches:
    """From (image, query, target) triples."""
    return Matches(*torch.tensor(rows).reshape(-1, 3).unbind(1))


# Distributions


@pytest.mark.parametrize("reg_scale", [4.0, 8.0])
def test_bins_follow_the_formula(reg_scale):
    a = 0.5 * reg_scale
    step = (a + 1) ** (2 / 30)
    positive = [step**i - 1 for i in range(1, 16)] + [2 * a]
    bins = [-x for x in reversed(positive)] + [0.0] + positive
    distribution = EdgeDistribution(32, 0.5, reg_scale)
    torch.testing.assert_close(distribution.bins, torch.tensor(bins))
    assert (distribution.bins.diff() > 0).all()


def test_bins_follow_loaded_settings():
    distribution = EdgeDistribution(reg_scale=4.0)
    distribution.load_state_dict(EdgeDistribution(reg_scale=8.0).state_dict())
    assert torch.equal(distribution.bins, EdgeDistribution(reg_scale=8.0).bins)


def test_decode_is_the_mean_offset():
    distribution = EdgeDistribution()
    reference = torch.tensor([[0.5, 0.4, 0.2, 0.1]])
    # All mass on the middle bin leaves the box as it is.
    probabilities = torch.zeros(1, 4, 33)
    probabilities[..., 16] = 1
    torch.testing.assert_close(distribution.decode(reference, probabilities), reference)
    # All mass of the left edge on the last bin moves it out by bins[-1] / reg_scale of the width.
    probabilities[0, 0] = torch.eye(33)[32]
    left = 0.4 - 4.0 / 4.0 * 0.2
    expected = torch.tensor([[(left + 0.6) / 2, 0.4, 0.6 - left, 0.1]])
    torch.testing.assert_close(distribution.decode(reference, probabilities), expected)


def test_encode_inverts_decode():
    torch.manual_seed(0)
    distribution = EdgeDistribution()
    reference = torch.rand(50, 4) * 0.4 + 0.3
    boxes = reference + (torch.rand(50, 4) - 0.5) * 0.2
    left, right_share = distribution.encode(reference, boxes)
    probabilities = torch.zeros(50, 4, 33)
    probabilities.scatter_(-1, left[..., None], 1 - right_share[..., None])
    probabilities.scatter_add_(-1, left[..., None] + 1, right_share[..., None])
    torch.testing.assert_close(distribution.decode(reference, probabilities), boxes)


def test_encode_at_and_beyond_the_ends():
    distribution = EdgeDistribution()
    reference = torch.tensor([[0.5, 0.5, 0.1, 0.1]])
    far = torch.tensor([[0.5, 0.5, 0.9, 0.1]])  # left and right edges beyond the last bin
    left, share = distribution.encode(reference, far)
    assert left.tolist() == [[31, 16, 31, 16]]
    torch.testing.assert_close(share, torch.tensor([[1.0, 0.0, 1.0, 0.0]]), rtol=0, atol=1e-5)
    beside = torch.tensor([[0.9, 0.5, 0.1, 0.1]])  # its left edge lies right of the reference
    left, share = distribution.encode(reference, beside)
    assert (left[0, 0], share[0, 0]) == (0, 0)
    assert (left[0, 2], share[0, 2]) == (31, 1)
    flat = torch.tensor([[0.5, 0.5, 0.0, 0.1]])  # a reference without width
    assert torch.isfinite(distribution.encode(flat, far)[1]).all()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="reg_max=33"):
        EdgeDistribution(reg_max=33)
    with pytest.raises(ValueError, match="reg_scale=0"):
        EdgeDistribution(reg_scale=0)
    with pytest.raises(ValueError, match="layer_scale=0.5"):
        DFINEDecoder(num_classes=2, layer_scale=0.5)
    with pytest.raises(ValueError, match="classification='focal'"):
        DFINECriterion(2, HungarianMatcher(), WEIGHTS, classification="focal")
    with pytest.raises(ValueError, match="fgl"):
        DFINECriterion(2, HungarianMatcher(), {"vfl": 1.0, "bbox": 5.0, "giou": 2.0})
    cfg = tiny_config(S)
    cfg.model.encoder.fusion = "bifpn"
    with pytest.raises(ValueError, match="fusion='bifpn'"):
        instantiate(cfg.model.encoder)


# Layers


def test_lqe_starts_without_effect():
    logits, probabilities = torch.randn(2, 5, 3), torch.rand(2, 5, 4, 33).softmax(-1)
    assert torch.equal(LQE()(logits, probabilities), logits)


def test_gate_starts_as_a_mean():
    x1, x2 = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    gate = Gate(8)
    torch.testing.assert_close(gate(x1, x2), gate.norm((x1 + x2) / 2))


def test_features_of_the_decoders_width_are_not_projected():
    model = tiny_model(S)
    assert all(isinstance(x, torch.nn.Identity) for x in model.decoder.input_proj)
    cfg = tiny_config(S)
    cfg.model.encoder.hidden_dim = 48  # as in X, whose encoder is wider than its decoder
    assert instantiate(cfg.model).decoder.input_proj[0].conv.in_channels == 48


def test_inference_runs_no_layer_above_eval_idx():
    model = tiny_model(S, eval_idx=0, layer_scale=2.0)
    with torch.no_grad():
        expected = model.predict(torch.rand(1, 3, 64, 64, generator=torch.manual_seed(0)))
        del model.decoder.decoder.layers[1:]
        del model.decoder.dec_score_head[1:], model.decoder.dec_bbox_head[1:]
        found = model.predict(torch.rand(1, 3, 64, 64, generator=torch.manual_seed(0)))
    assert torch.equal(found["pred_boxes"], expected["pred_boxes"])
    assert found.keys() == {"pred_logits", "pred_boxes"}


@pytest.mark.parametrize("path", [N, S])
def test_padding_changes_nothing(path):
    """Neither what lies in the padding nor the image that caused it."""
    model = tiny_model(path)
    inputs = make_inputs([(70, 100), (96, 128)])
    with torch.no_grad():
        together = model(inputs)[0]["instances"]
        alone = model(inputs[:1])[0]["instances"]
    torch.testing.assert_close(together.scores, alone.scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        together.pred_boxes.tensor, alone.pred_boxes.tensor, rtol=0, atol=1e-2
    )

    torch.manual_seed(0)
    levels = len(model.encoder.in_features)
    sizes = [(16 // 2**i, 16 // 2**i) for i in range(levels)]
    features = [torch.randn(1, 32, *size) for size in sizes]
    padding = Padding(torch.tensor([[8, 12]]), (16, 16))  # of the width, of the height
    noised = [x.clone() for x in features]
    for x in noised:
        height, width = x.shape[2:]
        x[:, :, :, width // 2 :] = 100.0
        x[:, :, height * 3 // 4 :] = -100.0
    with torch.no_grad():
        expected = model.decoder(Encoded(features, padding))
        found = model.decoder(Encoded(noised, padding))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


# Losses


def test_union_keeps_what_most_layers_found():
    first = one_match((0, 1, 0), (0, 2, 1), (1, 1, 2))
    second = one_match((0, 1, 1), (0, 3, 0), (1, 1, 3))
    third = one_match((0, 1, 1), (0, 2, 0), (1, 1, 3))
    united = unite([first, second, third])
    rows = torch.stack(united, dim=1).tolist()
    assert [0, 1, 1] in rows and [1, 1, 3] in rows and [0, 3, 0] in rows
    assert len(rows) == 4  # query 2 of image 0 keeps one of its two, which got one vote each
    assert len(unite([one_match(), one_match()]).query) == 0


def edges_layer(corners):
    """A layer of two queries with the given logits of bins, one class."""
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]])
    return {
        "pred_logits": torch.tensor([[[0.5], [-1.0]]]),
        "pred_boxes": boxes,
        "pred_corners": corners,
        "ref_points": boxes,
    }


def test_fgl_by_hand():
    layer = edges_layer(torch.zeros(1, 2, 4 * 33))
    wanted = torch.tensor([[0.5, 0.5, 0.2, 0.1]])  # IoU 1/2 with the first query's box
    targets = [{"labels": torch.tensor([0]), "boxes": wanted}]
    pairs = pair(layer, targets, one_match((0, 0, 0)))
    edges = EdgeDistribution().encode(layer["ref_points"][0, :1], wanted)
    loss = fine_grained(layer, pairs, *edges)
    assert float(loss) == pytest.approx(0.5 * 4 * math.log(33), rel=1e-5)


def test_ddf_by_hand():
    torch.manual_seed(0)
    teacher = edges_layer(torch.randn(1, 2, 4 * 33))
    layer = edges_layer(torch.randn(1, 2, 4 * 33))
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.1]])}]
    pairs = pair(layer, targets, one_match((0, 0, 0)))
    p = (teacher["pred_corners"].view(2, 4, 33) / 5).softmax(-1)
    q = (layer["pred_corners"].view(2, 4, 33) / 5).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean(-1) * 25
    matched = divergence[0] * 0.5  # the IoU
    other = divergence[1] * torch.tensor(-1.0).sigmoid()  # the teacher's confidence
    mixture = Mixture(share=0.25, matched=1, others=1)
    loss = distillation(layer, teacher, pairs, mixture, temperature=5.0)
    torch.testing.assert_close(loss, 0.25 * matched + 0.75 * other)
    assert distillation(teacher, teacher, pairs, mixture, 5.0) == 0


def test_mal_by_hand():
    criterion = DFINECriterion(2, HungarianMatcher(), WEIGHTS, classification="mal")
    layer = {
        "pred_logits": torch.tensor([[[0.3, -0.2], [-1.0, 0.7]]]),
        "pred_boxes": torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]]),
    }
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.1]])}]
    pairs = pair(layer, targets, one_match((0, 0, 0)))
    found = criterion.class_losses(layer["pred_logits"], pairs)

    def p(x):
        return 1 / (1 + math.exp(-x))

    target = 0.5**1.5
    expected = -(target * math.log(p(-0.2)) + (1 - target) * math.log(1 - p(-0.2)))
    expected -= sum(p(x) ** 1.5 * math.log(1 - p(x)) for x in (0.3, -1.0, 0.7))
    assert found.keys() == {"mal"}
    assert float(found["mal"]) == pytest.approx(expected, rel=1e-5)


def test_loss_names_and_dtype():
    """Upstream's names, with denoising; and fp32 under autocast."""
    model = tiny_model(S).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.compute_losses(torch.rand(2, 3, 64, 64), make_targets(2, 3))
    boxed = ["vfl", "bbox", "giou"]
    names = {f"loss_{name}{s}" for name in boxed for s in ("_pre", "_enc_0", "_dn_pre")}
    for suffix in ("", "_aux_0", "_aux_1", "_dn_0", "_dn_1", "_dn_2"):
        names |= {f"loss_{name}{suffix}" for name in [*boxed, "fgl", "ddf"]}
    assert losses.keys() == names - {"loss_ddf"}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.isfinite(), name

    model.criterion.classification = "mal"
    losses = model.compute_losses(torch.rand(2, 3, 64, 64), make_targets(2, 3))
    assert losses.keys() == {x.replace("vfl", "mal") for x in names} - {"loss_ddf"}


@pytest.mark.parametrize("counts", [(3, 2), (0, 2), (0, 0)])
@pytest.mark.parametrize(
    "path, decoder",
    [
        (N, {}),
        (S, {}),
        (S, {"eval_idx": 0, "layer_scale": 2.0}),
        (S, {"query_select_method": "agnostic"}),
    ],
)
def test_gradients_reach_every_parameter(path, decoder, counts):
    """Also without any box, or DDP would wait for what never comes."""
    model = tiny_model(path, **decoder).train()
    targets = [make_targets(1, count)[0] for count in counts]
    losses = model.compute_losses(torch.rand(2, 3, 64, 64), targets)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_training_lowers_the_loss():
    """Of decoder and criterion; the backbone would take all the time."""
    model = tiny_model(S, num_denoising=0).train()
    torch.manual_seed(0)
    encoded = Encoded([torch.randn(2, 32, side, side) for side in (8, 4, 2)])
    targets = make_targets(2, 3)
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-3)
    totals = []
    for _ in range(30):
        total = sum(model.criterion(model.decoder(encoded, targets), targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.85 * totals[0]


# Configs and checkpoints

PUBLISHED_PARAMS = {"n": 4, "s": 10, "m": 19, "l": 31, "x": 62}  # millions


@pytest.mark.parametrize("size", PUBLISHED_PARAMS)
def test_configs_have_the_published_size(size):
    with torch.device("meta"):
        model = instantiate(dset_d2.get_config(f"configs/dfine/dfine_{size}_coco.py").model)
    params = sum(p.numel() for p in model.parameters()) / 1e6
    # The published counts leave out what only training needs.
    assert PUBLISHED_PARAMS[size] - 0.5 < params < PUBLISHED_PARAMS[size] + 0.75


def test_memory_pruning_is_warned_of(caplog):
    cfg = tiny_config(S)
    cfg.model.decoder.memory_pruning = L(MemoryPruningConfig)(keep_ratio=0.5)
    instantiate(cfg.model)
    assert "memory_pruning saves D-FINE nothing" in caplog.text


def test_built_by_detectron2():
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DETRDetector"
    cfg.MODEL.BACKBONE.NAME = "HGNetv2"
    cfg.MODEL.HGNETV2.update(NAME="B0", USE_LAB=True, FREEZE_AT=-1, FREEZE_NORM=False)
    cfg.MODEL.HGNETV2.OUT_FEATURES = ["stage3", "stage4"]
    cfg.MODEL.ENCODER.update(HIDDEN_DIM=32, DIM_FEEDFORWARD=64, FUSION="gelan")
    cfg.MODEL.DECODER.update(NAME="DFINEDecoder", HIDDEN_DIM=32, NUM_POINTS=[6, 6])
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    assert isinstance(model.decoder, DFINEDecoder)
    assert isinstance(model.criterion, DFINECriterion)
    with torch.no_grad():
        assert model.predict(torch.rand(1, 3, 64, 64))["pred_boxes"].shape[-1] == 4

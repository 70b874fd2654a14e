"""The detector as users call it: sizes, batches, modes and bad settings."""

import pytest
import torch
from detectron2.config import instantiate

from dset_d2.modeling import Encoded
from dset_d2.modeling.decoder.queries import make_anchors
from dset_d2.modeling.encoder.hybrid_encoder import position_embedding
from dset_d2.modeling.tokens import Padding, TokenMap

from ..conftest import make_inputs, make_targets, randomise, tiny_config, tiny_model

MIXED = [(96, 128), (160, 100), (128, 128), (70, 90), (96, 128)]


def detections(model, inputs) -> list[torch.Tensor]:
    """Per image (N, 6): boxes, score, class, best first."""
    with torch.no_grad():
        found = [x["instances"] for x in model(inputs)]
    rows = [(x.pred_boxes.tensor, x.scores[:, None], x.pred_classes[:, None]) for x in found]
    return [torch.cat([boxes / 100, scores, classes], 1) for boxes, scores, classes in rows]


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_detections_do_not_depend_on_the_batch(method):
    model = tiny_model(cross_attn_method=method)
    inputs = make_inputs(MIXED)
    together = detections(model, inputs)
    for one, among_others in zip(inputs, together):
        torch.testing.assert_close(among_others, detections(model, [one])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_padding_is_invisible_behind_the_backbone(method):
    """Encoder attention, anchors, selection and sampling see the image alone."""
    model = tiny_model(cross_attn_method=method)
    shapes = [(12, 16), (6, 8), (3, 4)]
    memory_in = [torch.randn(1, 32, *shape) for shape in shapes]
    padded = [torch.randn(1, 32, h + 4, w + 8) for h, w in [(12, 16), (6, 8), (3, 4)]]
    # The same share of every level is image: 3/4 of the height, 2/3 of the width.
    shapes_padded = [(16, 24), (8, 12), (4, 6)]
    padded = [torch.randn(1, 32, *shape) for shape in shapes_padded]
    for small, large in zip(memory_in, padded):
        large[..., : small.shape[2], : small.shape[3]] = small
    padding = Padding(torch.tensor([[128, 96]]), (192, 128))
    with torch.no_grad():
        alone = model.decoder(Encoded(memory_in))
        among_padding = model.decoder(Encoded(padded, padding))
    for name, value in alone.items():
        distance = (value[0][:, None] - among_padding[name][0]).abs().amax(-1).amin(1)
        assert distance.max() < 1e-4, name


def test_encoder_attention_ignores_padding(model):
    encoder = model.encoder.encoder[0]
    tokens = torch.randn(1, 4, 6, 32)
    padding = Padding(torch.tensor([[3, 3]]), (6, 4))
    position = position_embedding(4, 6, 32, 10000.0, tokens.device)
    alone_position = position.view(1, 4, 6, 32)[:, :3, :3].flatten(1, 2)
    with torch.no_grad():
        masked, _ = encoder(tokens.flatten(1, 2), position, TokenMap((4, 6), padding))
        part = tokens[:, :3, :3].flatten(1, 2)
        alone, _ = encoder(part, alone_position, TokenMap((3, 3)))
    torch.testing.assert_close(masked.view(1, 4, 6, 32)[:, :3, :3].flatten(1, 2), alone)


def test_rectangles_and_tall_images(model):
    for height, width in ((64, 256), (256, 64)):
        found = model.predict(torch.rand(1, 3, height, width))
        assert found["pred_boxes"].shape == (1, 30, 4)
        assert found["pred_boxes"].isfinite().all()


def test_boxes_are_scaled_to_the_original_image(model):
    inputs = make_inputs([(96, 128)])
    scaled = [inputs[0] | {"height": 960, "width": 1280}]
    with torch.no_grad():
        small, large = model(inputs)[0]["instances"], model(scaled)[0]["instances"]
    assert large.image_size == (960, 1280)
    torch.testing.assert_close(large.pred_boxes.tensor, small.pred_boxes.tensor * 10)


def test_position_embedding_of_squares_is_upstreams():
    """Upstream's formula, whose column-major grid is harmless on squares."""
    size, dim = 5, 16
    x, y = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    omega = 1 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    x, y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    upstream = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)[None]
    ours = position_embedding(size, size, dim, 10000.0, torch.device("cpu"))
    torch.testing.assert_close(ours, upstream)


def test_position_embedding_of_rectangles_follows_rows_and_columns():
    ours = position_embedding(3, 7, 16, 10000.0, torch.device("cpu")).view(3, 7, 16)
    assert (ours[:, :1, :8] == ours[:, :, :8]).all()  # a row's tokens share the first half
    assert (ours[:1, :, 8:] == ours[:, :, 8:]).all()  # a column's tokens share the second
    assert len(ours.flatten(0, 1).unique(dim=0)) == 21


def test_anchors_of_a_padded_image_are_those_of_the_image():
    alone = make_anchors([(4, 6)], torch.device("cpu")).view(4, 6, 4)
    padding = Padding(torch.tensor([[6, 4]]), (8, 5))
    padded = make_anchors([(5, 8)], torch.device("cpu"), padding).view(5, 8, 4)
    torch.testing.assert_close(padded[:4, :6], alone)
    assert padded[4].isinf().all() and padded[:, 6:].isinf().all()


def test_box_head_on_selected_tokens_equals_box_head_on_all(model):
    decoder = model.decoder
    memory = torch.randn(2, 16 * 16, 32)
    anchors = make_anchors([(16, 16)], memory.device)
    with torch.no_grad():
        content, reference, selected, _ = decoder.select_queries(memory, anchors, None)
        tokens = decoder.enc_output(memory * anchors[..., :1].isfinite())
        boxes = (decoder.enc_bbox_head(tokens) + anchors).sigmoid()
        scores = decoder.enc_score_head(tokens)
    index = scores.max(-1).values.topk(30).indices[..., None]
    torch.testing.assert_close(content, tokens.gather(1, index.expand(-1, -1, 32)))
    expected = boxes.gather(1, index.expand(-1, -1, 4))
    torch.testing.assert_close(selected["pred_boxes"], expected)
    torch.testing.assert_close(reference.sigmoid(), expected)


def test_box_head_sees_only_the_selected_tokens(model):
    rows = []
    model.decoder.enc_bbox_head.register_forward_hook(lambda m, x, y: rows.append(x[0].shape[1]))
    model.predict(torch.rand(1, 3, 128, 128))
    assert rows == [30]


@pytest.mark.parametrize("eval_idx", [0, 1, -1])
def test_eval_idx_runs_no_layer_beyond(eval_idx):
    model = tiny_model(eval_idx=eval_idx)
    images = torch.rand(1, 3, 64, 64)
    model.train()
    torch.nn.Module.train(model.backbone, False)
    model.eval()
    ran = []
    for index, layer in enumerate(model.decoder.decoder.layers):
        layer.register_forward_hook(lambda *_, i=index: ran.append(i))
    model.predict(images)
    assert ran == list(range(model.decoder.eval_idx + 1))


def test_agnostic_selection_trains():
    model = tiny_model(query_select_method="agnostic").train()
    losses = model.compute_losses(torch.rand(2, 3, 64, 64), make_targets(2, 3))
    assert losses["loss_vfl_enc_0"] > 0
    sum(losses.values()).backward()
    assert model.decoder.enc_score_head.weight.grad.shape == (1, 32)


def test_discrete_sampling_reads_cells_and_freezes_offsets():
    model = tiny_model(cross_attn_method="discrete").train()
    sum(model.compute_losses(torch.rand(1, 3, 64, 96), make_targets(1, 2)).values()).backward()
    for layer in model.decoder.decoder.layers:
        assert layer.cross_attn.sampling_offsets.weight.grad is None
        assert layer.cross_attn.value_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("denoising", [0, 10])
@pytest.mark.parametrize("count", [0, 3])
def test_every_trainable_parameter_gets_a_gradient(count, denoising):
    """Also without any box: distributed training would wait for a missing gradient."""
    model = tiny_model(num_denoising=denoising).train()
    losses = model(make_inputs([(64, 64), (64, 96)], boxes_per_image=count))
    expected = {f"loss_{k}" for k in ("vfl", "bbox", "giou")}
    assert expected <= losses.keys() and len(losses) == 3 * (1 + 2 + 1 + (3 if denoising else 0))
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_training_step_learns():
    """Some steps on one batch lower its loss: gradients point the right way."""
    model = tiny_model(num_denoising=0).train()
    inputs = make_inputs([(64, 64)] * 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    history = []
    for _ in range(60):  # the first 20 are a matter of rounding, and so of the threads
        loss = sum(model(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.75 * history[0]


def test_multi_scale_lasts_until_its_step():
    cfg = tiny_config()
    cfg.model.update(multi_scale=[64, 96, 128], multi_scale_end=6)
    model = instantiate(cfg.model).train()
    sizes = []
    model.backbone.register_forward_pre_hook(lambda m, x: sizes.append(tuple(x[0].shape[2:])))
    for _ in range(9):
        model(make_inputs([(96, 192)]))
        model.clock.tick()
    assert set(sizes[:6]) <= {(32, 64), (64, 96), (64, 128)} and len(set(sizes[:6])) > 1
    assert sizes[6:] == [(96, 192)] * 3
    assert int(model.clock.steps) == 9


def test_frozen_norms_without_weights_are_told(caplog):
    cfg = tiny_config()
    cfg.model.backbone.update(freeze_at=0, freeze_norm=True)
    inputs = make_inputs([(64, 64)])
    for mean, told in ((0.0, 1), (0.1, 0)):
        caplog.clear()
        model = instantiate(cfg.model).train()
        for name, value in model.backbone.state_dict().items():
            if name.endswith("running_mean"):
                value.fill_(mean)
        for _ in range(2):
            model(inputs)
        assert caplog.text.count("its weights are random: start from pretrained ones") == told


def test_bfloat16_autocast_keeps_the_criterion_in_fp32():
    model = tiny_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(make_inputs([(64, 64)]))
    assert all(value.dtype == torch.float32 for value in losses.values())
    model.eval()
    inputs = make_inputs([(64, 64)])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = model(inputs)[0]["instances"].scores
    with torch.no_grad():
        full = model(inputs)[0]["instances"].scores
    assert (low - full).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_cast_to_half_precision_say_what_to_do(dtype):
    model = tiny_model().to(dtype)
    with pytest.raises(TypeError, match=f'run it under torch.autocast\\("cpu", {dtype}\\)'):
        model(make_inputs([(64, 64)]))


def test_evaluation_under_inference_mode_leaves_training_possible():
    """Cached anchors and positions must not become inference tensors."""
    model = tiny_model()
    with torch.inference_mode():
        model.predict(torch.rand(1, 3, 32, 224))
    model.train()
    sum(model.compute_losses(torch.rand(1, 3, 32, 224), make_targets(1, 1)).values()).backward()


def test_class_beyond_num_classes_names_the_image(model):
    inputs = make_inputs([(64, 64)])
    inputs[0]["file_name"] = "frame_7.jpg"
    inputs[0]["instances"].gt_classes[1] = 5
    with pytest.raises(ValueError, match=r"frame_7.jpg: class 5 is beyond num_classes=5"):
        model.train()(inputs)


@pytest.mark.parametrize("box", [(50, 10, 10, 40), (10, 40, 50, 10), (10, 10, torch.nan, 40)])
def test_what_cannot_be_an_object_names_the_image(model, box):
    """Its loss would be finite, and far below zero."""
    inputs = make_inputs([(64, 64)] * 2)
    inputs[1]["file_name"] = "frame_8.jpg"
    inputs[1]["instances"].gt_boxes.tensor[1] = torch.tensor(box)
    with pytest.raises(ValueError, match=r"frame_8.jpg: box \[.*\] is not x1 <= x2, y1 <= y2"):
        model.train()(inputs)
    inputs = make_inputs([(64, 64)])
    inputs[0]["instances"].gt_classes[2] = -1
    with pytest.raises(ValueError, match="an image: class -1 is beyond num_classes=5"):
        model.train()(inputs)


def test_non_finite_predictions_are_named(model):
    with torch.no_grad():
        model.decoder.dec_bbox_head[0].layers[2].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="pred_boxes"):
        model.train().compute_losses(torch.rand(1, 3, 64, 64), make_targets(1, 2))


@pytest.mark.parametrize(
    ("part", "setting", "value", "message"),
    [
        ("backbone", "depth", 19, r"depth=19 is not one of \[18, 34, 50, 101\]"),
        ("backbone", "out_features", ["res3", "res9"], "out_features='res9'"),
        (
            "encoder",
            "in_features",
            ["res3", "res4", "res9"],
            r"in_features='res9' is not one of \['res3', 'res4', 'res5'\]",
        ),
        ("encoder", "hidden_dim", 30, "hidden_dim=30 must be divisible by 4"),
        ("encoder", "enc_act", "swish", "activation='swish'"),
        ("encoder", "use_encoder_idx", [3], r"use_encoder_idx=\[3\] must lie in 0..2"),
        ("encoder", "in_channels", [1, 2], "must have the same length"),
        ("decoder", "cross_attn_method", "linear", "cross_attn_method='linear'"),
        ("decoder", "query_select_method", "best", "query_select_method='best'"),
        ("decoder", "num_points", [4, 4], "one number for each of the 3 levels"),
        ("decoder", "eval_idx", 3, "eval_idx=3 is not a layer"),
        ("decoder", "num_denoising", -1, "num_denoising=-1"),
        ("decoder", "num_heads", 5, "hidden_dim=32 must be divisible by num_heads=5"),
        ("criterion", "weights", {"vfl": 1.0}, "must have the keys vfl, bbox, giou"),
    ],
)
def test_wrong_settings_are_named(part, setting, value, message):
    cfg = tiny_config()
    cfg.model[part][setting] = value
    with pytest.raises(ValueError, match=message):
        instantiate(cfg.model)


def test_randomise_moves_the_box_heads():
    """The comparisons above would hold for heads that are zero."""
    model = randomise(instantiate(tiny_config().model))
    assert model.decoder.dec_bbox_head[0].layers[2].weight.abs().sum() > 0

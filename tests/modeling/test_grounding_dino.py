"""Grounding DINO: the library's numbers, whose tokens are whose, what is kept, losses, folders."""

import copy
import io
import json
import math
import shutil
import socket
import sys
from contextlib import redirect_stdout
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou

import dset_d2
from dset_d2.analysis import count_flops, count_parameters
from dset_d2.analysis.tracing import count_kernels
from dset_d2.checkpoint import load_upstream
from dset_d2.engine.ema import ModelEMA
from dset_d2.engine.optimizer import build_adamw, parameter_groups
from dset_d2.modeling import GroundingDINO, Knobs, TokenCriterion, forward_context
from dset_d2.modeling.prompts import clean, make_prompts, phrases_of
from dset_d2.modeling.sparse import MoE, MoEConfig, PruningConfig, SwapConfig
from dset_d2.tools import analyze_experts, lazyconfig_train_net, swap_ffn

from ..conftest import GROUNDING, PROMPTS, make_inputs, make_targets, tiny_grounding

pytest.importorskip("transformers", minversion="5.23")

KINDS = ["grounding-dino", "mm-grounding-dino"]
COCO_CONFIG = "projects/dynamic_dino/configs/grounding_dino_coco.py"
DYNAMIC_CONFIG = "projects/dynamic_dino/configs/dynamic_dino_coco.py"


# Prompts.


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("TrafficCone", "traffic cone"),
        ("traffic_cone", "traffic cone"),
        ("Car", "car"),
        ("  Stop  sign ", "stop sign"),
        ("ATMMachine", "atm machine"),
        ("St. Bernard?", "st bernard"),
        ("t-shirt", "t-shirt"),
    ],
)
def test_names_become_phrases(name, phrase):
    assert clean(name) == phrase


def test_phrases_that_cannot_be_told_apart_are_an_error():
    assert phrases_of(["Car", ["person", "Person", "cyclist"]]) == [["car"], ["person", "cyclist"]]
    with pytest.raises(ValueError, match="classes 0 and 2 have the same phrase 'traffic cone'"):
        phrases_of(["TrafficCone", "car", "traffic_cone"])
    with pytest.raises(ValueError, match=r"prompts: '\.' of class 1 is no phrase"):
        phrases_of(["car", "."])
    with pytest.raises(ValueError, match="prompts=.* must have a phrase for each class"):
        phrases_of([])


def test_tokens_of_classes_are_those_of_their_phrases():
    """ "xylophone" is spelled by many tokens, all of which are its own; none is of two classes."""
    model = tiny_grounding()
    (prompt,) = model.prompts
    merged = model.tokenizer("car. traffic cone. person. cyclist. xylophone. van.").input_ids
    assert list(prompt.ids) == merged
    owned = prompt.tokens()
    assert owned.shape == (5, len(merged)) and (owned.sum(0) <= 1).all()
    ids = torch.tensor(prompt.ids)
    texts = [model.tokenizer.decode(ids[row]) for row in owned]
    assert texts == ["car", "traffic cone", "person cyclist", "xylophone", "van"]
    nobody = model.tokenizer.convert_ids_to_tokens(ids[~owned.any(0)])
    assert set(nobody) == {"[CLS]", ".", "[SEP]"}


def test_a_phrase_scores_the_mean_of_its_tokens_and_a_class_its_best_phrase():
    model = tiny_grounding()
    prompt = make_prompts([["car"], ["van", "traffic cone"]], model.tokenize, 64)[0]
    assert len(prompt.ids) == 9  # [CLS] car . van . traffic cone . [SEP]
    logits = torch.randn(2, 3, 9, dtype=torch.float64) * 4
    p = logits.sigmoid()
    expected = torch.stack([p[..., 1], torch.maximum(p[..., 3], p[..., 5:7].mean(-1))], -1)
    torch.testing.assert_close(
        prompt.class_logits(logits).sigmoid(), expected.float(), rtol=1e-5, atol=1e-7
    )
    # Where probabilities are 0 or 1 to all digits, logits still tell which is higher.
    sure = prompt.class_logits(torch.full((9,), 80.0)), prompt.class_logits(torch.full((9,), 90.0))
    assert torch.equal(sure[0], torch.full((2,), 80.0)) and (sure[1] > sure[0]).all()


def test_phrases_that_the_vocabulary_or_the_text_cannot_hold_are_errors():
    with pytest.raises(ValueError, match="the vocabulary has no tokens for 'auto 车'"):
        tiny_grounding(prompts=["car", "auto 车"])
    with pytest.raises(ValueError, match=r"'xylophone' has 9 tokens; texts of 11 hold .* 1 to 8"):
        tiny_grounding(text_limit=11)
    with pytest.raises(ValueError, match=r"text_limit=65 must lie in 4..64"):
        tiny_grounding(text_limit=65)


def test_prompts_are_the_data_sets_classes_when_these_are_known():
    model = tiny_grounding(prompts=None, dataset=["later", "another"])
    with pytest.raises(ValueError, match="dataset='later, another' has no thing_classes"):
        model(make_inputs([(64, 64)]))
    MetadataCatalog.get("later").set(thing_classes=["Car", "TrafficCone"])
    assert model.phrases == [["car"], ["traffic cone"]] and model.num_classes == 2
    with pytest.raises(ValueError, match="prompts are for 5 classes, but 'later' has 2"):
        tiny_grounding(dataset="later")


# What it predicts.


def padded_batch(model: GroundingDINO):
    """Images of two sizes in one batch."""
    return model.preprocess(make_inputs([(64, 96), (50, 70)]))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_predictions_are_the_librarys(kind):
    from transformers import GroundingDinoImageProcessor

    model = tiny_grounding(kind, prompts=["car", "van", "bus"])  # of one token each
    images, padding = padded_batch(model)
    (prompt,) = model.prompts
    mask = torch.zeros(2, 64, 96, dtype=torch.long)
    mask[0], mask[1, :50, :70] = 1, 1
    theirs = model.network(
        pixel_values=images, pixel_mask=mask, input_ids=torch.tensor([prompt.ids] * 2)
    )
    ours = model.predict(images, padding)
    torch.testing.assert_close(ours["pred_boxes"], theirs.pred_boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["pred_logits"], theirs.logits[..., 1:7:2], rtol=0, atol=1e-4)

    # Of each query the library finds the best token of the text, be it a full stop.
    theirs.logits[..., [0, 2, 4, 6, 7]] = -torch.inf
    processor = GroundingDinoImageProcessor()
    sizes = [(120, 200), (300, 400)]
    found = processor.post_process_object_detection(theirs, 0.0, torch.tensor(sizes))
    for mine, other in zip(model.postprocess(ours, sizes), found):
        assert len(mine) == 60
        for box, score, label in zip(other["boxes"], other["scores"], (other["labels"] - 1) // 2):
            same = (mine.pred_classes == label) & ((mine.scores - score).abs() < 1e-5)
            distance = (mine.pred_boxes.tensor[same] - box).abs().amax(-1)
            assert distance.min() < 1e-2


@torch.no_grad()
def test_texts_in_turn_give_what_each_gives_alone():
    model = tiny_grounding(text_limit=14)
    assert [[label for label, _ in p.spans] for p in model.prompts] == [[0, 1, 2, 2], [3, 4]]
    images, padding = padded_batch(model)
    runs = []
    hook = model.network.model.backbone.conv_encoder.register_forward_hook(
        lambda *_: runs.append(1)
    )
    joined = model.predict(images, padding)
    hook.remove()
    assert len(runs) == 1  # the image backbone, for both texts
    assert joined["pred_logits"].shape == (2, 40, 5) and joined["pred_boxes"].shape == (2, 40, 4)
    for index, classes in enumerate(([0, 1, 2], [3, 4])):
        alone = tiny_grounding(prompts=[PROMPTS[label] for label in classes])
        expected = alone.predict(images, padding)
        rows = slice(20 * index, 20 * index + 20)
        torch.testing.assert_close(joined["pred_boxes"][:, rows], expected["pred_boxes"])
        logits = joined["pred_logits"][:, rows]
        torch.testing.assert_close(logits[..., classes], expected["pred_logits"])
        others = [label for label in range(5) if label not in classes]
        assert (logits[..., others] == -torch.inf).all()
    # 20 queries with 3 classes and 20 with 2; what a query was not asked for is no detection.
    found = model.postprocess(joined, [(64, 96), (50, 70)])
    assert [len(x) for x in found] == [100, 100]


def test_images_are_padded_to_each_other_and_no_further():
    model = tiny_grounding()
    inputs = make_inputs([(64, 96), (50, 70), (64, 96)])
    with torch.no_grad():
        together, alone = model(inputs), [model([x])[0] for x in inputs]
    assert model.groups(inputs) == [[0, 2], [1]]
    for a, b in zip(together, alone):
        a, b = a["instances"], b["instances"]
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-5)


def test_images_with_fewer_tokens_than_queries_are_an_error():
    model = tiny_grounding()
    with pytest.raises(ValueError, match="images of 16 x 32 have fewer tokens than .* queries, 20"):
        model(make_inputs([(16, 32)] * 2))


# What is kept of the text.


@pytest.fixture
def read(monkeypatch):
    """Counts the runs of the text backbone."""
    runs = []
    own = GroundingDINO.read
    monkeypatch.setattr(GroundingDINO, "read", lambda *args: runs.append(1) or own(*args))
    return runs


def test_the_text_is_read_once_while_its_backbone_stays(read):
    model = tiny_grounding(text_limit=14)
    inputs = make_inputs([(64, 96)])
    images = model.preprocess(inputs)[0]
    with torch.no_grad():
        first = model.predict(images)
        assert len(read) == 2
        second = model.predict(images)
    with torch.inference_mode():
        model(inputs)
    assert len(read) == 2
    torch.testing.assert_close(first, second, rtol=0, atol=0)

    clone = copy.deepcopy(model)
    assert model.texts and not clone.texts
    with torch.no_grad():
        torch.testing.assert_close(clone.predict(images), first)
    assert len(read) == 4

    model.predict(images)  # with gradients nothing is kept
    assert len(read) == 6


def fresh(model: GroundingDINO, images) -> dict:
    """What a model predicts that has kept nothing."""
    with torch.no_grad():
        return copy.deepcopy(model).predict(images)


@pytest.mark.parametrize("change", ["step", "load", "write", "replace", "move", "train"])
def test_the_text_is_read_again_when_something_changes(change, read):
    model = tiny_grounding()
    inputs = make_inputs([(64, 64)] * 2)
    images = model.preprocess(inputs)[0]
    with torch.no_grad():
        before = model.predict(images)
    embedding = model.network.model.text_backbone.embeddings.word_embeddings
    if change == "step":
        optimizer = build_adamw(parameter_groups(model, 0.1, 0.0), 0.1, 0.0)
        sum(model.compute_losses(images, make_targets(2, 2)).values()).backward()  # in eval mode
        optimizer.step()
    elif change == "load":
        state = model.state_dict()
        model.load_state_dict({k: v * 1.1 if "text_" in k else v for k, v in state.items()})
    elif change == "write":
        with torch.no_grad():
            embedding.weight.mul_(1.5)
    elif change == "replace":
        embedding.weight = nn.Parameter(embedding.weight.detach() * 1.5)
    elif change == "move":
        model.to("cpu")
    else:
        model.train().eval()
    read.clear()
    with torch.no_grad():
        after = model.predict(images)
    assert len(read) == 1
    torch.testing.assert_close(after, fresh(model, images))
    same = torch.equal(before["pred_logits"], after["pred_logits"])
    assert same == (change in ("move", "train"))


# Losses.


def by_hand(logits, boxes, targets, number) -> dict[str, float]:
    """The losses of one layer, image by image and query by query."""
    total = {"ce": 0.0, "bbox": 0.0, "giou": 0.0}
    for p, own, target in zip(logits.double().sigmoid(), boxes.double(), targets):
        wanted, maps = target["boxes"].double(), target["tokens"].double()
        giou = generalized_box_iou(*(box_convert(x, "cxcywh", "xyxy") for x in (own, wanted)))
        cost = torch.zeros(len(own), len(wanted), dtype=torch.float64)
        for q in range(len(own)):
            for n in range(len(wanted)):
                hits = p[q][maps[n] > 0]
                positive = 0.25 * (1 - hits) ** 2 * -(hits + 1e-8).log()
                negative = 0.75 * hits**2 * -(1 - hits + 1e-8).log()
                l1 = (own[q] - wanted[n]).abs().sum()
                cost[q, n] = (positive - negative).mean() + 5 * l1 - 2 * giou[q, n]
        aim = torch.zeros_like(p)
        for q, n in zip(*linear_sum_assignment(cost.numpy())):
            aim[q] = maps[n]
            total["bbox"] += 5 * float((own[q] - wanted[n]).abs().sum()) / number
            total["giou"] += 2 * float(1 - giou[q, n]) / number
        hit = torch.where(aim > 0, p, 1 - p)
        weight = torch.where(aim > 0, 0.25, 0.75)
        total["ce"] += 2 * float((weight * (1 - hit) ** 2 * -hit.log()).sum()) / number
    return {f"loss_{name}": value for name, value in total.items()}


def test_losses_of_images_with_2_3_and_1_boxes_are_those_by_hand():
    """Each of them with other classes, and as many of these."""
    generator = torch.Generator().manual_seed(0)

    def random_layer() -> dict:
        boxes = 0.2 + 0.4 * torch.rand(3, 6, 4, generator=generator)
        return {
            "pred_logits": 3 * torch.randn(3, 6, 11, generator=generator),
            "pred_boxes": boxes,
        }

    maps = torch.zeros(6, 11)
    for label, tokens in enumerate([(1,), (3, 4), (6,), (8,), (9,), (9,)]):
        maps[label, list(tokens)] = 1
    targets = []
    for labels in ([0, 1], [1, 2, 3], [4]):
        boxes = 0.2 + 0.4 * torch.rand(len(labels), 4, generator=generator)
        targets.append({"labels": torch.tensor(labels), "boxes": boxes, "tokens": maps[labels]})
    layers = [random_layer() for _ in range(3)]
    outputs = layers[0] | {"aux_outputs": [layers[1]], "enc_outputs": [layers[2]]}
    losses = TokenCriterion()(outputs, targets)
    expected = {}
    for suffix, layer in zip(("", "_aux_0", "_enc_0"), layers):
        hand = by_hand(layer["pred_logits"], layer["pred_boxes"], targets, number=6)
        expected |= {name + suffix: value for name, value in hand.items()}
    assert losses.keys() == expected.keys()
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_one_image_are_the_librarys(kind):
    """Its own numbers are right where there is no image before."""
    architecture = GROUNDING | {"model_type": kind, "auxiliary_loss": True}
    torch.manual_seed(0)
    model = GroundingDINO(architecture=architecture, prompts=PROMPTS).eval()
    images, target = torch.randn(1, 3, 64, 96), make_targets(1, 4)[0]
    ours = model.compute_losses(images, [target])
    spread = torch.tensor([0, 1, 2, 4, 5])[target["labels"]]  # class 2 has two phrases
    target["labels"], spread = target["labels"][spread != 2], spread[spread != 2]
    labels = {"class_labels": spread, "boxes": target["boxes"][: len(spread)]}
    target["boxes"] = labels["boxes"]
    ours = model.compute_losses(images, [target])
    ids = torch.tensor([model.prompts[0].ids])
    theirs = model.network(pixel_values=images, input_ids=ids, labels=[labels]).loss_dict
    for name, weight in (("ce", 2.0), ("bbox", 5.0), ("giou", 2.0)):
        for mine, other in (("", ""), ("_aux_0", "_0")):
            torch.testing.assert_close(
                ours[f"loss_{name}{mine}"], weight * theirs[f"loss_{name}{other}"]
            )


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_parameter_and_lowers_the_loss(kind):
    """Those also that choose the queries; DDP would wait for what is left out."""
    model = tiny_grounding(kind).train()
    inputs = make_inputs([(64, 64)] * 2)
    optimizer = build_adamw(parameter_groups(model, 2e-3, 0.0), 2e-3, 0.0, clip_norm=1.0)
    totals = []
    for _ in range(12):
        optimizer.zero_grad()
        losses = model(inputs)
        total = sum(losses.values())
        total.backward()
        totals.append(total.item())
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        optimizer.step()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all(".swin.layernorm." in name for name in frozen) and len(frozen) == 2
    assert trained["network.model.encoder_output_bbox_embed.layers.0.weight"].grad.any()
    kinds = {f"loss_{x}{y}" for x in ("ce", "bbox", "giou") for y in ("", "_aux_0", "_enc_0")}
    assert losses.keys() == kinds
    assert totals[-1] < 0.8 * totals[0]
    copy.deepcopy(model)


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_boxes_train(kind):
    model = tiny_grounding(kind).train()
    inputs = make_inputs([(64, 64)] * 2)
    for some in (1, 2):
        for x in inputs[:some]:
            x["instances"] = x["instances"][:0]
        model.zero_grad()
        losses = model(inputs)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert losses["loss_bbox"] == 0 < losses["loss_ce"]


def test_a_step_trains_on_one_text_and_losses_elsewhere_are_the_mean():
    model = tiny_grounding(text_limit=14)
    images, targets = torch.randn(2, 3, 64, 64), make_targets(2, 6)
    assert {int(t) for x in targets for t in x["labels"]} == set(range(5))
    mean = model.compute_losses(images, targets)
    model.train()
    prompts, single = model.prompts, []
    for prompt in prompts:
        model.prompts = [prompt]
        single.append(model.compute_losses(images, targets))
    for name, loss in mean.items():
        torch.testing.assert_close(loss, (single[0][name] + single[1][name]) / 2)
    model.prompts = prompts
    drawn = set()
    for step in range(6):
        model.clock.set(step)
        loss = model.compute_losses(images, targets)["loss_ce"]
        drawn.add([torch.isclose(loss, x["loss_ce"]).item() for x in single].index(True))
    assert drawn == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_trains_and_detects(kind):
    model = tiny_grounding(kind).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(make_inputs([(64, 64)] * 2))
        with torch.no_grad():
            found = model.eval()(make_inputs([(64, 96)]))[0]["instances"]
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert found.scores.isfinite().all()


# Beside others.


def test_experts_inside_of_it_record_and_give_losses():
    model = tiny_grounding(text_limit=14)
    layer = model.network.model.decoder.layers[1]
    layer.fc1, layer.fc2 = MoE(MoEConfig(4), 64, 96, "relu"), nn.Identity()
    layer.activation_fn = nn.Identity()
    model.name_parts()
    inputs = make_inputs([(64, 64)] * 2)
    with torch.no_grad(), forward_context(record=True) as context:
        model(inputs)  # two texts, of which the first leaves its records
    assert list(context.records) == ["moe/decoder_1"]
    losses = model.train()(inputs)
    assert {"loss_balance_decoder_1", "loss_z_decoder_1"} <= losses.keys()
    assert "loss_balance_decoder_1" in model.eval().compute_losses(
        model.preprocess(inputs)[0], [model.target(x) for x in inputs]
    )


# Sparse.

HALF = PruningConfig(keep_ratio=0.5, min_tokens=2)


def encoder_outputs(model: GroundingDINO, images, padding, records=None):
    """What the image encoder puts out, which the library's network returns as well."""
    with torch.no_grad(), forward_context(records=records):
        outputs = model.run(images, padding, model.prompts[0])
    return outputs.encoder_last_hidden_state_vision, outputs.encoder_last_hidden_state_text


def dense_twin(model: GroundingDINO) -> GroundingDINO:
    twin = copy.deepcopy(model)
    twin.pruners["encoder"] = nn.ModuleList()
    return twin


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_see_what_they_would_see_if_the_pruned_ones_stood_still(kind):
    """Beside a dense run in which the pruned tokens are hidden from the text, and are set back to
    what they were in front of each deformable attention and behind each layer."""
    model = tiny_grounding(kind, architecture={"encoder_layers": 2}, pruning=HALF)
    images, padding = padded_batch(model)
    records: dict = {}
    vision, text = encoder_outputs(model, images, padding, records)
    assert list(records) == [f"pruning/encoder_{level}" for level in range(4)]
    kept = torch.cat([record.kept_cells() for record in records.values()], 1)
    assert kept.sum(1).tolist() == [48 + 12 + 3 + 2] * 2  # of 8 x 12, 4 x 6, 2 x 3, 1 x 2

    dense = dense_twin(model)
    dense.name_parts()
    entered = []

    def enter(module, args, kwargs):
        entered.append(kwargs["vision_features"])

    def hide(module, args, kwargs):
        kwargs["attention_mask_vision"] = kwargs["attention_mask_vision"] | ~kept
        return args, kwargs

    def set_back(module, args, kwargs):
        kwargs["hidden_states"] = torch.where(kept[..., None], kwargs["hidden_states"], entered[0])
        return args, kwargs

    def stand_still(module, args, outputs):
        (vision, text), attentions = outputs
        return (torch.where(kept[..., None], vision, entered[0]), text), attentions

    encoder = dense.network.model.encoder
    encoder.register_forward_pre_hook(enter, with_kwargs=True)
    for layer in encoder.layers:
        layer.fusion_layer.register_forward_pre_hook(hide, with_kwargs=True)
        layer.deformable_layer.register_forward_pre_hook(set_back, with_kwargs=True)
        layer.register_forward_hook(stand_still)
    expected = encoder_outputs(dense, images, padding)
    torch.testing.assert_close(vision, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(text, expected[1], rtol=0, atol=1e-5)
    assert torch.equal(vision[~kept], entered[0][~kept])


@torch.no_grad()
def test_pruning_answers_to_knobs_and_saves_what_it_prunes():
    model = tiny_grounding(pruning=HALF)
    inputs = make_inputs([(64, 96)])
    images, padding = model.preprocess(inputs)
    dense = dense_twin(model).predict(images, padding)
    torch.testing.assert_close(
        model.predict(images, padding, Knobs(keep_ratio=1.0)), dense, rtol=0, atol=0
    )
    assert not torch.equal(model.predict(images, padding)["pred_boxes"], dense["pred_boxes"])
    ffns = "network.model.encoder.layers.0.deformable_layer.fc1"
    half, whole = (count_flops(model, inputs, Knobs(keep_ratio=ratio)) for ratio in (0.5, 1.0))
    assert whole.by_module[ffns] == 128 * 64 * 96 and half.by_module[ffns] == 65 * 64 * 96


def test_the_scorers_of_all_levels_learn_from_boxes_and_from_the_task():
    model = tiny_grounding(pruning=HALF).train()
    losses = model(make_inputs([(64, 96), (50, 70)]))
    names = [f"loss_foreground_encoder_{level}" for level in range(4)]
    assert losses.keys() >= set(names)
    detection = [loss for name, loss in losses.items() if name not in names]
    last = [pruner.scorer.layers[-1].weight for pruner in model.pruners["encoder"]]
    for part in (detection, [losses[name] for name in names]):
        gradients = torch.autograd.grad(sum(part), last, retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("pruning", [None, HALF])
@torch.no_grad()
def test_experts_of_the_encoder_know_the_cells_of_their_tokens(pruning):
    layers = ("network.model.encoder.*",)
    model = tiny_grounding(pruning=pruning, swap=SwapConfig(MoEConfig(4, 2), layers=layers))
    with forward_context(record=True) as context:
        model.predict(*padded_batch(model))
    words, cells = (context.records[f"moe/{x}_0"] for x in ("text_enhancer_layer", "encoder"))
    assert words.tokens is None and len(words.routing.experts) == 2 * len(model.prompts[0].ids)
    maps = cells.tokens.maps
    assert [where.shape for where in maps] == [(8, 12), (4, 6), (2, 3), (1, 2)]
    kept = [48, 12, 3, 2] if pruning else [96, 24, 6, 2]
    assert len(cells.routing.experts) == len(cells.valid) == 2 * sum(kept)
    # Of the second image, 50 x 70 in 64 x 96, padding takes no part, as far as it was kept.
    valid = cells.valid.unflatten(0, (2, -1)).split(kept, dim=1)
    for where, mask in zip(maps, valid):
        assert mask[0].all()
        index = torch.arange(math.prod(where.shape)) if where.index is None else where.index[1]
        inside = where.padding.valid_tokens(*where.shape)[1]
        assert torch.equal(mask[1], inside[index])
    assert not valid[0][1].all() or pruning


def test_prunings_without_a_place_here_are_errors():
    with pytest.raises(ValueError, match="scorer='attention' of pruning needs a ViT's"):
        tiny_grounding(pruning=PruningConfig(0.5, scorer="attention"))
    with pytest.raises(ValueError, match="placement='after' of pruning must be 'before' here"):
        tiny_grounding(pruning=PruningConfig(0.5, placement="after"))


@pytest.mark.parametrize("method", ["paper", "slots"])
@torch.no_grad()
def test_experts_start_from_the_folders_ffns(grounding_folder, method):
    """Of encoder, text enhancer and decoder, with pruned tokens or without."""
    inputs = make_inputs([(64, 96), (50, 70)])
    for pruning in (None, HALF):
        torch.manual_seed(1)
        settings = {"folder": grounding_folder, "prompts": PROMPTS, "pruning": pruning}
        dense = GroundingDINO(**settings).eval()
        torch.manual_seed(1)
        layers = ("network.model.encoder.*", "network.model.decoder.*")
        swap = SwapConfig(MoEConfig(4, 2), method, layers)
        sparse = GroundingDINO(**settings, swap=swap).eval()
        assert len([m for m in sparse.modules() if isinstance(m, MoE)]) == 4
        sparse.pruners.load_state_dict(dense.pruners.state_dict())
        images, padding = dense.preprocess(inputs)
        expected = dense.predict(images, padding)
        torch.testing.assert_close(sparse.predict(images, padding), expected, rtol=0, atol=1e-5)


def test_averages_and_checkpoints():
    model = tiny_grounding()
    inputs = make_inputs([(64, 96)])
    with torch.no_grad():
        expected = model(inputs)[0]["instances"].scores
    ema = ModelEMA(model, decay=0.5, warmup=1)
    with torch.no_grad():
        ema.module(inputs)
        for parameter in ema.module.parameters():
            parameter.zero_()
        ema.update(model)
        torch.testing.assert_close(ema.module(inputs)[0]["instances"].scores, expected)
    other = tiny_grounding()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_upstream(other, {"model": model.state_dict()}, whole=True)
    with torch.no_grad():
        torch.testing.assert_close(other(inputs)[0]["instances"].scores, expected)


def test_analyses_count_all_but_what_is_kept():
    model = tiny_grounding()
    inputs = make_inputs([(64, 96)])
    report = count_flops(model, inputs)
    assert report.total == count_flops(model, inputs).total  # cold, and warm
    name = "network.model"
    assert report.by_module[f"{name}.text_backbone"] == 0 < report.by_module[f"{name}.decoder"]
    counts = count_parameters(model, inputs)
    assert counts[f"{name}.text_backbone"].active == 0 < counts[f"{name}.decoder"].active
    # Of two texts all but the image backbone is there twice.
    both = count_kernels(tiny_grounding(text_limit=14), inputs).products
    once = count_kernels(model, inputs).products
    repeated = once - report.by_module[f"{name}.backbone.conv_encoder"]
    assert once + 0.5 * repeated < both < once + repeated


def test_keys_of_the_older_configs(grounding_folder):
    def built(**keys) -> GroundingDINO:
        cfg = get_cfg()
        dset_d2.add_detr_config(cfg)
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.META_ARCHITECTURE = "GroundingDINO"
        cfg.TEST.DETECTIONS_PER_IMAGE = 17
        cfg.MODEL.GROUNDING_DINO.merge_from_other_cfg(CfgNode(keys))
        return build_model(cfg)

    model = built(FOLDER=grounding_folder, PROMPTS=["car", ["van", "bus"]], TEXT_LIMIT=9)
    assert model.phrases == [["car"], ["van", "bus"]] and model.max_detections == 17
    assert model.text_limit == 9 and model.criterion.weights == {
        "ce": 2.0,
        "bbox": 5.0,
        "giou": 2.0,
    }
    assert model.criterion.alpha == 0.25 and model.criterion.matcher.cost_class == 1.0
    lazy = GroundingDINO(folder=grounding_folder, prompts=["car", ["van", "bus"]], text_limit=9)
    torch.testing.assert_close(model.state_dict(), lazy.state_dict())

    random = built(
        ARCHITECTURE=GROUNDING, PROMPTS=["car"], CRITERION={"MATCHER": {"COST_GIOU": 3.0}}
    )
    assert random.network.config.d_model == 64 and random.criterion.matcher.cost_giou == 3.0
    assert not len(random.pruners["encoder"])
    pruned = built(ARCHITECTURE=GROUNDING, PROMPTS=["car"], PRUNING={"KEEP_RATIO": 0.6})
    assert pruned.pruners["encoder"][3].config == PruningConfig(0.6)
    with pytest.raises(ValueError, match="folder='': name a local folder"):
        built(PROMPTS=["car"])


# Local folders.


@pytest.fixture
def offline(monkeypatch):
    """Any look at a network fails the test, also one whose error somebody swallows."""
    asked = []

    def refuse(*args, **_):
        asked.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


def test_a_local_folder_gives_its_network_and_nothing_is_fetched(grounding_folder, offline):
    model = GroundingDINO(folder=grounding_folder, prompts=PROMPTS).eval()
    other = tiny_grounding()
    torch.testing.assert_close(model.network.state_dict(), other.network.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(images), other.predict(images))


def test_a_vocabulary_alone_is_a_tokenizer(grounding_folder, tmp_path, offline):
    folder = shutil.copytree(grounding_folder, tmp_path / "folder")
    vocabulary = {index: token for token, index in tiny_grounding().tokenizer.get_vocab().items()}
    for file in folder.glob("tokenizer*"):
        file.unlink()
    lines = [vocabulary.get(index, f"[unused{index}]") for index in range(1030)]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    model = GroundingDINO(folder=str(folder), prompts=PROMPTS)
    assert model.prompts == tiny_grounding().prompts


def broken(folder: str, tmp_path: Path, change: str) -> str:
    """A copy of a folder with something wrong."""
    copied = shutil.copytree(folder, tmp_path / "folder")
    settings = json.loads((copied / "config.json").read_text())
    if change == "no weights":
        (copied / "model.safetensors").unlink()
    elif change == "weights alone":
        for file in copied.iterdir():
            if file.name != "model.safetensors":
                file.unlink()
    elif change == "kind":
        settings["model_type"] = "rt_detr"
    elif change == "shape":
        settings["num_queries"] = 30
    elif change == "layers":
        settings["encoder_layers"] = 2
    elif change == "vocabulary":
        text = (copied / "tokenizer.json").read_text()
        text = text.replace('"[CLS]":101', '"[CLS]":99').replace('"[CLS]": 101', '"[CLS]": 99')
        (copied / "tokenizer.json").write_text(text)
    if (copied / "config.json").exists():
        (copied / "config.json").write_text(json.dumps(settings))
    return str(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no weights", r"folder: lacks weights \(model.safetensors or .*nothing is downloaded"),
        ("weights alone", r"folder: lacks config.json, a tokenizer \(tokenizer.json or vocab.txt"),
        ("kind", r"config.json: model_type='rt_detr' is not one of \['grounding-dino'"),
        ("shape", "the weights do not fit config.json: .*1 keys of another shape"),
        ("layers", r"the weights do not fit config.json: \d+ parameters without a key"),
        ("vocabulary", r"the tokenizer has \[CLS\] as 99, which Grounding DINO knows as 101"),
    ],
)
def test_a_folder_that_lacks_something_is_named(
    change, message, grounding_folder, tmp_path, offline
):
    folder = broken(grounding_folder, tmp_path, change)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        GroundingDINO(folder=folder, prompts=PROMPTS)


def test_no_folder_is_named(tmp_path, offline):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; it should hold config"):
        GroundingDINO(folder=str(tmp_path / "nowhere"), prompts=PROMPTS)
    with pytest.raises(ValueError, match="folder='': name a local folder that holds config.json"):
        GroundingDINO(prompts=PROMPTS)
    with pytest.raises(ValueError, match="architecture: model_type=None is not one of"):
        GroundingDINO(architecture={"d_model": 64}, prompts=PROMPTS)
    small = GROUNDING | {"text_config": GROUNDING["text_config"] | {"vocab_size": 1000}}
    with pytest.raises(ValueError, match="vocab_size=1000 must exceed .* last token, 1029"):
        GroundingDINO(architecture=small, prompts=PROMPTS)


def test_the_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dset_d2\[grounding\]'"):
        GroundingDINO(architecture=GROUNDING, prompts=PROMPTS)


def test_the_five_commands_of_the_projects_page(grounding_folder, tmp_path, offline):
    """Zero-shot evaluation with a folder's weights alone, swap, tuning, evaluation, analysis."""
    noise = np.random.default_rng(0).integers(256, size=(60, 90, 3), dtype=np.uint8)
    images = [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 90} for i in (1, 2)]
    (tmp_path / "images").mkdir()
    for image in images:
        cv2.imwrite(str(tmp_path / "images" / image["file_name"]), noise)
    box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [5, 5, 40, 40]}
    box |= {"area": 1600, "iscrowd": 0}
    categories = [{"id": 3, "name": "Car"}, {"id": 7, "name": "TrafficCone"}]
    content = {"images": images, "annotations": [box], "categories": categories}

    def dataset(part: str) -> list[str]:
        (tmp_path / f"{part}.json").write_text(json.dumps(content))
        key = f"dataloader.{part}"
        return [
            f"{key}.dataset.names=my_{part}",
            f"{key}.dataset.json_file={tmp_path / f'{part}.json'}",
            f"{key}.dataset.image_root={tmp_path / 'images'}",
            f"{key}.num_workers=0",
        ]

    common = [f"model.folder={grounding_folder}", *dataset("test")]
    common += ["dataloader.image_size=[64,96]", "train.device=cpu"]
    plain, dynamic = (["--config-file", path] for path in (COCO_CONFIG, DYNAMIC_CONFIG))

    def detections(folder: str) -> list[dict]:
        return json.loads((tmp_path / folder / "coco_instances_results.json").read_text())

    lazyconfig_train_net.run(
        ["--eval-only", *plain, *common, f"train.output_dir={tmp_path / 'zero'}"]
    )
    found = detections("zero")
    assert {x["category_id"] for x in found} <= {3, 7} and len(found) == 80

    swapped, photos = str(tmp_path / "swapped.pth"), str(tmp_path / "images")
    with redirect_stdout(io.StringIO()) as printed:
        swap_ffn.main(["--output", swapped, "--input", photos, *dynamic, "--device=cpu", *common])
    changes = [x.split()[3] for x in printed.getvalue().splitlines() if "change by" in x]
    assert len(changes) == 2 and max(map(float, changes)) < 1e-5

    tuning = [*dataset("train"), f"train.init_checkpoint={swapped}", "train.max_iter=2"]
    tuning += ["dataloader.train.total_batch_size=2", "train.eval_period=2", "train.report=false"]
    lazyconfig_train_net.run([*dynamic, *common, *tuning, f"train.output_dir={tmp_path / 'run'}"])
    weights = tmp_path / "run/model_best.pth"
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    measured = json.loads(lines[-1])["bbox/AP"]

    lazyconfig_train_net.run(
        [
            *("--eval-only", *dynamic, *common),
            *(f"train.init_checkpoint={weights}", f"train.output_dir={tmp_path / 'again'}"),
        ]
    )
    assert detections("again") == detections("run") and measured == measured

    analyze_experts.main(
        [
            *("--output", str(tmp_path / "experts"), "--num-images", "2", "--device", "cpu"),
            *(*dynamic, "--weights", str(weights), *common),
        ]
    )
    layers = json.loads((tmp_path / "experts/experts.json").read_text())["layers"]
    assert list(layers) == ["decoder_0", "decoder_1"]
    assert all(sum(layer["load"]) == pytest.approx(1) for layer in layers.values())

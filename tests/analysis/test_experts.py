"""What experts do, counted by hand; and in models, whatever their images are batched with."""

import math

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from torch import tensor

from dset_d2.analysis import ExpertAnalysis, Objects, objects_of
from dset_d2.analysis.experts import objects_of_queries
from dset_d2.modeling.sparse import MoEConfig, MoERecord, ViTPruningConfig, swap_ffn_for_moe
from dset_d2.modeling.sparse.moe import Routing
from dset_d2.modeling.tokens import Padding, TokenLevels, TokenMap

from ..conftest import make_inputs, sparse_model, tiny_dinov3, tiny_grounding

NOTHING = torch.zeros(0, 4)


def annotation(box: list[float], label: int = 0, **others) -> dict:
    return {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, **others}


def test_sizes_are_those_of_boxes_in_the_original_image():
    boxes = [[0, 0, 32, 31], [0, 0, 32, 32], [0, 0, 96, 95.9], [0, 0, 96, 96]]
    annotations = [annotation(box, label) for label, box in enumerate(boxes)]
    annotations.append(annotation([50, 0, 100, 200], iscrowd=1))
    objects = objects_of({"annotations": annotations}, height=200, width=100, num_classes=4)
    assert objects.sizes.tolist() == [0, 1, 1, 2] and objects.labels.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(objects.boxes[3], tensor([0.48, 0.24, 0.96, 0.48]))
    torch.testing.assert_close(objects.ignored, tensor([[0.75, 0.5, 0.5, 1.0]]))
    nothing = objects_of({"annotations": []}, height=200, width=100, num_classes=4)
    assert nothing.boxes.shape == (0, 4) and nothing.labels.shape == (0,)
    with pytest.raises(ValueError, match="class 3 is beyond the 3 classes"):
        objects_of({"annotations": annotations}, height=200, width=100, num_classes=3)
    with pytest.raises(ValueError, match="no annotations"):
        objects_of({}, height=200, width=100, num_classes=3)


# Two images on maps of 2 x 2 cells, of the second of which the right half is padding. In the first,
# a small car stands on the first cell and a large bus on the upper two, and the third is ignored;
# in the second, a car of medium size is all of the image.
OBJECTS = [
    Objects(
        tensor([[0.2, 0.2, 0.2, 0.2], [0.5, 0.2, 0.9, 0.3]]),
        labels=tensor([0, 1]),
        sizes=tensor([0, 2]),
        ignored=tensor([[0.2, 0.8, 0.2, 0.2]]),
    ),
    Objects(tensor([[0.5, 0.5, 1.0, 1.0]]), tensor([0]), tensor([1]), NOTHING),
]
EXPERTS = tensor([[[0, 1], [0, 2], [1, 2], [2, 1]], [[0, 1], [2, 1], [1, 0], [2, 0]]])
PROBABILITIES = tensor([[1 / 3, 1 / 3, 1 / 3]] * 4 + [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]] * 2)
CLASSES = ["car", "bus", "van"]


def record_of(images: slice, tokens: TokenMap | TokenLevels | None) -> MoERecord:
    experts = EXPERTS[images].flatten(0, 1)
    probabilities = PROBABILITIES.unflatten(0, (2, 4))[images].flatten(0, 1)
    routing = Routing(probabilities.log(), probabilities, torch.full(experts.shape, 0.5), experts)
    valid = tokens.valid.flatten() if tokens is not None and tokens.valid is not None else None
    return MoERecord(MoEConfig(3, 2), routing, valid, tokens)


def padding_of(*widths: int) -> Padding:
    return Padding(tensor([[width, 4] for width in widths]), (4, 4))


def assert_counted(layer: dict) -> None:
    """The six tokens that are image, as counted by hand."""
    load = [4 / 12, 5 / 12, 3 / 12]
    entropies = [sum(-x * math.log(x) for x in load), (4 * math.log(3) + 2 * math.log(2)) / 6]
    assert (layer["tokens"], layer["stand"]) == (6, "cells")
    assert (layer["num_experts"], layer["top_k"]) == (3, 2)
    assert layer["load"] == pytest.approx(load)
    assert [layer["load_entropy"], layer["router_entropy"]] == pytest.approx(entropies)
    assert layer["largest_entropy"] == math.log(3)
    together = np.array([[4, 3, 1], [3, 5, 2], [1, 2, 3]]) / 6
    np.testing.assert_allclose(layer["coactivation"], together, rtol=1e-6)
    assert layer["by_class"] == {
        "car": {"tokens": 3, "load": [3 / 6, 3 / 6, 0]},
        "bus": {"tokens": 2, "load": [2 / 4, 1 / 4, 1 / 4]},
        "van": {"tokens": 0, "load": None},
    }
    assert layer["by_size"] == {
        "small": {"tokens": 1, "load": [1 / 2, 1 / 2, 0]},
        "medium": {"tokens": 2, "load": [2 / 4, 2 / 4, 0]},
        "large": {"tokens": 2, "load": [2 / 4, 1 / 4, 1 / 4]},
    }
    assert layer["background"] == {"tokens": 1, "load": [0, 1 / 2, 1 / 2]}


def test_cells_of_a_map_are_counted():
    analysis = ExpertAnalysis(CLASSES)
    record = record_of(slice(2), TokenMap((2, 2), padding_of(4, 2)))
    analysis.add({"moe/encoder_0": record, "pruning/encoder_0": None}, {}, OBJECTS)
    assert list(analysis.report()) == ["encoder_0"]
    assert_counted(analysis.report()["encoder_0"])


def test_images_add_up():
    analysis = ExpertAnalysis(CLASSES)
    whole = {"moe/encoder_0": record_of(slice(1), TokenMap((2, 2)))}
    padded = {"moe/encoder_0": record_of(slice(1, 2), TokenMap((2, 2), padding_of(2)))}
    analysis.add(whole, {}, OBJECTS[:1])
    analysis.add(padded, {}, OBJECTS[1:])
    assert_counted(analysis.report()["encoder_0"])


def test_several_maps_are_counted_one_after_the_other():
    """Here each image has two maps of a row of two cells, which differ in nothing but their place
    among the tokens."""
    padding, analysis = padding_of(4, 2), ExpertAnalysis(CLASSES)
    levels = TokenLevels((TokenMap((1, 2), padding), TokenMap((1, 2), padding)))
    analysis.add({"moe/encoder_0": record_of(slice(2), levels)}, {}, OBJECTS)
    layer = analysis.report()["encoder_0"]
    # Of the first image, left cells see the car, the bus and what is ignored; right ones the bus.
    assert layer["tokens"] == 6 and layer["load"] == pytest.approx([4 / 12, 5 / 12, 3 / 12])
    assert layer["by_class"]["car"] == {"tokens": 4, "load": [3 / 8, 4 / 8, 1 / 8]}
    assert layer["by_class"]["bus"] == {"tokens": 4, "load": [2 / 8, 3 / 8, 3 / 8]}
    assert layer["background"] == {"tokens": 0, "load": None}


def test_kept_tokens_and_those_in_front_of_a_map():
    """A class token, which stands on no cell, and the first image's third and first cell."""
    where = TokenMap((2, 2), index=tensor([[2, 0]]), prefix=1)
    record = record_of(slice(1), None)
    record = record._replace(
        routing=Routing(*(x[:3] for x in record.routing)), tokens=where, valid=where.valid
    )
    analysis = ExpertAnalysis(CLASSES)
    analysis.add({"moe/backbone_0": record}, {}, OBJECTS[:1])
    layer = analysis.report()["backbone_0"]
    assert layer["tokens"] == 3 and layer["background"]["tokens"] == 0
    assert layer["by_class"]["car"] == {"tokens": 1, "load": [0, 1 / 2, 1 / 2]}
    assert layer["by_class"]["bus"] == {"tokens": 1, "load": [0, 1 / 2, 1 / 2]}


def test_queries_belong_to_the_object_that_they_hit():
    objects = Objects(
        # Two cars that overlap and a bus; the last quarter of the image is ignored.
        tensor([[0.2, 0.5, 0.2, 0.4], [0.24, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 1.0]]),
        labels=tensor([0, 0, 1]),
        sizes=tensor([0, 1, 2]),
        ignored=tensor([[0.875, 0.5, 0.25, 1.0]]),
    )
    queries = {
        "a car": ([0.2, 0.5, 0.2, 0.4], 0, [0], False),
        "the other, more or less": ([0.23, 0.5, 0.2, 0.4], 0, [1], False),
        "taken for a bus": ([0.2, 0.5, 0.2, 0.4], 1, [], False),
        "half of the bus": ([0.5, 0.25, 0.2, 0.5], 1, [2], False),
        "less than half of it": ([0.5, 0.2, 0.2, 0.4], 1, [], False),
        "ignored": ([0.8, 0.5, 0.2, 0.2], 0, [], True),
        "hardly ignored": ([0.7, 0.5, 0.2, 0.2], 0, [], False),
    }
    boxes = tensor([box for box, *_ in queries.values()])
    logits = torch.nn.functional.one_hot(tensor([label for _, label, *_ in queries.values()]), 2)
    belongs, ignored = objects_of_queries(logits - 5.0, boxes, objects)
    for row, skipped, (name, (_, _, expected, expected_skipped)) in zip(
        belongs, ignored, queries.items()
    ):
        assert row.nonzero().flatten().tolist() == expected, name
        assert bool(skipped) == expected_skipped, name
    nothing = Objects(NOTHING, tensor([], dtype=torch.long), tensor([], dtype=torch.long), NOTHING)
    belongs, ignored = objects_of_queries(logits - 5.0, boxes, nothing)
    assert belongs.shape == (7, 0) and not ignored.any()


def test_queries_are_counted():
    """Four of each image; of several texts the first one's, which come first."""
    boxes = torch.full((2, 6, 4), 0.9)
    boxes[0, 0] = boxes[0, 4] = OBJECTS[0].boxes[0]
    boxes[0, 1] = boxes[0, 2] = OBJECTS[0].boxes[1]
    boxes[1, 3] = OBJECTS[1].boxes[0]
    logits = torch.zeros(2, 6, 3)
    logits[:, :, 0] = 1
    logits[0, 1, 1] = 2
    analysis = ExpertAnalysis(CLASSES)
    records = {f"moe/{place}": record_of(slice(2), None) for place in ("decoder_0", "text_0")}
    analysis.add(records, {"pred_logits": logits, "pred_boxes": boxes}, OBJECTS)
    layer, other = analysis.report().values()
    assert (layer["stand"], layer["tokens"]) == ("queries", 8)
    assert layer["by_class"]["car"] == {"tokens": 2, "load": [2 / 4, 1 / 4, 1 / 4]}
    assert layer["by_class"]["bus"] == {"tokens": 1, "load": [1 / 2, 0, 1 / 2]}
    assert layer["by_size"]["medium"] == {"tokens": 1, "load": [1 / 2, 0, 1 / 2]}
    assert layer["background"]["tokens"] == 5
    # What is neither on a map nor a query is counted, but nobody knows what it sees.
    assert other["load"] == layer["load"] and other["stand"] == "others"
    assert other["by_class"] is other["by_size"] is other["background"] is None


# In models.


def vit_with_experts() -> torch.nn.Module:
    pruning = [ViTPruningConfig(block=1, keep_ratio=0.5, min_tokens=2)]
    return tiny_dinov3(freeze=None, pruning=pruning, moe=MoEConfig(4, 2, layers=(0, 3))).eval()


def grounding_with_experts() -> torch.nn.Module:
    model = tiny_grounding(text_limit=14)
    patterns = ["network.model.encoder.*", "network.model.decoder.*"]
    swap_ffn_for_moe(model, MoEConfig(4, 2), layers=patterns)
    return model


MODELS = {
    "sparse": (
        sparse_model,
        {"encoder_0_0": "cells"} | {f"decoder_{i}": "queries" for i in (0, 1, 2)},
    ),
    "vit": (vit_with_experts, {"backbone_0": "cells", "backbone_3": "cells"}),
    "grounding": (
        grounding_with_experts,
        {"text_enhancer_layer_0": "others", "encoder_0": "cells"}
        | {f"decoder_{i}": "queries" for i in (0, 1)},
    ),
}


def objects_in(inputs: list[dict]) -> list[Objects]:
    found = []
    for x in inputs:
        boxes, labels = x["instances"].gt_boxes.tensor.tolist(), x["instances"].gt_classes.tolist()
        annotations = [annotation(*pair) for pair in zip(boxes, labels)]
        found.append(objects_of({"annotations": annotations}, *x["image"].shape[1:], 5))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models_are_analysed_whatever_images_are_batched_with(name):
    build, places = MODELS[name]
    model, inputs = build(), make_inputs([(96, 160), (70, 150), (96, 96)])
    together, alone = ExpertAnalysis("abcde"), ExpertAnalysis("abcde")
    objects = objects_in(inputs)
    together.run(model, inputs, objects)
    for one, own in zip(inputs, objects):
        alone.run(model, [one], [own])
    report, expected = together.report(), alone.report()
    assert {place: layer["stand"] for place, layer in report.items()} == places
    for place, layer in report.items():
        for key in ("load", "coactivation", "router_entropy"):
            torch.testing.assert_close(tensor(layer[key]), tensor(expected[place][key]))
        for key in ("tokens", "by_class", "by_size", "background"):
            assert layer[key] == expected[place][key], key
        assert sum(layer["load"]) == pytest.approx(1)
        if place in ("backbone_0", "encoder_0"):  # in front of which no token is pruned
            seen = {name for name, group in layer["by_class"].items() if group["tokens"]}
            assert seen == {"abcde"[label] for x in objects for label in x.labels}
            assert 0 < layer["background"]["tokens"] < layer["tokens"]

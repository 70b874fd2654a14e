"""What detectors share, seen by one that has nothing else; and parts from an outside package."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import logger
from detectron2.utils.events import EventStorage
from torch import nn

import dset_d2
from dset_d2.engine.optimizer import build_adamw, parameter_groups
from dset_d2.modeling import (
    CRITERION_REGISTRY,
    DECODER_REGISTRY,
    Encoded,
    Knobs,
    MetaArch,
    SetCriterion,
)
from dset_d2.modeling.context import current
from dset_d2.modeling.meta_arch import collapse_share, log_records
from dset_d2.modeling.sparse import MoE, MoEConfig

from ..conftest import make_inputs, make_targets, tiny_model


class OneBox(MetaArch):
    """Predicts one box per image from the mean colour, by experts."""

    size_divisibility = 32
    num_classes = 5

    def __init__(self) -> None:
        super().__init__((0.0,) * 3, (255.0,) * 3, multi_scale=(64,), multi_scale_end=1)
        self.decoder = nn.ModuleList([MoE(MoEConfig(3, 2), 3, 9, "relu"), nn.Linear(3, 4)])
        self.name_parts()
        self.seen = []

    def predict(self, images, padding=None, knobs=None):
        self.seen.append((tuple(images.shape), padding is not None))
        with self.context(knobs):
            boxes = self.decoder[1](self.decoder[0](images.mean((2, 3))))
        return {"pred_boxes": boxes.sigmoid()}

    def losses(self, images, targets, padding):
        wanted = torch.stack([t["boxes"][0] for t in targets])
        return {"loss_box": (self.predict(images, padding)["pred_boxes"] - wanted).abs().sum()}

    def postprocess(self, outputs, image_sizes):
        return [
            Instances(size, pred_boxes=Boxes(box[None] * size[0]))
            for box, size in zip(outputs["pred_boxes"], image_sizes)
        ]


def test_a_second_meta_architecture_needs_no_copy():
    torch.manual_seed(0)
    model = OneBox()
    inputs = make_inputs([(64, 96), (96, 128), (50, 70), (64, 96)])
    optimizer = build_adamw(parameter_groups(model, 1e-3, 1e-4), 1e-3, 1e-4)
    with EventStorage() as storage:
        losses = model(inputs[:1])
        assert {"moe/decoder_0/max_usage", "moe/decoder_0/entropy"} <= storage.latest().keys()
    assert losses.keys() == {"loss_box", "loss_balance_decoder_0", "loss_z_decoder_0"}
    assert model.seen == [((1, 3, 32, 64), False)]  # multi-scale, at step 0 alone
    sum(losses.values()).backward()
    optimizer.step()
    assert model.clock.step == 1

    model.seen.clear()
    with torch.no_grad():
        found = model.eval()(inputs, knobs=[None, None, None, Knobs(top_k=1)])
    # Images of one padded shape run together, but for one with knobs of its own.
    assert model.seen == [((2, 3, 64, 96), True), ((1, 3, 96, 128), False), ((1, 3, 64, 96), False)]
    assert [len(x["instances"]) for x in found] == [1] * 4
    assert found[2]["instances"].image_size == (50, 70)
    assert not torch.equal(*(found[i]["instances"].pred_boxes.tensor for i in (0, 3)))
    with pytest.raises(ValueError, match="keep_ratio=0.5: the model has no part.* it has top_k"):
        model(inputs, knobs=Knobs(keep_ratio=0.5))


@pytest.mark.parametrize(
    ("num_experts", "top_k", "share"),
    [(6, 3, 0.75), (6, 1, 0.5 + 0.5 / 6), (4, 2, 0.75), (2, 1, 0.75), (3, 2, 5 / 6)],
)
def test_a_collapse_is_half_way_from_a_fair_share_to_all(
    num_experts, top_k, share, caplog, monkeypatch
):
    assert collapse_share(num_experts, top_k) == pytest.approx(share)
    for taken, warns in ((share - 0.01, False), (share + 0.01, True)):
        caplog.clear()
        monkeypatch.setattr(logger, "_LOG_TIMER", {})
        others = (top_k - taken) / (num_experts - 1)
        shares = torch.tensor([taken] + [others] * (num_experts - 1))
        with EventStorage() as storage:
            log_records({"moe/decoder_0": Seen(shares)})
        assert storage.latest()["moe/decoder_0/usage_1"][0] == pytest.approx(others / top_k)
        assert ("moe/decoder_0: " in caplog.text and "by expert 0" in caplog.text) == warns


def test_a_layer_that_uses_all_its_experts_has_not_collapsed(caplog, monkeypatch):
    monkeypatch.setattr(logger, "_LOG_TIMER", {})
    with EventStorage():
        log_records({"moe/decoder_0": Seen(torch.tensor([1.0, 1.0000001]))})
    assert caplog.text == ""


class Seen:
    """The record of a layer of whose tokens each expert has a share."""

    def __init__(self, shares: torch.Tensor) -> None:
        self.shares = shares

    def statistics(self) -> dict[str, torch.Tensor]:
        usage = self.shares / self.shares.sum()
        return {"usage": usage, "coactivation": self.shares.diag(), "entropy": torch.tensor(1.0)}


def test_detections_are_tensors_of_the_best_pairs():
    model = tiny_model()
    outputs = model.predict(torch.rand(2, 3, 64, 64))
    found = model.detections(outputs)
    scores = outputs["pred_logits"].sigmoid()
    assert found.boxes.shape == (2, 150, 4) and found.scores.shape == found.classes.shape
    assert (found.scores.diff(dim=1) <= 0).all()
    image = 1
    query, label = divmod(int(scores[image].flatten().argmax()), 5)
    assert int(found.classes[image, 0]) == label
    cx, cy, w, h = outputs["pred_boxes"][image, query].tolist()
    expected = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    torch.testing.assert_close(found.boxes[image, 0], expected)
    instances = model.postprocess(outputs, [(10, 20), (30, 40)])[image]
    scale = torch.tensor([40, 30, 40, 30])
    torch.testing.assert_close(instances.pred_boxes.tensor, found.boxes[image] * scale)


class CentreDecoder(nn.Module):
    """An outsider's: the whole image as one box, of a learned class."""

    criterion = "CentreCriterion"

    def __init__(self, cfg) -> None:
        super().__init__()
        self.num_classes = cfg.MODEL.DECODER.NUM_CLASSES
        self.head = nn.Linear(cfg.MODEL.ENCODER.HIDDEN_DIM, self.num_classes)

    def forward(self, encoded: Encoded, targets=None) -> dict:
        assert current().knobs == Knobs()
        logits = self.head(encoded.features[-1].mean((2, 3)))[:, None]
        return {"pred_logits": logits, "pred_boxes": logits.new_full((len(logits), 1, 4), 0.5)}


class CentreCriterion(SetCriterion):
    def forward(self, outputs: dict, targets: list[dict]) -> dict:
        return {"loss_class": outputs["pred_logits"].square().sum()}


@pytest.fixture
def registered():
    DECODER_REGISTRY.register(CentreDecoder)
    CRITERION_REGISTRY.register(CentreCriterion)
    yield
    del DECODER_REGISTRY._obj_map["CentreDecoder"]
    del CRITERION_REGISTRY._obj_map["CentreCriterion"]


def test_an_outside_package_adds_a_decoder_and_its_criterion(registered):
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DETRDetector"
    cfg.MODEL.BACKBONE.NAME = "PResNet"
    cfg.MODEL.DECODER.NAME = "CentreDecoder"
    cfg.MODEL.DECODER.NUM_CLASSES = 5
    model = build_model(cfg)
    losses = model.compute_losses(torch.rand(2, 3, 64, 64), make_targets(2, 3))
    assert losses.keys() == {"loss_class"}
    with torch.no_grad():
        assert len(model.eval()(make_inputs([(64, 64)]))[0]["instances"]) == 5
    cfg.MODEL.DECODER.NAME = "NoDecoder"
    with pytest.raises(KeyError, match="NoDecoder.*DECODER"):
        build_model(cfg)

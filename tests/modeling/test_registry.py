"""What is registered can be built from Detectron2's older configs."""

import pytest
import torch
from detectron2.config import configurable, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model

import dset_d2
from dset_d2.modeling import (
    CRITERION_REGISTRY,
    DECODER_REGISTRY,
    ENCODER_REGISTRY,
    DETRDetector,
    HybridEncoder,
    RTDETRDecoder,
    SetCriterion,
)

from ..conftest import make_inputs


@pytest.mark.parametrize("backbone", ["PResNet", "HGNetv2", "DINOv3"])
def test_build_from_cfg_node(backbone):
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DETRDetector"
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.DECODER.NUM_CLASSES = 5
    cfg.MODEL.ENCODER.HIDDEN_DIM = cfg.MODEL.DECODER.HIDDEN_DIM = 32
    model = build_model(cfg)
    assert isinstance(model, DETRDetector)
    assert type(model.backbone).__name__ == backbone
    losses = model(make_inputs([(64, 64)]))
    sum(losses.values()).backward()
    with torch.no_grad():
        found = model.eval()(make_inputs([(64, 96)]))[0]["instances"]
    assert len(found) == min(300, 5 * (8 * 12 + 4 * 6 + 2 * 3))


def test_backbone_that_asks_for_no_size():
    """Detectron2's ResNet has a ``size_divisibility`` of 0, and its coarsest map a stride of 32."""
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DETRDetector"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.update(DEPTH=18, RES2_OUT_CHANNELS=64, NORM="BN")
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.DECODER.NUM_CLASSES = 5
    cfg.MODEL.ENCODER.HIDDEN_DIM = cfg.MODEL.DECODER.HIDDEN_DIM = 32
    model = build_model(cfg)
    assert model.backbone.size_divisibility == 0 and model.size_divisibility == 32
    sum(model(make_inputs([(50, 71), (64, 96)])).values()).backward()
    with torch.no_grad():
        found = model.eval()(make_inputs([(50, 71)]))[0]["instances"]
    assert found.image_size == (50, 71) and found.pred_boxes.tensor.isfinite().all()


class LoudEncoder(HybridEncoder):
    """An outside package's, with an argument of its own."""

    @configurable
    def __init__(self, *, loudness: float = 1.0, **settings) -> None:
        super().__init__(**settings)
        self.loudness = loudness

    def forward(self, features, padding=None):
        encoded = super().forward(features, padding)
        return encoded._replace(features=[self.loudness * x for x in encoded.features])


class ShyDecoder(RTDETRDecoder):
    criterion = "SetCriterion"


class ClassCriterion(SetCriterion):
    """Learns classes alone."""

    default_weights = {"vfl": 1.0}

    def box_losses(self, pairs):
        return {}


@pytest.fixture
def outside_parts():
    parts = {
        ENCODER_REGISTRY: LoudEncoder,
        DECODER_REGISTRY: ShyDecoder,
        CRITERION_REGISTRY: ClassCriterion,
    }
    for registry, part in parts.items():
        registry.register(part)
    yield
    for registry, part in parts.items():
        del registry._obj_map[part.__name__]


def test_an_outside_package_adds_an_encoder_a_decoder_and_a_criterion(outside_parts):
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DETRDetector"
    cfg.MODEL.BACKBONE.NAME = "PResNet"
    cfg.MODEL.ENCODER.update(NAME="LoudEncoder", LOUDNESS=0.5, HIDDEN_DIM=32, DROPOUT=0.1)
    cfg.MODEL.DECODER.update(NAME="ShyDecoder", HIDDEN_DIM=32, NUM_CLASSES=5, NUM_QUERIES=7)
    model = build_model(cfg)
    parts = model.encoder, model.decoder, model.criterion
    assert [type(part) for part in parts] == [LoudEncoder, ShyDecoder, SetCriterion]
    assert model.encoder.loudness == 0.5 and model.encoder.encoder[0].layers[0].dropout1.p == 0.1
    assert model.decoder.num_queries == 7
    cfg.MODEL.CRITERION.update(NAME="ClassCriterion")
    cfg.MODEL.CRITERION.WEIGHTS.VFL = 3.0
    model = build_model(cfg)
    assert model.criterion.weights == {"vfl": 3.0}
    losses = model(make_inputs([(64, 64)]))
    assert losses and all(name.startswith("loss_vfl") for name in losses)


def test_names_are_registered():
    assert "DETRDetector" in META_ARCH_REGISTRY
    for name in ("PResNet", "HGNetv2", "DINOv3"):
        assert name in BACKBONE_REGISTRY
    assert "HybridEncoder" in ENCODER_REGISTRY

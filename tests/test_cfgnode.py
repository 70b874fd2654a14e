"""The keys of ``CfgNode`` configs: models and data as from the LazyConfigs, and clear errors."""

import math
from dataclasses import asdict, is_dataclass

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import ListConfig
from torch import nn

import dset_d2
from dset_d2.arguments import arguments, build, keys_of
from dset_d2.data import DETRMapper
from dset_d2.data.mapper import FLIPS
from dset_d2.engine.optimizer import build_adamw
from dset_d2.modeling import build_criterion, build_decoder, build_encoder

from .conftest import make_inputs
from .test_configs import ROOT

OTHER_SCALES = [480, 512, 544, 576, 608, 672, 704, 736, 768, 800]
DFINE_S = {
    "MODEL.BACKBONE.NAME": "HGNetv2",
    "MODEL.HGNETV2.NAME": "B0",
    "MODEL.HGNETV2.USE_LAB": True,
    "MODEL.MULTI_SCALE": OTHER_SCALES + [640] * 20,
    "MODEL.ENCODER.FUSION": "gelan",
    "MODEL.ENCODER.EXPANSION": 0.5,
    "MODEL.ENCODER.DEPTH_MULT": 0.34,
    "MODEL.DECODER.NAME": "DFINEDecoder",
    "MODEL.DECODER.NUM_LAYERS": 3,
    "MODEL.DECODER.NUM_POINTS": [3, 6, 3],
}
DINOV3_LORA = DFINE_S | {
    "MODEL.BACKBONE.NAME": "DINOv3",
    "MODEL.DINOV3.FREEZE.ENABLED": True,
    "MODEL.DINOV3.LORA.RANK": 8,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.ENCODER.HIDDEN_DIM": 160,
    "MODEL.ENCODER.DIM_FEEDFORWARD": 320,
    "MODEL.ENCODER.DEPTH_MULT": 1.0,
    "MODEL.DECODER.HIDDEN_DIM": 160,
    "MODEL.DECODER.DIM_FEEDFORWARD": 320,
}
YAML = ["configs/rtdetr/rtdetrv2_r18_coco.yaml", "projects/dset/configs/dset_r18_dair_v2x.yaml"]


def make_cfg(file: str | None = None, keys: dict | None = None) -> CfgNode:
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DETRDetector"
    if file is not None:
        cfg.merge_from_file(str(ROOT / file))
    cfg.merge_from_list([word for pair in (keys or {}).items() for word in pair])
    return cfg


def plain(value):
    """Settings as data that compare: classes by name, modules and tensors left to others."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple | ListConfig):
        return [plain(item) for item in value]
    if is_dataclass(value):
        return type(value), plain(asdict(value))
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, nn.Module | torch.Tensor) or not hasattr(value, "__dict__"):
        return type(value)
    return type(value), plain(vars(value))


def settings(model: nn.Module) -> dict:
    """What the modules of a model are and were told, by their names."""
    torchs = vars(nn.Module())
    return {
        name: (
            type(module),
            {name: plain(value) for name, value in vars(module).items() if name not in torchs},
        )
        for name, module in model.named_modules()
    }


def tensors(model: nn.Module) -> dict:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (value.shape, value.dtype, value.requires_grad) for name, value in named}


def assert_equal_models(model: nn.Module, lazy: nn.Module) -> None:
    assert settings(model) == settings(lazy)
    assert tensors(model) == tensors(lazy)
    model.load_state_dict(lazy.state_dict())
    inputs = make_inputs([(64, 64)] * 2)
    model.multi_scale = lazy.multi_scale = []  # for speed; compared above
    losses = []
    for either in (model, lazy):
        torch.manual_seed(0)
        losses.append(either.train()(inputs))
    assert list(losses[0]) == list(losses[1])
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], msg=lambda text: f"{name}: {text}")
    model.load_state_dict(lazy.state_dict())  # statistics that training updated
    with torch.no_grad():
        images = (inputs[0]["image"][None] - model.pixel_mean) / model.pixel_std
        torch.testing.assert_close(model.eval().predict(images), lazy.eval().predict(images))


@pytest.mark.parametrize(
    ("path", "file", "keys"),
    [
        ("configs/rtdetr/rtdetrv2_r18_coco.py", YAML[0], {}),
        ("projects/dset/configs/dset_r18_dair_v2x.py", YAML[1], {}),
        (
            "projects/dset/configs/dset_r18_memory_dair_v2x.py",
            YAML[1],
            {"MODEL.DECODER.MEMORY_PRUNING.KEEP_RATIO": 0.5},
        ),
        ("configs/dfine/dfine_s_coco.py", None, DFINE_S),
        ("projects/dfine_dinov3/configs/dfine_dinov3_s_lora_coco.py", None, DINOV3_LORA),
    ],
)
def test_models_equal_the_lazy_configs(path, file, keys):
    cfg = dset_d2.get_config(path)
    lazy = instantiate(cfg.model)
    steps = {"MODEL.MULTI_SCALE_END": lazy.multi_scale_end}
    if lazy.decoder.memory_pruner is not None:
        steps["MODEL.DECODER.MEMORY_PRUNING.END_STEP"] = lazy.decoder.memory_pruner.config.end_step
    assert_equal_models(build_model(make_cfg(file, keys | steps)), lazy)

"""The keys of ``CfgNode`` configs: models and data as from the LazyConfigs, and clear errors."""

from dataclasses import asdict, is_dataclass

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.config import LazyCall as L
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from omegaconf import ListConfig, OmegaConf
from torch import nn

import dset_d2
from dset_d2.arguments import arguments, build, find_group, keys_of
from dset_d2.data import DETRMapper, Mosaic
from dset_d2.engine.optimizer import build_optimizer
from dset_d2.modeling import FreezeConfig, PlainAdapter
from dset_d2.modeling.sparse import MemoryPruningConfig, MoEConfig, PruningConfig

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
PYTHON = ["configs/rtdetr/rtdetrv2_r18_coco.py", "projects/dset/configs/dset_r18_dair_v2x.py"]
YAML = [path.replace(".py", ".yaml") for path in PYTHON]


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
    torch.testing.assert_close(*losses)
    model.load_state_dict(lazy.state_dict())  # statistics that training updated
    with torch.no_grad():
        images = (inputs[0]["image"][None] - model.pixel_mean) / model.pixel_std
        torch.testing.assert_close(model.eval().predict(images), lazy.eval().predict(images))


@pytest.mark.parametrize(
    ("path", "file", "keys"),
    [
        (PYTHON[0], YAML[0], {}),
        (PYTHON[1], YAML[1], {}),
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


SETTINGS = {  # of a LazyConfig's model, each away from its default
    "multi_scale": [64, 96],
    "multi_scale_end": 7,
    "max_detections": 17,
    "encoder.dropout": 0.1,
    "encoder.enc_act": "relu",
    "encoder.pe_temperature": 100.0,
    "encoder.num_encoder_layers": 2,
    "encoder.act": "relu",
    "encoder.moe.num_experts": 3,
    "encoder.moe.top_k": 1,
    "encoder.moe.expert_dim": 24,
    "encoder.moe.balance_weight": 0.5,
    "encoder.moe.z_loss_weight": 0.25,
    "encoder.moe.dispatch": "dense",
    "encoder.moe.temperature": 2.0,
    "encoder.moe.start_step": 1,
    "encoder.moe.end_step": 3,
    "encoder.moe.layers": [1],
    "encoder.moe.act": "silu",
    "encoder.moe.patch_size": 2,
    "encoder.moe.balance_reduction": "mean",
    "encoder.pruning.keep_ratio": 0.4,
    "encoder.pruning.min_tokens": 2,
    "encoder.pruning.placement": "after",
    "encoder.pruning.restore": "zero",
    "encoder.pruning.gate": False,
    "encoder.pruning.sparsity_weight": 0.5,
    "encoder.pruning.spatial_prior": "lower",
    "encoder.use_encoder_idx": [1, 2],
    "decoder.num_classes": 5,
    "decoder.eval_idx": 1,
    "decoder.dropout": 0.2,
    "decoder.num_queries": 20,
    "decoder.num_denoising": 10,
    "decoder.label_noise_ratio": 0.2,
    "decoder.box_noise_scale": 0.4,
    "decoder.cross_attn_method": "discrete",
    "decoder.query_select_method": "agnostic",
    "decoder.layer_scale": 2.0,
    "decoder.reg_max": 16,
    "decoder.up": 0.25,
    "decoder.reg_scale": 8.0,
    "decoder.moe.num_experts": 2,
    "decoder.moe.top_k": 2,
    "decoder.memory_pruning.keep_ratio": 0.6,
    "criterion.alpha": 0.5,
    "criterion.gamma": 1.5,
    "criterion.classification": "mal",
    "criterion.mal_gamma": 1.25,
    "criterion.temperature": 4.0,
    "criterion.weights.ddf": 0.5,
    "criterion.matcher.cost_giou": 3.0,
    "criterion.matcher.gamma": 1.0,
}


def test_keys_are_the_lazy_configs_arguments():
    cfg = dset_d2.get_config("configs/dfine/dfine_s_coco.py")
    for part, config in (
        ("encoder.moe", MoEConfig),
        ("encoder.pruning", PruningConfig),
        ("decoder.moe", MoEConfig),
        ("decoder.memory_pruning", MemoryPruningConfig),
    ):
        OmegaConf.update(cfg.model, part, L(config)(), force_add=True)
    keys = dict(DFINE_S)
    for name, value in SETTINGS.items():
        OmegaConf.update(cfg.model, name, value, force_add=True)
        keys[f"MODEL.{name.upper()}"] = value
    keys["TEST.DETECTIONS_PER_IMAGE"] = keys.pop("MODEL.MAX_DETECTIONS")
    assert_equal_models(build_model(make_cfg(None, keys)), instantiate(cfg.model))


def test_vit_and_adapter_follow_their_keys():
    keys = {"ADAPTER.NAME": "plain", "ADAPTER.IN_CHANNELS": 32, "ADAPTER.LAYER_NORM": True}
    keys |= {"TAPS": [0, 2], "FREEZE.UNFREEZE_STEP": 5, "FREEZE.UNFREEZE_BLOCKS": 1}
    keys |= {"FREEZE.UNFREEZE_EVERY": 3, "ADAPTER.UPSAMPLING": "nearest"}
    cfg = make_cfg(None, DINOV3_LORA | {f"MODEL.DINOV3.{key}": keys[key] for key in keys})
    cfg.MODEL.DINOV3.VIT.update(embed_dim=32, depth=4, num_heads=2)
    backbone = build_model(cfg).backbone
    assert isinstance(backbone.adapter, PlainAdapter) and backbone.adapter.norm.weight.numel() == 32
    assert backbone.adapter.upsampling == "nearest"
    assert backbone.dinov3.embed_dim == 32 and backbone.taps == [0, 2]
    assert backbone.phases.config == FreezeConfig(5, 1, 3)


@pytest.mark.parametrize(("path", "file"), list(zip(PYTHON, YAML)))
def test_runs_equal_the_lazy_configs(path, file):
    """Data, optimizer and schedule."""
    lazy, cfg = dset_d2.get_config(path), make_cfg(file)
    loaders = lazy.dataloader
    for is_train, wanted in ((True, loaders.train.mapper), (False, loaders.test.mapper)):
        assert plain(DETRMapper(cfg, is_train=is_train)) == plain(instantiate(wanted))
    assert list(cfg.DATASETS.TRAIN) == [loaders.train.dataset.names]
    assert list(cfg.DATASETS.TEST) == [loaders.test.dataset.names]
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS == loaders.train.dataset.get(
        "filter_empty", False
    )
    assert cfg.DATALOADER.ASPECT_RATIO_GROUPING == loaders.train.aspect_ratio_grouping
    assert cfg.SOLVER.IMS_PER_BATCH == loaders.train.total_batch_size
    assert cfg.SOLVER.MAX_ITER == lazy.train.max_iter
    assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD == lazy.train.eval_period
    assert cfg.OUTPUT_DIR == lazy.train.output_dir

    model = instantiate(lazy.model)
    lazy.optimizer.params.model = model
    optimizers = build_optimizer(cfg, model), instantiate(lazy.optimizer)
    groups, wanted = (optimizer.param_groups for optimizer in optimizers)
    assert groups == wanted  # the parameters are the same ones
    for optimizer, norm in zip(optimizers, (cfg.SOLVER.CLIP_NORM, lazy.optimizer.clip_norm)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert nn.utils.get_total_norm(gradients).item() == pytest.approx(norm, rel=1e-3)
    schedule = build_lr_scheduler(cfg, optimizers[0])
    multiplier = instantiate(lazy.lr_multiplier)
    for share in (0.0, 0.001, 0.01, 0.1, 0.5, 1.0):
        assert schedule._multiplier(share) == pytest.approx(multiplier(share), rel=1e-3)


def test_augmentations_follow_their_keys():
    cfg = make_cfg()
    keys = {"IMAGE_SIZE": [96, 160], "STRONG_AUGMENTATION_END": 9, "MIN_BOX_SIZE": 3.0}
    keys |= {"RANDOM_ZOOM_OUT.PROB": 0.25, "RANDOM_ZOOM_OUT.MAX_SCALE": 2.0}
    cfg.merge_from_list([word for name, value in keys.items() for word in (f"INPUT.{name}", value)])
    mapper = DETRMapper(cfg)
    photometric, zoom_out, crop, flip, resize = mapper.augmentations.augs
    assert {x.end for x in (photometric, zoom_out, crop)} == {9} and mapper.min_box_size == 3.0
    assert (zoom_out.augmentation.prob, zoom_out.augmentation.max_scale) == (0.25, 2.0)
    assert resize.shape == (96, 160) and (flip.horizontal, flip.vertical) == (True, False)
    cfg.INPUT.RANDOM_FLIP = "none"
    assert len(DETRMapper(cfg).augmentations.augs) == 4
    cfg.INPUT.RANDOM_FLIP = "diagonal"
    with pytest.raises(ValueError, match="INPUT.RANDOM_FLIP='diagonal' is not one of"):
        DETRMapper(cfg)
    assert len(DETRMapper(cfg, is_train=False).augmentations.augs) == 1
    cfg.INPUT.IMAGE_SIZE = [640]
    with pytest.raises(ValueError, match=r"INPUT.IMAGE_SIZE=\[640\] must be a height and a width"):
        DETRMapper(cfg, is_train=False)


def test_mosaic_follows_its_keys():
    cfg = make_cfg(None, {"INPUT.MOSAIC.MIXUP_PROB": 0.5, "INPUT.MOSAIC.SCALE": [0.25, 0.5]})
    cfg.INPUT.STRONG_AUGMENTATION_END = 4
    mosaic = Mosaic(cfg, [{"file_name": "x.jpg"}])
    assert (mosaic.prob, mosaic.mixup_prob, mosaic.scale, mosaic.end) == (0, 0.5, (0.25, 0.5), 4)
    cfg.INPUT.MOSAIC.PROB = 2.0
    with pytest.raises(ValueError, match=r"prob=2.0 must lie in \[0, 1\]"):
        Mosaic(cfg, [{}])


def test_saved_cfg_loads(tmp_path):
    cfg = make_cfg(YAML[1])
    cfg.MODEL.DINOV3.VIT.drop_path_rate = 0.1
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = make_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    for group in ("MODEL.ENCODER", "MODEL.DECODER", "MODEL.CRITERION", "MODEL.DINOV3"):
        assert find_group(again, group) == find_group(cfg, group)
    assert again.INPUT == cfg.INPUT and again.SOLVER == cfg.SOLVER


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ENCODER.MOE.NUM_EXPERTS", -1, "MODEL.ENCODER.MOE.NUM_EXPERTS=-1 must be at least 1"),
        (
            "ENCODER.MOE.EXPERT_DIM",
            "wide",
            r"MODEL.ENCODER.MOE.EXPERT_DIM='wide' must be int \| None",
        ),
        ("ENCODER.MOE.LAYERS", [3], r"MODEL.ENCODER: layers=\[3\] names none of 1 layers"),
        ("ENCODER.PRUNING.KEEP_RATIO", 1.5, "MODEL.ENCODER.PRUNING.KEEP_RATIO=1.5 must lie in"),
        ("ENCODER.PRUNING.RESTORE", "ones", "MODEL.ENCODER.PRUNING.RESTORE='ones' is not one of"),
        ("ENCODER.FUSION", "none", "MODEL.ENCODER.FUSION='none' is not one of"),
        ("DECODER.NUM_QUERIES", 1.5, "MODEL.DECODER.NUM_QUERIES=1.5 must be int"),
        ("DECODER.NUM_QUERIES", True, "MODEL.DECODER.NUM_QUERIES=True must be int"),
        ("DECODER.NUM_POINTS", [4, "a", 4], "MODEL.DECODER.NUM_POINTS=.*'a'.* must be tuple.int"),
        ("DECODER.NUM_DENOISING", -1, "MODEL.DECODER.NUM_DENOISING=-1 must not be negative"),
        ("PRESNET.DEPTH", 19, "MODEL.PRESNET.DEPTH=19 is not one of"),
    ],
)
def test_wrong_values_are_named(key, value, message):
    cfg = make_cfg(YAML[1], {"MODEL.ENCODER.HIDDEN_DIM": 32, "MODEL.DECODER.HIDDEN_DIM": 32})
    group, _, name = f"MODEL.{key}".rpartition(".")
    find_group(cfg, group)[name] = value
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        ("MODEL.ENCODER.NAME", "HybridEncoder"),
        ("MODEL.DECODER.NAME", "DFINEDecoder, RTDETRDecoder"),
        ("MODEL.CRITERION.NAME", "DFINECriterion, SetCriterion"),
    ],
)
def test_unknown_names_are_named(key, known):
    cfg = make_cfg(YAML[0], {key: "Unheard"})
    with pytest.raises(KeyError, match=f"{key}: .*'Unheard'.* There is: {known}"):
        build_model(cfg)


def test_wrong_values_of_the_solver_are_named():
    cfg, model = make_cfg(None, {"SOLVER.CLIP_NORM": 0.0}), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="SOLVER.CLIP_NORM=0.0 must be positive"):
        build_optimizer(cfg, model)
    cfg.SOLVER.RULES.head = CfgNode({"pattern": "head"})
    with pytest.raises(ValueError, match="SOLVER: no parameter's name has the pattern 'head'"):
        build_optimizer(cfg, model)


def test_levels_that_differ_are_an_error():
    model = build_model(make_cfg(YAML[0], {"MODEL.DECODER.NUM_POINTS": [4, 4]}))
    with pytest.raises(ValueError, match="num_points are for 2 levels of the encoder's 3"):
        model(make_inputs([(64, 64)]))


def test_wrong_values_of_dinov3_are_named():
    cfg = make_cfg(None, DINOV3_LORA | {"MODEL.DINOV3.ADAPTER.NAME": "fancy"})
    with pytest.raises(ValueError, match="MODEL.DINOV3.ADAPTER.NAME='fancy' is not one of"):
        build_model(cfg)
    cfg.merge_from_list(
        ["MODEL.DINOV3.ADAPTER.NAME", "plain", "MODEL.DINOV3.FREEZE.UNFREEZE_STEP", -1]
    )
    with pytest.raises(ValueError, match="MODEL.DINOV3.FREEZE.UNFREEZE_STEP=-1 must not be neg"):
        build_model(cfg)


def test_keys_of_other_types_and_names_are_refused_when_they_are_set():
    cfg = make_cfg()
    with pytest.raises(ValueError, match="MODEL.ENCODER.MOE.NUM_EXPERTS"):
        cfg.merge_from_list(["MODEL.ENCODER.MOE.NUM_EXPERTS", "four"])
    with pytest.raises(AssertionError, match="Non-existent key: MODEL.ENCODER.MOE.EXPERTS"):
        cfg.merge_from_list(["MODEL.ENCODER.MOE.EXPERTS", 4])


def test_arguments_of_functions_and_unannotated_ones():
    def area(width, height: float = 2.0, *, corners: "list[int]" = (0, 1), name: str | None = None):
        return width * height, corners, name

    cfg = CfgNode({"SHAPE": keys_of(area, WIDTH=3)})
    assert cfg.SHAPE == {"WIDTH": 3, "HEIGHT": 2.0, "CORNERS": [0, 1], "NAME": None}
    assert build(area, cfg, "SHAPE") == (6.0, [0, 1], None)
    cfg.SHAPE.NAME = 5
    with pytest.raises(ValueError, match=r"SHAPE.NAME=5 must be str \| None"):
        arguments(area, cfg, "SHAPE")

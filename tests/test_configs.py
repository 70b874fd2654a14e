"""Every config builds, runs and survives being saved."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets import register_coco_instances
from omegaconf import DictConfig

import dset_d2
from dset_d2.config import apply_overrides, load_config
from dset_d2.modeling import GroundingDINO, LoRAConfig
from dset_d2.modeling.sparse import MoE, MoEConfig, PruningConfig

from .conftest import make_inputs

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for top in ("configs", "projects/*/configs")
    for path in ROOT.glob(f"{top}/**/*_*.py")
    if "common" not in path.parts
)
PARAMETERS = {  # published, in millions
    "r18": 20,
    "r34": 31,
    "r50_m": 36,
    "r50": 42,
    "r101": 76,
    "hgnetv2_l": 32,
    "hgnetv2_x": 67,
    "r18_dsp": 20,
}


@pytest.mark.parametrize("path", CONFIGS)
def test_config_trains_and_detects(path, tmp_path, request):
    cfg = dset_d2.get_config(path)
    if cfg.model._target_ is GroundingDINO:
        pytest.importorskip("transformers", minversion="5.23")
        if "architecture" not in cfg.model:
            cfg.model.folder = request.getfixturevalue("grounding_folder")
    elif cfg.model.decoder.num_classes is None:
        cfg.model.decoder.num_classes = 3
    if cfg.model.get("multi_scale"):
        cfg.model.multi_scale = [64]  # of 480 to 800 pixels
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert instantiate(cfg.lr_multiplier)(0.5) == pytest.approx(1, abs=0.99)

    model.train()
    losses = model(make_inputs([(64, 64)] * 2, num_classes=model.num_classes))
    assert all(value.isfinite() for value in losses.values())
    with torch.no_grad():
        found = model.eval()(make_inputs([(64, 96)]))
    assert found[0]["instances"].pred_boxes.tensor.isfinite().all()

    del cfg.optimizer.params.model
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    again = LazyConfig.load(str(tmp_path / "config.yaml"))
    # Random weights of the same shapes are not drawn again; the library's are.
    with torch.device("cpu" if cfg.model._target_ is GroundingDINO else "meta"):
        copy = instantiate(again.model)
    assert [p.shape for p in copy.parameters()] == [p.shape for p in model.parameters()]
    again.optimizer.params.model = copy
    for part in (again.dataloader.train.mapper, again.lr_multiplier, again.optimizer):
        instantiate(part)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = instantiate(dset_d2.get_config(f"configs/rtdetr/rtdetrv2_{name}_coco.py").model)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], abs=1)


DOCUMENTS = {  # experts and top-k of the encoder and of the decoder, share of the tokens
    "r18_light": ((2, 1), (3, 2), 0.6),
    "r34": ((6, 3), (6, 3), 0.7),
    "r50": ((4, 2), (6, 3), 0.7),
}


@pytest.mark.parametrize("size", DOCUMENTS)
def test_sizes_have_the_documents_experts(size):
    names = [f"dset_{size}", f"dset_{size.removesuffix('_light')}_literal"]
    names += [] if size.endswith("light") else [f"dset_{size}_full"]
    for name in names:
        model = dset_d2.get_config(f"projects/dset/configs/{name}_dair_v2x.py").model
        experts = [(p.moe.num_experts, p.moe.top_k) for p in (model.encoder, model.decoder)]
        assert (*experts, model.encoder.pruning.keep_ratio) == DOCUMENTS[size]
        assert ("literal" in name) == (model.encoder.pruning.get("foreground_weight") == 0)


@pytest.mark.parametrize("size", ["r18", *DOCUMENTS])
def test_controls_are_as_wide_as_what_a_token_uses(size):
    sparse, dense = (
        dset_d2.get_config(f"projects/dset/configs/{kind}_{size}_dair_v2x.py").model
        for kind in ("dset", "dense")
    )
    for part in ("encoder", "decoder"):
        moe = instantiate(sparse[part].moe)
        used = moe.top_k * moe.width(sparse[part].dim_feedforward)
        assert dense[part].dim_feedforward == used


def test_unknown_config_lists_its_neighbours():
    with pytest.raises(FileNotFoundError, match="rtdetrv2_r18_coco.py"):
        dset_d2.get_config("configs/rtdetr/rtdetrv2_r19_coco.py")


def test_configs_load_from_within_their_folder(monkeypatch):
    path = Path("projects/dset/configs/dset_s_dair_v2x.py")
    cfg = dset_d2.get_config(str(path))
    monkeypatch.chdir(Path(dset_d2.__file__).parent.parent / path.parent)
    assert load_config(path.name) == cfg


def test_misspelt_override_suggests_the_right_key():
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py")
    with pytest.raises(ValueError, match="model.decoder.num_queries"):
        apply_overrides(cfg, ["model.decoder.num_querys=100"])
    apply_overrides(cfg, ["model.decoder.num_queries=100", "optimizer.lr=3e-4"])
    assert cfg.model.decoder.num_queries == 100
    assert cfg.optimizer.params.base_lr == 3e-4
    apply_overrides(cfg, ["model.decoder.dropout=0.1"])  # which the config leaves to its default
    apply_overrides(cfg, ["model.decoder.eval_idx=0"])  # which the decoder hands to its base
    decoder = instantiate(cfg.model).decoder
    assert decoder.decoder.layers[0].dropout1.p == 0.1 and decoder.eval_idx == 0


ENCODER_MOE = "model.encoder.moe"


@pytest.mark.parametrize("saved", [False, True])
def test_groups_that_are_off_turn_on(tmp_path, saved):
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py")
    if saved:  # its classes are then named by text
        LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
        cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
    assert "moe" not in cfg.model.encoder
    overrides = ["encoder.moe.num_experts=2", "encoder.pruning.keep_ratio=0.7"]
    overrides += ["decoder.moe.top_k=1", "decoder.moe.num_experts=4"]
    apply_overrides(cfg, [f"model.{override}" for override in overrides])
    model = instantiate(cfg.model)
    assert sum(isinstance(module, MoE) for module in model.modules()) == 4
    groups = [cfg.model.encoder.moe, cfg.model.encoder.pruning, cfg.model.decoder.moe]
    expected = [MoEConfig(2), PruningConfig(0.7), MoEConfig(4, 1)]
    assert [instantiate(group) for group in groups] == expected
    apply_overrides(cfg, [f"{ENCODER_MOE}=null", "model.encoder.pruning=null"])
    assert cfg.model.encoder.moe is None and cfg.model.encoder.pruning is None


def test_groups_of_a_backbone_turn_on():
    cfg = dset_d2.get_config("projects/dfine_dinov3/configs/dfine_dinov3_s_coco.py")
    assert cfg.model.backbone.lora is None
    apply_overrides(cfg, ["model.backbone.lora.rank=4", "model.backbone.lora.blocks=2"])
    assert instantiate(cfg.model.backbone.lora) == LoRAConfig(rank=4, blocks=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{ENCODER_MOE}.top_k=1"], f"{ENCODER_MOE} needs num_experts, which has no default"),
        ([f"{ENCODER_MOE}.num_expert=4"], f"no key .*; close to it: {ENCODER_MOE}.num_experts"),
        (["model.encoder.mor.top_k=1"], "the config has no key 'model.encoder.mor.top_k'"),
        (["model.backbone.lora.rank=8"], "the config has no key 'model.backbone.lora.rank'"),
        (["model.encoder.hidden_dim.x=8"], "the config has no key 'model.encoder.hidden_dim.x'"),
    ],
)
def test_groups_that_cannot_be_turned_on(overrides, message):
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py")
    with pytest.raises(ValueError, match=message):
        apply_overrides(cfg, overrides)
    apply_overrides(cfg, [f"{ENCODER_MOE}.top_k=1", f"{ENCODER_MOE}=null"])


def test_custom_config_takes_files_and_registered_data_sets(tmp_path):
    image = {"id": 1, "file_name": "x.jpg", "height": 4, "width": 5}
    category = {"id": 3, "name": "car"}
    text = json.dumps({"images": [image], "annotations": [], "categories": [category]})
    (tmp_path / "a.json").write_text(text)
    register_coco_instances("my_train", {}, str(tmp_path / "a.json"), str(tmp_path))

    def switched(*overrides):
        cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_custom.py")
        overrides = [f"dataloader.test.dataset.{override}" for override in overrides]
        return apply_overrides(cfg, overrides).dataloader

    with pytest.raises(ValueError, match="'custom_val': set json_file and image_root, or names"):
        instantiate(switched().test.dataset)
    by_name = switched("names=my_train")
    assert len(instantiate(by_name.test.dataset)) == 1
    assert by_name.evaluator.dataset_name == "my_train"
    by_file = switched(f"json_file={tmp_path}/a.json", f"image_root={tmp_path}")
    assert len(instantiate(by_file.test.dataset)) == 1
    with pytest.raises(ValueError, match="'my_train': set json_file and image_root"):
        instantiate(switched("names=my_train", f"image_root={tmp_path}").test.dataset)


def test_no_number_of_classes_is_an_error():
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_custom.py")
    with pytest.raises(ValueError, match="num_classes=None must be the number of the data set's"):
        instantiate(cfg.model)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iter=abc", "train.max_iter is a number, as 887160"),
        ("train.amp.enabled=no", "train.amp.enabled is true or false, as False"),
        ("dataloader.image_size=640px", r"dataloader.image_size is a list, as \[640, 640\]"),
        ("train.ema=off", "train.ema is a group of settings"),
    ],
)
def test_text_in_place_of_a_number_is_named(override, message):
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py")
    with pytest.raises(ValueError, match=message):
        apply_overrides(cfg, [override])


@pytest.mark.parametrize("path", ["runs/lr=0.1/best model.pth", "a=b", "it's=x"])
def test_paths_with_an_equals_sign(path):
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py")
    apply_overrides(cfg, [f"train.init_checkpoint={path}", f"train.output_dir='{path[0]}=1'"])
    assert cfg.train.init_checkpoint == path and cfg.train.output_dir == f"{path[0]}=1"


def test_targets_written_in_c_take_overrides():
    cfg = DictConfig({"device": L(torch.device)(type="cuda")}, flags={"allow_objects": True})
    apply_overrides(cfg, ["device.type=cpu"])
    assert instantiate(cfg.device) == torch.device("cpu")

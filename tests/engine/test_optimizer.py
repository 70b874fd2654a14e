import logging

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

import dset_d2
from dset_d2.config import apply_overrides
from dset_d2.engine.optimizer import (
    build_adamw,
    flat_cosine,
    parameter_groups,
    warmup_constant,
)
from dset_d2.modeling import LoRAConfig
from dset_d2.modeling.sparse import MoE, MoEConfig

from ..conftest import make_inputs, randomise, tiny_config, tiny_dinov3

DINOV3 = "projects/dfine_dinov3/configs/dfine_dinov3_s_coco.py"


def settings(model: nn.Module, groups: list[dict]) -> dict[str, dict]:
    """The group of each trained parameter, by its name."""
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    return {n: by_parameter[id(p)] for n, p in model.named_parameters() if p.requires_grad}


def configured(*overrides: str, path: str = "configs/rtdetr/rtdetrv2_r18_coco.py") -> dict:
    cfg = apply_overrides(tiny_config(path), list(overrides))
    cfg.optimizer.params.model = instantiate(cfg.model)
    return settings(cfg.optimizer.params.model, instantiate(cfg.optimizer).param_groups)


def test_norms_and_biases_have_no_decay():
    for name, group in configured().items():
        plain = name.endswith("bias") or ".norm" in name
        assert group["weight_decay"] == (0 if plain else 1e-4), name


def test_rates_from_the_command_line():
    for name, group in configured("optimizer.params.rules.backbone.factor=0.1").items():
        assert group["lr"] == pytest.approx(1e-5 if name.startswith("backbone.") else 1e-4)
    with pytest.raises(ValueError, match="close to it: optimizer.params.rules.backbone.factor"):
        configured("optimizer.params.rules.backbon.factor=0.1")


def test_factors_of_rules_multiply():
    model = nn.Module()
    model.token, model.body = nn.Parameter(torch.zeros(2)), nn.Sequential(nn.Linear(2, 2))
    rules = {
        "weights": {"pattern": "weight$", "factor": 0.5},
        "body": {"pattern": r"^body\.", "factor": 0.1},
    }
    found = settings(model, parameter_groups(model, base_lr=2.0, weight_decay=0.1, rules=rules))
    rates = {name: group["lr"] for name, group in found.items()}
    assert rates == pytest.approx({"token": 2, "body.0.weight": 0.1, "body.0.bias": 0.2})


@pytest.mark.parametrize(
    "rule, message",
    [
        ({"pattern": r"^bakbone\."}, r"no parameter's name has the pattern '\^bakbone"),
        ({"pattern": "weight", "factor": -1.0}, "factor=-1.0.*must not be negative"),
        ({"pattern": "weight", "decay": 0.0}, "decay=0.0.*must be positive"),
        ({"pattern": r"(\d+)", "decay": 0.5}, "decay needs a group"),
    ],
)
def test_wrong_rules_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), 1.0, 0.1, rules={"rule": rule})


def test_biases_of_experts_have_no_decay():
    model = MoE(MoEConfig(num_experts=2, top_k=1), 8, 16, "relu")
    groups = settings(model, parameter_groups(model, base_lr=1.0, weight_decay=0.1))
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "router.weight": 0.1,
        **{f"experts.{name}": 0.1 for name in ("w1", "w2")},
        **{f"experts.{name}": 0.0 for name in ("b1", "b2")},
    }


def test_step_clips_the_joint_norm():
    weights = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))
    optimizer = build_adamw([{"params": list(weights)}], lr=0.1, weight_decay=0, clip_norm=0.5)
    for weight in weights:
        weight.grad = torch.full_like(weight, 3.0)
    optimizer.step()
    joint = torch.cat([w.grad for w in weights]).norm()
    assert float(joint) == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(ValueError, match="clip_norm=0"):
        build_adamw([{"params": list(weights)}], lr=0.1, weight_decay=0, clip_norm=0)


def test_warmup():
    schedule = warmup_constant(max_iter=1000, warmup_iters=100)
    rates = [schedule(step / 1000) for step in (0, 49, 100, 1000)]
    assert rates == pytest.approx([0.01, 0.495, 1, 1], abs=0.01)
    longer = warmup_constant(max_iter=10, warmup_iters=100)
    assert longer(1.0) == pytest.approx(0.1)
    assert warmup_constant(max_iter=10, warmup_iters=0)(0.0) == 1
    with pytest.raises(ValueError, match="warmup_iters=-1"):
        warmup_constant(10, -1)


def test_groups_skip_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.1)
    assert sum(len(g["params"]) for g in groups) == 2


def test_sparse_parts_of_the_encoder_learn_at_full_rate():
    for name, group in configured(path="projects/dset/configs/dset_r18_dair_v2x.py").items():
        sparse = {"router", "experts", "pruner"} & set(name.split("."))
        slow = name.startswith(("backbone.", "encoder.")) and not sparse
        assert group["lr"] == pytest.approx(1e-5 if slow else 1e-4), name


def vit_settings(*overrides: str, **backbone) -> dict[str, dict]:
    cfg = apply_overrides(dset_d2.get_config(DINOV3), ["optimizer.lr=1", *overrides])
    cfg.optimizer.params.model = tiny_dinov3(freeze=None, **backbone)
    return settings(cfg.optimizer.params.model, instantiate(cfg.optimizer).param_groups)


def test_rates_fall_with_the_vits_depth():
    rules = "optimizer.params.rules"
    found = vit_settings(
        f"{rules}.backbone.factor=0.5", f"{rules}.vit.factor=0.2", f"{rules}.vit_depth.decay=0.8"
    )
    rates = {name: group["lr"] for name, group in found.items()}
    vit = "backbone.dinov3."
    for index in range(6):
        expected = 0.1 * 0.8 ** (5 - index)
        assert rates[f"{vit}blocks.{index}.attn.qkv.weight"] == pytest.approx(expected)
        assert rates[f"{vit}blocks.{index}.gamma_1"] == pytest.approx(expected)
    assert rates[f"{vit}norm.weight"] == pytest.approx(0.1)
    for name in ("cls_token", "reg_token", "patch_embed.proj.weight"):
        assert rates[f"{vit}{name}"] == pytest.approx(0.1 * 0.8**6)
    for name, rate in rates.items():
        if not name.startswith(vit):
            assert rate == (0.5 if name.startswith("backbone.") else 1), name


def test_low_rank_updates_learn_at_full_rate():
    found = vit_settings("optimizer.params.rules.vit_depth.decay=0.8", lora=LoRAConfig(rank=2))
    updates = [group["lr"] for name, group in found.items() if ".lora_" in name]
    assert updates == [1.0] * 6 * 2 * 2


def test_vectors_and_tokens_of_the_vit_have_no_decay():
    for name, group in vit_settings().items():
        if name.startswith("backbone.dinov3."):
            decayed = name.endswith((".qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
            assert group["weight_decay"] == (1.25e-4 if decayed else 0), name


def test_flat_cosine():
    schedule = flat_cosine(max_iter=1000, warmup_iters=100, flat=0.4, floor=0.2, final=0.1)
    rates = [schedule(step / 1000) for step in (0, 50, 100, 400, 650, 900, 950, 1000)]
    assert rates == pytest.approx([0.01, 0.505, 1, 1, 0.6, 0.2, 0.2, 0.2], abs=0.006)
    falling = [schedule(step / 1000) for step in range(400, 901)]
    assert falling == sorted(falling, reverse=True)
    assert flat_cosine(10, 100, 0.4, 0.2)(1.0) == pytest.approx(0.1)  # ends within the warm-up
    for settings, message in (
        (dict(flat=0.95, floor=0.2, final=0.1), "flat=0.95 and final=0.1"),
        (dict(flat=-0.1, floor=0.2), "flat=-0.1"),
        (dict(flat=0.5, floor=1.2), "floor=1.2"),
    ):
        with pytest.raises(ValueError, match=message):
            flat_cosine(1000, 100, **settings)


# Backbones that are fine-tuned from random weights.

R18 = "configs/rtdetr/rtdetrv2_r18_coco.py"
RATE = "optimizer.params.rules.backbone.factor"
RANDOM = "its weights are random: start from pretrained ones, train.init_checkpoint=FILE"
TINY_VIT = [
    "model.backbone.vit={embed_dim: 32, depth: 6, num_heads: 2}",
    "model.backbone.taps=[1,3,5]",
    "model.backbone.adapter.in_channels=32",
]


def trained_once(path: str, *overrides: str, loaded: bool = False) -> torch.nn.Module:
    cfg = apply_overrides(tiny_config(path), [*overrides, "model.multi_scale=[]"])
    model = cfg.optimizer.params.model = instantiate(cfg.model)
    optimizer = instantiate(cfg.optimizer)
    if loaded:  # as Detectron2's launcher does it, after the optimizer is built
        with torch.no_grad():
            for name, value in randomise(model).named_parameters():
                value.add_(0.01 if "gamma" in name else 0)
    for _ in range(2):
        sum(model.train()(make_inputs([(64, 64)])).values()).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("path", "overrides", "file"),
    [
        (R18, [f"{RATE}=0.1"], "ResNet18_vd_pretrained_from_paddle.pth"),
        (R18, ["model.backbone.freeze_norm=true"], "ResNet18_vd_pretrained"),
        (R18, ["model.backbone.freeze_at=0"], "ResNet18_vd_pretrained"),
        ("configs/dfine/dfine_s_coco.py", [], "PPHGNetV2_B0_stage1.pth of D-FINE's releases"),
        (DINOV3, TINY_VIT, "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"),
        (DINOV3, [*TINY_VIT, "model.backbone.freeze=null"], "dinov3_vits16_pretrain"),
    ],
)
def test_fine_tuning_of_random_weights_is_warned_of(caplog, path, overrides, file):
    caplog.set_level(logging.WARNING)
    trained_once(path, *overrides)
    assert caplog.text.count(RANDOM) == 1 and file in caplog.text
    caplog.clear()
    trained_once(path, *overrides, loaded=True)
    assert RANDOM not in caplog.text


@pytest.mark.parametrize(
    ("path", "overrides"),
    [
        (R18, [f"{RATE}=1"]),
        ("projects/dset/configs/dset_r18_roadside.py", []),
        (DINOV3, [*TINY_VIT, "model.backbone.freeze=null", "optimizer.params.rules.vit.factor=1"]),
    ],
)
def test_random_weights_may_learn_at_the_full_rate(caplog, path, overrides):
    trained_once(path, *overrides)
    assert RANDOM not in caplog.text

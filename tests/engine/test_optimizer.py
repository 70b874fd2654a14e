import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from dset_d2.engine.optimizer import (
    build_adamw,
    flat_cosine,
    parameter_groups,
    warmup_constant,
)
from dset_d2.modeling.sparse import MoE, MoEConfig

from ..conftest import tiny_config, tiny_dinov3


def settings_by_name(**params) -> dict[str, dict]:
    cfg = tiny_config()
    cfg.optimizer.params.update(params)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: groups[id(p)] for name, p in model.named_parameters()}


def test_norms_and_biases_have_no_decay():
    for name, group in settings_by_name().items():
        plain = name.endswith("bias") or ".norm" in name
        assert group["weight_decay"] == (0 if plain else 1e-4), name


def test_backbone_factor():
    for name, group in settings_by_name(backbone_factor=0.1).items():
        assert group["lr"] == pytest.approx(1e-5 if name.startswith("backbone.") else 1e-4)


def test_biases_of_experts_have_no_decay():
    model = MoE(MoEConfig(num_experts=2, top_k=1), 8, 16, "relu")
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert found == {
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
    with pytest.raises(ValueError, match="warmup_iters=0"):
        warmup_constant(10, 0)


def test_groups_skip_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.1)
    assert sum(len(g["params"]) for g in groups) == 2


def test_sparse_parts_of_the_encoder_learn_at_full_rate():
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "encoder": nn.Module()})
    model["encoder"].pruner = nn.Linear(2, 2)
    model["encoder"].norm = nn.LayerNorm(2)
    groups = parameter_groups(model, 1.0, 0.1, backbone_factor=0.1, encoder_factor=0.2)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found["backbone.weight"] == pytest.approx(0.1)
    assert found["encoder.norm.weight"] == pytest.approx(0.2)
    assert found["encoder.pruner.weight"] == 1.0


def vit_settings(**params) -> dict[str, dict]:
    model = tiny_dinov3(freeze=None)
    groups = parameter_groups(model, base_lr=1.0, weight_decay=0.1, **params)
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: by_parameter[id(p)] for name, p in trained}


def test_rates_fall_with_the_vits_depth():
    settings = vit_settings(backbone_factor=0.5, vit_factor=0.2, layer_decay=0.8)
    rates = {name: group["lr"] for name, group in settings.items()}
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


def test_vectors_and_tokens_of_the_vit_have_no_decay():
    for name, group in vit_settings().items():
        if name.startswith("backbone.dinov3."):
            decayed = name.endswith((".qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
            assert group["weight_decay"] == (0.1 if decayed else 0), name


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

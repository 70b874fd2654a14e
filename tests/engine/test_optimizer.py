import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from dset_d2.engine.optimizer import (
    build_adamw,
    parameter_groups,
    warmup_constant,
    warmup_cosine,
)

from ..conftest import tiny_config


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


def test_warmup_then_cosine():
    schedule = warmup_cosine(max_iter=1000, warmup_iters=100, end=0.1)
    rates = [schedule(step / 1000) for step in (0, 49, 100, 550, 1000)]
    assert rates == pytest.approx([0.01, 0.495, 0.98, 0.5, 0.1], abs=0.07)
    with pytest.raises(ValueError, match="warmup_iters=10 must lie in 1..max_iter=10"):
        warmup_cosine(10, 10)

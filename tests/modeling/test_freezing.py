"""What a setting of names freezes: no gradient, no optimizer, no statistics, no noise; also in two
processes, in averages and after a resume. (test_phases.py has what is frozen for some time.)"""

import copy

import pytest
import torch
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from torch import nn

import dset_d2
from dset_d2.engine.ema import ModelEMA
from dset_d2.engine.optimizer import build_adamw, parameter_groups
from dset_d2.modeling import GroundingDINO
from dset_d2.modeling.freezing import rest_frozen, train_only
from dset_d2.modeling.sparse import MoEConfig, swap_ffn_for_moe

from ..conftest import GROUNDING, PROMPTS, make_inputs, tiny_grounding

PATTERNS = ["*.fusion_layer.*", "*_embed.*"]
DYNAMIC_CONFIG = "projects/dynamic_dino/configs/dynamic_dino_dair_v2x.py"


def small_model() -> nn.Sequential:
    """Two blocks with a norm of statistics each, and a head that has two names."""
    blocks = [
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Sequential())
        for _ in range(2)
    ]
    model = nn.Sequential(*blocks, nn.Linear(3, 3), nn.ReLU())
    model.add_module("shared", model[2])
    return model


def test_names_choose_what_is_trained():
    model = small_model()
    model[1][0].bias.requires_grad = False
    train_only(model, ["1.*", "shared.weight"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1.0.weight", "1.1.weight", "1.1.bias", "2.weight"}
    model = small_model()
    train_only(model, "2.*")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["2.weight", "2.bias"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["1.*", "2.wieght"], r"trainable: '2.wieght' finds no parameter; .* such as 0.0.weight, "),
        ([], r"trainable=\[\] must have patterns"),
    ],
)
def test_patterns_that_find_nothing_are_an_error(patterns, message):
    model = small_model()
    with pytest.raises(ValueError, match=message):
        train_only(model, patterns)
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_frozen_rests():
    model = small_model()
    train_only(model, ["1.0.*"])
    rest_frozen(model)
    modes = {name for name, module in model.named_modules() if module.training}
    # The block of which some is trained, its dropout, and what has no parameters.
    assert modes == {"", "1", "1.0", "1.2", "1.3", "3"}


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    pytest.importorskip("transformers", minversion="5.23")


def noisy_model(kind: str = "grounding-dino") -> GroundingDINO:
    """One whose frozen parts would be noise in training mode."""
    swin = GROUNDING["backbone_config"] | {"drop_path_rate": 0.5}
    text = GROUNDING["text_config"] | {"hidden_dropout_prob": 0.5}
    settings = GROUNDING | {"model_type": kind, "backbone_config": swin, "text_config": text}
    torch.manual_seed(0)
    return GroundingDINO(architecture=settings, prompts=PROMPTS, trainable=PATTERNS)


def of_trained_parts(name: str) -> bool:
    return ".fusion_layer." in name or "bbox_embed." in name or "class_embed." in name


@pytest.mark.parametrize("kind", ["grounding-dino", "mm-grounding-dino"])
def test_a_grounding_dino_trains_what_its_setting_names(kind):
    model = noisy_model(kind)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if of_trained_parts(name)}
    frozen = {"backbone": model.network.model.backbone, "text": model.network.model.text_backbone}
    for mode in (True, False, True):  # as it was built, evaluated, trained again
        resting = not any(m.training for part in frozen.values() for m in part.modules())
        assert resting and model.training == mode
        assert model.network.model.encoder.layers[0].fusion_layer.training == mode
        assert not model.network.model.encoder.layers[0].deformable_layer.training
        model.train(not mode)
    model.train()
    losses = [model(make_inputs([(64, 64)])) for _ in range(2)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)  # no noise
    sum(losses[0].values()).backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert found == names


@pytest.mark.parametrize("kind", ["grounding-dino", "mm-grounding-dino"])
def test_dynamic_dino_trains_its_experts_the_fusion_and_the_heads(kind):
    cfg = dset_d2.get_config(DYNAMIC_CONFIG)
    swap = instantiate(cfg.model.swap)
    model = tiny_grounding(kind, swap=swap, trainable=cfg.model.trainable)
    experts = ("decoder.layers.", (".router.weight", ".w1", ".b1", ".w2", ".b2"))
    wanted = {
        name
        for name, _ in model.named_parameters()
        if of_trained_parts(name) or (experts[0] in name and name.endswith(experts[1]))
    }
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert len([name for name in wanted if name.endswith(experts[1])]) == 2 * 5


def test_experts_in_the_place_of_a_frozen_ffn_are_frozen():
    model = tiny_grounding(trainable=PATTERNS)
    swap_ffn_for_moe(model, MoEConfig(4, 2), layers=["*decoder*"])
    experts = {n: p.requires_grad for n, p in model.named_parameters() if ".experts." in n}
    assert len(experts) == 8 and not any(experts.values())


def test_the_setting_is_a_key_of_the_older_configs():
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.MODEL.update(DEVICE="cpu", META_ARCHITECTURE="GroundingDINO")
    cfg.MODEL.GROUNDING_DINO.update(PROMPTS=["car"], TRAINABLE=["*_embed.*"])
    cfg.MODEL.GROUNDING_DINO.ARCHITECTURE.merge_from_other_cfg(CfgNode(GROUNDING))
    trained = [name for name, p in build_model(cfg).named_parameters() if p.requires_grad]
    assert trained and all("bbox_embed." in name for name in trained)


# Training.

STEPS = 4


class Batches:
    """Batches by step, so that a resumed run repeats them."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self):
        for step in range(self.first, 100):
            torch.manual_seed(step)
            yield make_inputs([(64, 64)], seed=step)


def make_trainer(model: nn.Module, first: int = 0) -> SimpleTrainer:
    groups = parameter_groups(getattr(model, "module", model), base_lr=1e-2, weight_decay=0.5)
    optimizer = build_adamw(groups, lr=1e-2, weight_decay=0.5)
    return SimpleTrainer(model, Batches(first), optimizer)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_averages_and_a_resumed_run_agree():
    model = noisy_model()
    ema, start = ModelEMA(model, decay=0.5, warmup=1), snapshot(model)
    trainer = make_trainer(model)
    trainer.train(0, 2)
    states = copy.deepcopy({"model": model.state_dict(), "trainer": trainer.state_dict()})
    ema.update(model)
    trainer.train(2, STEPS)
    ema.update(model)
    assert moved(start, snapshot(model)) == moved(start, snapshot(ema.module))
    assert moved(start, snapshot(model)) == trained_names(model)
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}

    resumed = noisy_model()
    resumed.load_state_dict(states["model"])
    trainer = make_trainer(resumed, first=2)
    trainer.load_state_dict(states["trainer"])
    trainer.train(2, STEPS)
    assert not moved(snapshot(model), snapshot(resumed))

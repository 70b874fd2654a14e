"""One set of weights that is trained for many settings."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model

from dset_d2 import add_detr_config
from dset_d2.config import apply_overrides
from dset_d2.modeling import HungarianMatcher, Knobs, SupernetConfig
from dset_d2.modeling.sparse import MoEConfig, ViTPruningConfig
from dset_d2.modeling.supernet import distillation

from ..conftest import make_inputs, make_targets, tiny_config, tiny_dinov3

IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
CHOICES = dict(keep_ratio=(0.5, 1.0), top_k=(1, 2), num_queries=(10, 30), vit_blocks=(4, 6, 5))
WEIGHTS = {"bbox": 5.0, "giou": 2.0}


def supernet(**settings) -> torch.nn.Module:
    """Without denoising, whose noise differs from forward to forward; BatchNorm in eval mode."""
    model = tiny_dinov3(
        pruning=[ViTPruningConfig(keep_ratio=1.0, block=2, min_tokens=2)],
        moe=MoEConfig(num_experts=4, layers=(1, 3)),
        freeze=None,
    )
    model.decoder.num_denoising = 0
    model.supernet = SupernetConfig(**CHOICES | {"sampling": "sandwich"} | settings)
    for module in model.train().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def test_steps_draw_alike_and_a_sandwich_has_both_ends():
    config = SupernetConfig(**CHOICES, sampling="sandwich")
    assert config.largest == Knobs(keep_ratio=1.0, top_k=2, num_queries=30, vit_blocks=6)
    assert config.smallest == Knobs(keep_ratio=0.5, top_k=1, num_queries=10, vit_blocks=4)
    drawn = []
    for step in range(50):
        first, second, third = config.draw(step)
        assert (first, second) == (config.largest, config.smallest)
        assert config.draw(step)[2] == third
        drawn.append(third)
    assert len(set(drawn)) > 15
    assert {knobs.vit_blocks for knobs in drawn} == {4, 5, 6}
    alone = SupernetConfig(**CHOICES, sampling="random")
    assert [alone.draw(step) for step in range(50)] == [[knobs] for knobs in drawn]


@pytest.mark.parametrize("sampling", ["sandwich", "random"])
def test_losses_are_the_mean_over_the_settings(sampling):
    model, targets = supernet(sampling=sampling, distillation_weight=0.0), make_targets(2, 3)
    found = model.compute_losses(IMAGES, targets)
    settings = model.supernet.draw(0)
    assert len(settings) == (3 if sampling == "sandwich" else 1)
    model.supernet, records = None, []
    runs = []
    for knobs in settings:
        with model.context(knobs, record=True) as context:
            runs.append(model.losses(IMAGES, targets, None))
        records.append(context.records)
    for name in runs[0]:
        expected = torch.stack([run[name] for run in runs]).mean()
        torch.testing.assert_close(found[name], expected)
    balance = records[0]["moe/backbone_3"].losses(targets)["balance"]
    torch.testing.assert_close(found["loss_balance_backbone_3"], balance)
    assert ("loss_distillation" in found) == (sampling == "sandwich")


def test_evaluation_is_of_the_configured_setting():
    model = supernet().eval()
    with torch.no_grad():
        found = model.predict(IMAGES)
        model.supernet = None
        torch.testing.assert_close(found, model.predict(IMAGES), rtol=0, atol=0)


def test_a_step_of_the_optimizer_is_one_step():
    model = supernet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):
        assert model.clock.step == step
        optimizer.zero_grad()
        sum(model(make_inputs([(64, 96)] * 2)).values()).backward()
        assert all(p.grad is not None for p in model.backbone.dinov3.blocks.parameters())
        optimizer.step()


def outputs(queries: int, seed: int, scale: float = 2.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, queries, 5, generator=generator)
    boxes = 0.2 + 0.3 * torch.rand(2, queries, 4, generator=generator)
    return {"pred_logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_()}


def test_who_sees_what_the_teacher_sees_has_nothing_to_learn():
    """In any order of the queries; the entropy of the teacher's probabilities stays."""
    teacher = outputs(20, 0)
    order = torch.randperm(20)
    student = {k: x.detach()[:, order].requires_grad_() for k, x in teacher.items()}
    distillation(student, teacher, HungarianMatcher(), WEIGHTS).backward()
    assert student["pred_logits"].grad.abs().max() < 1e-5
    assert student["pred_boxes"].grad.abs().max() < 10  # |x| has no derivative at 0
    assert teacher["pred_logits"].grad is None and teacher["pred_boxes"].grad is None


def test_students_come_to_see_what_the_teacher_sees():
    """Fewer queries take the most confident of the teacher's."""
    teacher, student = outputs(40, 0), outputs(8, 1)
    optimizer = torch.optim.Adam(student.values(), lr=0.03)
    for _ in range(400):
        optimizer.zero_grad()
        loss = distillation(student, teacher, HungarianMatcher(), WEIGHTS)
        loss.backward()
        optimizer.step()
    best = teacher["pred_logits"].sigmoid().amax(-1)
    for image in range(2):
        own = student["pred_logits"][image].sigmoid()
        gap = (own[:, None] - teacher["pred_logits"][image].sigmoid()).abs().amax(-1)
        matched = gap.argmin(1)
        assert gap.amin(1).max() < 0.05 and len(set(matched.tolist())) == 8
        distance = student["pred_boxes"][image] - teacher["pred_boxes"][image][matched]
        assert distance.abs().max() < 0.05
        assert best[image][matched].mean() > best[image].mean()


def test_a_config_turns_it_on():
    cfg = tiny_config()
    settings = ["decoder_layers=[1,2,3]", "sampling=sandwich"]
    apply_overrides(cfg, [f"model.supernet.{setting}" for setting in settings])
    model = instantiate(cfg.model)
    assert model.supernet.choices == {"decoder_layers": (3, 2, 1)}
    assert "loss_distillation" in model.train()(make_inputs([(64, 64)]))
    cfg.model.supernet = L(SupernetConfig)(top_k=[1])
    with pytest.raises(ValueError, match="top_k=1: the model has no part for this knob"):
        instantiate(cfg.model)


def test_keys_of_older_configs():
    cfg = get_cfg()
    add_detr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "DETRDetector", "cpu"
    cfg.MODEL.BACKBONE.NAME = "PResNet"
    assert build_model(cfg).supernet is None
    cfg.MODEL.SUPERNET.NUM_QUERIES = [100, 300]
    assert build_model(cfg).supernet.choices == {"num_queries": (300, 100)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a supernet needs values of some knob: keep_ratio, "),
        ({"top_k": [0]}, "top_k=0 must be a whole number"),
        ({"keep_ratio": [1.5]}, "keep_ratio=1.5 must lie in"),
        ({"top_k": [1], "sampling": "all"}, "sampling='all' is not one of"),
        ({"top_k": [1], "distillation_weight": -1.0}, "distillation_weight=-1.0 must not be"),
    ],
)
def test_wrong_values(settings, message):
    with pytest.raises(ValueError, match=message):
        SupernetConfig(**settings)

"""Optimised models: equal outputs from fewer parts, for every family."""

import copy

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from dset_d2.inference import optimize_for_inference
from dset_d2.modeling import Knobs, LoRAConfig, WindowConfig
from dset_d2.modeling.encoder.fusion_blocks import RepVggBlock
from dset_d2.modeling.lora import LoRALinear
from dset_d2.modeling.sparse import MoEConfig, SwapConfig, ViTPruningConfig, swap_ffn_for_moe
from dset_d2.modeling.sparse.swap import SwappedFFN

from ..conftest import (
    make_inputs,
    randomise,
    sparse_model,
    tiny_config,
    tiny_dinov3,
    tiny_grounding,
    tiny_model,
)

PLACES = [ViTPruningConfig(keep_ratio=0.5, min_tokens=2, block=2)]
IMAGES = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))


def frozen_norms() -> nn.Module:
    torch.manual_seed(0)
    cfg = tiny_config("configs/rtdetr/rtdetrv2_r50_coco.py")
    assert cfg.model.backbone.freeze_norm
    return randomise(instantiate(cfg.model))


def swapped(**settings) -> nn.Module:
    """Experts in the place of all FFNs."""
    torch.manual_seed(0)
    cfg = tiny_config()
    moe = L(MoEConfig)(num_experts=4, top_k=2)
    cfg.model.swap = L(SwapConfig)(moe=moe, **settings)
    return randomise(instantiate(cfg.model))


FAMILIES = {
    "RT-DETR": tiny_model,
    "discrete sampling": lambda: tiny_model("configs/rtdetr/rtdetrv2_r18_dsp_coco.py"),
    "layer 1 of 3": lambda: tiny_model(num_layers=3, eval_idx=1, query_select_method="agnostic"),
    "frozen norms": frozen_norms,
    "HGNetv2": lambda: tiny_model("configs/rtdetr/rtdetrv2_hgnetv2_l_coco.py"),
    "D-FINE": lambda: tiny_model("configs/dfine/dfine_s_coco.py"),
    "wide layers above": lambda: tiny_model(
        "configs/dfine/dfine_n_coco.py", num_layers=3, eval_idx=1, layer_scale=2.0
    ),
    "DSET": sparse_model,
    "pruning after": lambda: sparse_model(placement="after", restore="zero"),
    "ViT": tiny_dinov3,
    "ViT with updates": lambda: tiny_dinov3(lora=LoRAConfig()),
    "windows": lambda: tiny_dinov3(windows=WindowConfig(global_blocks=(2, 5))),
    "pruned ViT": lambda: tiny_dinov3(pruning=PLACES, moe=MoEConfig(num_experts=4, layers=(4,))),
    "experts instead": swapped,
}


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request) -> tuple[nn.Module, nn.Module]:
    """A model in training mode, and what is deployed of it."""
    model = FAMILIES[request.param]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_b.normal_(std=0.1)
    return model, optimize_for_inference(model.train())


@torch.no_grad()
def outputs(model: nn.Module, images=IMAGES, **options) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model).eval().predict(images, **options)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within 1e-4, in any order of the queries: of near-ties in their selection either may win,
    also of the two at its end."""
    for name, value in expected.items():
        distance = torch.cdist(value, found[name], p=torch.inf).amin(2)
        assert found[name].shape == value.shape
        assert (distance < 1e-4).float().mean() > 0.95, (name, distance.max())


def test_outputs_are_equal(pair):
    model, optimised = pair
    assert_equal(outputs(optimised), outputs(model))


def test_padded_batches_and_knobs_work(pair):
    model, optimised = pair
    inputs = make_inputs([(96, 128), (70, 120)])
    kept = {"num_queries": 10, "keep_ratio": 0.7, "memory_ratio": 0.7, "top_k": 1}
    knobs = Knobs(**{name: value for name, value in kept.items() if name in model.knob_limits})
    images, padding = model.preprocess(inputs)
    found = outputs(optimised, images, padding=padding, knobs=knobs)
    expected = outputs(model, images, padding=padding, knobs=knobs)
    assert_equal(found, expected)


def test_training_only_parts_are_gone(pair):
    model, optimised = pair
    gone = (nn.BatchNorm2d, FrozenBatchNorm2d, LoRALinear, RepVggBlock)
    assert any(isinstance(module, gone) for module in model.modules())
    assert not any(isinstance(module, gone) for module in optimised.modules())
    assert not any(module.training for module in optimised.modules())
    assert not any(parameter.requires_grad for parameter in optimised.parameters())
    assert len(optimised.decoder.decoder.layers) == model.decoder.eval_idx + 1
    assert "decoder_layers" not in optimised.knob_limits
    with pytest.raises(ValueError, match="decoder_layers=1: the model has no part for this knob"):
        optimised.predict(IMAGES, knobs=Knobs(decoder_layers=1))


def test_every_part_that_is_left_matters(pair):
    """Of the decoder, whose heads are easily forgotten: what stays changes some output."""
    _, optimised = pair
    changed = copy.deepcopy(optimised)
    with torch.no_grad():
        for name, parameter in changed.decoder.named_parameters():
            if name.startswith(("dec_score_head", "decoder.lqe_layers")):
                parameter.add_(0.1)
    found, expected = outputs(changed), outputs(optimised)
    assert (found["pred_logits"] != expected["pred_logits"]).all()
    assert all("denoising" not in name for name, _ in optimised.named_parameters())


def test_the_model_is_left_as_it_was(pair):
    model, optimised = pair
    before = {name: value.clone() for name, value in model.state_dict().items()}
    again = optimize_for_inference(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(again.state_dict(), optimised.state_dict(), rtol=0, atol=0)
    assert model.training and model.criterion is not None
    addresses = {p.data_ptr() for p in model.parameters()}
    assert addresses.isdisjoint(p.data_ptr() for p in optimised.parameters())


@pytest.mark.parametrize("family", ["D-FINE", "DSET", "pruned ViT"])
def test_predict_compiles_without_a_break(family):
    optimised = optimize_for_inference(FAMILIES[family]())
    torch._dynamo.reset()
    compiled = torch.compile(optimised.predict, fullgraph=True, backend="eager")
    with torch.inference_mode():
        found = compiled(IMAGES)
    assert_equal(found, outputs(optimised))


def test_optimised_twice(pair):
    _, optimised = pair
    again = optimize_for_inference(optimised)
    assert_equal(outputs(again), outputs(optimised))


def test_layers_that_wait_for_their_turn_become_dense():
    model = swapped(start_step=10, every=10, keep_dense=("*decoder.layers.2",))
    count = sum(isinstance(module, SwappedFFN) for module in model.modules())
    for step, dense in ((0, 1), (15, count - 1), (1000, 1)):
        model.clock.set(step)
        optimised = optimize_for_inference(model)
        left = sum(isinstance(module, SwappedFFN) for module in optimised.modules())
        assert left == count - dense, step
        assert_equal(outputs(optimised), outputs(model))


def test_dense_ffns_that_experts_replaced_are_not_kept():
    model = tiny_model()
    swap_ffn_for_moe(model, MoEConfig(num_experts=4, top_k=2))
    optimised = optimize_for_inference(model)
    experts = [module for module in optimised.modules() if isinstance(module, SwappedFFN)]
    assert experts and all(module.dense is None for module in experts)
    assert_equal(outputs(optimised), outputs(model))


def test_schedules_stay_where_they_are():
    model = sparse_model(end_step=100, keep_ratio=0.1)
    model.clock.set(50)
    optimised = optimize_for_inference(model)
    assert_equal(outputs(optimised), outputs(model))
    optimised.clock.set(100)
    assert (outputs(optimised)["pred_boxes"] - outputs(model)["pred_boxes"]).abs().max() > 1e-3


def test_training_an_optimised_model_says_what_to_do():
    optimised = optimize_for_inference(tiny_model())
    with pytest.raises(RuntimeError, match="optimised for inference; train the one that it was"):
        optimised.train()(make_inputs([(64, 64)]))


def test_grounding_dino_is_taken():
    model = tiny_grounding()
    images = torch.rand(1, 3, 64, 96)
    optimised = optimize_for_inference(model)
    assert_equal(outputs(optimised, images), outputs(model, images))
    assert not any(parameter.requires_grad for parameter in optimised.parameters())

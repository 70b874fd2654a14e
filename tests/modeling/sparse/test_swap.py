"""Experts in the place of models' FFNs and back: at hand, by a config, and step by step."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine.defaults import create_ddp_model
from detectron2.modeling import build_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
)
from transformers.activations import ACT2FN

import dset_d2
from dset_d2.analysis import count_flops
from dset_d2.checkpoint import load_initial
from dset_d2.checkpoint.experts import upcycle_ffns
from dset_d2.config import apply_overrides
from dset_d2.engine.ema import ModelEMA
from dset_d2.engine.optimizer import build_adamw, parameter_groups
from dset_d2.modeling import Knobs, find_ffns, forward_context
from dset_d2.modeling.encoder.hybrid_encoder import TransformerEncoderLayer
from dset_d2.modeling.sparse import (
    MoE,
    MoEConfig,
    SwapConfig,
    restore_ffn,
    swap_ffn_for_moe,
    swap_ffns,
)

from ...conftest import (
    in_two_processes,
    make_inputs,
    randomise,
    tiny_config,
    tiny_dinov3,
    tiny_model,
)

EXACT = ("paper", "slots", "copies")
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
# "a . b c ." and "a b ." in BERT's tokens, the second padded.
PROMPTS = {
    "input_ids": torch.tensor([[101, 1050, 1012, 1060, 1061, 1012, 102]] * 2),
    "attention_mask": torch.ones(2, 7, dtype=torch.long),
    "token_type_ids": torch.zeros(2, 7, dtype=torch.long),
}
PROMPTS["input_ids"][1] = torch.tensor([101, 1050, 1061, 1012, 102, 0, 0])
PROMPTS["attention_mask"][1, 5:] = 0


def grounding_dino() -> nn.Module:
    """A bare model of transformers, all of whose parameters matter."""
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 4, 8], window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64,
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=20,
        max_text_len=64, disable_custom_kernels=True,
    )  # fmt: skip
    model = GroundingDinoForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def dfine() -> nn.Module:
    return tiny_model("configs/dfine/dfine_n_coco.py")


def vit() -> nn.Module:
    return tiny_dinov3().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "grounding dino": grounding_dino,
    "rtdetr": tiny_model,
    "dfine": dfine,
    "dinov3": vit,
}
BLOCKS = {
    "grounding dino": [
        "model.encoder.layers.0.text_enhancer_layer",
        "model.encoder.layers.0.deformable_layer",
        "model.decoder.layers.0",
        "model.decoder.layers.1",
    ],
    "rtdetr": ["encoder.encoder.0.layers.0", *(f"decoder.decoder.layers.{i}" for i in range(3))],
    "dfine": ["encoder.encoder.0.layers.0", *(f"decoder.decoder.layers.{i}" for i in range(3))],
    "dinov3": [
        *(f"backbone.dinov3.blocks.{i}" for i in range(6)),
        "encoder.encoder.0.layers.0",
        *(f"decoder.decoder.layers.{i}" for i in range(3)),
    ],
}


# None but for a backbone whose FFNs not every version of transformers lets one find.
LAYERS = {"grounding dino": ["model.encoder*", "model.decoder*"]}


def run(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits and boxes."""
    if isinstance(model, GroundingDinoForObjectDetection):
        outputs = model(pixel_values=IMAGES, **PROMPTS)
        return outputs.logits, outputs.pred_boxes
    outputs = model.predict(IMAGES)
    return outputs["pred_logits"], outputs["pred_boxes"]


def observe(model: nn.Module) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return run(model)


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol=1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert_close(found, expected, atol=0)


def train_experts(model: nn.Module) -> None:
    """One step of the experts and routers, on all outputs."""
    optimizer = torch.optim.AdamW(experts(model).parameters(), lr=1e-2)
    logits, boxes = run(model)
    (logits.sigmoid().square().sum() + boxes.square().sum()).backward()
    optimizer.step()
    model.zero_grad()


def experts(model: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(module for module in model.modules() if isinstance(module, MoE))


# In place, and back.


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_stay_and_return(kind, method):
    model = MODELS[kind]()
    before, state = observe(model), copy.deepcopy(model.state_dict())
    names = swap_ffn_for_moe(model, MoEConfig(8, 2), method, LAYERS.get(kind))
    assert names == BLOCKS[kind] and len(experts(model)) == len(names)
    assert_close(observe(model), before)
    train_experts(model)
    logits, boxes = observe(model)
    assert (logits.sigmoid() - before[0].sigmoid()).abs().max() > 1e-3
    assert (boxes - before[1]).abs().max() > 1e-3
    assert restore_ffn(model) == names
    assert_equal(observe(model), before)
    assert list(model.state_dict()) == list(state)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_groups_of_units_that_are_active_together(kind):
    """Equal with all groups; with fewer the nearer, the more there are."""
    model = MODELS[kind]()
    layers = ["*encoder.*layers.0*", "*decoder*"]
    before = observe(model)
    swap_ffn_for_moe(model, MoEConfig(8, 2), "coactivation", layers, lambda: run(model))
    errors = []
    for top_k in (1, 4, 7, 8):
        with forward_context(knobs=Knobs(top_k=top_k)):
            boxes = observe(model)[1]
        errors.append(float((boxes - before[1]).abs().mean()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-3
    assert errors[-1] < 1e-5
    restore_ffn(model)
    assert_equal(observe(model), before)


@pytest.mark.parametrize("method", EXACT)
def test_settings_follow_from_the_method(method):
    model = tiny_model()
    swap_ffn_for_moe(model, MoEConfig(8, 2), method)
    widths = {"paper": 32, "slots": 32, "copies": 64}
    for moe in experts(model):
        assert moe.config.slots == (2 if method == "slots" else 1)
        assert moe.experts.w1.shape == (8, widths[method], 32)
    other = tiny_model()
    swap_ffn_for_moe(other, MoEConfig(8, 4, slots=2), "slots")
    assert experts(other)[0].config.slots == 2


def test_slots_stay_exact_under_any_router_and_knob():
    model = grounding_dino()
    before = observe(model)
    swap_ffn_for_moe(model, MoEConfig(8, 2), "slots")
    for moe in experts(model):
        nn.init.normal_(moe.router.weight)
    assert_close(observe(model), before)
    with forward_context(knobs=Knobs(top_k=4)):
        assert_close(observe(model), before)


@pytest.mark.parametrize("method", ["copies", "coactivation"])
def test_copies_of_a_model_are_whole(method):
    """With an FFN each of their own to return to."""
    model = grounding_dino()
    before = observe(model)
    calibration = (lambda: run(model)) if method == "coactivation" else None
    swap_ffn_for_moe(model, MoEConfig(4, 2), method, ["*decoder*"], calibration)
    swapped = observe(model)
    again = copy.deepcopy(model)
    train_experts(again)
    assert_equal(observe(model), swapped)
    restore_ffn(again)
    assert_equal(observe(again), before)
    with torch.no_grad():
        again.model.decoder.layers[0].fc1.weight.zero_()
    restore_ffn(model)
    assert_equal(observe(model), before)


@pytest.mark.parametrize("method", [*EXACT, "coactivation"])
@pytest.mark.parametrize("kind", MODELS)
def test_checkpoints_hold_the_experts_alone(tmp_path, kind, method):
    def swapped() -> nn.Module:
        model = MODELS[kind]()
        calibration = (lambda: run(model)) if method == "coactivation" else None
        swap_ffn_for_moe(model, MoEConfig(4, 2), method, ["*decoder*"], calibration)
        return model

    model = swapped()
    dense = sum(p.numel() for seam in find_ffns(MODELS[kind]()).values() for p in ffn_of(seam))
    left = sum(p.numel() for seam in find_ffns(model).values() for p in ffn_of(seam))
    removed, added = dense - left, sum(p.numel() for p in experts(model).parameters())
    whole = sum(v.numel() for v in MODELS[kind]().state_dict().values())
    assert sum(v.numel() for v in model.state_dict().values()) == whole - removed + added
    train_experts(model)
    torch.save(model.state_dict(), tmp_path / "swapped.pth")
    other = swapped()
    other.load_state_dict(torch.load(tmp_path / "swapped.pth", weights_only=True))
    assert_equal(observe(other), observe(model))


def ffn_of(seam) -> list[nn.Parameter]:
    return [*seam.linear1.parameters(), *seam.linear2.parameters()]


def test_dense_ffns_follow_to_other_types():
    model = tiny_model()
    expected = copy.deepcopy(model).double().decoder.decoder.layers[0].ffn
    swap_ffn_for_moe(model, MoEConfig(8, 2))
    model.double()
    restore_ffn(model)
    found = model.decoder.decoder.layers[0].ffn
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_tokens_in_any_order_of_dimensions():
    """(B, L, C) and (L, B, C)."""
    block = TransformerEncoderLayer(32, 4, 64, 0.0, "gelu").eval()
    ffn, x = block.ffn, torch.randn(2, 7, 32)
    for method in EXACT:
        swap_ffn_for_moe(block, MoEConfig(8, 2), method)
        for tokens in (x, x.transpose(0, 1)):
            assert block.ffn(tokens).shape == tokens.shape
            assert_close((block.ffn(tokens),), (ffn(tokens),))
        restore_ffn(block)
        assert block.ffn is ffn


def test_norm_and_dropout_stay():
    block = TransformerEncoderLayer(32, 4, 64, 0.3, "gelu")
    around = (block.norm2, block.dropout2)
    swap_ffn_for_moe(block, MoEConfig(8, 2))
    assert (block.norm2, block.dropout2) == around and block.ffn.experts.dropout.p == 0.3
    model = grounding_dino()
    layer = model.model.decoder.layers[0]
    layer.activation_dropout = 0.2
    swap_ffn_for_moe(model, MoEConfig(8, 2), layers=["*decoder*"])
    assert layer.fc1.experts.dropout.p == 0.2
    assert (layer.activation_dropout, layer.dropout) == (0.0, 0.1)
    restore_ffn(model)
    assert (layer.activation_dropout, layer.dropout) == (0.2, 0.1)


def test_dense_ffns_return_in_the_mode_of_the_model():
    model = tiny_model().train()
    model.decoder.decoder.layers[0].ffn.dropout.p = 0.5
    expected = observe(copy.deepcopy(model).eval())
    swap_ffn_for_moe(model, MoEConfig(8, 2))
    assert all(moe.training for moe in experts(model))
    model.eval()
    assert_close(observe(model), expected)
    restore_ffn(model)
    assert_equal(observe(model), expected)


def test_frozen_ffns_have_frozen_experts():
    model = tiny_model()
    model.encoder.requires_grad_(False)
    swap_ffn_for_moe(model, MoEConfig(8, 2))
    first, *others = experts(model)
    assert not any(p.requires_grad for p in first.parameters())
    assert all(p.requires_grad for moe in others for p in moe.parameters())


def test_routers_have_gradients_from_the_start():
    for method in ("paper", "slots"):
        model = grounding_dino()
        swap_ffn_for_moe(model, MoEConfig(8, 2), method, ["*decoder*", "*deformable*"])
        run(model)[1].square().sum().backward()
        assert all(moe.router.weight.grad.abs().max() > 0 for moe in experts(model))


# Names and patterns.


@pytest.mark.parametrize("kind", MODELS)
def test_records_have_names_of_their_own(kind):
    model = MODELS[kind]()
    swap_ffn_for_moe(model, MoEConfig(8, 2), layers=LAYERS.get(kind))
    with forward_context(record=True) as context:
        observe(model)
    parts = {"grounding dino": ["text_enhancer_layer_0"]}
    parts["dinov3"] = [f"backbone_{i}" for i in range(6)]
    encoder = "encoder_0" if kind == "grounding dino" else "encoder_0_0"
    layers = 2 if kind == "grounding dino" else 3
    expected = [*parts.get(kind, []), encoder, *(f"decoder_{i}" for i in range(layers))]
    assert list(context.records) == [f"moe/{place}" for place in expected]


def test_detectors_learn_their_knobs():
    model = tiny_model()
    assert "top_k" not in model.knob_limits
    swap_ffn_for_moe(model, MoEConfig(8, 2))
    assert model.knob_limits["top_k"] == 8
    model.predict(IMAGES, knobs=Knobs(top_k=4))
    restore_ffn(model)
    assert "top_k" not in model.knob_limits


def test_patterns_choose_layers():
    model = grounding_dino()
    names = swap_ffn_for_moe(
        model, MoEConfig(8, 2), layers=["*decoder.layers.1", "*deformable_layer", "*decoder*"]
    )
    decoder, encoder = "model.decoder.layers", "model.encoder.layers.0.deformable_layer"
    assert names == [f"{decoder}.1", encoder, f"{decoder}.0"]
    assert swap_ffn_for_moe(model, MoEConfig(4, 2), "copies", ["*text*"]) == [
        "model.encoder.layers.0.text_enhancer_layer"
    ]
    with pytest.raises(ValueError, match=r"layers: '\*decoder\*' finds no dense FFN; there is: "):
        swap_ffn_for_moe(model, MoEConfig(8, 2), layers=["*decoder*"])
    assert len(restore_ffn(model)) == 4
    with pytest.raises(ValueError, match="the model has no experts that swap_ffn_for_moe has put"):
        restore_ffn(model)


@pytest.mark.parametrize(
    ("method", "config", "wanted"),
    [
        ("paper", dict(num_experts=9, top_k=3), "decoder.layers.1: 64 hidden units cannot be div"),
        ("paper", dict(num_experts=8, top_k=3), "num_experts=8 to be a multiple of top_k=3"),
        ("paper", dict(num_experts=8, top_k=2, combine="sum"), "'paper' needs combine='mean'"),
        ("slots", dict(num_experts=9, top_k=3), "64 hidden units cannot be divided by slots=3"),
        ("copies", dict(num_experts=2, expert_dim=32), "expert_dim=32 must be 64 or None"),
        ("coactivation", dict(num_experts=6), "64 hidden units cannot be divided by num_experts=6"),
        ("paper", dict(num_experts=8, layers=(0,)), r"layers=\(0,\) of the experts: patterns"),
        ("clone", dict(num_experts=8), "method='clone' is not one of"),
    ],
)
def test_settings_that_do_not_fit_leave_the_model_as_it_was(method, config, wanted):
    model = tiny_model()
    layers = ["decoder*layers.1", "decoder*"]
    calibration = (lambda: run(model)) if method == "coactivation" else None
    with pytest.raises(ValueError, match=wanted):
        swap_ffn_for_moe(model, MoEConfig(**config), method, layers, calibration)
    assert len(find_ffns(model)) == 4


def test_calibration_goes_with_coactivation_alone():
    model = tiny_model()
    for method, calibration in (("coactivation", None), ("paper", lambda: run(model))):
        with pytest.raises(ValueError, match="calibration goes with method='coactivation' alone"):
            swap_ffn_for_moe(model, MoEConfig(8, 2), method, None, calibration)
    # Nothing is replaced where an FFN has seen no token.
    with pytest.raises(ValueError, match="calibration runs no token through encoder"):
        swap_ffn_for_moe(model, MoEConfig(8, 2), "coactivation", None, lambda: None)
    assert len(find_ffns(model)) == 4


def test_names_that_would_coincide_leave_the_model_as_it_was():
    def stack() -> nn.Module:
        return nn.ModuleList([TransformerEncoderLayer(32, 4, 64, 0.0, "gelu")])

    model = nn.ModuleDict({"heads": nn.ModuleDict({"a": stack(), "b": stack()})})
    with pytest.raises(ValueError, match="heads.b.0.ffn and heads.a.0.ffn would both leave"):
        swap_ffn_for_moe(model, MoEConfig(8, 2))
    assert len(find_ffns(model)) == 2


def test_activations_of_other_libraries():
    """Those with the same values, by whatever class; an approximation is none."""
    block = TransformerEncoderLayer(32, 4, 64, 0.0, "gelu").eval()
    x, ffn = torch.randn(5, 32), block.ffn
    block.ffn.activation = ACT2FN["gelu"]
    assert not isinstance(block.ffn.activation, nn.GELU)
    swap_ffn_for_moe(block, MoEConfig(8, 2))
    assert_close((block.ffn(x),), (ffn(x),))
    restore_ffn(block)
    block.ffn.activation = nn.GELU(approximate="tanh")
    with pytest.raises(ValueError, match="the activation GELU.*tanh.* is not one of"):
        swap_ffn_for_moe(block, MoEConfig(8, 2))


# Built with experts, one layer after the other.

TURNS = {  # of those of build()
    "decoder.decoder.layers.2.ffn": 1,
    "decoder.decoder.layers.1.ffn": 3,
    "decoder.decoder.layers.0.ffn": 5,
    "encoder.encoder.0.layers.0.ffn": 7,
}


def build(method: str = "paper", **settings) -> nn.Module:
    """A detector whose decoder layers begin to route first, the last of them at step 1."""
    torch.manual_seed(0)
    cfg = tiny_config()
    layers = [f"decoder*layers.{i}" for i in (2, 1, 0)] + ["encoder*"]
    settings = dict(start_step=1, every=2, layers=layers) | settings
    cfg.model.swap = L(SwapConfig)(moe=L(MoEConfig)(num_experts=4), method=method, **settings)
    return randomise(instantiate(cfg.model))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> tuple[nn.Module, Path]:
    """A dense detector, and a checkpoint of it."""
    model, path = tiny_model(), tmp_path_factory.mktemp("dense") / "dense.pth"
    torch.save(model.state_dict(), path)
    return model, path


def named_experts(model: nn.Module) -> dict[str, MoE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def optimizer_of(model: nn.Module, clip_norm: float = 0.1) -> torch.optim.AdamW:
    # A strong decay would show in a parameter that is only multiplied by zero gradients.
    params = parameter_groups(model, base_lr=1e-3, weight_decay=0.5)
    return build_adamw(params, lr=1e-3, weight_decay=0.5, clip_norm=clip_norm)


def train(model, optimizer, first, last, after=lambda: None, rank: int = 0) -> None:
    """Steps whose batches and random numbers follow from their number alone."""
    model.train()
    for step in range(first, last):
        torch.manual_seed(step)
        losses = model(make_inputs([(64, 96)], seed=2 * step + rank))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        after()


def apart(moe: MoE) -> float:
    """The largest difference between the copies of a unit, of the first layer's weights."""
    by_shard = moe.construction == "slots"
    copies = moe.config.num_experts // moe.shards
    shape = (moe.shards, copies) if by_shard else (copies, moe.shards)
    weights = moe.experts.w1.detach().unflatten(0, shape)
    return float((weights - weights.mean(int(by_shard), keepdim=True)).abs().max())


def test_turns():
    for settings, turns in (
        ({}, TURNS),
        ({"every": 0, "start_step": 4}, dict.fromkeys(TURNS, 4)),
        # The others keep their turns, so that a run can be resumed.
        ({"keep_dense": ["*layers.1"]}, TURNS | {"decoder.decoder.layers.1.ffn": None}),
    ):
        model = build(**settings)
        assert {name: moe.begin for name, moe in named_experts(model).items()} == turns


@pytest.mark.parametrize("method", EXACT)
def test_built_experts_start_from_a_dense_checkpoint(dense, caplog, method):
    """By their method without being told again; what waits is the dense FFN itself."""
    model = build(method).eval()
    load_initial(model, dense[1])
    assert "hidden units" not in caplog.text
    assert ("router.weight" in caplog.text) == (method != "paper")
    x = torch.randn(5, 32)
    for step in (0, 3, 6, 8):
        model.clock.set(step)
        assert_close(observe(model), observe(dense[0]))
        for name, moe in named_experts(model).items():
            with forward_context(step=step, record=True) as context:
                waits = torch.equal(moe(x), dense[0].get_submodule(name)(x))
            assert (not context.records) == (step < TURNS[name])
            assert waits or context.records


def test_transformers_layers_start_from_a_dense_checkpoint(tmp_path):
    """Keys of FFNs that stand in their block itself; others of the block stay."""
    dense = grounding_dino()
    model = grounding_dino()
    nn.init.normal_(model.model.decoder.layers[0].fc1.weight)
    swap_ffns(model, SwapConfig(MoEConfig(8, 2), layers=["*decoder*", "*deformable*"]))
    state = upcycle_ffns(model, dense.state_dict(), "dense.pth", "auto")
    assert not {"model.decoder.layers.0.fc1.weight", "model.decoder.layers.1.fc2.bias"} & {*state}
    model.load_state_dict(state)
    assert_close(observe(model), observe(dense))


def test_units_that_are_active_together_are_in_no_dense_checkpoint(dense, caplog):
    """But in that of a model that was swapped with images at hand."""
    model = build("coactivation").eval()
    load_initial(model, dense[1])
    assert "decoder.layers.2.ffn stay fresh: what is active together, images tell" in caplog.text
    swapped = copy.deepcopy(dense[0])
    layers = [name.removesuffix(".ffn") for name in TURNS]
    calibration = functools.partial(run, swapped)
    swap_ffn_for_moe(swapped, MoEConfig(4), "coactivation", layers, calibration)
    torch.save(swapped.state_dict(), dense[1].with_name("swapped.pth"))
    load_initial(model, dense[1].with_name("swapped.pth"))
    assert_equal(observe(model), observe(swapped))
    expected = observe(dense[0])
    with forward_context(knobs=Knobs(top_k=4)):
        assert_close(observe(model), expected)


@pytest.mark.parametrize("method", EXACT)
def test_layers_begin_one_by_one(dense, method):
    """Before its turn a layer's copies stay equal while they learn, its router stays as it is."""
    model = build(method)
    load_initial(model, dense[1])
    found = named_experts(model)
    routers = {name: moe.router.weight.detach().clone() for name, moe in found.items()}
    starts = {name: moe.experts.w1.detach().clone() for name, moe in found.items()}
    steps = []

    def watch() -> None:
        done = model.clock.step - 1  # the step that was just made
        steps.append(done)
        for name, moe in found.items():
            begun = done >= TURNS[name]
            assert torch.equal(moe.router.weight, routers[name]) != begun
            assert (apart(moe) > 1e-5) == begun
            assert not torch.equal(moe.experts.w1, starts[name])

    train(model, optimizer_of(model), 0, 6, watch)
    assert steps == list(range(6))
    losses = model.train()(make_inputs([(64, 96)]))
    assert [key for key in losses if "balance" in key] == [
        f"loss_balance_decoder_{i}" for i in range(3)
    ]


@pytest.mark.parametrize("method", EXACT)
def test_no_output_changes_at_a_turn(dense, method):
    model = build(method, start_step=2)
    load_initial(model, dense[1])
    train(model, optimizer_of(model), 0, 2)
    outputs = []
    for step in (1, 2, 3):  # the first of them begins at 2
        model.clock.set(step)
        outputs.append(observe(model.eval()))
    assert_close(outputs[1], outputs[0])
    assert not torch.equal(outputs[1][0], outputs[0][0])
    assert_equal(outputs[2], outputs[1])


def test_a_waiting_layer_is_trained_as_a_dense_one(dense):
    """Copies alike, to what Adam makes of gradients by their sign and little of their size."""
    sparse, plain = build("copies", start_step=9), copy.deepcopy(dense[0])
    load_initial(sparse, dense[1])
    for model in (sparse, plain):
        train(model, optimizer_of(model, clip_norm=1e9), 0, 3)
    for name, moe in named_experts(sparse).items():
        start, ffn = (m.get_submodule(name) for m in (dense[0], plain))
        merged = moe.merged()
        for found, layer in ((merged.w1, "linear1"), (merged.w2, "linear2")):
            learned = getattr(ffn, layer).weight - getattr(start, layer).weight
            wrong = found - getattr(ffn, layer).weight
            assert wrong.norm() < 0.05 * learned.norm() and learned.abs().max() > 1e-3


def test_resumed_run_equals_an_uninterrupted_one(dense):
    model = build()
    load_initial(model, dense[1])
    optimizer, saved = optimizer_of(model), {}

    def save() -> None:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved[model.clock.step] = copy.deepcopy(states)

    train(model, optimizer, 0, 5, save)
    for stop in (1, 3, 4):
        again = build()
        fresh = optimizer_of(again)
        again.load_state_dict(saved[stop]["model"])
        fresh.load_state_dict(saved[stop]["optimizer"])
        train(again, fresh, stop, 5)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_averaged_weights_follow(dense):
    """An average of equal copies is the average of the dense FFN."""
    model = build(start_step=2)
    load_initial(model, dense[1])
    ema = ModelEMA(model, decay=0.5, warmup=1)
    train(model, optimizer_of(model), 0, 4, lambda: ema.update(model))
    for name, moe in named_experts(ema.module).items():
        assert (apart(moe) > 1e-5) == (TURNS[name] == 1)
    assert ema.module.clock.step == 4
    with forward_context(record=True) as context:
        observe(ema.module)
    assert len(context.records) == 2


def test_layers_stay_dense_by_the_command_line(dense):
    """From a resumed run's own checkpoint; outside of training, too."""
    model = build()
    load_initial(model, dense[1])
    train(model, optimizer_of(model), 0, 4)
    kept = build(keep_dense=["*layers.2", "encoder*"])
    kept.load_state_dict(model.state_dict())
    assert len(optimizer_of(kept).state_dict()["param_groups"]) == len(
        optimizer_of(model).state_dict()["param_groups"]
    )
    for step in (4, 0):  # 0: as a model that was never trained
        kept.clock.set(step)
        with forward_context(record=True) as context:
            observe(kept.eval())
        expected = {4: ["moe/decoder_1"], 0: ["moe/decoder_0", "moe/decoder_1"]}[step]
        assert list(context.records) == expected
    train(kept, optimizer_of(kept), 4, 6)
    ffn = named_experts(kept)["decoder.decoder.layers.2.ffn"]
    assert apart(ffn) == pytest.approx(
        apart(named_experts(model)["decoder.decoder.layers.2.ffn"]), rel=0.1
    )


def test_overrides(tmp_path):
    cfg = tiny_config()
    overrides = [
        "model.swap.moe.num_experts=4",
        "model.swap.method=slots",
        "model.swap.every=10",
        "model.swap.keep_dense=['*layers.1']",
    ]
    cfg = apply_overrides(cfg, overrides)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    for config in (cfg, LazyConfig.load(str(tmp_path / "config.yaml"))):
        model = instantiate(config.model)
        turns = [moe.begin for moe in named_experts(model).values()]
        assert turns == [0, 10, None, 30]
        assert model.decoder.decoder.layers[0].ffn.config.slots == 2
    assert instantiate(apply_overrides(cfg, ["model.swap=null"]).model).knob_limits.keys() == (
        tiny_model().knob_limits.keys()
    )


def test_keys_of_older_configs():
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "DETRDetector"
    cfg.MODEL.BACKBONE.NAME = "PResNet"
    assert not named_experts(build_model(cfg))
    cfg.MODEL.SWAP.update(METHOD="copies", LAYERS=["decoder*"], START_STEP=5, EVERY=3)
    cfg.MODEL.SWAP.MOE.NUM_EXPERTS = 3
    found = named_experts(build_model(cfg))
    assert [moe.begin for moe in found.values()] == [5, 8, 11, 14, 17, 20]
    assert {moe.config.num_experts for moe in found.values()} == {3}
    cfg.MODEL.SWAP.METHOD = "clone"
    with pytest.raises(ValueError, match="MODEL.SWAP.METHOD='clone' is not one of"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (dict(method="clone"), "method='clone' is not one of"),
        (dict(start_step=-1), "start_step=-1 must not be negative"),
        (dict(every=-1), "every=-1 must not be negative"),
        (dict(layers=["decoder*", "neck*"]), r"layers: 'neck\*' finds no dense FFN; there is: enc"),
        (
            dict(keep_dense=["backbone*"]),
            r"keep_dense: 'backbone\*' finds no dense FFN; there is: d",
        ),
    ],
)
def test_wrong_settings_are_named(settings, wanted):
    with pytest.raises(ValueError, match=wanted):
        swap_ffns(tiny_model(), SwapConfig(MoEConfig(4), **dict(layers=["decoder*"]) | settings))


def test_experts_that_a_model_was_built_with_have_no_dense_ffn():
    model = build(layers=["decoder*"])
    with pytest.raises(ValueError, match="decoder.decoder.layers.0, .* were built with experts"):
        restore_ffn(model)
    swap_ffn_for_moe(model, MoEConfig(4), layers=["encoder*"])
    with pytest.raises(ValueError, match="were built with experts"):
        restore_ffn(model)


@pytest.mark.parametrize("method", EXACT)
def test_a_waiting_layer_has_the_parameters_of_a_dense_one(dense, method):
    found = named_experts(build(method, start_step=9))
    with forward_context(step=1):
        active = {name: moe.active_parameters() for name, moe in found.items()}
    for name, count in active.items():
        assert count == sum(p.numel() for p in dense[0].get_submodule(name).parameters())


def test_a_waiting_layer_costs_what_a_dense_one_does(dense):
    model = build("copies", start_step=9).eval()
    name = "decoder.decoder.layers.0.ffn"
    inputs = make_inputs([(64, 96)])
    wanted = count_flops(dense[0], inputs).by_module[name]
    counts = {}
    for step in (1, 99):
        model.clock.set(step)
        report = count_flops(model, inputs).by_module[name]
        with forward_context(step=step):
            counts[step] = report, named_experts(model)[name].active_parameters()
    size = sum(p.numel() for p in dense[0].get_submodule(name).parameters())
    assert counts[1] == (wanted, size)
    assert counts[99] == (2 * wanted + 30 * 32 * 4, 2 * size + 32 * 4)


def test_units_of_a_waiting_split_are_the_whole_ffn():
    """Of parts that are summed; at its turn a token loses those that it does not choose."""
    model = tiny_model()
    x = torch.randn(50, 32)
    ffn = model.decoder.decoder.layers[0].ffn
    swap_ffn_for_moe(model, MoEConfig(8, 4), "coactivation", None, lambda: run(model))
    moe = model.decoder.decoder.layers[0].ffn
    moe.begin = 3
    with forward_context(step=2):
        assert_close((moe(x),), (ffn(x),), 1e-6)
    with forward_context(step=3):
        assert (moe(x) - ffn(x)).abs().max() > 1e-2


def test_a_block_that_thaws_later_holds_its_router():
    """Whatever comes last, the block's turn to be trained or its experts' turn to route."""
    model = tiny_dinov3(freeze={"unfreeze_step": 1, "unfreeze_blocks": 3, "unfreeze_every": 1})
    layers = [f"backbone.dinov3.blocks.{i}" for i in (5, 3, 4)]
    swap_ffns(model, SwapConfig(MoEConfig(4), "slots", layers, start_step=0, every=2))
    found = {int(name.split(".")[3]): moe for name, moe in named_experts(model).items()}
    starts = {5: max(1, 0), 3: max(3, 2), 4: max(2, 4)}
    state = {index: moe.router.weight.detach().clone() for index, moe in found.items()}
    moved = []

    def watch() -> None:
        moved.append(
            {i for i, moe in found.items() if not torch.equal(moe.router.weight, state[i])}
        )

    train(model, optimizer_of(model), 0, 5, watch)
    assert moved == [{i for i, start in starts.items() if step >= start} for step in range(5)]


def worker(rank: int, folder: str) -> None:
    model = build(keep_dense=["*layers.1"])
    load_initial(model, f"{folder}/dense.pth")
    parallel = create_ddp_model(
        model, device_ids=None, broadcast_buffers=False, find_unused_parameters=False
    )
    states = [copy.deepcopy(model.state_dict())]
    train(
        parallel, optimizer_of(model), 0, 3,
        lambda: states.append(copy.deepcopy(model.state_dict())), rank,
    )  # fmt: skip
    torch.save(states, f"{folder}/{rank}.pth")


def test_two_processes(dense):
    folder = dense[1].parent
    in_two_processes(worker, str(folder))
    ranks = [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]
    names = [k for k, _ in build().named_parameters()]
    for mine, theirs in zip(*ranks):
        assert all(torch.equal(mine[name], theirs[name]) for name in names)
    for step, (before, after) in enumerate(zip(ranks[0], ranks[0][1:])):
        moved = {k for k in names if ".router." in k and not torch.equal(before[k], after[k])}
        assert moved == ({"decoder.decoder.layers.2.ffn.router.weight"} if step else set())

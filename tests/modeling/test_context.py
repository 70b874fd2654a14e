"""The context of a forward, and the knobs of a call."""

import copy
import threading
from collections import Counter

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from torch import nn

from dset_d2.analysis import count_flops, count_parameters
from dset_d2.modeling import Knobs, forward_context
from dset_d2.modeling.context import current, name_parts, place_of
from dset_d2.modeling.sparse import MemoryPruningConfig, MoE, MoEConfig, ViTPruningConfig
from dset_d2.modeling.tokens import Padding

from ..conftest import make_inputs, make_targets, sparse_model, tiny_config, tiny_dinov3, tiny_model

DFINE = "configs/dfine/dfine_s_coco.py"
IMAGE = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))


class Executed:
    """Counts what a detector executes: rows of each layer's input."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, list[int]] = {}
        decoder = model.decoder
        self.watch("queries", decoder.enc_bbox_head, lambda x: x.shape[1])
        for layer in decoder.decoder.layers:
            self.watch("layers", layer, lambda x: x.shape[1])
            self.watch("memory", layer.cross_attn.value_proj, lambda x: x.shape[1])
            if isinstance(layer.ffn, MoE):
                self.watch_experts(layer.ffn)
        for layer in model.encoder.encoder[0].layers:
            self.watch("tokens", layer, lambda x: x.shape[1])

    def watch(self, name: str, module: nn.Module, count) -> None:
        rows = self.rows.setdefault(name, [])
        module.register_forward_pre_hook(lambda m, x: rows.append(count(x[0])))

    def watch_experts(self, moe: MoE) -> None:
        rows = self.rows.setdefault("experts", [])

        def count(module, arguments) -> None:
            rows.append(arguments[1].experts.shape[1])

        moe.experts.register_forward_pre_hook(count)

    def take(self) -> dict[str, list[int]]:
        taken = {name: list(rows) for name, rows in self.rows.items()}
        for rows in self.rows.values():
            rows.clear()
        return taken


CONFIGURED = {
    "queries": [30],
    "layers": [30] * 3,
    "memory": [168] * 3,
    "experts": [2] * 3,
    "tokens": [8],
}


@pytest.mark.parametrize(
    ("knobs", "changes"),
    [
        (Knobs(), {}),
        (Knobs(keep_ratio=0.25), {"tokens": [4]}),
        (Knobs(keep_ratio=1.0), {"tokens": [16]}),
        (Knobs(memory_ratio=0.25), {"memory": [84] * 3}),
        (Knobs(top_k=1), {"experts": [1] * 3}),
        (Knobs(top_k=4), {"experts": [4] * 3}),
        (Knobs(decoder_layers=1), {"layers": [30], "memory": [168], "experts": [2]}),
        (Knobs(num_queries=10), {"queries": [10], "layers": [10] * 3}),
        (
            Knobs(0.5, 0.25, 1, 2, 20),
            {"queries": [20], "layers": [20] * 2, "memory": [84] * 2, "experts": [1] * 2},
        ),
    ],
)
def test_knobs_change_what_is_executed_in_one_call(knobs, changes):
    model = sparse_model()
    executed = Executed(model)
    before = model.predict(IMAGE)
    assert executed.take() == CONFIGURED
    found = model.predict(IMAGE, knobs=knobs)
    assert executed.take() == CONFIGURED | changes
    assert found["pred_logits"].shape[1] == (knobs.num_queries or 30)
    after = model.predict(IMAGE)
    assert executed.take() == CONFIGURED
    assert torch.equal(before["pred_boxes"], after["pred_boxes"])
    if not changes:
        assert torch.equal(found["pred_boxes"], before["pred_boxes"])


@pytest.mark.parametrize("path", ["configs/rtdetr/rtdetrv2_r18_coco.py", DFINE])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fewer_layers_are_the_model_built_so(path, layers):
    model, shallow = tiny_model(path), tiny_model(path, eval_idx=layers - 1)
    shallow.load_state_dict(model.state_dict())
    found = model.predict(IMAGE, knobs=Knobs(decoder_layers=layers))
    expected = shallow.predict(IMAGE)
    for name in expected:
        assert torch.equal(found[name], expected[name])


def test_layers_above_the_evaluated_one_may_run_and_be_wide():
    model = tiny_model(DFINE, eval_idx=0, layer_scale=2.0)
    deep = model.predict(IMAGE, knobs=Knobs(decoder_layers=3))
    assert not torch.equal(deep["pred_boxes"], model.predict(IMAGE)["pred_boxes"])


def test_each_image_of_a_batch_may_have_its_own():
    model = sparse_model()
    inputs = make_inputs([(96, 128), (128, 128), (96, 128), (96, 128)])
    knobs = [Knobs(decoder_layers=1), None, Knobs(top_k=1), Knobs(decoder_layers=1)]
    executed = Executed(model)
    with torch.no_grad():
        together = model(inputs, knobs=knobs)
        assert len(executed.take()["layers"]) == 1 + 3 + 3
        alone = [model([x], knobs=k)[0] for x, k in zip(inputs, knobs)]
        everywhere = model(inputs, knobs=knobs[0])
    for found, expected in zip(together, alone):
        scores = [x["instances"].scores for x in (found, expected)]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        everywhere[0]["instances"].scores, alone[0]["instances"].scores, rtol=0, atol=1e-4
    )
    with pytest.raises(ValueError, match="1 knobs for 4 images"):
        model(inputs, knobs=[None])
    with pytest.raises(ValueError, match="in training there are none"):
        model.train()(inputs, knobs=Knobs())


def test_between_encode_and_decode_a_controller_may_decide():
    model = sparse_model()
    encoded = model.encode(IMAGE, knobs=Knobs(keep_ratio=0.25))
    found = model.decode(encoded, knobs=Knobs(decoder_layers=1))
    expected = model.predict(IMAGE, knobs=Knobs(keep_ratio=0.25, decoder_layers=1))
    assert torch.equal(found["pred_boxes"], expected["pred_boxes"])


def staged_model(**settings) -> nn.Module:
    places = [ViTPruningConfig(keep_ratio=0.5, block=2, min_tokens=2)]
    settings = {"pruning": places, "freeze": None} | settings
    return tiny_dinov3(moe=MoEConfig(num_experts=4, layers=(0, 3)), **settings).eval()


@pytest.mark.parametrize("build", [staged_model, sparse_model])
@pytest.mark.parametrize("padded", [False, True])
def test_two_stages_are_one_forward(build, padded):
    """Whatever is decided behind the first, once or several times; nothing of it runs again."""
    model = build()
    padding = Padding(torch.tensor([[128, 96]]), (128, 128)) if padded else None
    knobs = [Knobs(), Knobs(keep_ratio=0.25, top_k=1, decoder_layers=1), Knobs(keep_ratio=1.0)]
    if "vit_blocks" in model.knob_limits:
        knobs.append(Knobs(vit_blocks=4, keep_ratio=0.75))
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        expected = [model.predict(IMAGE, padding, k) for k in knobs[1:]]
        calls.clear()
        expected.insert(0, model.predict(IMAGE, padding, knobs[0]))
        whole = dict(calls)
        del whole["backbone"]  # whose stages are not its call
        calls.clear()
        begun = model.begin(IMAGE, padding)
        found = [model.finish(begun, knobs[0])]
        del calls["backbone"]
        assert calls == whole
        found += [model.finish(begun, k) for k in knobs[1:]]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(begun.features) == 1 and begun.features.isfinite().all()


def test_a_first_block_that_prunes_is_not_shared():
    place = ViTPruningConfig(keep_ratio=0.5, block=0, min_tokens=2)
    with pytest.raises(ValueError, match="block=0 leaves no first block that all settings share"):
        staged_model(pruning=[place]).begin(IMAGE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_ratio": 0.0}, r"keep_ratio=0.0 must lie in \(0, 1\]"),
        ({"memory_ratio": 1.5}, r"memory_ratio=1.5 must lie in \(0, 1\]"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"decoder_layers": 1.5}, "decoder_layers=1.5 must be a whole number"),
        ({"num_queries": True}, "num_queries=True must be a whole number"),
        ({"top_k": 5}, "top_k=5 exceeds the model's 4"),
        ({"decoder_layers": 4}, "decoder_layers=4 exceeds the model's 3"),
        ({"num_queries": 31}, "num_queries=31 exceeds the model's 30"),
    ],
)
def test_wrong_knobs(values, message):
    with pytest.raises(ValueError, match=message):
        sparse_model().predict(IMAGE, knobs=Knobs(**values))


@pytest.mark.parametrize("knobs", [Knobs(keep_ratio=0.5), Knobs(memory_ratio=0.5), Knobs(top_k=1)])
def test_a_dense_model_has_no_part_for_sparse_knobs(model, knobs):
    with pytest.raises(ValueError, match="no part for this knob; it has decoder_layers, num_quer"):
        model.predict(IMAGE, knobs=knobs)


def test_counts_follow_the_knobs():
    model = sparse_model()
    inputs = make_inputs([(128, 128)])
    knobs = Knobs(top_k=1, decoder_layers=2, num_queries=20)
    small = sparse_model(decoder={"eval_idx": 1, "num_queries": 20})
    small.load_state_dict(model.state_dict())
    full, fewer = (count_parameters(model, inputs, k)[""].active for k in (None, knobs))
    assert fewer < count_parameters(small, inputs)[""].active < full
    narrow = count_flops(small, inputs, Knobs(top_k=1))
    assert count_flops(model, inputs, knobs).total == narrow.total


BLOCK, LAYER = "backbone.dinov3.blocks.{}", "decoder.decoder.layers.{}"
KEPT = (32 + 5) / (64 + 5)  # of the tokens and the prefix


def test_every_knob_saves_operations_in_its_call_alone():
    """Shares of the multiply-adds of modules."""
    model = tiny_dinov3(
        pruning=[ViTPruningConfig(keep_ratio=1.0, block=2, min_tokens=2)],
        moe=MoEConfig(num_experts=4, top_k=2, layers=(0, 3)),
        freeze=None,
    ).eval()
    model.decoder = tiny_model(num_classes=5, memory_pruning=MemoryPruningConfig(1.0)).decoder
    model.name_parts()
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    whole = count_flops(model, image)
    for knobs, shares in (
        (Knobs(keep_ratio=0.5), {f"{BLOCK}.attn.qkv".format(i): (1, KEPT)[i > 1] for i in (1, 3)}),
        (Knobs(memory_ratio=0.5), {f"{LAYER}.cross_attn.value_proj".format(0): 0.5}),
        (Knobs(top_k=1), {f"{BLOCK}.mlp.experts".format(i): (1, 0.5)[i > 0] for i in (0, 3)}),
        (Knobs(decoder_layers=2), {LAYER.format(1): 1, LAYER.format(2): 0}),
        (Knobs(num_queries=15), {f"{LAYER}.cross_attn.output_proj".format(0): 0.5}),
        (Knobs(vit_blocks=5), {BLOCK.format(3): 1, BLOCK.format(4): 0, BLOCK.format(5): 1}),
    ):
        found = count_flops(model, image, knobs)
        assert found.total < whole.total, knobs
        for module, share in shares.items():
            assert found.by_module[module] == share * whole.by_module[module], (knobs, module)
    assert count_flops(model, image).total == whole.total


def test_predict_compiles_without_a_break():
    """Into one graph, knobs and a step of the schedule included."""
    model = sparse_model(end_step=4)
    model.clock.set(2)
    compiled = torch.compile(model.predict, fullgraph=True, backend="eager")
    knobs = Knobs(decoder_layers=1)
    with torch.no_grad():
        found, expected = compiled(IMAGE, knobs=knobs), model.predict(IMAGE, knobs=knobs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_knobs_around_a_call_are_checked_and_stay_out_of_training(model):
    with forward_context(knobs=Knobs(num_queries=10)):
        assert model.predict(IMAGE)["pred_logits"].shape[1] == 10
        found = []
        model.train().decoder.enc_bbox_head.register_forward_hook(lambda m, x, y: found.append(y))
        model.compute_losses(IMAGE, make_targets(1, 2))
        assert found[0].shape[1] == 30
    with forward_context(knobs=Knobs(keep_ratio=0.5)), pytest.raises(ValueError, match="no part"):
        model.eval().predict(IMAGE)


# Contexts.


def test_a_context_has_of_the_one_around_it_what_is_not_given():
    assert current().records is None and current().step is None
    with forward_context(step=3, record=True) as outer:
        with forward_context(knobs=Knobs(top_k=2)) as inner:
            assert current() is inner
            assert (inner.step, inner.knobs.top_k) == (3, 2)
            assert inner.records is outer.records
        with forward_context(record=True) as fresh:
            assert fresh.records is not outer.records
        assert current() is outer
    with pytest.raises(ZeroDivisionError), forward_context(step=1):
        raise ZeroDivisionError
    assert current().step is None


def test_a_second_record_of_one_name_is_an_error():
    moe = MoE(MoEConfig(2, 1), 8, 16, "relu")
    with forward_context(record=True), pytest.raises(RuntimeError, match="moe leaves a second"):
        moe(moe(torch.randn(3, 8)))


def test_threads_have_contexts_of_their_own():
    seen = []
    with forward_context(step=3):
        thread = threading.Thread(target=lambda: seen.append(current().step))
        thread.start()
        thread.join()
    assert seen == [None]


def test_places():
    assert place_of("encoder.encoder.0.layers.1.ffn") == "encoder_0_1"
    assert place_of("decoder.decoder.layers.2.ffn") == "decoder_2"
    assert place_of("backbone.dinov3.blocks.3.mlp") == "backbone_3"
    # Two that a shorter name would confuse.
    assert place_of("model.model.encoder.layers.0.fc1") == "encoder_0"
    assert place_of("model.model.decoder.layers.0.fc1") == "decoder_0"
    assert place_of("model.encoder.layers.0.deformable_layer.fc1") == "encoder_0"
    assert place_of("model.encoder.layers.0.text_enhancer_layer.fc1") == "text_enhancer_layer_0"
    assert place_of("model.backbone.model.encoder.layers.1.blocks.0.mlp") == "backbone_1_0"


def test_names_that_coincide_are_an_error():
    def layer() -> nn.Module:
        return nn.ModuleDict({"0": MoE(MoEConfig(2, 1), 8, 16, "relu")})

    model = nn.ModuleDict({"heads": nn.ModuleDict({"a": layer(), "b": layer()})})
    with pytest.raises(ValueError, match=r"heads.b.0 and heads.a.0 .* 'moe/heads_0'"):
        name_parts(model)


def test_a_model_can_be_copied_right_after_a_training_forward():
    model = sparse_model(spatial_prior="flat").train()
    losses = model(make_inputs([(96, 128)]))
    again = copy.deepcopy(model)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in again.parameters())
    assert again.state_dict().keys() == model.state_dict().keys()


def test_gradient_checkpointing_records_once_and_keeps_nothing():
    """Under the forward's own step and knobs, though its context has ended."""
    results = []
    for checkpointing in (False, True):
        model = tiny_dinov3(freeze=None, gradient_checkpointing=checkpointing).train()
        for index, block in enumerate(model.backbone.dinov3.blocks):
            torch.manual_seed(index)
            block.mlp = MoE(MoEConfig(4, 2, temperature=4.0, end_step=10), 32, 64, "gelu")
        model.name_parts()
        model.clock.set(5)
        torch.manual_seed(0)
        losses = model.compute_losses(torch.rand(1, 3, 64, 96), make_targets(1, 2))
        assert sum("balance_backbone" in name for name in losses) == 6
        total = sum(losses.values())
        total.backward(retain_graph=True)
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        results.append((losses, gradients))
        total.backward()  # and a second time
        copy.deepcopy(model)
    torch.testing.assert_close(results[0], results[1])


def test_a_config_swaps_experts_in_without_new_names():
    """The seam is a module: dense and sparse layers differ in what stands there alone."""
    cfg = tiny_config()
    cfg.model.decoder.moe = L(MoEConfig)(num_experts=2, top_k=1, layers=[1])
    layers = instantiate(cfg.model).decoder.decoder.layers
    assert [isinstance(layer.ffn, MoE) for layer in layers] == [False, True, False]

"""Sparsity inside the ViT: pruning between blocks, experts in blocks, and the static controls."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg, instantiate
from torch import nn

from dset_d2 import add_detr_config
from dset_d2.analysis import count_flops
from dset_d2.checkpoint import load_dinov3
from dset_d2.config import apply_overrides, load_config
from dset_d2.modeling import (
    DINOv3,
    FreezeConfig,
    Knobs,
    LoRAConfig,
    PlainAdapter,
    SpatialTuningAdapter,
    WindowConfig,
    find_ffns,
    forward_context,
)
from dset_d2.modeling.backbone.layouts import attention_received
from dset_d2.modeling.context import name_parts
from dset_d2.modeling.sparse import MoEConfig, ViTPruningConfig
from dset_d2.modeling.tokens import Padding
from dset_d2.visualization import sparsity_pictures

from ..conftest import make_inputs, make_targets, sparse_model, tiny_dinov3

DEPTH, PREFIX = 6, 5
IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
CELLS = 4 * 6


def place(block: int = 2, keep_ratio: float = 0.5, **settings) -> ViTPruningConfig:
    return ViTPruningConfig(block=block, keep_ratio=keep_ratio, min_tokens=2, **settings)


def vit(taps=(1, 3, 5), **settings) -> DINOv3:
    """A ViT with the same weights whatever is sparse in it, in evaluation mode."""
    torch.manual_seed(0)
    adapter = SpatialTuningAdapter(32, 16, 4)
    shape = dict(embed_dim=32, depth=DEPTH, num_heads=2, init_values=0.5)
    backbone = DINOv3(adapter=adapter, taps=taps, vit=shape, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in sorted(backbone.state_dict().items()):
            if "pruners" not in name and "mlp" not in name and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(0.3 * noise if value.dim() > 1 else value + 0.1 * noise)
    name_parts(nn.ModuleDict({"backbone": backbone}))
    return backbone.eval()


def maps(backbone: DINOv3, image: torch.Tensor = IMAGE, **context):
    """The ViT's maps, and what its parts left."""
    with torch.no_grad(), forward_context(record=True, **context) as found:
        return backbone.maps(image), found.records


def trained(backbone: DINOv3) -> DINOv3:
    """With scores that differ clearly."""
    with torch.no_grad():
        for pruner in backbone.pruners.values():
            pruner.scorer.layers[-1].weight.normal_(std=3)
    return backbone


# Equalities.


@pytest.mark.parametrize("training", [False, True])
def test_all_kept_is_the_dense_vit(training):
    """Bit for bit, gates included."""
    dense, pruned = vit().train(training), vit(pruning=[place(), place(4, 0.3)]).train(training)
    expected, _ = maps(dense)
    found, records = maps(pruned, knobs=Knobs(keep_ratio=1.0))
    assert len(records) == 2
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_kept_tokens_bring_their_rotations_and_meet_only_each_other():
    """Against blocks that are run by hand on the kept tokens, the prefix and their rotations."""
    backbone = trained(vit(pruning=[place()]))
    found, records = maps(backbone)
    kept = records["pruning/backbone_2"].kept.index
    assert kept.shape == (2, CELLS // 2) and (kept.diff(dim=1) > 0).all()
    model = backbone.dinov3
    with torch.no_grad():
        tokens, rope, _ = backbone.embed(IMAGE)
        for block in model.blocks[:2]:
            tokens = block(tokens, rope)
        for image, cells in enumerate(kept):
            own = torch.cat([tokens[image, :PREFIX], tokens[image, PREFIX:][cells]])[None]
            for block in model.blocks[2:]:
                own = block(own, rope[cells])
            expected = model.norm(own[0, PREFIX:])
            torch.testing.assert_close(found[-1][image].flatten(1).T[cells], expected)


def test_pruned_tokens_are_at_the_taps_what_they_were():
    backbone = trained(vit(pruning=[place()]))
    found, records = maps(backbone)
    gone = ~records["pruning/backbone_2"].kept_cells()
    assert gone.sum() == CELLS
    model = backbone.dinov3
    with torch.no_grad():
        tokens, rope, _ = backbone.embed(IMAGE)
        for block in model.blocks[:2]:
            tokens = block(tokens, rope)
        there = model.norm(tokens[:, PREFIX:])
    for taken in found[1:]:
        assert torch.equal(taken.flatten(2).transpose(1, 2)[gone], there[gone])


def test_order_of_the_patches_does_not_matter(monkeypatch):
    backbone = trained(vit(pruning=[place(), place(4, 0.25)]))
    expected, _ = maps(backbone)
    order = torch.randperm(CELLS)
    embed = backbone.embed

    def shuffled(image):
        tokens, rope, shape = embed(image)
        patches = tokens[:, PREFIX:][:, order]
        return torch.cat([tokens[:, :PREFIX], patches], dim=1), rope[order], shape

    monkeypatch.setattr(backbone, "embed", shuffled)
    found, _ = maps(backbone)
    for a, b in zip(found, expected):
        back = torch.empty_like(a).flatten(2)
        back[:, :, order] = a.flatten(2)
        torch.testing.assert_close(back.view_as(b), b, rtol=1e-4, atol=1e-5)


def test_pruned_tokens_return():
    """The second place scores them as they were at the first, and may take them."""
    backbone = trained(vit(pruning=[place(1), place(3, 0.25)]))
    found, records = maps(backbone)
    first, second = (records[f"pruning/backbone_{i}"] for i in (1, 3))
    assert second.tokens.shape[1] == CELLS and second.kept.index.shape == (2, CELLS // 4)
    gone = ~first.kept_cells()
    assert torch.equal(second.tokens[gone], first.tokens[gone])
    assert (second.kept_cells() & gone).any()
    returned = second.kept_cells() & gone
    pruned_at_last = found[-1].flatten(2).transpose(1, 2)[returned]
    assert not torch.equal(pruned_at_last, backbone.dinov3.norm(first.tokens[returned]))


def test_zero_fill():
    backbone = trained(vit(pruning=[place(restore="zero")]))
    found, records = maps(backbone)
    gone = ~records["pruning/backbone_2"].kept_cells()
    zero = backbone.dinov3.norm(torch.zeros(32))
    assert torch.equal(found[-1].flatten(2).transpose(1, 2)[gone], zero.expand(CELLS, -1))


def test_padding_is_pruned_first():
    backbone = trained(vit(pruning=[place()]))
    padding = Padding(torch.tensor([[48, 64], [96, 32]]), (96, 64))
    _, records = maps(backbone, padding=padding)
    record = records["pruning/backbone_2"]
    valid = padding.valid_tokens(4, 6)
    assert valid.sum(1).tolist() == [CELLS // 2, CELLS // 2]
    assert torch.equal(record.kept_cells(), valid)


def test_a_detector_tells_its_backbone_of_padding():
    model = tiny_dinov3(pruning=[place()]).eval()
    with torch.no_grad(), forward_context(record=True) as context:
        model(make_inputs([(64, 50)]))
    record = context.records["pruning/backbone_2"]
    assert record.where.valid.sum() == 4 * 4 and record.where.shape == (4, 4)
    with torch.no_grad(), forward_context(record=True) as context:
        model(make_inputs([(40, 64)]))
    assert context.records["pruning/backbone_2"].where.valid.sum() == 3 * 4


# Training.


def losses(model: nn.Module, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    return model.train().compute_losses(images, make_targets(2, 3))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    sum(losses(model).values()).backward()
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def test_a_frozen_vits_scorer_is_trained_by_the_boxes():
    """Phase A: nothing of the ViT has a gradient, the scorer has."""
    model = tiny_dinov3(pruning=[place()], freeze={"unfreeze_step": None})
    found = gradients(model)
    assert not [k for k in found if k.startswith("backbone.dinov3.")]
    scorer = {k: g for k, g in found.items() if k.startswith("backbone.pruners.2.")}
    assert len(scorer) == 4 and all(g.any() for g in scorer.values())
    assert "loss_foreground_backbone_2" in losses(model)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_the_task_reaches_the_scorer_through_its_gate(lora):
    """Where gradients flow through the ViT: trained blocks, or low-rank updates in front."""
    freeze = None if lora is None else {"unfreeze_step": None}
    scores = {}
    for gate in (True, False):
        pruning = [place(gate=gate, foreground_weight=1e-9)]
        model = tiny_dinov3(pruning=pruning, lora=lora, freeze=freeze)
        found = gradients(model)
        scores[gate] = found["backbone.pruners.2.scorer.layers.0.weight"].abs().max()
    assert scores[True] > 1e3 * scores[False]


def test_checkpointing_changes_nothing():
    pruning = [place(), place(4, 0.3)]
    model = tiny_dinov3(pruning=pruning, freeze=None, moe=MoEConfig(num_experts=2, layers=(3,)))
    again = copy.deepcopy(model)
    again.backbone.gradient_checkpointing = True
    expected, found = gradients(model), gradients(again)
    assert expected.keys() == found.keys() and any("pruners.4" in k for k in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_the_schedule_and_random_ratios():
    """The ratio falls with the steps; a random one lies above it, alike at all places."""
    model = tiny_dinov3(pruning=[place(random_ratio=True), place(4, random_ratio=True)])
    seen = []
    for step in range(40):
        with forward_context(step=step):
            first, second = (p.ratio() for p in model.train().backbone.pruners.values())
        assert first == second
        seen.append(first)
    assert 0.5 <= min(seen) < 0.55 and 0.95 < max(seen) <= 1
    with forward_context(step=7):
        assert model.backbone.pruners["2"].ratio() == seen[7]
        assert model.eval().backbone.pruners["2"].ratio() == 0.5
    model = tiny_dinov3(pruning=[place(end_step=10)]).train()
    with forward_context(step=5):
        assert model.backbone.pruners["2"].ratio() == 0.75


# The scorer without training.


def test_attention_received_is_the_blocks():
    """As timm's unfused attention has it in the very next block."""
    backbone = vit(pruning=[place(scorer="attention")])
    assert not list(backbone.pruners.parameters())
    block, seen = backbone.dinov3.blocks[2], []
    with torch.no_grad():
        tokens, rope, _ = backbone.embed(IMAGE)
        for earlier in backbone.dinov3.blocks[:2]:
            tokens = earlier(tokens, rope)
        received = attention_received(block, tokens, rope, PREFIX)
        block.attn.fused_attn = False
        hook = block.attn.attn_drop.register_forward_hook(lambda m, x, y: seen.append(y))
        block(tokens, rope)
        hook.remove()
    expected = seen[0][:, :, :PREFIX, PREFIX:].mean((1, 2))
    torch.testing.assert_close(received, expected)
    _, records = maps(backbone)
    record = records["pruning/backbone_2"]
    best = expected.topk(CELLS // 2).indices.sort().values
    assert torch.equal(record.kept.index, best)
    assert record.losses(make_targets(2, 3)) == {}


def test_a_model_with_the_untrained_scorer_trains():
    model = tiny_dinov3(pruning=[place(scorer="attention", foreground_weight=0.0)])
    assert not [k for k in losses(model) if k.startswith("loss_foreground")]


# Experts.


def test_experts_in_blocks():
    """One expert with the FFN's weights is the FFN; records say where, prefix included."""
    dense = vit()
    routed = vit(moe=MoEConfig(num_experts=1, top_k=1, layers=(4,)))
    seam = find_ffns(dense.dinov3)["blocks.4"]
    experts = routed.dinov3.blocks[4].mlp.experts
    with torch.no_grad():
        for block, other in zip(routed.dinov3.blocks, dense.dinov3.blocks):
            if block.mlp is not routed.dinov3.blocks[4].mlp:
                block.mlp.load_state_dict(other.mlp.state_dict())
        for ours, theirs in (
            (experts.w1, seam.linear1.weight),
            (experts.b1, seam.linear1.bias),
            (experts.w2, seam.linear2.weight),
            (experts.b2, seam.linear2.bias),
        ):
            ours[0].copy_(theirs)
    found, records = maps(routed)
    for a, b in zip(found, maps(dense)[0]):
        torch.testing.assert_close(a, b)
    assert list(records) == ["moe/backbone_4"]
    assert records["moe/backbone_4"].tokens.prefix == PREFIX


@pytest.mark.parametrize("construction", ["slots", "paper"])
def test_experts_start_exactly_from_a_dense_vit(construction):
    dense = vit()
    slots = 2 if construction == "slots" else 1
    moe = MoEConfig(num_experts=4, top_k=2, slots=slots, expert_dim=64, layers=(2, 5))
    routed = vit(moe=moe)
    load_dinov3(routed, dense.dinov3.state_dict(), upcycling=construction)
    for a, b in zip(maps(routed)[0], maps(dense)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_experts_behind_a_pruner_know_their_tokens():
    moe = MoEConfig(num_experts=4, top_k=1, patch_size=2, layers=(4,))
    backbone = trained(vit(pruning=[place()], moe=moe))
    padding = Padding(torch.tensor([[64, 64], [96, 64]]), (96, 64))
    _, records = maps(backbone, padding=padding)
    record, kept = records["moe/backbone_4"], records["pruning/backbone_2"].kept
    assert torch.equal(record.tokens.index, kept.index)
    rows = PREFIX + CELLS // 2
    assert record.routing.experts.shape == (2 * rows, 1)
    assert record.valid.view(2, rows)[:, :PREFIX].all()
    logits = record.routing.logits.view(2, rows, -1)[:, PREFIX:]
    region = kept.index // 6 // 2 * 3 + kept.index % 6 // 2
    for image in range(2):
        for number in region[image].unique():
            shared = logits[image][region[image] == number]
            assert torch.equal(shared, shared[:1].expand_as(shared))
    prefix = record.routing.logits.view(2, rows, -1)[:, :PREFIX].flatten(0, 1)
    assert len(prefix.unique(dim=0)) == 2 * PREFIX


def test_pictures():
    """Kept cells lit; experts on kept cells alone, the prefix on none."""
    moe = MoEConfig(num_experts=2, top_k=1, layers=(4,))
    backbone = trained(vit(pruning=[place()], moe=moe))
    _, records = maps(backbone, IMAGE[:1])
    pictures = sparsity_pictures(torch.full((64, 96, 3), 200).numpy().astype("uint8"), records)
    assert sorted(pictures) == ["expert_backbone_4", "kept_backbone_2"]
    lit = (pictures["kept_backbone_2"][8:64:16, 8::16] == 200).all(-1)
    coloured = (pictures["expert_backbone_4"][8:64:16, 8::16] != 50).any(-1)
    kept = records["pruning/backbone_2"].kept_cells()[0].view(4, 6).numpy()
    assert (lit == kept).all() and (coloured == kept).all()


# Static controls.


def test_one_window_is_the_whole_map():
    windows = WindowConfig(rows=1, columns=1, global_blocks=())
    for a, b in zip(maps(vit(windows=windows))[0], maps(vit())[0]):
        torch.testing.assert_close(a, b)


def test_windows_attend_within_themselves():
    """Until a global block: what one shows changes the others through nothing."""
    windows = WindowConfig(rows=2, columns=3, global_blocks=(2, 4, 5))
    backbone = vit(windows=windows)
    assert backbone.windowed_blocks == {0, 1, 3} and backbone.size_divisibility == 96
    other = IMAGE.clone()
    other[:, :, :32, :32] += 1
    changed = [(a != b).any(1) for a, b in zip(maps(backbone)[0], maps(backbone, other)[0])]
    first = torch.zeros(4, 6, dtype=torch.bool)
    first[:2, :2] = True
    assert torch.equal(changed[0], first.expand(2, -1, -1))
    assert changed[1].all()


def test_windows_against_attention_by_hand():
    windows = WindowConfig(rows=2, columns=2, global_blocks=(1, 2, 3, 4, 5))
    backbone = vit(taps=(0, 3, 5), windows=windows)
    with torch.no_grad():
        tokens, rope, _ = backbone.embed(IMAGE)
        cells = torch.arange(CELLS).view(4, 6)
        prefixes, expected = [], torch.empty(2, CELLS, 32)
        for window in (cells[r : r + 2, c : c + 3].flatten() for r in (0, 2) for c in (0, 3)):
            own = torch.cat([tokens[:, :PREFIX], tokens[:, PREFIX + window]], dim=1)
            own = backbone.dinov3.blocks[0](own, rope[window])
            prefixes.append(own[:, :PREFIX])
            expected[:, window] = own[:, PREFIX:]
        found, _ = maps(backbone)
        whole = torch.cat([torch.stack(prefixes).mean(0), expected], dim=1)
        for block in backbone.dinov3.blocks[1:4]:
            whole = block(whole, rope)
    for tap, tokens in ((found[0], expected), (found[1], whole[:, PREFIX:])):
        torch.testing.assert_close(tap.flatten(2).transpose(1, 2), backbone.dinov3.norm(tokens))


def test_images_are_padded_until_windows_divide_them():
    backbone = vit(windows=WindowConfig(rows=3, columns=2, global_blocks=(5,)))
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 50, 70))
    assert [tuple(f.shape[2:]) for f in features.values()] == [(12, 12), (6, 6), (3, 3)]


def test_the_vit_sees_a_smaller_image():
    """The adapter's levels keep their sizes, and its detail branch the whole image."""
    whole, small = vit(), vit(scale=0.5)
    image = torch.randn(1, 3, 128, 192)
    seen = []
    small.dinov3.patch_embed.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    small.adapter.sta.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    with torch.no_grad():
        features, expected = small(image), whole(image)
    assert [tuple(x.shape[2:]) for x in seen] == [(64, 96), (128, 192)]
    shrunk = F.interpolate(image, (64, 96), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], shrunk)
    assert {k: f.shape for k, f in features.items()} == {k: f.shape for k, f in expected.items()}
    plain = PlainAdapter(32, 16)(image, [torch.randn(1, 32, 4, 6)])
    assert [tuple(f.shape[2:]) for f in plain] == [(16, 24), (8, 12), (4, 6)]
    assert vit(scale=0.7).scaled(torch.zeros(1, 3, 640, 640)).shape[2:] == (448, 448)
    assert vit(scale=0.01).scaled(torch.zeros(1, 3, 64, 64)).shape[2:] == (16, 16)


# Blocks that are skipped.


@pytest.mark.parametrize(
    "depth, taps, order",
    [
        (12, (5, 8, 11), [4, 3, 10, 7, 2, 9, 6, 1]),
        (6, (1, 3, 5), [4, 2]),
        (6, (5,), [4, 3, 2, 1]),
        (3, (0, 1, 2), []),
    ],
)
def test_blocks_go_evenly_and_the_first_and_those_at_taps_stay(depth, taps, order):
    shape = dict(embed_dim=32, depth=depth, num_heads=2)
    backbone = DINOv3(adapter=SpatialTuningAdapter(32, 16, 4), taps=taps, vit=shape)
    assert backbone.skipping_order() == order
    assert ("vit_blocks" in backbone.knob_limits()) == bool(order)


@pytest.mark.parametrize("pruning", [[], [place(4)]])
def test_a_skipped_block_is_not_there(pruning):
    """Against a ViT whose block is the identity; a place in front of it prunes all the same."""
    backbone = vit(pruning=pruning)
    for pruner in backbone.pruners.values():
        nn.init.normal_(pruner.scorer.layers[-1].weight)
    without = copy.deepcopy(backbone)
    expected, _ = maps(backbone)
    found, records = maps(backbone, knobs=Knobs(vit_blocks=5))
    without.dinov3.blocks[4] = Passing()
    for a, b in zip(found, maps(without)[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found[1], expected[1]) and not torch.equal(found[2], expected[2])
    assert len(records) == len(pruning)
    for a, b in zip(maps(backbone)[0], expected):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"vit_blocks=3 must be at least 4: .* \[1, 3, 5\] stay"):
        maps(backbone, knobs=Knobs(vit_blocks=3))


class Passing(nn.Module):
    def forward(self, tokens, rope):
        return tokens


def test_skipped_blocks_have_gradients_of_zero():
    """So that a step is the same with one process and with several."""
    backbone = vit().train()
    with forward_context(knobs=Knobs(vit_blocks=5)):
        sum(x.sum() for x in backbone(IMAGE).values()).backward()
    blocks = backbone.dinov3.blocks
    assert not any(p.grad.any() for p in blocks[4].parameters())
    assert all(blocks[i].mlp.fc1.weight.grad.any() for i in (0, 1, 2, 3, 5))


def test_the_first_block_keeps_its_experts():
    backbone = vit(moe=MoEConfig(num_experts=4, top_k=3, layers=(0, 3)))
    for knobs, used in ((Knobs(), 3), (Knobs(top_k=1), 1)):
        _, records = maps(backbone, knobs=knobs)
        assert records["moe/backbone_0"].routing.experts.shape[1] == 3
        assert records["moe/backbone_3"].routing.experts.shape[1] == used
        gates = records["moe/backbone_3"].routing.gates
        torch.testing.assert_close(gates.sum(1), torch.ones(len(gates)))


# Cost, graphs, settings.


def test_pruning_saves_what_it_says():
    model = tiny_dinov3(pruning=[place()]).eval()
    image = torch.randn(1, 3, 128, 192)
    dense, pruned = (count_flops(model, image, Knobs(keep_ratio=k)) for k in (1.0, 0.5))
    block = "backbone.dinov3.blocks.{}.mlp.fc1"
    assert pruned.by_module[block.format(1)] == dense.by_module[block.format(1)]
    assert dense.by_module[block.format(4)] == (96 + PREFIX) * 32 * 128
    assert pruned.by_module[block.format(4)] == (48 + PREFIX) * 32 * 128
    smaller = count_flops(tiny_dinov3(scale=0.5).eval(), image)
    assert smaller.by_module[block.format(4)] == (24 + PREFIX) * 32 * 128


def test_one_graph_with_a_static_number_of_tokens():
    pruning = [place(), place(3, 0.4, scorer="attention"), place(4, 0.3)]
    model = tiny_dinov3(pruning=pruning, moe=MoEConfig(num_experts=2, layers=(3,))).eval()
    exported = torch.export.export(model.backbone, (IMAGE,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(IMAGE), model.backbone(IMAGE), rtol=1e-4, atol=1e-5)


def test_windows_make_one_graph():
    model = vit(windows=WindowConfig(global_blocks=(2, 5)), scale=0.5)
    image = torch.randn(1, 3, 128, 128)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pruning": [place(6)]}, r"block=\[6\] must differ from each other and lie in 0..5"),
        ({"pruning": [place(2), place(2)]}, r"block=\[2, 2\] must differ"),
        (
            {"pruning": [place(foreground_weight=0.0)], "freeze": FreezeConfig()},
            "foreground_weight=0.0 of pruning must be positive",
        ),
        ({"moe": MoEConfig(num_experts=2, layers=(7,))}, r"layers=\[7\] names none of 6 layers"),
        (
            {"moe": MoEConfig(num_experts=2, layers=(1, 4)), "freeze": FreezeConfig(0)},
            r"layers of moe: the blocks \[1\] are never trained",
        ),
        ({"windows": WindowConfig(global_blocks=(6,))}, r"global_blocks=\[6\] of windows"),
        (
            {"windows": WindowConfig(global_blocks=(5,)), "pruning": [place()]},
            "windows go with neither pruning nor moe",
        ),
        ({"scale": 0.0}, r"scale=0.0 must lie in \(0, 1\]"),
        ({"scale": 1.5}, r"scale=1.5 must lie in \(0, 1\]"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        vit(**settings)


def test_gated_ffns_have_no_place_for_experts():
    with pytest.raises(ValueError, match="block 1 has a gated FFN"):
        DINOv3(
            adapter=SpatialTuningAdapter(48, 16, 4),
            name="vit_small_plus_patch16_dinov3_qkvb",
            vit=dict(embed_dim=48, depth=3, num_heads=2),
            taps=(0, 1, 2),
            moe=MoEConfig(num_experts=2, layers=(1,)),
        )


def test_wrong_values():
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        WindowConfig(rows=0)
    with pytest.raises(ValueError, match="placement='after' must be 'before'"):
        place(placement="after")
    with pytest.raises(ValueError, match="scorer='best' is not one of"):
        place(scorer="best")
    with pytest.raises(ValueError, match="spatial_prior='lower' is learned"):
        place(scorer="attention", spatial_prior="lower")
    with pytest.raises(ValueError, match="scorer='attention' of pruning needs a ViT's"):
        sparse_model(scorer="attention")


def test_overrides_reach_places_by_their_number():
    cfg = load_config("projects/dset/configs/dset_dinov3_s_coco.py")
    apply_overrides(cfg, ["model.backbone.pruning.0.keep_ratio=0.3", "model.backbone.scale=0.5"])
    assert cfg.model.backbone.pruning[0].keep_ratio == 0.3
    with pytest.raises(ValueError, match=r"no key 'model.backbone.pruning.1.keep_ratio'"):
        apply_overrides(cfg, ["model.backbone.pruning.1.keep_ratio=0.3"])
    with pytest.raises(ValueError, match=r"pruning.0.keep_ratoi'; close to it: .*keep_ratio"):
        apply_overrides(cfg, ["model.backbone.pruning.0.keep_ratoi=0.3"])
    config = instantiate(cfg.model.backbone).pruners["2"].config
    assert config == ViTPruningConfig(block=2, keep_ratio=0.3, end_step=config.end_step)
    apply_overrides(cfg, ["model.backbone.pruning=[]"])
    assert cfg.model.backbone.pruning == []


def test_from_cfg_node():
    cfg = get_cfg()
    add_detr_config(cfg)
    cfg.merge_from_list(
        ["MODEL.DINOV3.ADAPTER.IN_CHANNELS", 32, "MODEL.DINOV3.ADAPTER.OUT_CHANNELS", 16]
        + ["MODEL.DINOV3.PRUNING", [{"block": 3, "keep_ratio": 0.5}]]
        + ["MODEL.DINOV3.MOE.NUM_EXPERTS", 2, "MODEL.DINOV3.MOE.LAYERS", [4]]
        + ["MODEL.DINOV3.TAPS", [1, 3, 5]]
    )
    cfg.MODEL.DINOV3.VIT.update(embed_dim=32, depth=6, num_heads=2)
    backbone = DINOv3(cfg, None)
    assert backbone.pruners["3"].config.keep_ratio == 0.5
    assert backbone.dinov3.blocks[4].mlp.config.num_experts == 2
    cfg.MODEL.DINOV3.PRUNING = [{"block": 3, "keep": 0.5}]
    with pytest.raises(ValueError, match="MODEL.DINOV3.PRUNING: .*'keep'"):
        DINOv3(cfg, None)
    cfg.MODEL.DINOV3.update(PRUNING=[], SCALE=0.5)
    cfg.MODEL.DINOV3.MOE.NUM_EXPERTS = 0
    cfg.MODEL.DINOV3.WINDOWS.update(ENABLED=True, GLOBAL_BLOCKS=[5])
    backbone = DINOv3(cfg, None)
    assert backbone.windows == WindowConfig(global_blocks=[5]) and backbone.scale == 0.5

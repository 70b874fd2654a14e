"""The DINOv3 backbone: upstream's numbers, weights of three origins, any size, memory, LoRA."""

import json
import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg, instantiate
from safetensors.torch import save_file
from torch import nn

import dset_d2
from dset_d2.checkpoint import load_dinov3, load_initial, load_upstream
from dset_d2.inference import deployed_parameters
from dset_d2.modeling import (
    DINOv3,
    FreezeConfig,
    LoRAConfig,
    PlainAdapter,
    SpatialTuningAdapter,
    merge_lora,
)
from dset_d2.modeling.lora import LoRALinear

from ..conftest import make_inputs, tiny_config, tiny_dinov3, tiny_model
from ..fixtures import fill

FIXTURE = Path(__file__).parents[1] / "fixtures/dinov3_vits16_sta.npz"
TINY = dict(embed_dim=32, depth=6, num_heads=2, init_values=0.5)


def tiny(adapter=None, **settings) -> DINOv3:
    torch.manual_seed(0)
    settings = {"taps": [1, 3, 5], "vit": TINY} | settings
    backbone = DINOv3(adapter=adapter or SpatialTuningAdapter(32, 16, 4), **settings)
    with torch.no_grad():  # attention that is not flat
        for name, value in backbone.dinov3.state_dict().items():
            if name.endswith("qkv.weight"):
                value.mul_(10)
    return backbone.eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_parity():
    """DEIMv2's DINOv3STAs on weights that both sides can make."""
    expected = np.load(FIXTURE)
    meta = json.loads(str(expected["meta"]))
    state = {}
    for name, shape in meta["state_dict"].items():
        skipped = any(part in name for part in meta["skip"])
        if skipped or name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape)
            continue
        state[name] = torch.from_numpy(fill.array(name, shape, meta["salt"]))
        if name.endswith(".gamma"):
            state[name] *= meta["gamma_scale"]
    backbone = DINOv3(adapter=SpatialTuningAdapter(384, 224, 32)).eval()
    load_dinov3(backbone, state)
    with torch.no_grad():
        features = backbone(torch.from_numpy(fill.image(*meta["image"][:1], *meta["image"][2:])))
    for index, feature in enumerate(features.values()):
        sample = feature[:, ::4, ::2, ::2].numpy()
        np.testing.assert_allclose(sample, expected[f"level{index}"], rtol=0, atol=1e-4)
    # The mask token and the keys' bias, which is masked, have no counterpart.
    assert meta["params"] - sum(p.numel() for p in backbone.parameters()) == 384 + 12 * 384


@pytest.mark.parametrize("size", [(64, 64), (48, 112)])
def test_maps_are_timms(size):
    """Also with another number of prefix tokens, which are cut off by their count."""
    for registers in (4, 7):
        backbone = tiny(vit=TINY | {"num_reg_tokens": registers})
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            nn.init.normal_(backbone.dinov3.reg_token)
            maps = backbone.maps(image)
            expected = backbone.dinov3.forward_intermediates(
                image, indices=[1, 3, 5], norm=True, intermediates_only=True
            )
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("adapter", [SpatialTuningAdapter, PlainAdapter])
def test_sizes(adapter):
    """Sizes that divide by 32, by 16, by neither; what does not divide by 16 is padded."""
    taps = [1, 3, 5] if adapter is SpatialTuningAdapter else [5]
    backbone = tiny(adapter(32, 16), taps=taps)
    for height, width in ((64, 96), (48, 80), (50, 70)):
        image = torch.randn(1, 3, height, width)
        with torch.no_grad():
            features = backbone(image)
            padded = nn.functional.pad(image, (0, -width % 16, 0, -height % 16))
            again = backbone(padded)
        rows, columns = -(-height // 16), -(-width // 16)
        sizes = [(2 * rows, 2 * columns), (rows, columns), (-(-rows // 2), -(-columns // 2))]
        assert [tuple(f.shape) for f in features.values()] == [(1, 16, *size) for size in sizes]
        torch.testing.assert_close(features, again, rtol=0, atol=0)
    assert list(backbone.output_shape()) == ["p3", "p4", "p5"]
    assert [s.stride for s in backbone.output_shape().values()] == [8, 16, 32]


def test_position_matters(image):
    """Rotations reach the patches: without them a shuffled image has shuffled maps."""
    backbone = tiny()
    with torch.no_grad():
        maps = backbone.maps(image)[-1]
        flipped = backbone.maps(image.unflatten(3, (-1, 16)).flip(3).flatten(3))[-1]
    assert (maps - flipped.flip(3)).abs().max() > 1e-3


def test_plain_adapters_norm(image):
    plain = tiny(PlainAdapter(32, 16), taps=[5])
    normed = tiny(PlainAdapter(32, 16, layer_norm=True), taps=[5])
    with torch.no_grad():
        normed.adapter.norm.weight.fill_(2)
        assert not torch.allclose(plain(image)["p4"], normed(image)["p4"])
    assert sum(p.numel() for p in normed.parameters()) == 64 + sum(
        p.numel() for p in plain.parameters()
    )


def test_plain_adapters_upsampling():
    """Nearest repeats the cells of a 1x1 convolution, bilinear mixes them."""
    nearest, bilinear = (PlainAdapter(8, 4, upsampling=mode) for mode in ("nearest", "bilinear"))
    bilinear.load_state_dict(nearest.state_dict())
    maps, image = [torch.randn(2, 8, 3, 5)], torch.empty(2, 3, 48, 80)
    with torch.no_grad():
        fine, middle, coarse = nearest(image, maps)
        repeated = nearest.convs[0](maps[0].repeat_interleave(2, 2).repeat_interleave(2, 3))
        other = bilinear(image, maps)
    torch.testing.assert_close(fine, repeated)
    assert not torch.allclose(other[0], fine)
    torch.testing.assert_close(other[1:], [middle, coarse])


# Weights.


def official(backbone: DINOv3) -> dict[str, torch.Tensor]:
    """The ViT's weights as Meta's files name them, with what only those hold."""
    renamed = {}
    for name, value in backbone.dinov3.state_dict().items():
        name = name.replace("reg_token", "storage_tokens")
        for i in (1, 2):
            name = name.replace(f"gamma_{i}", f"ls{i}.gamma")
        renamed[name] = value.clone()
    for index in range(len(backbone.dinov3.blocks)):
        attention = f"blocks.{index}.attn"
        q, v = renamed.pop(f"{attention}.q_bias"), renamed.pop(f"{attention}.v_bias")
        renamed[f"{attention}.qkv.bias"] = torch.cat([q, torch.full_like(q, 9.0), v])
        mask = torch.ones(3 * len(q))
        mask[len(q) : 2 * len(q)] = 0
        renamed[f"{attention}.qkv.bias_mask"] = mask
    renamed["mask_token"] = torch.zeros(1, 32)
    renamed["rope_embed.periods"] = torch.ones(4, dtype=torch.bfloat16)
    return renamed


def write_weights(folder: Path, origin: str, source: DINOv3) -> Path:
    """A file of a backbone's weights as one of their publishers writes it."""
    path = folder / ("model.safetensors" if origin.endswith("safetensors") else "weights.pth")
    if origin.startswith("official"):
        state = official(source)
    elif origin.startswith("timm"):
        state = source.dinov3.state_dict()
    else:
        state = {f"dinov3.{k}": v for k, v in official(source).items()}
        state |= source.adapter.state_dict()
    if origin == "deimv2 detector":
        state = {f"backbone.{k}": v for k, v in state.items()} | {"decoder.x": torch.ones(1)}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"ema": {"module": state}} if origin.startswith("deimv2") else state, path)
    return path


def trained_source() -> DINOv3:
    source = tiny()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return source


@pytest.mark.parametrize("origin", ["official", "timm safetensors", "deimv2"])
@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_all_origins(tmp_path, image, origin, whole):
    source = trained_source()
    path = write_weights(tmp_path, origin, source)
    if whole:  # a detector, by the loader of all released weights
        model = tiny_dinov3()
        model.backbone.adapter = SpatialTuningAdapter(32, 16, 4)
        load_upstream(model, path)
        backbone = model.backbone.eval()
    else:
        backbone = tiny(lora=LoRAConfig(rank=2))
        load_dinov3(backbone, path)
    with torch.no_grad():
        for ours, theirs in zip(backbone.maps(image), source.maps(image)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        same = torch.allclose(backbone(image)["p3"], source(image)["p3"], atol=1e-5)
    assert same == (origin == "deimv2")


CONFIGS = sorted(
    path.name for path in Path(__file__).parents[2].glob("projects/dfine_dinov3/configs/*.py")
)


@pytest.mark.parametrize(
    "origin",
    ["official", "official safetensors", "timm", "timm safetensors", "deimv2", "deimv2 detector"],
)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_starts_from_the_files_as_they_are(tmp_path, image, caplog, config, origin):
    """By the launcher's loader; what an adapter of another kind or size holds is left out."""
    source = trained_source()
    cfg = tiny_config(f"projects/dfine_dinov3/configs/{config}").model
    cfg.backbone.update(vit=TINY, taps=[1, 3, 5] if len(cfg.backbone.taps) == 3 else [5])
    cfg.backbone.adapter.in_channels = 32
    model = instantiate(cfg).eval()
    start = {k: v.clone() for k, v in model.backbone.adapter.state_dict().items()}
    load_initial(model, write_weights(tmp_path, origin, source))
    with torch.no_grad():
        last, expected = model.backbone.maps(image)[-1], source.maps(image)[-1]
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-6)
    assert not model.backbone.is_fresh()
    torch.testing.assert_close(model.backbone.adapter.state_dict(), start)
    assert ("does not fit the adapter, which stays fresh" in caplog.text) == ("deim" in origin)
    assert ("the backbone alone is taken" in caplog.text) == (origin == "deimv2 detector")


def test_a_fitting_adapter_comes_along(tmp_path, image):
    source = trained_source()
    model = tiny_dinov3()
    model.backbone.adapter = SpatialTuningAdapter(32, 16, 4)
    load_initial(model.eval(), write_weights(tmp_path, "deimv2 detector", source))
    with torch.no_grad():
        torch.testing.assert_close(model.backbone(image), source(image))


def test_a_backbones_own_weights_load():
    source, backbone = tiny(), tiny()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    load_dinov3(backbone, source.state_dict())
    torch.testing.assert_close(backbone.state_dict(), source.state_dict())


def test_deeper_weights_lose_their_last_blocks(image):
    backbone, shallow = tiny(), tiny(taps=[1, 2, 3])
    assert len(shallow.dinov3.blocks) == 4
    load_dinov3(shallow, official(backbone))
    torch.testing.assert_close(shallow.maps(image)[:1], backbone.maps(image)[:1])


def test_absent_weights_say_where_to_get_them(tmp_path):
    path = tmp_path / "weights.pth"
    for load, model in ((load_dinov3, tiny()), (load_upstream, tiny_dinov3())):
        with pytest.raises(FileNotFoundError) as error:
            load(model, path)
        for part in (
            str(path),
            "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
            "https://ai.meta.com/",
            "timm/vit_small_patch16_dinov3_qkvb.lvd1689m",
        ):
            assert part in str(error.value)


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = official(tiny())
    with pytest.raises(ValueError, match=r"1 keys without a place \['extra'\]"):
        load_dinov3(tiny(), state | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 parameters without a key \['norm.bias'\]"):
        load_dinov3(tiny(), {k: v for k, v in state.items() if k != "norm.bias"})
    with pytest.raises(ValueError, match=r"1 of another shape \['norm.bias'\]"):
        load_dinov3(tiny(), state | {"norm.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="do not fit a PResNet"):
        load_upstream(tiny_model(), state)


def test_construction_fetches_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    tiny()


def test_a_frozen_vit_without_weights_is_warned_of(caplog, image):
    caplog.set_level(logging.WARNING)
    backbone = tiny(freeze=FreezeConfig()).train()
    backbone(image)
    backbone(image)
    assert caplog.text.count("its weights are random: start from pretrained ones") == 1
    assert "dinov3_vits16_pretrain_lvd1689m-08c60483.pth" in caplog.text
    loaded = tiny(freeze=FreezeConfig()).train()
    state = official(loaded)
    load_dinov3(loaded, state | {"blocks.0.ls1.gamma": torch.rand(32)})
    caplog.clear()
    loaded(image)
    assert not caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="resnet50"), "name='resnet50'"),
        (dict(taps=[1, 3, 6]), r"taps=\[1, 3, 6\]"),
        (dict(taps=[3, 1, 5]), r"taps=\[3, 1, 5\]"),
        (dict(taps=[3, 5]), r"taps=\[3, 5\]: their number must be one of \(1, 3\)"),
        (dict(adapter=PlainAdapter(48, 16)), "in_channels=48"),
        (dict(freeze=FreezeConfig(0, 7)), "unfreeze_blocks=7 exceeds the 6 blocks"),
        (dict(lora=LoRAConfig(blocks=7)), "blocks=7 of LoRAConfig exceeds the 6 blocks"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_from_cfg_node():
    cfg = get_cfg()
    dset_d2.add_detr_config(cfg)
    node = cfg.MODEL.DINOV3
    plain = DINOv3.from_config(cfg, None)
    assert plain["freeze"] is None and plain["lora"] is None
    assert isinstance(plain["adapter"], SpatialTuningAdapter)
    node.ADAPTER.NAME, node.FREEZE.ENABLED, node.LORA.RANK = "plain", True, 4
    held = DINOv3.from_config(cfg, None)
    assert isinstance(held["adapter"], PlainAdapter) and held["lora"].rank == 4
    assert held["freeze"] == FreezeConfig(None, 4)
    node.FREEZE.UNFREEZE_STEP = 7
    assert DINOv3.from_config(cfg, None)["freeze"] == FreezeConfig(7, 4)
    node.ADAPTER.NAME = "fpn"
    with pytest.raises(ValueError, match="MODEL.DINOV3.ADAPTER.NAME='fpn'"):
        DINOv3.from_config(cfg, None)


def test_wrong_values():
    for build, message in (
        (lambda: FreezeConfig(-1), "unfreeze_step=-1"),
        (lambda: FreezeConfig(0, 0), "unfreeze_blocks=0"),
        (lambda: FreezeConfig(0, 4, -1), "unfreeze_every=-1"),
        (lambda: PlainAdapter(4, 4, upsampling="cubic"), "upsampling='cubic'"),
        (lambda: LoRAConfig(rank=0), "rank=0"),
        (lambda: LoRAConfig(alpha=0), "alpha=0"),
        (lambda: LoRAConfig(blocks=0), "blocks=0"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


# Gradient checkpointing.


def losses_and_bytes(**settings) -> tuple[dict, dict, int]:
    """Losses, gradients and the bytes that the ViT keeps for its backward."""
    settings = {"freeze": None} | settings
    model = tiny_dinov3(vit=dict(drop_path_rate=0.3), **settings).train()
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address returns
        return tensor

    def keep_input(_, inputs) -> None:  # what a checkpointed block starts from again
        if torch.is_grad_enabled():
            pack(inputs[0])

    handles = [b.register_forward_pre_hook(keep_input) for b in model.backbone.dinov3.blocks]
    maps = model.backbone.maps

    def watched(image: torch.Tensor) -> list[torch.Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return maps(image)

    model.backbone.maps = watched
    torch.manual_seed(1)
    losses = model(make_inputs([(64, 96)] * 2))
    for handle in handles:
        handle.remove()
    count = sum(size for size, _ in kept.values())
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in model.named_parameters()}, count


def test_gradient_checkpointing():
    losses, gradients, count = losses_and_bytes()
    again, gradients_again, fewer = losses_and_bytes(gradient_checkpointing=True)
    torch.testing.assert_close(again, losses, rtol=0, atol=0)
    torch.testing.assert_close(gradients_again, gradients, rtol=0, atol=0)
    assert fewer < 0.3 * count


def test_frozen_blocks_keep_nothing():
    _, _, free = losses_and_bytes()
    _, _, phase_b = losses_and_bytes(freeze={"unfreeze_step": 0, "unfreeze_blocks": 2})
    _, gradients, phase_a = losses_and_bytes(freeze={"unfreeze_step": 5, "unfreeze_blocks": 2})
    assert phase_a == 0 < phase_b < 0.5 * free
    assert all(g is None for name, g in gradients.items() if ".dinov3." in name)


# Low-rank adaptation.


def test_lora_starts_exactly_trains_and_merges(image):
    plain, adapted = tiny(), tiny(lora=LoRAConfig(rank=4, alpha=8), freeze=FreezeConfig())
    assert adapted.dinov3.state_dict().keys() > plain.dinov3.state_dict().keys()
    load_dinov3(adapted, official(plain))
    adapted.adapter.load_state_dict(plain.adapter.state_dict())
    with torch.no_grad():
        start = plain(image)
        torch.testing.assert_close(adapted(image), start, rtol=0, atol=0)

    trained = {n for n, p in adapted.dinov3.named_parameters() if p.requires_grad}
    assert trained == {
        f"blocks.{i}.attn.{layer}.lora_{matrix}"
        for i in range(6)
        for layer in ("qkv", "proj")
        for matrix in "ab"
    }
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        adapted.train()(image)["p5"].square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for n, p in adapted.named_parameters() if "lora_" in n)

    with torch.no_grad():
        before = adapted.eval()(image)
        assert (before["p3"] - start["p3"]).abs().max() > 1e-3
        merge_lora(adapted)
        torch.testing.assert_close(adapted(image), before, rtol=0, atol=1e-5)
    assert not any(isinstance(m, LoRALinear) for m in adapted.modules())
    assert adapted.state_dict().keys() == plain.state_dict().keys()


# The 25 M model.


def test_parameter_counts():
    path = "projects/dfine_dinov3/configs/dfine_dinov3_s_coco.py"
    counts = deployed_parameters(instantiate(dset_d2.get_config(path).model))
    millions = {name: tuple(round(n / 1e6, 2) for n in pair) for name, pair in counts.items()}
    assert millions == {
        "": (25.04, 24.94),
        "backbone": (21.87, 21.86),
        "backbone.dinov3": (21.6, 21.59),
        "backbone.adapter": (0.27, 0.27),
        "encoder": (1.63, 1.58),
        "decoder": (1.54, 1.5),
    }


def test_inference_needs_no_more_than_the_deployed_parameters():
    """What deployment takes away changes no detection."""
    model = tiny_dinov3().eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.predict(image)
        nn.init.normal_(model.decoder.denoising_class_embed.weight)
        for index in range(len(model.decoder.decoder.layers) - 1):
            for module in (model.decoder.dec_score_head, model.decoder.decoder.lqe_layers):
                for parameter in module[index].parameters():
                    nn.init.normal_(parameter)
        torch.testing.assert_close(model.predict(image), before, rtol=0, atol=0)

"""Experts that start from dense FFNs of checkpoints: of our detectors and DINOv3's files."""

import copy
import logging
import re

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from dset_d2.checkpoint import load_dinov3, load_initial, load_upstream
from dset_d2.modeling import FFN, find_ffns
from dset_d2.modeling.sparse import MoE, MoEConfig

from ..conftest import tiny_config, tiny_dinov3, tiny_model
from ..modeling.test_dinov3 import official, tiny, trained_source, write_weights

DSET = {
    "rtdetr": ("configs/rtdetr/rtdetrv2_r18_dair_v2x", "projects/dset/configs/dset_r18_dair_v2x"),
    "dfine": ("configs/dfine/dfine_s_dair_v2x", "projects/dset/configs/dset_s_dair_v2x"),
}


def dense_and_sparse(tmp_path, family: str, **moe) -> tuple[nn.Module, nn.Module]:
    """A dense detector, saved as dense.pth, and the one of the same size with experts."""
    dense_path, sparse_path = (f"{path}.py" for path in DSET[family])
    dense = tiny_model(dense_path)
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    cfg = tiny_config(sparse_path)
    for part in (cfg.model.encoder, cfg.model.decoder):
        part.moe.update(moe)
    return dense, instantiate(cfg.model).eval()


def ffns(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@torch.no_grad()
def difference(dense: nn.Module, sparse: nn.Module) -> float:
    """The largest between the outputs of dense FFNs and of the experts in their place."""
    experts = ffns(sparse, MoE)
    assert experts.keys() == ffns(dense, FFN).keys() and len(experts) == 4
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    return max(
        float((moe(x) - dense.get_submodule(name)(x)).abs().max()) for name, moe in experts.items()
    )


@pytest.mark.parametrize("upcycling", ["auto", "copies"])
@pytest.mark.parametrize("family", DSET)
def test_experts_start_as_copies_of_the_dense_ffn(tmp_path, caplog, family, upcycling):
    dense, sparse = dense_and_sparse(tmp_path, family, expert_dim=64)
    assert difference(dense, sparse) > 0.1
    routers = {name: moe.router.weight.clone() for name, moe in ffns(sparse, MoE).items()}
    load_initial(sparse, tmp_path / "dense.pth", upcycling)
    assert difference(dense, sparse) < 1e-6
    for name, weight in routers.items():
        assert torch.equal(sparse.get_submodule(name).router.weight, weight)
    fresh = caplog.text.partition("stay fresh: ")[2].partition("\n")[0]
    assert all(re.search("router|pruner", name) for name in fresh.split(", ")), fresh
    assert "no place" not in caplog.text


@pytest.mark.parametrize("family", DSET)
def test_experts_share_the_dense_ffn(tmp_path, family):
    dense, sparse = dense_and_sparse(tmp_path, family, num_experts=4, top_k=4)
    load_initial(sparse, tmp_path / "dense.pth")
    for moe in ffns(sparse, MoE).values():
        assert moe.experts.w1.shape == (4, 16, 32)
        nn.init.zeros_(moe.router.weight)
    assert difference(dense, sparse) < 2e-6


@pytest.mark.parametrize("upcycling", ["paper", "slots", "auto"])
@pytest.mark.parametrize("family", DSET)
def test_experts_start_as_copies_of_shards(tmp_path, caplog, family, upcycling):
    """At once with slots, which are the first choice; "paper" wants rows of the router, too."""
    slots = 1 if upcycling == "paper" else 2
    settings = dict(num_experts=8, top_k=2, expert_dim=32, slots=slots)
    dense, sparse = dense_and_sparse(tmp_path, family, **settings)
    assert difference(dense, sparse) > 0.1
    load_initial(sparse, tmp_path / "dense.pth", upcycling)
    assert difference(dense, sparse) < 2e-6
    assert ("router.weight" in caplog.text) == (upcycling != "paper")


def test_units_that_find_no_room_are_warned_of(tmp_path, caplog):
    """As in the study's decoder, whose experts are together a little narrower than the FFN."""
    _, sparse = dense_and_sparse(tmp_path, "rtdetr", num_experts=10, top_k=10)  # of 8 units
    load_initial(sparse, tmp_path / "dense.pth")
    assert "hidden units" not in caplog.text
    _, sparse = dense_and_sparse(tmp_path, "rtdetr", num_experts=7, top_k=7)  # of 8, too
    load_initial(sparse, tmp_path / "dense.pth")
    assert caplog.text.count("ffn start from 56 of its 64 hidden units") == 4


def test_experts_that_no_construction_fits_stay_fresh(tmp_path, caplog):
    _, sparse = dense_and_sparse(tmp_path, "rtdetr", num_experts=4, top_k=2, expert_dim=24)
    before = {k: v.clone() for k, v in sparse.state_dict().items() if ".experts." in k}
    load_initial(sparse, tmp_path / "dense.pth")
    assert all(torch.equal(sparse.state_dict()[k], v) for k, v in before.items())
    reason = r"expert_dim=64 \(copies\) or 16 \(split\), not 24"
    assert len(re.findall(f"the experts of .*ffn stay fresh: .*{reason}", caplog.text)) == 4
    for upcycling in ("copies", "split"):
        with pytest.raises(ValueError, match="dense.pth: encoder.*need expert_dim"):
            load_initial(sparse, tmp_path / "dense.pth", upcycling)
    with pytest.raises(ValueError, match="upcycling='clone' is not one of"):
        load_initial(sparse, tmp_path / "dense.pth", "clone")


def test_upcycling_can_be_left_out(tmp_path, caplog):
    _, sparse = dense_and_sparse(tmp_path, "rtdetr", expert_dim=64)
    before = {k: v.clone() for k, v in sparse.state_dict().items() if ".experts." in k}
    load_initial(sparse, tmp_path / "dense.pth", "none")
    assert all(torch.equal(sparse.state_dict()[k], v) for k, v in before.items())
    assert "16 of its keys have no place in the model: decoder.decoder.layers.0.ffn" in caplog.text


def test_ffns_of_another_width_are_not_taken(tmp_path, caplog):
    wider = tiny_config(DSET["rtdetr"][0] + ".py")
    wider.model.encoder.hidden_dim = wider.model.decoder.hidden_dim = 48
    _, sparse = dense_and_sparse(tmp_path, "rtdetr", expert_dim=64)
    torch.save(instantiate(wider.model).state_dict(), tmp_path / "wider.pth")
    caplog.set_level(logging.INFO)
    load_initial(sparse, tmp_path / "wider.pth")
    assert "of its keys have no place in the model" in caplog.text
    assert "hidden units" not in caplog.text


def test_dense_models_take_no_experts(tmp_path, caplog):
    dense, sparse = dense_and_sparse(tmp_path, "rtdetr", expert_dim=64)
    torch.save(sparse.state_dict(), tmp_path / "sparse.pth")
    before = {k: v.clone() for k, v in dense.state_dict().items() if ".ffn." in k}
    load_initial(dense, tmp_path / "sparse.pth")
    assert all(torch.equal(dense.state_dict()[k], v) for k, v in before.items())
    assert re.search("16 of the model's parameters stay fresh: .*ffn.linear1", caplog.text)
    assert re.search("of its keys have no place in the model: .*ffn.experts", caplog.text)


# DINOv3's files, into ViTs with experts in some blocks.

KINDS = {
    "paper": dict(num_experts=8, top_k=2, expert_dim=64),
    "slots": dict(num_experts=8, top_k=2, slots=2, expert_dim=64),
    "copies": dict(num_experts=3, top_k=2, expert_dim=128),
}


def with_experts(model: nn.Module, **config) -> nn.Module:
    """The same model with fresh experts in three blocks of its ViT, whose FFNs have 128 units."""
    model = copy.deepcopy(model)
    vit = model.get_submodule("backbone.dinov3" if hasattr(model, "backbone") else "dinov3")
    seams = find_ffns(vit.blocks)
    for index in (0, 3, 4):
        seams[str(index)].replace(MoE(MoEConfig(**config), 32, 128, "gelu"))
    return model.eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_equal_maps(sparse: nn.Module, dense: nn.Module, image: torch.Tensor) -> None:
    for ours, theirs in zip(sparse.maps(image), dense.maps(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "origin", ["official", "official safetensors", "timm", "deimv2", "deimv2 detector"]
)
@pytest.mark.parametrize("upcycling", KINDS)
def test_experts_start_from_every_dinov3_file(tmp_path, caplog, image, upcycling, origin):
    source = trained_source()
    model = with_experts(tiny_dinov3(), **KINDS[upcycling])
    assert len([m for m in model.modules() if isinstance(m, MoE)]) == 3
    load_initial(model, write_weights(tmp_path, origin, source), upcycling)
    assert_equal_maps(model.backbone, source, image)
    fresh = "3 of the ViT's parameters stay fresh: blocks.0.mlp.router.weight"
    assert (fresh in caplog.text) == (upcycling != "paper")


@pytest.mark.parametrize("load", [load_dinov3, load_upstream])
def test_experts_start_by_width_where_nothing_is_said(tmp_path, image, load):
    source = trained_source()
    for config in (KINDS["slots"], KINDS["copies"]):
        model = with_experts(tiny_dinov3(), **config)
        load(model, write_weights(tmp_path, "timm safetensors", source))
        assert_equal_maps(model.backbone, source, image)
    backbone = with_experts(tiny(), **KINDS["paper"])
    load_dinov3(backbone, official(source), upcycling="paper")
    assert_equal_maps(backbone, source, image)


@pytest.mark.parametrize("upcycling", KINDS)
def test_experts_start_from_a_dense_detector(tmp_path, image, upcycling):
    """A run's checkpoint, all of which has its place; the detections are the same."""
    dense = tiny_dinov3().eval()
    with torch.no_grad():
        for parameter in dense.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(dense.state_dict(), tmp_path / "dense.pth")
    model = with_experts(tiny_dinov3(), **KINDS[upcycling])
    load_initial(model, tmp_path / "dense.pth", upcycling)
    assert_equal_maps(model.backbone, dense.backbone, image)
    with torch.no_grad():
        found, expected = model.predict(image), dense.predict(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_experts_of_a_vit_that_stay_fresh(tmp_path, caplog):
    """The rest is loaded, with a warning; what is asked for and does not fit is an error."""
    source = trained_source()
    path = write_weights(tmp_path, "official", source)
    model = with_experts(tiny_dinov3(), num_experts=4, top_k=2, expert_dim=24)
    state = model.backbone.dinov3.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    with pytest.raises(ValueError, match=r"weights.pth: blocks.0.mlp: .*expert_dim=64 \(paper\)"):
        load_initial(model, path, "paper")
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    for upcycling in ("auto", "none"):
        caplog.clear()
        load_initial(model, path, upcycling)
        assert ("the experts of blocks.4.mlp stay fresh" in caplog.text) == (upcycling == "auto")
        assert "15 of the ViT's parameters stay fresh: blocks.0.mlp.experts.b1" in caplog.text
        for key, value in state.items():
            own = ".mlp.router" in key or ".mlp.experts" in key
            expected = before if own else source.dinov3.state_dict()
            assert torch.equal(value, expected[key]), key
    with pytest.raises(ValueError, match="upcycling='clone' is not one of"):
        load_dinov3(model, path, upcycling="clone")


def test_vits_with_experts_are_loaded_as_strictly():
    source = with_experts(trained_source(), **KINDS["slots"])
    backbone = with_experts(tiny(), **KINDS["slots"])
    load_dinov3(backbone, source.state_dict())  # a ViT's own, with experts
    torch.testing.assert_close(backbone.state_dict(), source.state_dict(), rtol=0, atol=0)
    state = official(tiny())
    with pytest.raises(ValueError, match=r"1 keys without a place \['extra'\]"):
        load_dinov3(backbone, state | {"extra": torch.zeros(1)})
    lost = {key: value for key, value in state.items() if key != "blocks.3.mlp.fc2.bias"}
    with pytest.raises(ValueError, match=r"3 keys without a place .*blocks.3.mlp.fc1.bias"):
        load_dinov3(backbone, lost)
    with pytest.raises(ValueError, match="keys without a place .*blocks.0.mlp.experts"):
        load_dinov3(tiny(), source.state_dict())

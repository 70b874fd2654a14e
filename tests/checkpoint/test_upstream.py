import re

import pytest
import torch
from detectron2.config import instantiate

import dset_d2
from dset_d2.checkpoint import load_initial, load_upstream

from ..conftest import tiny_config, tiny_model


def fresh() -> torch.nn.Module:
    return instantiate(tiny_config().model)


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("clock.")}


def assert_loaded(model, expected) -> None:
    for name, value in weights(model).items():
        assert torch.equal(value, expected[name]), name


def test_v1_names_and_computed_buffers():
    state = weights(tiny_model())
    old = {}
    for name, value in state.items():
        name = re.sub(r"(input_proj\.\d)\.conv", r"\1.0", name)
        name = re.sub(r"(input_proj\.\d)\.norm", r"\1.1", name)
        name = name.replace("enc_output.proj", "enc_output.0")
        old[name.replace("enc_output.norm", "enc_output.1")] = value
    assert old.keys() != state.keys()
    old |= {"decoder.anchors": torch.zeros(1, 9, 4), "decoder.valid_mask": torch.ones(1, 9, 1)}
    old["decoder.decoder.layers.0.cross_attn.num_points_scale"] = torch.zeros(12)
    model = fresh()
    load_upstream(model, old)
    assert_loaded(model, state)


def test_hgnetv2_names_of_rt_detr():
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_hgnetv2_l_coco.py")
    model, other = instantiate(cfg.model), instantiate(cfg.model)
    state = weights(model)
    upstream = {}
    for name, value in state.items():
        name = re.sub(r"(stem2[ab]\.conv)\.", r"\1.1.", name)
        name = name.replace(".aggregation.0.", ".aggregation_squeeze_conv.")
        upstream[name.replace(".aggregation.1.", ".aggregation_excitation_conv.")] = value
    load_upstream(other, upstream)
    assert_loaded(other, state)


@pytest.mark.parametrize("path", ["rtdetr/rtdetrv2_r50_coco", "dfine/dfine_l_coco"])
def test_frozen_norms_of_released_models_have_no_counters(path):
    """Upstream's hold weight, bias and statistics alone, Detectron2's may hold more."""
    model, other = (instantiate(tiny_config(f"configs/{path}.py").model) for _ in range(2))
    counters = {k for k in weights(model.backbone) if k.endswith("num_batches_tracked")}
    state = {k: v for k, v in weights(model).items() if k.removeprefix("backbone.") not in counters}
    load_upstream(other, state)
    for name, value in state.items():
        assert torch.equal(other.state_dict()[name], value), name

    alone = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    load_upstream(instantiate(tiny_config(f"configs/{path}.py").model), alone)


@pytest.mark.parametrize("prefix", ["decoder", "decoder.distribution"])
def test_bins_are_those_of_the_checkpoint(prefix):
    """Under upstream's names, which are there twice, and under ours."""
    state = weights(tiny_model("configs/dfine/dfine_s_coco.py"))
    for name in ("up", "reg_scale"):
        del state[f"decoder.distribution.{name}"]
    model = instantiate(tiny_config("configs/dfine/dfine_s_coco.py").model)
    load_upstream(model, state)  # without any, the config's stay
    before = model.decoder.distribution.bins.clone()
    state |= {f"{prefix}.up": torch.tensor([0.5]), f"{prefix}.reg_scale": torch.tensor([8.0])}
    if prefix == "decoder":
        state |= {"decoder.decoder.up": torch.tensor([0.5])}
        state |= {"decoder.decoder.reg_scale": torch.tensor([8.0])}
    load_upstream(model, state)
    assert float(model.decoder.distribution.reg_scale) == 8
    assert not torch.equal(model.decoder.distribution.bins, before)


def test_backbone_alone():
    state = weights(tiny_model().backbone)
    model = fresh()
    load_upstream(model, state)
    for name, value in state.items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    with pytest.raises(ValueError, match="parameters without a key"):
        load_upstream(model, state, whole=True)


def test_other_class_count_leaves_heads_fresh(caplog):
    state = weights(tiny_model(num_classes=7))
    model = fresh()
    before = {k: v.clone() for k, v in weights(model).items()}
    load_upstream(model, state)
    for name, value in weights(model).items():
        resized = before[name].shape != state[name].shape
        assert resized == bool(re.search(r"score_head|denoising_class_embed", name))
        assert torch.equal(value, before[name] if resized else state[name])
    assert "another number of classes" in caplog.text
    with pytest.raises(ValueError, match="denoising_class_embed.weight has shape"):
        load_upstream(fresh(), state, whole=True)


def test_what_does_not_fit_is_named():
    state = weights(tiny_model())
    with pytest.raises(ValueError, match=r"1 keys without a place \['decoder.extra'\]"):
        load_upstream(fresh(), state | {"decoder.extra": torch.zeros(1)})
    lost = dict(state)
    del lost["encoder.lateral_convs.0.conv.weight"]
    with pytest.raises(ValueError, match="encoder.lateral_convs.0.conv.weight"):
        load_upstream(fresh(), lost)
    narrow = weights(tiny_model(dim_feedforward=48))
    with pytest.raises(ValueError, match=r"linear1.weight has shape \(48, 32\)"):
        load_upstream(fresh(), narrow)
    state["decoder.query_pos_head.layers.0.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"query_pos_head.layers.0.weight has shape \(3, 3\)"):
        load_upstream(fresh(), state)


@pytest.mark.parametrize("load", [load_initial, load_upstream])
def test_values_that_are_not_finite_are_named(load, tmp_path):
    state = weights(tiny_model())
    state["decoder.enc_output.proj.bias"] = torch.full((32,), torch.nan)
    torch.save(state, tmp_path / "broken.pth")
    model = fresh()
    before = {k: v.clone() for k, v in weights(model).items()}
    with pytest.raises(ValueError, match="broken.pth: decoder.enc_output.proj.bias is not finite"):
        load(model, tmp_path / "broken.pth")
    assert_loaded(model, before)


def test_new_runs_start_from_upstreams_files(tmp_path, caplog):
    """Under upstream's names, in whole or in part; the count of steps starts anew."""
    state = tiny_model(num_classes=7).state_dict()
    old = {re.sub(r"(input_proj\.\d)\.conv", r"\1.0", k): v for k, v in state.items()}
    old |= {"clock.steps": torch.tensor(9), "decoder.anchors": torch.full((1, 9, 4), torch.inf)}
    torch.save({"ema": {"module": old}}, tmp_path / "released.pth")
    model = fresh()
    load_initial(model, tmp_path / "released.pth")
    for name, value in weights(model).items():
        assert torch.equal(value, state[name]) or re.search("score_head|class_embed", name), name
    assert model.clock.step == 0 and "anchors" not in caplog.text
    assert "of the model's parameters stay fresh: decoder.dec_score_head.0.bias" in caplog.text

    torch.save(weights(tiny_model().backbone), tmp_path / "backbone.pth")
    load_initial(model, tmp_path / "backbone.pth")
    for name, value in tiny_model().backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth: none of its parameters fits the model"):
        load_initial(model, tmp_path / "other.pth")

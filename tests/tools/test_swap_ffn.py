"""The tool that swaps FFNs of a checkpoint, whose output trains and evaluates."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

import dset_d2
from dset_d2.checkpoint import load_initial, load_upstream
from dset_d2.config import apply_overrides
from dset_d2.modeling.sparse import MoE
from dset_d2.tools import swap_ffn

from ..conftest import NARROW, randomise

CONFIG = "configs/rtdetr/rtdetrv2_r18_roadside.py"
TINY = [*NARROW, "dataloader.image_size=[64,96]"]
SWAP = ["model.swap.moe.num_experts=4", "model.swap.moe.top_k=2"]


@pytest.fixture
def command(tmp_path) -> list[str]:
    """The options, with weights of a tiny model, and photographs."""
    torch.manual_seed(0)
    cfg = apply_overrides(dset_d2.get_config(CONFIG), TINY)
    torch.save({"model": randomise(instantiate(cfg.model)).state_dict()}, tmp_path / "dense.pth")
    generator = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index in range(3):
        pixels = generator.integers(256, size=(48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    paths = ["--weights", str(tmp_path / "dense.pth"), "--output", str(tmp_path / "swapped.pth")]
    return ["--config-file", CONFIG, *paths, "--device", "cpu", "--input", str(tmp_path / "photos")]


@pytest.mark.parametrize("method", ["paper", "coactivation"])
def test_a_swapped_checkpoint_fits_the_config(command, method, tmp_path, capsys):
    overrides = [*SWAP, f"model.swap.method={method}", "model.swap.layers=['decoder*']"]
    report = ["--report"] if method == "coactivation" else []
    swap_ffn.main([*command, *report, "--num-images", "2", *TINY, *overrides])
    printed = capsys.readouterr().out
    places = [f"decoder.decoder.layers.{i}" for i in range(3)]
    assert f"{', '.join(places)}: experts by method='{method}'" in printed
    changes = [float(line.split()[3]) for line in printed.splitlines() if "change by" in line]
    assert len(changes) == 2 and "tried on 2 images" in printed
    if method == "paper":
        assert max(changes) < 1e-6
    else:
        assert min(changes) > 1e-6
        rows = [line.split() for line in printed.splitlines() if " 0.0000" in line]
        assert [row[-4] for row in rows] == ["coactivation", "random", "order"] * 3
        assert [row[0] for row in rows[::3]] == places
    cfg = apply_overrides(dset_d2.get_config(CONFIG), [*TINY, *overrides])
    for load in (load_initial, load_upstream):
        model = instantiate(cfg.model)
        load(model, tmp_path / "swapped.pth")
        saved = torch.load(tmp_path / "swapped.pth", weights_only=True)["model"]
        torch.testing.assert_close(model.state_dict(), saved, rtol=0, atol=0)
    assert sum(isinstance(module, MoE) for module in model.modules()) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "the config has no model.swap: add model.swap.moe.num_experts=8"),
        (["model.swap.moe.num_experts=7"], "model.swap: encoder.encoder.0.layers.0: constructi"),
        ([*SWAP, "model.swap.layers=['neck*']"], "model.swap: layers: 'neck*' finds no dense FFN"),
    ],
)
def test_settings_that_do_not_fit_are_named(command, overrides, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        swap_ffn.main([*command, "--", *TINY, *overrides])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "swapped.pth").exists()

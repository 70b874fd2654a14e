"""The study of fixed cameras in projects/dset, a script that nothing imports."""

import runpy
from types import SimpleNamespace

import cv2
import pytest
import torch
from detectron2.config import instantiate

from dset_d2.tools.common import read_config

from ..conftest import NARROW, randomise
from ..test_configs import ROOT

SHALLOW = [
    *NARROW,
    "model.backbone.vit={embed_dim: 32, depth: 3, num_heads: 2, init_values: 0.5}",
    "model.backbone.taps=[0,1,2]",
    "model.backbone.adapter.in_channels=32",
    "model.backbone.freeze=null",
]


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "projects/dset/fixed_camera.py")))


@pytest.fixture
def backbone(script):
    torch.manual_seed(0)
    cfg = read_config(script.CONFIG, SHALLOW).model.backbone
    cfg._target_ = script.CachingDINOv3
    return randomise(instantiate(cfg)).eval()


@torch.no_grad()
def test_cached_tokens_are_as_they_were_and_others_are_new(backbone):
    """Where every change is refreshed, the first block has the very keys and values."""
    old = torch.randn(1, 3, 64, 96)
    new = old.clone()
    new[:, :, 16:32, 32:64] += 1  # of 4 x 6 patches those in row 1, columns 2 and 3
    dense_old, dense_new = backbone.maps(old), backbone.maps(new)
    backbone.refreshed = 2
    filled = [tokens.clone() for tokens in backbone.maps(old)]
    torch.testing.assert_close(filled, dense_old)
    first, *_, last = [tokens.clone() for tokens in backbone.maps(new)]
    refreshed = torch.zeros(4, 6, dtype=torch.bool)
    refreshed[1, 2:4] = True
    torch.testing.assert_close(first, torch.where(refreshed, dense_new[0], dense_old[0]))
    assert torch.equal(last[:, :, ~refreshed], filled[-1][:, :, ~refreshed])
    assert (last - filled[-1])[:, :, refreshed].abs().amin(1).min() > 0
    backbone.refreshed = 24  # all
    torch.testing.assert_close(backbone.maps(new), dense_new)


def test_script_prints_a_table_and_draws(script, tmp_path, capsys):
    options = "--size 96 160 --frames 3 --cameras 2 --rounds 1 --thresholds 0.001 0.1 1e9".split()
    script.main([*options, "--output", str(tmp_path / "camera.png"), *SHALLOW])
    printed = capsys.readouterr().out
    assert "60 patch tokens" in printed and "random weights" in printed
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    rows = {tuple(row[:2]): row[2:] for row in cells if len(row) == len(script.COLUMNS)}
    assert rows.pop(("", "all"))[:-1] == [""] * 5
    for noise in script.NOISE:
        changed, refreshed, p90, recall, chance = map(float, rows[noise, "0.1"][:5])
        assert 0 < refreshed < p90 < 1 and 0 < changed < 1
        assert recall > chance
        assert set(rows[noise, "1e+09"][:5]) == {"0.000"}
    shares = [float(rows[noise, "0.001"][1]) for noise in script.NOISE]
    assert shares[0] >= shares[1] > shares[2]
    assert cv2.imread(str(tmp_path / "camera.png")).shape == (96 + 64, 160, 3)


@pytest.mark.parametrize(
    "option", ["--frames=1", "--rate=0", "--thresholds=-1", "--cameras=0", "--size=544 900"]
)
def test_wrong_numbers_are_refused(script, option, capsys):
    with pytest.raises(SystemExit):
        script.main(option.replace("=", " ").split())
    assert (
        "--size must be whole 32s, --frames at least 2, all other numbers positive"
        in capsys.readouterr().err
    )

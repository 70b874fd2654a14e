"""Detectron2's own analysis takes this project's configs."""

import re

import pytest
import torch
from detectron2.config import instantiate

from dset_d2.analysis import count_flops
from dset_d2.config import apply_overrides, load_config
from dset_d2.synthetic import write_dataset

from ..conftest import TINY_RUN
from ..test_configs import ROOT
from . import stock_analyze_model

CONFIGS = {
    "projects/dset/configs/dset_r18_dair_v2x.py": [],
    "projects/dfine_dinov3/configs/dfine_dinov3_s_dair_v2x.py": [
        "model.backbone.vit={embed_dim:32,depth:3,num_heads:2}",
        "model.backbone.taps=[0,1,2]",
        "model.backbone.freeze.unfreeze_blocks=1",
        "model.backbone.adapter.in_channels=32",
        "model.backbone.adapter.out_channels=32",
    ],
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    write_dataset(root, num_train=1, num_val=2, height=64, width=96, seed=1, progress=False)
    return root


@pytest.mark.parametrize("path", CONFIGS)
def test_every_task_takes_the_config(path, datasets, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    overrides = [*TINY_RUN, *CONFIGS[path], "train.device=cpu"]
    words = ["--tasks", *stock_analyze_model.TASKS, "--config-file", str(ROOT / path)]
    found = stock_analyze_model.main([*words, "--num-inputs", "1", *overrides])

    cfg = apply_overrides(load_config(str(ROOT / path)), overrides)
    model = instantiate(cfg.model).eval()
    images = torch.zeros(1, 3, *cfg.dataloader.image_size)
    multiply_adds = by_operator(found["flop"])["conv"] * 1e9
    assert multiply_adds == pytest.approx(count_flops(model, images).by_operator["conv"])
    assert by_operator(found["activation"])["conv"] > 0
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"| model | {millions:.1f}M |" in re.sub(" +", " ", found["parameter"])
    assert found["structure"] == str(model)


def by_operator(text: str) -> dict[str, float]:
    (line,) = re.findall(r"by operator \(.\): (.*)", text)
    return {name: float(count) for name, count in re.findall(r"'([\w:]+)': ([\d.e-]+)", line)}

"""The study in projects/latency_budget, a script that nothing imports, at a tiny scale."""

import json
import runpy
from types import SimpleNamespace

import pytest
import torch

from dset_d2.tools.common import build_model, read_config

from ..test_configs import ROOT
from .test_detector import TINY


@pytest.fixture(scope="module")
def script():
    return SimpleNamespace(**runpy.run_path(str(ROOT / "projects/latency_budget/evaluate.py")))


def test_the_study_from_trained_weights_to_its_tables(script, tmp_path, capsys):
    torch.manual_seed(0)
    folder = tmp_path / "supernet_0"
    folder.mkdir()
    model = build_model(read_config(script.CONFIG, TINY, "cpu"))
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "metrics.json").write_text(json.dumps({"iteration": 1, "bbox/AP": 0.0}))
    options = "--train 2 --frames 6 --held-out 3 --size 96 160 --seeds 0 --rounds 1 --budgets 2"
    command = [*options.split(), "--grpo-steps", "3", "--device", "cpu"]
    script.main([*command, "--output", str(tmp_path), *TINY])
    assert "quality and AP agree in rank" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    who = {"static", "random", "regression", "GRPO", "GRPO, notes", "oracle", "full"}
    assert {row["who"] for row in results["rows"]} == who
    assert len(results["rows"]) == 3 * len(who)  # two seen budgets and one between
    by_who = {(row["who"], row["budget"]): row for row in results["rows"]}
    for (name, budget), row in by_who.items():
        assert row["measured_ms"] > 0 and 0 <= row["score"] <= 100
        if name != "full":
            assert row["quality"] <= by_who["oracle", budget]["quality"] + 1e-6
    assert len(json.loads((folder / "quality" / "grpo.json").read_text())) == 3
    for name in ("tables.txt", "tradeoff.png", "grpo.png", "table.json"):
        assert (tmp_path / name).stat().st_size


def test_controls_are_trained_for_one_setting_each(script, tmp_path):
    args = script.parse(["--output", str(tmp_path), "--seeds", "3", "--controls", "3"])
    runs = script.runs_of(args)
    assert list(runs) == ["supernet", "sandwich", *script.SEPARATE]
    for name, (scale, knobs) in script.SEPARATE.items():
        cfg = read_config(runs[name][0].config_file, runs[name][0].overrides, "cpu")
        assert {k: list(cfg.model.supernet[k]) for k in knobs} == {k: [v] for k, v in knobs.items()}
        assert list(cfg.dataloader.image_size) == [256 * scale, 448 * scale // 32 * 32]
        assert cfg.model.multi_scale == [] and cfg.train.seed == 3
    with pytest.raises(SystemExit):
        script.parse(["--output", str(tmp_path), "--controls", "3"])

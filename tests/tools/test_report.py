"""Reports of runs whose files are written here: no run is trained."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

import dset_d2
from dset_d2.analysis import count_flops
from dset_d2.config import apply_overrides
from dset_d2.synthetic import write_dataset
from dset_d2.tools import report

from ..conftest import NARROW

SPARSE = "projects/dset/configs/dset_r18_roadside.py"


def write_metrics(folder: Path, experts: int = 4) -> None:
    """Three evaluations, the second of which is the best."""
    rows = []
    for step in range(1, 31):
        row = {"iteration": step - 1, "total_loss": 30 - step / 2, "epoch": step / 10, "time": 0.5}
        row |= {"loss_bbox": 10 - step / 6, "loss_vfl_aux_0": 20 - step / 3, "lr": 1e-4}
        row |= {f"moe/encoder_0_0/usage_{i}": 1 / experts for i in range(experts)}
        row["pruning/encoder_0/keep_ratio"] = 1 - step / 100
        if step % 10 == 0:
            ap = {10: 20.0, 20: 31.0, 30: 30.0}[step]
            row |= {"bbox/AP": ap, "bbox/AP50": ap + 20, "bbox/AP75": ap / 2, "bbox/APl": math.nan}
            row |= {"bbox/AP-Car": ap + 1, "validation/total_loss": 40 - step}
        rows.append(json.dumps(row))
    (folder / "metrics.json").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A small data set, and a run's folder with random weights."""
    root = tmp_path_factory.mktemp("report")
    write_dataset(root, num_train=1, num_val=2, height=96, width=160, seed=3, progress=False)
    (root / "run").mkdir()
    write_metrics(root / "run")
    torch.manual_seed(0)
    model = instantiate(config(root / "run").model)
    torch.save({"model": model.state_dict()}, root / "run" / "model_best.pth")
    return root


def config(folder: Path):
    options = [*NARROW, "dataloader.image_size=[64,96]", "model.encoder.pruning.min_tokens=2"]
    options += [f"train.output_dir={folder}", "train.device=cpu"]
    return apply_overrides(dset_d2.get_config(SPARSE), options)


@pytest.fixture
def run(root, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return shutil.copytree(root / "run", tmp_path / "run")


def test_report_of_a_run(run):
    cfg = config(run)
    report.write_report(cfg, SPARSE, ["model.encoder.pruning.min_tokens=2"])
    found = json.loads((run / "report.json").read_text())
    assert found["missing"] == []
    assert [found[x] for x in ("AP", "AP50", "AP75")] == [31, 51, 15.5]
    assert (found["best_step"], found["best_epoch"], found["steps"]) == (20, 2, 30)
    assert found["per_class"] == {"Car": 32} and found["metrics"]["bbox/APl"] is None
    assert found["expert_usage"] == {"encoder_0_0": [0.25] * 4}
    assert found["keep_ratio"] == {"encoder_0": 0.7}

    model = report.load_best(cfg, run)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < found["active_parameters"] < found["parameters"]
    mapper = instantiate(cfg.dataloader.test.mapper)
    flops = [count_flops(model, [mapper(x)]) for x in report.test_images(cfg)]
    assert found["macs"] == pytest.approx(sum(x.total for x in flops) / 2)
    parts = found["macs_by_part"]
    assert parts["encoder.encoder.0.layers.0.ffn"] > 0 and parts["encoder.encoder.0.pruner"] > 0
    assert found["images_per_second"] == pytest.approx(1 / found["latency"]["median"])

    text = (run / "report.md").read_text()
    for part in (
        "| Car",
        "usage of experts, encoder_0_0",
        "keep_ratio",
        "model_best.pth",
        "by bbox/AP50, after step 20, epoch 2.0",
    ):
        assert part in text
    pictures = {path.stem for path in run.glob("report_*.*") if Image.open(path).size[0] >= 160}
    wanted = ("curves", "detections_1", "detections_2", "experts", "kept_encoder_0")
    layers = ("encoder_0_0", "decoder_0", "decoder_1", "decoder_2")
    wanted += tuple(f"expert_{layer}" for layer in layers)
    assert pictures == {f"report_{x}" for x in wanted}
    assert found["generated_scenes"] and "no published figure" in text


def test_curves_tell_experts_and_kinds_apart(run):
    write_metrics(run, experts=12)
    panels = report.panels_of(report.curves_in(run))
    experts = panels["usage of experts, encoder_0_0"]
    assert list(experts) == [f"expert {i}" for i in range(12)]
    assert panels["training loss by kind"].keys() == {"box", "aux"}
    assert panels["loss"].keys() == {"training", "validation"}
    assert list(panels["bbox, %"]["AP50"].values()) == [40, 51, 50]
    assert panels["keep ratio"]["encoder_0"][29] == pytest.approx(0.7)


def test_what_fails_is_left_out_with_a_warning(run, caplog):
    (run / "model_best.pth").write_bytes(b"damaged")
    report.write_report(config(run), SPARSE, [])
    found = json.loads((run / "report.json").read_text())
    assert found["AP"] == 31 and "macs" not in found and len(found["missing"]) == 1
    assert "the report lacks load_best" in caplog.text and "Missing: load_best" in (
        (run / "report.md").read_text()
    )
    shutil.rmtree(run)
    run.write_text("a file where the folder was")
    report.write_report(config(run), SPARSE, [])
    assert "no report: " in caplog.messages[-1]


def test_published_figures_are_of_the_true_data_set_alone():
    names = ["dair_v2x_i_val"]
    rows = {row["model"]: row for row in report.published({"generated_scenes": False}, names)}
    assert rows["DSET-R34"] == {"model": "DSET-R34", "AP": 59.6, "AP50": 81.85, "AP75": 67.66}
    assert not report.published({"generated_scenes": True}, names)
    assert not report.published({}, names)  # its images were not found
    assert not report.published({"generated_scenes": False}, ["coco_2017_val"])
    about = {"run": "x", "overrides": [], "config": "c.py", "settings": {}, "seconds": 1}
    about |= {"missing": [], "published": list(rows.values())}
    text = "\n".join(report.sections(about, Path(__file__).parent))
    assert "not of this run" in text and "|  81.85 |" in text


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_several_runs_in_one_table(run, tmp_path, capsys):
    values = {"AP": 40.04, "AP50": None, "parameters": 20_100_000, "macs": 29.8e9}
    values |= {"images_per_second": 4.04, "device": "a GPU"}
    (run / "report.json").write_text(json.dumps(values))
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    for folder in (plain, killed):
        folder.mkdir()
    write_metrics(plain)
    (plain / "config.yaml").write_text("train: {best_metric: bbox/AP50}")
    options = ["--output", str(tmp_path / "out/runs.md"), "--json", str(tmp_path / "runs.json")]
    report.main([str(run), str(plain), str(killed), *options])
    out, err = capsys.readouterr()
    table = out.splitlines()
    assert cells(table[2]) == [str(run), "40.0", "", "", "20.10", "", "29.80", "4.0"]
    assert cells(table[3]) == [str(plain), "31.0", "51.0", "15.5", "", "", "", ""]
    assert cells(table[4]) == [str(killed), *[""] * 7]
    assert "on a GPU" in table[-1] and f"{killed}/metrics.json: cannot be read" in err
    assert (tmp_path / "out/runs.md").read_text() == out
    rows = json.loads((tmp_path / "runs.json").read_text())
    assert rows[0]["macs"] == 29.8e9 and rows[1]["macs"] is None


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "report.json: Expecting"),
        ("[1]", "report.json: not a report"),
        ('{"AP": "high"}', "report.json: AP is 'high', not a number"),
    ],
)
def test_broken_reports_are_named(run, content, message, capsys):
    (run / "report.json").write_text(content)
    report.main([str(run)])
    out, err = capsys.readouterr()
    assert message in err and cells(out.splitlines()[2])[:2] == [str(run), "31.0"]


def test_a_config_runs_no_code(run, capsys):
    (run / "config.yaml").write_text(f"a: !!python/object/apply:os.mkdir ['{run}/made']")
    report.main([str(run)])
    assert f"{run}/config.yaml: " in capsys.readouterr().err and not (run / "made").exists()


def test_wrong_folders_and_outputs_are_refused(run, tmp_path, capsys):
    for arguments, message in (
        ([tmp_path / "no"], "no: no such folder"),
        ([run, "--output", run / "metrics.json"], "would replace the input"),
    ):
        with pytest.raises(SystemExit) as stop:
            report.main([str(x) for x in arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err

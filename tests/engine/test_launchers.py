"""Whole runs: through Detectron2's launcher and through ours, killed, resumed, poisoned."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dset_d2.engine.optimizer import flat_cosine
from dset_d2.synthetic import write_dataset

from ..conftest import TINY_RUN, run_python

ROOT = Path(__file__).parents[2]
DENSE = "configs/rtdetr/rtdetrv2_r18_roadside.py"
SPARSE = "projects/dset/configs/dset_r18_roadside.py"
SUPERNET = "projects/latency_budget/configs/vit_moe_roadside.py"
TINY = [
    *TINY_RUN,
    "model.decoder.num_denoising=10",
    "dataloader.strong_augmentation_end=4",
    "lr_multiplier.warmup_iters=4",
]
REPORTED = ["train.report=true", "train.validation_loss=true"]
OURS = ["-m", "dset_d2.tools.lazyconfig_train_net"]
STOCK = [str(Path(__file__).with_name("stock_launcher.py"))]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("datasets")
    write_dataset(root, num_train=8, num_val=4, height=96, width=160, seed=1)
    return root


def command(launcher, output: Path, *options: str, config: str = DENSE) -> list[str]:
    """Words after ``python``."""
    flags = [option for option in options if option.startswith("--")]
    overrides = [option for option in options if not option.startswith("--")]
    own = [*TINY, f"train.output_dir={output}"]
    return [*launcher, "--config-file", config, *flags, *own, *overrides]


def environment(datasets: Path) -> dict[str, str]:
    return os.environ | {"DETECTRON2_DATASETS": str(datasets)}


def run(
    datasets: Path, launcher, output: Path, *options: str, config: str = DENSE
) -> subprocess.CompletedProcess:
    words = command(launcher, output, *options, config=config)
    return run_python(words, cwd=ROOT, env=environment(datasets))


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def losses(output: Path) -> dict[int, dict]:
    return {m["iteration"]: m for m in metrics(output) if "total_loss" in m}


def test_stock_launcher_trains_resumes_and_evaluates(datasets, tmp_path):
    """A supernet, whose settings belong to the model."""
    shape = ["model.backbone.vit={embed_dim:32,depth:8,num_heads:2}"]
    options = [*shape, "model.backbone.adapter.in_channels=32"]
    options += ["model.supernet.sampling=sandwich"]

    def launch(*given: str) -> subprocess.CompletedProcess:
        result = run(datasets, STOCK, tmp_path, *options, *given, config=SUPERNET)
        assert result.returncode == 0, result.stderr[-2000:]
        return result

    periods = ["train.eval_period=4", "train.checkpointer.period=4"]
    launch("train.max_iter=4", *periods)
    launch("--resume", "train.max_iter=6", *periods)
    assert sorted(losses(tmp_path)) == [0, 1, 2, 3, 4, 5]
    assert all(row["loss_distillation"] > 0 for row in losses(tmp_path).values())
    assert any("bbox/AP50" in m for m in metrics(tmp_path))
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert int(state["model"]["clock.steps"]) == 6
    result = launch("--eval-only", f"train.init_checkpoint={tmp_path}/model_final.pth")
    assert "copypaste: Task: bbox" in result.stdout


def check_console(stdout: str, folder: Path) -> None:
    """Every log period and evaluation has a line; what else there is to say is in the log file."""
    lines = stdout.splitlines()
    steps = [line for line in lines if "  step " in line]
    assert len(steps) == 6 and "step 6/40  " in steps[-1] and "  epoch " in steps[-1]
    for part in ("loss", "class", "box", "iou", "denoising", "aux", "lr", "ETA"):
        assert f"  {part} " in steps[-1]
    assert sum("bbox: AP " in line for line in lines) == 3
    assert sum("validation: loss " in line for line in lines) == 3
    assert max(map(len, lines)) <= 170 and len(lines) < 35
    log = (folder / "log.txt").read_text()
    assert all(line.partition("  ")[2] in log for line in steps)
    for text in ("Environment:", "DETRDetector(", "Average Recall", "Per-category", "copypaste"):
        assert text in log and text not in stdout
    assert "\x1b" not in log and "\x1b" not in stdout


def check_report(folder: Path) -> None:
    """Its numbers are those of the files; all its pictures are there."""
    report = json.loads((folder / "report.json").read_text())
    assert (report["best_step"], report["steps"], report["missing"]) == (2, 6, [])
    best = next(m for m in metrics(folder) if m["iteration"] == 1)
    assert [report[x] for x in ("AP", "AP50")] == [best["bbox/AP"], best["bbox/AP50"]]
    assert report["validation_loss"] == metrics(folder)[-1]["validation/total_loss"]
    weights = torch.load(folder / "model_best.pth", weights_only=True)["ema"]["module"]
    assert (
        0
        < report["active_parameters"]
        <= report["parameters"]
        < sum(x.numel() for x in weights.values())
    )
    assert report["macs"] > report["macs_by_part"]["backbone"] > 0 < report["images_per_second"]
    assert report["generated_scenes"] and not report["published"]
    pictures = {path.stem for path in folder.glob("report_*.*")}
    assert pictures == {"report_curves", *(f"report_detections_{i}" for i in (1, 2, 3))}
    text = (folder / "report.md").read_text()
    assert all(f"]({path.name})" in text for path in folder.glob("report_*.*"))
    assert all(path.name in text for path in folder.glob("*.pth"))


def optimizer_steps(state: dict) -> set[int]:
    return {int(p["step"]) for p in state["trainer"]["optimizer"]["state"].values()}


def test_killed_run_resumes_exactly(datasets, tmp_path):
    """SIGKILL in the middle of a sparse model's training; the rest equals a run that was never
    killed, but for the data."""
    options = ["train.max_iter=12", "train.eval_period=100", "train.checkpointer.period=3"]
    options += ["model.encoder.pruning.min_tokens=2", "model.encoder.pruning.end_step=10"]
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *command(OURS, tmp_path, *options, config=SPARSE)],
        env=environment(datasets),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "model_0000005.pth").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = (tmp_path / "last_checkpoint").read_text()
    saved = torch.load(tmp_path / last, weights_only=True)
    step = saved["iteration"] + 1
    assert step < 12
    assert int(saved["model"]["clock.steps"]) == saved["ema"]["updates"] == step
    assert optimizer_steps(saved) == {step}

    result = run(datasets, OURS, tmp_path, "--resume", *options, config=SPARSE)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"Starting training from iteration {step}" in result.stdout
    logged = losses(tmp_path)
    assert sorted(logged) == list(range(12))
    schedule = flat_cosine(max_iter=12, warmup_iters=4, flat=0.6, floor=0.01)
    expected = [8e-4 * schedule(i / 12) for i in range(12)]
    assert [logged[i]["lr"] for i in range(12)] == pytest.approx(expected)
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert int(state["model"]["clock.steps"]) == state["ema"]["updates"] == 12
    assert optimizer_steps(state) == {12}


def test_best_checkpoint_and_early_stopping(datasets, tmp_path):
    """An average that stays at the first weights never improves: two evaluations later is the end.

    Its BatchNorm statistics stay, too, which would move the metric even at a rate of 0.
    """
    options = [
        "train.ema.decay=0.99999999",
        "train.ema.warmup=0.001",
        "train.max_iter=40",
        "train.eval_period=2",
        "train.early_stopping_patience=2",
        "train.best_metric=bbox/AP",
    ]
    result = run(datasets, OURS, tmp_path, *options, *REPORTED)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr == ""
    check_console(result.stdout, tmp_path)
    check_report(tmp_path)
    assert "Stopping early: bbox/AP did not rise" in result.stdout
    assert max(losses(tmp_path)) == 5
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best["iteration"] == 1 and best["ema"]["updates"] == 2
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"

    (tmp_path / "model_final.pth").rename(tmp_path / "model_0000005.pth")  # killed before its end
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    result = run(datasets, OURS, tmp_path, "--resume", *options)
    assert result.returncode == 0 and "patience is used up" in result.stdout
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 5
    assert max(losses(tmp_path)) == 5
    result = run(datasets, OURS, tmp_path, "--resume", *options, "train.early_stopping_patience=3")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Starting training from iteration 6" in result.stdout
    assert max(losses(tmp_path)) == 7

    # A new run starts from the averaged weights, at step 0.
    options = [f"train.init_checkpoint={tmp_path}/model_best.pth", "train.max_iter=1"]
    options += ["optimizer.lr=0", "train.eval_period=1", "train.early_stopping_patience=1"]
    result = run(datasets, OURS, tmp_path / "next", *options)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "No metric" not in result.stdout
    state = torch.load(tmp_path / "next" / "model_final.pth", weights_only=True)["model"]
    assert int(state["clock.steps"]) == 1
    name = "decoder.enc_score_head.weight"
    assert torch.equal(state[name], best["ema"]["module"][name])
    assert not torch.equal(state[name], best["model"][name])


def check_usage_error(result: subprocess.CompletedProcess, *wanted: str) -> None:
    assert result.returncode == 2 and "Traceback" not in result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and all(text in error for text in wanted)


def test_non_finite_loss_stops_and_is_named(datasets, tmp_path):
    result = run(datasets, OURS, tmp_path, "model.criterion.weights.giou=nan", "train.max_iter=3")
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert "FloatingPointError: training stops at iteration 0: losses not finite" in error
    assert "loss_giou" in error and "loss_bbox" not in error
    assert not list(tmp_path.glob("*.pth"))


def test_misspelt_override_stops_before_anything(datasets, tmp_path):
    result = run(datasets, OURS, tmp_path / "out", "model.decoder.num_querys=3")
    check_usage_error(result, "model.decoder.num_queries")
    assert not (tmp_path / "out").exists()

"""Length, batch and data set in one place; a named checkpoint; a trial; torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dset_d2
from dset_d2.clock import TrainingClock
from dset_d2.config import apply_overrides
from dset_d2.tools import lazyconfig_train_net
from dset_d2.tools.common import UsageError
from dset_d2.tools.preparation import fit_schedules

from .test_launchers import OURS, ROOT, TINY, datasets, environment  # noqa: F401

DSET = "projects/dset/configs/dset_r18_dair_v2x.py"
DINO = "projects/dfine_dinov3/configs/dfine_dinov3_s_coco.py"


def steps(config: str, *overrides: str, images: int | None = None) -> dict[str, int]:
    """What a config schedules, by key."""
    cfg = apply_overrides(dset_d2.get_config(config), list(overrides))
    fit_schedules(cfg, range(images) if images else None)
    keys = {
        "length": cfg.train.max_iter,
        "evaluation": cfg.train.eval_period,
        "checkpoint": cfg.train.checkpointer.period,
        "warm-up": cfg.lr_multiplier.warmup_iters,
        "augmentation": cfg.dataloader.strong_augmentation_end,
        "rate": cfg.optimizer.params.base_lr,
    }
    if config == DSET:
        keys["pruning"] = cfg.model.encoder.pruning.end_step
    else:
        keys["multi-scale"] = cfg.model.multi_scale_end
        keys["phase B"] = cfg.model.backbone.freeze.unfreeze_step
    return keys


def test_every_schedule_follows_length_batch_and_data_set():
    epoch = 5042 // 16
    own = steps(DSET)
    assert own == {
        "length": 100 * epoch,
        "evaluation": epoch,
        "checkpoint": epoch,
        "warm-up": 3 * epoch,
        "augmentation": 90 * epoch,
        "pruning": 10 * epoch,
        "rate": 1e-4,
    }
    short = steps(DSET, "train.epochs=20")
    assert short["length"] == 20 * epoch and short["evaluation"] == epoch
    assert short["pruning"] == 2 * epoch and short["augmentation"] == 18 * epoch
    # 64 frames in batches of 8: epochs of eight steps.
    small = steps(DSET, "train.epochs=20", "dataloader.train.total_batch_size=8", images=64)
    assert small["length"] == 160 and small["evaluation"] == small["checkpoint"] == 8
    assert small["pruning"] == 16 and small["warm-up"] == 5
    by_steps = steps(DSET, "train.max_iter=200")
    assert by_steps["pruning"] == 20 and by_steps["augmentation"] == 180

    phases = steps(DINO, "train.epochs=10", images=320)  # in batches of 32
    assert phases["length"] == 100 and phases["phase B"] == 10 and phases["multi-scale"] == 90


def test_rate_scales_with_the_batch_where_that_is_asked_for(caplog):
    batch = "dataloader.train.total_batch_size=32"
    assert steps(DSET, batch)["rate"] == 1e-4
    assert steps(DSET, batch, "train.lr_batch_size=16")["rate"] == pytest.approx(2e-4)
    cfg = apply_overrides(dset_d2.get_config(DSET), [batch, "train.lr_batch_size=16"])
    fit_schedules(cfg, None)
    fit_schedules(cfg, None)  # a saved config that is run again
    assert cfg.optimizer.lr == pytest.approx(2e-4)


def test_schedules_that_outlast_the_run_are_named(caplog):
    steps(DSET, "train.epochs=1")
    assert "before its schedules" not in caplog.text
    late = ["lr_multiplier.warmup_iters=400", "model.encoder.pruning.end_step=500"]
    steps(DSET, "train.epochs=1", *late)
    assert "lr_multiplier.warmup_iters=400" in caplog.text
    assert "model.encoder.pruning.end_step=500" in caplog.text
    place = "model.backbone.pruning.0.end_step=99999999"
    steps("projects/dset/configs/dset_dinov3_s_coco.py", place)
    assert place in caplog.text


def test_parts_of_a_batch_are_checked_before_data_are_read():
    with pytest.raises(UsageError, match="train.accumulate: .*16 images has no 3 equal parts"):
        steps(DSET, "train.accumulate=3")


@pytest.mark.parametrize("value", ["${part_of_run:2,1}", "${part_of_run:-1,4}"])
def test_part_beyond_the_run(value):
    cfg = dset_d2.get_config(DSET)
    cfg.train.eval_period = value
    with pytest.raises(Exception, match="must satisfy 0 <= done <= whole"):
        _ = cfg.train.eval_period


def launch(folder: Path, *options: str) -> None:
    flags = [option for option in options if option.startswith("--")]
    overrides = [option for option in options if not option.startswith("--")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazyconfig_train_net, "set_up_logs", lambda *_: None)
        own = [*TINY, f"train.output_dir={folder}", "train.device=cpu"]
        lazyconfig_train_net.run(["--config-file", DSET, *flags, *own, *overrides])


@pytest.fixture
def scenes(datasets, monkeypatch) -> Path:  # noqa: F811
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    return datasets


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_epochs_are_true_and_a_checkpoint_of_another_run_goes_on(scenes, tmp_path, capsys):
    """Eight frames in batches of four, computed two by two: two steps are an epoch."""
    options = ["dataloader.train.total_batch_size=4", "train.accumulate=2", "train.epochs=2"]
    options += ["train.ema.enabled=false", "model.encoder.pruning.min_tokens=2"]
    launch(tmp_path / "a", *options)
    lines = {m["iteration"]: m for m in metrics(tmp_path / "a")}
    assert [lines[i]["epoch"] for i in range(4)] == [0.5, 1, 1.5, 2]
    assert [i for i in lines if "bbox/AP" in lines[i]] == [1, 3]
    saved = dset_d2.config.load_config(str(tmp_path / "a" / "config.yaml"))
    assert saved.train.images == 8 and saved.train.max_iter == 4

    checkpoint = tmp_path / "a" / "model_0000001.pth"
    launch(tmp_path / "b", *options, f"train.resume_from={checkpoint}")
    lines = {m["iteration"]: m for m in metrics(tmp_path / "b")}
    assert sorted(lines) == [2, 3]
    state = torch.load(tmp_path / "b" / "model_final.pth", weights_only=True)
    assert int(state["model"]["clock.steps"]) == 4
    assert {s["step"].item() for s in state["trainer"]["optimizer"]["state"].values()} == {4}
    assert (tmp_path / "b" / "model_best.pth").exists()

    best = tmp_path / "a" / "model_best.pth"
    for options, wanted in [
        ((tmp_path / "c", f"train.resume_from={best}"), "holds weights alone"),
        ((tmp_path / "a", "--overwrite", f"train.resume_from={best}"), "--overwrite removes it"),
        ((tmp_path / "c", f"train.resume_from={tmp_path}/x.pth"), "no such checkpoint"),
    ]:
        with pytest.raises(SystemExit):
            launch(*options)
        assert wanted in capsys.readouterr().err
    assert best.exists()


def test_check_tries_a_run_and_writes_nothing(scenes, tmp_path, capsys):
    launch(tmp_path / "run", "--check", "train.epochs=3", "train.eval_period=0")
    found = capsys.readouterr().out
    for text in ("8 images for training", "weights: random", "12 steps, 3.0 epochs", "bbox/AP is"):
        assert text in found, found
    assert "images/s (the training's own), a step uses" in found
    assert "raise dataloader.train.num_workers" in found  # TINY has no workers
    assert not (tmp_path / "run").exists()
    assert TrainingClock._leader is not None  # a step was really made


def torchrun(folder: Path, root: Path, *options: str) -> subprocess.CompletedProcess:
    run = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    own = [*TINY, f"train.output_dir={folder}", "train.device=cpu", "train.epochs=0.5"]
    return subprocess.run(
        [*run, "--nproc_per_node=2", *OURS, "--config-file", DSET, *options, *own],
        env=environment(root) | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_torchrun(datasets, tmp_path, capsys, monkeypatch):  # noqa: F811
    result = torchrun(tmp_path, datasets)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [m["iteration"] for m in metrics(tmp_path) if "total_loss" in m] == [0, 1]
    config = dset_d2.config.load_config(str(tmp_path / "config.yaml"))
    assert config.dataloader.train.total_batch_size == 2  # an image for each process

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("TORCHELASTIC_RUN_ID", "7")  # as torchrun tells its processes
        launch(tmp_path / "other", "--num-gpus=2")
    assert "torchrun starts the processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(SystemExit):
        launch(tmp_path / "other")
    assert "WORLD_SIZE=8, but no group of processes" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "other")

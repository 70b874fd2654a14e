"""What a run leaves in its folder: refused, resumed, extended, replaced, and errors in one line."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from multiprocessing.synchronize import Event
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.datasets import register_coco_instances

import dset_d2
from dset_d2.engine import checkpointer, hooks
from dset_d2.engine.checkpointer import AtomicCheckpointer
from dset_d2.engine.folder import claimed
from dset_d2.engine.hooks import BestCheckpointer
from dset_d2.tools import lazyconfig_train_net, preparation
from dset_d2.tools.common import UsageError
from dset_d2.tools.preparation import check_data_set_names

from ..conftest import IMPORTED
from .test_launchers import TINY

CONFIG = "configs/rtdetr/rtdetrv2_r18_custom.py"
SETTINGS = [
    *TINY,
    "train.max_iter=2",
    "train.eval_period=2",
    "train.checkpointer.period=1",
    "train.checkpointer.max_to_keep=2",
    "train.device=cpu",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two noisy images and a COCO file of them, registered as ``launcher_images``."""
    folder = tmp_path_factory.mktemp("images")
    entries, boxes = [], []
    for i in range(2):
        noise = np.random.default_rng(i).integers(256, size=(64, 96, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), noise)
        entries.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 96})
        box = {"bbox": [20, 10, 40, 30], "area": 1200, "iscrowd": 0, "category_id": i + 1}
        boxes.append({"id": i + 1, "image_id": i, **box})
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}]
    content = {"images": entries, "annotations": boxes, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    register_coco_instances("launcher_images", {}, str(folder / "coco.json"), str(folder))
    # The first image alone, and other classes.
    content["images"], content["annotations"] = entries[:1], boxes[:1]
    (folder / "one.json").write_text(json.dumps(content))
    register_coco_instances("launcher_one", {}, str(folder / "one.json"), str(folder))
    content["categories"] = categories[:1]
    (folder / "cars.json").write_text(json.dumps(content))
    register_coco_instances("launcher_cars", {}, str(folder / "cars.json"), str(folder))
    return folder


def launch(folder: Path, *options: str) -> None:
    """Our launcher in this process."""
    flags = [option for option in options if option.startswith("--")]
    overrides = [option for option in options if not option.startswith("--")]
    data = [f"dataloader.{part}.dataset.names=launcher_images" for part in ("train", "test")]
    command = ["--config-file", CONFIG, *flags, *SETTINGS, *data, f"train.output_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        # Its handlers would write to the streams of a test that is over.
        patch.setattr(lazyconfig_train_net, "set_up_logs", lambda *_: None)
        lazyconfig_train_net.run([*command, *overrides])


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    launch(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A finished run of two steps, two checkpoints and one evaluation."""
    return shutil.copytree(finished, tmp_path / "run")


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What identifies the files of a run."""
    files = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in files.items()}


def refused(capsys, *arguments) -> str:
    """The one line that a command ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        launch(*arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_final_evaluation_is_in_the_final_checkpoint(finished):
    assert [m["iteration"] for m in metrics(finished) if "bbox/AP" in m] == [1]
    best = read(finished / "model_final.pth")["trainer"]["hooks"]["BestCheckpointer"]
    assert best["best_iter"] == 1 and best["best_metric"] >= 0
    assert read(finished / "model_best.pth")["iteration"] == 1


def test_finished_run_is_left_as_it_is(folder, caplog):
    caplog.set_level("INFO")
    before = {k: v for k, v in identities(folder).items() if k.endswith(".pth")}
    lines = len(metrics(folder))
    launch(folder, "--resume")
    assert "This run is finished after 2 steps" in caplog.text
    assert {k: v for k, v in identities(folder).items() if k.endswith(".pth")} == before
    assert len(metrics(folder)) == lines


def test_extended_run_remembers_the_best_and_takes_new_rates(folder, caplog):
    """More checkpoints than shall be kept, as kills leave them, and half of one."""
    for name in ("model_0000000.pth.tmp", "model_0000009.pth"):
        (folder / name).write_bytes(b"")
    os.utime(folder / "model_0000009.pth", (0, 0))
    best = identities(folder)["model_best.pth"]
    state = read(folder / "model_final.pth")
    state["trainer"]["hooks"]["BestCheckpointer"]["best_metric"] = 99.0
    torch.save(state, folder / "model_final.pth")
    launch(
        folder, "--resume", "train.max_iter=4", "optimizer.lr=1e-5", "optimizer.weight_decay=0.5"
    )
    assert identities(folder)["model_best.pth"] == best
    assert "initial_lr 0.0001 -> 1e-05" in caplog.text
    groups = read(folder / "model_final.pth")["trainer"]["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert {group["initial_lr"] for group in groups} == {1e-5}
    rates = [m["lr"] for m in metrics(folder) if "lr" in m]
    assert len(rates) == 4 and max(rates[2:]) <= 1e-5 < min(rates[1:2])
    names = sorted(path.name for path in folder.glob("model_*"))
    kept = ["model_0000002.pth", "model_0000003.pth"]
    assert names == [*kept, "model_best.pth", "model_final.pth"]


def test_run_is_neither_replaced_nor_started_by_mistake(folder, capsys):
    before = identities(folder)
    error = refused(capsys, folder)
    assert f"{folder} holds a run: --resume goes on with it, --overwrite replaces it" in error
    assert identities(folder) == before
    error = refused(capsys, folder.with_name("rum"), "--resume")
    assert "rum holds no run to resume; close to it: run" in error
    assert not folder.with_name("rum").exists()


def test_run_that_fails_at_its_first_step_leaves_the_config(folder):
    before = identities(folder)
    options = ["--resume", "train.max_iter=9", "model.criterion.weights.giou=nan"]
    with pytest.raises(FloatingPointError):
        launch(folder, *options)
    after = identities(folder)
    assert after["config.yaml"] == before["config.yaml"]
    assert {k for k in after if k.endswith(".pth")} == {k for k in before if k.endswith(".pth")}


def test_overwriting_begins_anew(folder):
    (folder / "model_0000007.pth").write_bytes(b"")
    (folder / "notes.txt").write_text("the user's")
    launch(folder, "--overwrite", "train.max_iter=1")
    assert [m["iteration"] for m in metrics(folder)] == [0]
    assert not (folder / "model_0000007.pth").exists() and (folder / "notes.txt").exists()


def test_run_without_a_checkpoint_starts_anew_when_resumed(folder, caplog):
    for path in (*folder.glob("model_*"), folder / "last_checkpoint"):
        path.unlink()
    launch(folder, "--resume", "train.max_iter=1")
    assert "the run has no checkpoint yet; it starts anew" in caplog.text
    assert [m["iteration"] for m in metrics(folder)] == [0]


def hold(folder: Path, ready: Event) -> None:
    with claimed(folder, False, False):
        ready.set()
        time.sleep(99)


def test_two_runs_at_once(tmp_path, images, capsys):
    ready = IMPORTED.Event()
    other = IMPORTED.Process(target=hold, args=(tmp_path, ready))
    other.start()
    try:
        assert ready.wait(300)
        error = refused(capsys, tmp_path)
        assert f"{tmp_path}: process {other.pid} is writing a run here" in error
    finally:
        other.kill()
        other.join()
    with claimed(tmp_path, False, False):  # what died holds no lock
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_full_disk_ends_in_one_line(folder, capsys, monkeypatch):
    def save(data: dict, file) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = identities(folder)
    monkeypatch.setattr(checkpointer.torch, "save", save)
    error = refused(capsys, folder, "--resume", "train.max_iter=9", "train.eval_period=9")
    assert f"{folder}/model_0000002.pth: No space left on device" in error
    after = identities(folder)
    assert {k: v for k, v in after.items() if ".pth" in k} == {
        k: v for k, v in before.items() if ".pth" in k
    }
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_what_is_wrong_is_named_before_the_first_step(tmp_path, images, finished, capsys):
    (tmp_path / "page.pth").write_text("<html></html>")
    names = "dataloader.test.dataset.names"
    wrong = {
        "train.max_iter=abc": "train.max_iter is a number, as 2",
        f"{names}=launcher_image": "'launcher_image': set json_file and image_root, or names to a "
        "registered one's; close to it: launcher_images",
        "train.best_metric=bbox/AP5": "train.best_metric='bbox/AP5' is no metric; "
        "close to it: bbox/AP75, bbox/AP50, bbox/AP",
        "model.encoder.in_features=[res3,res4,res6]": "in_features='res6' is not one of "
        "['res3', 'res4', 'res5']",
        f"train.init_checkpoint={finished}/model_bst.pth": "model_bst.pth: no such checkpoint; "
        "close to it: model_best.pth",
        f"train.init_checkpoint={finished}": f"did you mean {finished}/model_best.pth?",
        f"train.init_checkpoint={tmp_path}/page.pth": "a web page, not a checkpoint",
    }
    for override, message in wrong.items():
        error = refused(capsys, tmp_path / "new", override)
        assert message in error, error
        assert override.split("=")[0].split(".")[0] in error
    assert not list((tmp_path / "new").glob("*.pth"))


def test_several_test_sets_are_evaluated_each(tmp_path, images, capsys):
    names = "dataloader.test.dataset.names=[launcher_one,launcher_images]"
    error = refused(capsys, tmp_path, names)
    assert "train.best_metric='bbox/AP' is no metric; there is: launcher_images/bbox/AP, " in error
    assert "launcher_one/bbox/AP" in error
    error = refused(capsys, tmp_path, "dataloader.test.dataset.names=[launcher_one,launcher_cars]")
    assert "'launcher_cars' and 'launcher_one' must have the same categories" in error

    launch(tmp_path, names, "train.best_metric=launcher_one/bbox/AP50")
    (last,) = (m for m in metrics(tmp_path) if "launcher_one/bbox/AP" in m)
    assert {"launcher_images/bbox/AP50", "launcher_one/bbox/AP-car"} <= set(last)
    assert "bbox/AP" not in last
    best = read(tmp_path / "model_best.pth")["best"]["best_metric"]
    assert best == pytest.approx(last["launcher_one/bbox/AP50"])
    for name, count in (("launcher_one", 1), ("launcher_images", 2)):
        found = json.loads((tmp_path / name / "coco_instances_results.json").read_text())
        assert len({detection["image_id"] for detection in found}) == count

    evaluated = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "print_csv_format", evaluated.append)
        launch(tmp_path, "--eval-only", names, f"train.init_checkpoint={tmp_path}/model_best.pth")
    assert [result["bbox"]["AP50"] for result in evaluated] == [
        pytest.approx(last[f"{name}/bbox/AP50"]) for name in ("launcher_one", "launcher_images")
    ]


def test_one_test_set_in_brackets_keeps_its_metrics(tmp_path, images):
    launch(tmp_path, "dataloader.test.dataset.names=[launcher_one]", "train.max_iter=1")
    assert "bbox/AP" in metrics(tmp_path)[-1]


def test_weights_that_do_not_fit_or_may_run_code_stop_it(tmp_path, images, capsys):
    other, code = tmp_path / "other.pth", tmp_path / "code.pkl"
    torch.save({"model": {"other.weight": torch.zeros(1)}}, other)
    code.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % bytes(tmp_path / "ran"))
    start = "train.init_checkpoint="
    folder = tmp_path / "new"
    assert "none of its parameters fits the model" in refused(capsys, folder, f"{start}{other}")
    assert "not a checkpoint that is safe to read" in refused(capsys, folder, f"{start}{code}")
    assert not (tmp_path / "ran").exists()
    error = refused(capsys, folder, "--eval-only", f"{start}{other}")
    assert "other.pth does not fit the model" in error
    error = refused(capsys, folder, "--eval-only")
    assert "--eval-only needs train.init_checkpoint=FILE" in error


def test_misspelt_data_set_is_named():
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_roadside.py")
    check_data_set_names(cfg)
    cfg.dataloader.train.dataset.names = ["dair_v2x_i_train", "dair_v2x_i_trian"]
    message = "dataloader.train.dataset.names=dair_v2x_i_trian: .* close to it: dair_v2x_i_train"
    with pytest.raises(UsageError, match=message):
        check_data_set_names(cfg)


def test_metric_that_no_evaluation_gives_is_warned_of(tmp_path, images, monkeypatch):
    """Of evaluators whose metrics nobody knows before; what was trained is kept."""
    told = []
    monkeypatch.setattr(hooks.logger, "warning", lambda text, *values: told.append(text % values))
    monkeypatch.setattr(preparation, "COCOEvaluator", ())
    launch(tmp_path, "train.best_metric=box/AP", "train.max_iter=1")
    assert any("train.best_metric='box/AP' is no metric; close to it" in text for text in told)
    assert (tmp_path / "model_final.pth").exists()


def test_overwriting_may_start_from_what_it_replaces(tmp_path, finished):
    """And leaves files of other names, and the former run if it fails before its first step."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model_pretrained.pth").write_bytes(b"")
    before = {path.name for path in tmp_path.glob("model_*")}
    with pytest.raises((UsageError, SystemExit)):
        launch(tmp_path, "--overwrite", "model.decoder.cross_attn_method=odd")
    assert {path.name for path in tmp_path.glob("model_*")} == before
    best = tmp_path / "model_best.pth"
    launch(tmp_path, "--overwrite", f"train.init_checkpoint={best}", "train.max_iter=1")
    left = {path.name for path in tmp_path.glob("model_*")}
    assert {"model_final.pth", "model_pretrained.pth"} <= left


def test_the_best_is_remembered_though_no_checkpoint_followed_it(tmp_path):
    """Scores 1, 9, then a kill; the run resumes from where 1 was the best."""
    model = torch.nn.Linear(1, 1)
    saved = AtomicCheckpointer(model, str(tmp_path), tag_last=False)

    def hook() -> BestCheckpointer:
        best = BestCheckpointer(1, saved, "bbox/AP")
        best.trainer = Namespace(iter=0, max_iter=9, storage=None)
        return best

    def score(best: BestCheckpointer, iteration: int, value: float) -> None:
        best.trainer.iter = iteration
        best.trainer.storage = Namespace(latest=lambda: {"bbox/AP": (value, iteration)})
        best.after_step()

    first = hook()
    score(first, 0, 1.0)
    state = first.state_dict()
    score(first, 1, 9.0)
    resumed = hook()
    resumed.load_state_dict(state)
    score(resumed, 1, 3.5)
    stored = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert stored["best"] == {"best_metric": 9.0, "best_iter": 1}
    score(resumed, 2, 10.0)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 2


def test_configs_work_from_any_folder(tmp_path, images):
    files = [f"json_file={images}/coco.json", f"image_root={images}"]
    data = [f"dataloader.{part}.dataset.{file}" for part in ("train", "test") for file in files]
    command = [sys.executable, "-W", "ignore", "-m", "dset_d2.tools.lazyconfig_train_net"]
    command += ["--config-file", CONFIG, *SETTINGS, *data, "train.max_iter=1"]
    root = str(Path(__file__).parents[2])
    result = subprocess.run(
        [*command, "train.output_dir=a=b"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "a=b" / "model_final.pth").exists()

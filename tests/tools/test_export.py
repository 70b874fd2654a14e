"""The export tool, and pictures drawn with what it wrote."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate

import dset_d2
from dset_d2.config import apply_overrides
from dset_d2.inference import ExportedDetector
from dset_d2.synthetic import write_dataset
from dset_d2.tools import export, visualize

from ..conftest import NARROW, randomise
from ..data.test_frames import photo, video

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CONFIG = "projects/dset/configs/dset_r18_roadside.py"
TINY = [
    *NARROW,
    "model.decoder.num_layers=1",  # an export takes as long as there are operators
    "dataloader.image_size=[64,96]",
    "dataloader.test.num_workers=0",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights, and the file that the tool made of them."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    cfg = apply_overrides(dset_d2.get_config(CONFIG), TINY)
    torch.save({"model": randomise(instantiate(cfg.model)).state_dict()}, folder / "model.pth")
    write_dataset(folder, num_train=1, num_val=2, height=96, width=160, seed=3, progress=False)
    options = ["--config-file", CONFIG, "--weights", str(folder / "model.pth"), "--format", "onnx"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(folder))
        output = f"train.output_dir={folder}/evaluation"
        export.main([*options, "--output", str(folder / "model.onnx"), "--evaluate", *TINY, output])
    return folder


def test_the_file_is_compared_and_evaluated(made):
    info = ExportedDetector(made / "model.onnx").info
    assert info.classes[:2] == ("Car", "Truck") and info.image_size == (64, 96)
    assert not info.random_weights
    found = json.loads((made / "evaluation/coco_instances_results.json").read_text())
    assert len({x["image_id"] for x in found}) == 2


def test_a_file_that_differs_is_an_error(made, tmp_path, monkeypatch, capsys):
    """The file is that of other weights."""
    said = []

    def another(model, path, format, info, calibration):
        said.append(info)
        shutil.copy(made / "model.onnx", path)

    monkeypatch.setattr(export, "export_detector", another)
    image, output = photo(tmp_path / "a.png"), tmp_path / "model.onnx"
    options = ["--config-file", CONFIG, "--format", "onnx", "--output", str(output)]
    with pytest.raises(SystemExit) as stop:
        export.main([*options, "--input", str(image), "--", *TINY])
    assert stop.value.code == 1 and output.exists()
    assert said[0].random_weights
    told = capsys.readouterr()
    assert "of the detections agree with PyTorch's on the worst of 1 images" in told.out
    assert "no --weights: they are random" in told.err and "differs from PyTorch" in told.err


def test_wrong_use_is_told(made, tmp_path, capsys):
    options = ["--config-file", CONFIG, "--format", "onnx", "--output"]
    cases = [
        ([*options, "model.xml"], "--output model.xml: must end in .onnx"),
        ([*options, "x.onnx", "--weights", "x.onnx"], "x.onnx: would replace the input x.onnx"),
        (
            [*options, str(tmp_path / "x.onnx"), "--dynamic-size", "--input"]
            + [str(photo(tmp_path / "a.png")), "--", *TINY],
            "the model has a part that needs to know the size: pruning/encoder_0",
        ),
    ]
    for words, message in cases:
        with pytest.raises(SystemExit) as stop:
            export.main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()


def test_pictures_of_an_exported_file(made, tmp_path):
    """Without a config; videos become videos, and all is written down."""
    photo(tmp_path / "a.png")
    clip = video(tmp_path / "b.avi", frames=3)
    out, lines = tmp_path / "out", tmp_path / "found.jsonl"
    options = ["--weights", str(made / "model.onnx"), "--output", str(out), "--threshold", "0.01"]
    sources = ["--input", str(tmp_path / "*.png"), str(clip)]
    visualize.main([*options, "--json-lines", str(lines), *sources])
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.mp4"]
    capture = cv2.VideoCapture(str(out / "b.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and capture.get(cv2.CAP_PROP_FPS) == 10
    assert capture.read()[1].shape == (48, 64, 3)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [Path(x["source"]).name for x in records] == ["a.png", *["b.avi"] * 3]
    assert [x["frame"] for x in records] == [None, 0, 1, 2]
    classes = {found["class"] for x in records for found in x["detections"]}
    assert classes and classes <= set(ExportedDetector(made / "model.onnx").info.classes)


def test_the_model_draws_the_same(made, tmp_path):
    """From its own config and weights."""
    rng = np.random.default_rng(0)
    image = tmp_path / "noise.png"
    cv2.imwrite(str(image), rng.integers(256, size=(64, 96, 3), dtype=np.uint8))
    lines = []
    for weights in ("model.onnx", "model.pth"):
        options = ["--config-file", CONFIG, "--weights", str(made / weights), "--threshold", "0.01"]
        options += ["--output", str(tmp_path / weights), "--input", str(image)]
        options += ["--json-lines", str(tmp_path / f"{weights}.jsonl")]
        visualize.main([*options, "--", *TINY])
        lines.append(json.loads((tmp_path / f"{weights}.jsonl").read_text()))
    scores = [[x["score"] for x in line["detections"]] for line in lines]
    assert len(scores[0]) > 5 and np.allclose(*scores, atol=1e-3)
    assert (tmp_path / "model.pth" / "experts.png").exists()


def test_a_config_is_needed_for_weights_alone(tmp_path, capsys):
    for words in (["--weights", "a.pth"], ["--weights", "a.onnx"], []):
        with pytest.raises(SystemExit):
            visualize.main([*words, "--output", str(tmp_path)])
        assert "arguments are required: --config-file" in capsys.readouterr().err

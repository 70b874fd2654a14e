import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

import dset_d2
from dset_d2.analysis import count_activations, count_flops, count_parameters
from dset_d2.config import apply_overrides
from dset_d2.data.mapper import DETRMapper
from dset_d2.tools import analyze

from ..conftest import NARROW

R18 = "configs/rtdetr/rtdetrv2_r18_coco.py"
TINY = [*NARROW, "model.decoder.num_layers=1", "train.device=cpu"]
SMALL = ["dataloader.image_size=[64,64]"]


def run(tmp_path, *arguments, opts=()):
    """The JSON that the tool writes."""
    output = tmp_path / "report" / "analysis.json"
    analyze.main(
        ["--config-file", R18, *map(str, arguments), "--output", str(output), *TINY, *opts]
    )
    return json.loads(output.read_text())


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A place without any data set."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, (height, width) in enumerate([(64, 96), (64, 64), (96, 64)]):
        pixels = np.full((height, width, 3), 60 * index, np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def tiny_model():
    cfg = apply_overrides(dset_d2.get_config(R18), TINY)
    return instantiate(cfg.model).eval()


def test_numbers_are_those_of_the_counts(tmp_path, no_data, capsys):
    report = run(tmp_path, "--num-images", 2, opts=["dataloader.image_size=[64,96]"])
    result = report["results"]["rtdetrv2_r18_coco"]
    model = tiny_model()
    image = torch.rand(1, 3, 64, 96)
    flops, activations = count_flops(model, image), count_activations(model, image)
    parameters = count_parameters(model, image)
    same = {"mean": flops.total, "min": flops.total, "max": flops.total}
    assert result["modules"][""]["macs"] == same
    for name, module in result["modules"].items():
        assert module["macs"]["mean"] == flops.by_module[name]
        assert module["activations"]["mean"] == activations[name]
        assert module["parameters"] == asdict(parameters[name])
        assert module["latency"] is None
    assert {name: macs["mean"] for name, macs in result["operators"].items()} == flops.by_operator
    assert "decoder.enc_bbox_head" in result["modules"] and "criterion" not in result["modules"]
    assert not report["real_images"]
    printed = capsys.readouterr().out
    assert "NOT REAL: noise" in printed and "weights: random" in printed
    assert printed.count("GFLOPs (2 x MACs)") == 1


def test_mean_and_spread_over_real_images(tmp_path, no_data, pictures, capsys):
    keep_sizes = "dataloader.test.mapper.augmentations=[]"
    report = run(tmp_path, "--input", pictures, "--depth", 1, opts=[keep_sizes])
    mapper = DETRMapper(is_train=False, augmentations=[])
    model = tiny_model()
    totals = [
        count_flops(model, [mapper({"file_name": str(file)})]).total
        for file in sorted(pictures.glob("*.png"))
    ]
    result = report["results"]["rtdetrv2_r18_coco"]
    expected = {"mean": sum(totals) / 3, "min": min(totals), "max": max(totals)}
    assert result["modules"][""]["macs"] == expected
    assert result["modules"].keys() == {"", "backbone", "encoder", "decoder"}
    assert report["real_images"]
    low, high = (f"{total / 1e9:.3f}" for total in (min(totals), max(totals)))
    printed = capsys.readouterr().out
    assert f"{low} - {high}" in printed and "3 real images" in printed


def test_damaged_images_are_left_out_and_named(tmp_path, no_data, pictures, capsys):
    damaged = pictures / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    report = run(tmp_path, "--input", pictures, "--depth", 1, opts=SMALL)
    assert report["images"].startswith("2 real images")
    assert f"left out 1 of 3 images: {damaged}: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "--input", damaged, opts=SMALL)
    error = capsys.readouterr().err
    assert f"error: {damaged}: " in error and "Traceback" not in error


def test_comparison_with_itself(tmp_path, no_data):
    report = run(tmp_path, R18, "--num-images", 1, "--latency-rounds", 3, opts=SMALL)
    first, second = report["results"].values()
    assert first["ratio"] == second["ratio"] == 1.0
    assert first["modules"][""]["latency"]["ratio"] == 1.0
    assert second["modules"][""]["latency"]["ratio"] > 0
    parts = first["modules"]
    assert parts["decoder.decoder"]["latency"]["median"] > 0
    assert parts["decoder.denoising_class_embed"]["latency"] is None


def test_weights(tmp_path, no_data):
    path = tmp_path / "weights.pth"
    torch.save({"model": tiny_model().state_dict()}, path)
    report = run(tmp_path, "--num-images", 1, "--depth", 1, "--weights", path, opts=SMALL)
    assert report["results"]["rtdetrv2_r18_coco"]["weights"] == str(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([R18, R18, "--weights", "a.pth"], "for each config"),
        ([R18, "--input", "missing.jpg"], "missing.jpg: no such file"),
        ([R18, "--input", "."], "holds no image"),
        ([R18, "--weights", "missing.pth", *SMALL], "missing.pth: no such checkpoint"),
        ([R18, "--num-images", "0"], "positive"),
    ],
)
def test_errors_say_what_is_wrong(arguments, message, no_data, capsys):
    with pytest.raises(SystemExit) as error:
        analyze.main(["--config-file", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err

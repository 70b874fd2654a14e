import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from PIL import Image

import dset_d2
from dset_d2.config import apply_overrides
from dset_d2.data import dair_v2x
from dset_d2.data.coco import to_coco
from dset_d2.synthetic import write_dataset
from dset_d2.tools import (
    analyze,
    benchmark,
    convert_checkpoint,
    dair_v2x_to_coco,
    swap_ffn,
    visualize,
)

from ..conftest import NARROW

ROADSIDE = "configs/rtdetr/rtdetrv2_r18_roadside.py"
SPARSE = "projects/dset/configs/dset_r18_roadside.py"
TINY = [*NARROW, "dataloader.image_size=[64,96]"]
SPLIT = ["--root", "side", "--split-file", "split.json", "--split", "val"]
# By tool: a command line, and what of it --output must not replace.
COMMANDS = {
    analyze: (
        ["--config-file", "config.py", "--weights", "weights.pth", "--input", "photos"],
        ["config.py", "weights.pth", "photos/mine.png"],
    ),
    benchmark: (["--config-file", "config.py"], ["config.py"]),
    convert_checkpoint: (
        ["--config-file", "config.py", "--weights", "weights.pth"],
        ["config.py", "weights.pth"],
    ),
    swap_ffn: (
        ["--config-file", "config.py", "--weights", "weights.pth", "--input", "photos"],
        ["config.py", "weights.pth", "photos/mine.png"],
    ),
    dair_v2x_to_coco: (SPLIT, ["split.json", "side/data_info.json", "side/label/camera/1.json"]),
}


@pytest.mark.parametrize("tool", COMMANDS, ids=lambda tool: tool.__name__)
def test_an_output_never_replaces_an_input(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, inputs = COMMANDS[tool]
    for name in inputs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in inputs:
        with pytest.raises(SystemExit) as stop:
            tool.main([*command, "--output", f"./{name}"])
        assert stop.value.code == 2 and (tmp_path / name).read_text() == name
        assert f"error: --output {name}: would replace the input" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([*command, "--output", "."])
    assert "--output .: is a folder" in capsys.readouterr().err


def test_converted_weights_load_with_detectron2(tmp_path, capsys):
    model = instantiate(dset_d2.get_config(ROADSIDE).model)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("clock.")}
    torch.save({"ema": {"module": state}}, tmp_path / "released.pth")
    options = ["--config-file", ROADSIDE, "--weights", str(tmp_path / "released.pth")]
    convert_checkpoint.main([*options, "--output", str(tmp_path / "init.pth")])
    other = instantiate(dset_d2.get_config(ROADSIDE).model)
    extra = DetectionCheckpointer(other).load(str(tmp_path / "init.pth"))
    assert extra == {}
    torch.testing.assert_close(other.state_dict(), model.state_dict())

    with pytest.raises(SystemExit) as stop:
        convert_checkpoint.main(["--config-file", ROADSIDE, "--weights", "no.pth", "--output", "x"])
    assert stop.value.code == 2 and "no.pth: no such checkpoint" in capsys.readouterr().err


def test_pictures_of_a_data_set_and_of_files(tmp_path, monkeypatch):
    write_dataset(tmp_path, num_train=1, num_val=3, height=96, width=160, seed=3, progress=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    model = instantiate(dset_d2.get_config(ROADSIDE).model)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    options = ["--config-file", ROADSIDE, "--weights", str(tmp_path / "model.pth")]
    options += ["--threshold", "0.001"]
    options_of_set = ["--output", str(tmp_path / "set"), "--num-images", "2"]
    names = "dataloader.test.dataset.names=[dair_v2x_i_val,dair_v2x_i_train]"
    visualize.main([*options, *options_of_set, names])
    pictures = sorted((tmp_path / "set").iterdir())
    assert len(pictures) == 2
    for picture in map(Image.open, pictures):
        assert picture.width == 320 and picture.height > 96  # truth beside detections, a legend

    # Data of the user's, in COCO's format and under a name of its own.
    dataset = dair_v2x.load_dair_v2x(
        tmp_path / "dair-v2x/single-infrastructure-side",
        tmp_path / "dair-v2x/split_datas/single-infrastructure-split-data.json",
        "val",
    )
    coco = to_coco(dataset, dair_v2x.CLASSES_8, tmp_path)
    (tmp_path / "val.json").write_text(json.dumps(coco))
    own = ["--config-file", "configs/rtdetr/rtdetrv2_r18_custom.py", *options[2:]]
    shape = ["model.encoder.hidden_dim=128", "model.encoder.dim_feedforward=512"]
    shape += ["model.decoder.hidden_dim=128", "model.decoder.dim_feedforward=512"]
    shape += ["dataloader.image_size=[96,160]"]
    data = ["dataloader.test.dataset.names=own_pictures"]  # another test has the config's name
    data += [f"dataloader.test.dataset.json_file={tmp_path}/val.json"]
    data += [f"dataloader.test.dataset.image_root={tmp_path}"]
    place = ["--output", str(tmp_path / "own"), "--num-images", "1"]
    visualize.main([*own, *place, *shape, *data])
    assert len(list((tmp_path / "own").iterdir())) == 1

    file = next(tmp_path.glob("dair-v2x/*/image/*.jpg"))
    # Without data the classes are numbered.
    place = ["--output", str(tmp_path / "numbered"), "--input", str(file), "--"]
    unknown = ["model.decoder.num_classes=8", "dataloader.test.dataset.names=unknown"]
    visualize.main([*own, *place, *shape, *unknown])
    assert len(list((tmp_path / "numbered").iterdir())) == 1

    visualize.main([*options, "--output", str(tmp_path / "files"), "--input", str(file)])
    (picture,) = (tmp_path / "files").iterdir()
    assert Image.open(picture).width == 160
    assert Image.open(picture).tobytes() != Image.open(file).tobytes()


@pytest.fixture
def weights(tmp_path) -> list[str]:
    """The options of a tiny sparse model with its weights."""
    cfg = apply_overrides(dset_d2.get_config(SPARSE), TINY)
    torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / "model.pth")
    return ["--config-file", SPARSE, "--weights", str(tmp_path / "model.pth"), "--device", "cpu"]


def make_photos(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        pixels = np.full((48, 64, 3), 50 + 50 * index, np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return [folder / name for name in names]


def test_pictures_stand_for_one_image_each(weights, tmp_path):
    make_photos(tmp_path / "a", "1.png", "2.PNG", "x.jpg")
    make_photos(tmp_path / "b", "1.png")
    inputs = ["--input", str(tmp_path / "a"), str(tmp_path / "b"), "--"]
    visualize.main([*weights, "--output", str(tmp_path / "out"), *inputs, *TINY])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"1_1.png", "2_2.png", "3_x.png", "4_1.png", "experts.png"} <= names
    assert {name.split("_", 1)[0] for name in names if "_kept_" in name} == {"1", "2", "3", "4"}


def test_names_that_pictures_have_are_numbered(tmp_path):
    files = [tmp_path / "1.png", tmp_path / "2.png"]
    assert visualize.output_names(files, tmp_path / "out") == ["1", "2"]
    for name in ("1.jpg", "experts.png", "1_kept_encoder_0.png", "2_expert_decoder_1.png"):
        names = visualize.output_names([*files, tmp_path / name], tmp_path / "out")
        assert names == ["1_1", "2_2", f"3_{Path(name).stem}"]


def test_photographs_are_never_replaced(weights, tmp_path, capsys):
    (photo,) = make_photos(tmp_path / "photos", "mine.png")
    content = photo.read_bytes()
    (tmp_path / "link").symlink_to(photo.parent)
    for output in (photo.parent, tmp_path / "link"):
        with pytest.raises(SystemExit) as stop:
            visualize.main([*weights, "--output", str(output), "--input", str(photo), "--", *TINY])
        assert stop.value.code == 2
        assert f"--output {output}: holds the input {photo}" in capsys.readouterr().err
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.png").symlink_to(photo)
    visualize.main([*weights, "--output", str(out), "--input", str(photo), "--", *TINY])
    assert not (out / "mine.png").is_symlink()
    assert photo.read_bytes() == content and len(list(photo.parent.iterdir())) == 1


def test_damaged_photographs_are_left_out_and_named(weights, tmp_path, capsys):
    good, bad = make_photos(tmp_path / "photos", "good.png", "bad.png")
    bad.write_bytes(bad.read_bytes()[:50])
    out = tmp_path / "out"
    visualize.main([*weights, "--output", str(out), "--input", str(good.parent), "--", *TINY])
    assert (out / "good.png").exists() and not (out / "bad.png").exists()
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning.startswith(f"warning: left out 1 of 2 images: {bad}: ")
    with pytest.raises(SystemExit):
        visualize.main([*weights, "--output", str(out), "--input", str(bad), "--", *TINY])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {bad}: ")

"""The tool that analyses experts over a test set."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

import dset_d2
from dset_d2.config import apply_overrides
from dset_d2.data import dair_v2x
from dset_d2.data.coco import to_coco
from dset_d2.synthetic import write_dataset
from dset_d2.tools import analyze_experts, visualize

from ..conftest import NARROW

SPARSE = "projects/dset/configs/dset_r18_roadside.py"
DENSE = "configs/rtdetr/rtdetrv2_r18_roadside.py"
TINY = [*NARROW, "dataloader.image_size=[64,96]", "dataloader.test.num_workers=0"]


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    """The options, with weights of a tiny model and five generated scenes."""
    write_dataset(tmp_path, num_train=1, num_val=5, height=96, width=160, seed=3, progress=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name, path in (("sparse", SPARSE), ("dense", DENSE)):
        torch.manual_seed(0)
        cfg = apply_overrides(dset_d2.get_config(path), TINY)
        torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / f"{name}.pth")
    return ["--device", "cpu", "--output", str(tmp_path / "out")]


def of(path: str, folder: Path) -> list[str]:
    weights = folder / ("dense.pth" if path == DENSE else "sparse.pth")
    return ["--config-file", path, "--weights", str(weights)]


def annotated(folder: Path) -> list[dict]:
    side = folder / "dair-v2x/single-infrastructure-side"
    split = folder / "dair-v2x/split_datas/single-infrastructure-split-data.json"
    return dair_v2x.load_dair_v2x(side, split, "val")


def test_a_test_sets_experts_are_counted_and_drawn(command, tmp_path, capsys):
    analyze_experts.main([*of(SPARSE, tmp_path), *command, *TINY])
    printed = capsys.readouterr().out
    assert "5 images; drawn to" in printed and "100 queries" in printed
    report = json.loads((tmp_path / "out/experts.json").read_text())
    layers = report["layers"]
    assert report["images"] == 5 and list(layers) == [
        "encoder_0_0",
        *(f"decoder_{i}" for i in (0, 1, 2)),
    ]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    of_layers = {f"{kind}_{x}.png" for x in layers for kind in ("coactivation", "classes", "sizes")}
    assert names == {"experts.json", "load.png"} | of_layers
    assert all(Image.open(tmp_path / "out" / name).width > 200 for name in names - {"experts.json"})
    # Maps of 2 x 3 cells, 20 queries.
    assert [layer["tokens"] for layer in layers.values()] == [30, 100, 100, 100]
    present = {
        dair_v2x.CLASSES_8[a["category_id"]]
        for x in annotated(tmp_path)
        for a in x["annotations"]
        if not a["iscrowd"]
    }
    seen = {name for name, x in layers["encoder_0_0"]["by_class"].items() if x["tokens"]}
    assert seen == present and list(layers["decoder_0"]["by_class"]) == list(dair_v2x.CLASSES_8)

    # Some of the images, evenly spaced.
    analyze_experts.main([*of(SPARSE, tmp_path), *command, "--num-images", "2", *TINY])
    layers = json.loads((tmp_path / "out/experts.json").read_text())["layers"]
    assert [layer["tokens"] for layer in layers.values()] == [12, 40, 40, 40]


def test_data_of_ones_own_are_analysed_in_batches(command, tmp_path):
    """In COCO's format; more images than one in a batch change nothing."""
    coco = to_coco(annotated(tmp_path), dair_v2x.CLASSES_8, tmp_path)
    (tmp_path / "val.json").write_text(json.dumps(coco))
    data = ["dataloader.test.dataset.names=own_experts"]
    data += [f"dataloader.test.dataset.json_file={tmp_path}/val.json"]
    data += [f"dataloader.test.dataset.image_root={tmp_path}", "model.decoder.num_classes=8"]
    experts = ["model.decoder.moe.num_experts=4", "model.encoder.moe.num_experts=3"]
    custom = "projects/dset/configs/dset_r18_custom.py"
    cfg = apply_overrides(dset_d2.get_config(custom), [*TINY, *data, *experts])
    torch.save({"model": instantiate(cfg.model).state_dict()}, tmp_path / "own.pth")
    options = ["--config-file", custom, "--weights", str(tmp_path / "own.pth"), *command]
    found = []
    for batch in (1, 2):
        overrides = [*data, *experts, f"+dataloader.test.batch_size={batch}"]
        analyze_experts.main([*options, "--", *TINY, *overrides])
        found.append(json.loads((tmp_path / "out/experts.json").read_text())["layers"])
    for place, layer in found[0].items():
        for key in ("tokens", "by_class", "by_size", "background"):
            assert layer[key] == found[1][place][key]
        np.testing.assert_allclose(layer["load"], found[1][place]["load"], rtol=1e-5)


def test_what_cannot_be_analysed_is_named(command, tmp_path, capsys):
    def error(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            analyze_experts.main([*words])
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    dense, sparse = ([*of(path, tmp_path), *command] for path in (DENSE, SPARSE))
    assert error(*dense, *TINY) == "error: the model has no experts, or none that route yet"
    assert "--weights" in error("--config-file", SPARSE, *command)
    assert "--num-images must be positive" in error(*sparse, "--num-images", "0")
    folder = tmp_path / "dair-v2x/single-infrastructure-side/image"
    message = error(*sparse[:-1], str(folder), *TINY)
    assert message.startswith(f"error: --output {folder}: holds the input")
    assert not (tmp_path / "out").exists()


def test_pictures_of_the_decoders_experts_are_written(command, tmp_path):
    (file, *_) = sorted(tmp_path.glob("dair-v2x/*/image/*.jpg"))
    options = [*of(SPARSE, tmp_path), *command, "--threshold", "0.0", "--input", str(file), "--"]
    visualize.main([*options, *TINY])
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {f"{file.stem}_expert_decoder_{layer}.png" for layer in range(3)} <= names

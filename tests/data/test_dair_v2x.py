"""The reader on small trees in the genuine layouts, with the genuine quirks."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from dset_d2 import get_config
from dset_d2.config import apply_overrides
from dset_d2.data.dair_v2x import (
    CLASSES_8,
    CLASSES_10,
    REGISTERED,
    DataError,
    class_map,
    clip_box,
    dair_v2x_dataset,
    load_dair_v2x,
    read_box,
)
from dset_d2.tools import dair_v2x_to_coco

SPLITS = Path(__file__).parents[3] / "shared" / "data" / "dair_v2x_splits"


def entry(kind="Car", box=(10, 20, 50, 60), **fields) -> dict:
    names = ("xmin", "ymin", "xmax", "ymax")
    return {"type": kind, "2d_box": {k: str(v) for k, v in zip(names, box)}} | fields


class Tree:
    """A side of DAIR-V2X with three train images and one val image, 100 x 80 pixels."""

    def __init__(self, root: Path, label_key: str = "label_camera_std_path") -> None:
        self.root = root
        self.split_file = root.parent / "split.json"
        (root / "image").mkdir(parents=True)
        (root / "label/camera").mkdir(parents=True)
        self.info = []
        for stem in ("000003", "000001", "000002", "000009"):
            Image.new("RGB", (100, 80)).save(root / f"image/{stem}.jpg")
            self.info.append(
                {"image_path": f"image/{stem}.jpg", label_key: f"label/camera/{stem}.json"}
            )
            self.label(stem, [entry()])
        self.split_file.write_text(
            json.dumps({"train": ["000001", "000002", "000003"], "val": ["000009"], "test": []})
        )
        self.write_info()

    def write_info(self) -> None:
        (self.root / "data_info.json").write_text(json.dumps(self.info))

    def label(self, stem: str, entries) -> None:
        (self.root / f"label/camera/{stem}.json").write_text(json.dumps(entries))

    def load(self, split="train", **options) -> list[dict]:
        return load_dair_v2x(self.root, self.split_file, split, **options)


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path / "side")


def test_reads_strings_states_and_sizes(tree):
    box = ("10.5", "20.25", "50", "60")
    tree.label("000001", [entry("Truck", box, occluded_state="1", truncated_state=2)])
    dataset_dict = next(d for d in tree.load() if d["image_id"] == 1)
    assert (dataset_dict["height"], dataset_dict["width"]) == (80, 100)
    assert dataset_dict["file_name"].endswith("image/000001.jpg")
    (annotation,) = dataset_dict["annotations"]
    assert annotation["bbox"] == [10.5, 20.25, 50, 60]
    assert annotation["category_id"] == CLASSES_8.index("Truck")
    assert (annotation["occluded_state"], annotation["truncated_state"]) == (1, 2)
    assert annotation["iscrowd"] == 0


@pytest.mark.parametrize("key", ["label_camera_std_path", "label_camera_path", "unnamed"])
def test_label_keys(tmp_path, key):
    assert len(Tree(tmp_path / "side", key).load()) == 3


@pytest.mark.parametrize(
    ("spelling", "eight", "ten"),
    [
        ("Trafficcone", "Trafficcone", "Trafficcone"),
        ("TrafficCone", "Trafficcone", "Trafficcone"),
        ("traffic_cone", "Trafficcone", "Trafficcone"),
        ("Barrow", "Cyclist", "Barrowlist"),
        ("Barrowlist", "Cyclist", "Barrowlist"),
        ("tricyclist", "Cyclist", "Tricyclist"),
        ("MOTORCYCLIST", "Motorcyclist", "Motorcyclist"),
    ],
)
def test_spellings(spelling, eight, ten):
    key = spelling.lower().replace("_", "")
    assert CLASSES_8[class_map(CLASSES_8)[key]] == eight
    assert CLASSES_10[class_map(CLASSES_10)[key]] == ten


def test_ignore_types_are_crowd_regions_of_what_they_hide(tree):
    kinds = ["PedestrianIgnore", "CarIgnore", "Unknown_movable"]
    tree.label("000001", [entry(kind, occluded_state="-1") for kind in kinds])
    dataset_dict = next(d for d in tree.load() if d["image_id"] == 1)
    assert all(a["iscrowd"] == 1 for a in dataset_dict["annotations"])
    names = [CLASSES_8[a["category_id"]] for a in dataset_dict["annotations"]]
    assert names == ["Pedestrian", "Car", "Truck", "Van", "Bus", *CLASSES_8]


def test_boxes_are_clipped_or_dropped_with_counts(tree, caplog):
    boxes = [
        (-5, 10, 50, 60),
        (90, 70, 120, 200),
        (30, 30, 30, 40),
        (60, 50, 40, 55),
        (200, 0, 220, 9),
    ]
    tree.label("000001", [entry(box=box) for box in boxes])
    dataset_dict = next(d for d in tree.load() if d["image_id"] == 1)
    assert [a["bbox"] for a in dataset_dict["annotations"]] == [[0, 10, 50, 60], [90, 70, 100, 80]]
    assert "2 clipped, 3 dropped" in caplog.text


def test_missing_files_are_counted_once(tree, caplog):
    (tree.root / "image/000001.jpg").unlink()
    (tree.root / "label/camera/000002.json").unlink()
    split = json.loads(tree.split_file.read_text())
    split["train"] += ["000777", "000778"]
    tree.split_file.write_text(json.dumps(split))
    assert [r["image_id"] for r in tree.load()] == [3]
    warnings = [r for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "1 images; 3 missing images, 1 missing labels" in warnings[0].getMessage()


def test_labels_are_where_any_of_the_keys_says(tree):
    for info in tree.info:
        info["label_camera_path"] = (
            info.pop("label_camera_std_path", None) or info["label_camera_path"]
        )
        info["label_camera_std_path"] = "label/virtuallidar/1.json"  # not released
    tree.write_info()
    assert len(tree.load()) == 3
    for info in tree.info:
        info["label_camera_path"] = "elsewhere.json"
    tree.write_info()
    assert len(tree.load()) == 3  # label/camera, as the archives have it
    (tree.root / "label/camera").rename(tree.root / "label/other")
    with pytest.raises(DataError, match="3 missing labels; there is no .*virtuallidar/1.json"):
        tree.load()
    tree.info[0]["label_camera_std_path"] = 5
    tree.write_info()
    with pytest.raises(DataError, match="entry 0: 'label_camera_std_path' is 5, not a path"):
        tree.load()


@pytest.mark.parametrize(
    "folder",
    ["side-image", "up-side-image", "side/side-image", "side/up-side-image"]
    + ["side-image/side-image", "side/side-image/side-image", "side-image/image"],
)
def test_images_in_folders_of_their_own(tmp_path, folder):
    tree = Tree(tmp_path / "up" / "side")
    place = tree.root.parent / folder
    place.parent.mkdir(exist_ok=True)
    (tree.root / "image").rename(place)
    assert len(tree.load()) == 3
    place.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="3 missing images; no image/000003.jpg in any of") as error:
        tree.load()
    assert all(str(tree.root / name) in str(error.value) for name in ("", "side-image", "side"))
    assert str(tmp_path / "up/side-image") in str(error.value)
    assert len(tree.load(image_root=tmp_path / "elsewhere")) == 3


@pytest.mark.parametrize("doubled", ["up/side/side", "up/up/side"])
def test_doubled_folders(tmp_path, doubled):
    tree = Tree(tmp_path / doubled)
    tree.root = tmp_path / "up/side"
    assert len(tree.load()) == 3
    (tmp_path / doubled / "image").rename(tmp_path / doubled / "side-image")
    assert len(tree.load()) == 3


def test_converted_images(tree):
    for path in (tree.root / "image").iterdir():
        path.rename(path.with_suffix(".png"))
    assert all(d["file_name"].endswith(".png") for d in tree.load())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 3), unique=True, min_size=1), st.integers(1, 9), st.booleans())
def test_ids_of_splits_are_numbers_however_written(tmp_path_factory, numbers, width, as_text):
    tree = Tree(tmp_path_factory.mktemp("tree") / "side")
    ids = [str(number).zfill(width) if as_text else number for number in numbers]
    tree.split_file.write_text(json.dumps({"train": ids}))
    assert sorted(d["image_id"] for d in tree.load()) == sorted(numbers)


def test_names_of_one_number_are_an_error(tree):
    tree.info.append({"image_path": "image/1.jpg"})
    tree.write_info()
    with pytest.raises(DataError, match="entry 4: image/1.jpg has the number of image/000001.jpg"):
        tree.load()
    tree.info[-1] = tree.info[1]
    tree.write_info()
    assert len(tree.load()) == 3  # said twice


@pytest.mark.parametrize("path", ["../secret", "label/../../secret", "/secret"])
@pytest.mark.parametrize("key", ["label_camera_std_path", "label_camera_path", "image_path"])
def test_paths_stay_in_their_side(tree, key, path):
    tree.info[1][key] = f"{path}/000001.jpg"
    tree.write_info()
    with pytest.raises(DataError, match=f"data_info.json: entry 1: '{key}' is .* leaves the side"):
        tree.load()
    tree.info[1][key] = "image/../image/000001.jpg" if key == "image_path" else "image/../x.json"
    tree.write_info()
    assert len(tree.load()) == 3


@pytest.mark.parametrize("name", ["data_info.json", "label/camera/000002.json"])
def test_deep_files_are_named(tree, name):
    (tree.root / name).write_text("[" * 100_000)
    with pytest.raises(DataError, match=f"{name}: not readable as JSON"):
        tree.load()


def test_empty_frames_stay(tree):
    tree.label("000001", [])
    assert len(tree.load()) == 3


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"type": "Car"}, "expected a list, found dict"),
        (["Car"], "entry 0: no object with a '2d_box'"),
        ([entry(), {"type": "Car"}], "entry 1: no object with a '2d_box'"),
        ([entry(box=("a", 0, 9, 9))], "entry 0: field 'xmin' is 'a', not a number"),
        ([entry(box=("__import__('os')", 0, 9, 9))], "not a number"),
        ([entry(box=("nan", 0, 9, 9))], "not finite"),
        ([entry(box=(1, 2))], "entry 0: no field 'xmax'"),
        ([entry("Spaceship")], "entry 0: unknown type 'Spaceship'"),
        ([entry(occluded_state="3")], "field 'occluded_state' is '3', not 0, 1 or 2"),
    ],
)
def test_bad_labels_name_file_and_entry(tree, entries, message):
    tree.label("000002", entries)
    with pytest.raises(DataError, match="label/camera/000002.json.*" + message):
        tree.load()


def test_bad_files_are_named(tree):
    with pytest.raises(
        DataError, match="no data_info.json or label in any of .*nowhere.*; set DETECTRON2_DATASETS"
    ):
        load_dair_v2x(tree.root / "nowhere", tree.split_file, "train")
    with pytest.raises(DataError, match="absent.json: no such file"):
        load_dair_v2x(tree.root, tree.root / "absent.json", "train")
    tree.split_file.write_text(json.dumps({"val": []}))
    with pytest.raises(DataError, match="split.json: no key 'train'"):
        tree.load()
    tree.split_file.write_text("{")
    with pytest.raises(DataError, match="split.json: not readable as JSON"):
        tree.load()


def test_bad_info_entries_are_named(tree):
    tree.info.append({"pointcloud_path": "x"})
    tree.write_info()
    with pytest.raises(DataError, match="data_info.json: entry 4: no 'image_path'"):
        tree.load()


def test_broken_image_is_named(tree):
    (tree.root / "image/000002.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match="000002.jpg: cannot read this image"):
        tree.load()


@given(st.lists(st.floats(-500, 500), min_size=4, max_size=4))
def test_clipped_boxes_lie_in_the_image(values):
    box = dict(zip(("xmin", "ymin", "xmax", "ymax"), map(str, values)))
    clipped = clip_box(read_box(box, "here"), (80, 100), Counter())
    if clipped is not None:
        x, y, x2, y2 = clipped
        assert 0 <= x <= x2 - 1 and x2 <= 100 and 0 <= y <= y2 - 1 and y2 <= 80


def test_registered_data_sets_follow_the_environment(tmp_path, monkeypatch):
    base = tmp_path / "dair-v2x"
    for folder in (
        "single-infrastructure-side",
        "single-vehicle-side",
        "cooperative-vehicle-infrastructure/infrastructure-side",
        "cooperative-vehicle-infrastructure/vehicle-side",
    ):
        Tree(base / folder)
    (base / "split_datas").mkdir()
    split = {"train": ["000001", "000002"], "val": ["000009"], "test": []}
    cooperative = {"vehicle_split": split, "infrastructure_split": {"train": ["000003"]}}
    for name in ("single-infrastructure", "single-vehicle"):
        (base / f"split_datas/{name}-split-data.json").write_text(json.dumps(split))
    (base / "split_datas/cooperative-split-data.json").write_text(json.dumps(cooperative))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    sizes = {
        name: len(DatasetCatalog.get(f"dair_v2x_{name}"))
        for name in ("i_train", "i_val", "v_train", "c_i_train", "c_v_train", "i_train_10cls")
    }
    assert list(sizes.values()) == [2, 1, 2, 1, 2, 2]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(base))
    assert len(DatasetCatalog.get("dair_v2x_c_i_train")) == 1
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="absent/dair-v2x/single.*absent/single.*; set DETEC"):
        DatasetCatalog.get("dair_v2x_i_train")
    assert MetadataCatalog.get("dair_v2x_v_val").thing_classes == list(CLASSES_8)
    assert MetadataCatalog.get("dair_v2x_v_val_10cls").thing_classes == list(CLASSES_10)


@pytest.fixture
def plain(tmp_path, monkeypatch) -> Path:
    """Two sides of images and labels alone, and nothing where data are looked for."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "absent"))
    for number, kind in enumerate(("vehicle", "infrastructure")):
        tree = Tree(tmp_path / "own" / f"{kind}-side")
        (tree.root / "data_info.json").unlink()
        for path in (tree.root / "label/camera").iterdir():
            path.rename(tree.root / "label" / path.name)
        (tree.root / "label/camera").rmdir()
        (tree.root / "image" / "notes.txt").write_text("no image")
        split = {"train": ["000001", "000002", "000003"][number:], "val": ["000009"]}
        (tree.root.parent / f"single-{kind}-split-data.json").write_text(json.dumps(split))
    yield tmp_path / "own"
    DatasetCatalog.update(REGISTERED)


def test_sides_of_images_and_labels_alone(plain):
    (found,) = dair_v2x_dataset("dair_v2x_v_val", root=str(plain))
    assert found["image_id"] == 9 and len(found["annotations"]) == 1
    assert found["file_name"] == str(plain / "vehicle-side/image/000009.jpg")
    assert len(dair_v2x_dataset("dair_v2x_i_train", root=str(plain))) == 2
    both = ["dair_v2x_i_train", "dair_v2x_v_train"]
    assert len(dair_v2x_dataset(both, root=str(plain))) == 5
    # What evaluators load by name is the same, until the next call.
    assert DatasetCatalog.get("dair_v2x_v_val") == [found]
    with pytest.raises(DataError, match="absent"):
        dair_v2x_dataset("dair_v2x_v_val")


@pytest.mark.parametrize("side", ["vehicle-side", "dair-v2x/single-vehicle-side", "."])
def test_roots_name_a_side_or_what_it_is_in(plain, side):
    place = plain / side
    if side != ".":
        place.parent.mkdir(exist_ok=True)
        (plain / "vehicle-side").rename(place)
    for root in (place, plain):
        assert len(dair_v2x_dataset("dair_v2x_v_train", root=str(root))) == 3


def test_roots_are_not_taken_for_another_side(plain):
    with pytest.raises(DataError, match="no data_info.json or label in any of") as error:
        dair_v2x_dataset("dair_v2x_i_train", root=str(plain / "vehicle-side"))
    assert str(plain / "vehicle-side/infrastructure-side") in str(error.value)
    cooperative = plain.rename(plain.parent / "cooperative-vehicle-infrastructure")
    with pytest.raises(DataError, match="no data_info.json or label in any of"):
        dair_v2x_dataset("dair_v2x_i_train", root=str(cooperative))
    with pytest.raises(DataError, match="cooperative-split-data.json.* set split_file to it"):
        dair_v2x_dataset("dair_v2x_c_i_train", root=str(cooperative))
    file = cooperative / "other.json"
    file.write_text(json.dumps({"infrastructure_split": {"train": [1]}}))
    found = dair_v2x_dataset("dair_v2x_c_i_train", str(cooperative), str(file))
    assert [d["image_id"] for d in found] == [1]
    with pytest.raises(DataError, match="'my_train' is no data set of DAIR-V2X"):
        dair_v2x_dataset("my_train", root=str(cooperative))


def test_sides_without_images_are_named(plain):
    for path in (plain / "vehicle-side/image").glob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match="vehicle-side: neither data_info.json nor images in"):
        dair_v2x_dataset("dair_v2x_v_train", root=str(plain))


def test_configs_name_a_root(plain):
    cfg = get_config("configs/rtdetr/rtdetrv2_r18_roadside.py")
    apply_overrides(cfg, [f"dataloader.train.dataset.root={plain}"])
    assert len(instantiate(cfg.dataloader.train.dataset)) == 2
    assert len(instantiate(cfg.dataloader.test.dataset)) == 1
    apply_overrides(cfg, ["dataloader.test.dataset.root=/absent"])
    with pytest.raises(DataError, match="/absent/dair-v2x"):
        instantiate(cfg.dataloader.test.dataset)


def test_import_without_data_is_silent(tmp_path):
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path / "absent")}
    code = "import warnings; warnings.simplefilter('ignore'); import dset_d2"
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_conversion_to_coco(tree, tmp_path, capsys):
    tree.label("000001", [entry("Van", (10, 20, 50, 60), occluded_state=2), entry("CarIgnore")])
    output = tmp_path / "out" / "train.json"
    arguments = ["--root", tree.root, "--split-file", tree.split_file, "--split", "train"]
    arguments = [*map(str, arguments), "--output", str(output)]
    dair_v2x_to_coco.main(arguments)
    assert "3 images, 7 boxes" in capsys.readouterr().out
    first = output.read_bytes()
    dair_v2x_to_coco.main(arguments)
    assert output.read_bytes() == first
    assert [f.name for f in output.parent.iterdir()] == ["train.json"]
    coco = COCO(str(output))
    assert sorted(coco.imgs) == [1, 2, 3]
    assert (tree.root / coco.imgs[2]["file_name"]).is_file()
    van = coco.loadAnns(coco.getAnnIds(imgIds=[1], iscrowd=False))
    assert [coco.cats[a["category_id"]]["name"] for a in van] == ["Van"]
    assert van[0]["bbox"] == [10, 20, 40, 40] and van[0]["occluded_state"] == 2
    assert len(coco.getAnnIds(imgIds=[1], iscrowd=True)) == 4


def test_conversion_reports_errors(tree, tmp_path, capsys):
    arguments = ["--root", "nowhere", "--split-file", "x", "--split", "val", "--output", "y"]
    with pytest.raises(SystemExit) as stop:
        dair_v2x_to_coco.main(arguments)
    assert stop.value.code == 2
    assert "no data_info.json or label in any of nowhere;" in capsys.readouterr().err


@pytest.mark.skipif(not SPLITS.is_dir(), reason="the official split files are not here")
def test_official_split_files():
    from dset_d2.data.dair_v2x import SIDES, read_split

    sizes = {
        side: [
            len(read_split(SPLITS / f"{name}-split-data.json", keys, s))
            for s in ("train", "val", "test")
        ]
        for side, (_, name, keys) in SIDES.items()
    }
    assert sizes == {
        "i": [5042, 2016, 3026],
        "v": [11163, 4464, 6698],
        "c_i": [8800, 3624, 5906],
        "c_v": [9322, 5963, 5230],
    }


def test_image_sizes_come_from_the_files(tree):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tree.root / "image/000001.png")
    (tree.root / "image/000001.png").rename(tree.root / "image/000001.jpg")
    dataset_dict = next(d for d in tree.load() if d["image_id"] == 1)
    assert (dataset_dict["height"], dataset_dict["width"]) == (40, 60)

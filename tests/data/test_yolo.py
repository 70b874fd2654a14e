"""Data sets in YOLO's folders, as people export them."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from dset_d2.data.coco import coco_dataset
from dset_d2.data.mapper import read_picture
from dset_d2.data.reading import DataError
from dset_d2.data.yolo import label_path, load_yolo, read_labels, read_layout, read_line
from dset_d2.tools import yolo_to_coco

from .test_coco import names as data_set_names
from .test_reading import turned

NAMES = ["car", "bus", "cone"]
SIZE = (80, 100)  # height, width


class Folders:
    """Two training images and a validation image, of 100 x 80 pixels."""

    def __init__(self, root: Path, pattern: str = "{kind}/{split}", **content) -> None:
        self.root = root
        self.pattern = pattern
        for split, stem in (("train", "b"), ("train", "a"), ("val", "c")):
            image = self.place("images", split) / f"{stem}.jpg"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", SIZE[::-1]).save(image)
            self.label(split, stem, "1 0.5 0.5 0.2 0.5")
        self.describe(**content)

    def place(self, kind: str, split: str) -> Path:
        return self.root / self.pattern.format(kind=kind, split=split)

    def label(self, split: str, stem: str, text: str) -> None:
        file = self.place("labels", split) / f"{stem}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def describe(self, **content) -> None:
        (self.root / "data.yaml").write_text(yaml.safe_dump({"names": NAMES} | content))

    def load(self, split: str = "train") -> list[dict]:
        return load_yolo(read_layout(self.root), split)


@pytest.fixture
def folders(tmp_path) -> Folders:
    return Folders(tmp_path / "own")


@pytest.mark.parametrize("pattern", ["{kind}/{split}", "{split}/{kind}"])
@pytest.mark.parametrize(
    "content",
    [
        {},
        {"names": dict(enumerate(NAMES)), "nc": 3},
        {"names": {"2": "cone", "0": "car", "1": "bus"}},
        {"path": "../own", "train": "{train}", "val": ["{val}"], "test": None},
        {"path": "elsewhere", "train": "../{train}", "val": "{val}", "test": "no/images"},
    ],
)
def test_layouts(tmp_path, pattern, content):
    text = json.dumps(content)
    for split in ("train", "val"):
        text = text.replace(f"{{{split}}}", pattern.format(kind="images", split=split))
    folders = Folders(tmp_path / "own", pattern, **json.loads(text))
    for source in (folders.root, folders.root / "data.yaml"):
        layout = read_layout(source)
        assert layout.classes == NAMES and set(layout.images) == {"train", "val"}
    train, (val,) = load_yolo(layout, "train"), load_yolo(layout, "val")
    assert [Path(d["file_name"]).name for d in train] == ["a.jpg", "b.jpg"]
    assert [d["image_id"] for d in train] == [1, 2]
    assert (val["height"], val["width"]) == SIZE
    (annotation,) = val["annotations"]
    assert annotation["bbox"] == [40, 20, 60, 60] and annotation["category_id"] == 1


def test_labels_stand_in_the_place_of_the_last_images(tmp_path):
    assert label_path(Path("/images/x/images/train/images.jpg")) == Path(
        "/images/x/labels/train/images.txt"
    )
    assert label_path(Path("photos/1.jpg")) == Path("photos/1.txt")
    assert label_path(Path("images.jpg")) == Path("images.txt")


def test_images_without_objects_stay(folders, caplog):
    folders.label("train", "a", "\n \n")
    (folders.place("labels", "train") / "b.txt").unlink()
    assert [d["annotations"] for d in folders.load()] == [[], []]
    assert "2 images; 1 without a label file" in caplog.text
    (folders.place("labels", "train") / "a.txt").unlink()
    with pytest.raises(DataError, match="no image of 'train' has labels; for .*a.jpg there is no"):
        folders.load()


def test_tests_without_labels_are_left_out(folders):
    shutil.copytree(folders.place("images", "train"), folders.place("images", "test"))
    assert set(read_layout(folders.root).images) == {"train", "val"}
    folders.label("test", "a", "0 0.5 0.5 0.5 0.5")
    assert set(read_layout(folders.root).images) == {"train", "val", "test"}


def test_polygons_and_keypoints_become_boxes(folders):
    folders.label("train", "a", "2 0.1 0.5 0.3 0.25 0.5 0.75\n0 .5 .5 .6 .5 .5 .75")
    polygon, triangle = folders.load()[0]["annotations"]
    assert polygon["bbox"] == pytest.approx([10, 20, 50, 60]) and polygon["category_id"] == 2
    assert triangle["bbox"] == pytest.approx([50, 40, 60, 60])
    folders.describe(kpt_shape=[1, 2])
    folders.label("train", "a", "2 0.5 0.5 0.2 0.5 0.9 0.9")
    (person,) = folders.load()[0]["annotations"]
    assert person["bbox"] == pytest.approx([40, 20, 60, 60])


def test_boxes_are_clipped_or_dropped_with_counts(folders, caplog):
    lines = ["0 0 0.5 0.2 0.5", "0 1.2 0.5 0.2 0.2", "0 0.5 0.5 0 0.5", "0 0.95 0.5 0.100001 0.5"]
    folders.label("train", "a", "\n".join(lines))
    boxes = [a["bbox"] for a in folders.load()[0]["annotations"]]
    assert boxes[0] == pytest.approx([0, 20, 10, 60]) and boxes[1][2] == 100 and len(boxes) == 2
    assert "2 images; 1 clipped, 2 dropped" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("car 0.5 0.5 0.2 0.2", "'car 0.5 0.5 0.2 0.2' is not a line of numbers"),
        ("0 0.5 0.5 0.2", "3 numbers behind the class"),
        ("0 0.5 0.5 0.2 0.2 0.9", "5 numbers behind the class"),
        ("0", "0 numbers behind the class"),
        ("3 0.5 0.5 0.2 0.2", "class 3 is not one of 0 to 2"),
        ("-1 0.5 0.5 0.2 0.2", "class -1 is not one of 0 to 2"),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5 is not one of 0 to 2"),
        ("0 320 240 64 48", "320 is no share of the image's sides"),
        ("0 0.5 0.5 -0.2 0.2", "width -0.2 and height 0.2 must not be negative"),
        ("0 0.5 nan 0.2 0.2", "is not finite"),
        ("0,0.5,0.5,0.2,0.2", "is not a line of numbers"),
    ],
)
def test_bad_lines_name_file_and_line(folders, line, message):
    folders.label("train", "a", f"0 0.5 0.5 0.1 0.1\n\n{line}\n")
    with pytest.raises(DataError, match=f"labels/train/a.txt: line 3: .*{message}"):
        folders.load()


@given(st.text(max_size=60), st.booleans())
def test_any_text_is_read_or_named(tmp_path_factory, text, keypoints):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text(text, encoding="utf-8")
    try:
        annotations = read_labels(path, SIZE, 3, keypoints, Counter())
    except DataError as error:
        assert str(error).startswith(f"{path}: line ")
    else:
        assert len(annotations) <= len(text.splitlines())


@given(
    st.lists(st.floats(-2, 2), min_size=4, max_size=12).filter(lambda v: len(v) % 2 == 0),
    st.integers(0, 2),
)
def test_read_boxes_lie_in_the_image(tmp_path_factory, values, label):
    path = tmp_path_factory.getbasetemp() / "box.txt"
    path.write_text(" ".join(map(str, [label, *values])))
    counts = Counter()
    try:
        found = read_labels(path, SIZE, 3, False, counts)
    except DataError as error:
        assert "must not be negative" in str(error) and len(values) == 4 and min(values[2:]) < 0
        return
    assert len(found) + counts["dropped"] == 1
    for annotation in found:
        x, y, x2, y2 = annotation["bbox"]
        assert 0 <= x <= x2 - 1 and x2 <= SIZE[1] and 0 <= y <= y2 - 1 and y2 <= SIZE[0]
        assert annotation["category_id"] == label


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=9))
def test_boxes_enclose_their_polygons(points):
    words = [str(v) for point in points for v in point]
    _, (x, y, x2, y2) = read_line(["0", *words], "here", keypoints=False)
    assert all(x <= px <= x2 and y <= py <= y2 for px, py in points)
    assert {x, x2} <= {px for px, _ in points} and {y, y2} <= {py for _, py in points}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("names: [a\nb: {", "not readable as YAML"),
        ("!!python/object/apply:os.getcwd []", "not readable as YAML"),
        ("- a", "expected keys and values, found list"),
        ("nc: 3", "'names' has to list the names"),
        ("names: {1: a, 2: b}", "the keys of 'names' are 1, 2, not 0, 1, 2"),
        ("names: [a, [b]]", "'names' holds a list"),
        ("names: [a]\nnc: 2", "'nc' is 2, but 'names' has 1"),
        ("names: [a]\ntrain: here", "'train' is 'here', which is none of the folders"),
        ("names: [a]\nval: {x: 1}", "'val' is .*, not a folder"),
    ],
)
def test_bad_descriptions_are_named(folders, content, message):
    (folders.root / "data.yaml").write_text(content)
    with pytest.raises(DataError, match=f"own/data.yaml: .*{message}"):
        read_layout(folders.root)


def test_missing_descriptions_are_named(folders, tmp_path):
    with pytest.raises(DataError, match="absent.yaml: not readable as YAML: .*No such file"):
        read_layout(tmp_path / "absent.yaml")
    (tmp_path / "data.yaml").write_text("names: [a]")
    with pytest.raises(DataError, match="data.yaml: no images in images/train or train/images"):
        read_layout(tmp_path)
    (folders.root / "data.yaml").rename(folders.root / "own.yml")
    assert len(folders.load()) == 2
    (folders.root / "other.yaml").write_text("names: [a]")
    with pytest.raises(DataError, match="own: needs a data.yaml, found other.yaml, own.yml"):
        read_layout(folders.root)


def test_images_are_upright_as_their_labels_are(folders):
    turned(folders.place("images", "val") / "c.jpg", 6)
    (dataset_dict,) = folders.load("val")
    assert read_picture(dataset_dict).image.shape[:2] == (20, 12)


def test_conversion(folders, tmp_path, capsys):
    output = tmp_path / "coco"
    arguments = ["--input", str(folders.root), "--output", str(output)]
    yolo_to_coco.main(arguments)
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    yolo_to_coco.main(arguments)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first
    assert set(first) == {"train.json", "val.json"}
    told = capsys.readouterr().out
    assert f"{output}/train.json: 2 images, 2 boxes" in told
    coco = COCO(str(output / "train.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == NAMES
    # The printed overrides are those of a data set that loads.
    files = dict(word.split("=") for word in told.splitlines()[-1].split())
    files = {key.rpartition(".")[2]: value for key, value in files.items()}
    (loaded,) = coco_dataset(next(data_set_names), **files)
    assert read_picture(loaded).boxes.tolist() == [[40, 20, 60, 60]]
    assert read_picture(loaded).classes.tolist() == [1]


def test_conversion_replaces_no_input_and_reports_errors(folders, capsys):
    folders.describe(train="images/train", val="images/train")
    data = folders.root / "data.yaml"
    (folders.root / "train.json").symlink_to(folders.place("images", "train") / "a.jpg")
    for options, message in {
        ("--input", str(data), "--output", str(folders.root)): "would replace the input",
        ("--input", str(data), "--output", str(folders.place("labels", "train"))): "would replace",
        ("--input", str(folders.root / "x"), "--output", "out"): "x: not readable as YAML",
    }.items():
        with pytest.raises(SystemExit) as stop:
            yolo_to_coco.main([*options])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    folders.label("train", "b", "9 0 0 1 1")
    with pytest.raises(SystemExit):
        yolo_to_coco.main(["--input", str(data), "--output", str(folders.root / "out")])
    assert "b.txt: line 1: class 9 is not one of 0 to 2" in capsys.readouterr().err
    assert not (folders.root / "out").exists()

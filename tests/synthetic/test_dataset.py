import json

import cv2
import numpy as np
import pytest

from dset_d2.synthetic import CAMERAS, CATEGORIES, camera_seed, dataset, frame_seed, render_scene
from dset_d2.synthetic.dataset import write_dataset

SMALL = (96, 160)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("roadside")
    write_dataset(root, 4, 2, *SMALL, seed=3, progress=False)
    return root


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def side(root):
    return root / "dair-v2x" / "single-infrastructure-side"


def assert_frame_is_rendered(root, seed, index):
    scene = render_scene(frame_seed(seed, index), *SMALL, camera_seed(seed, index))
    image = cv2.imread(str(side(root) / "image" / f"{index:06d}.jpg"))[..., ::-1]
    assert np.abs(image.astype(int) - scene.image).mean() < 6
    labels = json.loads((side(root) / "label" / "camera" / f"{index:06d}.json").read_text())
    assert [item["type"] for item in labels] == [item.category for item in scene.objects]
    for label, item in zip(labels, scene.objects, strict=True):
        assert [float(v) for v in label["2d_box"].values()] == pytest.approx(item.box, abs=1e-4)


def test_labels_are_strings_as_in_the_genuine_files(written):
    paths = side(written).glob("label/camera/*.json")
    items = [item for path in paths for item in json.loads(path.read_text())]
    assert {item["type"] for item in items} <= {*CATEGORIES, "PedestrianIgnore"}
    for key in ("occluded_state", "truncated_state"):
        assert {"0"} <= {item[key] for item in items} <= {"0", "1", "2"}
    for item in items:
        assert set(item["2d_box"]) == {"xmin", "ymin", "xmax", "ymax"}
        numbers = [item["rotation"]]
        for key in ("2d_box", "3d_location", "3d_dimensions"):
            numbers += item[key].values()
        assert all(isinstance(number, str) and np.isfinite(float(number)) for number in numbers)


def test_files_records_and_split_agree(written):
    folder = written / "dair-v2x" / "split_datas"
    split = json.loads((folder / "single-infrastructure-split-data.json").read_text())
    names = [f"{index:06d}" for index in range(6)]
    assert split == {"train": names[:4], "val": names[4:], "test": []}
    records = json.loads((side(written) / "data_info.json").read_text())
    assert [record["image_path"] for record in records] == [f"image/{n}.jpg" for n in names]
    for key, where in (("image_path", "image"), ("label_camera_std_path", "label/camera")):
        assert {side(written) / r[key] for r in records} == set((side(written) / where).iterdir())
    assert_frame_is_rendered(written, 3, 1)


def test_more_frames_leave_earlier_ones_as_they_are(written, tmp_path):
    write_dataset(tmp_path, 1, 1, *SMALL, seed=3, progress=False)
    few, many = contents(tmp_path), contents(written)
    frames = [path for path in few if path.stem in ("000000", "000001")]
    assert len(frames) == 4 and all(few[path] == many[path] for path in frames)


def test_second_run_reuses_the_first(tmp_path, monkeypatch):
    write_dataset(tmp_path, 1, 1, *SMALL, progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(dataset, "render_scene", lambda *args: pytest.fail("drawn again"))
    write_dataset(tmp_path, 1, 1, *SMALL, progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_interrupted_run_is_completed(written, tmp_path, monkeypatch):
    drawn = []

    def interrupted(*args):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(args)
        return render_scene(*args)

    monkeypatch.setattr(dataset, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 4, 2, *SMALL, seed=3, progress=False)
    drawn.append(None)  # never three again
    write_dataset(tmp_path, 4, 2, *SMALL, seed=3, progress=False)
    assert len(drawn) - 1 == 6, "whole frames are kept"
    assert contents(tmp_path) == contents(written)


def test_other_arguments_replace_the_dataset(tmp_path):
    write_dataset(tmp_path, 3, 0, *SMALL, seed=5, progress=False)
    write_dataset(tmp_path, 1, 1, *SMALL, seed=6, progress=False)
    names = sorted(path.stem for path in (side(tmp_path) / "image").iterdir())
    assert names == ["000000", "000001"]
    assert_frame_is_rendered(tmp_path, 6, 0)


def test_another_version_of_the_drawing_replaces_the_dataset(tmp_path, monkeypatch):
    write_dataset(tmp_path, 1, 0, *SMALL, progress=False)
    image = side(tmp_path) / "image" / "000000.jpg"
    genuine = image.read_bytes()
    image.write_bytes(b"of an older drawing")
    write_dataset(tmp_path, 1, 0, *SMALL, progress=False)
    assert image.read_bytes() != genuine
    monkeypatch.setattr(dataset, "VERSION", dataset.VERSION + 1)
    write_dataset(tmp_path, 1, 0, *SMALL, progress=False)
    assert image.read_bytes() == genuine


def test_a_foreign_dataset_is_left_alone(tmp_path):
    image = side(tmp_path) / "image" / "000000.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"genuine")
    with pytest.raises(FileExistsError, match="single-infrastructure-side"):
        write_dataset(tmp_path, 1, 0, *SMALL, progress=False)
    assert contents(tmp_path) == {image.relative_to(tmp_path): b"genuine"}


@pytest.mark.parametrize(
    "change", [{"height": 0}, {"width": -5}, {"num_train": -1}, {"num_val": -2}, {"seed": -1}]
)
def test_bad_arguments_are_named(tmp_path, change):
    arguments = {"num_train": 1, "num_val": 1, "height": 96, "width": 160, "seed": 0} | change
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        write_dataset(tmp_path, **arguments, progress=False)
    assert not list(tmp_path.iterdir())
    if name in ("height", "width", "seed"):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            render_scene(arguments["seed"], arguments["height"], arguments["width"])


def test_frames_take_turns_among_a_few_cameras():
    assert len({camera_seed(0, index) for index in range(3 * CAMERAS)}) == CAMERAS
    assert camera_seed(0, 1) == camera_seed(0, 1 + CAMERAS) != camera_seed(1, 1)
    assert len({frame_seed(s, i) for s in range(3) for i in range(3)}) == 9

import json
from itertools import combinations

import cv2
import numpy as np
import pytest

from dset_d2.data import roadside
from dset_d2.data.roadside import (
    CAMERAS,
    CATEGORIES,
    camera_seed,
    frame_seed,
    paint_order,
    render_scene,
    write_dataset,
)

HEIGHT, WIDTH = 288, 512
SMALL = (96, 160)


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(frame_seed(0, index), HEIGHT, WIDTH) for index in range(60)]


@pytest.fixture(scope="module")
def bare_scenes():
    """Scenes in which nothing but participants can hide a participant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roadside, "_furnish", lambda stage: None)
        return [render_scene(frame_seed(1, index), HEIGHT, WIDTH) for index in range(30)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("roadside")
    write_dataset(root, 4, 2, *SMALL, seed=3, progress=False)
    return root


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def intersect(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_a_seed_decides_the_scene():
    first, again, other = (render_scene(seed, *SMALL) for seed in (7, 7, 8))
    assert np.array_equal(first.image, again.image) and first.objects == again.objects
    assert not np.array_equal(first.image, other.image)
    assert len({frame_seed(s, i) for s in range(3) for i in range(3)}) == 9


@pytest.mark.parametrize("size", [(96, 160), (121, 97), (64, 256)])
def test_any_size_can_be_drawn(size):
    scene = render_scene(2, *size)
    assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8


def test_boxes_lie_in_the_image_and_are_not_tiny(scenes):
    boxes = np.array([item.box for scene in scenes for item in scene.objects])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (WIDTH, HEIGHT)).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides[:, 1] >= 6).all() and (sides[:, 0] >= 2).all()


def test_truncated_boxes_touch_the_border(scenes):
    items = [item for scene in scenes for item in scene.objects]
    assert {item.truncated_state for item in items} == {0, 1, 2}
    x0, y0, x1, y1 = np.array([item.box for item in items if item.truncated_state]).T
    touches = (np.minimum(x0, y0) <= 1) | (x1 >= WIDTH - 1) | (y1 >= HEIGHT - 1)
    assert touches.mean() > 0.97  # a thing of loose parts may end short of the border


def test_boxes_fit_what_was_drawn(bare_scenes, monkeypatch):
    """The pixels that differ once the participants are left out fill the boxes."""
    genuine_paint = roadside.paint

    def paint_shadows_only(image, *args, **kwargs):
        if image.ndim == 2:
            genuine_paint(image, *args, **kwargs)

    monkeypatch.setattr(roadside, "_furnish", lambda stage: None)
    monkeypatch.setattr(roadside, "paint", paint_shadows_only)
    errors = []
    for index, scene in enumerate(bare_scenes[:12]):
        empty = render_scene(frame_seed(1, index), HEIGHT, WIDTH).image
        changed = np.abs(scene.image.astype(int) - empty).max(-1) > 20
        for item in scene.objects:
            around = np.array(item.box) + (-5, -5, 5, 5)
            if any(o is not item and intersect(o.box, around) for o in scene.objects):
                continue
            x0, y0, x1, y1 = np.clip(around.round().astype(int), 0, (WIDTH, HEIGHT) * 2)
            rows, columns = np.nonzero(changed[y0:y1, x0:x1])
            drawn = (columns.min() + x0, rows.min() + y0, columns.max() + x0, rows.max() + y0)
            errors.append(np.abs(np.array(drawn) + (0, 0, 1, 1) - item.box).max())
    assert len(errors) > 15
    # The rest are dark paints, whose edge is hard to tell from asphalt.
    assert np.median(errors) < 1.2 and np.quantile(errors, 0.75) < 2.5


def test_heights_in_pixels_follow_perspective(scenes):
    """Pixel height x depth / metres is the focal length, one for all upright things of a scene."""
    compared = 0
    for scene in scenes:
        focal = [
            (item.box[3] - item.box[1]) * item.depth / item.dimensions[2]
            for item in scene.objects
            if item.category == "Pedestrian" and not item.truncated_state
        ]
        for a, b in combinations(focal, 2):
            compared += 1
            assert a == pytest.approx(b, rel=0.25)
            assert 0.8 * WIDTH < a < 1.6 * WIDTH
    assert compared > 5


def test_every_category_occurs(scenes):
    names = [item.category for scene in scenes for item in scene.objects]
    assert all(names.count(name) >= 10 for name in CATEGORIES)
    assert set(names) <= {*CATEGORIES, "PedestrianIgnore"}
    assert max(CATEGORIES, key=names.count) == "Car"
    assert max(len(scene.objects) for scene in scenes) > 8


def test_some_frames_are_empty(monkeypatch):
    monkeypatch.setattr(roadside, "_furnish", lambda stage: None)
    counts = [len(render_scene(frame_seed(2, index), 144, 256).objects) for index in range(100)]
    assert 2 <= counts.count(0) <= 16


def test_what_no_other_box_meets_is_not_occluded(bare_scenes):
    states = []
    for scene in bare_scenes:
        for item in scene.objects:
            others = [o for o in scene.objects if o is not item and intersect(o.box, item.box)]
            states.append(item.occluded_state)
            if item.occluded_state:
                assert others
    assert set(states) == {0, 1, 2}


def test_the_nearer_of_two_is_the_one_in_front(bare_scenes):
    """Where two short participants overlap and one is hidden, the hidden one is farther away."""
    hidden = 0
    for scene in bare_scenes:
        for item in scene.objects:
            others = [o for o in scene.objects if o is not item and intersect(o.box, item.box)]
            if item.occluded_state and max(o.dimensions[0] for o in others) < 6:
                hidden += 1
                assert any(o.depth < item.depth for o in others)
    assert hidden >= 3


def rectangle(x, y, width, length):
    corners = np.array([[1, -1], [1, 1], [-1, 1], [-1, -1]]) * (width / 2, length / 2)
    return np.array([x, y]) + corners


def test_a_bus_hides_the_car_beside_it_even_if_its_centre_is_farther():
    bus, car = rectangle(5.0, 30, 2.5, 11), rectangle(8.5, 28, 1.8, 4.5)
    assert paint_order(np.array([bus, car])) == [1, 0]
    assert paint_order(np.array([car, bus])) == [0, 1]
    ahead = rectangle(5.0, 20, 1.8, 4.5)
    assert paint_order(np.array([bus, car, ahead])) == [1, 0, 2]
    assert paint_order(np.zeros((0, 4, 2))) == []


def test_labels_are_strings_as_in_the_genuine_files(dataset):
    side = dataset / "dair-v2x" / "single-infrastructure-side"
    items = [
        item for path in side.glob("label/camera/*.json") for item in json.loads(path.read_text())
    ]
    assert items
    for item in items:
        assert item["type"] in (*CATEGORIES, "PedestrianIgnore")
        assert item["occluded_state"] in ("0", "1", "2")
        assert item["truncated_state"] in ("0", "1", "2")
        assert set(item["2d_box"]) == {"xmin", "ymin", "xmax", "ymax"}
        numbers = [item["rotation"]]
        for key in ("2d_box", "3d_location", "3d_dimensions"):
            numbers += item[key].values()
        assert all(isinstance(number, str) and np.isfinite(float(number)) for number in numbers)


def test_files_records_and_split_agree(dataset):
    base = dataset / "dair-v2x"
    side = base / "single-infrastructure-side"
    split = json.loads((base / "split_datas" / "single-infrastructure-split-data.json").read_text())
    assert split == {
        "train": ["000000", "000001", "000002", "000003"],
        "val": ["000004", "000005"],
        "test": [],
    }
    records = json.loads((side / "data_info.json").read_text())
    names = split["train"] + split["val"]
    assert [record["image_path"] for record in records] == [f"image/{n}.jpg" for n in names]
    assert {side / r["image_path"] for r in records} == set((side / "image").iterdir())
    labels = {side / r["label_camera_std_path"] for r in records}
    assert labels == set((side / "label" / "camera").iterdir())


def test_written_frame_is_the_rendered_one(dataset):
    side = dataset / "dair-v2x" / "single-infrastructure-side"
    scene = render_scene(frame_seed(3, 1), *SMALL, camera_seed(3, 1))
    image = cv2.imread(str(side / "image" / "000001.jpg"))[..., ::-1]
    assert np.abs(image.astype(int) - scene.image).mean() < 6
    labels = json.loads((side / "label" / "camera" / "000001.json").read_text())
    assert [item["type"] for item in labels] == [item.category for item in scene.objects]
    for label, item in zip(labels, scene.objects, strict=True):
        assert [float(v) for v in label["2d_box"].values()] == pytest.approx(item.box, abs=1e-4)


def test_more_frames_leave_earlier_ones_as_they_are(dataset, tmp_path):
    write_dataset(tmp_path, 1, 1, *SMALL, seed=3, progress=False)
    few, many = contents(tmp_path), contents(dataset)
    frames = [path for path in few if path.stem in ("000000", "000001")]
    assert len(frames) == 4 and all(few[path] == many[path] for path in frames)


def test_second_run_reuses_the_first(tmp_path, monkeypatch):
    write_dataset(tmp_path, 1, 1, *SMALL, progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(roadside, "render_scene", lambda *args: pytest.fail("drawn again"))
    write_dataset(tmp_path, 1, 1, *SMALL, progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_interrupted_run_is_completed(dataset, tmp_path, monkeypatch):
    drawn = []

    def interrupted(*args):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(args)
        return render_scene(*args)

    monkeypatch.setattr(roadside, "render_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 4, 2, *SMALL, seed=3, progress=False)
    drawn.append(None)  # never three again
    write_dataset(tmp_path, 4, 2, *SMALL, seed=3, progress=False)
    assert len(drawn) - 1 == 6, "whole frames are kept"
    assert contents(tmp_path) == contents(dataset)


def test_other_arguments_replace_the_dataset(tmp_path):
    write_dataset(tmp_path, 3, 0, *SMALL, seed=5, progress=False)
    write_dataset(tmp_path, 1, 1, *SMALL, seed=6, progress=False)
    side = tmp_path / "dair-v2x" / "single-infrastructure-side"
    assert sorted(path.stem for path in (side / "image").iterdir()) == ["000000", "000001"]
    image = cv2.imread(str(side / "image" / "000000.jpg"))[..., ::-1]
    assert (
        np.abs(
            image.astype(int) - render_scene(frame_seed(6, 0), *SMALL, camera_seed(6, 0)).image
        ).mean()
        < 6
    )


def test_a_foreign_dataset_is_left_alone(tmp_path):
    image = tmp_path / "dair-v2x" / "single-infrastructure-side" / "image" / "000000.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"genuine")
    with pytest.raises(FileExistsError, match="single-infrastructure-side"):
        write_dataset(tmp_path, 1, 0, *SMALL, progress=False)
    assert image.read_bytes() == b"genuine"


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


def test_frames_of_a_data_set_share_a_few_cameras(monkeypatch):
    """With nothing that moves, what is left of two frames of one camera differs by light alone."""
    assert len({camera_seed(0, index) for index in range(3 * CAMERAS)}) == CAMERAS
    monkeypatch.setattr(roadside, "_populate", lambda stage: None)
    dull = roadside._light(np.random.default_rng(0))
    monkeypatch.setattr(roadside, "_light", lambda rng: dull)

    def edges(index: int) -> np.ndarray:
        image = render_scene(frame_seed(0, index), 144, 256, camera_seed(0, index)).image
        grey = cv2.GaussianBlur(image.mean(-1).astype(np.float32), None, 2)
        return np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1)).ravel()

    pictures = [edges(index) for index in range(2 * CAMERAS)]
    likeness = np.corrcoef(pictures)
    for index in range(CAMERAS):
        other = (index + 1) % CAMERAS
        assert likeness[index, index + CAMERAS] > 0.9 > 0.7 > likeness[index, other]

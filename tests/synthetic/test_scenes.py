from itertools import combinations

import cv2
import numpy as np
import pytest

from dset_d2.data.dair_v2x import CLASSES_8
from dset_d2.synthetic import (
    CAMERAS,
    CATEGORIES,
    Scene,
    camera_seed,
    frame_seed,
    render_scene,
    render_sequence,
    scenes,
)
from dset_d2.synthetic.models import CAR_COLOURS
from dset_d2.synthetic.scenes import paint_order

HEIGHT, WIDTH = 288, 512
SMALL = (96, 160)


@pytest.fixture(scope="module")
def rendered():
    return [render_scene(frame_seed(0, index), HEIGHT, WIDTH) for index in range(60)]


@pytest.fixture(scope="module")
def bare():
    """Scenes in which nothing but participants can hide a participant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "_furnish", lambda stage: None)
        return [render_scene(frame_seed(1, index), HEIGHT, WIDTH) for index in range(30)]


def intersect(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_a_seed_decides_the_scene():
    first, again, other = (render_scene(seed, *SMALL) for seed in (7, 7, 8))
    assert np.array_equal(first.image, again.image) and first.objects == again.objects
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("size", [(96, 160), (121, 97), (64, 256)])
def test_any_size_can_be_drawn(size):
    scene = render_scene(2, *size)
    assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8


def test_boxes_lie_in_the_image_and_are_not_tiny(rendered):
    boxes = np.array([item.box for scene in rendered for item in scene.objects])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (WIDTH, HEIGHT)).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides[:, 1] >= 6).all() and (sides[:, 0] >= 2).all()


def test_truncated_boxes_touch_the_border(rendered):
    items = [item for scene in rendered for item in scene.objects]
    assert {item.truncated_state for item in items} == {0, 1, 2}
    x0, y0, x1, y1 = np.array([item.box for item in items if item.truncated_state]).T
    touches = (np.minimum(x0, y0) <= 1) | (x1 >= WIDTH - 1) | (y1 >= HEIGHT - 1)
    assert touches.mean() > 0.97  # a thing of loose parts may end short of the border


def last_of_sequence(seed: int, height: int, width: int) -> Scene:
    *_, last = render_sequence(seed, 3, height, width, rate=2)
    return last


@pytest.mark.parametrize("render", [render_scene, last_of_sequence])
def test_boxes_fit_what_was_drawn(render, monkeypatch):
    """The pixels that differ once the participants are left out fill the boxes."""

    def draw_all() -> list[Scene]:
        return [render(frame_seed(1, index), HEIGHT, WIDTH) for index in range(12)]

    day = scenes._light(np.random.default_rng(0))  # at night, lamps shine beyond the boxes
    assert not day.lamps
    monkeypatch.setattr(scenes, "_light", lambda rng: day)
    monkeypatch.setattr(scenes, "_furnish", lambda stage: None)
    whole = draw_all()
    genuine_paint = scenes.paint
    monkeypatch.setattr(
        scenes, "paint", lambda image, *args: image.ndim == 2 and genuine_paint(image, *args)
    )
    errors = []
    for scene, empty in zip(whole, draw_all(), strict=True):
        changed = np.abs(scene.image.astype(int) - empty.image).max(-1) > 20
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


def test_heights_in_pixels_follow_perspective(rendered):
    """Pixel height x depth / metres is the focal length, one for all upright things of a scene."""
    compared = 0
    for scene in rendered:
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


def test_every_category_occurs(rendered):
    names = [item.category for scene in rendered for item in scene.objects]
    assert CATEGORIES == CLASSES_8
    assert all(names.count(name) >= 10 for name in CATEGORIES)
    assert set(names) <= {*CATEGORIES, "PedestrianIgnore"}
    assert max(CATEGORIES, key=names.count) == "Car"
    assert max(len(scene.objects) for scene in rendered) > 8


def test_some_frames_are_empty(monkeypatch):
    monkeypatch.setattr(scenes, "_furnish", lambda stage: None)
    counts = [len(render_scene(frame_seed(2, index), *SMALL).objects) for index in range(100)]
    assert 2 <= counts.count(0) <= 16


def test_what_no_other_box_meets_is_not_occluded(bare):
    states = []
    for scene in bare:
        for item in scene.objects:
            others = [o for o in scene.objects if o is not item and intersect(o.box, item.box)]
            states.append(item.occluded_state)
            if item.occluded_state:
                assert others
    assert set(states) == {0, 1, 2}


def test_the_nearer_of_two_is_the_one_in_front(bare):
    """Where two short participants overlap and one is hidden, the hidden one is farther away."""
    hidden = 0
    for scene in bare:
        for item in filter(lambda item: item.occluded_state, scene.objects):
            others = [o for o in scene.objects if o is not item and intersect(o.box, item.box)]
            if max(o.dimensions[0] for o in others) < 6:
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


def test_frames_of_one_camera_look_alike(monkeypatch):
    """With nothing that moves, what is left of two frames of one camera differs by light alone."""
    monkeypatch.setattr(scenes, "_populate", lambda stage: None)
    dull = scenes._light(np.random.default_rng(0))
    monkeypatch.setattr(scenes, "_light", lambda rng: dull)

    def edges(index: int) -> np.ndarray:
        image = render_scene(frame_seed(0, index), 144, 256, camera_seed(0, index)).image
        grey = cv2.GaussianBlur(image.mean(-1).astype(np.float32), None, 2)
        return np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1)).ravel()

    pictures = [edges(index) for index in range(2 * CAMERAS)]
    likeness = np.corrcoef(pictures)
    for index in range(CAMERAS):
        other = (index + 1) % CAMERAS
        assert likeness[index, index + CAMERAS] > 0.9 > 0.7 > likeness[index, other]


@pytest.fixture
def shadowless(monkeypatch):
    """By day and without shadows, things show in their boxes alone; those hidden have one, too."""
    day = scenes._light(np.random.default_rng(0))
    assert not day.lamps
    monkeypatch.setattr(scenes, "_light", lambda rng: day._replace(shadow=0))
    monkeypatch.setattr(scenes, "CONTACT_SHADOW", 0)
    monkeypatch.setattr(scenes, "MIN_VISIBLE", 0)


def test_cars_have_the_colour_that_is_named(shadowless):
    shown = {name: [] for name in CAR_COLOURS}
    for seed in range(40):
        scene = render_scene(seed, 144, 240)
        for item in scene.objects:
            assert (item.colour is None) == (item.category != "Car")
            if item.colour and not item.occluded_state and not item.truncated_state:
                x0, y0, x1, y1 = np.round(item.box).astype(int)
                shown[item.colour].append(scene.image[y0:y1, x0:x1].mean((0, 1)))
    means = {name: np.mean(colours, 0) for name, colours in shown.items()}
    grey = [means[name].mean() for name in ("black", "grey", "silver")]
    assert grey == sorted(grey)
    warmth = {name: red - blue for name, (red, _, blue) in means.items()}
    assert max(warmth[name] for name in ("black", "grey", "silver")) < warmth["brown"]
    assert warmth["brown"] < warmth["red"]


def test_a_sequence_begins_with_its_scene_and_repeats():
    first, second = render_sequence(6, 2, HEIGHT, WIDTH)
    scene = render_scene(6, HEIGHT, WIDTH)
    assert first.objects == scene.objects != second.objects
    difference = first.image.astype(float) - scene.image
    assert abs(difference.mean()) < 0.1 and difference.std() < 8, "only the noise is another"
    for one, again in zip((first, second), render_sequence(6, 2, HEIGHT, WIDTH), strict=True):
        assert np.array_equal(one.image, again.image) and one.objects == again.objects


def test_in_a_sequence_the_noise_alone_is_new_where_nothing_moves(monkeypatch):
    monkeypatch.setattr(scenes, "_populate", lambda stage: None)
    first, *others = (frame.image for frame in render_sequence(2, 3, *SMALL, noise=False))
    assert all(np.array_equal(first, other) for other in others)
    noisy = [frame.image.astype(float) for frame in render_sequence(2, 3, *SMALL)]
    grains = [image - first for image in noisy]
    likeness = np.corrcoef([grain.ravel() for grain in grains])
    assert all(0.3 < grain.std() < 6 and abs(grain.mean()) < 0.2 for grain in grains)
    assert np.abs(likeness - np.eye(3)).max() < 0.1


@pytest.mark.parametrize("seed", [6, 27])
def test_frames_of_a_sequence_differ_in_the_boxes_of_what_moved_alone(seed, shadowless):
    before, compared = None, 0
    for frame in render_sequence(seed, 5, HEIGHT, WIDTH, noise=False):
        boxes = np.array([item.box for item in frame.objects])
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= (WIDTH, HEIGHT)).all()
        if before is not None:
            places = {item.location for item in before.objects}
            still = places & {item.location for item in frame.objects}
            changed = (frame.image != before.image).any(-1)
            elsewhere = changed.copy()
            for item in (*before.objects, *frame.objects):
                if item.location not in still:
                    low, high = np.array(item.box).reshape(2, 2).round().astype(int)
                    x0, y0 = np.maximum(low - 4, 0)  # lenses blur
                    box = np.s_[y0 : high[1] + 4, x0 : high[0] + 4]
                    assert changed[box].any()
                    elsewhere[box] = False
                    compared += 1
            assert not elsewhere.any()
        before = frame
    assert compared > 20


@pytest.mark.parametrize("rate", [10, 25])
def test_participants_keep_their_speed_and_their_road(rate):
    speeds: dict[tuple, list[float]] = {}
    for seed in range(20, 26):
        frames = list(render_sequence(seed, 4, *SMALL, rate=rate, noise=False))
        for before, after in zip(frames, frames[1:]):
            places = {item.dimensions: item.location for item in before.objects}
            for item in after.objects:
                if item.dimensions in places:
                    step = np.subtract(item.location, places[item.dimensions])
                    speed = np.linalg.norm(step) * rate
                    speeds.setdefault((item.category, *item.dimensions), []).append(speed)
                    # The roads lead ahead and across, up to 0.35 radians off.
                    assert abs(step).min() == 0 and sorted(abs(step))[1] <= 0.37 * abs(step).max()
    moved = 0
    for (category, *_), found in speeds.items():
        driven = [speed for speed in found if speed > 1e-6]  # the others wait
        moved += bool(driven)
        assert not driven or max(driven) == pytest.approx(min(driven), rel=1e-3)
        low, high = scenes.HABITS[category].speed
        assert all(low - 1e-3 <= speed <= high + 1e-3 for speed in driven)
    assert moved > 15


def test_nothing_drives_into_another():
    stage = scenes._set_stage(22, *SMALL, None)
    steps = [0.0 if thing.category is None else 1.0 for thing in stage.things]
    waited = 0
    for _ in range(30):
        for index, step in enumerate(steps):
            before = stage.things[index].position
            scenes._advance(stage, index, step)
            waited += bool(step) and np.array_equal(before, stage.things[index].position)
        for one, other in combinations([thing.footprint for thing in stage.things], 2):
            assert cv2.intersectConvexConvex(one, other)[0] < 1e-3
    assert waited


@pytest.mark.parametrize("change", [{"frames": 0}, {"rate": 0}, {"width": 0}, {"seed": -1}])
def test_bad_arguments_of_a_sequence_are_named(change):
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        render_sequence(**{"seed": 0, "frames": 1, "height": 96, "width": 160} | change)

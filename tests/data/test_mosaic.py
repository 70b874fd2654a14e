import itertools
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

import dset_d2
from dset_d2.clock import shared_step
from dset_d2.config import apply_overrides
from dset_d2.data import loader
from dset_d2.data.augmentation import RandomPhotometric, RandomZoomOut, UntilStep
from dset_d2.data.mapper import DETRMapper
from dset_d2.data.mosaic import Mosaic
from dset_d2.synthetic import write_dataset

from .test_mapper import COLOURS, colour_share

BOXES = [(10, 10, 50, 40), (60, 50, 110, 100), (115, 20, 155, 60)]
PLAIN = DETRMapper(is_train=True, augmentations=[])


def dataset_dicts(folder, sizes, boxes=BOXES) -> list[dict]:
    """Grey images of the (height, width) sizes with one coloured rectangle per box."""
    dataset = []
    for number, size in enumerate(sizes):
        image = np.full((*size, 3), 100, np.uint8)
        annotations = []
        for index, (x, y, x2, y2) in enumerate(boxes):
            image[y:y2, x:x2] = COLOURS[index]
            box = {"bbox": [x, y, x2, y2], "bbox_mode": BoxMode.XYXY_ABS, "category_id": index}
            annotations.append(box)
        path = folder / f"{number}.png"
        Image.fromarray(image).save(path)
        dataset.append(
            {"file_name": str(path), "image_id": number, "annotations": annotations}
            | {"height": size[0], "width": size[1]}
        )
    return dataset


def mosaic(dataset, **settings) -> Mosaic:
    return Mosaic(dataset, **{"end": 10, "prob": 1.0} | settings)


def is_plain(item: dict) -> bool:
    return "composition" not in item


@pytest.mark.parametrize(
    "augmentations",
    [[], [T.RandomFlip(prob=1.0), T.Resize((96, 128))]],
    ids=["alone", "before_others"],
)
def test_boxes_enclose_their_objects(tmp_path, augmentations):
    """Boxes hold nothing but their object, and nothing of its colour lies outside of all boxes."""
    dataset = dataset_dicts(tmp_path, [(120, 160), (150, 200), (200, 170), (110, 300)])
    dataset = mosaic(dataset, min_visible=0.0, min_side=0.0)
    mapper = DETRMapper(is_train=True, augmentations=augmentations, min_box_size=0.0)
    rim, seen = 2, 0  # resampling blurs the rims
    torch.manual_seed(0)
    for index in [0, 1, 2, 3] * 10:
        result = mapper(dataset[index])
        image, instances = result["image"], result["instances"]
        assert image.dtype == torch.uint8 and instances.image_size == tuple(image.shape[1:])
        outside = torch.ones(image.shape[1:], dtype=torch.bool)
        for box, label in zip(instances.gt_boxes.tensor, instances.gt_classes):
            inner = box + torch.tensor([rim, rim, -rim, -rim])
            if (inner[2:] - inner[:2]).min() >= 4:
                assert colour_share(image, inner, COLOURS[int(label)]) > 0.99
            x, y, x2, y2 = box.tolist()
            low_x, low_y = max(0, int(x) - rim), max(0, int(y) - rim)
            outside[low_y : int(y2) + rim + 1, low_x : int(x2) + rim + 1] = False
            seen += 1
        vivid = (image.amax(0).int() - image.amin(0).int()) > 120
        assert (vivid & outside).float().mean() < 0.001
    assert seen > 150


def test_objects_are_neither_lost_nor_made_up(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 4)
    torch.manual_seed(0)
    # Small enough for every window: all of the four images is seen.
    whole = mosaic(dataset, scale=(0.3, 0.3))
    for index in range(4):
        result = PLAIN(whole[index])
        assert result["image"].shape == (3, 120, 160)
        assert result["instances"].gt_classes.sort()[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
        area = result["instances"].gt_boxes.area().sort()[0]
        expected = torch.tensor([1200.0, 1600, 2500]).repeat_interleave(4) * 0.09
        torch.testing.assert_close(area, expected)

    counts = [len(PLAIN(mosaic(dataset)[0])["instances"]) for _ in range(30)]
    assert max(counts) <= 12 and len(set(counts)) > 1 and np.mean(counts) > 4


@pytest.mark.parametrize("min_visible, min_side", [(0.0, 0.0), (0.6, 0.0), (0.0, 12.0)])
def test_slivers_and_cut_boxes_are_dropped(tmp_path, min_visible, min_side):
    """At a fixed scale of one size of box, what is left of each tells what was cut away."""
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 4, [(40, 40, 80, 80)])
    dataset = mosaic(dataset, scale=(1.0, 1.0), min_visible=min_visible, min_side=min_side)
    torch.manual_seed(0)
    boxes = [PLAIN(dataset[0])["instances"].gt_boxes for _ in range(60)]
    areas = torch.cat([b.area() for b in boxes])
    sides = torch.cat([b.tensor[:, 2:] - b.tensor[:, :2] for b in boxes])
    assert areas.max() == 1600 and areas.min() >= min_visible * 1600
    assert sides.min() >= min_side
    strict = min_visible or min_side
    assert (areas.min() < 0.6 * 1600 or sides.min() < 12) if not strict else len(areas) > 20


def test_mixup_keeps_the_objects_of_both(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 2)
    for dataset_dict in dataset[1:]:
        Image.new("RGB", (160, 120)).save(dataset_dict["file_name"])
        for annotation in dataset_dict["annotations"]:
            annotation["category_id"] += 10
    torch.manual_seed(0)
    result = PLAIN(mosaic(dataset, prob=0.0, mixup_prob=1.0)[0])
    assert result["instances"].gt_classes.tolist() == [0, 1, 2, 10, 11, 12]
    boxes = result["instances"].gt_boxes.tensor
    torch.testing.assert_close(boxes[:3], boxes[3:])
    red, grey = result["image"][:, 20, 20], result["image"][:, 0, 0]
    weight = 1 - grey[0] / 100
    assert result["image"].dtype == torch.uint8 and 0.39 < weight < 0.61
    assert abs(red[0] / 255 - (1 - weight)) < 0.02 and red[1] == red[2] == 0

    both = mosaic(dataset, mixup_prob=1.0, scale=(0.3, 0.3))[1]
    assert [len(collage) for collage in both["composition"].collages] == [4, 4]
    assert len(PLAIN(both)["instances"]) == 24


def test_mixup_of_another_size_leaves_the_rest_as_it_is(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160), (300, 160)], [])
    Image.new("RGB", (160, 300)).save(dataset[1]["file_name"])
    torch.manual_seed(0)
    image = PLAIN(mosaic(dataset, prob=0.0, mixup_prob=1.0)[0])["image"][0]
    blended = (image < 100).any(0)
    assert blended.sum() == 64 and (image < 100)[:, blended].all()
    assert (image[:, ~blended] == 100).all()


def test_prob(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 3)
    torch.manual_seed(0)
    assert all(is_plain(mosaic(dataset, prob=0.0)[0]) for _ in range(20))
    share = np.mean([is_plain(mosaic(dataset, prob=0.25)[0]) for _ in range(200)])
    assert 0.65 < share < 0.85


def test_plain_items_are_those_of_the_data_set(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 2)
    assert [mosaic(dataset, prob=0.0)[i] for i in range(2)] == dataset


def test_ends_at_its_step(tmp_path, monkeypatch):
    dataset = mosaic(dataset_dicts(tmp_path, [(120, 160)] * 2), end=5, mixup_prob=1.0)
    monkeypatch.setattr(shared_step, "value", 4)
    assert not is_plain(dataset[0])
    monkeypatch.setattr(shared_step, "value", 5)
    assert is_plain(dataset[0])


def test_one_image_is_enough(tmp_path):
    dataset = mosaic(dataset_dicts(tmp_path, [(120, 160)]), mixup_prob=1.0, scale=(0.3, 0.3))
    result = PLAIN(dataset[0])
    assert len(result["instances"]) == 12  # not blended with itself


def test_images_without_objects(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160), (40, 30), (1, 1), (3, 500)], [])
    dataset[1].pop("annotations")
    dataset = mosaic(dataset, mixup_prob=1.0)
    torch.manual_seed(0)
    for index in [0, 1, 2, 3] * 5:
        result = PLAIN(dataset[index])
        instances = result["instances"]
        assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
        assert instances.gt_boxes.tensor.dtype == torch.float32
        assert instances.gt_classes.dtype == torch.int64
        assert result["image"].shape[1:] == (result["height"], result["width"])


def test_crowds_are_no_targets(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 2)
    for dataset_dict in dataset:
        dataset_dict["annotations"][1]["iscrowd"] = 1
    result = PLAIN(mosaic(dataset, scale=(0.3, 0.3))[0])
    assert sorted(result["instances"].gt_classes.tolist()) == [0] * 4 + [2] * 4
    assert "annotations" not in result and "composition" not in result


def test_broken_images_are_named(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 2)
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(ValueError, match="1.png: cannot read this image"):
        PLAIN(mosaic(dataset)[0])
    (tmp_path / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1.png"):
        PLAIN(mosaic(dataset)[0])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prob": 1.5}, "prob=1.5"),
        ({"prob": float("nan")}, "prob=nan"),
        ({"mixup_prob": -0.1}, "mixup_prob=-0.1"),
        ({"scale": (0.0, 1.0)}, "scale="),
        ({"scale": (1.0, 0.5)}, "scale="),
        ({"scale": [0.5]}, "scale="),
        ({"min_visible": 2}, "min_visible=2"),
        ({"min_side": -1}, "min_side=-1"),
        ({"end": -1}, "end=-1"),
        ({"dataset": []}, "dataset is empty"),
        ({"dataset": iter([{}])}, "dataset="),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Mosaic(**{"dataset": [{}], "end": 1} | settings)


def test_the_seed_decides(tmp_path):
    dataset = mosaic(dataset_dicts(tmp_path, [(120, 160)] * 4), prob=0.5, mixup_prob=0.5)
    mapper = DETRMapper(is_train=True, augmentations=[RandomPhotometric()])

    def draw(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [mapper(dataset[i])["image"] for i in range(4)]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))


def make_loader(dataset, num_workers: int, method: str):
    """Detectron2's loader; its sampler and workers take their seeds from numpy's and torch's."""
    torch.manual_seed(0)
    np.random.seed(0)
    loader = build_detection_train_loader(
        mosaic(dataset, end=3),
        mapper=PLAIN,
        total_batch_size=1,
        num_workers=num_workers,
        aspect_ratio_grouping=False,
        multiprocessing_context=method,
    )
    return (batch[0]["image"] for batch in loader)


@pytest.mark.parametrize("method, num_workers", [("fork", 2), ("forkserver", 1)])
def test_workers(tmp_path, method, num_workers):
    """Runs repeat however workers are started, and the end reaches them."""
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 4)
    plain = PLAIN(dataset[0])["image"]
    expected = list(itertools.islice(make_loader(dataset, num_workers, "fork"), 4))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([*expected, plain], 2))
    images = make_loader(dataset, num_workers, method)
    try:
        assert all(torch.equal(next(images), image) for image in expected)
        shared_step.value = 3
        for _ in range(8):  # what was queued before
            image = next(images)
        assert torch.equal(image, plain)
    finally:
        shared_step.value = 0


def test_memory_is_common_to_workers():
    """What is pickled for a spawned worker is a handle, however large the data set is."""
    dataset = Mosaic([{"file_name": "x" * 1000} for _ in range(5000)], end=1)
    assert len(ForkingPickler.dumps(dataset)) < 5000
    assert Mosaic(dataset.dataset, end=1).dataset is dataset.dataset


def test_augmentations_can_leave_mosaics_out(tmp_path):
    dataset = dataset_dicts(tmp_path, [(120, 160)] * 2)
    zoom = UntilStep(RandomZoomOut(prob=1.0), end=10, on_mosaic=False)
    mapper = DETRMapper(is_train=True, augmentations=[zoom])
    assert mapper(dataset[0])["image"].shape != (3, 120, 160)
    assert mapper(mosaic(dataset)[0])["image"].shape == (3, 120, 160)
    assert mapper(mosaic(dataset, prob=0.0, mixup_prob=1.0)[0])["image"].shape == (3, 120, 160)


@pytest.fixture
def roadside(tmp_path, monkeypatch):
    """A config whose data are three generated images."""
    write_dataset(tmp_path, num_train=3, num_val=1, height=96, width=160, seed=3, progress=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_roadside.py")
    cfg.dataloader.train.num_workers = 0
    cfg.dataloader.strong_augmentation_end = 10
    return cfg


def test_switched_on_in_a_config(roadside):
    apply_overrides(roadside, ["dataloader.mosaic.prob=1", "dataloader.mosaic.mixup_prob=0.5"])
    batch = next(iter(instantiate(roadside.dataloader.train)))
    assert [tuple(x["image"].shape) for x in batch] == [(3, *roadside.dataloader.image_size)] * 4
    assert all(x["instances"].has("gt_boxes") for x in batch)


def test_the_switch_decides_what_is_loaded(roadside, monkeypatch, caplog):
    monkeypatch.setattr(loader, "build_detection_train_loader", lambda dataset, **_: dataset)

    def load(*overrides: str) -> list | Mosaic:
        return instantiate(apply_overrides(roadside, [*overrides]).dataloader.train)

    assert type(load()) is list
    mixed = load("dataloader.mosaic.mixup_prob=0.5")
    assert (mixed.prob, mixed.mixup_prob, mixed.end, len(mixed)) == (0, 0.5, 10, 3)
    assert not caplog.records
    load("dataloader.mosaic.end=0")
    assert "Mosaic and mixup end at training step 0" in caplog.text
    with pytest.raises(ValueError, match="prob=1.5 must lie"):
        load("dataloader.mosaic.prob=1.5")
    assert type(load("dataloader.mosaic.prob=0", "dataloader.mosaic.mixup_prob=0")) is list

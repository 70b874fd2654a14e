import itertools
import pickle

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from dset_d2.clock import shared_step
from dset_d2.data.augmentation import (
    RandomIoUCrop,
    RandomPhotometric,
    RandomZoomOut,
    UntilStep,
)
from dset_d2.data.mapper import DETRMapper
from dset_d2.data.mosaic import Mosaic

from .test_reading import turned

PLAIN = DETRMapper(is_train=True, augmentations=[])
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def dataset_dict(tmp_path, boxes, size=(120, 160)) -> dict:
    """An image of grey with one coloured rectangle per box, and its dataset dict."""
    image = np.full((*size, 3), 100, np.uint8)
    annotations = []
    for index, (x, y, x2, y2) in enumerate(boxes):
        image[y:y2, x:x2] = COLOURS[index]
        annotations.append(
            {"bbox": [x, y, x2, y2], "bbox_mode": BoxMode.XYXY_ABS, "category_id": index}
        )
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    return {"file_name": str(path), "image_id": 7, "annotations": annotations}


def colour_share(image: torch.Tensor, box: torch.Tensor, colour) -> float:
    """Share of the box's pixels that have the colour, up to resampling."""
    x, y, x2, y2 = box.round().int().tolist()
    patch = image[:, y:y2, x:x2].float().flatten(1)
    return ((patch - torch.tensor(colour)[:, None]).abs().amax(0) < 60).float().mean().item()


@pytest.mark.parametrize(
    "augmentation",
    [
        T.RandomFlip(prob=1.0),
        T.Resize((96, 96)),
        RandomZoomOut(prob=1.0, max_scale=2.0),
        RandomIoUCrop(prob=1.0),
    ],
    ids=lambda a: type(a).__name__,
)
def test_boxes_follow_their_objects(tmp_path, augmentation):
    boxes = [(10, 10, 50, 40), (60, 50, 110, 100), (100, 20, 150, 60)]
    mapper = DETRMapper(is_train=True, augmentations=[augmentation])
    source = dataset_dict(tmp_path, boxes)
    torch.manual_seed(0)
    seen = 0
    for _ in range(20):
        result = mapper(source)
        instances = result["instances"]
        assert instances.image_size == tuple(result["image"].shape[1:])
        for box, label in zip(instances.gt_boxes.tensor, instances.gt_classes):
            seen += 1
            assert colour_share(result["image"], box, COLOURS[int(label)]) > 0.85
    assert seen >= 20


def test_crop_drops_objects_whose_centre_is_cut_away(tmp_path):
    mapper = DETRMapper(is_train=True, augmentations=[RandomIoUCrop(prob=1.0)])
    source = dataset_dict(tmp_path, [(10, 10, 50, 40), (60, 50, 110, 100), (100, 20, 150, 60)])
    torch.manual_seed(0)
    counts = {len(mapper(source)["instances"]) for _ in range(40)}
    assert counts <= {1, 2, 3} and len(counts) > 1


def test_photometric_keeps_geometry(tmp_path):
    mapper = DETRMapper(is_train=True, augmentations=[RandomPhotometric(prob=1.0)])
    source = dataset_dict(tmp_path, [(10, 10, 50, 40)])
    torch.manual_seed(0)
    result = mapper(source)
    plain = DETRMapper(is_train=True, augmentations=[])(source)
    assert result["image"].dtype == torch.uint8
    assert not torch.equal(result["image"], plain["image"])
    torch.testing.assert_close(
        result["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor
    )


def test_strong_augmentation_ends_at_its_step(tmp_path, monkeypatch):
    augmentation = UntilStep(RandomZoomOut(prob=1.0), end=5)
    mapper = DETRMapper(is_train=True, augmentations=[augmentation])
    source = dataset_dict(tmp_path, [(10, 10, 50, 40)])
    monkeypatch.setattr(shared_step, "value", 4)
    assert mapper(source)["image"].shape[1:] != (120, 160)
    monkeypatch.setattr(shared_step, "value", 5)
    assert mapper(source)["image"].shape[1:] == (120, 160)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_see_the_step(tmp_path, method):
    """The trainer's count reaches Detectron2's loader processes, however they were started."""
    source = dataset_dict(tmp_path, [(10, 10, 50, 40)]) | {"height": 120, "width": 160}
    loader = build_detection_train_loader(
        [source] * 4,
        mapper=DETRMapper(is_train=True, augmentations=[UntilStep(RandomZoomOut(1.0), end=3)]),
        total_batch_size=1,
        num_workers=1,
        aspect_ratio_grouping=False,
        multiprocessing_context=method,
    )
    batches = iter(loader)
    try:
        assert next(batches)[0]["image"].shape[1:] != (120, 160)
        shared_step.value = 3
        for _ in range(5):  # what was queued before
            image = next(batches)[0]["image"]
        assert image.shape[1:] == (120, 160)
    finally:
        shared_step.value = 0


def test_crowds_and_slivers_are_no_targets(tmp_path):
    source = dataset_dict(tmp_path, [(10, 10, 50, 40), (60, 50, 110, 100)])
    source["annotations"][1]["iscrowd"] = 1
    sliver = dict(source["annotations"][0], bbox=[5, 5, 5.5, 30])
    source["annotations"].append(sliver)
    result = DETRMapper(is_train=True, augmentations=[])(source)
    assert result["instances"].gt_classes.tolist() == [0]
    assert len(source["annotations"]) == 3  # the data set's own dict is left alone


def test_images_without_annotations(tmp_path):
    source = dataset_dict(tmp_path, [])
    augmentations = [RandomIoUCrop(1.0), RandomZoomOut(1.0), T.RandomFlip(), T.Resize((64, 64))]
    result = DETRMapper(is_train=True, augmentations=augmentations)(source)
    assert len(result["instances"]) == 0 and result["image"].shape == (3, 64, 64)
    assert "instances" not in DETRMapper(is_train=False, augmentations=[])(source)


def test_wrong_size_in_the_dict_is_an_error(tmp_path):
    source = dataset_dict(tmp_path, []) | {"height": 5, "width": 5}
    with pytest.raises(Exception, match="image.png"):
        DETRMapper(is_train=False, augmentations=[])(source)


def test_mapper_can_travel_to_a_worker():
    mapper = DETRMapper(is_train=True, augmentations=[RandomPhotometric(), RandomIoUCrop()])
    assert pickle.loads(pickle.dumps(mapper)).min_box_size == 1.0


def test_turned_images_fit_their_records(tmp_path):
    """Boxes were drawn either on what viewers show or on what is stored; sizes tell."""
    path = tmp_path / "phone.png"
    turned(path, 6)
    source = {"file_name": str(path), "image_id": 1}
    upright = PLAIN(source | {"height": 20, "width": 12})
    assert upright["image"].shape == (3, 20, 12) and upright["image"][0, 0, 11] == 255
    stored = PLAIN(source | {"height": 12, "width": 20})
    assert stored["image"].shape == (3, 12, 20) and stored["image"][0, 0, 0] == 255
    unsaid = PLAIN(source)
    assert torch.equal(unsaid["image"], upright["image"])
    assert (unsaid["height"], unsaid["width"]) == (20, 12)
    with pytest.raises(
        ValueError, match="phone.png: the image is 12 x 20, its record says 12 x 12"
    ):
        PLAIN(source | {"height": 12, "width": 12})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": [50, 10, 10, 40]}, r"box \[50.0, 10.0, 10.0, 40.0\] is not x1 <= x2"),
        ({"bbox": [10, 40, 50, 10]}, "is not x1 <= x2, y1 <= y2"),
        ({"bbox": [10, 10, -5, 5], "bbox_mode": BoxMode.XYWH_ABS}, "is not x1 <= x2"),
        ({"bbox": [float("nan"), 10, 50, 40]}, "is not x1 <= x2"),
        ({"bbox": [10, 10, float("inf"), 40]}, "is not x1 <= x2"),
        ({"bbox": [10, 10, 50]}, "4"),
        ({"category_id": -1}, "class -1 is below 0"),
        ({"category_id": None}, "TypeError"),
    ],
)
@pytest.mark.parametrize("is_train", [True, False])
def test_wrong_annotations_name_the_image(tmp_path, change, message, is_train):
    source = dataset_dict(tmp_path, [(10, 10, 50, 40)])
    source["annotations"][0] |= change
    with pytest.raises(ValueError, match=f"image.png: wrong annotations: .*{message}"):
        DETRMapper(is_train=is_train, augmentations=[T.RandomFlip()])(source)


def broken(folder, name: str) -> dict:
    (folder / name).write_text("no image")
    return {"file_name": str(folder / name), "image_id": 8, "height": 120, "width": 160}


def test_unreadable_images_are_skipped_if_asked(tmp_path, caplog):
    good, bad = dataset_dict(tmp_path, [(10, 10, 50, 40)]), broken(tmp_path, "bad.png")
    missing = bad | {"file_name": str(tmp_path / "missing.png")}
    with pytest.raises(ValueError, match="bad.png"):
        PLAIN(bad)
    mapper = DETRMapper(is_train=True, augmentations=[], skip_unreadable=True)
    first = mapper(bad)
    assert first["image"].max() == 0 and len(first["instances"]) == 0
    expected = mapper(good)
    for skipped in (bad, missing):
        found = mapper(skipped)
        assert torch.equal(found["image"], expected["image"]) and len(found["instances"]) == 1
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert ["skipped 1 unr", "skipped 2 unr", "skipped 3 unr"] == [m[:13] for m in messages]
    assert "bad.png" in messages[1] and "missing.png" in messages[2]
    # What a file says wrongly is no damage.
    with pytest.raises(ValueError, match="its record says 5 x 5"):
        mapper(good | {"height": 5, "width": 5})

    nothing = DETRMapper(is_train=True, augmentations=[], skip_unreadable=True)
    with pytest.raises(ValueError, match="bad.png"):
        for _ in range(20):
            nothing(bad)
    with pytest.raises(ValueError, match="skip_unreadable=True"):
        DETRMapper(is_train=False, augmentations=[], skip_unreadable=True)


def test_unreadable_images_do_not_end_detectron2s_loader(tmp_path):
    good = dataset_dict(tmp_path, [(10, 10, 50, 40)]) | {"height": 120, "width": 160}
    loader = build_detection_train_loader(
        Mosaic([broken(tmp_path, "a.png"), good, broken(tmp_path, "b.png")], end=9, prob=0.3),
        mapper=DETRMapper(is_train=True, augmentations=[T.Resize((64, 64))], skip_unreadable=True),
        total_batch_size=2,
        num_workers=1,
    )
    images = [x["image"] for batch in itertools.islice(loader, 6) for x in batch]
    assert all(image.shape == (3, 64, 64) for image in images)
    assert any(image.max() > 0 for image in images)

"""What data sets say of each other, and whether their images are there, before the first step."""

import json

import pytest
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from omegaconf import OmegaConf

import dset_d2
from dset_d2.data import Mosaic
from dset_d2.data.checks import check_datasets, check_images, dataset_names
from dset_d2.data.reading import DataError

from .test_coco import names, write
from .test_reading import turned


def register(*classes: str) -> str:
    name = next(names)
    DatasetCatalog.register(name, lambda: [{"file_name": "x"}])
    MetadataCatalog.get(name).set(**({"thing_classes": list(classes)} if classes else {}))
    return name


def test_names_of_all_kinds_of_data_sets():
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_custom.py").dataloader
    assert dataset_names(cfg.train.dataset) == ["custom_train"]
    assert dataset_names(L(Mosaic)(dataset=cfg.train.dataset, end=1)) == ["custom_train"]
    two = L(get_detection_dataset_dicts)(names=["a", "b"])
    assert dataset_names(L(Mosaic)(dataset=two, end=1)) == ["a", "b"]
    assert dataset_names(L(list)()) == []
    with pytest.raises(DataError, match="names no data set"):
        dataset_names(L(get_detection_dataset_dicts)(names=[]))


def test_categories_must_agree():
    one, same = register("car", "bus"), register("car", "bus")
    check_datasets(one, same, 2)
    check_datasets([one, same], same)
    for classes in (["bus", "car"], ["car"], ["car", "bus", "cone"]):
        other = register(*classes)
        with pytest.raises(DataError, match=f"'{other}' and '{one}' must have the same categories"):
            check_datasets([same, other], one)
    with pytest.raises(DataError, match="num_classes=80, but .* has 2 categories"):
        check_datasets(one, same, 80)
    with pytest.raises(DataError, match="has no categories"):
        check_datasets(register(), one)
    MetadataCatalog.get(empty := register()).thing_classes = []
    with pytest.raises(DataError, match=f"'{empty}' has no categories"):
        check_datasets(one, empty)


def test_wrong_names_are_told_from_right_ones():
    with pytest.raises(DataError, match="named 'dair_v2x_i_tran'; close to it: dair_v2x_i_train"):
        check_datasets("dair_v2x_i_tran", "dair_v2x_i_val")
    with pytest.raises(DataError, match="named 'qqqqqqq'$"):
        check_datasets("dair_v2x_i_train", "qqqqqqq")
    for several in (["dair_v2x_i_val"], OmegaConf.create(["dair_v2x_i_val"]), []):
        with pytest.raises(DataError, match="scores one, named without brackets"):
            check_datasets("dair_v2x_i_train", several)
    check_datasets(["dair_v2x_i_train", "dair_v2x_c_i_train"], "dair_v2x_i_val", 8)


@pytest.mark.parametrize("field", ["area", "iscrowd", "id", "bbox"])
def test_files_that_cannot_be_evaluated_are_named(tmp_path, field):
    name = next(names)
    register_coco_instances(name, {}, write(tmp_path), str(tmp_path))
    check_datasets(register("car", "bus"), name)
    content = json.loads((tmp_path / "set.json").read_text())
    del content["annotations"][1][field]
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"set.json: annotation 1 has no '{field}'"):
        check_datasets(name, name)
    write(tmp_path, {"id": 0})
    with pytest.raises(DataError, match="set.json: annotation 0 has id 0"):
        check_datasets(name, name)


def image_files(folder, count=4) -> list[dict]:
    paths = [folder / f"{index}.jpg" for index in range(count)]
    for path in paths:
        turned(path, 6)
    return [{"file_name": str(path), "height": 12, "width": 20} for path in paths]


def test_images_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    dataset = image_files(tmp_path)
    dataset[1] |= {"height": 20, "width": 12}
    del dataset[2]["width"]
    assert check_images(dataset) == check_images(Mosaic(dataset + dataset[:2], end=1)) == 4
    assert "Checked the headers of 4 image files" in caplog.text


def test_bad_images_are_named(tmp_path, caplog):
    dataset = image_files(tmp_path)
    (tmp_path / "1.jpg").write_text("no image")
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(DataError, match="2 of 4 image files are bad: .*1.jpg.*3.jpg"):
        check_images(dataset)
    assert check_images(dataset, skip_unreadable=True) == 2
    assert "2 of 4 image files are bad: " in caplog.text
    dataset[0] |= {"height": 7}
    with pytest.raises(DataError, match="3 of 4 .*0.jpg: the image is 12 x 20, its record says 20"):
        check_images(dataset, skip_unreadable=True)
    with pytest.raises(DataError, match="1 of 1 image files are bad"):
        check_images(dataset[1:2], skip_unreadable=True)

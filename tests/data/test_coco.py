"""Annotation files as people write them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from dset_d2.data.coco import coco_dataset


def test_coco_dataset_names_stand_for_one_file(tmp_path):
    with pytest.raises(ValueError, match="'unset_train': set json_file and image_root"):
        coco_dataset("unset_train", "", "")
    (tmp_path / "a.json").write_text(
        '{"images": [{"id": 1, "file_name": "x.jpg", "height": 4, "width": 5}],'
        ' "annotations": [], "categories": [{"id": 3, "name": "car"}]}'
    )
    arguments = ("some_train", str(tmp_path / "a.json"), str(tmp_path))
    assert len(coco_dataset(*arguments)) == len(coco_dataset(*arguments)) == 1
    assert len(coco_dataset("some_train", "", "")) == 1
    with pytest.raises(ValueError, match="'some_train': set json_file and image_root"):
        coco_dataset("some_train", "", str(tmp_path))
    with pytest.raises(ValueError, match="some_train' stands for"):
        coco_dataset("some_train", str(tmp_path / "b.json"), str(tmp_path))


FIELDS = {"area": 400.0, "iscrowd": 0, "segmentation": [[2, 2, 22, 2, 22, 22, 2, 22]]}
names = map("some_set_{}".format, itertools.count())  # registered ones cannot be taken back


def write(folder, changes=(), categories=("car", "bus")) -> str:
    """A COCO file of one image with three objects, whose fields the changes leave out or set."""
    annotations = []
    for index in range(3):
        annotation = {"id": index + 1, "image_id": 5, "category_id": 1 + index % 2} | FIELDS
        annotation["bbox"] = [2 + 30 * index, 2, 20, 20]
        for key, value in dict(changes).items():
            annotation.pop(key) if value is None else annotation.update({key: value})
        annotations.append(annotation | ({"id": index} if dict(changes).get("id") == 0 else {}))
    content = {
        "images": [{"id": 5, "file_name": "x.jpg", "height": 60, "width": 100}],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(categories)],
    }
    path = folder / "set.json"
    path.write_text(json.dumps(content))
    return str(path)


@settings(deadline=None, max_examples=20)
@given(st.sets(st.sampled_from(["area", "iscrowd", "segmentation"])), st.booleans())
def test_what_evaluation_needs_is_completed(tmp_path_factory, absent, first_id_is_0):
    folder = tmp_path_factory.mktemp("coco")
    changes = dict.fromkeys(absent) | ({"id": 0} if first_id_is_0 else {})
    path, name = write(folder, changes), next(names)
    (dataset_dict,) = coco_dataset(name, path, str(folder))
    before = Path(path).read_bytes()
    evaluator = COCOEvaluator(name, ("bbox",), False, str(folder), allow_cached_coco=False)
    kept = MetadataCatalog.get(name).json_file == path
    assert kept == (not absent & {"area", "iscrowd"} and not first_id_is_0)
    instances = Instances((60, 100))
    boxes = np.array([a["bbox"] for a in dataset_dict["annotations"]])
    instances.pred_boxes = Boxes(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
    instances.pred_classes = torch.tensor([a["category_id"] for a in dataset_dict["annotations"]])
    instances.scores = torch.ones(3)
    evaluator.reset()
    evaluator.process([dataset_dict], [{"instances": instances}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == results["APs"] == pytest.approx(100)
    assert Path(path).read_bytes() == before
    assert coco_dataset(name, path, str(folder)) == [dataset_dict]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "RecursionError"),
        ("{", "JSONDecodeError"),
        ("[]", "AssertionError"),
        ('{"images": []}', "KeyError: 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "is empty"),
        (
            '{"images": [{"id": 1, "file_name": "x"}], "annotations": [],'
            ' "categories": [{"id": 1, "name": "a"}]}',
            "KeyError: 'height'",
        ),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "odd.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"odd.json: not a COCO file of detections: .*{message}"):
        coco_dataset(next(names), str(path), str(tmp_path))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.json"):
        coco_dataset(next(names), str(tmp_path / "absent.json"), str(tmp_path))

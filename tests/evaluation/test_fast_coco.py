"""The fast evaluator gives pycocotools' numbers, to the last digit."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.registry import locate

import dset_d2
from dset_d2.config import apply_overrides
from dset_d2.evaluation import FastCOCOEvaluator, fast_coco

IMAGES, CLASSES = 12, 5  # of which the last has no object, and the last but one no detection


@pytest.fixture
def data(tmp_path, request) -> str:
    """A data set with crowds, boxes of all sizes, and images without any; its ids have gaps."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in range(IMAGES - 2):
        for _ in range(rng.integers(1, 9)):
            x, y, w, h = (float(v) for v in rng.uniform((0, 0, 6, 6), (300, 200, 190, 150)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + image,
                    "category_id": 3 * int(rng.integers(1, CLASSES)),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
    content = {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.jpg", "height": 400, "width": 500}
            for i in range(IMAGES)
        ],
        "annotations": annotations,
        "categories": [{"id": 3 * (i + 1), "name": f"class {i}"} for i in range(CLASSES)],
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    name = f"fast_coco_{request.node.name}"
    register_coco_instances(name, {}, str(path), str(tmp_path))

    DatasetCatalog.get(name)
    assert any(a["iscrowd"] for a in annotations)
    return name


def detections(name: str) -> list[tuple[dict, dict]]:
    """Boxes close to the objects', doubled, and at random, many with the same score."""
    rng = np.random.default_rng(1)
    annotations = json.loads(open(MetadataCatalog.get(name).json_file).read())["annotations"]
    pairs = []
    for image in range(10, 10 + IMAGES):
        boxes = [np.array(a["bbox"]) for a in annotations if a["image_id"] == image]
        boxes = [box + rng.normal(0, 8, 4) for box in boxes for _ in range(2)]
        boxes += list(rng.uniform((0, 0, 6, 6), (300, 200, 190, 150), (110, 4)))
        boxes = np.maximum(np.stack(boxes), 0.5)
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((400, 500))
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        found.scores = torch.tensor(rng.integers(0, 20, len(boxes)) / 20)  # ties
        found.pred_classes = torch.tensor(rng.choice([0, 1, 2, 4], len(boxes)))
        pairs.append(({"image_id": image}, {"instances": found}))
    return pairs


def results(evaluator, pairs: list[tuple[dict, dict]]) -> dict[str, float]:
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process([inputs], [outputs])
    return evaluator.evaluate()["bbox"]


def test_numbers_are_equal(data, tmp_path):
    folders = tmp_path / "slow", tmp_path / "fast"
    slow, fast = (
        results(kind(data, ("bbox",), False, str(folder)), detections(data))
        for kind, folder in zip((COCOEvaluator, FastCOCOEvaluator), folders)
    )
    assert 0 < slow["AP"] < 100 and np.isnan(slow["AP-class 4"])
    np.testing.assert_equal(fast, slow)
    texts = [(folder / "coco_instances_results.json").read_text() for folder in folders]
    assert texts[0] == texts[1]


def test_no_detections(data, tmp_path):
    empty = Instances((400, 500))
    empty.pred_boxes = Boxes(torch.zeros(0, 4))
    empty.scores, empty.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    pairs = [({"image_id": 10}, {"instances": empty})]
    slow, fast = (
        results(kind(data, ("bbox",), False), pairs) for kind in (COCOEvaluator, FastCOCOEvaluator)
    )
    np.testing.assert_equal(fast, slow)


def test_one_override_turns_it_on():
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py")
    override = "dataloader.evaluator._target_=dset_d2.evaluation.FastCOCOEvaluator"
    node = apply_overrides(cfg, [override]).dataloader.evaluator
    assert locate(node._target_) is FastCOCOEvaluator


def test_what_it_cannot_do_is_told(data, monkeypatch):
    with pytest.raises(ValueError, match=r"tasks=\('segm',\) must be \('bbox',\)"):
        FastCOCOEvaluator(data, ("segm",))
    monkeypatch.setattr(fast_coco, "COCO", None)
    with pytest.raises(ImportError, match=r"pip install 'dset_d2\[evaluation\]'"):
        FastCOCOEvaluator(data)

"""What choices are worth."""

import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from dset_d2.budget import NotesReward, QualityReward, soft_f1

CAR = [10.0, 10.0, 50.0, 30.0]
OTHER = [60.0, 60.0, 80.0, 90.0]


def detections(*rows) -> Instances:
    """Of rows (box, score, class)."""
    found = Instances((100, 100))
    found.pred_boxes = Boxes(torch.tensor([box for box, _, _ in rows]).reshape(-1, 4))
    found.scores = torch.tensor([score for _, score, _ in rows])
    found.pred_classes = torch.tensor([kind for _, _, kind in rows], dtype=torch.long)
    return found


def objects(*boxes, kind: int = 0, crowd: int = 0) -> list[dict]:
    mode = BoxMode.XYXY_ABS
    return [{"bbox": b, "bbox_mode": mode, "category_id": kind, "iscrowd": crowd} for b in boxes]


def test_quality_of_detections():
    assert soft_f1(detections((CAR, 1.0, 0)), objects(CAR)) == 1
    assert soft_f1(detections((CAR, 1.0, 1)), objects(CAR)) == 0
    assert soft_f1(detections((OTHER, 1.0, 0)), objects(CAR)) == 0
    assert soft_f1(detections(), objects(CAR)) == 0
    half = soft_f1(detections((CAR, 1.0, 0)), objects(CAR, OTHER))
    assert half == pytest.approx(2 / 3)
    # Twice the same object: only one of them finds it, the other costs its score.
    assert soft_f1(detections((CAR, 0.8, 0), (CAR, 0.6, 0)), objects(CAR)) == pytest.approx(
        2 * 0.8 / (1.4 + 1)
    )
    # An IoU of .725 is half way from .5 to .95.
    worse = [10.0, 10.0, 39.0, 30.0]
    assert soft_f1(detections((worse, 0.9, 0)), objects(CAR)) == pytest.approx(0.9 / 1.9)


def test_each_object_takes_what_is_best_for_all():
    """The best pair alone would leave the second object without a detection."""
    first, second = [0.0, 0.0, 40.0, 40.0], [0.0, 8.0, 40.0, 48.0]
    middle = [0.0, 4.0, 40.0, 44.0]
    rows = ((middle, 0.9, 0), (first, 0.8, 0))
    iou = 36 / 44
    gain = (iou - 0.5) / 0.45
    assert soft_f1(detections(*rows), objects(first, second)) == pytest.approx(
        2 * (0.9 * gain + 0.8) / (1.7 + 2)
    )


def test_empty_scenes_and_regions_that_count_for_nothing():
    assert soft_f1(detections(), []) == 1
    assert soft_f1(detections((CAR, 0.5, 0), (OTHER, 0.04, 0)), []) == pytest.approx(1 / 1.5)
    crowd = objects([0.0, 0.0, 60.0, 60.0], crowd=1)
    assert soft_f1(detections((CAR, 0.5, 0)), crowd) == 1
    assert soft_f1(detections((CAR, 0.5, 1)), crowd) == pytest.approx(1 / 1.5)
    assert soft_f1(detections((CAR, 0.5, 0)), crowd + objects(CAR)) == pytest.approx(1 / 1.5)


def test_rewards():
    quality, budget, complexity = torch.tensor(0.6), torch.tensor(100.0), torch.tensor(0.5)
    given = [quality, torch.tensor(80.0), budget, complexity]
    assert float(QualityReward()(*given)) == pytest.approx(0.6)
    assert float(QualityReward(saving=0.5)(*given)) == pytest.approx(0.7)
    slow = 0.5 / (1 + torch.tensor(2.0).exp().item())
    assert float(NotesReward()(*given)) == pytest.approx(0.6 - slow - 0.025 + 0.02)
    given[1] = torch.tensor(120.0)
    over = 0.5 / (1 + torch.tensor(-2.0).exp().item())
    assert float(NotesReward()(*given)) == pytest.approx(0.6 - over - 10 * 0.04 - 0.025)
    assert float(QualityReward(saving=0.5)(*given)) == pytest.approx(0.6)

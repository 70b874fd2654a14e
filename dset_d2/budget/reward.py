"""What a choice is worth: quality of an image's detections, and rewards of it and the time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import BoxMode, Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_area, box_iou

LEAST_SCORE = 0.05  # of detections that count


def soft_f1(instances: Instances, annotations: Sequence[dict]) -> float:
    """Quality of one image's detections, in [0, 1], which every change of a score or a box moves.

    ``2 TP / (sum of scores + number of objects)`` where each object takes one detection of its
    class, and a pair counts for its score times how far its IoU is on the way from .5 to .95, for
    the best sum of all pairs. An image without objects is worth ``1 / (1 + sum of scores)``.

    Args:
        instances: ``pred_boxes``, ``scores`` and ``pred_classes``.
        annotations: Detectron2's, of the same image size. Detections that mostly lie in a region
            marked ``iscrowd`` of their class count for nothing unless they find an object.
    """
    boxes, scores, classes = (
        x.cpu() for x in (instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
    )
    kept = scores >= LEAST_SCORE
    boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
    objects, kinds = ground_truth(a for a in annotations if not a.get("iscrowd", 0))
    crowds, crowd_kinds = ground_truth(a for a in annotations if a.get("iscrowd", 0))
    overlap = ((box_iou(boxes, objects) - 0.5) / 0.45).clamp(0, 1)
    gains = scores[:, None] * overlap * (classes[:, None] == kinds)
    row, column = linear_sum_assignment(gains.numpy(), maximize=True)
    paired = gains[row, column]
    excused = (share_within(boxes, crowds) >= 0.5) & (classes[:, None] == crowd_kinds)
    counted = ~excused.any(1)
    counted[row[(paired > 0).numpy()]] = True
    spent = float(scores[counted].sum())
    if not len(objects):
        return 1 / (1 + spent)
    return float(2 * paired.sum()) / (spent + len(objects))


def ground_truth(annotations) -> tuple[Tensor, Tensor]:
    """Boxes (n, 4) x1, y1, x2, y2 and classes (n,)."""
    pairs = [
        (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"])
        for a in annotations
    ]
    boxes = torch.tensor([box for box, _ in pairs], dtype=torch.float32).reshape(-1, 4)
    return boxes, torch.tensor([kind for _, kind in pairs], dtype=torch.long)


def share_within(boxes: Tensor, regions: Tensor) -> Tensor:
    """(N, 4) and (M, 4) -> (N, M): the share of each box's area that lies in each region."""
    low = torch.maximum(boxes[:, None, :2], regions[:, :2])
    high = torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    return (high - low).clamp(min=0).prod(-1) / box_area(boxes)[:, None].clamp(min=1e-6)


# Rewards. Quality and complexity are in [0, 1], latency and budget in milliseconds; all broadcast.


@dataclass(frozen=True)
class QualityReward:
    """Quality alone: what a budget is for. What does not fit it was never a choice.

    Args:
        saving: worth of a budget that is not spent, per share of it.
    """

    saving: float = 0.0

    def __call__(
        self, quality: Tensor, latency: Tensor, budget: Tensor, complexity: Tensor
    ) -> Tensor:
        return quality + self.saving * (1 - latency / budget).clamp(min=0)


@dataclass(frozen=True)
class NotesReward:
    """That of the notes which this controller comes from; it punishes where ours masks.

    Args:
        slowness: of a sigmoid around the budget, of ``steepness``.
        excess: of the square of the share of the budget that is exceeded.
        complexity: of the complexity.
        saving: of the share of the budget that is left.
    """

    slowness: float = 0.5
    steepness: float = 10.0
    excess: float = 10.0
    complexity: float = 0.05
    saving: float = 0.1

    def __call__(
        self, quality: Tensor, latency: Tensor, budget: Tensor, complexity: Tensor
    ) -> Tensor:
        over = latency / budget - 1
        reward = quality - self.slowness * (self.steepness * over).sigmoid()
        reward = reward - self.excess * over.clamp(min=0) ** 2 - self.complexity * complexity
        return reward + self.saving * (-over).clamp(min=0)


REWARDS = {"quality": QualityReward, "notes": NotesReward}

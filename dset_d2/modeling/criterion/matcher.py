"""Hungarian matching of predictions and ground truth (DETR, https://arxiv.org/abs/2005.12872)."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou


class Matches(NamedTuple):
    """Pairs of predictions and targets over a batch, M in all.

    ``target`` counts through the targets of all images, one image after the other.
    """

    image: Tensor  # (M,)
    query: Tensor  # (M,)
    target: Tensor  # (M,)

    @classmethod
    def from_lists(cls, query: list[Tensor], target: list[Tensor], counts: list[int]) -> "Matches":
        """From per-image indices; ``target`` counts within its image, which has ``counts``."""
        offsets = np.cumsum([0] + counts)
        image = [torch.full_like(q, i) for i, q in enumerate(query)]
        target = [t + int(offset) for t, offset in zip(target, offsets)]
        return cls(torch.cat(image), torch.cat(query), torch.cat(target))

    def to(self, device: torch.device) -> "Matches":
        return Matches(*(index.to(device) for index in self))


class HungarianMatcher(nn.Module):
    """One-to-one matching by focal classification, L1 and GIoU costs.

    Args:
        cost_class, cost_bbox, cost_giou: weights of the costs.
        alpha, gamma: of the focal cost.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma

    def focal(self, logits: Tensor) -> Tensor:
        """What it costs more to take each logit for a hit than for a miss."""
        p = logits.sigmoid()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        return positive - negative

    def class_cost(self, logits: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Of the classification: (N, C) logits against the n boxes of one image -> (N, n)."""
        return self.focal(logits)[:, target["labels"]]

    def cost(self, logits: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Costs (N, n) of N predictions against the n boxes of one image."""
        classes = self.class_cost(logits, target)
        l1 = torch.cdist(boxes, target["boxes"], p=1)
        giou = generalized_box_iou(
            box_convert(boxes, "cxcywh", "xyxy"), box_convert(target["boxes"], "cxcywh", "xyxy")
        )
        return self.cost_class * classes + self.cost_bbox * l1 - self.cost_giou * giou

    @torch.no_grad()
    def forward(
        self, outputs: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]
    ) -> list[Matches]:
        """Match every set of predictions on its own; costs come to the CPU in one transfer.

        The matches stay on the CPU.

        Args:
            outputs: S sets with ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4).
            targets: per image ``labels`` (n,) and ``boxes`` (n, 4).

        Raises:
            FloatingPointError: if a prediction is not finite, naming which.
        """
        logits = torch.stack([o["pred_logits"] for o in outputs])
        boxes = torch.stack([o["pred_boxes"] for o in outputs])
        sets, batch, queries = logits.shape[:3]
        costs = []
        for index, target in enumerate(targets):
            cost = self.cost(logits[:, index].flatten(0, 1), boxes[:, index].flatten(0, 1), target)
            costs.append(cost.flatten())
        flat = torch.cat(costs).cpu().numpy()
        if not np.isfinite(flat).all():
            terms = {"pred_logits": logits, "pred_boxes": boxes}
            bad = [name for name, value in terms.items() if not value.isfinite().all()]
            raise FloatingPointError(f"matching costs are not finite because of {bad or 'targets'}")
        counts = [len(t["labels"]) for t in targets]
        ends = np.cumsum([sets * queries * n for n in counts])[:-1]
        pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(sets)]
        for count, chunk in zip(counts, np.split(flat, ends)):
            for found, one in zip(pairs, chunk.reshape(sets, queries, count)):
                query, index = linear_sum_assignment(one)
                found.append((torch.from_numpy(query), torch.from_numpy(index)))
        return [
            Matches.from_lists([query for query, _ in found], [index for _, index in found], counts)
            for found in pairs
        ]

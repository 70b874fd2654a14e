"""Set criterion of RT-DETR: varifocal, L1 and GIoU losses on all layers."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from ...arguments import arguments, build
from ..context import current
from ..registry import CRITERION_REGISTRY
from .matcher import HungarianMatcher, Matches


def mean_counts(counts: list[float], device: torch.device) -> Tensor:
    """Means over processes of counts that each has of its own."""
    means = torch.tensor(counts, dtype=torch.float32, device=device)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(means)
    return means / comm.get_world_size()


def divisor_of(mean: Tensor) -> Tensor:
    """A mean over processes of a count, with the sum taken as at least 1.

    With it as divisor, DDP's mean of the gradients is the gradient of the joined batch; and the
    mean over the parts of a batch that are forwarded in turn is that of the batch.
    """
    whole = current().accumulation
    return mean.clamp(min=1 / comm.get_world_size() / (whole.parts if whole else 1))


def number_of_boxes(counts: list[int]) -> float:
    """Of the targets; the mean over all parts if these are of a part of a batch."""
    whole = current().accumulation
    return whole.boxes / whole.parts if whole else sum(counts)


def box_divisor(targets: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    """What losses that are sums over boxes are divided by."""
    counts = [len(t["labels"]) for t in targets]
    return divisor_of(mean_counts([number_of_boxes(counts)], device)[0])


class Pairs(NamedTuple):
    """Matched predictions and what they should be, M in all."""

    match: Matches
    labels: Tensor  # (M,)
    boxes: Tensor  # (M, 4) predicted cx, cy, w, h
    wanted: Tensor  # (M, 4)
    iou: Tensor  # (M,) of the two, without gradient


@CRITERION_REGISTRY.register()
class SetCriterion(nn.Module):
    """Losses of a set of predictions after matching.

    Args:
        num_classes: number of object classes.
        matcher: assigns predictions to ground truth.
        weights: factor per loss, keys as in ``default_weights``.
        alpha, gamma: of the varifocal loss (https://arxiv.org/abs/2008.13367).
    """

    default_weights = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0}

    @configurable
    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weights: dict[str, float] | None = None,
        alpha: float = 0.75,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        terms = self.default_weights
        weights = weights or terms
        if set(weights) != set(terms):
            raise ValueError(f"weights={dict(weights)} must have the keys {', '.join(terms)}")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weights = dict(weights)
        self.alpha = alpha
        self.gamma = gamma

    @classmethod
    def from_config(cls, cfg) -> dict:
        weights = cfg.MODEL.CRITERION.WEIGHTS
        return arguments(cls, cfg, "MODEL.CRITERION") | {
            "num_classes": cfg.MODEL.DECODER.NUM_CLASSES,
            "matcher": build(HungarianMatcher, cfg, "MODEL.CRITERION.MATCHER"),
            "weights": {term: weights[term.upper()] for term in cls.default_weights},
        }

    def forward(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weighted losses under upstream's names, in fp32 also under autocast.

        Args:
            outputs: what the decoder returns in training.
            targets: per image ``labels`` (n,) and ``boxes`` (n, 4) cx, cy, w, h in [0, 1].

        Returns:
            ``loss_{vfl,bbox,giou}`` of the last layer, with ``_aux_i`` of the earlier layers,
            ``_enc_i`` of the selected tokens and ``_dn_i`` of the denoising queries.
        """
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            return self.losses(outputs, targets)

    def losses(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        divisor = box_divisor(targets, outputs["pred_logits"].device)
        layers = [in_fp32(x) for x in (outputs, *outputs["aux_outputs"])]
        selected = [in_fp32(x) for x in outputs["enc_outputs"]]
        matches, enc_matches, enc_targets = self.match(layers, selected, targets)
        suffixes = [""] + [f"_aux_{i}" for i in range(len(layers) - 1)]

        losses: dict[str, Tensor] = {}
        for suffix, layer, match in zip(suffixes, layers, matches):
            losses |= self.set_losses(layer, targets, match, divisor, suffix)
        for i, (layer, match) in enumerate(zip(selected, enc_matches)):
            losses |= self.set_losses(layer, enc_targets, match, divisor, f"_enc_{i}")
        if "denoising" in outputs:
            denoising, counts = outputs["denoising"], [len(t["labels"]) for t in targets]
            match = Matches.from_lists(denoising.positive, denoising.target, counts)
            for i, layer in enumerate(outputs["dn_outputs"]):
                divided_by = divisor * denoising.groups
                losses |= self.set_losses(in_fp32(layer), targets, match, divided_by, f"_dn_{i}")
        return losses

    def match(
        self,
        layers: list[dict[str, Tensor]],
        selected: list[dict[str, Tensor]],
        targets: list[dict[str, Tensor]],
    ) -> tuple[list[Matches], list[Matches], list[dict[str, Tensor]]]:
        """Matches of the layers and of the selected tokens, and the targets of the latter.

        Class-agnostic scores of the selected tokens know one class only.
        """
        if selected[0]["pred_logits"].shape[-1] == self.num_classes:
            matches = self.matcher(layers + selected, targets)
            return matches[: len(layers)], matches[len(layers) :], targets
        enc_targets = without_classes(targets)
        return self.matcher(layers, targets), self.matcher(selected, enc_targets), enc_targets

    def set_losses(
        self,
        outputs: dict[str, Tensor],
        targets: list[dict[str, Tensor]],
        match: Matches,
        divisor: Tensor,
        suffix: str,
    ) -> dict[str, Tensor]:
        """The losses of one set of predictions."""
        pairs = pair(outputs, targets, match)
        losses = self.class_losses(outputs["pred_logits"], pairs) | self.box_losses(pairs)
        return self.weigh(losses, divisor, suffix)

    def weigh(
        self, losses: dict[str, Tensor], divisor: Tensor | float, suffix: str
    ) -> dict[str, Tensor]:
        return {
            f"loss_{name}{suffix}": loss * (self.weights[name] / divisor)
            for name, loss in losses.items()
        }

    def class_losses(self, logits: Tensor, pairs: Pairs) -> dict[str, Tensor]:
        return {"vfl": self.varifocal(logits, pairs.match, pairs.labels, pairs.iou)}

    def box_losses(self, pairs: Pairs) -> dict[str, Tensor]:
        corners = box_convert(pairs.boxes, "cxcywh", "xyxy")
        wanted = box_convert(pairs.wanted, "cxcywh", "xyxy")
        return {
            "bbox": F.l1_loss(pairs.boxes, pairs.wanted, reduction="sum"),
            "giou": generalized_box_iou_loss(corners, wanted, reduction="sum"),
        }

    def varifocal(self, logits: Tensor, match: Matches, labels: Tensor, iou: Tensor) -> Tensor:
        """Sum over (B, Q, C) logits; a matched class aims at its box's IoU."""
        target = torch.zeros_like(logits)
        target[match.image, match.query, labels] = iou
        positive = torch.zeros_like(logits, dtype=torch.bool)
        positive[match.image, match.query, labels] = True
        background = self.alpha * logits.detach().sigmoid() ** self.gamma
        weight = torch.where(positive, target, background)
        return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")


def pair(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]], match: Matches) -> Pairs:
    """Look up what is matched, and how well the boxes overlap."""
    match = match.to(outputs["pred_boxes"].device)
    labels = torch.cat([t["labels"] for t in targets])[match.target]
    wanted = torch.cat([t["boxes"] for t in targets])[match.target].float()
    boxes = outputs["pred_boxes"][match.image, match.query]
    with torch.no_grad():
        corners = (Boxes(box_convert(x, "cxcywh", "xyxy")) for x in (boxes, wanted))
        iou = matched_pairwise_iou(*corners)
    return Pairs(match, labels, boxes, wanted, iou)


def in_fp32(outputs: dict) -> dict[str, Tensor]:
    """The predictions of one layer, without what else the decoder returns."""
    names = ("pred_logits", "pred_boxes", "pred_corners", "ref_points")
    return {name: outputs[name].float() for name in names if name in outputs}


def without_classes(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [t | {"labels": torch.zeros_like(t["labels"])} for t in targets]

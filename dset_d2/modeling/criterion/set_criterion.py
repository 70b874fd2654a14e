"""Set criterion of RT-DETR: varifocal, L1 and GIoU losses on all layers."""

import torch
import torch.nn.functional as F
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss

from .matcher import HungarianMatcher, Matches


def average_count(count: int, device: torch.device) -> Tensor:
    """Mean over processes of a count whose sum is taken as at least 1.

    With it as divisor, DDP's mean of the gradients is the gradient of the joined batch.
    """
    total = torch.tensor(float(count), device=device)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(total)
    return total.clamp(min=1) / comm.get_world_size()


class SetCriterion(nn.Module):
    """Losses of a set of predictions after matching.

    Args:
        num_classes: number of object classes.
        matcher: assigns predictions to ground truth.
        weights: factor per loss, keys ``vfl``, ``bbox`` and ``giou``.
        alpha, gamma: of the varifocal loss (https://arxiv.org/abs/2008.13367).
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weights: dict[str, float],
        alpha: float = 0.75,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        if set(weights) != {"vfl", "bbox", "giou"}:
            raise ValueError(f"weights={dict(weights)} must have the keys vfl, bbox and giou")
        self.num_classes = num_classes
        self.matcher = matcher
        self.weights = dict(weights)
        self.alpha = alpha
        self.gamma = gamma

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
        counts = [len(t["labels"]) for t in targets]
        divisor = average_count(sum(counts), outputs["pred_logits"].device)
        layers = [in_fp32(x) for x in (outputs, *outputs["aux_outputs"])]
        selected = [in_fp32(x) for x in outputs["enc_outputs"]]
        # Class-agnostic scores of the encoder know one class only.
        agnostic = selected[0]["pred_logits"].shape[-1] != self.num_classes
        enc_targets = without_classes(targets) if agnostic else targets
        if agnostic:
            matches = self.matcher(layers, targets) + self.matcher(selected, enc_targets)
        else:
            matches = self.matcher(layers + selected, targets)
        suffixes = [""] + [f"_aux_{i}" for i in range(len(layers) - 1)]

        losses = {}
        for suffix, layer, match in zip(suffixes, layers, matches):
            losses |= self.set_losses(layer, targets, match, divisor, suffix)
        for i, (layer, match) in enumerate(zip(selected, matches[len(layers) :])):
            losses |= self.set_losses(layer, enc_targets, match, divisor, f"_enc_{i}")
        if "denoising" in outputs:
            denoising = outputs["denoising"]
            match = Matches.from_lists(denoising.positive, denoising.target, counts)
            for i, layer in enumerate(outputs["dn_outputs"]):
                divided_by = divisor * denoising.groups
                losses |= self.set_losses(in_fp32(layer), targets, match, divided_by, f"_dn_{i}")
        return losses

    def set_losses(
        self,
        outputs: dict[str, Tensor],
        targets: list[dict[str, Tensor]],
        match: Matches,
        divisor: Tensor,
        suffix: str,
    ) -> dict[str, Tensor]:
        """The three losses of one set of predictions."""
        logits = outputs["pred_logits"]
        labels = torch.cat([t["labels"] for t in targets])[match.target]
        wanted = torch.cat([t["boxes"] for t in targets])[match.target].float()
        boxes = outputs["pred_boxes"][match.image, match.query]
        corners = box_convert(boxes, "cxcywh", "xyxy")
        wanted_corners = box_convert(wanted, "cxcywh", "xyxy")
        with torch.no_grad():
            iou = matched_pairwise_iou(Boxes(corners), Boxes(wanted_corners))
        losses = {
            "vfl": self.varifocal(logits, match, labels, iou),
            "bbox": F.l1_loss(boxes, wanted, reduction="sum"),
            "giou": generalized_box_iou_loss(corners, wanted_corners, reduction="sum"),
        }
        return {
            f"loss_{name}{suffix}": loss * (self.weights[name] / divisor)
            for name, loss in losses.items()
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


def in_fp32(outputs: dict) -> dict[str, Tensor]:
    return {key: outputs[key].float() for key in ("pred_logits", "pred_boxes")}


def without_classes(targets: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [t | {"labels": torch.zeros_like(t["labels"])} for t in targets]

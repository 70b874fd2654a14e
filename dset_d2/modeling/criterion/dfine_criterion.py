"""Criterion of D-FINE (https://arxiv.org/abs/2410.13842): losses on the distributions of edges,
and boxes that all layers learn from one union of their matches."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from ..layers import check_choice
from ..registry import CRITERION_REGISTRY
from .matcher import Matches
from .set_criterion import (
    Pairs,
    SetCriterion,
    divisor_of,
    in_fp32,
    mean_counts,
    number_of_boxes,
    pair,
)


def unite(matches: list[Matches]) -> Matches:
    """One match for all layers: each query keeps the target that most of them gave it.

    Works on the CPU, where matches are made. Ties go as upstream's, whose sort is not stable;
    so they may go another way on another kind of processor.
    """
    rows = torch.cat([torch.stack(match, dim=1) for match in matches])
    united = [rows[:0]]
    for image in rows[:, 0].unique():
        pairs, votes = rows[rows[:, 0] == image].unique(dim=0, return_counts=True)
        pairs = pairs[votes.argsort(descending=True)]
        _, first = np.unique(pairs[:, 1].numpy(), return_index=True)
        united.append(pairs[first])
    return Matches(*torch.cat(united).unbind(1))


@CRITERION_REGISTRY.register()
class DFINECriterion(SetCriterion):
    """Adds fine-grained localisation (FGL) and decoupled distillation (DDF) to RT-DETR's losses.

    Args:
        classification: "vfl", or "mal" for the matchability-aware loss of DEIM
            (https://arxiv.org/abs/2412.04234).
        mal_gamma: of the matchability-aware loss.
        temperature: of the distillation, whose teacher is the last layer.
        settings: see :class:`SetCriterion`.
    """

    default_weights = {"vfl": 1.0, "mal": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}

    @configurable
    def __init__(
        self,
        *args,
        classification: str = "vfl",
        mal_gamma: float = 1.5,
        temperature: float = 5.0,
        **settings,
    ) -> None:
        super().__init__(*args, **settings)
        check_choice("classification", classification, ("vfl", "mal"))
        self.classification = classification
        self.mal_gamma = mal_gamma
        self.temperature = temperature

    def losses(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As :meth:`SetCriterion.forward` says; ``_pre`` and ``_dn_pre`` are the first boxes'.

        Classes are learned from each layer's own match, boxes and edges from the union of all.
        """
        counts = [len(t["labels"]) for t in targets]
        last = in_fp32(outputs)
        layers = {f"_aux_{i}": in_fp32(x) for i, x in enumerate(outputs["aux_outputs"])}
        layers |= {"": last, "_pre": in_fp32(outputs["pre_outputs"])}
        selected = {f"_enc_{i}": in_fp32(x) for i, x in enumerate(outputs["enc_outputs"])}
        matches, enc_matches, enc_targets = self.match(
            [*layers.values()], [*selected.values()], targets
        )
        union = unite(matches + enc_matches)
        queries = last["pred_logits"][..., 0].numel()
        numbers = [number_of_boxes(counts), len(union.query), queries - len(union.query)]
        boxes, matched, others = mean_counts(numbers, last["pred_logits"].device)
        divisor = divisor_of(boxes)
        # Distillation weighs matched and other queries by the square roots of their numbers.
        share = matched.sqrt() / (matched.sqrt() + others.sqrt())
        mixture = Mixture(share, divisor_of(matched), divisor_of(others))
        encode = outputs["distribution"].encode
        shared = Shared.of(last, targets, union, divisor_of(matched), encode, mixture)

        losses: dict[str, Tensor] = {}
        for (suffix, layer), match in zip(layers.items(), matches):
            losses |= self.layer_losses(layer, targets, match, divisor, shared, suffix)
        for (suffix, layer), match in zip(selected.items(), enc_matches):
            losses |= self.layer_losses(layer, enc_targets, match, divisor, shared, suffix)
        if "denoising" in outputs:
            denoising = outputs["denoising"]
            divisor = divisor * denoising.groups
            match = Matches.from_lists(denoising.positive, denoising.target, counts)
            layers = {f"_dn_{i}": in_fp32(x) for i, x in enumerate(outputs["dn_outputs"])}
            suffix, last = list(layers.items())[-1]
            # Processes have equally many queries per image, but maybe not equally many images.
            asked = mean_counts([last["pred_logits"][..., 0].numel()], divisor.device)[0]
            matched = boxes * denoising.groups
            mixture = Mixture(share, divisor_of(matched), divisor_of(asked - matched))
            shared = Shared.of(last, targets, match, divisor, encode, mixture)
            layers["_dn_pre"] = in_fp32(outputs["dn_pre_outputs"])
            # Upstream lists what the teacher learns from itself, here only.
            losses[f"loss_ddf{suffix}"] = divisor.new_zeros(())
            for suffix, layer in layers.items():
                losses |= self.layer_losses(layer, targets, shared.match, divisor, shared, suffix)
        return losses

    def layer_losses(
        self,
        layer: dict[str, Tensor],
        targets: list[dict[str, Tensor]],
        match: Matches,
        divisor: Tensor,
        shared: "Shared",
        suffix: str,
    ) -> dict[str, Tensor]:
        """All losses of one layer; those of edges if it predicts them."""
        own = pair(layer, targets, match)
        losses = self.weigh(self.class_losses(layer["pred_logits"], own), divisor, suffix)
        pairs = own if match is shared.match else pair(layer, targets, shared.match)
        terms = self.box_losses(pairs)
        if "pred_corners" in layer:
            terms["fgl"] = fine_grained(layer, pairs, *shared.edges)
        losses |= self.weigh(terms, shared.divisor, suffix)
        if "pred_corners" in layer and layer is not shared.teacher:
            ddf = distillation(layer, shared.teacher, pairs, shared.mixture, self.temperature)
            losses |= self.weigh({"ddf": ddf}, 1.0, suffix)
        return losses

    def class_losses(self, logits: Tensor, pairs: Pairs) -> dict[str, Tensor]:
        if self.classification == "mal":
            return {"mal": self.matchability(logits, pairs)}
        return super().class_losses(logits, pairs)

    def matchability(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Sum over (B, Q, C) logits; a matched class aims at a power of its box's IoU."""
        matched = (pairs.match.image, pairs.match.query, pairs.labels)
        target = torch.zeros_like(logits)
        target[matched] = pairs.iou**self.mal_gamma
        weight = logits.detach().sigmoid() ** self.mal_gamma
        weight[matched] = 1.0
        return F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")


class Mixture(NamedTuple):
    """How distillation mixes what matched and other queries learn.

    The numbers are means over processes, so that DDP's mean is that of the joined batch.
    """

    share: Tensor | float  # of the matched queries
    matched: Tensor | float  # their number
    others: Tensor | float


class Shared(NamedTuple):
    """What boxes and edges of several layers learn from."""

    match: Matches
    divisor: Tensor
    edges: tuple[Tensor, Tensor]  # the wanted left bins and shares of the right ones, (M, 4) each
    teacher: dict[str, Tensor]  # the last layer
    mixture: Mixture

    @classmethod
    def of(cls, teacher, targets, match, divisor, encode, mixture) -> "Shared":
        """Compute the wanted edges, which are the same for all layers, around their first box."""
        pairs = pair(teacher, targets, match)
        first = teacher["ref_points"][pairs.match.image, pairs.match.query]
        return cls(pairs.match, divisor, encode(first, pairs.wanted), teacher, mixture)


def fine_grained(layer: dict[str, Tensor], pairs: Pairs, left: Tensor, right_share: Tensor):
    """Sum over M boxes of the cross entropy with two neighbouring bins, weighted by IoU.

    Args:
        left, right_share: (M, 4), see :meth:`EdgeDistribution.encode`.
    """
    corners = layer["pred_corners"][pairs.match.image, pairs.match.query]
    log_p = corners.unflatten(-1, (4, -1)).log_softmax(-1)
    neighbours = log_p.gather(-1, torch.stack([left, left + 1], dim=-1))
    shares = torch.stack([1 - right_share, right_share], dim=-1)
    return -((neighbours * shares).sum((1, 2)) * pairs.iou).sum()


def distillation(
    layer: dict[str, Tensor],
    teacher: dict[str, Tensor],
    pairs: Pairs,
    mixture: Mixture,
    temperature: float,
) -> Tensor:
    """Divergence of all queries' edges from the teacher's: means over matched and over other
    queries, mixed.

    A query counts by the teacher's confidence or, if it is matched, by its own box's IoU.
    """
    student, target = (
        (x["pred_corners"] / temperature).unflatten(-1, (4, -1)).log_softmax(-1)
        for x in (layer, teacher)
    )
    divergence = F.kl_div(student, target.detach(), reduction="none", log_target=True)
    divergence = divergence.sum(-1).mean(-1) * temperature**2
    matched = (pairs.match.image, pairs.match.query)
    weight = teacher["pred_logits"].detach().sigmoid().amax(-1)
    weight[matched] = pairs.iou
    loss = divergence * weight
    others = torch.ones_like(loss)
    others[matched] = 0.0
    positive = loss[matched].sum() / mixture.matched
    negative = (loss * others).sum() / mixture.others
    return mixture.share * positive + (1 - mixture.share) * negative

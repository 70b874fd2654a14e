"""Criterion of detectors that score the tokens of a text instead of classes (Grounding DINO,
https://arxiv.org/abs/2303.05499)."""

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from .matcher import HungarianMatcher
from .set_criterion import SetCriterion, divisor_of, in_fp32, mean_counts, number_of_boxes, pair


class TokenMatcher(HungarianMatcher):
    """Takes a class's cost as the mean over the tokens of its phrases.

    Args:
        cost_class: upstream's is 1 here.
        costs: the others of :class:`HungarianMatcher`.
    """

    def __init__(self, cost_class: float = 1.0, **costs: float) -> None:
        super().__init__(cost_class, **costs)

    def class_cost(self, logits: Tensor, target: dict[str, Tensor]) -> Tensor:
        tokens = target["tokens"]
        return self.focal(logits) @ (tokens / tokens.sum(1, keepdim=True)).T


class TokenCriterion(SetCriterion):
    """Focal loss on all tokens of the text, L1 and GIoU losses, on all layers.

    A matched query aims at 1 on the tokens of its class and at 0 on all others; the rest at 0.

    Args:
        alpha, gamma: of the focal loss.
        matcher, weights: see :class:`SetCriterion`; upstream's by default.
    """

    default_weights = {"ce": 2.0, "bbox": 5.0, "giou": 2.0}

    def __init__(
        self,
        matcher: TokenMatcher | None = None,
        weights: dict[str, float] | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__(0, matcher or TokenMatcher(), weights, alpha, gamma)

    def losses(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As :meth:`SetCriterion.forward` says, of logits (B, Q, T) for the T tokens of a text.

        Args:
            targets: have ``tokens`` (n, T) beside labels and boxes: 1 for those of the box's
                class. Boxes without any are of classes that are not in the text: they count in
                the divisor, so that losses of several texts add up to that of all, and are
                matched with nothing.
        """
        counts = [len(t["labels"]) for t in targets]
        number = mean_counts([number_of_boxes(counts)], outputs["pred_logits"].device)
        divisor = divisor_of(number[0])
        targets = [{k: v[t["tokens"].any(1)] for k, v in t.items()} for t in targets]
        layers = {"": outputs}
        layers |= {f"_aux_{i}": layer for i, layer in enumerate(outputs["aux_outputs"])}
        layers |= {f"_enc_{i}": layer for i, layer in enumerate(outputs["enc_outputs"])}
        layers = {suffix: in_fp32(layer) for suffix, layer in layers.items()}
        losses: dict[str, Tensor] = {}
        for (suffix, layer), match in zip(
            layers.items(), self.matcher([*layers.values()], targets)
        ):
            losses |= self.set_losses(layer, targets, match, divisor, suffix)
        return losses

    def set_losses(self, outputs, targets, match, divisor, suffix) -> dict[str, Tensor]:
        pairs = pair(outputs, targets, match)
        wanted = torch.zeros_like(outputs["pred_logits"])
        tokens = torch.cat([t["tokens"] for t in targets]).to(wanted.dtype)
        wanted[pairs.match.image, pairs.match.query] = tokens[pairs.match.target]
        focal = sigmoid_focal_loss(
            outputs["pred_logits"], wanted, self.alpha, self.gamma, reduction="sum"
        )
        return self.weigh({"ce": focal} | self.box_losses(pairs), divisor, suffix)

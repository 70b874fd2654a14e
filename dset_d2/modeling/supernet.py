"""One set of weights for many settings: training under random knobs, and what the smaller settings
learn from the largest (https://arxiv.org/abs/1903.05134)."""

import random
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from .context import Knobs
from .criterion.set_criterion import in_fp32, pair
from .layers import check_choice
from .tokens import gather_tokens, prune

SAMPLINGS = ("random", "sandwich")
DISTILLED = 30  # queries of an image, the most confident, that others learn from
KNOBS = tuple(knob.name for knob in fields(Knobs))


@dataclass(frozen=True)
class SupernetConfig:
    """Settings of training one detector for many settings.

    Each training step draws them from its own number, so that all processes, all parts of an
    accumulated batch and a resumed run draw alike. Losses are means over the settings of a step;
    those of sparse parts (balance, foreground), and what is logged, are of its first.

    Decoder layers learn by losses of their own in all settings. The input's size is drawn by
    ``multi_scale`` of the detector, for all settings of a step alike.

    Args:
        keep_ratio, memory_ratio, top_k, decoder_layers, num_queries, vit_blocks: values of the
            :class:`Knobs` of this name; empty leaves one as it is configured.
        sampling: "random" trains one random setting in each step; "sandwich" the largest, the
            smallest and a random one, at three times the cost.
        distillation_weight: of what the others of a sandwich learn from the largest's detections.
    """

    keep_ratio: tuple[float, ...] = ()
    memory_ratio: tuple[float, ...] = ()
    top_k: tuple[int, ...] = ()
    decoder_layers: tuple[int, ...] = ()
    num_queries: tuple[int, ...] = ()
    vit_blocks: tuple[int, ...] = ()
    sampling: str = "random"
    distillation_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice("sampling", self.sampling, SAMPLINGS)
        if self.distillation_weight < 0:
            raise ValueError(f"distillation_weight={self.distillation_weight} must not be negative")
        for name, values in self.choices.items():
            for value in values:
                Knobs(**{name: value})
        if not self.choices:
            raise ValueError(f"a supernet needs values of some knob: {', '.join(KNOBS)}")

    @property
    def choices(self) -> dict[str, tuple]:
        """The values of each knob that is drawn, largest first."""
        return {
            name: tuple(sorted(set(getattr(self, name)), reverse=True))
            for name in KNOBS
            if getattr(self, name)
        }

    @property
    def largest(self) -> Knobs:
        return Knobs(**{name: values[0] for name, values in self.choices.items()})

    @property
    def smallest(self) -> Knobs:
        return Knobs(**{name: values[-1] for name, values in self.choices.items()})

    def draw(self, step: int) -> list[Knobs]:
        """The settings of a training step, the one that others learn from first."""
        # The step alone would tie these to what else it seeds, such as the input's size.
        generator = random.Random(f"supernet {step}")
        drawn = Knobs(**{name: generator.choice(values) for name, values in self.choices.items()})
        return [drawn] if self.sampling == "random" else [self.largest, self.smallest, drawn]


def distillation(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    matcher: torch.nn.Module,
    weights: dict[str, float],
) -> Tensor:
    """What detections differ from a teacher's, summed over its most confident queries.

    Each of these is matched with one of the student's as if it were ground truth, and counts by
    its confidence: cross entropy of all class probabilities, L1 and GIoU of the boxes.

    Args:
        student, teacher: ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4); numbers of queries
            may differ. No gradient reaches the teacher.
        weights: of ``bbox`` and ``giou``.
    """
    student, teacher = in_fp32(student), {k: x.detach() for k, x in in_fp32(teacher).items()}
    probabilities = teacher["pred_logits"].sigmoid()
    scores = probabilities.max(-1).values
    index = scores.topk(min(DISTILLED, scores.shape[1]), dim=1).indices
    probabilities, boxes = (gather_tokens(x, index) for x in (probabilities, teacher["pred_boxes"]))
    targets = [{"labels": p.argmax(-1), "boxes": b} for p, b in zip(probabilities, boxes)]
    pairs = pair(student, targets, matcher([student], targets)[0])
    image, query, target = pairs.match
    logits, wanted = student["pred_logits"][image, query], probabilities.flatten(0, 1)[target]
    terms = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1)
    terms = terms + weights["bbox"] * (pairs.boxes - pairs.wanted).abs().sum(1)
    corners = (box_convert(x, "cxcywh", "xyxy") for x in (pairs.boxes, pairs.wanted))
    terms = terms + weights["giou"] * generalized_box_iou_loss(*corners)
    return (terms * prune(scores, index).flatten()[target]).sum()

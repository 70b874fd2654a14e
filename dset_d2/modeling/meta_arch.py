"""What every detector shares: Detectron2's dicts in, batches of one shape, the training step and
its clock, the log of sparse parts."""

import logging
import math
import random
from collections import defaultdict
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..clock import TrainingClock, begin_training
from .context import ForwardContext, Knobs, Record, current, forward_context, name_parts
from .tokens import Padding

LOG_PERIOD = 20  # training steps between two looks at the sparse parts, which a GPU waits for
# An expert takes too many tokens beyond this part of the way from its fair share of them to all.
COLLAPSE = 0.5


class Detections(NamedTuple):
    """The best (query, class) pairs of each image, K of them, best first.

    Attributes:
        boxes: (B, K, 4) x1, y1, x2, y2 in [0, 1].
        scores: (B, K).
        classes: (B, K).
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


class MetaArch(nn.Module):
    """Base of the meta-architectures. A subclass adds its parts, :meth:`predict`, :meth:`losses`,
    ``size_divisibility`` and ``num_classes``, and calls :meth:`name_parts` when it is built.

    Args:
        pixel_mean, pixel_std: normalisation of the RGB input in [0, 255].
        max_detections: detections kept per image.
        multi_scale: lengths in pixels, one of which each training batch's longer side is
            resized to; empty for none.
        multi_scale_end: training step from which images keep their size.
    """

    size_divisibility: int
    num_classes: int

    def __init__(
        self,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        max_detections: int = 300,
        multi_scale: tuple[int, ...] = (),
        multi_scale_end: int = 0,
    ) -> None:
        super().__init__()
        self.max_detections = max_detections
        self.multi_scale = list(multi_scale)
        self.multi_scale_end = multi_scale_end
        self.clock = TrainingClock()
        # Its buffer stays on the CPU, where DDP's GPU collectives cannot reach it.
        self._ddp_params_and_buffers_to_ignore = ["clock.steps"]
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(list(value)).view(-1, 1, 1), persistent=False)

    # What a subclass adds.

    def predict(
        self, images: Tensor, padding: Padding | None = None, knobs: Knobs | None = None
    ) -> dict[str, Tensor]:
        """Raw predictions.

        Args:
            images: (B, 3, H, W) normalised; H and W divisible by ``size_divisibility``.
            padding: which of them is image; None: all.
            knobs: of this call.

        Returns:
            ``pred_logits`` (B, Q, C), ``pred_boxes`` (B, Q, 4) cx, cy, w, h in [0, 1].
        """
        raise NotImplementedError

    def losses(
        self, images: Tensor, targets: list[dict[str, Tensor]], padding: Padding | None
    ) -> dict[str, Tensor]:
        """Weighted losses of the detections, without those of sparse parts."""
        raise NotImplementedError

    def warm_up(self) -> None:
        """Compute what inference keeps from one call to the next, so that analyses count what a
        call costs."""

    # What all share.

    def name_parts(self) -> None:
        """Tell sparse parts the names of their records, and learn which knobs there are.

        To be called again when parts were added or taken away.
        """
        self.knob_limits = name_parts(self)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def context(
        self, knobs: Knobs | None = None, record: bool = False
    ) -> AbstractContextManager[ForwardContext]:
        """The context of one forward at the present step.

        Args:
            knobs: for this call only; None are those of a context around this one, if any.
            record: collect what sparse parts leave.

        Raises:
            ValueError: on a knob that the model has no part for, or beyond its range.
        """
        knobs = current().knobs if knobs is None else knobs
        knobs.check(self.knob_limits)
        # A model that no step has trained predicts as configured, not as at a schedule's start.
        step = self.clock.step if self.training or self.clock.step else None
        return forward_context(record=record, step=step, knobs=knobs)

    def forward(
        self, batched_inputs: list[dict], knobs: Knobs | list[Knobs | None] | None = None
    ) -> dict[str, Tensor] | list[dict]:
        """Losses in training, else detections in the coordinates of the original images.

        Args:
            batched_inputs: Detectron2's dicts: ``image`` (3, H, W) RGB in [0, 255], of any
                sizes; in training ``instances`` with ``gt_boxes`` and ``gt_classes``; in
                inference optionally ``height`` and ``width`` of the original image.
            knobs: of this call, in inference; a list has one for each image.
        """
        if self.training:
            if knobs is not None:
                raise ValueError("knobs change inference; in training there are none")
            return self.train_step(batched_inputs)
        if not isinstance(knobs, list):
            knobs = [knobs] * len(batched_inputs)
        if len(knobs) != len(batched_inputs):
            raise ValueError(f"{len(knobs)} knobs for {len(batched_inputs)} images")
        detections: list = [None] * len(batched_inputs)
        for group in self.groups(batched_inputs, knobs):
            inputs = [batched_inputs[i] for i in group]
            outputs = self.predict(*self.preprocess(inputs), knobs=knobs[group[0]])
            sizes = [original_size(x) for x in inputs]
            for i, instances in zip(group, self.postprocess(outputs, sizes)):
                detections[i] = {"instances": instances}
        return detections

    def detections(self, outputs: dict[str, Tensor]) -> Detections:
        """The best pairs among what :meth:`predict` returns, as tensors alone."""
        scores = outputs["pred_logits"].float().sigmoid().flatten(1)
        scores, index = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        num_classes = outputs["pred_logits"].shape[-1]
        queries = (index // num_classes)[..., None].expand(-1, -1, 4)
        boxes = box_convert(outputs["pred_boxes"].float(), "cxcywh", "xyxy").gather(1, queries)
        return Detections(boxes, scores, index % num_classes)

    def postprocess(
        self, outputs: dict[str, Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """Detections of each image, boxes in pixels.

        Args:
            outputs: what :meth:`predict` returns.
            image_sizes: (height, width) to scale each image's boxes to.
        """
        results = []
        for boxes, scores, classes, size in zip(*self.detections(outputs), image_sizes):
            height, width = size
            boxes = boxes * boxes.new_tensor([width, height, width, height])
            results.append(
                Instances(
                    (height, width), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes
                )
            )
        return results

    def groups(
        self, batched_inputs: list[dict], knobs: list[Knobs | None] | None = None
    ) -> list[list[int]]:
        """Indices of the inputs that run together.

        These have equal knobs and, once padded, images of one shape, so that what an image is
        batched with changes nothing: a convolution at its border would see padding or not.
        """
        groups = defaultdict(list)
        for index, x in enumerate(batched_inputs):
            shape = tuple(-(-side // self.size_divisibility) for side in x["image"].shape[1:])
            groups[shape, knobs[index] if knobs else None].append(index)
        return list(groups.values())

    def preprocess(self, batched_inputs: list[dict]) -> tuple[Tensor, Padding | None]:
        """Normalised images in one padded batch (B, 3, H, W), and which of it is image (None:
        all of it).

        Raises:
            TypeError: if the model was cast to half precision.
        """
        if self.pixel_mean.dtype in (torch.float16, torch.bfloat16):
            # Coordinates of boxes need more digits than bfloat16 has.
            raise TypeError(
                f"the model was cast to {self.pixel_mean.dtype}; keep it in float32 and run it "
                f'under torch.autocast("{self.device.type}", {self.pixel_mean.dtype})'
            )
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        batch = ImageList.from_tensors(images, self.size_divisibility)
        height, width = batch.tensor.shape[2:]
        if all(size == (height, width) for size in batch.image_sizes):
            return batch.tensor, None
        sizes = torch.tensor([(w, h) for h, w in batch.image_sizes], device=self.device)
        return batch.tensor, Padding(sizes, (width, height))

    def target(self, inputs: dict) -> dict[str, Tensor]:
        """Ground truth of one image: labels (n,), boxes (n, 4) cx, cy, w, h in [0, 1]."""
        instances = inputs["instances"]
        labels, boxes = instances.gt_classes, instances.gt_boxes.tensor
        # They come from the loader on the CPU: looking at them makes no GPU wait.
        wrong = labels[(labels < 0) | (labels >= self.num_classes)].tolist()
        wrong = [f"class {label} is beyond num_classes={self.num_classes}" for label in wrong]
        ordered = boxes.isfinite().all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1)
        wrong += [f"box {box} is not x1 <= x2, y1 <= y2" for box in boxes[~ordered].tolist()]
        if wrong:
            raise ValueError(f"{inputs.get('file_name', 'an image')}: {wrong[0]}")
        height, width = instances.image_size
        boxes = box_convert(boxes, "xyxy", "cxcywh")
        boxes = boxes / boxes.new_tensor([width, height, width, height])
        return {
            "labels": labels.to(self.device, non_blocking=True),
            "boxes": boxes.to(self.device, non_blocking=True),
        }

    def train_step(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Losses of a batch, at a random size while multi-scale training lasts."""
        images, padding = self.preprocess(batched_inputs)
        step = self.clock.step
        if self.multi_scale and step < self.multi_scale_end:
            # The step seeds the choice: all processes, and a resumed run, choose alike.
            long_side = random.Random(step).choice(self.multi_scale)
            images = resize(images, long_side, self.size_divisibility)
        targets = [self.target(x) for x in batched_inputs]
        return self.compute_losses(images, targets, padding)

    def compute_losses(
        self,
        images: Tensor,
        targets: list[dict[str, Tensor]],
        padding: Padding | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses under upstream's names; ``images`` as for :meth:`predict`.

        Args:
            targets: per image ``labels`` (n,) and ``boxes`` (n, 4) cx, cy, w, h in [0, 1].
        """
        if self.training:
            begin_training(self, self.clock)
            self.clock.due = True
        with self.context(Knobs(), record=True) as context:
            losses = self.losses(images, targets, padding)
        with torch.autocast(self.device.type, enabled=False):
            losses |= record_losses(context.records, targets)
        if self.clock.step % LOG_PERIOD == 0 and has_event_storage():
            log_records(context.records)
        return losses


def original_size(inputs: dict) -> tuple[int, int]:
    """(height, width) that an image's boxes are given for."""
    height, width = inputs["image"].shape[1:]
    return inputs.get("height", height), inputs.get("width", width)


def resize(images: Tensor, long_side: int, divisor: int) -> Tensor:
    """Resize a batch, keeping its aspect ratio up to the divisor, by nearest neighbours."""
    scale = long_side / max(images.shape[2:])
    size = [max(divisor, round(side * scale / divisor) * divisor) for side in images.shape[2:]]
    return F.interpolate(images, size=size)


def record_losses(
    records: dict[str, Record], targets: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Weighted losses of all records, e.g. ``loss_balance_decoder_1``; none of a dense model."""
    losses = {}
    for name, record in records.items():
        place = name.partition("/")[2]
        for term, value in record.losses(targets).items():
            losses[f"loss_{term}_{place}"] = value
    return losses


def log_records(records: dict[str, Record]) -> None:
    """Put the statistics of records into the event storage; warn of collapsed experts."""
    storage = get_event_storage()
    collapsed = []
    for name, record in records.items():
        values = record.statistics()
        scalars = {key: float(x) for key, x in values.items() if torch.as_tensor(x).dim() == 0}
        if "usage" in values:
            usage = torch.as_tensor(values["usage"]).tolist()
            scalars |= {f"usage_{expert}": share for expert, share in enumerate(usage)}
            scalars["max_usage"] = max(usage)
            # Of the tokens, by expert.
            shares = torch.as_tensor(values["coactivation"]).diagonal().tolist()
            if (share := max(shares)) > collapse_share(len(shares), sum(shares)):
                collapsed.append(f"{name}: {share:.0%} by expert {shares.index(share)}")
        for key, value in scalars.items():
            # As it is: a median over past looks would hide a schedule's present, or a collapse.
            storage.put_scalar(f"{name}/{key}", value, smoothing_hint=False)
    if collapsed:
        message = f"one expert takes too many of the tokens in {', '.join(collapsed)}"
        log_every_n_seconds(logging.WARNING, message, n=60, name=__name__)


def collapse_share(num_experts: int, top_k: float) -> float:
    """The share of the tokens above which one expert takes too many.

    Of the tokens, not of the assignments: with ``top_k`` experts per token these leave no expert
    more than ``1 / top_k``. Where every token uses all experts none can take too many.
    """
    fair = round(top_k) / num_experts
    return fair + COLLAPSE * (1 - fair) if fair < 1 else math.inf

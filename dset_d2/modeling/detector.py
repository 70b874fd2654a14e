"""The meta-architecture: Detectron2's dicts in, a loss dict or Instances out."""

import logging
import random
from collections import defaultdict

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..clock import TrainingClock
from .criterion import DFINECriterion, HungarianMatcher, SetCriterion
from .decoder import DFINEDecoder, RTDETRDecoder
from .encoder import build_encoder
from .layers import check_choice
from .sparse import clear_records, set_step, sparse_losses, sparse_statistics

LOG_PERIOD = 20  # training steps between two looks at the sparse parts, which a GPU waits for

# Decoders by name, their criteria and the weights of the losses.
DECODERS = {
    "RTDETRDecoder": (RTDETRDecoder, SetCriterion, {"vfl": 1.0, "bbox": 5.0, "giou": 2.0}),
    "DFINEDecoder": (
        DFINEDecoder,
        DFINECriterion,
        {"vfl": 1.0, "mal": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5},
    ),
}


@META_ARCH_REGISTRY.register()
class DETRDetector(nn.Module):
    """A real-time detection transformer: backbone, encoder, decoder, criterion.

    Args:
        backbone: image -> dict of features.
        encoder: list of features -> list of features; its ``in_features`` names what it reads.
        decoder: list of features -> predictions.
        criterion: predictions and targets -> losses.
        pixel_mean, pixel_std: normalisation of the RGB input; the default is RGB / 255.
        max_detections: detections kept per image.
        multi_scale: lengths in pixels, one of which each training batch's longer side is
            resized to; empty for none.
        multi_scale_end: training step from which images keep their size.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        criterion: nn.Module,
        pixel_mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        pixel_std: tuple[float, ...] = (255.0, 255.0, 255.0),
        max_detections: int = 300,
        multi_scale: tuple[int, ...] = (),
        multi_scale_end: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.criterion = criterion
        self.max_detections = max_detections
        self.multi_scale = list(multi_scale)
        self.multi_scale_end = multi_scale_end
        self.clock = TrainingClock()
        # Its buffer stays on the CPU, where DDP's GPU collectives cannot reach it.
        self._ddp_params_and_buffers_to_ignore = ["clock.steps"]
        for name, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(list(value)).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        backbone = build_backbone(cfg)
        check_choice("MODEL.DECODER.NAME", cfg.MODEL.DECODER.NAME, DECODERS)
        make_decoder, make_criterion, weights = DECODERS[cfg.MODEL.DECODER.NAME]
        decoder = make_decoder(cfg)
        return {
            "backbone": backbone,
            "encoder": build_encoder(cfg, backbone.output_shape()),
            "decoder": decoder,
            "criterion": make_criterion(decoder.num_classes, HungarianMatcher(), weights),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Losses in training, else detections in the coordinates of the original images.

        Args:
            batched_inputs: Detectron2's dicts: ``image`` (3, H, W) RGB in [0, 255], of any
                sizes; in training ``instances`` with ``gt_boxes`` and ``gt_classes``; in
                inference optionally ``height`` and ``width`` of the original image.
        """
        if self.training:
            return self.train_step(batched_inputs)
        detections: list = [None] * len(batched_inputs)
        for group in same_shape(batched_inputs, self.backbone.size_divisibility):
            inputs = [batched_inputs[i] for i in group]
            images, valid_ratio = self.preprocess(inputs)
            sizes = [
                (x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2]))
                for x in inputs
            ]
            results = self.postprocess(self.predict(images, valid_ratio), sizes)
            for i, instances in zip(group, results):
                detections[i] = {"instances": instances}
        return detections

    def train_step(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Losses of a batch, at a random size while multi-scale training lasts."""
        step = int(self.clock)
        images, valid_ratio = self.preprocess(batched_inputs)
        if self.multi_scale and step < self.multi_scale_end:
            # The step seeds the choice: all processes, and a resumed run, choose alike.
            long_side = random.Random(step).choice(self.multi_scale)
            images = resize(images, long_side, self.backbone.size_divisibility)
        targets = [self.target(x) for x in batched_inputs]
        losses = self.compute_losses(images, targets, valid_ratio)
        if step % LOG_PERIOD == 0 and has_event_storage():
            self.log_sparsity()
        clear_records(self)
        return losses

    def preprocess(self, batched_inputs: list[dict]) -> tuple[Tensor, Tensor | None]:
        """Normalised images in one padded batch, and the share of it that each image fills.

        Returns:
            (B, 3, H, W), and (B, 2) shares of W and H or None if no image is padded.
        """
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        images = [(x - self.pixel_mean) / self.pixel_std for x in images]
        batch = ImageList.from_tensors(images, self.backbone.size_divisibility)
        height, width = batch.tensor.shape[2:]
        if all(size == (height, width) for size in batch.image_sizes):
            return batch.tensor, None
        shares = [(w / width, h / height) for h, w in batch.image_sizes]
        return batch.tensor, torch.tensor(shares, device=self.device)

    def target(self, inputs: dict) -> dict[str, Tensor]:
        """Ground truth of one image: labels (n,), boxes (n, 4) cx, cy, w, h in [0, 1]."""
        instances = inputs["instances"]
        labels = instances.gt_classes
        # Labels come from the loader on the CPU: looking at them makes no GPU wait.
        if len(labels) and int(labels.max()) >= self.decoder.num_classes:
            raise ValueError(
                f"{inputs.get('file_name', 'an image')}: class {int(labels.max())} is beyond "
                f"num_classes={self.decoder.num_classes}"
            )
        height, width = instances.image_size
        boxes = box_convert(instances.gt_boxes.tensor, "xyxy", "cxcywh")
        boxes = boxes / boxes.new_tensor([width, height, width, height])
        return {
            "labels": labels.to(self.device, non_blocking=True),
            "boxes": boxes.to(self.device, non_blocking=True),
        }

    def decode(
        self,
        images: Tensor,
        valid_ratio: Tensor | None,
        targets: list[dict[str, Tensor]] | None = None,
    ) -> dict:
        """What the decoder makes of the encoder's features of the backbone's features."""
        # Before the first training step sparse parts behave as at the end of their schedules.
        set_step(self, int(self.clock) or None)
        features = self.backbone(images)
        features = [features[name] for name in self.encoder.in_features]
        features = self.encoder(features, valid_ratio)
        dropped = getattr(self.encoder, "dropped", None)
        return self.decoder(features, targets, valid_ratio, dropped)

    def predict(self, images: Tensor, valid_ratio: Tensor | None = None) -> dict[str, Tensor]:
        """Raw predictions.

        Args:
            images: (B, 3, H, W) normalised; H and W divisible by 32.
            valid_ratio: (B, 2) share of W and H that each image fills, None if all of it.

        Returns:
            ``pred_logits`` (B, Q, C), ``pred_boxes`` (B, Q, 4) cx, cy, w, h in [0, 1].
        """
        return self.decode(images, valid_ratio)

    def compute_losses(
        self,
        images: Tensor,
        targets: list[dict[str, Tensor]],
        valid_ratio: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses under upstream's names; ``images`` as for :meth:`predict`.

        In training mode this counts as a training step, whatever loop calls it.

        Args:
            targets: per image ``labels`` (n,) and ``boxes`` (n, 4) cx, cy, w, h in [0, 1].
        """
        if self.training:
            self.clock.tick()
        outputs = self.decode(images, valid_ratio, targets)
        losses = self.criterion(outputs, targets)
        with torch.autocast(self.device.type, enabled=False):
            return losses | sparse_losses(self, targets)

    def log_sparsity(self) -> None:
        """Put the sparse parts' statistics into the event storage."""
        storage = get_event_storage()
        greedy = []
        for name, values in sparse_statistics(self).items():
            if "keep_ratio" in values:
                storage.put_scalar(f"{name}/keep_ratio", values["keep_ratio"])
                continue
            storage.put_scalar(f"{name}/max_usage", float(values["usage"].max()))
            storage.put_scalar(f"{name}/entropy", float(values["entropy"]))
            shares = values["coactivation"].diagonal().cpu()  # of the tokens, by expert
            if len(shares) > 2 and shares.max() > greedy_share(len(shares), float(shares.sum())):
                greedy.append(f"{name}: {shares.max():.0%} by expert {int(shares.argmax())}")
        if greedy:
            message = f"one expert takes too many of the tokens in {', '.join(greedy)}"
            log_every_n_seconds(logging.WARNING, message, n=60, name=__name__)

    def postprocess(
        self, outputs: dict[str, Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[Instances]:
        """The best (query, class) pairs of each image, boxes in pixels.

        Args:
            outputs: what :meth:`predict` returns.
            image_sizes: (height, width) to scale each image's boxes to.
        """
        scores = outputs["pred_logits"].float().sigmoid().flatten(1)
        scores, index = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        num_classes = outputs["pred_logits"].shape[-1]
        queries = (index // num_classes)[..., None].expand(-1, -1, 4)
        boxes = box_convert(outputs["pred_boxes"].float(), "cxcywh", "xyxy").gather(1, queries)
        classes = index % num_classes
        results = []
        for i, (height, width) in enumerate(image_sizes):
            size = boxes.new_tensor([width, height, width, height])
            results.append(
                Instances(
                    (height, width),
                    pred_boxes=Boxes(boxes[i] * size),
                    scores=scores[i],
                    pred_classes=classes[i],
                )
            )
        return results


def same_shape(batched_inputs: list[dict], divisor: int) -> list[list[int]]:
    """Indices of inputs whose images have the same size once padded to the divisor.

    Images run together with their likes, so that what one is batched with changes nothing: a
    convolution at the image's border would otherwise see padding or not.
    """
    groups = defaultdict(list)
    for index, x in enumerate(batched_inputs):
        groups[tuple(-(-side // divisor) for side in x["image"].shape[1:])].append(index)
    return list(groups.values())


def resize(images: Tensor, long_side: int, divisor: int) -> Tensor:
    """Resize a batch, keeping its aspect ratio up to the divisor, by nearest neighbours."""
    scale = long_side / max(images.shape[2:])
    size = [max(divisor, round(side * scale / divisor) * divisor) for side in images.shape[2:]]
    return F.interpolate(images, size=size)


def greedy_share(num_experts: int, top_k: float) -> float:
    """The share of tokens above which one expert takes too many.

    Half of them if each token has one expert; with ``top_k`` experts, of which each fairly gets
    ``top_k / num_experts`` of the tokens, half way from there to all.
    """
    return 0.5 if top_k < 1.5 else (1 + top_k / num_experts) / 2

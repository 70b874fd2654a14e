"""Contrastive denoising queries (DINO, https://arxiv.org/abs/2203.03605) as RT-DETR uses them."""

from typing import NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..layers import inverse_sigmoid


class Denoising(NamedTuple):
    """Queries that start from noised ground truth, and how they relate to it.

    D = groups * 2 * slots queries per image: in each group first the positives, then the
    negatives, one of each per slot; a slot holds one ground-truth box or padding.
    """

    content: Tensor  # (B, D, dim)
    reference: Tensor  # (B, D, 4) box logits
    attn_mask: Tensor  # (D + Q, D + Q) bool, True where attention is blocked
    positive: list[Tensor]  # per image: (groups * n,) indices of its positives
    target: list[Tensor]  # per image: (groups * n,) which box each of them restores
    groups: int

    @property
    def num_queries(self) -> int:
        return self.content.shape[1]


def global_max(value: int, device: torch.device) -> int:
    """The largest value over all processes, so that they lay out their queries alike."""
    if comm.get_world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return int(tensor)


def make_denoising(
    targets: list[dict[str, Tensor]],
    class_embed: nn.Embedding,
    num_queries: int,
    num_denoising: int = 100,
    label_noise_ratio: float = 0.5,
    box_noise_scale: float = 1.0,
) -> Denoising:
    """Noise the ground truth into denoising queries.

    A batch without a single box gets one group of padding, so that the class embedding takes
    part in every step on every process.

    Args:
        targets: per image ``labels`` (n,) and ``boxes`` (n, 4) cx, cy, w, h in [0, 1].
        class_embed: one row per class and a last one for padding.
        num_queries: queries of the matching part, which follow the denoising ones.
        num_denoising: wanted number of positives; at least one group is made.
        label_noise_ratio: twice the share of labels that are replaced by random ones.
        box_noise_scale: noise of 1 moves a corner by up to half the box's size for a
            positive, and by half to all of it for a negative.
    """
    device = class_embed.weight.device
    num_classes = class_embed.num_embeddings - 1
    counts = [len(t["labels"]) for t in targets]
    slots = max(1, global_max(max(counts), device))
    groups = max(1, num_denoising // slots)

    labels = torch.full((len(targets), slots), num_classes, device=device)
    boxes = torch.zeros(len(targets), slots, 4, device=device)
    for index, (count, target) in enumerate(zip(counts, targets)):
        labels[index, :count] = target["labels"]
        boxes[index, :count] = target["boxes"]
    labels = labels.tile(1, 2 * groups)
    boxes = boxes.tile(1, 2 * groups, 1)
    real = labels != num_classes
    size = labels.shape[1]
    negative = (torch.arange(size, device=device) // slots % 2).view(1, -1, 1)

    if label_noise_ratio > 0:
        flip = torch.rand(labels.shape, device=device) < label_noise_ratio * 0.5
        noise = torch.randint_like(labels, num_classes)
        labels = torch.where(flip & real, noise, labels)
    if box_noise_scale > 0:
        reach = boxes[..., 2:].repeat(1, 1, 2) * 0.5 * box_noise_scale
        sign = torch.randint_like(boxes, 2) * 2 - 1
        corners = box_convert(boxes, "cxcywh", "xyxy")
        corners = corners + sign * (torch.rand_like(boxes) + negative) * reach
        boxes = box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")

    # Row-major order of (group, slot) matches the targets repeated group by group.
    offset = torch.arange(groups, device=device)[:, None] * 2 * slots
    positive = [(offset + torch.arange(n, device=device)).flatten() for n in counts]
    matched = [torch.arange(n, device=device).tile(groups) for n in counts]

    # A denoising query is visible to its own group only; matching queries are visible to all.
    group = torch.arange(size, device=device) // (2 * slots)
    viewer = torch.cat([group, group.new_full((num_queries,), -1)])
    attn_mask = torch.zeros(len(viewer), len(viewer), dtype=torch.bool, device=device)
    attn_mask[:, :size] = viewer[:, None] != group
    return Denoising(
        class_embed(labels), inverse_sigmoid(boxes), attn_mask, positive, matched, groups
    )

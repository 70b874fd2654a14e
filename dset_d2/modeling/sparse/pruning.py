"""Token pruning: tokens that carry nothing take no part in what follows.

A small MLP scores every token; the best share is kept, in spatial order. Bare indices carry no
gradient, so the scorer learns from the ground truth (as in Focus-DETR,
https://arxiv.org/abs/2307.12612) and from the task, which reaches it through a gate.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MLP, check_choice
from .schedule import Scheduled, check_ramp

PRIOR_SIZE = 16  # cells per side of the learnable prior, which is resized to the feature map


@dataclass(frozen=True)
class PruningConfig:
    """Settings of token pruning.

    Args:
        keep_ratio: share of the tokens that stay once the schedule has ended.
        min_tokens: as many stay in any case.
        start_step, end_step: the ratio falls linearly from 1 to ``keep_ratio`` between these
            training steps; nothing is pruned before.
        placement: "before" prunes what enters the encoder's layers and saves their compute;
            "after" saves nothing there; the decoder then neither reads nor selects the pruned.
        restore: what a pruned token becomes: "bypass" keeps its feature, "zero" clears it.
        gate: let the task train the scorer, by a factor that is 1 in value.
        spatial_prior: add a learnable map to the scores: a fixed camera's empty regions.
        foreground_weight: of the cross entropy with the ground-truth boxes.
        sparsity_weight: of the mean score.
        diversity_weight: of the similarity among the tokens with high scores.
    """

    keep_ratio: float
    min_tokens: int = 100
    start_step: int = 0
    end_step: int = 0
    placement: str = "before"
    restore: str = "bypass"
    gate: bool = True
    spatial_prior: bool = False
    foreground_weight: float = 1.0
    sparsity_weight: float = 0.0
    diversity_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio={self.keep_ratio} must lie in (0, 1]")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens={self.min_tokens} must be at least 1")
        check_choice("placement", self.placement, ("before", "after"))
        check_choice("restore", self.restore, ("bypass", "zero"))
        check_ramp("PruningConfig", self.start_step, self.end_step)
        for name in ("foreground_weight", "sparsity_weight", "diversity_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class MemoryPruningConfig:
    """Settings of pruning the decoder's memory, which the encoder's class head scores.

    That head and the layer in front of it still run on all tokens; what shrinks is the value
    projection of every decoder layer, which D-FINE does not have.

    Args:
        keep_ratio: share of the tokens of all levels that cross-attention can read.
        start_step, end_step: the ratio falls linearly from 1 between these training steps.
    """

    keep_ratio: float
    start_step: int = 0
    end_step: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio={self.keep_ratio} must lie in (0, 1]")
        check_ramp("MemoryPruningConfig", self.start_step, self.end_step)


def keep_count(ratio: float, tokens: int, least: int) -> int:
    """How many of the tokens stay: the ratio of them, rounded up, but at least some."""
    # A size is a tensor while traced, whose products are float32; 0.55 * 400 is above 220 anyway.
    return min(tokens, max(least, math.ceil(ratio * int(tokens) - 1e-6)))


def best_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the highest scores (B, N), in spatial order."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values


class PruningRecord(NamedTuple):
    """What a training forward leaves for the losses and the log."""

    scores: Tensor  # (B, N) logits
    tokens: Tensor  # (B, N, dim)
    shape: tuple[int, int]
    valid: Tensor | None  # (B, N) bool, False on padding
    valid_ratio: Tensor | None  # (B, 2)
    index: Tensor | None  # (B, K) of the kept tokens; None if all are


class TokenPruner(Scheduled):
    """Scores the tokens of one feature map and chooses those that stay."""

    def __init__(self, config: PruningConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.scorer = MLP(dim, 128, 1, 2)
        if config.spatial_prior:
            self.prior = nn.Parameter(torch.zeros(1, 1, PRIOR_SIZE, PRIOR_SIZE))
        self.record: PruningRecord | None = None

    def ratio(self) -> float:
        """The share of tokens kept at the present step."""
        config = self.config
        return self.ramped(config.start_step, config.end_step, 1.0, config.keep_ratio)

    def scores(self, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
        """Logits (B, N) of how much each token is worth."""
        scores = self.scorer(tokens).squeeze(-1).float()
        if self.config.spatial_prior:
            prior = F.interpolate(self.prior, size=shape, mode="bilinear", align_corners=False)
            scores = scores + prior.flatten(1)
        return scores

    def forward(
        self,
        tokens: Tensor,
        shape: tuple[int, int],
        valid: Tensor | None = None,
        valid_ratio: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Choose among tokens (B, N, dim) of a map of ``shape`` (H, W).

        Returns:
            Indices (B, K) of the kept tokens in spatial order, None if all are kept; and their
            gates (B, K, 1), 1 in value with a gradient for the scorer, None without need.
        """
        total = tokens.shape[1]
        count = keep_count(self.ratio(), total, self.config.min_tokens)
        if count == total and not self.training:
            return None, None
        scores = self.scores(tokens, shape)
        index = None
        if count < total:
            ranked = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
            index = best_tokens(ranked, count)
        if self.training:
            self.record = PruningRecord(scores, tokens, shape, valid, valid_ratio, index)
        if not (self.training and self.config.gate):
            return index, None
        kept = scores if index is None else scores.gather(1, index)
        worth = kept.sigmoid()[..., None]
        return index, 1 + (worth - worth.detach())

    def losses(self, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weighted losses of the last training forward; those with weight 0 are left out.

        Args:
            targets: per image ``boxes`` (n, 4) cx, cy, w, h in [0, 1].
        """
        record, config = self.record, self.config
        losses = {}
        if config.foreground_weight:
            wanted = foreground(targets, record.shape, record.valid_ratio).to(record.scores)
            entropy = F.binary_cross_entropy_with_logits(record.scores, wanted, reduction="none")
            losses["foreground"] = config.foreground_weight * valid_mean(entropy, record.valid)
        if config.sparsity_weight:
            mean = valid_mean(record.scores.sigmoid(), record.valid)
            losses["sparsity"] = config.sparsity_weight * mean
        if config.diversity_weight:
            losses["diversity"] = config.diversity_weight * similarity(record)
        return losses

    def statistics(self) -> dict[str, float]:
        """Share of tokens kept in the last training forward."""
        kept = (
            self.record.tokens.shape[1] if self.record.index is None else self.record.index.shape[1]
        )
        return {"keep_ratio": kept / self.record.tokens.shape[1]}


class MemoryPruner(Scheduled):
    """Chooses the tokens of all levels that the decoder's cross-attention can read."""

    def __init__(self, config: MemoryPruningConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, scores: Tensor, least: int) -> Tensor | None:
        """Indices (B, K) of the tokens with the best scores (B, N), at least ``least`` of them.

        In spatial order; None if all are kept. The scores are the encoder's class scores, which
        have a loss of their own, so that no gate is needed.
        """
        config = self.config
        ratio = self.ramped(config.start_step, config.end_step, 1.0, config.keep_ratio)
        count = keep_count(ratio, scores.shape[1], least)
        return None if count == scores.shape[1] else best_tokens(scores, count)


def valid_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of (B, N) over what is not padding."""
    if valid is None:
        return values.mean()
    return (values * valid).sum() / valid.sum().clamp(min=1)


def foreground(
    targets: list[dict[str, Tensor]], shape: tuple[int, int], valid_ratio: Tensor | None = None
) -> Tensor:
    """(B, H * W) bool: tokens whose cell a ground-truth box touches, at least one per box."""
    height, width = shape
    masks = []
    for image, target in enumerate(targets):
        centre, half = target["boxes"].float().split(2, dim=1)
        low, high = centre - half / 2, centre + half / 2
        size = low.new_tensor([width, height])
        if valid_ratio is not None:
            size = size * valid_ratio[image]
        low, high = low * size, high * size  # in cells
        x = torch.arange(width, device=low.device)
        y = torch.arange(height, device=low.device)
        across = (x + 1 > low[:, :1]) & (x < high[:, :1])
        down = (y + 1 > low[:, 1:]) & (y < high[:, 1:])
        masks.append((down[:, :, None] & across[:, None, :]).any(0).flatten())
    return torch.stack(masks)


def similarity(record: PruningRecord) -> Tensor:
    """Mean squared cosine among tokens, weighted by their scores; small if they differ."""
    directions = F.normalize(record.tokens.detach().float(), dim=-1)
    worth = record.scores.sigmoid()
    if record.valid is not None:
        worth = worth * record.valid
    worth = worth / worth.sum(1, keepdim=True).clamp(min=1e-6)
    squared = (directions @ directions.transpose(1, 2)) ** 2
    return torch.einsum("bi,bij,bj->b", worth, squared, worth).mean()

"""Token pruning: tokens that carry nothing take no part in what follows.

A small MLP scores every token; the best share is kept, in spatial order. Bare indices carry no
gradient, so the scorer learns from the ground truth (as in Focus-DETR,
https://arxiv.org/abs/2307.12612) and from the task, which reaches it through a gate.
"""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...clock import check_ramp, ramp
from ..context import Part, current
from ..layers import MLP, check_choice
from ..tokens import Padding, TokenMap, prune

PRIOR_SIZE = 16  # cells per side of the learnable prior, which is resized to the feature map
PRIORS = ("flat", "centre", "lower")


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
        scorer: "learned", the MLP; "attention" needs no training: what the class and register
            tokens of a ViT would attend to, next.
        random_ratio: each training step draws its ratio evenly between the schedule's and 1, for
            a model that shall run at any of them.
        gate: let the task train the scorer, by a factor that is 1 in value.
        spatial_prior: add a learnable map to the scores: a fixed camera's empty regions. None
            adds none; "flat" starts at 0, "centre" prefers the picture's centre to its border
            and "lower" its lower half at the start, by logits of 1 to -1.
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
    scorer: str = "learned"
    random_ratio: bool = False
    gate: bool = True
    spatial_prior: str | None = None
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
        check_choice("scorer", self.scorer, ("learned", "attention"))
        if self.spatial_prior is not None:
            check_choice("spatial_prior", self.spatial_prior, PRIORS)
            if self.scorer != "learned":
                raise ValueError(
                    f"spatial_prior={self.spatial_prior!r} is learned and needs scorer='learned'"
                )
        check_ramp("PruningConfig", self.start_step, self.end_step)
        for name in ("foreground_weight", "sparsity_weight", "diversity_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True)
class ViTPruningConfig(PruningConfig):
    """Settings of token pruning at one place of a ViT.

    Prefix tokens stay. What is pruned passes by the blocks from here to the next place, where all
    are scored anew; a tap reads it as it was here.

    Args:
        block: index of the block in front of which tokens are pruned.
    """

    block: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement != "before":
            raise ValueError(f"placement={self.placement!r} must be 'before' in a ViT")


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
    """What a forward leaves of a token pruner.

    Attributes:
        scores: (B, N) logits; None where nothing had to be chosen.
        tokens: (B, N, dim) among which was chosen.
        where: where these stand.
        kept: where those stand that were kept.
    """

    config: PruningConfig
    scores: Tensor | None
    tokens: Tensor
    where: TokenMap
    kept: TokenMap

    def losses(self, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weighted losses of a learned scorer; those with weight 0 are left out.

        Args:
            targets: per image ``boxes`` (n, 4) cx, cy, w, h in [0, 1].
        """
        config, valid = self.config, self.where.valid
        losses: dict[str, Tensor] = {}
        if config.scorer != "learned":
            return losses
        if config.foreground_weight:
            wanted = self.foreground(targets).to(self.scores)
            entropy = F.binary_cross_entropy_with_logits(self.scores, wanted, reduction="none")
            losses["foreground"] = config.foreground_weight * valid_mean(entropy, valid)
        if config.sparsity_weight:
            mean = valid_mean(self.scores.sigmoid(), valid)
            losses["sparsity"] = config.sparsity_weight * mean
        if config.diversity_weight:
            alike = similarity(self.tokens, self.scores, valid)
            losses["diversity"] = config.diversity_weight * alike
        return losses

    def foreground(self, targets: list[dict[str, Tensor]]) -> Tensor:
        """(B, N) bool: tokens whose cell a ground-truth box touches."""
        return prune(foreground(targets, self.where.shape, self.where.padding), self.where.index)

    def kept_cells(self) -> Tensor:
        """(B, H * W) bool: cells of the map whose token was kept."""
        cells = torch.zeros(len(self.tokens), math.prod(self.where.shape), dtype=torch.bool)
        cells = cells.to(self.tokens.device)
        index = self.kept.index
        return ~cells if index is None else cells.scatter(1, index, True)

    def statistics(self) -> dict[str, float]:
        """Share of the map's cells whose token was kept."""
        cells = math.prod(self.where.shape)
        return {
            "keep_ratio": (cells if self.kept.index is None else self.kept.index.shape[1]) / cells
        }


class TokenPruner(Part):
    """Scores tokens of one feature map and chooses those that stay."""

    kind = "pruning"

    def __init__(self, config: PruningConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        if config.scorer == "learned":
            self.scorer = MLP(dim, 128, 1, 2)
        if config.spatial_prior is not None:
            self.prior = nn.Parameter(spatial_prior(config.spatial_prior)[None, None])

    def ratio(self) -> float:
        """The share of the map's tokens that is kept in this call."""
        config, context = self.config, current()
        ratio = ramp(context.step, config.start_step, config.end_step, 1.0, config.keep_ratio)
        if self.training and config.random_ratio:
            # The step seeds the draw: all places and processes, and a resumed run, draw alike.
            ratio = 1 - random.Random(context.step).random() * (1 - ratio)
        return context.knobs.keep_ratio or ratio

    def knob_limits(self) -> dict[str, float]:
        return {"keep_ratio": 1.0}

    def scores(self, tokens: Tensor, where: TokenMap) -> Tensor:
        """Logits (B, N) of how much each token is worth."""
        scores = self.scorer(tokens).squeeze(-1).float()
        if self.config.spatial_prior is not None:
            prior = F.interpolate(
                self.prior, size=where.shape, mode="bilinear", align_corners=False
            )
            scores = scores + prune(prior.flatten(1), where.index)
        return scores

    def forward(
        self, tokens: Tensor, where: TokenMap, scores: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Choose among tokens (B, N, dim).

        Args:
            where: the cells that they stand on; of another pruner's, if it has thinned them.
            scores: (B, N) of a scorer that is not this one's.

        Returns:
            Indices (B, K) of the kept tokens in spatial order, None if all are kept; and their
            gates (B, K, 1), 1 in value with a gradient for the scorer, None without need.
        """
        total, cells = tokens.shape[1], math.prod(where.shape)
        count = min(total, keep_count(self.ratio(), cells, self.config.min_tokens))
        learned, index = scores is None, None
        if learned and (count < total or self.training):
            scores = self.scores(tokens, where)
        if count < total:
            valid = where.valid
            ranked = scores if valid is None else scores.masked_fill(~valid, -torch.inf)
            index = best_tokens(ranked, count)
        context = current()
        if context.records is not None:
            kept = where.prune(index)
            record = PruningRecord(self.config, scores, tokens, where, kept)
            context.leave(self.record_name, record)
        if not (learned and self.training and self.config.gate):
            return index, None
        worth = prune(scores, index).sigmoid()[..., None]
        return index, 1 + (worth - worth.detach())


class MemoryPruner(Part):
    """Chooses the tokens of all levels that the decoder's cross-attention can read."""

    kind = "memory"

    def __init__(self, config: MemoryPruningConfig) -> None:
        super().__init__()
        self.config = config

    def knob_limits(self) -> dict[str, float]:
        return {"memory_ratio": 1.0}

    def forward(self, scores: Tensor, least: int) -> Tensor | None:
        """Indices (B, K) of the tokens with the best scores (B, N), at least ``least`` of them.

        In spatial order; None if all are kept. The scores are the encoder's class scores, which
        have a loss of their own, so that no gate is needed.
        """
        config, context = self.config, current()
        ratio = ramp(context.step, config.start_step, config.end_step, 1.0, config.keep_ratio)
        count = keep_count(context.knobs.memory_ratio or ratio, scores.shape[1], least)
        return None if count == scores.shape[1] else best_tokens(scores, count)


def spatial_prior(start: str) -> Tensor:
    """(PRIOR_SIZE, PRIOR_SIZE) logits that a prior starts from, one of :data:`PRIORS`."""
    side = (torch.arange(PRIOR_SIZE) + 0.5) * 2 / PRIOR_SIZE - 1  # cells' centres in (-1, 1)
    y, x = torch.meshgrid(side, side, indexing="ij")
    return {"flat": torch.zeros_like(y), "centre": 1 - x**2 - y**2, "lower": y.clone()}[start]


def valid_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of (B, N) over what is not padding."""
    if valid is None:
        return values.mean()
    return (values * valid).sum() / valid.sum().clamp(min=1)


def foreground(
    targets: list[dict[str, Tensor]], shape: tuple[int, int], padding: Padding | None = None
) -> Tensor:
    """(B, H * W) bool: tokens whose cell a ground-truth box touches, at least one per box."""
    masks = []
    for image, target in enumerate(targets):
        ratio = None if padding is None else padding.ratio[image]
        masks.append(touched_cells(target["boxes"], shape, ratio).any(0))
    return torch.stack(masks)


def touched_cells(boxes: Tensor, shape: tuple[int, int], ratio: Tensor | None = None) -> Tensor:
    """(n, H * W) bool: the cells of one image's map that each box touches, at least one.

    Args:
        boxes: (n, 4) cx, cy, w, h in [0, 1].
        ratio: (2,) share of the map's width and height that is image; None: all.
    """
    height, width = shape
    centre, half = boxes.float().split(2, dim=1)
    low, high = centre - half / 2, centre + half / 2
    size = low.new_tensor([width, height])
    if ratio is not None:
        size = size * ratio
    low, high = low * size, high * size  # in cells
    x = torch.arange(width, device=low.device)
    y = torch.arange(height, device=low.device)
    across = (x + 1 > low[:, :1]) & (x < high[:, :1])
    down = (y + 1 > low[:, 1:]) & (y < high[:, 1:])
    return (down[:, :, None] & across[:, None, :]).flatten(1)


def similarity(tokens: Tensor, scores: Tensor, valid: Tensor | None) -> Tensor:
    """Mean squared cosine among tokens, weighted by their scores; small if they differ."""
    directions = F.normalize(tokens.detach().float(), dim=-1)
    worth = scores.sigmoid()
    if valid is not None:
        worth = worth * valid
    worth = worth / worth.sum(1, keepdim=True).clamp(min=1e-6)
    squared = (directions @ directions.transpose(1, 2)) ** 2
    return torch.einsum("bi,bij,bj->b", worth, squared, worth).mean()

"""The recipes' optimizer and learning-rate schedules."""

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import LinearParamScheduler, ParamScheduler
from torch import nn

from ..arguments import arguments, naming_keys
from ..clock import begin_training
from ..modeling import FreezeConfig, MetaArch
from ..modeling.backbone.base import PretrainedBackbone
from ..modeling.freezing import drop_dormant_gradients

# Vectors and tokens that are decayed as little as biases and norms, by their last names.
BIASES = ("in_proj_bias", "q_bias", "v_bias", "b1", "b2")
NO_DECAY = (*BIASES, "gamma_1", "gamma_2", "cls_token", "reg_token")


@dataclass(frozen=True)
class RateRule:
    """The learning rate of all parameters whose names a pattern finds, relative to the others'.

    Args:
        pattern: regular expression, searched for in the names.
        factor: of the rate.
        decay: rate of each block relative to the next one's, by the number that the pattern's
            group ``block`` matches; parameters where it matches none lie below the first block.
    """

    pattern: str
    factor: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 0 or self.decay <= 0:
            raise ValueError(f"{self}: factor must not be negative, and decay must be positive")
        if self.decay != 1 and "block" not in re.compile(self.pattern).groupindex:
            raise ValueError(f"{self}: decay needs a group (?P<block>...) in the pattern")

    def factors(self, names: Iterable[str]) -> dict[str, float]:
        """The factor of each parameter that the pattern finds.

        Raises:
            ValueError: if it finds none, as if misspelt.
        """
        found = {name: match for name in names if (match := re.search(self.pattern, name))}
        if not found:
            raise ValueError(f"no parameter's name has the pattern {self.pattern!r}")
        blocks = {name: int(match.groupdict().get("block") or -1) for name, match in found.items()}
        last = max(blocks.values())
        return {name: self.factor * self.decay ** (last - n) for name, n in blocks.items()}


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    rules: Mapping[str, Mapping] | None = None,
) -> list[dict]:
    """Parameter groups: norms (by module type) and biases without decay, some parts slower.

    Args:
        rules: settings of a :class:`RateRule` each, under names for configs and overrides to
            change them by. The factors of all rules that find a parameter multiply ``base_lr``,
            in whatever order.

    Raises:
        ValueError: if a rule's pattern finds no parameter, trained or frozen.
    """
    if isinstance(model, MetaArch):
        begin_training(model, model.clock)  # workers follow it, also if a checkpoint is loaded
    factors = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    for rule in (rules or {}).values():
        for name, factor in RateRule(**rule).factors(factors).items():
            factors[name] *= factor
    groups = get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=0.0,
        weight_decay_bias=0.0,
        # Detectron2 puts a dot in front of the names of the model's own parameters.
        lr_factor_func=lambda name: factors[name.removeprefix(".")],
        overrides={name: {"weight_decay": 0.0} for name in NO_DECAY},
    )
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, PretrainedBackbone) and is_slower(backbone, groups):
        backbone.fine_tuned = True
    return groups


def is_slower(part: nn.Module, groups: list[dict]) -> bool:
    """Whether a part of a model has parameters of a lower rate than the model's highest."""
    highest = max((group["lr"] for group in groups), default=0.0)
    slow = {id(p) for group in groups if group["lr"] < highest for p in group["params"]}
    return any(id(parameter) in slow for parameter in part.parameters())


def build_adamw(
    params: list[dict],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    clip_norm: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW that clips the norm of all gradients together before each step.

    Clipping inside of ``step`` works with every trainer, and under AMP after unscaling. Dormant
    parameters (see :mod:`dset_d2.modeling.freezing`) are left as they are.
    """
    if clip_norm <= 0:
        raise ValueError(f"clip_norm={clip_norm} must be positive")
    parameters = [p for group in params for p in group["params"]]
    # The fused step is four times faster on a CPU. On a GPU it would unscale AMP's gradients
    # inside of the step, after they were clipped.
    fused = all(p.device.type == "cpu" for p in parameters)
    optimizer = torch.optim.AdamW(
        params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=fused
    )

    def prepare(*_) -> None:
        drop_dormant_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, clip_norm)

    optimizer.register_step_pre_hook(prepare)
    return optimizer


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """:func:`build_adamw` by a ``CfgNode``'s ``SOLVER``, for Detectron2's ``DefaultTrainer``."""
    solver = cfg.SOLVER
    with naming_keys(cfg, "SOLVER"):
        groups = parameter_groups(model, solver.BASE_LR, solver.WEIGHT_DECAY, solver.RULES)
        return build_adamw(groups, solver.BASE_LR, **arguments(build_adamw, cfg, "SOLVER"))


def warmed_up(schedule: ParamScheduler, max_iter: int, warmup_iters: int) -> ParamScheduler:
    """Linear warm-up over the first ``warmup_iters`` of ``max_iter`` steps, then ``schedule``."""
    if warmup_iters < 0:
        raise ValueError(f"warmup_iters={warmup_iters} must not be negative")
    if warmup_iters == 0:
        return schedule
    start = 1 / warmup_iters
    if warmup_iters >= max_iter:  # the run ends within the warm-up
        return LinearParamScheduler(start, max_iter / warmup_iters)
    return WarmupParamScheduler(schedule, start, warmup_iters / max_iter, "linear")


def warmup_constant(max_iter: int, warmup_iters: int) -> ParamScheduler:
    """Linear warm-up over ``warmup_iters`` of ``max_iter`` steps, then a constant rate."""
    # fvcore's constant schedule refuses the very end, where Detectron2 asks after the last step.
    return warmed_up(LinearParamScheduler(1.0, 1.0), max_iter, warmup_iters)


class FlatCosine(ParamScheduler):
    """1, then half a cosine down to ``floor``, then ``floor``; by the share of the run done."""

    def __init__(self, flat: float, floor: float, final: float) -> None:
        if not 0 <= flat <= 1 - final <= 1:
            raise ValueError(f"flat={flat} and final={final} must not be negative nor exceed 1")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor={floor} must lie in [0, 1]")
        self.flat, self.floor, self.end = flat, floor, 1 - final

    def __call__(self, where: float) -> float:
        if where <= self.flat:
            return 1.0
        if where >= self.end:
            return self.floor
        done = (where - self.flat) / (self.end - self.flat)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


def flat_cosine(
    max_iter: int, warmup_iters: int, flat: float, floor: float, final: float = 0.0
) -> ParamScheduler:
    """Linear warm-up, a constant rate, half a cosine down, and a constant low rate.

    Args:
        flat: share of the run, warm-up included, before the rate falls.
        floor: the last rate relative to the first.
        final: share of the run at its end with the last rate: its epochs without augmentation.
    """
    return warmed_up(FlatCosine(flat, floor, final), max_iter, warmup_iters)


class UnfreezingDrops(ParamScheduler):
    """A schedule whose rates also drop whenever another block of a frozen ViT begins to be trained.

    Args:
        schedule: of the rates without the drops.
        freeze: says when the blocks begin; those that begin together make one drop. None: no drop.
        last: the rates behind the last drop relative to those without any; all drops are equal.
    """

    def __init__(
        self,
        schedule: ParamScheduler,
        max_iter: int,
        freeze: FreezeConfig | None,
        last: float = 0.1,
    ) -> None:
        if not 0 < last <= 1:
            raise ValueError(f"last={last} must lie in (0, 1]")
        self.schedule, self.max_iter, self.last = schedule, max_iter, last
        self.steps = sorted(set(freeze.block_steps())) if freeze else []

    def __call__(self, where: float) -> float:
        """The rate after the share ``where`` of the run, relative to the first."""
        done = bisect_right(self.steps, round(where * self.max_iter))
        return self.schedule(where) * self.last ** (done / max(1, len(self.steps)))

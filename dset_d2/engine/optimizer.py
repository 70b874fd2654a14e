"""The recipes' optimizer and learning-rate schedules."""

import math
import re

import torch
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import LinearParamScheduler, ParamScheduler
from torch import nn

from ..clock import begin_training
from ..modeling import MetaArch
from ..modeling.freezing import drop_dormant_gradients
from ..modeling.lora import is_lora

# Vectors and tokens that are decayed as little as biases and norms, by their last names.
BIASES = ("in_proj_bias", "q_bias", "v_bias", "b1", "b2")
NO_DECAY = (*BIASES, "gamma_1", "gamma_2", "cls_token", "reg_token")

VIT = "backbone.dinov3."


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    backbone_factor: float = 1.0,
    encoder_factor: float = 1.0,
    vit_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict]:
    """Parameter groups: norms (by module type) and biases without decay, some parts slower.

    Args:
        backbone_factor: learning rate of ``model.backbone`` relative to ``base_lr``.
        encoder_factor: that of ``model.encoder``, but for its sparse parts.
        vit_factor: that of the backbone's ViT, if it has one, relative to the rest of the
            backbone; low-rank updates, which start from nothing, count as the rest.
        layer_decay: learning rate of each of the ViT's blocks relative to the next one's.
    """
    if isinstance(model, MetaArch):
        begin_training(model, model.clock)
    vit = getattr(getattr(model, "backbone", None), "dinov3", None)
    depth = len(vit.blocks) if vit is not None else 0

    def factor(name: str) -> float:
        if name.startswith("encoder."):
            return 1.0 if {"router", "experts", "pruner"} & set(name.split(".")) else encoder_factor
        if not name.startswith("backbone."):
            return 1.0
        if not name.startswith(VIT) or is_lora(name):
            return backbone_factor
        return backbone_factor * vit_factor * layer_decay ** layers_above(name, depth)

    return get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=0.0,
        weight_decay_bias=0.0,
        lr_factor_func=factor,
        overrides={name: {"weight_decay": 0.0} for name in NO_DECAY},
    )


def layers_above(name: str, depth: int) -> int:
    """How many of a ViT's blocks follow a parameter: 0 in the last block and in the final norm,
    ``depth`` in the patch embedding and the tokens."""
    block = re.match(rf"{re.escape(VIT)}blocks\.(\d+)\.", name)
    if block:
        return depth - 1 - int(block[1])
    return 0 if name.startswith(f"{VIT}norm.") else depth


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
        params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=fused
    )

    def prepare(*_) -> None:
        drop_dormant_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, clip_norm)

    optimizer.register_step_pre_hook(prepare)
    return optimizer


def warmed_up(schedule: ParamScheduler, max_iter: int, warmup_iters: int) -> ParamScheduler:
    """Linear warm-up over the first ``warmup_iters`` of ``max_iter`` steps, then ``schedule``."""
    if warmup_iters < 1:
        raise ValueError(f"warmup_iters={warmup_iters} must be at least 1")
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

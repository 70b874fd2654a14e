"""The recipe's optimizer and learning-rate schedule."""

import torch
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch import nn


def parameter_groups(
    model: nn.Module,
    base_lr: float,
    weight_decay: float,
    backbone_factor: float = 1.0,
    encoder_factor: float = 1.0,
) -> list[dict]:
    """Parameter groups: norms (by module type) and biases without decay, some parts slower.

    Args:
        backbone_factor: learning rate of ``model.backbone`` relative to ``base_lr``.
        encoder_factor: that of ``model.encoder``, but for its sparse parts.
    """

    def factor(name: str) -> float:
        if name.startswith("backbone."):
            return backbone_factor
        sparse = {"moe", "pruner"} & set(name.split("."))
        return encoder_factor if name.startswith("encoder.") and not sparse else 1.0

    return get_default_optimizer_params(
        model,
        base_lr=base_lr,
        weight_decay=weight_decay,
        weight_decay_norm=0.0,
        weight_decay_bias=0.0,
        lr_factor_func=factor,
        overrides={"in_proj_bias": {"weight_decay": 0.0}},
    )


def build_adamw(
    params: list[dict],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    clip_norm: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW that clips the norm of all gradients together before each step.

    Clipping inside of ``step`` works with every trainer, and under AMP after unscaling.
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

    def clip(*_) -> None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def warmup_constant(max_iter: int, warmup_iters: int) -> ParamScheduler:
    """Linear warm-up over ``warmup_iters`` of ``max_iter`` steps, then a constant rate."""
    if warmup_iters < 1:
        raise ValueError(f"warmup_iters={warmup_iters} must be at least 1")
    start = 1 / warmup_iters
    if warmup_iters >= max_iter:  # the run ends within the warm-up
        return LinearParamScheduler(start, max_iter / warmup_iters)
    # fvcore's constant schedule refuses the very end, where Detectron2 asks after the last step.
    constant = LinearParamScheduler(1.0, 1.0)
    return WarmupParamScheduler(constant, start, warmup_iters / max_iter, "linear")


def warmup_cosine(max_iter: int, warmup_iters: int, end: float = 0.01) -> ParamScheduler:
    """Linear warm-up over ``warmup_iters`` of ``max_iter`` steps, then a cosine down to ``end``."""
    if not 1 <= warmup_iters < max_iter:
        raise ValueError(f"warmup_iters={warmup_iters} must lie in 1..max_iter={max_iter}")
    cosine = CosineParamScheduler(1.0, end)
    return WarmupParamScheduler(cosine, 1 / warmup_iters, warmup_iters / max_iter, "linear")

"""RT-DETR's optimizer and constant schedule after a warm-up."""

from detectron2.config import LazyCall as L

from dset_d2.engine.optimizer import build_adamw, parameter_groups, warmup_constant

optimizer = L(build_adamw)(
    params=L(parameter_groups)(
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        rules=dict(backbone=dict(pattern=r"^backbone\.", factor=1.0)),
    ),
    lr=1e-4,
    weight_decay=1e-4,
    betas=(0.9, 0.999),
    clip_norm=0.1,
)

lr_multiplier = L(warmup_constant)(
    max_iter="${train.max_iter}", warmup_iters="${part_of_run:1,100}"
)

"""RT-DETRv2-R50 on DAIR-V2X, which the study's configs start from."""

from .....configs.rtdetr.rtdetrv2_r50_dair_v2x import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

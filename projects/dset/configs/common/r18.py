"""RT-DETRv2-R18 on DAIR-V2X, which the study's configs start from."""

from .....configs.rtdetr.rtdetrv2_r18_dair_v2x import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

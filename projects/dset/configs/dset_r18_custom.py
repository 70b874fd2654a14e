"""DSET-R18 on your own data."""

from ....configs.rtdetr.rtdetrv2_r18_custom import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from .common.sparse import decoder_moe, patch_moe, pruning

model.encoder.update(pruning=pruning, moe=patch_moe)
model.decoder.moe = decoder_moe
train.output_dir = "./output/dset_r18_custom"

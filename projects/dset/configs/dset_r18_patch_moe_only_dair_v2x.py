"""Ablation of DSET-R18: experts in the encoder alone."""

from .common.r18 import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import patch_moe

model.encoder.moe = patch_moe
train.output_dir = "./output/dset_r18_patch_moe_only_dair_v2x"

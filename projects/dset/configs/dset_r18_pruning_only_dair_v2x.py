"""Ablation of DSET-R18: token pruning alone."""

from .common.r18 import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import pruning

model.encoder.pruning = pruning
train.output_dir = "./output/dset_r18_pruning_only_dair_v2x"

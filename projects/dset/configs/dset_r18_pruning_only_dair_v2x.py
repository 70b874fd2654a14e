"""Ablation of DSET-R18: token pruning alone."""

from .common.sparse import pruning
from .rtdetr_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning = pruning
train.output_dir = "./output/dset_r18_pruning_only_dair_v2x"

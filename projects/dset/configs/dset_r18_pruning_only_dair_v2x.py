"""Ablation of DSET-R18: token pruning beside the decoder's experts, no patch MoE."""

from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.moe = None
train.output_dir = "./output/dset_r18_pruning_only_dair_v2x"

"""Ablation of DSET-R18: patch MoE beside the decoder's experts, no token pruning."""

from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning = None
train.output_dir = "./output/dset_r18_patch_moe_only_dair_v2x"

"""Ablation of DSET-R34: patch MoE beside the decoder's experts, no token pruning."""

from .dset_r34_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning = None
train.output_dir = "./output/dset_r34_patch_moe_only_dair_v2x"

"""DSET-R18 whose pruned tokens become zero instead of keeping their feature."""

from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning.restore = "zero"
train.output_dir = "./output/dset_r18_zero_dair_v2x"

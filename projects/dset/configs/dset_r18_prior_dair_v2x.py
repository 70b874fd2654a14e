"""DSET-R18 whose scorer starts with a preference for the picture's lower half, where roads are."""

from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning.spatial_prior = "lower"
train.output_dir = "./output/dset_r18_prior_dair_v2x"

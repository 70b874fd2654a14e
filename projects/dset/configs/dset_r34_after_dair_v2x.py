"""DSET-R34 by the other reading of the order: tokens are pruned behind the experts, which saves
nothing there; the decoder neither reads nor selects the pruned."""

from .dset_r34_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning.placement = "after"
train.output_dir = "./output/dset_r34_after_dair_v2x"

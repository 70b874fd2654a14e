"""DSET-R34 as the study's report has it, to be set beside ours.

Where it contradicts itself or the first document: tokens are pruned before the experts in one
place and behind them in another (here before; dset_r34_after_dair_v2x.py has the other); the
pruning loss weighs .01, there .001. Experts are as wide as the FFN that they replace, so compute
grows where it is said to fall. Left open are the size of the regions whose tokens share a route
(here 2 x 2) and how often there is a mosaic; batch and epochs are those of ours. The gate stays
ours too: bare indices carry no gradient, and without it the task would not reach the scorer.
"""

from .dset_r34_full_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.moe.patch_size = 2
model.encoder.pruning.update(restore="zero", foreground_weight=0.0, sparsity_weight=0.01)
dataloader.mosaic.prob = 0.5
train.output_dir = "./output/dset_r34_literal_dair_v2x"

"""DSET-R50 as the study's first document has it, to be set beside ours.

Where it contradicts itself: experts are as wide as the FFN that they replace, so compute grows
where it is said to fall; of six experts at top-3 none can take more than a third of the
assignments, so a warning at 50 % never comes. How often there is a mosaic is left open. The gate
stays ours: bare indices carry no gradient, and without it the task would not reach the scorer.
"""

from .common.sparse import _literal_pruning
from .dset_r50_full_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.moe.balance_weight = 0.05
model.encoder.pruning = _literal_pruning
dataloader.mosaic.prob = 0.5
dataloader.train.total_batch_size = 32
train.epochs = 200
train.output_dir = "./output/dset_r50_literal_dair_v2x"

"""DSET-R18 by the other reading of the schedule: no pruning for ten epochs, then a ramp."""

from .common.sparse import EPOCH
from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning.update(start_step=10 * EPOCH, end_step=20 * EPOCH)
train.output_dir = "./output/dset_r18_late_dair_v2x"

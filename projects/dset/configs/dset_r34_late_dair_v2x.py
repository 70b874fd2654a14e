"""DSET-R34 by the other reading of the schedule: no pruning for ten epochs, then a ramp."""

from .dset_r34_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.pruning.update(start_step="${part_of_run:10,100}", end_step="${part_of_run:20,100}")
train.output_dir = "./output/dset_r34_late_dair_v2x"

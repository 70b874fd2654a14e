"""DSET-R18 whose decoder also reads only half of the memory tokens."""

from .common.sparse import _memory_pruning
from .dset_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.decoder.memory_pruning = _memory_pruning
train.output_dir = "./output/dset_r18_memory_dair_v2x"

"""DSET-S: the sparse mechanisms on D-FINE-S."""

from .common.sparse import decoder_moe, patch_moe, pruning
from .dfine_s_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.encoder.update(pruning=pruning, moe=patch_moe)
model.decoder.moe = decoder_moe
train.output_dir = "./output/dset_s_dair_v2x"

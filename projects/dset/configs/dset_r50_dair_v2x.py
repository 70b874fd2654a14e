"""DSET-R50: token pruning and experts in the encoder, experts in the decoder."""

from .common.r50 import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import decoder_moe, patch_moe, pruning

model.encoder.update(pruning=pruning, moe=patch_moe)
model.decoder.moe = decoder_moe
train.output_dir = "./output/dset_r50_dair_v2x"

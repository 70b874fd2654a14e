"""DSET-R18: token pruning and experts in the encoder, experts in the decoder."""

from .common.r18 import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import _decoder_moe, _patch_moe, _pruning

model.encoder.update(pruning=_pruning, moe=_patch_moe)
model.decoder.moe = _decoder_moe
train.output_dir = "./output/dset_r18_dair_v2x"

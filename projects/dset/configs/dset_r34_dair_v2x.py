"""DSET-R34: token pruning and experts in the encoder, experts in the decoder."""

from .common.r34 import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import _decoder_moe, _patch_moe, _pruning

model.encoder.update(pruning=_pruning, moe=_patch_moe)
model.encoder.moe.update(num_experts=6, top_k=3)
model.decoder.moe = _decoder_moe
train.output_dir = "./output/dset_r34_dair_v2x"

"""DSET-R34: token pruning and experts in the encoder, experts in the decoder."""

from .common.r34 import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import decoder_moe, patch_moe, pruning

model.encoder.update(pruning=pruning, moe=patch_moe)
model.encoder.moe.update(num_experts=6, top_k=3)
model.decoder.moe = decoder_moe
train.output_dir = "./output/dset_r34_dair_v2x"

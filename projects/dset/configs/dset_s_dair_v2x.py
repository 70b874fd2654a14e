"""DSET-S: the sparse mechanisms on D-FINE-S, tuned to 40 % of RT-DETRv2-R18's multiply-adds."""

from ....configs.dfine.dfine_s_dair_v2x import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import _decoder_moe, _patch_moe, _pruning

model.encoder.update(pruning=_pruning, moe=_patch_moe)
model.encoder.pruning.keep_ratio = 0.5
model.decoder.moe = _decoder_moe
model.decoder.moe.top_k = 2
model.decoder.num_queries = 200
train.output_dir = "./output/dset_s_dair_v2x"

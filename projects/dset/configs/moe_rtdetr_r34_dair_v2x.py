"""MoE-RTDETR-R34: experts in the decoder only."""

from .common.r34 import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import _decoder_moe

model.decoder.moe = _decoder_moe
train.output_dir = "./output/moe_rtdetr_r34_dair_v2x"

"""MoE-RTDETR-R18: experts in the decoder only."""

from .common.r18 import dataloader, lr_multiplier, model, optimizer, train
from .common.sparse import _decoder_moe

model.decoder.moe = _decoder_moe
train.output_dir = "./output/moe_rtdetr_r18_dair_v2x"

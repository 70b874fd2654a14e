"""The dense control of the study: RT-DETRv2-R34 on DAIR-V2X."""

from .rtdetr_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 34
model.decoder.num_layers = 4
train.output_dir = "./output/rtdetr_r34_dair_v2x"

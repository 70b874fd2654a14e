"""RT-DETRv2-R34 on the infrastructure side of DAIR-V2X."""

from .rtdetrv2_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 34
model.decoder.num_layers = 4
train.output_dir = "./output/rtdetrv2_r34_dair_v2x"

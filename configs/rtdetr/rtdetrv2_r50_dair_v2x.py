"""RT-DETRv2-R50 on the infrastructure side of DAIR-V2X."""

from .rtdetrv2_r18_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(depth=50, freeze_at=0, freeze_norm=True)
model.encoder.update(in_channels=[512, 1024, 2048], expansion=1.0)
model.decoder.num_layers = 6
train.output_dir = "./output/rtdetrv2_r50_dair_v2x"

"""RT-DETRv2-R50 on COCO, 72 epochs (published: 53.4 AP)."""

from ..common.coco_schedule import SCALES, train_for
from .rtdetrv2_r18_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(depth=50, freeze_at=0, freeze_norm=True)
model.encoder.update(in_channels=[512, 1024, 2048], expansion=1.0)
model.decoder.num_layers = 6
model.multi_scale = SCALES
optimizer.params.rules.backbone.factor = 0.1
train.output_dir = "./output/rtdetrv2_r50_coco"
train_for(72, 1, 2000, train, dataloader, model, lr_multiplier)

"""RT-DETRv2-R34 on COCO, 120 epochs (published: 49.9 AP)."""

from ..common.coco_schedule import SCALES
from .rtdetrv2_r18_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 34
model.decoder.num_layers = 4
model.multi_scale = SCALES
optimizer.params.rules.backbone.factor = 0.5
train.output_dir = "./output/rtdetrv2_r34_coco"

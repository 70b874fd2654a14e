"""D-FINE-M on COCO, 132 epochs (published: 52.3 AP)."""

from ..common.coco_schedule import OTHER_SCALES
from .dfine_s_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "B2"
model.encoder.update(in_channels=[384, 768, 1536], expansion=1.0, depth_mult=0.67)
model.decoder.num_layers = 4
model.multi_scale = OTHER_SCALES + [640] * 6
optimizer.params.rules.backbone.factor = 0.1
train.output_dir = "./output/dfine_m_coco"

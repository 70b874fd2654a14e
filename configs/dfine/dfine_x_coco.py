"""D-FINE-X on COCO, 80 epochs (published: 55.8 AP)."""

from ..common.coco_schedule import OTHER_SCALES
from .dfine_l_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "B5"
model.encoder.update(hidden_dim=384, dim_feedforward=2048)
model.decoder.reg_scale = 8.0
model.multi_scale = OTHER_SCALES + [640] * 3
optimizer.params.rules.backbone.factor = 0.01
train.output_dir = "./output/dfine_x_coco"

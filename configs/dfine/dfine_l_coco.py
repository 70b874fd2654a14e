"""D-FINE-L on COCO, 80 epochs (published: 54.0 AP)."""

from ..common.coco_schedule import OTHER_SCALES, train_for
from .dfine_s_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.update(name="B4", use_lab=False, freeze_at=0, freeze_norm=True)
model.encoder.update(in_channels=[512, 1024, 2048], expansion=1.0, depth_mult=1.0)
model.decoder.num_layers = 6
model.multi_scale = OTHER_SCALES + [640] * 4
optimizer.update(lr=2.5e-4, weight_decay=1.25e-4)
optimizer.params.rules.backbone.factor = 0.05
train.output_dir = "./output/dfine_l_coco"
train_for(80, 8, 500, train, dataloader, model, lr_multiplier)

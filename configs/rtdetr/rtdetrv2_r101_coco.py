"""RT-DETRv2-R101 on COCO, 72 epochs (published: 54.3 AP)."""

from .rtdetrv2_r50_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 101
model.encoder.update(hidden_dim=384, dim_feedforward=2048)
optimizer.params.rules.backbone.factor = 0.01
train.output_dir = "./output/rtdetrv2_r101_coco"

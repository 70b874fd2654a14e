"""RT-DETRv2 with HGNetv2-X on COCO, 72 epochs (published: 54.7 AP)."""

from .rtdetrv2_hgnetv2_l_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.name = "X"
model.encoder.update(hidden_dim=384, dim_feedforward=2048)
optimizer.params.rules.backbone.factor = 0.01
train.output_dir = "./output/rtdetrv2_hgnetv2_x_coco"

"""RT-DETRv2 with HGNetv2-L on COCO, 72 epochs (published: 52.9 AP)."""

from detectron2.config import LazyCall as L

from dset_d2.modeling import HGNetv2

from .rtdetrv2_r50_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(HGNetv2)(name="L", freeze_at=0, freeze_norm=True)
model.encoder.in_features = ["stage2", "stage3", "stage4"]
optimizer.params.rules.backbone.factor = 0.05
train.output_dir = "./output/rtdetrv2_hgnetv2_l_coco"

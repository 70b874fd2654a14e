"""RT-DETRv2-R50-m on COCO, 84 epochs: six layers trained, three run (published: 51.9 AP)."""

from ..common.coco_schedule import train_for
from .rtdetrv2_r50_coco import dataloader, lr_multiplier, model, optimizer, train

model.encoder.expansion = 0.5
model.decoder.eval_idx = 2
train.output_dir = "./output/rtdetrv2_r50_m_coco"
train_for(84, 3, 2000, train, dataloader, model, lr_multiplier)

"""D-FINE on a DINOv3 ViT-S/16 on your own data, 60 epochs."""

from ....configs.common.custom_data import dataloader
from .dfine_dinov3_s_coco import lr_multiplier, model, optimizer, train

model.decoder.num_classes = None  # the data set's
dataloader.train.total_batch_size = 16
dataloader.strong_augmentation_end = "${part_of_run:54,60}"
optimizer.lr = 2.5e-4
lr_multiplier.warmup_iters = "${part_of_run:2,60}"
train.output_dir = "./output/dfine_dinov3_s_custom"
train.ema.update(decay=0.999, warmup="${epochs:1}")

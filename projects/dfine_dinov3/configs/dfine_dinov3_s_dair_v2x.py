"""D-FINE on a DINOv3 ViT-S/16, on the infrastructure side of DAIR-V2X, 60 epochs at 544 x 960."""

from ....configs.common.dair_v2x import dataloader
from .dfine_dinov3_s_coco import lr_multiplier, model, optimizer, train

model.decoder.num_classes = 8
# The longer side; the frames are 16 : 9, and so stay the batches.
model.multi_scale = [768, 832, 896, 1024, 1088, 1152] + [960] * 6
dataloader.image_size = [544, 960]
dataloader.train.total_batch_size = 16
dataloader.strong_augmentation_end = "${part_of_run:54,60}"
optimizer.lr = 2.5e-4
lr_multiplier.warmup_iters = "${part_of_run:2,60}"
train.update(output_dir="./output/dfine_dinov3_s_dair_v2x", images=5042, best_metric="bbox/AP50")
train.ema.update(decay=0.999, warmup="${epochs:1}")

"""D-FINE on a DINOv3 ViT-S/16, on the infrastructure side of DAIR-V2X, 60 epochs at 544 x 960."""

from .dfine_dinov3_s_coco import (
    dataloader,
    epochs,
    frozen_epochs,
    lr_multiplier,
    model,
    optimizer,
    plain_epochs,
    train,
)

batch = 16
epoch = 5042 // batch  # images / batch

model.decoder.num_classes = 8
# The longer side; the frames are 16 : 9, and so stay the batches.
model.multi_scale = [768, 832, 896, 1024, 1088, 1152] + [960] * 6
dataloader.image_size = [544, 960]
dataloader.train.dataset.names = "dair_v2x_i_train"
dataloader.train.total_batch_size = batch
dataloader.test.dataset.names = "dair_v2x_i_val"
optimizer.lr = 2.5e-4
lr_multiplier.warmup_iters = 2 * epoch
train.update(
    output_dir="./output/dfine_dinov3_s_dair_v2x",
    max_iter=epochs * epoch,
    eval_period=epoch,
    epoch_iters=epoch,
    best_metric="bbox/AP50",
)
train.checkpointer.period = epoch
train.ema.update(decay=0.999, warmup=epoch)
model.multi_scale_end = dataloader.strong_augmentation_end = (epochs - plain_epochs) * epoch
model.backbone.freeze.unfreeze_step = frozen_epochs * epoch

"""A narrow RT-DETRv2-R18 for minutes of training on a CPU, on the infrastructure side of DAIR-V2X
or on generated scenes in its layout (``make demo``)."""

from detectron2.config import LazyCall as L

from dset_d2.engine.optimizer import flat_cosine

from ..common.dair_v2x import dataloader
from ..common.models.rtdetr_r18 import model
from ..common.optim import optimizer
from ..common.train import train

model.encoder.update(hidden_dim=128, dim_feedforward=512)
model.decoder.update(
    num_classes=8, hidden_dim=128, dim_feedforward=512, num_queries=60, num_denoising=40
)

dataloader.image_size = [128, 224]
dataloader.strong_augmentation_end = 0
dataloader.train.update(total_batch_size=4, num_workers=1)
dataloader.test.num_workers = 1

optimizer.lr = 8e-4
lr_multiplier = L(flat_cosine)(
    max_iter="${train.max_iter}", warmup_iters="${part_of_run:1,15}", flat=0.6, floor=0.01
)
train.update(
    output_dir="./output/rtdetrv2_r18_roadside",
    seed=0,
    epochs=5,
    images=480,
    eval_period="${part_of_run:1,2}",
    best_metric="bbox/AP50",
    log_period=10,
)
train.ema.update(decay=0.98, warmup=50)

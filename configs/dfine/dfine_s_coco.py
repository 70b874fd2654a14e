"""D-FINE-S on COCO, 132 epochs (published: 48.5 AP)."""

from ..common.coco_schedule import OTHER_SCALES, train_for
from ..common.data import dataloader
from ..common.models.dfine_s import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

dataloader.train.total_batch_size = 32
model.multi_scale = OTHER_SCALES + [640] * 20
optimizer.lr = 2e-4
optimizer.params.rules.backbone.factor = 0.5
train.ema.warmup = 1000
train.output_dir = "./output/dfine_s_coco"
train_for(132, 12, 500, train, dataloader, model, lr_multiplier)

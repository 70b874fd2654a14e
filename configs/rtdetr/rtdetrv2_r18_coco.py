"""RT-DETRv2-R18 on COCO, 120 epochs at one size (published: 48.1 AP)."""

from ..common.coco_schedule import train_for
from ..common.data import dataloader
from ..common.models.rtdetr_r18 import model
from ..common.optim import lr_multiplier, optimizer
from ..common.train import train

train.output_dir = "./output/rtdetrv2_r18_coco"
train_for(120, 3, 2000, train, dataloader, model, lr_multiplier)

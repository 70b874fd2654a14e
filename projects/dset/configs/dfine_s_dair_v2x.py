"""The dense control of DSET-S: D-FINE-S on the infrastructure side of DAIR-V2X."""

from ....configs.common.dfine_s import model
from .rtdetr_r18_dair_v2x import dataloader, lr_multiplier, optimizer, train

model.decoder.num_classes = 8
train.output_dir = "./output/dfine_s_dair_v2x"

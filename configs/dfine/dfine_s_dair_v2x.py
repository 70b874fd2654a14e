"""D-FINE-S on the infrastructure side of DAIR-V2X, trained as RT-DETRv2-R18 there."""

from ..common.models.dfine_s import model
from ..rtdetr.rtdetrv2_r18_dair_v2x import dataloader, lr_multiplier, optimizer, train

model.decoder.num_classes = 8
train.output_dir = "./output/dfine_s_dair_v2x"

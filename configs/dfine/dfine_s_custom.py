"""D-FINE-S on your own data, trained as RT-DETRv2-R18 there."""

from ..common.models.dfine_s import model
from ..rtdetr.rtdetrv2_r18_custom import dataloader, lr_multiplier, optimizer, train

model.decoder.num_classes = None  # the data set's
train.output_dir = "./output/dfine_s_custom"

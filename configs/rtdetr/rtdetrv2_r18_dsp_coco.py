"""RT-DETRv2-R18 with discrete sampling: 36 epochs that start from the trained R18.

Detectron2's own launcher would start from that run's unaveraged weights and go on with its count
of steps; give it what dset_d2.tools.convert_checkpoint makes of the file.
"""

from ..common.coco_schedule import train_for
from .rtdetrv2_r18_coco import dataloader, lr_multiplier, model, optimizer, train

model.decoder.cross_attn_method = "discrete"
train.output_dir = "./output/rtdetrv2_r18_dsp_coco"
train.init_checkpoint = "./output/rtdetrv2_r18_coco/model_final.pth"
train_for(36, 3, 2000, train, dataloader, model, lr_multiplier)

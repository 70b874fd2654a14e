"""Dynamic-DINO on the infrastructure side of DAIR-V2X, by phrases of its eight classes."""

from .dynamic_dino_coco import model as _dynamic
from .grounding_dino_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.update(swap=_dynamic.swap, trainable=_dynamic.trainable)
train.output_dir = "./output/dynamic_dino_dair_v2x"

"""Grounding DINO on the infrastructure side of DAIR-V2X, by phrases of its eight classes."""

from ....configs.common.dair_v2x import dataloader as _dair_v2x
from .grounding_dino_coco import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.dataset = _dair_v2x.train.dataset
dataloader.test.dataset = _dair_v2x.test.dataset
# In the order of the classes, whose "Trafficcone" is no word.
model.prompts = "car truck van bus pedestrian cyclist motorcyclist".split() + ["traffic cone"]
train.update(output_dir="./output/grounding_dino_dair_v2x", images=5042)

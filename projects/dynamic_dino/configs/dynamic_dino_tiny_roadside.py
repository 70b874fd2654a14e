"""The tiny Grounding DINO of grounding_dino_tiny_roadside, tuned with experts in its decoder.

It starts from that one's weights: ``train.init_checkpoint=.../model_final.pth``.
"""

from .dynamic_dino_coco import model as _dynamic
from .grounding_dino_tiny_roadside import dataloader, lr_multiplier, model, optimizer, train

model.swap = _dynamic.swap
optimizer.lr = 2e-4
train.update(output_dir="./output/dynamic_dino_tiny_roadside", epochs=2)

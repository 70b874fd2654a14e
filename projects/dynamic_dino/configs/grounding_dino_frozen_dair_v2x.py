"""As grounding_dino_dair_v2x, but of the pretrained network only that is trained which Dynamic-DINO
trains beside its experts: the attention between image and text, and the heads."""

from .common.grounding_dino import FUSION, HEADS
from .grounding_dino_dair_v2x import dataloader, lr_multiplier, model, optimizer, train

model.trainable = [*FUSION, *HEADS]
train.output_dir = "./output/grounding_dino_frozen_dair_v2x"

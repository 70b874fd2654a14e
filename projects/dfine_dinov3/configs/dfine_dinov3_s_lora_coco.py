"""The same model, but its ViT stays frozen and low-rank updates of its attention are trained."""

from detectron2.config import LazyCall as L

from dset_d2.modeling import LoRAConfig

from .dfine_dinov3_s_coco import dataloader, lr_multiplier, model, optimizer, train

model.backbone.freeze.unfreeze_step = None
model.backbone.lora = L(LoRAConfig)(rank=8, alpha=16.0, blocks=None)
train.output_dir = "./output/dfine_dinov3_s_lora_coco"

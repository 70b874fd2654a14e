"""D-FINE on a DINOv3 ViT-S/16 that runs on half of its tokens behind its second block, on the
infrastructure side of DAIR-V2X, 60 epochs at 544 x 960."""

from ...dfine_dinov3.configs.dfine_dinov3_s_dair_v2x import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from .dset_dinov3_s_coco import model as _sparse

model.backbone.pruning = _sparse.backbone.pruning
train.output_dir = "./output/dset_dinov3_s_dair_v2x"

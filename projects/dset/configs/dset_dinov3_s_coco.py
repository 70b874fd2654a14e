"""D-FINE on a DINOv3 ViT-S/16 that runs on half of its tokens behind its second block, on COCO.

The scorer is trained from the start, in the ViT's phase A by the boxes alone; the ratio falls from
1 to 50 % during that phase.
"""

from detectron2.config import LazyCall as L

from dset_d2.modeling.sparse import ViTPruningConfig

from ...dfine_dinov3.configs.dfine_dinov3_s_coco import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.pruning = [
    L(ViTPruningConfig)(keep_ratio=0.5, block=2, end_step="${part_of_run:6,60}")
]
train.output_dir = "./output/dset_dinov3_s_coco"

"""A narrow DINOv3 detector with experts in every second block of its ViT, for minutes of training
from scratch on a CPU, at any of its settings: three input sizes, half of the tokens behind the
second block, one or two experts per token, six to eight blocks, one to three decoder layers."""

from detectron2.config import LazyCall as L

from dset_d2.modeling import SupernetConfig
from dset_d2.modeling.sparse import MoEConfig, ViTPruningConfig

from ...dset.configs.dset_dinov3_roadside import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.pruning = [L(ViTPruningConfig)(keep_ratio=1.0, block=2)]
model.backbone.moe = L(MoEConfig)(num_experts=4, top_k=2, expert_dim=512, layers=[0, 2, 4, 6])
model.supernet = L(SupernetConfig)(
    keep_ratio=[1.0, 0.5],
    top_k=[2, 1],
    vit_blocks=[8, 6],
    decoder_layers=[3, 1],
)
# The longer sides of 256 x 448 at scales of 1, .75 and .5.
model.multi_scale = [448, 336, 224]
model.multi_scale_end = "${train.max_iter}"
train.update(output_dir="./output/vit_moe_roadside", epochs=15)  # each setting has its share

"""A narrow DINOv3 detector for minutes of training from scratch on a CPU, on generated scenes whose
ViT has 448 patch tokens (256 x 448) and half of them behind its second block."""

from detectron2.config import LazyCall as L

from dset_d2.modeling import DINOv3, SpatialTuningAdapter
from dset_d2.modeling.sparse import ViTPruningConfig

from ....configs.rtdetr.rtdetrv2_r18_roadside import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone = L(DINOv3)(
    name="vit_tiny_patch16_dinov3_qkvb",
    vit=dict(embed_dim=128, depth=8, num_heads=4, init_values=0.1),
    taps=[3, 5, 7],
    adapter=L(SpatialTuningAdapter)(in_channels=128, out_channels=64, conv_channels=16),
    pruning=[L(ViTPruningConfig)(keep_ratio=0.5, block=2, end_step="${part_of_run:1,3}")],
)
model.encoder.update(
    in_features=["p3", "p4", "p5"], in_channels=[64, 64, 64], hidden_dim=64, dim_feedforward=256,
    depth_mult=0.34,
)  # fmt: skip
model.decoder.update(hidden_dim=64, dim_feedforward=256)
# ImageNet's, as DINOv3 was trained.
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
dataloader.image_size = [256, 448]
train.output_dir = "./output/dset_dinov3_roadside"

"""RT-DETRv2-R18, by what other sizes and studies change; the rest is the classes' defaults."""

from detectron2.config import LazyCall as L

from dset_d2.modeling import (
    DETRDetector,
    HungarianMatcher,
    HybridEncoder,
    PResNet,
    RTDETRDecoder,
    SetCriterion,
)

model = L(DETRDetector)(
    backbone=L(PResNet)(depth=18),
    encoder=L(HybridEncoder)(
        in_features=["res3", "res4", "res5"],
        in_channels=[128, 256, 512],
        hidden_dim=256,
        dim_feedforward=1024,
        use_encoder_idx=[2],
        expansion=0.5,
    ),
    decoder=L(RTDETRDecoder)(
        num_classes=80,
        in_channels=["${...encoder.hidden_dim}"] * 3,
        hidden_dim=256,
        num_queries=300,
        num_layers=3,
        dim_feedforward=1024,
        num_points=[4, 4, 4],
        num_denoising=100,
    ),
    criterion=L(SetCriterion)(
        num_classes="${..decoder.num_classes}",
        matcher=L(HungarianMatcher)(),
        weights={"vfl": 1.0, "bbox": 5.0, "giou": 2.0},
    ),
)

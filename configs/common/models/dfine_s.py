"""D-FINE-S, by what other sizes and studies change; the rest is the classes' defaults."""

from detectron2.config import LazyCall as L

from dset_d2.modeling import (
    DETRDetector,
    DFINECriterion,
    DFINEDecoder,
    HGNetv2,
    HungarianMatcher,
    HybridEncoder,
)

model = L(DETRDetector)(
    backbone=L(HGNetv2)(name="B0", use_lab=True),
    encoder=L(HybridEncoder)(
        in_features=["stage2", "stage3", "stage4"],
        in_channels=[256, 512, 1024],
        hidden_dim=256,
        dim_feedforward=1024,
        use_encoder_idx=[2],
        fusion="gelan",
        expansion=0.5,
        depth_mult=0.34,
    ),
    decoder=L(DFINEDecoder)(
        num_classes=80,
        in_channels=["${...encoder.hidden_dim}"] * 3,
        hidden_dim=256,
        num_queries=300,
        num_layers=3,
        dim_feedforward=1024,
        num_points=[3, 6, 3],
        num_denoising=100,
        reg_scale=4.0,
    ),
    criterion=L(DFINECriterion)(
        num_classes="${..decoder.num_classes}",
        matcher=L(HungarianMatcher)(),
        weights={"vfl": 1.0, "mal": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5},
    ),
)

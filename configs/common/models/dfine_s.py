"""D-FINE-S, by what differs from RT-DETRv2-R18."""

from detectron2.config import LazyCall as L

from dset_d2.modeling import DFINECriterion, DFINEDecoder, HGNetv2

from .rtdetr_r18 import model

model.backbone = L(HGNetv2)(name="B0", use_lab=True)
model.encoder.update(
    in_features=["stage2", "stage3", "stage4"],
    in_channels=[256, 512, 1024],
    fusion="gelan",
    depth_mult=0.34,
)
model.decoder.update(_target_=DFINEDecoder, num_points=[3, 6, 3], reg_scale=4.0)
model.criterion.update(
    _target_=DFINECriterion,
    weights={"vfl": 1.0, "mal": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5},
)

"""The detectors of other libraries that ours are timed beside: of transformers, an extra."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..modeling.meta_arch import Detections, best_detections, to_instances


def rtdetrv2_r18() -> nn.Module:
    """The network of ``configs/rtdetr/rtdetrv2_r18_coco.py`` with random weights."""
    import transformers

    backbone = transformers.RTDetrResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        num_labels=80,
        anchor_image_size=None,
    )
    return transformers.RTDetrV2ForObjectDetection(config)


def dfine_s() -> nn.Module:
    """The network of ``configs/dfine/dfine_s_coco.py`` with random weights."""
    import transformers

    out = [64, 256, 512, 1024]
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, 64, 256, 512],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=out,
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[3, 3, 3, 3],
        hidden_sizes=out,
        use_learnable_affine_block=True,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=out[1:],
        hidden_expansion=0.5,
        depth_mult=0.34,
        decoder_layers=3,
        decoder_n_points=[3, 6, 3],
        num_labels=80,
        anchor_image_size=None,
    )
    return transformers.DFineForObjectDetection(config)


PEERS: dict[str, Callable[[], nn.Module]] = {
    "rtdetrv2_r18_coco": rtdetrv2_r18,
    "dfine_s_coco": dfine_s,
}


class Peer(nn.Module):
    """Another library's network, called as a detector is: Detectron2's dicts in and out.

    It is given what ours is: its normalisation and post-processing are the same.
    """

    def __init__(self, network: nn.Module, max_detections: int = 300) -> None:
        super().__init__()
        self.graph = PeerGraph(network.eval(), max_detections)

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        images = torch.stack([x["image"] for x in batched_inputs])
        sizes = [tuple(x["image"].shape[1:]) for x in batched_inputs]
        found = to_instances(Detections(*self.graph(images)), sizes)
        return [{"instances": instances} for instances in found]


class PeerGraph(nn.Module):
    """(B, 3, H, W) uint8 -> boxes, scores, classes, as in exported files."""

    def __init__(self, network: nn.Module, max_detections: int) -> None:
        super().__init__()
        self.network = network
        self.max_detections = max_detections

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.network(images / 255)
        named = {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes}
        return tuple(best_detections(named, self.max_detections))

"""The same weights give the same detections in Hugging Face's independent implementation."""

import re

import pytest
import torch
from detectron2.config import instantiate

import dset_d2

from ..conftest import randomise

transformers = pytest.importorskip("transformers")

# Their parameter names -> ours.
RENAMES = (
    (r"^(model\.decoder\.)?class_embed\.", "decoder.dec_score_head."),
    (r"^(model\.decoder\.)?bbox_embed\.", "decoder.dec_bbox_head."),
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.", "backbone.conv1.conv1_1."),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.", "backbone.conv1.conv1_2."),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.", "backbone.conv1.conv1_3."),
    (r"^model\.backbone\.model\.embedder\.", "backbone.stem."),
    (
        r"^model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.",
        r"backbone.res_layers.\1.blocks.",
    ),
    (r"^model\.backbone\.model\.encoder\.stages\.", "backbone.stages."),
    (r"\.layer\.0\.", ".branch2a."),
    (r"\.layer\.1\.", ".branch2b."),
    (r"\.shortcut\.1\.", ".short.conv."),
    (r"\.shortcut\.", ".short."),
    (r"\.convolution\.", ".conv."),
    (r"^(backbone\.(stem|stages)\..*)\.normalization\.", r"\1.bn."),
    (r"\.normalization\.", ".norm."),
    (r"^model\.(encoder|decoder)_input_proj\.(\d)\.(0|conv)\.", r"\1.input_proj.\2.conv."),
    (r"^model\.(encoder|decoder)_input_proj\.(\d)\.(1|norm)\.", r"\1.input_proj.\2.norm."),
    (r"^model\.encoder\.aifi\.", "encoder.encoder."),
    (r"^model\.encoder\.", "encoder."),
    (r"^model\.enc_output\.0", "decoder.enc_output.proj"),
    (r"^model\.enc_output\.1", "decoder.enc_output.norm"),
    (r"^model\.(enc_|denoising)", r"decoder.\1"),
    (r"^model\.decoder\.(layers|lqe_layers)\.", r"decoder.decoder.\1."),
    (r"^model\.decoder\.(query_pos_head|pre_bbox_head)\.", r"decoder.\1."),
    (r"^model\.decoder\.(up|reg_scale)", r"decoder.distribution.\1"),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.mlp\.fc", ".ffn.linear"),
    (r"\.mlp\.layers\.0\.", ".ffn.linear1."),
    (r"\.mlp\.layers\.1\.", ".ffn.linear2."),
    (r"\.o_proj\.", ".out_proj."),
)
GELAN_RENAMES = (
    (r"(_blocks\.\d)\.conv([1-4])\.", r"\1.cv\2."),
    (r"(_blocks\.\d)\.cv([23])\.", r"\1.cv\2.1."),
    (r"\.csp_rep1\.", ".cv2.0."),
    (r"\.csp_rep2\.", ".cv3.0."),
    (r"(\.downsample_convs\.\d)\.conv([12])\.", r"\1.0.cv\2."),
)


def our_value(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value of their parameter among ours; their q, k, v are parts of one matrix of ours."""
    gelan = "encoder.fpn_blocks.0.cv1.conv.weight" in state
    for pattern, replacement in RENAMES + (GELAN_RENAMES if gelan else ()):
        name = re.sub(pattern, replacement, name)
    if projection := re.search(r"\.([qkv])_proj\.(weight|bias)$", name):
        packed = state[f"{name[: projection.start()]}.in_proj_{projection[2]}"]
        return packed.chunk(3)["qkv".index(projection[1])]
    return state[name]


def rtdetr_r18():
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


def dfine_m():
    out = [96, 384, 768, 1536]
    backbone = transformers.HGNetV2Config(
        stem_channels=[3, 24, 32],
        stage_in_channels=[32, 96, 384, 768],
        stage_mid_channels=[32, 64, 128, 256],
        stage_out_channels=out,
        stage_num_blocks=[1, 1, 3, 1],
        stage_numb_of_layers=[4, 4, 4, 4],
        hidden_sizes=out,
        use_learnable_affine_block=True,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=out[1:],
        hidden_expansion=1.0,
        depth_mult=0.67,
        decoder_layers=4,
        decoder_n_points=[3, 6, 3],
        num_labels=80,
        anchor_image_size=None,
    )
    return transformers.DFineForObjectDetection(config)


@pytest.mark.parametrize(
    "path, make_theirs",
    [
        ("configs/rtdetr/rtdetrv2_r18_coco.py", rtdetr_r18),
        ("configs/dfine/dfine_m_coco.py", dfine_m),
    ],
)
def test_same_detections(path, make_theirs):
    torch.manual_seed(0)
    ours = randomise(instantiate(dset_d2.get_config(path).model))
    theirs = make_theirs()
    state = ours.state_dict()
    theirs.load_state_dict(
        {
            name: value if "points_scale" in name else our_value(name, state)
            for name, value in theirs.state_dict().items()
        }
    )
    images = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        mine = ours.eval().predict(images)
        other = theirs.eval()(images)
    mine = torch.cat([mine["pred_logits"], mine["pred_boxes"]], -1)
    other = torch.cat([other.logits, other.pred_boxes], -1)
    distance = (mine[:, :, None] - other[:, None]).abs().amax(-1).amin(1)
    assert (distance < 1e-4).float().mean() >= 0.99

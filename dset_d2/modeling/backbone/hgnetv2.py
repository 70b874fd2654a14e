"""PP-HGNetV2, the backbone of RT-DETR-L and -X (https://arxiv.org/abs/2304.08069) and of D-FINE
(https://arxiv.org/abs/2410.13842)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from ...arguments import arguments
from ..layers import check_choice, convolution, folded
from .base import ConvBackbone


class StageConfig(NamedTuple):
    """Channels and depth of one stage: ``layers`` convolutions in each of ``blocks`` blocks."""

    in_channels: int
    mid_channels: int
    out_channels: int
    blocks: int
    light: bool
    kernel_size: int
    layers: int


# name: (stem's mid and out channels, the four stages)
ARCHITECTURES = {
    "B0": (
        (16, 16),
        (
            StageConfig(16, 16, 64, 1, False, 3, 3),
            StageConfig(64, 32, 256, 1, False, 3, 3),
            StageConfig(256, 64, 512, 2, True, 5, 3),
            StageConfig(512, 128, 1024, 1, True, 5, 3),
        ),
    ),
    "B2": (
        (24, 32),
        (
            StageConfig(32, 32, 96, 1, False, 3, 4),
            StageConfig(96, 64, 384, 1, False, 3, 4),
            StageConfig(384, 128, 768, 3, True, 5, 4),
            StageConfig(768, 256, 1536, 1, True, 5, 4),
        ),
    ),
    "B4": (
        (32, 48),
        (
            StageConfig(48, 48, 128, 1, False, 3, 6),
            StageConfig(128, 96, 512, 1, False, 3, 6),
            StageConfig(512, 192, 1024, 3, True, 5, 6),
            StageConfig(1024, 384, 2048, 1, True, 5, 6),
        ),
    ),
    "B5": (
        (32, 64),
        (
            StageConfig(64, 64, 128, 1, False, 3, 6),
            StageConfig(128, 128, 512, 2, False, 3, 6),
            StageConfig(512, 256, 1024, 5, True, 5, 6),
            StageConfig(1024, 512, 2048, 2, True, 5, 6),
        ),
    ),
}
# RT-DETR's names of the same networks.
ARCHITECTURES |= {"L": ARCHITECTURES["B4"], "X": ARCHITECTURES["B5"]}


class LearnableAffine(nn.Module):
    """One learned scale and bias for a whole feature map (LAB)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class ConvBNAct(nn.Module):
    """Convolution, batch norm and optional ReLU; an even kernel pads right and below only.

    Args:
        lab: a learnable affine map follows the ReLU, if there is one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        lab: bool = False,
    ) -> None:
        super().__init__()
        self.pad = (0, 1, 0, 1) if kernel_size % 2 == 0 else None
        self.conv = convolution(in_channels, out_channels, kernel_size, stride, groups)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU() if act else nn.Identity()
        self.lab = LearnableAffine() if act and lab else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad)
        return self.lab(self.act(self.bn(self.conv(x))))

    def fuse(self) -> "ConvBNAct":
        """For inference: the norm within the convolution; the ReLU overwrites its input."""
        self.conv, self.bn = folded(self.conv, self.bn), nn.Identity()
        self.act.inplace = True
        return self


class LightConv(nn.Module):
    """1x1 convolution, then a depthwise one."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, lab: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = ConvBNAct(in_channels, out_channels, 1, act=False)
        self.conv2 = ConvBNAct(
            out_channels, out_channels, kernel_size, groups=out_channels, lab=lab
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class Stem(nn.Module):
    """(B, 3, H, W) -> (B, out_channels, H / 4, W / 4)."""

    def __init__(self, mid_channels: int, out_channels: int, lab: bool) -> None:
        super().__init__()
        self.stem1 = ConvBNAct(3, mid_channels, 3, 2, lab=lab)
        self.stem2a = ConvBNAct(mid_channels, mid_channels // 2, 2, lab=lab)
        self.stem2b = ConvBNAct(mid_channels // 2, mid_channels, 2, lab=lab)
        self.stem3 = ConvBNAct(mid_channels * 2, mid_channels, 3, 2, lab=lab)
        self.stem4 = ConvBNAct(mid_channels, out_channels, 1, lab=lab)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem1(x)
        pooled = F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)
        x = torch.cat([pooled, self.stem2b(self.stem2a(x))], dim=1)
        return self.stem4(self.stem3(x))


class HGBlock(nn.Module):
    """A chain of convolutions whose every output is concatenated, then squeezed and excited."""

    def __init__(self, config: StageConfig, in_channels: int, lab: bool) -> None:
        super().__init__()
        layer = LightConv if config.light else ConvBNAct
        mid, out = config.mid_channels, config.out_channels
        widths = [in_channels] + [mid] * config.layers
        self.layers = nn.ModuleList(
            layer(channels, mid, config.kernel_size, lab=lab) for channels in widths[:-1]
        )
        self.aggregation = nn.Sequential(
            ConvBNAct(sum(widths), out // 2, 1, lab=lab), ConvBNAct(out // 2, out, 1, lab=lab)
        )
        # Upstream adds the identity in all blocks of a stage but the first, whatever its widths.
        self.residual = False

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        y = self.aggregation(torch.cat(outputs, dim=1))
        return y + x if self.residual else y


class HGStage(nn.Module):
    def __init__(self, config: StageConfig, downsample: bool, lab: bool) -> None:
        super().__init__()
        channels = config.in_channels
        if downsample:
            self.downsample = ConvBNAct(channels, channels, 3, 2, groups=channels, act=False)
        else:
            self.downsample = nn.Identity()
        self.blocks = nn.Sequential()
        for index in range(config.blocks):
            block = HGBlock(config, channels, lab)
            block.residual = index > 0
            self.blocks.append(block)
            channels = config.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


@BACKBONE_REGISTRY.register()
class HGNetv2(ConvBackbone):
    """PP-HGNetV2.

    Args:
        name: "B0", "B2", "B4" or "B5"; "L" and "X" are RT-DETR's names of the last two.
        use_lab: a learnable affine map after every ReLU.
        freeze_at: parts that are not trained: -1 none, 0 the stem, n the stem and n stages.
        freeze_norm: replace every batch norm by its frozen form.
        out_features: names among ``stage1`` ... ``stage4`` (strides 4 ... 32).
    """

    stage_names = ("stage1", "stage2", "stage3", "stage4")

    @configurable
    def __init__(
        self,
        *,
        name: str,
        use_lab: bool = False,
        freeze_at: int = -1,
        freeze_norm: bool = False,
        out_features: tuple[str, ...] = ("stage2", "stage3", "stage4"),
    ) -> None:
        super().__init__()
        check_choice("name", name, ARCHITECTURES)
        stem, stages = ARCHITECTURES[name]
        if name in ("L", "X"):
            file = f"PPHGNetV2_{name}_ssld_pretrained_from_paddle.pth of RT-DETR's releases"
        else:
            file = f"PPHGNetV2_{name}_stage1.pth of D-FINE's releases"
        self.pretrained_file = file
        self.set_features(out_features, [stage.out_channels for stage in stages])
        self.stem = Stem(*stem, use_lab)
        self.stages = nn.ModuleList(
            HGStage(config, index > 0, use_lab) for index, config in enumerate(stages)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.freeze([self.stem, *self.stages], freeze_at, freeze_norm)

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        return arguments(cls, cfg, "MODEL.HGNETV2")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"stage2": (B, C, H / 8, W / 8), ...} for the chosen features."""
        self.check_start()
        return self.run_stages(self.stem(x), self.stages)

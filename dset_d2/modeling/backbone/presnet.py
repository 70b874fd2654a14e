"""PResNet: the ResNet-vd of RT-DETR (https://arxiv.org/abs/2304.08069)."""

from collections import OrderedDict

import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from ...arguments import arguments
from ..layers import ConvNorm, check_choice
from .base import ConvBackbone

# Of RT-DETR's releases, trained on ImageNet.
PRETRAINED_FILES = {
    18: "ResNet18_vd_pretrained_from_paddle.pth",
    34: "ResNet34_vd_pretrained_from_paddle.pth",
    50: "ResNet50_vd_ssld_v2_pretrained_from_paddle.pth",
    101: "ResNet101_vd_ssld_pretrained_from_paddle.pth",
}
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The vd shortcut: average pooling takes over the stride from the 1x1 convolution."""
    conv = ConvNorm(in_channels, out_channels, 1)
    if stride == 1:
        return conv
    pool = nn.AvgPool2d(2, 2, ceil_mode=True)
    return nn.Sequential(OrderedDict(pool=pool, conv=conv))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        if first:
            self.short = shortcut(in_channels, width, stride)
        else:
            self.short = nn.Identity()
        self.branch2a = ConvNorm(in_channels, width, 3, stride, act="relu")
        self.branch2b = ConvNorm(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch2b(self.branch2a(x)) + self.short(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        out_channels = width * self.expansion
        if first:
            self.short = shortcut(in_channels, out_channels, stride)
        else:
            self.short = nn.Identity()
        self.branch2a = ConvNorm(in_channels, width, 1, act="relu")
        self.branch2b = ConvNorm(width, width, 3, stride, act="relu")
        self.branch2c = ConvNorm(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch2c(self.branch2b(self.branch2a(x))) + self.short(x))


class Stage(nn.Module):
    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        in_channels: int,
        width: int,
        count: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential()
        for index in range(count):
            self.blocks.append(block(in_channels, width, stride if index == 0 else 1, index == 0))
            in_channels = width * block.expansion

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@BACKBONE_REGISTRY.register()
class PResNet(ConvBackbone):
    """ResNet-vd with a deep stem.

    Args:
        depth: 18, 34, 50 or 101.
        freeze_at: parts that are not trained: -1 none, 0 the stem, n the stem and n stages.
        freeze_norm: replace every batch norm by its frozen form.
        out_features: names among ``res2`` ... ``res5`` (strides 4 ... 32).
    """

    stage_names = ("res2", "res3", "res4", "res5")

    @configurable
    def __init__(
        self,
        *,
        depth: int,
        freeze_at: int = -1,
        freeze_norm: bool = False,
        out_features: tuple[str, ...] = ("res3", "res4", "res5"),
    ) -> None:
        super().__init__()
        check_choice("depth", depth, BLOCKS)
        self.pretrained_file = f"{PRETRAINED_FILES[depth]} of RT-DETR's releases"
        stem = {
            "conv1_1": ConvNorm(3, 32, 3, 2, act="relu"),
            "conv1_2": ConvNorm(32, 32, 3, act="relu"),
            "conv1_3": ConvNorm(32, 64, 3, act="relu"),
        }
        self.conv1 = nn.Sequential(OrderedDict(stem))
        block = Bottleneck if depth >= 50 else BasicBlock
        self.res_layers = nn.ModuleList()
        widths = [64, 128, 256, 512]
        channels = 64
        for index, (width, count) in enumerate(zip(widths, BLOCKS[depth])):
            self.res_layers.append(Stage(block, channels, width, count, 1 if index == 0 else 2))
            channels = width * block.expansion
        self.set_features(out_features, [width * block.expansion for width in widths])
        self.freeze([self.conv1, *self.res_layers], freeze_at, freeze_norm)

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        return arguments(cls, cfg, "MODEL.PRESNET")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"res3": (B, C, H / 8, W / 8), ...} for the chosen features."""
        self.check_start()
        x = F.max_pool2d(self.conv1(x), 3, stride=2, padding=1)
        return self.run_stages(x, self.res_layers)

"""Convolutional blocks of the cross-scale feature fusion."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ConvNorm, activation


class RepVggBlock(nn.Module):
    """3x3 and 1x1 convolutions side by side, summed (no identity branch)."""

    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2 = ConvNorm(channels, channels, 1)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv1(x) + self.conv2(x))

    @torch.no_grad()
    def fuse(self) -> ConvNorm:
        """For inference: the first branch, whose 3x3 convolution takes in the other."""
        one, pointwise = self.conv1.fuse(), self.conv2.fuse()
        one.conv.weight += F.pad(pointwise.conv.weight, [1] * 4)
        one.conv.bias += pointwise.conv.bias
        one.act = self.act
        return one.fuse()


class CSPRepLayer(nn.Module):
    """Cross-stage partial layer of RepVGG blocks; its two paths are summed.

    (B, in_channels, H, W) -> (B, out_channels, H, W)
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, expansion: float, act: str
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.conv1 = ConvNorm(in_channels, hidden, 1, act=act)
        self.conv2 = ConvNorm(in_channels, hidden, 1, act=act)
        self.bottlenecks = nn.Sequential(*(RepVggBlock(hidden, act) for _ in range(num_blocks)))
        if hidden == out_channels:
            self.conv3 = nn.Identity()
        else:
            self.conv3 = ConvNorm(hidden, out_channels, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.bottlenecks(self.conv1(x)) + self.conv2(x))


class RepNCSPELAN4(nn.Module):
    """D-FINE's GELAN block: half of the channels runs through two CSP layers in a row, and what
    each of them returns is concatenated.

    (B, in_channels, H, W) -> (B, out_channels, H, W)
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, expansion: float, act: str
    ) -> None:
        super().__init__()
        branch = round(expansion * out_channels // 2)
        self.cv1 = ConvNorm(in_channels, 2 * out_channels, 1, act=act)
        self.cv2 = self.branch(out_channels, branch, num_blocks, act)
        self.cv3 = self.branch(branch, branch, num_blocks, act)
        self.cv4 = ConvNorm(2 * out_channels + 2 * branch, out_channels, 1, act=act)

    @staticmethod
    def branch(in_channels: int, out_channels: int, num_blocks: int, act: str) -> nn.Sequential:
        return nn.Sequential(
            CSPRepLayer(in_channels, out_channels, num_blocks, 1.0, act),
            ConvNorm(out_channels, out_channels, 3, act=act),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        first = self.cv2(x.chunk(2, dim=1)[1])
        return self.cv4(torch.cat([x, first, self.cv3(first)], dim=1))


class SCDown(nn.Module):
    """1x1, then depthwise 3x3 convolution of stride 2; (B, C, H, W) -> (B, C, H / 2, W / 2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels, 1)
        self.cv2 = ConvNorm(channels, channels, 3, 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv2(self.cv1(x))

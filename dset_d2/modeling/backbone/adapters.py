"""Adapters, which make three scales of a ViT's one: a plain one of a few convolutions, and DEIMv2's
spatial tuning adapter (https://arxiv.org/abs/2509.20787), which adds detail from the image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import check_choice, convolution, folded

PATCH = 16  # pixels per side of what a token stands for
LEVELS = ("p3", "p4", "p5")  # strides 8, 16, 32


def resize(x: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """(B, C, H, W) -> (B, C, *size)."""
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode=mode)


class PlainAdapter(nn.Module):
    """Three scales of the last tokens: 1x1 and upsampling, 1x1, 3x3 of stride 2.

    Args:
        in_channels: width of the ViT.
        out_channels: width of all levels.
        layer_norm: normalise the tokens once more before.
        upsampling: "bilinear" or "nearest".
    """

    maps = (1, 2, 3)  # how many of the ViT's maps it takes; it reads the last one

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layer_norm: bool = False,
        upsampling: str = "bilinear",
    ) -> None:
        super().__init__()
        check_choice("upsampling", upsampling, ("bilinear", "nearest"))
        self.upsampling = upsampling
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.norm = nn.LayerNorm(in_channels) if layer_norm else nn.Identity()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(in_channels, out_channels, 1),
                nn.Conv2d(in_channels, out_channels, 1),
                nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1),
            ]
        )

    def forward(self, image: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """As :meth:`SpatialTuningAdapter.forward`; of the image only the size is looked at."""
        x = resize(maps[-1], (image.shape[2] // PATCH, image.shape[3] // PATCH))
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        fine, middle, coarse = (conv(x) for conv in self.convs)
        # A 1x1 convolution and upsampling commute; in this order they cost a quarter.
        size = tuple(2 * side for side in x.shape[2:])
        return [resize(fine, size, self.upsampling), middle, coarse]


class DetailBranch(nn.Module):
    """A small convolutional network beside the ViT: (B, 3, H, W) -> 2c, 4c and 4c channels at
    strides 8, 16 and 32, not activated."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def step(in_channels: int, out_channels: int) -> list[nn.Module]:
            conv = convolution(in_channels, out_channels, 3, stride=2)
            return [conv, nn.BatchNorm2d(out_channels)]

        c = channels
        self.stem = nn.Sequential(*step(3, c), nn.GELU(), nn.MaxPool2d(3, stride=2, padding=1))
        self.conv2 = nn.Sequential(*step(c, 2 * c))
        self.conv3 = nn.Sequential(nn.GELU(), *step(2 * c, 4 * c))
        self.conv4 = nn.Sequential(nn.GELU(), *step(4 * c, 4 * c))

    def forward(self, image: Tensor) -> list[Tensor]:
        fine = self.conv2(self.stem(image))
        middle = self.conv3(fine)
        return [fine, middle, self.conv4(middle)]


class SpatialTuningAdapter(nn.Module):
    """DEIMv2's STA: each level joins a map of the ViT with detail of the image.

    Args:
        in_channels: width of the ViT.
        out_channels: width of all levels.
        conv_channels: width c of the detail branch's first layer.
    """

    maps = (1, 3)  # one for all levels, or one for each

    def __init__(self, in_channels: int, out_channels: int, conv_channels: int = 16) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.sta = DetailBranch(conv_channels)
        self.convs = nn.ModuleList(
            convolution(in_channels + factor * conv_channels, out_channels, 1)
            for factor in (2, 4, 4)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in LEVELS)

    def forward(self, image: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """Features at strides 8, 16, 32, whose sides are rounded up.

        Args:
            image: (B, 3, H, W); H and W divisible by 16.
            maps: (B, in_channels, h, w) of the ViT, shallowest first; H / 16 and W / 16, or less
                if it sees a smaller image.
        """
        details = self.sta(image)
        if len(maps) == 1:
            maps = maps * len(details)
        joined = (
            torch.cat([resize(x, detail.shape[2:]), detail], dim=1)
            for x, detail in zip(maps, details)
        )
        return [norm(conv(x)) for x, conv, norm in zip(joined, self.convs, self.norms)]

    def fuse(self) -> "SpatialTuningAdapter":
        """For inference: the norms within the convolutions."""
        self.convs = nn.ModuleList(map(folded, self.convs, self.norms))
        self.norms = nn.ModuleList(nn.Identity() for _ in self.convs)
        return self


ADAPTERS = {"plain": PlainAdapter, "sta": SpatialTuningAdapter}

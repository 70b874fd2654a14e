"""DINOv3's ViT (https://arxiv.org/abs/2508.10104) as a backbone, on timm.

A ViT has one scale; an adapter makes three of it: a plain one of a few convolutions, or DEIMv2's
spatial tuning adapter (https://arxiv.org/abs/2509.20787), which adds detail from the image.
"""

import logging

import timm
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..freezing import FreezeConfig, hold, zero_gradients
from ..layers import check_choice
from ..lora import LoRAConfig, add_lora, is_lora
from ..sparse.schedule import Scheduled

logger = logging.getLogger(__name__)

PATCH = 16
LEVELS = ("p3", "p4", "p5")  # strides 8, 16, 32

OFFICIAL = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
OFFICIAL_FILES = {
    "small": "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
    "small_plus": "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
    "base": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
    "large": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
    "huge_plus": "dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth",
}


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class PlainAdapter(nn.Module):
    """Three scales of the last tokens: 1x1 and upsampling, 1x1, 3x3 of stride 2.

    Args:
        in_channels: width of the ViT.
        out_channels: width of all levels.
        layer_norm: normalise the tokens once more before.
    """

    maps = (1, 2, 3)  # how many of the ViT's maps it takes; it reads the last one

    def __init__(self, in_channels: int, out_channels: int, layer_norm: bool = False) -> None:
        super().__init__()
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
        """As :meth:`SpatialTuningAdapter.forward`; the image is not looked at."""
        x = self.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        fine, middle, coarse = (conv(x) for conv in self.convs)
        # A 1x1 convolution and upsampling commute; in this order they cost a quarter.
        return [resize(fine, tuple(2 * side for side in x.shape[2:])), middle, coarse]


class DetailBranch(nn.Module):
    """A small convolutional network beside the ViT: (B, 3, H, W) -> 2c, 4c and 4c channels at
    strides 8, 16 and 32, not activated."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def step(in_channels: int, out_channels: int) -> list[nn.Module]:
            conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
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
            nn.Conv2d(in_channels + factor * conv_channels, out_channels, 1, bias=False)
            for factor in (2, 4, 4)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in LEVELS)

    def forward(self, image: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """Features at strides 8, 16, 32, whose sides are rounded up.

        Args:
            image: (B, 3, H, W); H and W divisible by 16.
            maps: (B, in_channels, H / 16, W / 16) of the ViT, shallowest first.
        """
        details = self.sta(image)
        if len(maps) == 1:
            maps = maps * len(details)
        joined = (
            torch.cat([resize(x, detail.shape[2:]), detail], dim=1)
            for x, detail in zip(maps, details)
        )
        return [norm(conv(x)) for x, conv, norm in zip(joined, self.convs, self.norms)]


ADAPTERS = {"plain": PlainAdapter, "sta": SpatialTuningAdapter}


@BACKBONE_REGISTRY.register()
class DINOv3(Backbone, Scheduled):
    """A DINOv3 ViT and an adapter: ``p3``, ``p4``, ``p5`` at strides 8, 16, 32.

    The input is normalised by ImageNet's mean and standard deviation. Images of one shape that
    the detector pads to multiples of 32 show their padding to the ViT as they do to a
    convolutional backbone; what the backbone pads itself (to 16) as well.

    The training step decides what is trained (see ``freeze``); the detector sets it. Without a
    detector the ViT stays frozen, and so it does until the first step.

    Args:
        adapter: makes the three levels of the ViT's maps.
        name: timm's name of the ViT; its weights are random until a checkpoint is loaded.
        taps: blocks, by index, after which maps are taken (through the final norm), shallowest
            first. Blocks above the last tap are not built.
        vit: timm's arguments that differ from the named ViT's (``drop_path_rate``, ``depth``).
        freeze: what is trained of the ViT, and when; None trains all of it from the start.
        lora: adapts the ViT's attention; trained from the start, whatever is frozen.
        gradient_checkpointing: compute the blocks that are trained twice instead of keeping
            their activations.
    """

    @configurable
    def __init__(
        self,
        *,
        adapter: nn.Module,
        name: str = "vit_small_patch16_dinov3_qkvb",
        taps: tuple[int, ...] = (5, 8, 11),
        vit: dict | None = None,
        freeze: FreezeConfig | None = None,
        lora: LoRAConfig | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_choice("name", name, timm.list_models("vit_*_patch16_dinov3*"))
        self.name = name
        self.dinov3 = timm.create_model(
            name, pretrained=False, num_classes=0, dynamic_img_size=True, **dict(vit or {})
        )
        depth = len(self.dinov3.blocks)
        self.taps = list(taps)
        if not taps or self.taps != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < depth:
            raise ValueError(f"taps={self.taps} must rise and lie in 0..{depth - 1}")
        if adapter.in_channels != self.dinov3.embed_dim:
            raise ValueError(
                f"in_channels={adapter.in_channels} of the adapter must be the ViT's "
                f"{self.dinov3.embed_dim}"
            )
        if len(taps) not in adapter.maps:
            raise ValueError(f"taps={self.taps}: their number must be one of {adapter.maps}")
        self.dinov3.blocks = self.dinov3.blocks[: taps[-1] + 1]
        self.adapter = adapter
        self.gradient_checkpointing = gradient_checkpointing
        self.warned = False
        self._out_features = list(LEVELS)
        self._out_feature_channels = {level: adapter.out_channels for level in LEVELS}
        self._out_feature_strides = dict(zip(LEVELS, (8, 16, 32)))

        self.freeze = freeze
        blocks = self.dinov3.blocks
        self.first_lora = len(blocks) if lora is None else add_lora(blocks, lora)
        if freeze is not None:
            self.freeze_parameters()

    def freeze_parameters(self) -> None:
        """Leave to training what ``freeze`` unfreezes at some step, and low-rank updates."""
        later = {id(parameter) for parameter in self.held_parameters()}
        for name, parameter in self.dinov3.named_parameters():
            parameter.requires_grad = id(parameter) in later or is_lora(name)

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        node = cfg.MODEL.DINOV3
        check_choice("MODEL.DINOV3.ADAPTER", node.ADAPTER, ADAPTERS)
        freeze = None
        if node.FREEZE:
            step = node.UNFREEZE_STEP
            freeze = FreezeConfig(None if step < 0 else step, node.UNFREEZE_BLOCKS)
        return {
            "adapter": ADAPTERS[node.ADAPTER](node.EMBED_DIM, node.OUT_CHANNELS),
            "name": node.NAME,
            "taps": tuple(node.TAPS),
            "freeze": freeze,
            "lora": LoRAConfig(node.LORA_RANK, node.LORA_ALPHA) if node.LORA_RANK else None,
            "gradient_checkpointing": node.GRADIENT_CHECKPOINTING,
        }

    @property
    def size_divisibility(self) -> int:
        return 32

    @property
    def weights_hint(self) -> str:
        """Where the ViT's weights are to be had, for the error that no file is there."""
        size = self.name.removeprefix("vit_").split("_patch16")[0]
        hint = f"model.safetensors of https://huggingface.co/timm/{self.name}.lvd1689m"
        if size in OFFICIAL_FILES:
            hint = f"{OFFICIAL_FILES[size]} of {OFFICIAL} or {hint}"
        return f"download {hint} (under Meta's DINOv3 licence) and save it here, its ending kept"

    # What is trained at the present step.

    @property
    def unfrozen(self) -> bool:
        """Whether the last blocks are trained now."""
        if self.freeze is None:
            return True
        start = self.freeze.unfreeze_step
        return start is not None and self.step is not None and self.step > start

    def unfreezing_parts(self) -> list[nn.Module]:
        """The blocks and the norm that are trained from some step on."""
        if self.freeze is None or self.freeze.unfreeze_step is None:
            return []
        blocks, count = self.dinov3.blocks, self.freeze.unfreeze_blocks
        if count > len(blocks):
            raise ValueError(f"unfreeze_blocks={count} exceeds the {len(blocks)} blocks")
        return [*blocks[len(blocks) - count :], self.dinov3.norm]

    def held_parameters(self) -> list[nn.Parameter]:
        """Their parameters, but for low-rank updates, which are never held."""
        parts = self.unfreezing_parts()
        return [p for part in parts for name, p in part.named_parameters() if not is_lora(name)]

    def train(self, mode: bool = True) -> "DINOv3":
        """Frozen blocks stay in evaluation mode: drop path would be noise that nothing learns."""
        super().train(mode)
        if self.freeze is not None:
            self.dinov3.eval()
            for part in self.unfreezing_parts():
                part.train(mode and self.unfrozen)
        return self

    def begin_step(self) -> None:
        """Follow the training step."""
        for part in self.unfreezing_parts():
            part.train(self.unfrozen)
        hold(self.held_parameters(), not self.unfrozen)
        if self.freeze is not None and not self.warned:
            self.warned = True
            if self.is_fresh():
                logger.warning("The ViT is frozen with random weights: %s", self.weights_hint)

    def is_fresh(self) -> bool:
        """Whether no weights were loaded: the layer scales are still what they start from."""
        block = self.dinov3.blocks[0]
        return bool((block.gamma_1 == block.init_values).all())

    def first_trained(self) -> int:
        """Index of the first block that gradients flow through; -1 if they go beyond."""
        if self.freeze is None or not self.training:
            return -1
        count = self.freeze.unfreeze_blocks if self.unfrozen else 0
        return min(len(self.dinov3.blocks) - count, self.first_lora)

    # The forward pass.

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"p3": (B, C, H / 8, W / 8), ...}; odd sides are rounded up."""
        if self.training:
            self.begin_step()
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % PATCH, 0, -height % PATCH))
        return dict(zip(LEVELS, self.adapter(x, self.maps(x))))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The ViT's maps (B, embed_dim, H / 16, W / 16) after each tap."""
        vit, first, gradients = self.dinov3, self.first_trained(), torch.is_grad_enabled()
        prefix = vit.num_prefix_tokens
        with torch.set_grad_enabled(gradients and first < 0):
            tokens, rope, shape = self.embed(x)
        maps = []
        for index, block in enumerate(vit.blocks):
            with torch.set_grad_enabled(gradients and index >= first):
                tokens = self.run(block, tokens, rope)
            if index in self.taps:
                with torch.set_grad_enabled(gradients and (self.unfrozen or index >= first)):
                    patches = vit.norm(tokens[:, prefix:])
                maps.append(patches.transpose(1, 2).unflatten(2, shape))
        if self.training and not self.unfrozen:
            maps[-1] = zero_gradients(maps[-1], self.held_parameters())
        return maps

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Tokens (B, prefix + h * w, embed_dim), their rotations (h * w, 2 * head_dim), (h, w)."""
        vit = self.dinov3
        patches = vit.patch_embed(x)  # (B, h, w, embed_dim)
        shape = tuple(patches.shape[1:3])
        prefix = torch.cat([vit.cls_token, vit.reg_token], dim=1).expand(len(x), -1, -1)
        tokens = torch.cat([prefix, patches.flatten(1, 2)], dim=1)
        return vit.norm_pre(vit.pos_drop(tokens)), vit.rope.get_embed(shape=shape), shape

    def run(self, block: nn.Module, tokens: Tensor, rope: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, tokens, rope, use_reentrant=False)
        return block(tokens, rope)

"""DINOv3's ViT (https://arxiv.org/abs/2508.10104) as a backbone, on timm, with an adapter for the
three scales that a detector wants."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import BACKBONE_REGISTRY
from omegaconf import ListConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...arguments import arguments, build
from ..context import Part, checkpoint_contexts, current, forward_context
from ..ffn import find_ffn
from ..freezing import FreezeConfig, Phases, zero_gradients
from ..layers import activation_name, check_choice
from ..lora import LoRAConfig, add_lora
from ..sparse import MoE, MoEConfig, TokenPruner, ViTPruningConfig, moe_layers
from ..tokens import TokenMap, mean_and_deviation
from .adapters import ADAPTERS, LEVELS, PATCH
from .base import PretrainedBackbone
from .layouts import Layout, WindowConfig, pruned_layout, whole_layout, windowed_layout

OFFICIAL = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
OFFICIAL_FILES = {
    "small": "dinov3_vits16_pretrain_lvd1689m-08c60483.pth",
    "small_plus": "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
    "base": "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth",
    "large": "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth",
    "huge_plus": "dinov3_vith16plus_pretrain_lvd1689m-7c1da9a5.pth",
}


class Progress(NamedTuple):
    """How far the ViT has come with its images.

    Attributes:
        tokens: what the blocks have made of those of ``layout``.
        rope, where: of all patches of the images.
        maps: (B, embed_dim, H / 16, W / 16) of the taps so far.
    """

    tokens: Tensor
    layout: Layout
    rope: Tensor
    where: TokenMap
    maps: list[Tensor]


class FirstBlock(NamedTuple):
    """Images behind the ViT's first block, which no knob changes.

    Attributes:
        image: (B, 3, H, W), padded as the adapter sees it.
        features: (B, 2 * embed_dim) means and standard deviations of the patch tokens.
    """

    image: Tensor
    progress: Progress
    features: Tensor


@BACKBONE_REGISTRY.register()
class DINOv3(Part, PretrainedBackbone):
    """A DINOv3 ViT and an adapter: ``p3``, ``p4``, ``p5`` at strides 8, 16, 32.

    The input is normalised by ImageNet's mean and standard deviation. Images of one shape that
    the detector pads to multiples of 32 show their padding to the ViT as they do to a
    convolutional backbone; what the backbone pads itself (to 16) as well.

    The training step of the forward's context decides what is trained (see ``freeze``); without a
    detector the ViT stays frozen.

    The knob ``vit_blocks`` skips blocks, in an order of its own (:meth:`skipping_order`). The knob
    ``top_k`` leaves the experts of the first block alone.

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
        pruning: places in the ViT where tokens are pruned. The scorers are trained in all phases:
            by the boxes, and through their gates as far as gradients flow through the ViT.
        moe: replaces the FFNs of some blocks by mixtures of experts.
        windows: attention within windows; not with what prunes or routes.
        scale: of the image that the ViT sees, the adapter sees it whole; its sides are rounded to
            whole patches (and windows).
    """

    kind = "vit"

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
        pruning: Sequence[ViTPruningConfig] = (),
        moe: MoEConfig | None = None,
        windows: WindowConfig | None = None,
        scale: float = 1.0,
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
        self._out_features = list(LEVELS)
        self._out_feature_channels = {level: adapter.out_channels for level in LEVELS}
        self._out_feature_strides = dict(zip(LEVELS, (8, 16, 32)))

        blocks = self.dinov3.blocks
        self.windows, self.scale = windows, scale
        if isinstance(pruning, ListConfig):  # which makes DictConfigs of its dataclasses
            pruning = cast(list, OmegaConf.to_object(pruning))
        self.check_sparsity(pruning, moe, freeze)
        kept = range(len(blocks)) if windows is None else windows.global_blocks
        self.windowed_blocks = set(range(len(blocks))) - set(kept)
        self.pruners = nn.ModuleDict(
            {str(config.block): TokenPruner(config, self.dinov3.embed_dim) for config in pruning}
        )
        add_experts(blocks, moe)
        first_lora = len(blocks) if lora is None else add_lora(blocks, lora)
        self.phases = Phases(self.dinov3, freeze, first_lora)
        self.fine_tuned = freeze is not None

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        node, freeze, lora, moe, windows = cfg.MODEL.DINOV3, None, None, None, None
        check_choice("MODEL.DINOV3.ADAPTER.NAME", node.ADAPTER.NAME, ADAPTERS)
        if node.FREEZE.ENABLED:
            freeze = build(FreezeConfig, cfg, "MODEL.DINOV3.FREEZE")
        if node.LORA.RANK:
            lora = build(LoRAConfig, cfg, "MODEL.DINOV3.LORA")
        if node.MOE.NUM_EXPERTS:
            moe = build(MoEConfig, cfg, "MODEL.DINOV3.MOE")
        if node.WINDOWS.ENABLED:
            windows = build(WindowConfig, cfg, "MODEL.DINOV3.WINDOWS")
        return arguments(cls, cfg, "MODEL.DINOV3") | {
            "adapter": build(ADAPTERS[node.ADAPTER.NAME], cfg, "MODEL.DINOV3.ADAPTER"),
            "vit": dict(node.VIT),
            "freeze": freeze,
            "lora": lora,
            "pruning": pruning_places(node.PRUNING),
            "moe": moe,
            "windows": windows,
        }

    def check_sparsity(
        self,
        pruning: Sequence[ViTPruningConfig],
        moe: MoEConfig | None,
        freeze: FreezeConfig | None,
    ) -> None:
        """Raise a ValueError for settings that do not fit the ViT or each other."""
        depth, places = len(self.dinov3.blocks), [config.block for config in pruning]
        if len(set(places)) < len(places) or not all(0 <= place < depth for place in places):
            raise ValueError(
                f"pruning: block={places} must differ from each other and lie in 0..{depth - 1}"
            )
        for config in pruning:
            taught = config.scorer == "attention" or config.foreground_weight
            if freeze is not None and not taught:
                raise ValueError(
                    f"foreground_weight={config.foreground_weight} of pruning must be positive: "
                    "boxes alone teach the scorer of a frozen ViT"
                )
        replaced = [i for i, config in enumerate(moe_layers(moe, depth)) if config is not None]
        if freeze is not None:
            trained = depth - len(freeze.block_steps())
            if frozen := [index for index in replaced if index < trained]:
                raise ValueError(
                    f"layers of moe: the blocks {frozen} are never trained, see freeze; take some "
                    f"of {list(range(trained, depth))}"
                )
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale={self.scale} must lie in (0, 1]")
        if self.windows is None:
            return
        if pruning or moe is not None:
            raise ValueError("windows go with neither pruning nor moe")
        wrong = [index for index in self.windows.global_blocks if not 0 <= index < depth]
        if wrong:
            raise ValueError(f"global_blocks={wrong} of windows must lie in 0..{depth - 1}")

    @property
    def divisors(self) -> tuple[int, int]:
        """What must divide the height and width of the image that the ViT sees."""
        windows = self.windows or WindowConfig(1, 1)
        return PATCH * windows.rows, PATCH * windows.columns

    @property
    def size_divisibility(self) -> int:
        return math.lcm(32, *self.divisors)

    @property
    def pretrained_file(self) -> str:  # type: ignore[override]
        size = self.name.removeprefix("vit_").split("_patch16")[0]
        files = f"model.safetensors of https://huggingface.co/timm/{self.name}.lvd1689m"
        if size in OFFICIAL_FILES:
            files = f"{OFFICIAL_FILES[size]} of {OFFICIAL} or {files}"
        return f"{files} (under Meta's DINOv3 licence)"

    @property
    def weights_hint(self) -> str:
        """Where the ViT's weights are to be had, for the error that no file is there."""
        return f"download {self.pretrained_file} and save it here, its ending kept"

    def train(self, mode: bool = True) -> "DINOv3":
        """A ViT that is frozen, if only at first, stays in evaluation mode until a step trains it:
        drop path would be noise that nothing learns."""
        super().train(mode)
        if self.phases.config is not None:
            self.dinov3.eval()
        return self

    def is_fresh(self) -> bool:
        """Whether no weights were loaded: the layer scales are still what they start from."""
        block = self.dinov3.blocks[0]
        return bool((block.gamma_1 == block.init_values).all())

    # The forward pass.

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"p3": (B, C, H / 8, W / 8), ...}; odd sides are rounded up."""
        x = self.padded(x)
        return dict(zip(LEVELS, self.adapter(x, self.maps(self.scaled(x)))))

    def padded(self, x: Tensor) -> Tensor:
        """The image with whole patches, and windows."""
        self.check_start()
        height, width = x.shape[2:]
        down, across = self.divisors
        return F.pad(x, (0, -width % across, 0, -height % down))

    def scaled(self, x: Tensor) -> Tensor:
        """The image as the ViT sees it."""
        if self.scale == 1:
            return x
        sides = zip(x.shape[2:], self.divisors)
        height, width = (max(1, round(int(side) * self.scale / d)) * d for side, d in sides)
        size = height, width
        return F.interpolate(x, size, mode="bilinear", antialias=True)

    def begin(self, x: Tensor) -> FirstBlock:
        """What no knob changes of :meth:`forward`: the embedding and the first block.

        Raises:
            ValueError: if tokens are pruned in front of the first block.
        """
        if "0" in self.pruners:
            raise ValueError("pruning: block=0 leaves no first block that all settings share")
        x = self.padded(x)
        progress = self.start(self.scaled(x))
        patches = progress.layout.whole(progress.tokens)[:, self.dinov3.num_prefix_tokens :]
        valid = replace(progress.where, prefix=0).valid
        return FirstBlock(x, progress, mean_and_deviation(patches, valid))

    def finish(self, begun: FirstBlock) -> dict[str, Tensor]:
        """The rest of :meth:`forward`, by the knobs of the present context."""
        return dict(zip(LEVELS, self.adapter(begun.image, self.go_on(begun.progress))))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The ViT's maps (B, embed_dim, H / 16, W / 16) after each tap."""
        return self.go_on(self.start(x))

    def start(self, x: Tensor) -> Progress:
        """The embedding and the first block."""
        first = self.begin_step()[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and first < 0):
            tokens, rope, shape = self.embed(x)
        where = TokenMap(shape, current().padding, prefix=self.dinov3.num_prefix_tokens)
        progress = Progress(tokens, whole_layout(tokens, rope, where), rope, where, [])
        # The notes' first block runs with all experts per token that it is configured to.
        with forward_context(knobs=replace(current().knobs, top_k=None)):
            return self.run_blocks(progress, range(1))

    def go_on(self, progress: Progress) -> list[Tensor]:
        """The blocks behind the first that the knob ``vit_blocks`` leaves; all taps' maps."""
        blocks = self.dinov3.blocks
        skipped = self.skipped_blocks()
        maps = self.run_blocks(progress, range(1, len(blocks)), skipped).maps
        if self.training:
            unused = [p for index in skipped for p in blocks[index].parameters() if p.requires_grad]
            maps[-1] = zero_gradients(maps[-1], self.phases.dormant_parameters())
            maps[-1] = zero_gradients(maps[-1], unused, always=True)
        return maps

    def run_blocks(
        self, progress: Progress, indices: range, skipped: Collection[int] = ()
    ) -> Progress:
        """Some blocks, in order, and what the taps behind them take."""
        vit, gradients = self.dinov3, torch.is_grad_enabled()
        first, unfrozen = self.begin_step()
        tokens, layout, rope, where, maps = progress
        for index in indices:
            if self.begins_layout(index):
                layout = self.lay_out(index, layout.whole(tokens), rope, where)
                tokens = layout.tokens
            if index in skipped:
                continue
            trained = gradients and index >= first
            with torch.set_grad_enabled(trained), forward_context(tokens=layout.where):
                tokens = self.run(vit.blocks[index], tokens, layout.rope)
            if index in self.taps:
                with torch.set_grad_enabled(gradients and (unfrozen or index >= first)):
                    patches = vit.norm(layout.whole(tokens)[:, vit.num_prefix_tokens :])
                maps = [*maps, patches.transpose(1, 2).unflatten(2, where.shape)]
        return Progress(tokens, layout, rope, where, maps)

    # Blocks that are skipped.

    def skipping_order(self) -> list[int]:
        """The blocks that may be skipped, by index, in the order in which they go.

        The first block stays, since decisions are made from what it puts out, and those at the
        taps, so that the same block makes a map in all settings. Of what lies between, the longest
        run of blocks gives up one, of equal ones the deepest, so that all maps lose alike; and of
        a run the deepest, as deep blocks change tokens least. A setting thus runs a part of the
        blocks of any larger one, and shares with it what these learn.
        """
        starts = [1, *(tap + 1 for tap in self.taps[:-1])]
        runs = [list(range(start, tap)) for start, tap in zip(starts, self.taps)]
        order = []
        while longest := max(reversed(runs), key=len):
            order.append(longest.pop())
        return order

    def skipped_blocks(self) -> list[int]:
        """Those that this call skips.

        Raises:
            ValueError: if more are to be skipped than may be.
        """
        order, depth = self.skipping_order(), len(self.dinov3.blocks)
        count = current().knobs.vit_blocks or depth
        if depth - count > len(order):
            raise ValueError(
                f"vit_blocks={count} must be at least {depth - len(order)}: the first block and "
                f"those at the taps {self.taps} stay"
            )
        return order[: depth - count]

    def knob_limits(self) -> dict[str, float]:
        return {"vit_blocks": len(self.dinov3.blocks)} if self.skipping_order() else {}

    def begins_layout(self, index: int) -> bool:
        """Whether a block works on other tokens than the one in front of it."""
        windowed = self.windowed_blocks
        return str(index) in self.pruners or (index in windowed) != (index - 1 in windowed)

    def lay_out(self, index: int, tokens: Tensor, rope: Tensor, where: TokenMap) -> Layout:
        """What a block and those behind it work on, of all tokens (B, prefix + h * w, C)."""
        if str(index) in self.pruners:
            block = self.dinov3.blocks[index]
            return pruned_layout(self.pruners[str(index)], block, tokens, rope, where)
        if index in self.windowed_blocks:
            return windowed_layout(self.windows, tokens, rope, where)
        return whole_layout(tokens, rope, where)

    def begin_step(self) -> tuple[int, bool]:
        """The first block that is trained at the present step, and whether the norm is."""
        if not self.training:
            return -1, True
        step = current().step
        self.phases.begin_step(step)
        return self.phases.first_trained(step), self.phases.unfrozen(step)

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
            return checkpoint(
                block, tokens, rope, use_reentrant=False, context_fn=checkpoint_contexts
            )
        return block(tokens, rope)


def pruning_places(places: Sequence[dict]) -> list[ViTPruningConfig]:
    """Those of ``MODEL.DINOV3.PRUNING``."""
    try:
        return [ViTPruningConfig(**place) for place in places]
    except (TypeError, ValueError) as error:
        raise ValueError(f"MODEL.DINOV3.PRUNING: {error}") from error


def add_experts(blocks: Sequence[nn.Module], config: MoEConfig | None) -> None:
    """Put mixtures of experts in the place of blocks' FFNs.

    Raises:
        ValueError: if a block has none of two layers.
    """
    for index, (block, experts) in enumerate(zip(blocks, moe_layers(config, len(blocks)))):
        if experts is None:
            continue
        seam = find_ffn(block)
        if seam is None:
            raise ValueError(f"layers of moe: block {index} has a gated FFN, not one of two layers")
        hidden, dim = seam.linear1.weight.shape
        seam.replace(MoE(experts, dim, hidden, activation_name(seam.activation), seam.dropout))

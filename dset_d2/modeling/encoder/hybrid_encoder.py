"""Hybrid encoder of RT-DETR: attention within the coarsest scale (AIFI), convolutions across
scales (CCFF). https://arxiv.org/abs/2304.08069, section 4.2. D-FINE's has other convolutions."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ...arguments import arguments, build
from ..context import forward_context
from ..layers import ConvNorm, check_choice, constant, projection
from ..registry import ENCODER_REGISTRY
from ..sparse import MoEConfig, PruningConfig, TokenPruner, make_ffn, moe_layers
from ..tokens import Padding, TokenMap, as_tokens, prune, restore
from .base import Encoded
from .fusion_blocks import CSPRepLayer, RepNCSPELAN4, SCDown


@constant
def position_embedding(
    height: int, width: int, dim: int, temperature: float, device: torch.device
) -> Tensor:
    """2-D sine-cosine positions, (1, height * width, dim), row-major like the tokens.

    Upstream lays the grid out column-major, which on squares only swaps the roles of the two
    axes. Here the first half of the channels encodes the row, so that squares get upstream's
    numbers and rectangles get the right ones.
    """
    omega = temperature ** (-torch.arange(dim // 4, device=device, dtype=torch.float32) / (dim / 4))
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float32),
        torch.arange(width, device=device, dtype=torch.float32),
        indexing="ij",
    )
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)[None]


class TransformerEncoderLayer(nn.Module):
    """Post-norm self-attention layer; positions are added to queries and keys only."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dim_feedforward: int,
        dropout: float,
        act: str,
        moe: MoEConfig | None = None,
    ) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.ffn = make_ffn(dim, dim_feedforward, act, dropout, moe)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, N, dim) tokens and (1 or B, N, dim) positions -> (B, N, dim).

        Args:
            padding: (B, N) bool, True where a token is padding and must not be attended to.
        """
        query = x + position
        attended, _ = self.self_attn(query, query, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.dropout1(attended))
        return self.norm2(x + self.dropout2(self.ffn(x)))


class TransformerEncoder(nn.Module):
    """A stack of encoder layers over one scale, of whose tokens some may be pruned."""

    def __init__(self, layers: list[nn.Module], pruner: TokenPruner | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.pruner = pruner

    def forward(self, x: Tensor, position: Tensor, where: TokenMap) -> tuple[Tensor, Tensor | None]:
        """(B, H * W, dim) tokens and (1, H * W, dim) positions of a whole map.

        Returns:
            (B, H * W, dim), and (B, H * W) bool of the tokens that no decoder shall read: those
            that were pruned behind the layers; None if there are none.
        """
        if self.pruner is None:
            return self.run(x, position, where), None
        after = self.pruner.config.placement == "after"
        output = self.run(x, position, where) if after else x
        index, gate = self.pruner(output, where)
        output = prune(output, index)
        if gate is not None:
            output = output * gate
        if not after:
            output = self.run(output, prune(position, index), where.prune(index))
        full = x if self.pruner.config.restore == "bypass" else torch.zeros_like(x)
        dropped = None
        if after and index is not None:
            # 0, not False: scatter's value cannot be a bool in a trace.
            dropped = torch.ones_like(x[..., 0], dtype=torch.bool).scatter(1, index, 0)
        return restore(full, index, output), dropped

    def run(self, x: Tensor, position: Tensor, where: TokenMap) -> Tensor:
        valid = where.valid
        padding = None if valid is None else ~valid
        with forward_context(tokens=where):
            for layer in self.layers:
                x = layer(x, position, padding)
        return x


@ENCODER_REGISTRY.register()
class HybridEncoder(nn.Module):
    """AIFI on chosen scales, then a top-down and a bottom-up fusion path.

    Args:
        in_channels: channels of the backbone's features, finest first.
        in_features: names of the backbone's features, finest first.
        hidden_dim: channels of all outputs; divisible by 4 and by ``num_heads``.
        use_encoder_idx: indices of the scales that get a transformer.
        num_encoder_layers: transformer layers on each of them.
        fusion: "csp_rep" (RT-DETR) or "gelan" (D-FINE), the convolutions across scales.
        expansion, depth_mult: width and depth of the fusion blocks.
        moe: replaces the transformer layers' FFNs by mixtures of experts ("patch MoE").
        pruning: prunes tokens of the scales that get a transformer.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: tuple[int, ...],
        in_features: tuple[str, ...],
        hidden_dim: int = 256,
        num_heads: int = 8,
        dim_feedforward: int = 1024,
        dropout: float = 0.0,
        enc_act: str = "gelu",
        use_encoder_idx: tuple[int, ...] = (2,),
        num_encoder_layers: int = 1,
        pe_temperature: float = 10000.0,
        fusion: str = "csp_rep",
        expansion: float = 1.0,
        depth_mult: float = 1.0,
        act: str = "silu",
        moe: MoEConfig | None = None,
        pruning: PruningConfig | None = None,
    ) -> None:
        super().__init__()
        check_choice("fusion", fusion, ("csp_rep", "gelan"))
        if len(in_features) != len(in_channels):
            raise ValueError(
                f"in_features={list(in_features)} and in_channels={list(in_channels)} "
                "must have the same length"
            )
        if hidden_dim % 4 or hidden_dim % num_heads:
            raise ValueError(
                f"hidden_dim={hidden_dim} must be divisible by 4 and by num_heads={num_heads}"
            )
        if not all(0 <= index < len(in_channels) for index in use_encoder_idx):
            raise ValueError(
                f"use_encoder_idx={list(use_encoder_idx)} must lie in 0..{len(in_channels) - 1}"
            )
        if pruning is not None and pruning.scorer != "learned":
            raise ValueError(f"scorer={pruning.scorer!r} of pruning needs a ViT's class token")
        self.in_features = list(in_features)
        self.hidden_dim = hidden_dim
        self.use_encoder_idx = list(use_encoder_idx)
        self.pe_temperature = pe_temperature
        self.input_proj = nn.ModuleList(projection(c, hidden_dim) for c in in_channels)
        self.encoder = nn.ModuleList()
        for _ in use_encoder_idx:
            layers = [
                TransformerEncoderLayer(
                    hidden_dim, num_heads, dim_feedforward, dropout, enc_act, experts
                )
                for experts in moe_layers(moe, num_encoder_layers)
            ]
            pruner = None if pruning is None else TokenPruner(pruning, hidden_dim)
            self.encoder.append(TransformerEncoder(layers, pruner))
        self.lateral_convs = nn.ModuleList()
        self.fpn_blocks = nn.ModuleList()
        self.downsample_convs = nn.ModuleList()
        self.pan_blocks = nn.ModuleList()
        num_blocks = round(3 * depth_mult)
        for _ in in_channels[1:]:
            if fusion == "gelan":
                block = RepNCSPELAN4
                self.lateral_convs.append(ConvNorm(hidden_dim, hidden_dim, 1))
                self.downsample_convs.append(nn.Sequential(SCDown(hidden_dim)))
            else:
                block = CSPRepLayer
                self.lateral_convs.append(ConvNorm(hidden_dim, hidden_dim, 1, act=act))
                self.downsample_convs.append(ConvNorm(hidden_dim, hidden_dim, 3, 2, act=act))
            for blocks in (self.fpn_blocks, self.pan_blocks):
                blocks.append(block(hidden_dim * 2, hidden_dim, num_blocks, expansion, act))

    @classmethod
    def from_config(cls, cfg, input_shape) -> dict:
        node, moe, pruning = cfg.MODEL.ENCODER, None, None
        if node.MOE.NUM_EXPERTS:
            moe = build(MoEConfig, cfg, "MODEL.ENCODER.MOE")
        if node.PRUNING.KEEP_RATIO not in (0, 1):
            pruning = build(PruningConfig, cfg, "MODEL.ENCODER.PRUNING")
        levels = len(input_shape)
        return arguments(cls, cfg, "MODEL.ENCODER") | {
            "use_encoder_idx": [i + levels if i < 0 else i for i in node.USE_ENCODER_IDX],
            "in_channels": [shape.channels for shape in input_shape.values()],
            "in_features": list(input_shape),
            "moe": moe,
            "pruning": pruning,
        }

    def forward(self, features: list[Tensor], padding: Padding | None = None) -> Encoded:
        """Features, finest first, (B, C_i, H_i, W_i) -> as many of (B, hidden_dim, H_i, W_i)."""
        features = [project(x) for project, x in zip(self.input_proj, features)]
        dropped: list[Tensor | None] = [None] * len(features)
        for index, encoder in zip(self.use_encoder_idx, self.encoder):
            features[index], dropped[index] = self.intra_scale(encoder, features[index], padding)
        return Encoded(self.cross_scale(features), padding, dropped)

    def intra_scale(
        self, encoder: TransformerEncoder, feature: Tensor, padding: Padding | None
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention among the tokens of one scale (AIFI); see its ``forward``."""
        height, width = feature.shape[2:]
        position = position_embedding(
            height, width, self.hidden_dim, self.pe_temperature, feature.device
        )
        where = TokenMap((height, width), padding)
        tokens, dropped = encoder(as_tokens(feature), position, where)
        return tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous(), dropped

    def cross_scale(self, features: list[Tensor]) -> list[Tensor]:
        """Top-down, then bottom-up fusion (CCFF)."""
        top_down = [features[-1]]  # finest first
        for lateral, block, finer in zip(self.lateral_convs, self.fpn_blocks, features[-2::-1]):
            # The lateral output also replaces the feature that the bottom-up path will read.
            top_down[0] = lateral(top_down[0])
            upsampled = F.interpolate(top_down[0], size=finer.shape[2:], mode="nearest")
            top_down.insert(0, block(torch.cat([upsampled, finer], dim=1)))
        outputs = top_down[:1]
        for down, block, inner in zip(self.downsample_convs, self.pan_blocks, top_down[1:]):
            outputs.append(block(torch.cat([down(outputs[-1]), inner], dim=1)))
        return outputs

"""Hybrid encoder of RT-DETR: attention within the coarsest scale (AIFI), convolutions across
scales (CCFF). https://arxiv.org/abs/2304.08069, section 4.2. D-FINE's has other convolutions."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..layers import (
    ConvNorm,
    activation,
    check_choice,
    constant,
    gather_tokens,
    projection,
    valid_tokens,
)
from ..sparse import MoE, MoEConfig, PruningConfig, TokenPruner, moe_layers
from .build import ENCODER_REGISTRY
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
        self.moe = None
        if moe is not None:
            self.moe = MoE(moe, dim, dim_feedforward, act)
        else:
            self.linear1 = nn.Linear(dim, dim_feedforward)
            self.dropout = nn.Dropout(dropout)
            self.linear2 = nn.Linear(dim_feedforward, dim)
            self.activation = activation(act)
            nn.init.xavier_uniform_(self.linear1.weight)
            nn.init.xavier_uniform_(self.linear2.weight)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def ffn(self, x: Tensor, padding: Tensor | None) -> Tensor:
        if self.moe is not None:
            return self.moe(x, None if padding is None else ~padding)
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def forward(self, x: Tensor, position: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, N, dim) tokens and (1 or B, N, dim) positions -> (B, N, dim).

        Args:
            padding: (B, N) bool, True where a token is padding and must not be attended to.
        """
        query = x + position
        attended, _ = self.self_attn(query, query, x, key_padding_mask=padding, need_weights=False)
        x = self.norm1(x + self.dropout1(attended))
        return self.norm2(x + self.dropout2(self.ffn(x, padding)))


class TransformerEncoder(nn.Module):
    """A stack of encoder layers over one scale, of whose tokens some may be pruned."""

    def __init__(self, layers: list[nn.Module], pruner: TokenPruner | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.pruner = pruner
        # (B, H * W) bool of the last forward: pruned behind the layers; None: no token.
        self.dropped: Tensor | None = None

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        shape: tuple[int, int],
        valid_ratio: Tensor | None = None,
    ) -> Tensor:
        """(B, H * W, dim) tokens and (1, H * W, dim) positions -> (B, H * W, dim).

        Args:
            shape: (H, W).
            valid_ratio: (B, 2) share of W and H that each image fills, None if all of it.
        """
        valid = None if valid_ratio is None else valid_tokens(valid_ratio, *shape)
        self.dropped = None
        if self.pruner is None:
            return self.run(x, position, valid)
        after = self.pruner.config.placement == "after"
        output = self.run(x, position, valid) if after else x
        index, gate = self.pruner(output, shape, valid, valid_ratio)
        if index is not None:
            output = gather_tokens(output, index)
        if gate is not None:
            output = output * gate
        if not after and index is None:
            output = self.run(output, position, valid)
        elif not after:
            position = gather_tokens(position.expand(len(x), -1, -1), index)
            valid = None if valid is None else valid.gather(1, index)
            output = self.run(output, position, valid)
        if index is None:
            return output
        if after:
            # 0, not False: scatter's value cannot be a bool in a trace.
            self.dropped = torch.ones_like(x[..., 0], dtype=torch.bool).scatter(1, index, 0)
        pruned = x if self.pruner.config.restore == "bypass" else torch.zeros_like(x)
        return pruned.scatter(1, index[..., None].expand_as(output), output.to(x.dtype))

    def run(self, x: Tensor, position: Tensor, valid: Tensor | None) -> Tensor:
        padding = None if valid is None else ~valid
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
        self.in_features = list(in_features)
        self.hidden_dim = hidden_dim
        self.use_encoder_idx = list(use_encoder_idx)
        self.pe_temperature = pe_temperature
        self.input_proj = nn.ModuleList(projection(c, hidden_dim) for c in in_channels)
        # Of the last forward, per scale: (B, H * W) bool of tokens that no decoder shall read.
        self.dropped: list[Tensor | None] = [None] * len(in_channels)
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
        node = cfg.MODEL.ENCODER
        return {
            "in_channels": [shape.channels for shape in input_shape.values()],
            "in_features": list(input_shape),
            "hidden_dim": node.HIDDEN_DIM,
            "num_heads": node.NUM_HEADS,
            "dim_feedforward": node.DIM_FEEDFORWARD,
            "dropout": node.DROPOUT,
            "use_encoder_idx": [len(input_shape) - 1],
            "num_encoder_layers": node.NUM_LAYERS,
            "fusion": node.FUSION,
            "expansion": node.EXPANSION,
            "depth_mult": node.DEPTH_MULT,
        }

    def forward(self, features: list[Tensor], valid_ratio: Tensor | None = None) -> list[Tensor]:
        """Features, finest first, (B, C_i, H_i, W_i) -> as many of (B, hidden_dim, H_i, W_i).

        Args:
            valid_ratio: (B, 2) share of the padded width and height that each image fills;
                None if no image is padded.
        """
        features = [project(x) for project, x in zip(self.input_proj, features)]
        for index, encoder in zip(self.use_encoder_idx, self.encoder):
            features[index] = self.intra_scale(encoder, features[index], valid_ratio)
            self.dropped[index] = encoder.dropped
        return self.cross_scale(features)

    def intra_scale(
        self, encoder: nn.Module, feature: Tensor, valid_ratio: Tensor | None
    ) -> Tensor:
        """Self-attention among the tokens of one scale (AIFI)."""
        height, width = feature.shape[2:]
        position = position_embedding(
            height, width, self.hidden_dim, self.pe_temperature, feature.device
        )
        tokens = feature.flatten(2).transpose(1, 2)
        tokens = encoder(tokens, position, (height, width), valid_ratio)
        return tokens.transpose(1, 2).unflatten(2, (height, width)).contiguous()

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

"""What stands in for parts of a network of ``transformers`` during one forward."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .context import forward_context
from .sparse import PruningConfig, TokenPruner
from .tokens import Padding, TokenLevels, TokenMap, prune, restore


def replaced(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A shallow copy of a module with others in the place of some parts, by their names.

    All else is the module's own, which stays as it is: other threads may run it meanwhile.
    """
    for name, part in parts.items():
        child, _, inner = name.partition(".")
        if inner:
            part = replaced(module.get_submodule(child), {inner: part})
        module = copy.copy(module)
        module._modules = module._modules | {child: part}
    return module


class Known(nn.Module):
    """Stands in for a part of a network whose result is known."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, *_, **__) -> Any:
        return self.result


class MapEncoder(nn.Module):
    """Stands in for the library's encoder, whose layers then know on which cells of the image's
    maps their tokens stand, and run on those that are kept.

    The kept ones alone ask deformable attention, are fused with the text and go through FFNs; what
    they sample are all tokens, of which the pruned ones stay what they were in front of the
    encoder and are back in place behind it.

    Args:
        encoder: the library's.
        pruners: one for each level of its maps; none keep all tokens.
        padding: which of the images is image; None: all.
    """

    def __init__(
        self, encoder: nn.Module, pruners: Sequence[TokenPruner], padding: Padding | None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.pruners = pruners
        self.padding = padding

    def forward(
        self,
        vision_features: Tensor,
        vision_attention_mask: Tensor,
        vision_position_embedding: Tensor,
        spatial_shapes_list: list[tuple[int, int]],
        valid_ratios: Tensor,
        **others: Any,
    ) -> Any:
        """As the library's; the image's tokens (B, N, D) are of all levels, finest first."""
        full = tokens = vision_features
        where = TokenLevels(tuple(TokenMap(shape, self.padding) for shape in spatial_shapes_list))
        places = self.encoder.get_reference_points(
            spatial_shapes_list, valid_ratios, device=full.device
        )
        index = None
        if len(self.pruners):
            index, gate, where = self.choose(tokens, where)
            tokens = prune(tokens, index)
            if gate is not None:
                tokens = tokens * gate
            if index is not None:
                places = prune(places.flatten(2), index).unflatten(2, places.shape[2:])
            if self.pruners[0].config.restore == "zero":
                full = torch.zeros_like(full)
        layers: dict[str, nn.Module] = {}
        for number, layer in enumerate(self.encoder.layers):
            deformable = layer.deformable_layer
            if index is not None:
                values = WholeValues(deformable.self_attn, full, index, ~vision_attention_mask)
                deformable = replaced(deformable, {"self_attn": values})
            layers[f"layers.{number}.deformable_layer"] = OnMaps(deformable, where)
        encoder = replaced(self.encoder, layers)
        encoder.get_reference_points = lambda *_, **__: places
        outputs = encoder(
            vision_features=tokens,
            vision_attention_mask=prune(vision_attention_mask, index),
            vision_position_embedding=prune(vision_position_embedding, index),
            spatial_shapes_list=spatial_shapes_list,
            valid_ratios=valid_ratios,
            **others,
        )
        tokens = restore(full, index, outputs.last_hidden_state_vision)
        outputs.last_hidden_state_vision = tokens
        return outputs

    def choose(
        self, tokens: Tensor, where: TokenLevels
    ) -> tuple[Tensor | None, Tensor | None, TokenLevels]:
        """Indices and gates of the kept tokens of all levels, see :class:`TokenPruner`, and where
        these stand."""
        levels = tokens.split([math.prod(x.shape) for x in where.maps], dim=1)
        chosen = [pruner(*x) for pruner, *x in zip(self.pruners, levels, where.maps)]
        kept = TokenLevels(tuple(x.prune(index) for x, (index, _) in zip(where.maps, chosen)))
        gates = [gate for _, gate in chosen if gate is not None]
        gate = torch.cat(gates, 1) if gates else None
        if all(index is None for index, _ in chosen):
            return None, gate, kept
        indices, first = [], 0
        for level, (index, _) in zip(levels, chosen):
            if index is None:
                index = torch.arange(level.shape[1], device=tokens.device).expand(len(tokens), -1)
            indices.append(index + first)
            first += level.shape[1]
        return torch.cat(indices, 1), gate, kept


class OnMaps(nn.Module):
    """A deformable layer whose experts know where its tokens stand."""

    def __init__(self, layer: nn.Module, where: TokenLevels) -> None:
        super().__init__()
        self.layer = layer
        self.where = where

    def forward(self, **arguments: Any) -> Any:
        with forward_context(tokens=self.where):
            return self.layer(**arguments)


class WholeValues(nn.Module):
    """A deformable attention whose queries are the kept tokens (B, K, D) and whose values are all.

    Args:
        full: (B, N, D) what the pruned ones are.
        index: (B, K) of the kept ones.
        valid: (B, N) bool, what is image.
    """

    def __init__(self, attention: nn.Module, full: Tensor, index: Tensor, valid: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.full, self.index, self.valid = full, index, valid

    def forward(self, hidden_states: Tensor, **others: Any) -> Any:
        others["encoder_hidden_states"] = restore(self.full, self.index, hidden_states)
        others["attention_mask"] = self.valid
        return self.attention(hidden_states=hidden_states, **others)


def check_pruning(config: PruningConfig) -> None:
    """Raise a ``ValueError`` for a pruning that this encoder has no place for."""
    if config.scorer != "learned":
        raise ValueError(f"scorer={config.scorer!r} of pruning needs a ViT's class token")
    if config.placement != "before":
        raise ValueError(f"placement={config.placement!r} of pruning must be 'before' here")

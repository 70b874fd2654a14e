"""What stands in for parts of a network of ``transformers`` during one forward."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sparse import PruningConfig, TokenPruner
from .tokens import Padding, TokenMap, prune, restore


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


class PrunedEncoder(nn.Module):
    """Stands in for the library's encoder, whose layers then run on the image tokens that are kept.

    The kept ones alone ask deformable attention, are fused with the text and go through FFNs; what
    they sample are all tokens, of which the pruned ones stay what they were in front of the
    encoder and are back in place behind it.

    Args:
        encoder: the library's.
        pruners: one for each level of its maps.
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
        index, gate = self.choose(vision_features, spatial_shapes_list)
        tokens = prune(vision_features, index)
        if gate is not None:
            tokens = tokens * gate
        full = vision_features
        if self.pruners[0].config.restore == "zero":
            full = torch.zeros_like(full)
        encoder = self.encoder
        if index is not None:
            places = encoder.get_reference_points(
                spatial_shapes_list, valid_ratios, device=full.device
            )
            places = prune(places.flatten(2), index).unflatten(2, places.shape[2:])
            attentions = {
                name: WholeValues(module, full, index, ~vision_attention_mask)
                for name, module in encoder.named_modules()
                if name.endswith("deformable_layer.self_attn")
            }
            encoder = replaced(encoder, attentions)
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
        self, tokens: Tensor, shapes: list[tuple[int, int]]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Indices and gates of the kept tokens of all levels; see :class:`TokenPruner`."""
        levels = tokens.split([height * width for height, width in shapes], dim=1)
        chosen = [
            pruner(level, TokenMap(shape, self.padding))
            for pruner, level, shape in zip(self.pruners, levels, shapes)
        ]
        gates = [gate for _, gate in chosen if gate is not None]
        gate = torch.cat(gates, 1) if gates else None
        if all(index is None for index, _ in chosen):
            return None, gate
        indices, first = [], 0
        for level, (index, _) in zip(levels, chosen):
            if index is None:
                index = torch.arange(level.shape[1], device=tokens.device).expand(len(tokens), -1)
            indices.append(index + first)
            first += level.shape[1]
        return torch.cat(indices, 1), gate


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

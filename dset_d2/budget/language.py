"""A mixture-of-experts vision-language model under a latency budget.

The network is a ``Qwen3VLMoeForConditionalGeneration`` of ``transformers``. :class:`Qwen3VLMoE`
runs it in two stages, with fewer blocks and fewer experts per token where a call wants that;
:class:`LanguageSubject` is what latency table and controllers see of it. For another library's
model, another class takes the place of the former.

Nothing is changed in the network, not even for the time of a call: a call runs shallow copies of
those modules that shall behave otherwise, so that other threads may use the network meanwhile.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..modeling.grounding_dino import replaced
from .latency_table import fingerprint
from .subject import Setting, grid

if TYPE_CHECKING:
    from transformers import Qwen2VLImageProcessor, Qwen3VLMoeForConditionalGeneration


class Question(NamedTuple):
    """A question about an image, whose answer is one token.

    ``image``: (3, H, W) uint8 RGB. ``prompt``: (T,) tokens, one of which stands for the image.
    """

    image: Tensor
    prompt: Tensor
    answer: int


@dataclass(frozen=True)
class Begun:
    """Questions behind the first text block.

    Attributes:
        hidden: (B, T, D) hidden states.
        given: what each block is called with beside them: positions, mask.
        visual: (B, T) where the tokens of images are.
        deepstack: for the first blocks, each (tokens of images, D), what is added behind it there.
        image_tokens: the tier that the images were read at; None if nobody said.
    """

    hidden: Tensor
    given: Mapping[str, Any]
    visual: Tensor
    deepstack: Sequence[Tensor]
    image_tokens: int | None = None

    @property
    def features(self) -> Tensor:
        """(2 D,) what is known of a single question that ends with the last token."""
        return self.features_at(torch.tensor([self.hidden.shape[1] - 1]))[0]

    def features_at(self, ends: Tensor) -> Tensor:
        """(B, 2 D) float on the CPU: the mean over each image, and the token at each (B,) end."""
        hidden = self.hidden.detach().float()
        visual = self.visual[..., None].to(hidden)
        image = (hidden * visual).sum(1) / visual.sum(1).clamp(min=1)
        return torch.cat([image, hidden[torch.arange(len(ends)), ends]], dim=1).cpu()


class Qwen3VLMoE:
    """Runs a Qwen3-VL-MoE in two stages: up to the end of its first text block, and the rest.

    Skipped blocks are spread evenly. The first and the last are never skipped, nor are those
    behind which visual features are added (deepstack).

    Args:
        model: the network, which stays as it is.
        processor: of its images; None is one with the released models' normalisation.

    Attributes:
        depth: text blocks.
        top_k: experts per token, as configured.
        optional: indices of the blocks that can be skipped.
    """

    def __init__(
        self,
        model: "Qwen3VLMoeForConditionalGeneration",
        processor: "Qwen2VLImageProcessor | None" = None,
    ) -> None:
        from transformers import Qwen2VLImageProcessor, Qwen3VLMoeForConditionalGeneration

        if not isinstance(model, Qwen3VLMoeForConditionalGeneration):
            raise TypeError(
                f"model: {type(model).__name__} is no Qwen3VLMoeForConditionalGeneration"
            )
        self.model = model
        vision, text = model.config.vision_config, model.config.text_config
        self.processor = processor or Qwen2VLImageProcessor(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        self.depth, self.top_k = text.num_hidden_layers, text.num_experts_per_tok
        needed = max(1, len(vision.deepstack_visual_indexes))
        self.optional = range(needed, self.depth - 1)

    def blocks(self, count: int) -> list[int]:
        """Indices of the text blocks that run where ``count`` of them do.

        Raises:
            ValueError: if so few, or so many, cannot run.
        """
        least = self.depth - len(self.optional)
        if not least <= count <= self.depth:
            raise ValueError(f"blocks={count} must lie in {least}..{self.depth}")
        skipped = self.depth - count
        step = len(self.optional) / max(skipped, 1)
        absent = {self.optional[int((i + 0.5) * step)] for i in range(skipped)}
        return [index for index in range(self.depth) if index not in absent]

    # Inputs.

    def image_size(self, image_tokens: int) -> dict[str, int]:
        """The processor's limits of an image's pixels for at most so many tokens."""
        token = (self.processor.patch_size * self.processor.merge_size) ** 2
        return {"shortest_edge": token, "longest_edge": image_tokens * token}

    def count_image_tokens(self, height: int, width: int, image_tokens: int) -> int:
        """Tokens that an image of that size has if it may have at most ``image_tokens``."""
        size = self.image_size(image_tokens)
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        patches = self.processor.get_number_of_image_patches(height, width, limits)
        return patches // self.processor.merge_size**2

    def inputs(self, image: Tensor, prompt: Tensor, image_tokens: int) -> dict[str, Tensor]:
        """What the network takes, a batch of one.

        Args:
            image: (3, H, W) uint8 RGB, of any size; it is scaled down to ``image_tokens``.
            prompt: (T,) tokens, one of which stands for the image.

        Raises:
            ValueError: if not exactly one does.
        """
        size = self.image_size(image_tokens)
        read = self.processor(images=[image], size=size, return_tensors="pt")
        token = self.model.config.image_token_id
        places = (prompt == token).nonzero().flatten().tolist()
        if len(places) != 1:
            raise ValueError(f"prompt: {len(places)} tokens stand for the image; one must")
        count = int(read["image_grid_thw"].prod()) // self.processor.merge_size**2
        before, after = prompt[: places[0]], prompt[places[0] + 1 :]
        ids = torch.cat([before, prompt.new_full((count,), token), after])[None]
        inputs = {"input_ids": ids, "mm_token_type_ids": (ids == token).int(), **read}
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    # Stages.

    def begin(self, image_tokens: int | None = None, **inputs: Tensor) -> Begun:
        """Run the vision encoder and the first text block, with all its experts per token.

        Args:
            image_tokens: the images' tier, for the record.
            inputs: what the network's ``forward`` takes.
        """
        gathering = Gathering(self.model.model.language_model)
        replaced(self.model.model, {"language_model": gathering})(**inputs, use_cache=False)
        hidden, given = gathering.blocks.called_with
        visual = gathering.visual
        if visual is None:
            visual = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        start = Begun(hidden, given, visual, gathering.deepstack, image_tokens)
        return replace(start, hidden=self.run(start, [0]))

    def run(self, begun: Begun, blocks: Iterable[int], top_k: int | None = None) -> Tensor:
        """(B, T, D) hidden states behind some more blocks, with ``top_k`` experts per token; None
        is as configured."""
        text, hidden = self.model.model.language_model, begun.hidden
        for index in blocks:
            hidden = routed(text.layers[index], top_k)(hidden, **begun.given)
            if index < len(begun.deepstack):
                hidden = hidden.index_put(
                    (begun.visual,), begun.deepstack[index].to(hidden), accumulate=True
                )
        return hidden

    def finish(self, begun: Begun, blocks: int, top_k: int) -> Tensor:
        """(B, T, D) normalised hidden states behind all blocks, of which ``blocks`` run.

        The first one, which has run, counts.

        Raises:
            ValueError: if so few blocks or experts cannot run.
        """
        if not 1 <= top_k <= self.top_k:
            raise ValueError(f"top_k={top_k} must lie in 1..{self.top_k}")
        hidden = self.run(begun, self.blocks(blocks)[1:], top_k)
        return self.model.model.language_model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocabulary) of (..., D) normalised hidden states."""
        return self.model.lm_head(hidden)


class Gathering(nn.Module):
    """Stands in for a text model during one call: runs no block, and keeps what they would get.

    The library merges text with images, and makes positions and mask, in the models around the
    blocks.

    Attributes:
        blocks: in the place of all blocks.
        visual, deepstack: see :class:`Begun`; None and empty without images.
    """

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = text.embed_tokens
        self.blocks = Keeping()
        parts = {"layers": nn.ModuleList([self.blocks]), "norm": nn.Identity()}
        self.text = replaced(text, parts)
        self.visual: Tensor | None = None
        self.deepstack: Sequence[Tensor] = ()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens  # which the library asks its text model for

    def forward(
        self,
        visual_pos_masks: Tensor | None = None,
        deepstack_visual_embeds: Sequence[Tensor] | None = None,
        **inputs: Any,
    ) -> Any:
        self.visual, self.deepstack = visual_pos_masks, deepstack_visual_embeds or ()
        return self.text(**inputs)


class Keeping(nn.Module):
    """Stands in for a block: returns what comes in, and keeps the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.called_with: tuple[Tensor, dict[str, Any]] = (torch.empty(0), {})

    def forward(self, hidden: Tensor, **given: Any) -> Tensor:
        self.called_with = hidden, given
        return hidden


def routed(block: nn.Module, top_k: int | None) -> nn.Module:
    """A block whose tokens go to ``top_k`` experts, their gates normalised; None is as it is.

    A block with a dense FFN is returned as it is.
    """
    gate = getattr(block.mlp, "gate", None)
    if gate is None or top_k in (None, gate.top_k):
        return block
    gate = copy.copy(gate)
    gate.top_k = top_k
    return replaced(block, {"mlp.gate": gate})


class LanguageSubject:
    """Questions about images, answered by a network under a setting of its knobs.

    A setting has ``image_tokens`` (knob 1, the most tokens of the image, which is scaled down
    before the vision encoder), ``top_k`` (knob 2, experts per token behind the first text block)
    and ``blocks`` (knob 3, the text blocks that run).

    Args:
        network: runs it.
        image_tokens, top_k, blocks: the values that can be chosen.

    Attributes:
        settings: all of their combinations, the one that computes most first.

    Raises:
        ValueError: for a value that the network cannot run.
    """

    tier = "image_tokens"

    def __init__(
        self,
        network: Qwen3VLMoE,
        image_tokens: Sequence[int],
        top_k: Sequence[int],
        blocks: Sequence[int],
    ) -> None:
        knobs = {self.tier: image_tokens, "top_k": top_k, "blocks": blocks}
        for name, values in knobs.items():
            if not values or len(set(values)) < len(values) or min(values) < 1:
                raise ValueError(f"{name}={list(values)} must be different numbers of at least 1")
        if max(top_k) > network.top_k:
            raise ValueError(f"top_k={max(top_k)} exceeds the network's {network.top_k}")
        for count in blocks:
            network.blocks(count)
        self.network = network
        self.settings = grid(knobs)

    @property
    def device(self) -> str:
        return str(self.network.model.device)

    def fingerprint(self) -> str:
        """The same for networks of one architecture that run, and read images, in one way."""
        config = self.network.model.config
        kernels = [getattr(config, f"_{part}_implementation", "") for part in ("attn", "experts")]
        reading = self.network.processor.to_json_string()
        return fingerprint(self.network.model, self.network.top_k, *kernels, reading)

    def describe(self) -> dict:
        return {}

    @torch.no_grad()
    def known(self, item: Question) -> Tensor:
        """(D + 1,) float: the mean embedding of the prompt's tokens, and how many there are."""
        prompt = item.prompt.to(self.network.model.device)
        embedded = self.network.model.get_input_embeddings()(prompt).float().mean(0)
        return torch.cat([embedded, embedded.new_tensor([len(prompt)])]).cpu()

    def shape(self, item: Question, setting: Setting) -> str:
        """How many tokens there are."""
        height, width = item.image.shape[-2:]
        image = self.network.count_image_tokens(height, width, int(setting["image_tokens"]))
        return f"{image} image tokens, {len(item.prompt) - 1} of text"

    @torch.no_grad()
    def begin(self, item: Question, setting: Setting) -> Begun:
        """Stage 1, for which only ``image_tokens`` counts."""
        tier = int(setting["image_tokens"])
        inputs = self.network.inputs(item.image, item.prompt, tier)
        return self.network.begin(image_tokens=tier, **inputs)

    @torch.no_grad()
    def finish(self, state: Begun, setting: Setting) -> Tensor:
        """Stage 2: (vocabulary,) logits of the answer.

        Raises:
            ValueError: if stage 1 ran at another ``image_tokens``.
        """
        if state.image_tokens != setting["image_tokens"]:
            raise ValueError(
                f"image_tokens={setting['image_tokens']}: the image was read at "
                f"{state.image_tokens}"
            )
        blocks, top_k = int(setting["blocks"]), int(setting["top_k"])
        hidden = self.network.finish(state, blocks, top_k)
        return self.network.logits(hidden[0, -1])

    def quality(self, output: Tensor, item: Question) -> float:
        """1 if the likeliest token is the answer, else 0."""
        return float(output.argmax().item() == item.answer)

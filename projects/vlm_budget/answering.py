"""A small Qwen3-VL-MoE that answers questions about generated scenes, and its training.

Nothing is fetched: the vocabulary is the words of the questions, the weights start at random.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from dset_d2.budget.language import Begun, Question, Qwen3VLMoE
from dset_d2.synthetic import CATEGORIES, write_dataset
from dset_d2.synthetic.questions import (
    NAMES,
    WORDS,
    Participant,
    TextQuestion,
    ask,
    mirrored,
    read_labels,
)

SPECIAL = ("<pad>", "<image>", "<start>", "<end>")
VOCABULARY = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
PAD, IMAGE, START, END = range(len(SPECIAL))
SHARPNESS = 4.0  # of what an image token names: logits per unit along a word's embedding
# What an image token is taught to name: who covers it, and the side that it is on.
NAMED = [
    VOCABULARY[word] for word in (*(NAMES[category] for category in CATEGORIES), "left", "right")
]


class Size(NamedTuple):
    """How large the network is; ``image`` is the scenes' (height, width) in pixels."""

    width: int
    expert_dim: int
    experts: int
    top_k: int
    depth: int
    vision_width: int
    vision_depth: int
    image: tuple[int, int]


def build_model(size: Size) -> Qwen3VLMoeForConditionalGeneration:
    """A network of random weights, whose text blocks begin as identities."""
    head = 64
    config = Qwen3VLMoeConfig(
        text_config=dict(
            vocab_size=len(VOCABULARY),
            hidden_size=size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=size.width // head,
            num_key_value_heads=max(1, size.width // head // 2),
            head_dim=head,
            moe_intermediate_size=size.expert_dim,
            num_experts=size.experts,
            num_experts_per_tok=size.top_k,
            max_position_embeddings=1024,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[12, 10, 10]),
            use_cache=False,
            pad_token_id=PAD,
        ),
        vision_config=dict(
            depth=size.vision_depth,
            hidden_size=size.vision_width,
            intermediate_size=4 * size.vision_width,
            num_heads=4,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=1,
            out_hidden_size=size.width,
            num_position_embeddings=256,
            deepstack_visual_indexes=list(range(size.vision_depth))[1:3],
        ),
        image_token_id=IMAGE,
        video_token_id=len(VOCABULARY),  # no video ever comes
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=size.width**-0.5)
        for block in model.model.language_model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.experts.down_proj.zero_()
    return model


def encode(text: str) -> list[int]:
    """Tokens of words."""
    return [VOCABULARY[word] for word in text.split()]


# Scenes.


class LabelledImage(NamedTuple):
    """An image file and who is on it."""

    file: Path
    participants: list[Participant]

    def read(self, mirror: bool = False) -> tuple[Tensor, list[Participant]]:
        """(3, H, W) uint8 RGB, and who is on it; ``mirror`` swaps left and right."""
        image = torch.from_numpy(cv2.imread(str(self.file))[..., ::-1].copy()).permute(2, 0, 1)
        if not mirror:
            return image, self.participants
        return image.flip(-1), mirrored(self.participants, image.shape[-1])


def draw_scenes(
    root: Path, counts: Sequence[int], image: tuple[int, int], seed: int
) -> list[list[LabelledImage]]:
    """Scenes in groups of so many; what is drawn already is kept."""
    write_dataset(root, counts[0], sum(counts[1:]), *image, seed=seed)
    side = root / "dair-v2x" / "single-infrastructure-side"
    found = []
    for index in range(sum(counts)):
        file = side / "image" / f"{index:06d}.jpg"
        labels = side / "label" / "camera" / f"{index:06d}.json"
        found.append(LabelledImage(file, read_labels(labels)))
    ends = [sum(counts[: n + 1]) for n in range(len(counts))]
    return [found[end - count : end] for end, count in zip(ends, counts)]


def make_items(scenes: Sequence[LabelledImage], seed: int) -> list[tuple[Question, TextQuestion]]:
    """One question about each scene, in one image and tokens, and in words."""
    rng = random.Random(seed)
    items = []
    for scene in scenes:
        image, participants = scene.read()
        kinds: dict[str, list[TextQuestion]] = {}
        for asked in ask(participants, image.shape[-1], rng):
            kinds.setdefault(asked.kind, []).append(asked)
        if kinds:
            asked = rng.choice(kinds[rng.choice(sorted(kinds))])
            prompt = torch.tensor([START, IMAGE, END, *encode(asked.text)])
            items.append((Question(image, prompt, VOCABULARY[asked.answer]), asked))
    return items


# Training.


class Packed(NamedTuple):
    """Images with several questions each, which see the image and themselves alone.

    ``rows``, ``columns``: (N,) where the questions end. ``answers``: (N,) tokens.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    answers: Tensor

    def to(self, device: torch.device) -> "Packed":
        """Its inputs on a device."""
        return self._replace(inputs={k: value.to(device) for k, value in self.inputs.items()})


def pack(
    network: Qwen3VLMoE,
    images: Sequence[Tensor],
    questions: Sequence[Sequence[TextQuestion]],
    image_tokens: int,
) -> Packed:
    """A batch of images of one size at a tier; a question's logits are those it has alone."""
    size = network.image_size(image_tokens)
    read = network.processor(images=list(images), size=size, return_tensors="pt")
    count = int(read["image_grid_thw"][0].prod()) // network.processor.merge_size**2
    prefix = [START, *[IMAGE] * count, END]
    texts = [[encode(question.text) for question in asked] for asked in questions]
    length = len(prefix) + max(sum(map(len, asked)) for asked in texts)
    alone = torch.tensor([[*prefix, PAD]])  # the pad stands where a question begins
    positions, _ = network.model.model.get_rope_index(
        alone, mm_token_type_ids=(alone == IMAGE).int(), image_grid_thw=read["image_grid_thw"][:1]
    )
    ids = torch.full((len(images), length), PAD)
    ids[:, : len(prefix)] = torch.tensor(prefix)
    position_ids = positions[..., -1:].repeat(1, len(images), length)
    position_ids[..., : len(prefix)] = positions[..., :-1]
    mask = torch.eye(length, dtype=torch.bool).repeat(len(images), 1, 1, 1)
    mask[..., : len(prefix)] = torch.ones(length, length).tril().bool()[:, : len(prefix)]
    rows, columns, answers = [], [], []
    for row, asked in enumerate(texts):
        start = len(prefix)
        for words, question in zip(asked, questions[row]):
            end = start + len(words)
            ids[row, start:end] = torch.tensor(words)
            position_ids[:, row, start:end] += torch.arange(len(words))
            mask[row, 0, start:end, start:end] = torch.ones(len(words), len(words)).tril().bool()
            rows.append(row)
            columns.append(end - 1)
            answers.append(VOCABULARY[question.answer])
            start = end
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **read}
    inputs |= {"position_ids": position_ids, "attention_mask": mask}
    return Packed(inputs, *map(torch.tensor, (rows, columns, answers)))


def answer_packed(network: Qwen3VLMoE, packed: Packed, setting: Mapping) -> Tensor:
    """(N, vocabulary) logits of the answers under a setting."""
    begun = network.begin(**packed.to(network.model.device).inputs)
    return finish_packed(network, begun, packed, setting)


def finish_packed(network: Qwen3VLMoE, begun: Begun, packed: Packed, setting: Mapping) -> Tensor:
    hidden = network.finish(begun, setting["blocks"], setting["top_k"])
    return network.logits(hidden[packed.rows, packed.columns])


def batches(
    scenes: Sequence[LabelledImage], size: int, rng: random.Random
) -> Iterator[list[tuple[Tensor, list[Participant]]]]:
    """Random scenes, half of them mirrored, without end."""
    while True:
        order = rng.sample(range(len(scenes)), len(scenes))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield [scenes[index].read(rng.random() < 0.5) for index in chosen]


def make_optimizer(
    parameters: Sequence[nn.Parameter], rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW; the rate rises over a twentieth of the steps and falls like a cosine."""
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)
    rise = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cells(
    participants: Sequence[Participant], grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """(h * w, 2 C + 2) what the tokens of an image of ``size`` pixels show: for each of C
    categories whether a box covers the token's centre, whether it is left and whether it is right
    of the middle, and for each category whether a box's centre is in the token."""
    count = len(CATEGORIES)
    target = torch.zeros(*grid, 2 * count + 2)
    target[:, : grid[1] // 2, count] = 1
    target[:, -(grid[1] // 2) :, count + 1] = 1
    scale = torch.tensor([grid[1] / size[1], grid[0] / size[0]]).repeat(2)
    for participant in participants:
        if participant.category not in CATEGORIES:
            continue
        category = CATEGORIES.index(participant.category)
        box = torch.tensor(participant.box) * scale
        left, top, right, bottom = (box + 0.5).long().tolist()
        target[top:bottom, left:right, category] = 1
        x, y = ((box[:2] + box[2:]) / 2).long().tolist()
        centre = target[min(y, grid[0] - 1), min(x, grid[1] - 1)]
        centre[[category, count + 2 + category]] = 1
    return target.flatten(0, 1)


def train_vision(
    network: Qwen3VLMoE,
    scenes: Sequence[LabelledImage],
    tiers: Sequence[int],
    steps: int,
    batch: int,
    rate: float,
    rng: random.Random,
) -> float:
    """Teach the vision encoder to name what stands where; returns the last losses' mean.

    Tokens name it by the very embeddings of the words, which questions then find.
    """
    model = network.model.model
    embeddings = network.model.get_input_embeddings().weight
    head = nn.Linear(embeddings.shape[1], len(NAMED) + len(CATEGORIES)).to(embeddings.device)
    nn.init.zeros_(head.weight)
    parameters = [*model.visual.parameters(), *head.parameters()]
    optimizer, schedule = make_optimizer(parameters, rate, steps)
    losses = []
    bar = tqdm(range(steps), desc="vision encoder", mininterval=5)
    for _, chosen in zip(bar, batches(scenes, batch, rng)):
        size = network.image_size(rng.choice(tiers))
        images = [image for image, _ in chosen]
        read = network.processor(images=images, size=size, return_tensors="pt")
        read = read.to(network.model.device)
        merge = network.processor.merge_size
        grid = tuple((read["image_grid_thw"][0, 1:] // merge).tolist())
        targets = torch.cat([cells(p, grid, image.shape[1:]) for image, p in chosen])
        output = model.get_image_features(read["pixel_values"], read["image_grid_thw"])
        features = torch.cat(output.pooler_output)
        names = features @ embeddings[NAMED].detach().T
        logits = head(features) + F.pad(SHARPNESS * names, (0, len(CATEGORIES)))
        losses.append(descend(binary_loss(logits, targets), parameters, optimizer, schedule))
        bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    return sum(losses[-50:]) / len(losses[-50:])


def binary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the (tokens, classes)' classes."""
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none")
    return loss.sum(-1).mean()


def train_answers(
    network: Qwen3VLMoE,
    scenes: Sequence[LabelledImage],
    settings: Sequence[Mapping],
    steps: int,
    shallow: float,
    batch: int,
    rate: float,
    rng: random.Random,
) -> float:
    """Teach the rest to answer, each step under one setting; returns the last accuracies' mean.

    The vision encoder's blocks stay as they were; what hands their features to the text learns.

    Args:
        settings: one of them is drawn, in one of four steps the first, which is the full one.
        shallow: share of the steps, from the first on, that run the fewest blocks that can run;
            blocks that join later begin as identities.
    """
    visual = network.model.model.visual
    for part in (visual.patch_embed, visual.pos_embed, visual.blocks):
        part.requires_grad_(False)
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    optimizer, schedule = make_optimizer(parameters, rate, steps)
    least = network.depth - len(network.optional)
    hits = []
    bar = tqdm(range(steps), desc="answers", mininterval=5)
    for step, chosen in zip(bar, batches(scenes, batch, rng)):
        setting = dict(settings[0] if rng.random() < 0.25 else rng.choice(settings))
        if step < shallow * steps:
            setting["blocks"] = least
        images = [image for image, _ in chosen]
        asked = [ask(p, image.shape[-1], rng) for image, p in chosen]
        packed = pack(network, images, asked, setting["image_tokens"])
        logits = answer_packed(network, packed, setting)
        answers = packed.answers.to(logits.device)
        descend(F.cross_entropy(logits.float(), answers), parameters, optimizer, schedule)
        hits.append((logits.argmax(-1) == answers).float().mean().item())
        bar.set_postfix_str(f"right {sum(hits[-50:]) / len(hits[-50:]):.3f}", refresh=False)
    return sum(hits[-50:]) / len(hits[-50:])


def descend(loss: Tensor, parameters: Sequence[nn.Parameter], optimizer, schedule) -> float:
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()

"""A small Qwen3-VL-MoE that answers questions about generated scenes, and its training.

Nothing is fetched: the vocabulary is the words of the questions, the weights start at random.
"""

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from dset_d2.budget.language import Begun, Question, Qwen3VLMoE
from dset_d2.files import write_atomically
from dset_d2.synthetic import CATEGORIES, camera_seed, frame_seed, render_scene
from dset_d2.synthetic.dataset import VERSION
from dset_d2.synthetic.models import CAR_COLOURS
from dset_d2.synthetic.questions import (
    WORDS,
    Participant,
    TextQuestion,
    ask,
    distance,
    mirrored,
    participants,
)

SPECIAL = ("<pad>", "<image>", "<start>", "<end>")
VOCABULARY = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
PAD, IMAGE, START, END = range(len(SPECIAL))
# What the vision encoder is taught to tell of an image token: who covers it, whose centre it has,
# its cars' colours, the side that it is on, and whether it has the nearest of a category.
SHOWN = (*CATEGORIES, *(f"centre of {c}" for c in CATEGORIES), *CAR_COLOURS, "left", "right")
SHOWN = {name: index for index, name in enumerate((*SHOWN, "nearest"))}


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
            initializer_range=size.width**-0.5,
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
            initializer_range=size.vision_width**-0.5,
        ),
        image_token_id=IMAGE,
        video_token_id=len(VOCABULARY),  # no video ever comes
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.zero_()
        for block in model.model.language_model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.experts.down_proj.zero_()
    return model


def encode(text: str) -> list[int]:
    """Tokens of words."""
    return [VOCABULARY[word] for word in text.split()]


# Scenes.


class LabelledImage(NamedTuple):
    """An image, (3, H, W) uint8 RGB, and who is on it."""

    image: Tensor
    participants: list[Participant]

    def mirrored(self) -> "LabelledImage":
        """With left and right swapped."""
        image = self.image.flip(-1)
        return LabelledImage(image, mirrored(self.participants, image.shape[-1]))


def draw_scenes(
    file: Path, counts: Sequence[int], size: tuple[int, int], seed: int
) -> list[list[LabelledImage]]:
    """Scenes of (height, width) pixels in groups of so many; from the file if it has them.

    Raises:
        ValueError: if it has others.
    """
    wanted = repr((VERSION, sum(counts), size, seed))
    if file.exists():
        content = torch.load(file, weights_only=True)
        if content["drawn"] != wanted:
            raise ValueError(f"{file} has other scenes, {content['drawn']}; move it away")
    else:
        content = {"drawn": wanted, "images": [], "participants": []}
        for index in tqdm(range(sum(counts)), desc="drawing scenes", unit="frame"):
            site = camera_seed(seed, index)
            image, objects = render_scene(frame_seed(seed, index), *size, site)
            content["images"].append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
            content["participants"].append([tuple(one) for one in participants(objects)])
        write_atomically(file, lambda target: torch.save(content, target))
    drawn = (
        LabelledImage(image, [Participant(*one) for one in seen])
        for image, seen in zip(content["images"], content["participants"])
    )
    return [list(islice(drawn, count)) for count in counts]


def make_items(scenes: Sequence[LabelledImage], seed: int) -> list[tuple[Question, TextQuestion]]:
    """One question about each scene, in one image and tokens, and in words."""
    rng = random.Random(seed)
    items = []
    for scene in scenes:
        image, seen = scene
        kinds: dict[str, list[TextQuestion]] = {}
        for asked in ask(seen, image.shape[-1], rng):
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
) -> Iterator[list[LabelledImage]]:
    """Random scenes, half of them mirrored, without end."""
    while True:
        order = rng.sample(range(len(scenes)), len(scenes))
        for start in range(0, len(order) - size + 1, size):
            chosen = [scenes[index] for index in order[start : start + size]]
            yield [scene.mirrored() if rng.random() < 0.5 else scene for scene in chosen]


def make_optimizer(
    parameters: Sequence[nn.Parameter], rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW; the rate rises over a twentieth of the steps and falls like a cosine."""
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)
    rise = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cells(seen: Sequence[Participant], grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(h * w, len(SHOWN)) what the tokens of an image of ``size`` pixels show, 0 or 1."""
    target = torch.zeros(*grid, len(SHOWN))
    target[:, : grid[1] // 2, SHOWN["left"]] = 1
    target[:, -(grid[1] // 2) :, SHOWN["right"]] = 1
    scale = torch.tensor([grid[1] / size[1], grid[0] / size[0]]).repeat(2)
    nearest = {one.category: one for one in sorted(seen, key=distance, reverse=True)}
    for one in seen:
        if one.category not in CATEGORIES:
            continue
        box = torch.tensor(one.box) * scale
        left, top, right, bottom = (box + 0.5).long().tolist()  # of tokens whose centre it covers
        x, y = ((box[:2] + box[2:]) / 2).long().tolist()
        shown = [one.category]
        if one.colour:
            shown.append(one.colour)
        if one is nearest[one.category]:
            shown.append("nearest")
        for name in shown:
            target[top:bottom, left:right, SHOWN[name]] = 1
        for name in (*shown, f"centre of {one.category}"):
            target[min(y, grid[0] - 1), min(x, grid[1] - 1), SHOWN[name]] = 1
    return target.flatten(0, 1)


class Recipe(NamedTuple):
    """How a network is trained.

    ``vision_steps`` teach the vision encoder what its tokens show, then ``answer_steps`` the rest
    to answer. The latter begin, for a share ``shallow`` of them, with the fewest blocks that can
    run; blocks that join later begin as identities. Each step has ``batch`` images.
    """

    vision_steps: int
    answer_steps: int
    shallow: float
    batch: int
    rate: float = 1e-3


def train(
    network: Qwen3VLMoE,
    scenes: Sequence[LabelledImage],
    settings: Sequence[Mapping],
    recipe: Recipe,
    seed: int,
) -> dict:
    """Train a network whose settings, the full one first, shall all answer.

    Returns:
        The minutes that it took, the number of parameters, and means over the last 50 steps: the
        vision encoder's loss and the accuracy of the answers.
    """
    rng, start = random.Random(seed), time.perf_counter()
    network.model.train()
    loss = train_vision(network, scenes, settings, recipe, rng)
    right = train_answers(network, scenes, settings, recipe, rng)
    network.model.eval()
    return {
        "minutes": (time.perf_counter() - start) / 60,
        "parameters": sum(p.numel() for p in network.model.parameters()),
        "vision_loss": loss,
        "training_accuracy": right,
    }


def train_vision(
    network: Qwen3VLMoE,
    scenes: Sequence[LabelledImage],
    settings: Sequence[Mapping],
    recipe: Recipe,
    rng: random.Random,
) -> float:
    """Teach the vision encoder what its tokens show; returns the last losses' mean."""
    model = network.model.model
    head = nn.Linear(model.config.vision_config.out_hidden_size, len(SHOWN))
    nn.init.constant_(head.bias, -3.0)  # most of it is rare
    head.to(network.model.device)
    parameters = [*model.visual.parameters(), *head.parameters()]
    optimizer, schedule = make_optimizer(parameters, recipe.rate, recipe.vision_steps)
    losses = []
    bar = tqdm(range(recipe.vision_steps), desc="vision encoder", mininterval=5)
    for _, chosen in zip(bar, batches(scenes, recipe.batch, rng)):
        size = network.image_size(rng.choice(settings)["image_tokens"])
        read = network.processor(images=[s.image for s in chosen], size=size, return_tensors="pt")
        read = read.to(network.model.device)
        merge = network.processor.merge_size
        grid = tuple((read["image_grid_thw"][0, 1:] // merge).tolist())
        targets = torch.cat([cells(seen, grid, image.shape[1:]) for image, seen in chosen])
        output = model.get_image_features(read["pixel_values"], read["image_grid_thw"])
        logits = head(torch.cat(output.pooler_output))
        # Summed over an image, so that a tier of many tokens counts as much as one of few.
        loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="sum")
        losses.append(descend(loss / recipe.batch, parameters, optimizer, schedule))
        bar.set_postfix_str(f"loss {statistics.fmean(losses[-50:]):.3f}", refresh=False)
    return statistics.fmean(losses[-50:])


def train_answers(
    network: Qwen3VLMoE,
    scenes: Sequence[LabelledImage],
    settings: Sequence[Mapping],
    recipe: Recipe,
    rng: random.Random,
) -> float:
    """Teach the rest to answer, each step under one setting; returns the last accuracies' mean.

    One step in four has the full setting, the first one. The vision encoder's blocks stay as they
    were; what hands their features to the text learns. All kinds of questions weigh the same.
    """
    visual = network.model.model.visual
    for part in (visual.patch_embed, visual.pos_embed, visual.blocks):
        part.requires_grad_(False)
    parameters = [p for p in network.model.parameters() if p.requires_grad]
    optimizer, schedule = make_optimizer(parameters, recipe.rate, recipe.answer_steps)
    least = network.depth - len(network.optional)
    hits = []
    bar = tqdm(range(recipe.answer_steps), desc="answers", mininterval=5)
    for step, chosen in zip(bar, batches(scenes, recipe.batch, rng)):
        setting = dict(settings[0] if rng.random() < 0.25 else rng.choice(settings))
        if step < recipe.shallow * recipe.answer_steps:
            setting["blocks"] = least
        images = [image for image, _ in chosen]
        asked = [ask(seen, image.shape[-1], rng) for image, seen in chosen]
        packed = pack(network, images, asked, setting["image_tokens"])
        logits = answer_packed(network, packed, setting)
        kinds = [question.kind for questions in asked for question in questions]
        often = Counter(kinds)
        weights = torch.tensor([1 / often[kind] / len(often) for kind in kinds]).to(logits)
        answers = packed.answers.to(logits.device)
        losses = F.cross_entropy(logits.float(), answers, reduction="none")
        descend((weights * losses).sum(), parameters, optimizer, schedule)
        hits.append((logits.argmax(-1) == answers).float().mean().item())
        bar.set_postfix_str(f"right {statistics.fmean(hits[-50:]):.3f}", refresh=False)
    return statistics.fmean(hits[-50:])


def descend(loss: Tensor, parameters: Sequence[nn.Parameter], optimizer, schedule) -> float:
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()

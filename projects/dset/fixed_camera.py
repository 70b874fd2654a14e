"""What a fixed camera could save: the patch tokens that change from frame to frame, and the speed
of a detector whose ViT computes only these.

    python projects/dset/fixed_camera.py --output camera.png
    ... --weights weights/dinov3_vits16_pretrain_lvd1689m-08c60483.pth

It follows the patch embeddings of generated frames. A token has changed if |new - old| / |old|
exceeds a threshold, where old is of the frame before, or of a cache that takes the new embedding
whenever it exceeds the threshold. Without --weights the patch embedding is a random projection of
16 x 16 x 3 normalised pixels: it keeps ratios of lengths roughly, but lets the sensor's noise pass
as trained filters would not. So three settings are followed: noise, noise where each 4 x 4 pixels
are averaged before they are compared, and none.

Columns: the share of tokens changed since the frame before; the share refreshed in the cache, its
mean and what nine of ten frames stay below; the share refreshed of the tokens that boxes of moving
objects touch, and what chance would give. The detector is timed in turn with itself where its ViT
computes as many tokens as the cache refreshes on average, and has keys, values and outputs of all
others from before. Comparing, gathering and writing back are timed, the averaging is not. The row
"all" is that code without reuse. Overrides of the config may stand at the end.
"""

import sys
from collections.abc import Iterable
from functools import partial
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabulate import tabulate
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torchvision.ops import box_convert

from dset_d2.analysis import measure
from dset_d2.modeling import DINOv3
from dset_d2.modeling.backbone.adapters import PATCH
from dset_d2.modeling.sparse.pruning import foreground
from dset_d2.synthetic import Scene, render_sequence
from dset_d2.tools import common
from dset_d2.visualization import draw_kept, rendered

# Booleans of N patch tokens in F frames at T thresholds: which changed since the frame before and
# which the cache refreshes, (F, T, N), and which the box of a moved object touches, (F, 1, N).
Trace = tuple[np.ndarray, np.ndarray, np.ndarray]
# With noise or without, and the side of the squares of pixels that are averaged.
NOISE = {"yes": (True, 1), "yes, averaged": (True, 4), "no": (False, 1)}
CONFIG = "projects/dfine_dinov3/configs/dfine_dinov3_s_dair_v2x.py"
COLUMNS = "noise", "threshold", "changed", "refreshed", "p90", "of moving", "by chance"
COLUMNS += ("speed-up, emulated",)


class CachingDINOv3(DINOv3):
    """A DINOv3 for consecutive images of one camera, one at a time.

    Of each it computes the ``refreshed`` patch tokens whose embeddings differ most from the cached
    ones, and the prefix tokens. They attend to all tokens, by cached keys and values. The first
    image fills the cache; None computes all and leaves it alone.
    """

    refreshed: int | None = None
    cache: tuple[Tensor, Tensor, Tensor] | None = None  # embeddings, keys and values, maps

    def maps(self, x: Tensor) -> list[Tensor]:
        if self.refreshed is None:
            return super().maps(x)
        vit, prefix = self.dinov3, self.dinov3.num_prefix_tokens
        tokens, rope, shape = self.embed(x)
        patches = tokens[:, prefix:]
        if self.cache is None:
            heads = vit.blocks[0].attn.num_heads
            size = (len(vit.blocks), 2, 1, heads, tokens.shape[1], tokens.shape[2] // heads)
            maps = patches.new_empty(len(self.taps), *patches.shape)
            self.cache = (patches.clone(), tokens.new_empty(size), maps)
            index = torch.arange(patches.shape[1], device=x.device)
        else:
            change = relative_change(patches, self.cache[0])[0]
            index = change.topk(self.refreshed, sorted=False).indices
        cached, pairs, maps = self.cache
        cached[:, index] = patches[:, index]
        rows = torch.cat([torch.arange(prefix, device=x.device), prefix + index])
        tokens, rope = tokens[:, rows], rope[index]
        for number, block in enumerate(vit.blocks):
            tokens = run_some(block, tokens, rope, rows, *pairs[number])
            if number in self.taps:
                maps[self.taps.index(number)][:, index] = vit.norm(tokens[:, prefix:])
        return [old_and_new.transpose(1, 2).unflatten(2, shape) for old_and_new in maps]


def run_some(
    block: nn.Module, tokens: Tensor, rope: Tensor, rows: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """timm's block on those tokens (1, P + K, C) that are the ``rows`` of all P + N.

    Args:
        rope: (K, 2 * head_dim) rotations of the patch tokens among them.
        keys, values: (1, heads, P + N, head_dim) of all; these rows are replaced in place.
    """
    attn = block.attn
    bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    qkv = F.linear(block.norm1(tokens), attn.qkv.weight, bias)
    q, k, values[:, :, rows] = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    for part in (q, k):
        patches = part[:, :, attn.num_prefix_tokens :]
        patches.copy_(apply_rot_embed_cat(patches, rope, half=attn.rotate_half))
    keys[:, :, rows] = k
    read = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
    tokens = tokens + block.gamma_1 * attn.proj(read)
    return tokens + block.gamma_2 * block.mlp(block.norm2(tokens))


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """(..., N, C) twice -> (..., N)."""
    return (new - old).norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-6)


def as_input(scene: Scene) -> dict:
    return {"image": torch.from_numpy(scene.image).permute(2, 0, 1)}


def follow(model: nn.Module, scenes: Iterable[Scene], side: int, thresholds: list[float]) -> Trace:
    """What changes in the frames of one camera, the first left out.

    Args:
        side: of the squares of pixels that are averaged before.
    """
    limits = torch.tensor(thresholds, device=model.device)[:, None]
    trace, before, places = [], None, set()
    for scene in scenes:
        image = F.avg_pool2d(model.preprocess([as_input(scene)])[0], side)
        tokens, _, shape = model.backbone.embed(F.interpolate(image, scale_factor=side))
        patches = tokens[:, model.backbone.dinov3.num_prefix_tokens :]  # (1, N, C)
        if before is None:
            cached = patches.repeat(len(thresholds), 1, 1)
        else:
            refreshed = relative_change(patches, cached) > limits
            cached = torch.where(refreshed[..., None], patches, cached)
            height, width = scene.image.shape[:2]
            boxes = [item.box for item in scene.objects if item.location not in places]
            boxes = torch.tensor(boxes).view(-1, 4) / torch.tensor([width, height] * 2)
            moving = foreground([{"boxes": box_convert(boxes, "xyxy", "cxcywh")}], shape)
            trace.append((relative_change(patches, before) > limits, refreshed, moving))
        before, places = patches, {item.location for item in scene.objects}
    return tuple(torch.stack(column).cpu().numpy() for column in zip(*trace))


def time_detector(
    model: nn.Module, scenes: list[Scene], counts: list[int], rounds: int
) -> list[str]:
    """Speed-ups by computing so many patch tokens, with their quartiles."""
    inputs = cycle([as_input(scene)] for scene in scenes)

    def detect(refreshed: int | None) -> None:
        model.backbone.refreshed = refreshed
        model(next(inputs))

    calls = {str(place): partial(detect, count) for place, count in enumerate([None, *counts])}
    _, *latencies = measure(calls, rounds, warmup=2).values()
    ratios = [(latency.ratio, *latency.ratio_quartiles) for latency in latencies]
    return [f"{1 / ratio:.2f} ({1 / high:.2f} - {1 / low:.2f})" for ratio, low, high in ratios]


def draw(image: np.ndarray, refreshed: dict[str, np.ndarray], limits: list[float], frame: int):
    """(H, W, 3) uint8: the image, dark where the middle threshold refreshes no token, and curves.

    Args:
        refreshed: (F, T, N) of its camera, one for each of NOISE; it is number ``frame``.
    """
    height, width = image.shape[:2]
    figure = Figure(figsize=(10, 4), dpi=width / 10, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="frame", ylabel="share of tokens refreshed", ylim=(0, 1))
    for (noise, tokens), dashes in zip(refreshed.items(), ("-", "-.", "--")):
        for number, (limit, shares) in enumerate(zip(limits, tokens.mean(-1).T)):
            label = f"{limit:g}, noise: {noise}"
            axes.plot(range(1, len(shares) + 1), shares, dashes, color=f"C{number}", label=label)
    axes.axvline(frame + 1, color="grey", linewidth=0.8)
    axes.legend(ncols=3, fontsize="small")
    kept = refreshed["yes"][frame, len(limits) // 2].nonzero()[0]
    lit = draw_kept(image, (height // PATCH, width // PATCH), kept)
    return np.concatenate([lit, rendered(figure)])


@common.entry_point
@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = common.ConfigToolParser(__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=[544, 960], metavar=("H", "W"))
    parser.add_argument("--frames", type=int, default=10, help="of each; later ones are emptier")
    parser.add_argument("--cameras", type=int, default=16)
    parser.add_argument("--rate", type=float, default=10.0, help="frames per second")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2])
    parser.add_argument("--weights", type=Path, help="of the ViT or the detector; default: random")
    parser.add_argument("--rounds", type=int, default=20, help="of timing")
    parser.add_argument("--output", type=Path, help="picture of the busiest frame, and curves")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(["--config-file", CONFIG, *words])
    numbers = (args.frames - 1, args.cameras, args.rounds, args.rate, *args.size, *args.thresholds)
    if min(numbers) <= 0 or any(side % 32 for side in args.size):
        parser.error("--size must be whole 32s, --frames at least 2, all other numbers positive")
    if args.output:
        common.check_output(args.output, [args.weights or CONFIG])

    torch.manual_seed(0)
    cfg = common.read_config(args.config_file, args.opts)
    cfg.model.backbone._target_ = CachingDINOv3
    model = common.build_model(cfg).eval()
    if args.weights:
        common.load_weights(model, args.weights)
    sequence = partial(render_sequence, height=args.size[0], width=args.size[1], rate=args.rate)
    total = args.size[0] * args.size[1] // PATCH**2
    rows, counts, refreshed = [["", "all", *[""] * 5]], [total], {}
    for name, (noise, side) in NOISE.items():
        cameras = (sequence(seed, args.frames, noise=noise) for seed in range(args.cameras))
        traces = [follow(model, scenes, side, args.thresholds) for scenes in cameras]
        changed, refreshed[name], moving = map(np.concatenate, zip(*traces))
        shares, size = refreshed[name].mean(-1), moving.sum(-1)  # (F, T), (F, 1)
        recall = (refreshed[name] & moving).sum((0, 2)) / size.sum()
        chance = (shares * size).sum(0) / size.sum()
        columns = changed.mean((0, 2)), shares.mean(0), np.quantile(shares, 0.9, 0), recall, chance
        for limit, *values in zip(args.thresholds, *columns):
            rows.append([name, f"{limit:g}", *(f"{value:.3f}" for value in values)])
        counts += np.rint(total * shares.mean(0)).astype(int).tolist()
    for row, speed in zip(rows, time_detector(model, list(sequence(0, 2)), counts, args.rounds)):
        row.append(speed)
    print(
        f"{args.cameras} cameras, {args.frames} frames each at {args.rate:g}/s, {total} patch "
        f"tokens, {moving.mean():.1%} of them touched by what moves; {args.weights or 'random'} "
        f"weights; {common.describe_device(cfg.train.device)}, {args.rounds} rounds"
    )
    print(tabulate(rows, COLUMNS, "github", disable_numparse=True))
    print("Reused keys, values and outputs saw an older scene: what detections lose is not shown.")
    if args.output:
        camera, frame = divmod(int(moving.sum((1, 2)).argmax()), args.frames - 1)
        own = slice(camera * (args.frames - 1), (camera + 1) * (args.frames - 1))
        curves = {name: tokens[own] for name, tokens in refreshed.items()}
        *_, scene = sequence(camera, frame + 2)  # frames are counted from the second
        drawn = draw(scene.image, curves, args.thresholds, frame)
        if not cv2.imwrite(str(args.output), drawn[..., ::-1]):
            raise OSError(f"cannot write {args.output}")


if __name__ == "__main__":
    main()

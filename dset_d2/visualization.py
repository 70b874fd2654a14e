"""Pictures of what the sparse mechanisms do: kept tokens, experts on the image, their load."""

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .modeling.context import Record
from .modeling.sparse import MoERecord, PruningRecord
from .modeling.tokens import TokenMap

PALETTE = (np.array(matplotlib.colormaps["tab10"].colors) * 255).astype(np.uint8)  # one per expert


def upscale(cells: np.ndarray, height: int, width: int, fill=(1.0, 1.0)) -> np.ndarray:
    """(h, w[, C]) per cell -> (height, width[, C]) per pixel, without blending.

    Args:
        fill: share of the map's width and height that is image; the rest is padding.
    """
    size = round(width / fill[0]), round(height / fill[1])
    return cv2.resize(cells, size, interpolation=cv2.INTER_NEAREST)[:height, :width]


def draw_kept(
    image: np.ndarray, shape: tuple[int, int], kept: np.ndarray, fill=(1.0, 1.0)
) -> np.ndarray:
    """Darken the cells of pruned tokens.

    Args:
        image: (H, W, 3) uint8.
        shape: (h, w) of the token map.
        kept: (K,) row-major indices of the kept tokens.
        fill: see :func:`upscale`.
    """
    light = np.full(shape, 0.25, np.float32)
    light.reshape(-1)[kept] = 1.0
    light = upscale(light, *image.shape[:2], fill)[..., None]
    return (image * light).astype(np.uint8)


def draw_experts(
    image: np.ndarray,
    shape: tuple[int, int],
    tokens: np.ndarray,
    experts: np.ndarray,
    fill=(1.0, 1.0),
) -> np.ndarray:
    """Colour every token's cell by the expert with its largest gate.

    Args:
        image: (H, W, 3) uint8.
        shape: (h, w) of the token map.
        tokens: (K,) row-major indices of the tokens that were routed.
        experts: (K,) their experts.
        fill: see :func:`upscale`.
    """
    colours = np.zeros((shape[0] * shape[1], 3), np.uint8)
    colours[tokens] = PALETTE[experts % len(PALETTE)]
    colours = upscale(colours.reshape(*shape, 3), *image.shape[:2], fill)
    routed = colours.any(-1, keepdims=True)
    return np.where(routed, image // 2 + colours // 2, image // 4)


def sparsity_pictures(image: np.ndarray, records: dict[str, Record]) -> dict[str, np.ndarray]:
    """(H, W, 3) pictures by name: what each pruner kept, experts of each layer over a map.

    Args:
        records: what the model left (:func:`dset_d2.modeling.forward_context`) when it ran on the
            one image.
    """
    pictures = {}
    for name, record in records.items():
        place = name.partition("/")[2]
        if isinstance(record, PruningRecord):
            where, kept = record.where, record.kept_cells()[0].nonzero().flatten().cpu().numpy()
            pictures[f"kept_{place}"] = draw_kept(image, where.shape, kept, fill_of(where))
        elif isinstance(record, MoERecord) and record.tokens is not None:
            shape, index = record.tokens.shape, record.tokens.index
            cells = np.arange(shape[0] * shape[1]) if index is None else index[0].cpu().numpy()
            experts = record.routing.experts[:, 0].cpu().numpy()
            fill = fill_of(record.tokens)
            pictures[f"expert_{place}"] = draw_experts(image, shape, cells, experts, fill)
    return pictures


def fill_of(where: TokenMap) -> tuple[float, float]:
    """Share of a map's width and height that the first image fills."""
    return (1.0, 1.0) if where.padding is None else tuple(where.padding.ratio[0].tolist())


def plot_routing(statistics: dict[str, dict[str, Tensor]]) -> Figure:
    """Expert load (top) and co-activation (bottom), one column per MoE layer.

    Args:
        statistics: per layer ``usage`` (E,) and ``coactivation`` (E, E).
    """
    columns = len(statistics)
    size = (2.6 * columns + 0.6, 5.2)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for (name, values), (top, bottom) in zip(statistics.items(), axes.T):
        usage = values["usage"].cpu().numpy()
        experts = np.arange(len(usage))
        top.bar(experts, usage, color=PALETTE[experts % len(PALETTE)] / 255)
        top.axhline(1 / len(usage), color="black", linewidth=0.8, linestyle="--")
        top.set(title=name, xticks=experts, ylim=(0, max(0.5, usage.max() * 1.1)))
        bottom.imshow(values["coactivation"].cpu().numpy(), cmap="viridis", vmin=0)
        bottom.set(xticks=experts, yticks=experts, xlabel="expert")
    axes[0, 0].set_ylabel("share of assignments")
    axes[1, 0].set_ylabel("used together")
    return figure


def rendered(figure: Figure) -> np.ndarray:
    """(H, W, 3) RGB uint8 of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def routing_records(records: dict[str, Record]) -> dict[str, MoERecord]:
    """Those of mixtures of experts, by place."""
    found = ((name.partition("/")[2], record) for name, record in records.items())
    return {place: record for place, record in found if isinstance(record, MoERecord)}


def mean_statistics(records: dict[str, list[MoERecord]]) -> dict[str, dict[str, Tensor]]:
    """Statistics of each layer, averaged over its records of several images."""
    means = {}
    for place, seen in records.items():
        every = [record.statistics() for record in seen]
        means[place] = {key: sum(x[key] for x in every) / len(every) for key in every[0]}
    return means

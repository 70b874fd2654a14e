"""Pictures: boxes with a colour per class, and what the sparse mechanisms do: kept tokens, experts
on the image, their load."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
import torch
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from torchvision.ops import box_convert

from .analysis.experts import what_stands
from .modeling import MetaArch, forward_context
from .modeling.context import Record
from .modeling.meta_arch import original_size
from .modeling.sparse import MoERecord, PruningRecord
from .modeling.tokens import TokenMap

PALETTE = (matplotlib.colormaps["tab10"](np.arange(10))[:, :3] * 255).astype(
    np.uint8
)  # one per expert
GREY = np.full(3, 128, np.uint8)  # of regions to ignore
GOLDEN = 0.618034  # share of the circle of hues between neighbours

Caption = tuple[str, np.ndarray | None]  # a text, and the colour that it explains


def class_colours(count: int) -> np.ndarray:
    """(count, 3) RGB uint8; a class has the same colour in all pictures of a data set."""
    if count <= len(PALETTE):
        return PALETTE[:count]
    index = np.arange(count)
    hsv = [index * GOLDEN % 1, 1 - 0.25 * (index % 3), 1 - 0.2 * (index % 2)]
    return (matplotlib.colors.hsv_to_rgb(np.stack(hsv, 1)) * 255).astype(np.uint8)


def captioned(picture: np.ndarray, captions: Sequence[Caption]) -> np.ndarray:
    """(H, W, 3) uint8 with a white strip below that holds texts, each behind its colour."""
    width = picture.shape[1]
    line = int(np.clip(width / 45, 13, 32))  # pixels
    scale, left = line / 36, line // 3
    strips, x = [], width
    for text, colour in captions:
        mark = 0 if colour is None else line
        needed = mark + cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0] + 2 * left
        if x + needed > width:
            strips.append(np.full((line, width, 3), 255, np.uint8))
            x = left
        if colour is not None:
            strips[-1][line // 5 : -line // 5, x : x + mark - left] = colour
        place = (x + mark, int(0.75 * line))
        cv2.putText(
            strips[-1], text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA
        )
        x += needed
    return np.concatenate([picture, *strips])


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: list[str], colours: np.ndarray
) -> np.ndarray:
    """(H, W, 3) RGB uint8 with (n, 4) boxes x1, y1, x2, y2 of (n, 3) uint8 colours."""
    drawing = Visualizer(image)
    edges = [tuple(colour) for colour in colours / 255]
    for box, edge in zip(boxes, edges):
        drawing.draw_box(box, alpha=1, edge_color=edge)  # those below let the image through
    drawing.overlay_instances(boxes=boxes, labels=labels, assigned_colors=edges)
    return drawing.output.get_image()


def draw_detections(
    image: np.ndarray, instances: Instances, names: Sequence[str], threshold: float
) -> np.ndarray:
    """The boxes whose score reaches the threshold; arguments and result as of :func:`draw_boxes`.

    Args:
        names: of the classes.
    """
    kept = instances[instances.scores >= threshold].to("cpu")
    classes = kept.pred_classes.tolist()
    labels = [f"{names[c]} {score:.0%}" for c, score in zip(classes, kept.scores.tolist())]
    boxes = kept.pred_boxes.tensor.numpy()
    return draw_boxes(image, boxes, labels, class_colours(len(names))[classes])


def draw_ground_truth(
    image: np.ndarray, annotations: list[dict], names: Sequence[str]
) -> np.ndarray:
    """The annotated boxes; regions to ignore are grey and named so."""
    corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    labels = ["ignore" if a.get("iscrowd") else names[a["category_id"]] for a in annotations]
    palette = class_colours(len(names))
    inks = [GREY if a.get("iscrowd") else palette[a["category_id"]] for a in annotations]
    boxes, colours = np.array(corners).reshape(-1, 4), np.array(inks).reshape(-1, 3)
    return draw_boxes(image, boxes, labels, colours)


def class_legend(classes: Iterable[int], names: Sequence[str]) -> list[Caption]:
    """Captions of the classes that a picture shows."""
    colours = class_colours(len(names))
    return [(names[c], colours[c]) for c in sorted(set(classes))]


def detection_picture(
    image: np.ndarray,
    instances: Instances,
    annotations: list[dict] | None,
    names: Sequence[str],
    threshold: float = 0.4,
) -> np.ndarray:
    """Ground truth, if there are annotations, beside detections, with a legend of their classes.

    Args:
        image: (H, W, 3) RGB uint8.
    """
    kept = instances[instances.scores >= threshold]
    picture = draw_detections(image, kept, names, threshold)
    shown = kept.pred_classes.tolist()
    if annotations is not None:
        truth = draw_ground_truth(image, annotations, names)
        picture = np.concatenate([truth, picture], axis=1)
        shown += [a["category_id"] for a in annotations if not a.get("iscrowd")]
    return captioned(picture, class_legend(shown, names))


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
    height, width = image.shape[:2]
    light = upscale(light, height, width, fill)[..., None]
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
    height, width = image.shape[:2]
    colours = upscale(colours.reshape(*shape, 3), height, width, fill)
    routed = colours.any(-1, keepdims=True)
    return np.where(routed, image // 2 + colours // 2, image // 4)


def draw_queries(image: np.ndarray, boxes: np.ndarray, experts: np.ndarray) -> np.ndarray:
    """Draw queries' boxes in the colour of the expert with the largest gate, and all experts'
    numbers.

    Args:
        image: (H, W, 3) uint8.
        boxes: (n, 4) x1, y1, x2, y2 in pixels.
        experts: (n, k), those of largest gates first.
    """
    labels = [" ".join(map(str, row)) for row in experts.tolist()]
    return draw_boxes(image // 2, boxes, labels, PALETTE[experts[:, 0] % len(PALETTE)])


class Observation(NamedTuple):
    """What a model made of one image.

    Attributes:
        instances: in the coordinates of the original image.
        outputs: what :meth:`MetaArch.predict` returned, if that is at hand.
        records: what sparse parts left.
    """

    instances: Instances
    outputs: dict[str, Tensor] | None
    records: dict[str, Record]


@torch.no_grad()
def observe(model: MetaArch, inputs: dict) -> Observation:
    """Run a model in evaluation mode on one image."""
    images, padding = model.preprocess([inputs])
    with forward_context(record=True) as context:
        outputs = model.predict(images, padding)
    (instances,) = model.postprocess(outputs, [original_size(inputs)])
    return Observation(instances.to("cpu"), outputs, context.records)


def sparsity_pictures(
    image: np.ndarray,
    records: dict[str, Record],
    outputs: dict[str, Tensor] | None = None,
    threshold: float = 0.4,
) -> dict[str, np.ndarray]:
    """Pictures by name: what each pruner kept, experts of each layer over a map or at the boxes of
    its queries.

    They are (H, W, 3) and below the image say what they show.

    Args:
        image: (H, W, 3) RGB uint8.
        records: what the model left (:func:`observe`) when it ran on the one image.
        outputs: what it predicted; None draws no queries.
        threshold: least score of queries that are drawn.
    """
    pictures: dict[str, np.ndarray] = {}
    for name, record in records.items():
        place = name.partition("/")[2]
        if isinstance(record, PruningRecord):
            where, kept = record.where, record.kept_cells()[0].nonzero().flatten().cpu().numpy()
            drawn = draw_kept(image, where.shape, kept, fill_of(where))
            total = where.shape[0] * where.shape[1]
            texts = (place, f"kept {len(kept) / total:.0%}", f"{len(kept)} of {total} tokens")
            pictures[f"kept_{place}"] = captioned(drawn, [(text, None) for text in texts])
        elif isinstance(record, MoERecord):
            stand = what_stands(place, record)
            drawings = {}
            if stand == "cells":
                drawings = experts_on_maps(image, record)
            elif stand == "queries" and outputs is not None:
                drawings = {"": experts_of_queries(image, record, outputs, threshold)}
            legend = [(str(i), PALETTE[i % len(PALETTE)]) for i in range(record.config.num_experts)]
            for level, drawn in drawings.items():
                caption = (f"{place}{level}: expert", None)
                pictures[f"expert_{place}{level}"] = captioned(drawn, [caption, *legend])
    return pictures


def experts_on_maps(image: np.ndarray, record: MoERecord) -> dict[str, np.ndarray]:
    """:func:`draw_experts` on the one map of the record's tokens, or on each by its level."""
    first, drawings = record.routing.experts[:, 0].cpu().numpy(), {}
    maps = record.tokens.maps
    start = maps[0].prefix
    for level, where in enumerate(maps):
        shape, index = where.shape, where.index
        cells = np.arange(shape[0] * shape[1]) if index is None else index[0].cpu().numpy()
        experts = first[start : start + len(cells)]
        name = f"_level{level}" if len(maps) > 1 else ""
        drawings[name] = draw_experts(image, shape, cells, experts, fill_of(where))
        start += len(cells)
    return drawings


def experts_of_queries(
    image: np.ndarray, record: MoERecord, outputs: dict[str, Tensor], threshold: float
) -> np.ndarray:
    """:func:`draw_queries` of those whose best score reaches the threshold."""
    experts = record.routing.experts
    # Of several texts the first leaves records, and has the first queries.
    logits, boxes = (outputs[name][0, : len(experts)] for name in ("pred_logits", "pred_boxes"))
    shown = logits.float().sigmoid().amax(-1) >= threshold
    height, width = image.shape[:2]
    corners = box_convert(boxes[shown].float(), "cxcywh", "xyxy").cpu().numpy()
    return draw_queries(image, corners * ([width, height] * 2), experts[shown].cpu().numpy())


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
        together = bottom.imshow(
            values["coactivation"].cpu().numpy(), cmap="viridis", vmin=0, vmax=1
        )
        bottom.set(xticks=experts, yticks=experts, xlabel="expert")
    axes[0, 0].set_ylabel("share of assignments")
    axes[1, 0].set_ylabel("expert")
    figure.colorbar(together, ax=axes[1].tolist(), label="share of tokens that use both")
    return figure


def plot_heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    xlabel: str,
    ylabel: str,
    label: str,
) -> Figure:
    """Shares as colours, and in percent where there is room; NaN is blank.

    Args:
        values: (R, C) in [0, 1].
        label: of the scale of colours.
    """
    height, width = values.shape
    size = (2.6 + 0.45 * max(width, 6), 1.6 + 0.3 * max(height, 4))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    top = float(np.nanmax(values, initial=0)) or 1.0
    drawn = axes.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(range(width), columns)
    axes.set_yticks(range(height), rows)
    if width <= 32:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "white" if value < 0.6 * top else "black"
                axes.text(
                    column, row, f"{value:.0%}"[:-1], color=ink, ha="center", va="center", size=7
                )
    figure.colorbar(drawn, label=label, format=PercentFormatter(1, 0))
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
    means: dict[str, dict[str, Tensor]] = {}
    for place, seen in records.items():
        every = [record.statistics() for record in seen]
        means[place] = {key: torch.stack([x[key] for x in every]).mean(0) for key in every[0]}
    return means

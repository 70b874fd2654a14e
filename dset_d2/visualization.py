"""Pictures of what the sparse mechanisms do: kept tokens, experts on the image, their load."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from .modeling.encoder.hybrid_encoder import TransformerEncoder
from .modeling.sparse import MoE, TokenPruner
from .modeling.sparse.collect import short_name
from .modeling.sparse.moe import Routing, routing_statistics

PALETTE = (np.array(matplotlib.colormaps["tab10"].colors) * 255).astype(np.uint8)  # one per expert


class SparsityProbe(AbstractContextManager):
    """Watches a model's encoders, pruners and routers while it runs on one image.

    By short name, ``shapes`` has the (H, W) of each encoder's token map, ``kept`` the indices
    (K,) of the tokens that each pruner kept, and ``routings`` the :class:`Routing` of each MoE
    layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.shapes: dict[str, tuple[int, int]] = {}
        self.kept: dict[str, np.ndarray] = {}
        self.routings: dict[str, Routing] = {}
        self.handles = []
        for path, module in model.named_modules():
            name = short_name(path)
            if isinstance(module, TransformerEncoder):
                self.watch(module, partial(self.see_shape, name))
            elif isinstance(module, TokenPruner):
                self.watch(module, partial(self.see_kept, name))
            elif isinstance(module, MoE):
                self.watch(module.router, partial(self.see_routing, name))

    def watch(self, module: nn.Module, hook: Callable) -> None:
        self.handles.append(module.register_forward_hook(hook))

    def see_shape(self, name: str, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        self.shapes[name] = arguments[2]

    def see_kept(self, name: str, module: nn.Module, arguments: tuple, output: tuple) -> None:
        index, tokens = output[0], arguments[0].shape[1]
        self.kept[name] = np.arange(tokens) if index is None else index[0].cpu().numpy()

    def see_routing(self, name: str, module: nn.Module, arguments: tuple, output: Routing) -> None:
        self.routings[name] = output

    def encoder_of(self, layer: str) -> str | None:
        """The encoder that an MoE layer belongs to; None for the decoder's layers."""
        return next((name for name in self.shapes if layer.startswith(f"{name}_")), None)

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()


def upscale(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """(h, w[, C]) per cell -> (height, width[, C]) per pixel, without blending."""
    return cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)


def draw_kept(image: np.ndarray, shape: tuple[int, int], kept: np.ndarray) -> np.ndarray:
    """Darken the cells of pruned tokens.

    Args:
        image: (H, W, 3) uint8.
        shape: (h, w) of the token map.
        kept: (K,) row-major indices of the kept tokens.
    """
    light = np.full(shape, 0.25, np.float32)
    light.reshape(-1)[kept] = 1.0
    light = upscale(light, *image.shape[:2])[..., None]
    return (image * light).astype(np.uint8)


def draw_experts(
    image: np.ndarray, shape: tuple[int, int], tokens: np.ndarray, experts: np.ndarray
) -> np.ndarray:
    """Colour every token's cell by the expert with its largest gate.

    Args:
        image: (H, W, 3) uint8.
        shape: (h, w) of the token map.
        tokens: (K,) row-major indices of the tokens that were routed.
        experts: (K,) their experts.
    """
    colours = np.zeros((shape[0] * shape[1], 3), np.uint8)
    colours[tokens] = PALETTE[experts % len(PALETTE)]
    colours = upscale(colours.reshape(*shape, 3), *image.shape[:2])
    routed = colours.any(-1, keepdims=True)
    return np.where(routed, image // 2 + colours // 2, image // 4)


def sparsity_pictures(image: np.ndarray, probe: SparsityProbe) -> dict[str, np.ndarray]:
    """(H, W, 3) pictures by name: kept tokens of each pruner, experts of each encoder layer."""
    pictures = {}
    for name, kept in probe.kept.items():
        pictures[f"kept_{name}"] = draw_kept(image, probe.shapes[name], kept)
    for name, routing in probe.routings.items():
        if encoder := probe.encoder_of(name):
            shape = probe.shapes[encoder]
            experts = routing.experts[:, 0].cpu().numpy()
            tokens = np.arange(shape[0] * shape[1])
            if len(experts) < len(tokens):  # pruned in front of the layer
                tokens = probe.kept[encoder]
            pictures[f"expert_{name}"] = draw_experts(image, shape, tokens, experts)
    return pictures


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


def mean_statistics(routings: dict[str, list[Routing]]) -> dict[str, dict[str, Tensor]]:
    """Statistics of each layer, averaged over the routings of several images."""
    means = {}
    for name, seen in routings.items():
        every = [routing_statistics(routing) for routing in seen]
        means[name] = {key: sum(x[key] for x in every) / len(every) for key in every[0]}
    return means

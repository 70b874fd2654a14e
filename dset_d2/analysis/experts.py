"""What experts do over a data set: how much each is given, which work together, how sure their
routers are, and what the tokens are that they are given: objects of which class and size.

A token of a feature map belongs to all objects whose boxes touch its cell. A query belongs to the
object of the class that it scores highest whose box has the best IoU with the query's final box,
if that is at least one half: what COCO's AP50 would take for a hit. (The criterion's matching gives
each object one query, however far off it is, and would call the others that see the object
background.) What belongs to no object is background, unless it lies in a region whose objects are
not annotated. A Grounding DINO of several texts shows what it does with the first one, which knows
no classes of the others.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_area, box_convert, box_iou

from ..data.mapper import read_objects
from ..modeling import MetaArch, forward_context
from ..modeling.context import Record
from ..modeling.sparse import MoEConfig, MoERecord
from ..modeling.sparse.moe import chosen
from ..modeling.sparse.pruning import touched_cells
from ..modeling.tokens import TokenMap, gather_tokens

# COCO's, by the least area of their boxes in the original image, in pixels.
SIZES = {"small": 0, "medium": 32**2, "large": 96**2}
LEAST_IOU = 0.5


class Objects(NamedTuple):
    """What is annotated in an image; boxes are cx, cy, w, h in [0, 1].

    Attributes:
        sizes: places in :data:`SIZES`.
        ignored: regions whose objects are not annotated (``iscrowd``).
    """

    boxes: Tensor  # (n, 4)
    labels: Tensor  # (n,)
    sizes: Tensor  # (n,)
    ignored: Tensor  # (m, 4)

    def to(self, device: torch.device) -> "Objects":
        return Objects(*(x.to(device) for x in self))


def objects_of(dataset_dict: dict, height: int, width: int, num_classes: int) -> Objects:
    """The annotated objects of an image of that size.

    Raises:
        ValueError: if it has no annotations, or one of a class that there is not.
    """
    if "annotations" not in dataset_dict:
        raise ValueError("no annotations, which tell what a token sees")
    annotations = dataset_dict["annotations"]
    crowds = [a | {"iscrowd": 0} for a in annotations if a.get("iscrowd")]
    boxes, labels = (torch.from_numpy(x) for x in read_objects(annotations))
    if beyond := labels[labels >= num_classes].tolist():
        raise ValueError(f"class {beyond[0]} is beyond the {num_classes} classes")
    ignored = torch.from_numpy(read_objects(crowds)[0])
    scale = torch.tensor([width, height] * 2)
    bounds = torch.tensor(list(SIZES.values())[1:], dtype=boxes.dtype)
    return Objects(
        box_convert(boxes, "xyxy", "cxcywh") / scale,
        labels,
        torch.bucketize(box_area(boxes), bounds, right=True),
        box_convert(ignored, "xyxy", "cxcywh") / scale,
    )


def objects_of_queries(logits: Tensor, boxes: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """(Q, n) bool, which object each query belongs to, if any; (Q,) bool, which of the queries lie
    in ignored regions with half of their boxes or more.

    Args:
        logits, boxes: (Q, C) and (Q, 4), a model's for one image.
    """
    corners, ignored = (box_convert(x, "cxcywh", "xyxy") for x in (boxes.float(), objects.ignored))
    overlap = box_iou(corners, box_convert(objects.boxes, "cxcywh", "xyxy"))
    overlap = overlap * (logits.argmax(-1)[:, None] == objects.labels)
    best = F.one_hot(overlap.argmax(1), len(objects.labels)) if len(objects.labels) else overlap
    low = torch.maximum(corners[:, None, :2], ignored[:, :2])
    high = torch.minimum(corners[:, None, 2:], ignored[:, 2:])
    inside = (high - low).clamp(min=0).prod(-1)
    covered = inside >= LEAST_IOU * box_area(corners)[:, None]
    return (best > 0) & (overlap >= LEAST_IOU), covered.any(1)


def objects_of_cells(where: TokenMap, image: int, objects: Objects) -> tuple[Tensor, Tensor]:
    """(N, n) bool, which objects each of an image's tokens on a map belongs to; (N,) bool, which of
    the tokens touch ignored regions."""
    ratio = None if where.padding is None else where.padding.ratio[image]
    cells = [touched_cells(x, where.shape, ratio).T for x in (objects.boxes, objects.ignored)]
    if where.index is not None:
        cells = [gather_tokens(x[None], where.index[image : image + 1])[0] for x in cells]
    return cells[0], cells[1].any(1)


class LayerSums:
    """Sums over the tokens of one layer of experts.

    Attributes:
        stand: what its tokens are: "queries", "cells" of feature maps, or "others", of which it is
            not known what they see.
        tokens: how many there were, without padding.
        statistics: sums of what :meth:`MoERecord.statistics` has the means of.
        members: (G,) how many tokens were of each group.
        assigned: (G, E) how often these were given to each expert.
    """

    def __init__(self, config: MoEConfig, stand: str, groups: int) -> None:
        self.config = config
        self.stand = stand
        self.tokens = 0
        self.statistics: dict[str, Tensor] = {}
        self.members = torch.zeros(groups, dtype=torch.float64)
        self.assigned = torch.zeros(groups, config.num_experts, dtype=torch.float64)

    def add(self, record: MoERecord, members: Tensor | None) -> None:
        """Add a record's tokens.

        Args:
            members: (T, G) bool, which groups each token is of; None if that is not known.
        """
        valid, used = record.valid, chosen(record.routing)
        tokens = len(used) if valid is None else int(valid.sum())
        self.tokens += tokens
        for name, mean in record.statistics().items():
            self.statistics[name] = self.statistics.get(name, 0) + tokens * mean.double().cpu()
        if members is not None:
            if valid is not None:
                members = members & valid[:, None]
            self.members += members.sum(0).cpu()
            self.assigned += (members.double().T @ used.double()).cpu()

    def report(self, classes: Sequence[str]) -> dict[str, Any]:
        """Means, as numbers and lists; None where there was no token to take them of."""
        means = {name: values / self.tokens for name, values in self.statistics.items()}
        groups: list[dict] = [
            {"tokens": int(count), "load": (row / row.sum()).tolist() if count else None}
            for count, row in zip(self.members, self.assigned)
        ]
        first, known = len(classes), self.stand != "others"
        return {
            "tokens": self.tokens,
            "stand": self.stand,
            "num_experts": self.config.num_experts,
            "top_k": self.config.top_k,
            "load": means["usage"].tolist(),
            "load_entropy": float(torch.special.entr(means["usage"]).sum()),
            "router_entropy": float(means["entropy"]),
            "largest_entropy": math.log(self.config.num_experts),
            "coactivation": means["coactivation"].tolist(),
            "by_class": dict(zip(classes, groups)) if known else None,
            "by_size": dict(zip(SIZES, groups[first:])) if known else None,
            "background": groups[-1] if known else None,
        }


class ExpertAnalysis:
    """Sums over images of what a model's experts do, layer by layer; no token is kept.

    Args:
        classes: names of the data set's classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.layers: dict[str, LayerSums] = {}

    @torch.no_grad()
    def run(self, model: MetaArch, inputs: list[dict], objects: list[Objects]) -> None:
        """Run a model in evaluation mode on images, whose objects are known, and add what its
        experts do."""
        for group in model.groups(inputs):
            images, padding = model.preprocess([inputs[i] for i in group])
            with forward_context(record=True) as context:
                outputs = model.predict(images, padding)
            self.add(context.records, outputs, [objects[i].to(images.device) for i in group])

    def add(
        self, records: dict[str, Record], outputs: dict[str, Tensor], objects: list[Objects]
    ) -> None:
        """Add what one forward has left.

        Args:
            outputs: what :meth:`MetaArch.predict` returns.
            objects: of each image.
        """
        for name, record in records.items():
            if isinstance(record, MoERecord):
                place = name.partition("/")[2]
                stand = what_stands(place, record)
                if place not in self.layers:
                    groups = len(self.classes) + len(SIZES) + 1
                    self.layers[place] = LayerSums(record.config, stand, groups)
                members = None
                if stand == "queries":
                    members = self.queries(record, outputs, objects)
                elif stand == "cells":
                    members = self.cells(record, objects)
                self.layers[place].add(record, members)

    def queries(
        self, record: MoERecord, outputs: dict[str, Tensor], objects: list[Objects]
    ) -> Tensor:
        """(T, G) bool, which groups the queries of a batch are of."""
        # Of several texts the first leaves records, and has the first queries.
        count = len(record.routing.experts) // len(objects)
        predicted = zip(outputs["pred_logits"][:, :count], outputs["pred_boxes"][:, :count])
        members = [
            self.groups(*objects_of_queries(*one, x), x) for one, x in zip(predicted, objects)
        ]
        return torch.cat(members)

    def cells(self, record: MoERecord, objects: list[Objects]) -> Tensor:
        """(T, G) bool, which groups the tokens on feature maps are of; none if on no cell."""
        maps = record.tokens.maps
        members = [
            torch.cat([self.groups(*objects_of_cells(where, i, x), x) for where in maps])
            for i, x in enumerate(objects)
        ]
        return F.pad(torch.stack(members), (0, 0, maps[0].prefix, 0)).flatten(0, 1)

    def groups(self, belongs: Tensor, ignored: Tensor, objects: Objects) -> Tensor:
        """(N, G) bool, which groups tokens are of: classes and sizes of the objects (N, n) that
        they belong to, else the background."""
        classes = F.one_hot(objects.labels, len(self.classes))
        kinds = torch.cat([classes, F.one_hot(objects.sizes, len(SIZES))], dim=1)
        found = belongs.float() @ kinds.float() > 0
        background = ~belongs.any(1) & ~ignored
        return torch.cat([found, background[:, None]], dim=1)

    def report(self) -> dict[str, dict[str, Any]]:
        """By layer, see :meth:`LayerSums.report`."""
        return {place: sums.report(self.classes) for place, sums in self.layers.items()}


def what_stands(place: str, record: MoERecord) -> str:
    """What a record's tokens are, as :class:`LayerSums` calls it."""
    if record.tokens is not None:
        return "cells"
    return "queries" if place.startswith("decoder") else "others"

"""Grounding DINO as it was published: images of 800 x 1333 at most, backbones at a tenth."""

from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from dset_d2.modeling import GroundingDINO, TokenCriterion, TokenMatcher

model = L(GroundingDINO)(
    folder="",  # config.json, weights and tokenizer, of a Grounding DINO or MM Grounding DINO
    dataset="${dataloader.test.dataset.names}",
    prompts=None,  # the names of the data set's classes
    text_limit=None,
    trainable=None,  # all of it
    criterion=L(TokenCriterion)(
        matcher=L(TokenMatcher)(), weights={"ce": 2.0, "bbox": 5.0, "giou": 2.0}
    ),
)

# Patterns for ``model.trainable``: together what Dynamic-DINO trains.
FUSION = ("*.encoder.layers.*.fusion_layer.*",)  # where image and text attend to each other
EXPERTS = ("*.router.*", "*.experts.*")
HEADS = ("*_embed.*",)  # of boxes and, in MM Grounding DINO, of classes


def keep_aspect(dataloader):
    """Resize images to fit into ``image_size``, its lower number for their shorter side."""
    dataloader.image_size = [800, 1333]
    sides = dict(max_size="${dataloader.image_size[1]}", sample_style="choice")
    lengths = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, "${dataloader.image_size[0]}"]
    *others, _ = dataloader.train.mapper.augmentations
    dataloader.train.mapper.augmentations = [
        *others,
        L(T.ResizeShortestEdge)(short_edge_length=lengths, **sides),
    ]
    dataloader.test.mapper.augmentations = [
        L(T.ResizeShortestEdge)(short_edge_length="${dataloader.image_size[0]}", **sides)
    ]


def slow_backbones(optimizer):
    """Both backbones, of the images and of the text, learn at a tenth of the rate."""
    optimizer.params.rules = dict(
        backbone=dict(pattern=r"^network\.model\.backbone\.", factor=0.1),
        text_backbone=dict(pattern=r"^network\.model\.text_backbone\.", factor=0.1),
    )

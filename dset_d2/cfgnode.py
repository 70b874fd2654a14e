"""The keys that this project adds to Detectron2's older ``CfgNode`` configs."""

from detectron2.config import CfgNode

from .arguments import keys_of
from .data import DETRMapper, Mosaic
from .data.augmentation import RandomIoUCrop, RandomPhotometric, RandomZoomOut
from .engine.optimizer import build_adamw
from .modeling import (
    DETRDetector,
    DFINECriterion,
    DFINEDecoder,
    DINOv3,
    FreezeConfig,
    GroundingDINO,
    HGNetv2,
    HungarianMatcher,
    HybridEncoder,
    LoRAConfig,
    PlainAdapter,
    PResNet,
    RTDETRDecoder,
    SetCriterion,
    SpatialTuningAdapter,
    SupernetConfig,
    TokenCriterion,
    TokenMatcher,
    WindowConfig,
)
from .modeling.sparse import MemoryPruningConfig, MoEConfig, PruningConfig, SwapConfig


def add_detr_config(cfg: CfgNode) -> None:
    """Add the keys of this project's classes to a ``CfgNode``, in place.

    A group's keys are the arguments of a class in capitals, with its defaults, and mean what its
    docstring says: ``MODEL.ENCODER.DEPTH_MULT`` is ``depth_mult`` of :class:`HybridEncoder`.

    ============================  ===============================================================
    ``MODEL``                     ``PIXEL_MEAN``, ``PIXEL_STD``, ``MULTI_SCALE``,
                                  ``MULTI_SCALE_END`` of :class:`DETRDetector`
    ``MODEL.SWAP``                :class:`~dset_d2.modeling.sparse.SwapConfig`, none if
                                  ``NUM_EXPERTS`` of its ``MOE`` is 0
    ``MODEL.SUPERNET``            :class:`SupernetConfig`, none if it has no values of knobs
    ``MODEL.PRESNET``             :class:`PResNet`
    ``MODEL.HGNETV2``             :class:`HGNetv2`
    ``MODEL.DINOV3``              :class:`DINOv3`; ``VIT`` takes timm's arguments as they are
      ``.ADAPTER``                "sta", :class:`SpatialTuningAdapter`, or "plain",
                                  :class:`PlainAdapter`, by its ``NAME``
      ``.FREEZE``                 :class:`FreezeConfig` if it is ``ENABLED``
      ``.LORA``                   :class:`LoRAConfig`, none if ``RANK`` is 0
      ``.PRUNING``                a list, each with the arguments of
                                  :class:`~dset_d2.modeling.sparse.ViTPruningConfig` as they are
      ``.MOE``                    :class:`MoEConfig`, none if ``NUM_EXPERTS`` is 0
      ``.WINDOWS``                :class:`WindowConfig` if it is ``ENABLED``
    ``MODEL.ENCODER``             the encoder of a ``NAME``: :class:`HybridEncoder`;
                                  ``USE_ENCODER_IDX`` below 0 count from the coarsest scale
      ``.MOE``                    :class:`MoEConfig`, none if ``NUM_EXPERTS`` is 0
      ``.PRUNING``                :class:`PruningConfig`, none if ``KEEP_RATIO`` is 1 or 0
    ``MODEL.DECODER``             the decoder of a ``NAME``: :class:`RTDETRDecoder`, and what
                                  :class:`DFINEDecoder` has beside it
      ``.MOE``                    as the encoder's
      ``.MEMORY_PRUNING``         :class:`MemoryPruningConfig`, none if ``KEEP_RATIO`` is 1 or 0
    ``MODEL.CRITERION``           the criterion of a ``NAME``, if empty the decoder's own:
                                  :class:`SetCriterion`, and what :class:`DFINECriterion` has
                                  beside it
      ``.WEIGHTS``                of the losses, by their names
      ``.MATCHER``                :class:`HungarianMatcher`
    ``MODEL.GROUNDING_DINO``      :class:`GroundingDINO`, of which ``MODEL`` has the rest and
                                  ``DATASETS`` the data set; ``ARCHITECTURE`` takes the library's
                                  settings as they are
      ``.PRUNING``                :class:`PruningConfig`, none if ``KEEP_RATIO`` is 1 or 0
      ``.CRITERION``              :class:`TokenCriterion`, with ``WEIGHTS`` and ``MATCHER``
                                  (:class:`TokenMatcher`)
    ``INPUT``                     ``IMAGE_SIZE`` (height, width; images are stretched to it),
                                  ``STRONG_AUGMENTATION_END`` (the training step from which the
                                  groups below are left out) and what :class:`DETRMapper` takes
      ``.RANDOM_PHOTOMETRIC``     :class:`RandomPhotometric`
      ``.RANDOM_ZOOM_OUT``        :class:`RandomZoomOut`
      ``.RANDOM_IOU_CROP``        :class:`RandomIoUCrop`
      ``.MOSAIC``                 :class:`~dset_d2.data.Mosaic`, as ``Mosaic(cfg, dataset)``
    ``SOLVER``                    ``BETAS``, ``CLIP_NORM`` of :func:`build_adamw`; ``RULES`` of
                                  rates by name, each with the arguments of
                                  :class:`~dset_d2.engine.optimizer.RateRule` as they are
    ============================  ===============================================================

    Detectron2's ``TEST.DETECTIONS_PER_IMAGE``, ``INPUT.FORMAT`` and ``DATALOADER`` get the values
    that detection transformers need.
    """
    cfg.INPUT.FORMAT = "RGB"
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.MODEL.update(keys_of(DETRDetector, without=("max_detections", "swap", "supernet")))
    cfg.MODEL.SWAP = keys_of(SwapConfig, MOE=keys_of(MoEConfig, NUM_EXPERTS=0))
    cfg.MODEL.SUPERNET = keys_of(SupernetConfig)
    add_backbones(cfg.MODEL)
    cfg.MODEL.ENCODER = keys_of(
        HybridEncoder,
        NAME="HybridEncoder",
        USE_ENCODER_IDX=[-1],
        MOE=keys_of(MoEConfig, NUM_EXPERTS=0),
        PRUNING=keys_of(PruningConfig, KEEP_RATIO=1.0),
    )
    told = ("in_channels", "box_outputs", "scales")  # to the decoder by others
    cfg.MODEL.DECODER = keys_of(DFINEDecoder, without=told)
    cfg.MODEL.DECODER.update(
        keys_of(
            RTDETRDecoder,
            without=told,
            NAME="RTDETRDecoder",
            NUM_CLASSES=80,
            MOE=keys_of(MoEConfig, NUM_EXPERTS=0),
            MEMORY_PRUNING=keys_of(MemoryPruningConfig, KEEP_RATIO=1.0),
        )
    )
    weights = SetCriterion.default_weights | DFINECriterion.default_weights
    cfg.MODEL.CRITERION = keys_of(
        DFINECriterion,
        NAME="",
        WEIGHTS=CfgNode({name.upper(): weight for name, weight in weights.items()}),
        MATCHER=keys_of(HungarianMatcher),
    )
    add_grounding_dino(cfg.MODEL)
    cfg.INPUT.update(
        keys_of(
            DETRMapper,
            IMAGE_SIZE=[640, 640],
            STRONG_AUGMENTATION_END=0,
            RANDOM_PHOTOMETRIC=keys_of(RandomPhotometric),
            RANDOM_ZOOM_OUT=keys_of(RandomZoomOut),
            RANDOM_IOU_CROP=keys_of(RandomIoUCrop),
            MOSAIC=keys_of(Mosaic, PROB=0.0),
        )
    )
    cfg.SOLVER.update(keys_of(build_adamw, RULES=CfgNode(new_allowed=True)))


def add_backbones(node: CfgNode) -> None:
    """Add the keys of the backbones to those of ``MODEL``."""
    node.PRESNET = keys_of(PResNet, DEPTH=18)
    node.HGNETV2 = keys_of(HGNetv2, NAME="L")
    adapter = keys_of(PlainAdapter, NAME="sta", IN_CHANNELS=384, OUT_CHANNELS=160)
    adapter.update(keys_of(SpatialTuningAdapter))
    node.DINOV3 = keys_of(
        DINOv3,
        VIT=CfgNode(new_allowed=True),
        ADAPTER=adapter,
        FREEZE=keys_of(FreezeConfig, ENABLED=False),
        LORA=keys_of(LoRAConfig, RANK=0),
        MOE=keys_of(MoEConfig, NUM_EXPERTS=0),
        WINDOWS=keys_of(WindowConfig, ENABLED=False),
    )


def add_grounding_dino(node: CfgNode) -> None:
    """Add the keys of Grounding DINO to those of ``MODEL``."""
    weights = {name.upper(): value for name, value in TokenCriterion.default_weights.items()}
    elsewhere = ("dataset", "pixel_mean", "pixel_std", "max_detections", "multi_scale", "swap")
    node.GROUNDING_DINO = keys_of(
        GroundingDINO,
        without=(*elsewhere, "multi_scale_end"),
        ARCHITECTURE=CfgNode(new_allowed=True),
        PRUNING=keys_of(PruningConfig, KEEP_RATIO=1.0),
        CRITERION=keys_of(TokenCriterion, WEIGHTS=CfgNode(weights), MATCHER=keys_of(TokenMatcher)),
    )

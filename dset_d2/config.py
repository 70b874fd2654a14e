"""Configurations: the LazyConfig files of this project, and the keys of Detectron2's older
``CfgNode`` system that the registered classes read."""

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from pathlib import Path

from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

PACKAGE = Path(__file__).parent
ROOTS = (PACKAGE.parent, PACKAGE)  # of the project's configs, in a checkout and when installed


def epochs(count: float, *, _root_: DictConfig) -> int:
    """``${epochs:N}`` in a config: N epochs in training steps, by images per batch."""
    images = _root_.train.images / _root_.dataloader.train.total_batch_size
    return max(1, round(count * max(1, round(images))))


def part_of_run(done: float, whole: float, *, _root_: DictConfig) -> int:
    """``${part_of_run:10,100}`` in a config: the step where 10 parts of 100 of the run are done.

    However long the run is: schedules that are written so move with it.
    """
    if not 0 <= done <= whole:
        raise ValueError(f"part_of_run:{done},{whole} must satisfy 0 <= done <= whole")
    return round(_root_.train.max_iter * done / whole)


for resolver in (epochs, part_of_run):
    OmegaConf.register_new_resolver(resolver.__name__, resolver)

# What an override must not replace by text; bool is an int, too, and comes first.
KINDS = {
    bool: "true or false",
    int | float: "a number",
    ListConfig: "a list",
    DictConfig: "a group of settings",
}


def find_config(path: str, roots: Sequence[Path] = (Path(), *ROOTS)) -> Path:
    """A config file of the user's, or one of the project's by its path from the root.

    Raises:
        FileNotFoundError: if there is no such config; the message lists its neighbours.
    """
    for root in roots:
        if (root / path).is_file():
            return (root / path).resolve()  # Detectron2 finds a config's parents from its own path
    folders = [root / Path(path).parent for root in roots]
    known = sorted({file.name for folder in folders for file in folder.glob("*.py")})
    raise FileNotFoundError(f"no config {path!r}; in its folder are: {', '.join(known) or 'none'}")


def load_config(path: str) -> DictConfig:
    """Load a config file of the user's, or one of the project's by its path from the root."""
    return LazyConfig.load(str(find_config(path)))


def get_config(path: str) -> DictConfig:
    """Load one of the project's configs by its path from the repository's root.

    Works in a checkout and when installed, e.g.
    ``get_config("configs/rtdetr/rtdetrv2_r18_coco.py")``.

    Raises:
        FileNotFoundError: if there is no such config; the message lists its neighbours.
    """
    return LazyConfig.load(str(find_config(path, ROOTS)))


def apply_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Detectron2's overrides, but a key that the config lacks is an error with a suggestion.

    Raises:
        ValueError: on such a key, on text in place of a number, a list or a group of settings, or
            on an override that cannot be read or applied; names it.
    """
    known = all_keys(cfg)
    for override in overrides:
        key, _, value = override.partition("=")
        if "=" in value and value[0] not in "\"'[{(":  # such as a path, which the parser refuses
            override = f"{key}={json.dumps(value)}"
        key = key.lstrip("+~")
        if not override.startswith("+") and key not in known:
            raise ValueError(
                f"the config has no key {key!r}{nearest(key, known)}; +{override} adds it"
            )
        before = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        try:
            LazyConfig.apply_overrides(cfg, [override])
        except Exception as error:  # of the parser's many kinds, few of which name the override
            raise ValueError(f"override {override!r}: {error}") from error
        after = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        if isinstance(after, str):
            for kind, name in KINDS.items():
                # Names of data sets may be one or a list.
                if isinstance(before, kind) and not (kind is ListConfig and key.endswith("names")):
                    raise ValueError(f"override {override!r}: {key} is {name}, as {before}")
    return cfg


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name: what is close to it, else what there is if it is little."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"; close to it: {', '.join(close)}"
    return f"; there is: {', '.join(known)}" if 0 < len(known) <= 20 else ""


def all_keys(cfg, prefix: str = "") -> set[str]:
    """Dotted names of all nodes and leaves, and of what the nodes' targets take beside them."""
    if not isinstance(cfg, DictConfig):
        return set()
    keys = {f"{prefix}{name}" for name in parameters_of(cfg.get("_target_"))}
    for key, value in cfg.items_ex(resolve=False):
        keys |= {f"{prefix}{key}"} | all_keys(value, f"{prefix}{key}.")
    return keys


def parameters_of(target: Callable | str | None) -> list[str]:
    """Names of the parameters of a config's ``_target_``, those that it hands to its base too."""
    if target is None:
        return []
    target = locate(target) if isinstance(target, str) else target
    names = []
    for owner in getattr(target, "__mro__", [target]):
        try:
            parameters = signature(owner).parameters.values()
        except ValueError:  # written in C, with nothing to inspect
            break
        names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def add_detr_config(cfg: CfgNode) -> None:
    """Add the keys of this project's registered classes to a ``CfgNode``, in place."""
    cfg.MODEL.PIXEL_MEAN = [0.0, 0.0, 0.0]
    cfg.MODEL.PIXEL_STD = [255.0, 255.0, 255.0]
    cfg.INPUT.FORMAT = "RGB"
    cfg.TEST.DETECTIONS_PER_IMAGE = 300
    cfg.MODEL.PRESNET = CfgNode(
        {
            "DEPTH": 18,
            "FREEZE_AT": -1,
            "FREEZE_NORM": False,
            "OUT_FEATURES": ["res3", "res4", "res5"],
        }
    )
    cfg.MODEL.HGNETV2 = CfgNode(
        {
            "NAME": "L",
            "USE_LAB": False,
            "FREEZE_AT": 0,
            "FREEZE_NORM": True,
            "OUT_FEATURES": ["stage2", "stage3", "stage4"],
        }
    )
    cfg.MODEL.DINOV3 = CfgNode(
        {
            "NAME": "vit_small_patch16_dinov3_qkvb",
            "EMBED_DIM": 384,  # of the ViT that NAME names
            "TAPS": [5, 8, 11],
            "ADAPTER": "sta",
            "OUT_CHANNELS": 160,
            "FREEZE": False,
            "UNFREEZE_STEP": -1,  # never, if frozen at all
            "UNFREEZE_BLOCKS": 4,
            "LORA_RANK": 0,  # none
            "LORA_ALPHA": 16.0,
            "GRADIENT_CHECKPOINTING": False,
        }
    )
    cfg.MODEL.ENCODER = CfgNode(
        {
            "NAME": "HybridEncoder",
            "HIDDEN_DIM": 256,
            "NUM_HEADS": 8,
            "DIM_FEEDFORWARD": 1024,
            "DROPOUT": 0.0,
            "NUM_LAYERS": 1,
            "FUSION": "csp_rep",
            "EXPANSION": 0.5,
            "DEPTH_MULT": 1.0,
        }
    )
    cfg.MODEL.DECODER = CfgNode(
        {
            "NAME": "RTDETRDecoder",
            "NUM_CLASSES": 80,
            "HIDDEN_DIM": 256,
            "NUM_QUERIES": 300,
            "NUM_HEADS": 8,
            "NUM_LAYERS": 3,
            "DIM_FEEDFORWARD": 1024,
            "EVAL_IDX": -1,
            "NUM_POINTS": [4, 4, 4],
            "CROSS_ATTN_METHOD": "default",
            "QUERY_SELECT_METHOD": "default",
            "NUM_DENOISING": 100,
            # Of DFINEDecoder alone:
            "LAYER_SCALE": 1.0,
            "REG_MAX": 32,
            "REG_SCALE": 4.0,
        }
    )

"""Configurations: the LazyConfig files of this project."""

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args

from detectron2.config import LazyCall, LazyConfig
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
    known = sorted(
        {file.name for folder in folders for file in folder.glob(f"*{Path(path).suffix}")}
    )
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

    One of a group of settings that is off, such as ``model.encoder.moe.num_experts=4``, puts the
    group there.

    Raises:
        ValueError: on such a key, on text in place of a number, a list or a group of settings, on
            an override that cannot be read or applied, or on a group that lacks what has no
            default; names it.
    """
    known = all_keys(cfg)
    groups = []
    for override in overrides:
        key, _, value = override.partition("=")
        if "=" in value and value[0] not in "\"'[{(":  # such as a path, which the parser refuses
            override = f"{key}={json.dumps(value)}"
        key = key.lstrip("+~")
        if added := add_groups(cfg, key):
            groups += added
            known = all_keys(cfg)
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
    for key in groups:
        check_complete(cfg, key)
    return cfg


def add_groups(cfg: DictConfig, key: str) -> list[str]:
    """Put the groups of settings that a dotted key lies in, and that are off, into the config.

    Such a group is a dataclass which the ``_target_`` that it is for takes, alone or where None is
    allowed, too.

    Returns:
        Their dotted names.
    """
    added = []
    node, parts = cfg, key.split(".")
    for depth, name in enumerate(parts[:-1], 1):
        if not isinstance(node, DictConfig):
            break
        if node.get(name) is None:
            parameter = parameters_of(node.get("_target_")).get(name)
            kind = parameter.annotation if parameter else None
            settings = next(filter(is_dataclass, get_args(kind) or [kind]), None)
            if settings is None:
                break
            node[name] = LazyCall(settings)()
            added.append(".".join(parts[:depth]))
        node = node[name]
    return added


def check_complete(cfg: DictConfig, key: str) -> None:
    """Raise a ValueError if a group of settings lacks one that has no default."""
    group = OmegaConf.select(cfg, key)
    if group is None:  # turned off again
        return
    for name, parameter in parameters_of(group.get("_target_")).items():
        if parameter.default is Parameter.empty and name not in group:
            raise ValueError(f"{key} needs {name}, which has no default: add {key}.{name}=VALUE")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name: what is close to it, else what there is if it is little."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"; close to it: {', '.join(close)}"
    return f"; there is: {', '.join(known)}" if 0 < len(known) <= 20 else ""


def all_keys(cfg: DictConfig) -> set[str]:
    """Dotted names of all nodes and leaves, and of what the nodes' targets take beside them."""
    return keys_within(OmegaConf.to_container(cfg, resolve=False), "")


def keys_within(node: object, prefix: str) -> set[str]:
    keys: set[str] = set()
    items: Iterable = ()
    if isinstance(node, dict):
        keys |= {f"{prefix}{name}" for name in parameters_of(node.get("_target_"))}
        items = node.items()
    elif isinstance(node, list):  # whose items go by their indices
        items = enumerate(node)
    for key, value in items:
        keys |= {f"{prefix}{key}"} | keys_within(value, f"{prefix}{key}.")
    return keys


def parameters_of(target: Callable | str | None) -> dict[str, Parameter]:
    """The parameters of a config's ``_target_``, those that it hands to its base too."""
    if target is None:
        return {}
    target = locate(target) if isinstance(target, str) else target
    found: dict[str, Any] = {}
    for owner in getattr(target, "__mro__", [target]):
        try:
            parameters = signature(owner).parameters.values()
        except ValueError:  # written in C, with nothing to inspect
            break
        named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        found = named | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found

"""Arguments of classes as keys of Detectron2's older ``CfgNode`` configs, and back.

A key is an argument's name in capitals. What it means and is at first, its class alone says.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from inspect import Parameter
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from detectron2.config import CfgNode

from .config import parameters_of

ACCEPTED = {float: (float, int), tuple: (tuple, list), list: (tuple, list)}


def keys_of(target: Callable, *, without: tuple[str, ...] = (), **keys) -> CfgNode:
    """The arguments that have defaults, as keys; ``keys`` replace some or add others."""
    node = CfgNode()
    for name, parameter in parameters_of(target).items():
        if name not in without and parameter.default is not parameter.empty:
            default = parameter.default
            node[name.upper()] = list(default) if isinstance(default, tuple) else default
    node.update(keys)
    return node


def arguments(target: Callable, cfg: CfgNode, group: str) -> dict:
    """The arguments that a group of keys has values for; groups within it are left out.

    Args:
        group: dotted name, such as ``MODEL.ENCODER``.

    Raises:
        ValueError: on a value of a wrong type; names the key.
    """
    node, values = find_group(cfg, group), {}
    for name, parameter in parameters_of(target).items():
        value = node.get(name.upper())
        if name.upper() not in node or isinstance(value, CfgNode):
            continue
        if not fits(value, parameter.annotation):
            kind = parameter.annotation
            kind = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"{group}.{name.upper()}={value!r} must be {kind}")
        values[name] = value
    return values


def build(target: Callable, cfg: CfgNode, group: str):
    """Call a class or function with the arguments in a group of keys."""
    with naming_keys(cfg, group):
        return target(**arguments(target, cfg, group))


@contextmanager
def naming_keys(cfg: CfgNode, group: str) -> Iterator[None]:
    """Let a ``ValueError`` about arguments name the keys that these came from."""
    try:
        yield
    except ValueError as error:
        names = "|".join(key.lower() for key in find_group(cfg, group))
        message = re.sub(rf"\b({names})=", lambda m: f"{group}.{m[1].upper()}=", str(error))
        if group not in message:
            message = f"{group}: {message}"
        raise ValueError(message) from error


def find_group(cfg: CfgNode, group: str) -> CfgNode:
    return reduce(getattr, group.split("."), cfg)


def fits(value: Any, annotation: object) -> bool:
    """Whether a value, and what it holds, is of an annotated kind."""
    kind, members = get_origin(annotation) or annotation, get_args(annotation)
    if kind in (Union, UnionType):
        return any(fits(value, member) for member in members)
    if kind is Parameter.empty or not isinstance(kind, type):  # such as a name in quotes
        return True
    if isinstance(value, bool | NoneType):
        return type(value) is kind
    accepted: Any = ACCEPTED.get(kind, kind)
    if not isinstance(value, accepted):
        return False
    return kind not in (tuple, list) or all(fits(item, *members[:1]) for item in value if members)

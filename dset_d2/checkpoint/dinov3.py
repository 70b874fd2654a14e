"""DINOv3 weights, as Meta, timm and DEIMv2 write them, into a backbone."""

import logging
import re
from pathlib import Path

from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

from .reading import check_finite, read_state_dict

logger = logging.getLogger(__name__)

# DINOv3's own names and timm's of the tokens, which no other model has.
REGISTERS = ("storage_tokens", "reg_token")
DEIMV2_DETECTOR = "backbone.dinov3.storage_tokens"
# DEIMv2's names of the adapter's parts.
ADAPTER = re.compile(r"^(sta|convs|norms)\.")
# Low-rank updates, which start from nothing and are in no file.
LORA = re.compile(r"\.lora_[ab]$")


def weights_hint(model: nn.Module) -> str:
    return getattr(getattr(model, "backbone", model), "weights_hint", "")


def is_dinov3(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is of a DINOv3 alone, as upstream, timm or DEIMv2 write it."""
    return any(key in state for name in REGISTERS for key in (name, f"dinov3.{name}"))


def load_dinov3(
    model: nn.Module,
    source: str | Path | dict,
    name: str = "state dict",
    adapter_optional: bool = False,
) -> None:
    """Load DINOv3 weights into a backbone in place: Meta's, timm's, or DEIMv2's with its adapter.

    Without the adapter's weights the adapter stays as it is, and so do low-rank updates. Blocks
    above the model's are left out, and so is what follows from settings (rotation periods, the
    mask of the keys' bias).

    Args:
        model: a :class:`DINOv3`, or a detector with that backbone.
        source: path of a ``.pth`` or ``.safetensors`` file, or a state dict.
        name: what errors call a state dict.
        adapter_optional: another adapter's weights are left out, with a warning.

    Raises:
        FileNotFoundError: if there is no such file; says where to get it.
        ValueError: on a key or shape that has no place, or on a parameter without a key.
    """
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "dinov3"):
        raise ValueError(f"DINOv3's weights do not fit a {type(backbone).__name__}")
    if not isinstance(source, dict):
        source, name = read_state_dict(source, weights_hint(model)), str(source)
    source = {key.removeprefix("adapter."): value for key, value in source.items()}  # ours
    vit = {k.removeprefix("dinov3."): v for k, v in source.items() if not ADAPTER.match(k)}
    adapter = {k: v for k, v in source.items() if ADAPTER.match(k)}
    depth = len(backbone.dinov3.blocks)
    vit = {
        key: value
        for key, value in checkpoint_filter_fn(vit, backbone.dinov3).items()
        if not (key.startswith("blocks.") and int(key.split(".")[1]) >= depth)
    }
    wanted = [(backbone.dinov3, vit)] + ([(backbone.adapter, adapter)] if adapter else [])
    fitting = []
    for module, state in wanted:
        if not (reason := misfit(module, state)):
            fitting.append((module, state))
        elif state is adapter and adapter_optional:
            logger.warning("%s does not fit the adapter, which stays fresh: %s", name, reason)
        else:
            kind = type(module).__name__
            raise ValueError(f"{name} does not fit the {kind} of the model: {reason}")
    for _, state in fitting:
        check_finite(state, name)
    for module, state in fitting:
        module.load_state_dict(state, strict=False)


def misfit(module: nn.Module, state: dict[str, Tensor]) -> str:
    """Why a state dict does not fit a module; empty if it does."""
    known = module.state_dict()
    unknown = sorted(state.keys() - known.keys())
    missing = sorted(k for k in known.keys() - state.keys() if not LORA.search(k))
    wrong = sorted(k for k in known.keys() & state.keys() if known[k].shape != state[k].shape)
    if not (unknown or missing or wrong):
        return ""
    return (
        f"{len(unknown)} keys without a place {unknown[:5]}, "
        f"{len(missing)} parameters without a key {missing[:5]}, "
        f"{len(wrong)} of another shape {wrong[:5]}"
    )

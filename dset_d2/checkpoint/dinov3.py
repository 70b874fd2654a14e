"""DINOv3 weights, as Meta, timm and DEIMv2 write them, into a backbone."""

import logging
import re
from pathlib import Path

from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

from .experts import check_upcycling, dense_ffns, upcycle_ffns, warn_of_keys
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
    upcycling: str = "auto",
) -> None:
    """Load DINOv3 weights into a backbone in place: Meta's, timm's, or DEIMv2's with its adapter.

    Without the adapter's weights the adapter stays as it is, and so do low-rank updates. Blocks
    above the model's are left out, and so is what follows from settings (rotation periods, the
    mask of the keys' bias). Experts start from the dense FFN of their block.

    Args:
        model: a :class:`DINOv3`, or a detector with that backbone.
        source: path of a ``.pth`` or ``.safetensors`` file, or a state dict.
        name: what errors call a state dict.
        adapter_optional: another adapter's weights are left out, with a warning.
        upcycling: how experts start, as for :func:`load_initial`.

    Raises:
        FileNotFoundError: if there is no such file; says where to get it.
        ValueError: on a key or shape that has no place, or on a parameter without a key; if the
            upcycling that is asked for does not fit the experts.
    """
    check_upcycling(upcycling)
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
    vit = start_experts(backbone.dinov3, vit, name, upcycling)
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


def start_experts(
    vit: nn.Module, state: dict[str, Tensor], name: str, upcycling: str
) -> dict[str, Tensor]:
    """A dense ViT's state dict, with experts where the model's ViT has them: from the FFNs in
    their place, or as they are, with a warning; routers stay as they are."""
    dense = dense_ffns(vit, state)
    state = upcycle_ffns(vit, state, name, upcycling)
    fresh = {
        f"{place}.{key}": value
        for place in dense
        for key, value in vit.get_submodule(place).state_dict().items()
    }
    warn_of_keys(name, "of the ViT's parameters stay fresh", fresh.keys() - state.keys())
    replaced = {key for keys in dense.values() for key in keys}
    return fresh | {key: value for key, value in state.items() if key not in replaced}


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

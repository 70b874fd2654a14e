"""DINOv3 weights, as Meta, timm and DEIMv2 write them, into a backbone."""

import re
from pathlib import Path

from timm.models.eva import checkpoint_filter_fn
from torch import Tensor, nn

from .reading import check_finite, read_state_dict

# DINOv3's own names and timm's of the tokens, which no other model has.
REGISTERS = ("storage_tokens", "reg_token")
# DEIMv2's names of the adapter's parts.
ADAPTER = re.compile(r"^(sta|convs|norms)\.")
# Low-rank updates, which start from nothing and are in no file.
LORA = re.compile(r"\.lora_[ab]$")


def weights_hint(model: nn.Module) -> str:
    return getattr(getattr(model, "backbone", model), "weights_hint", "")


def is_dinov3(state: dict[str, Tensor]) -> bool:
    """Whether a state dict is of a DINOv3 alone, as upstream, timm or DEIMv2 write it."""
    return any(key in state for name in REGISTERS for key in (name, f"dinov3.{name}"))


def load_dinov3(model: nn.Module, source: str | Path | dict, name: str = "state dict") -> None:
    """Load DINOv3 weights into a backbone in place: Meta's, timm's, or DEIMv2's with its adapter.

    Without the adapter's weights the adapter stays as it is, and so do low-rank updates. Blocks
    above the model's are left out, and so is what follows from settings (rotation periods, the
    mask of the keys' bias).

    Args:
        model: a :class:`DINOv3`, or a detector with that backbone.
        source: path of a ``.pth`` or ``.safetensors`` file, or a state dict.
        name: what errors call a state dict.

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
    for module, state in wanted:
        known = module.state_dict()
        unknown = sorted(state.keys() - known.keys())
        missing = sorted(k for k in known.keys() - state.keys() if not LORA.search(k))
        wrong = sorted(k for k in known.keys() & state.keys() if known[k].shape != state[k].shape)
        if unknown or missing or wrong:
            raise ValueError(
                f"{name} does not fit the {type(module).__name__} of the model: "
                f"{len(unknown)} keys without a place {unknown[:5]}, "
                f"{len(missing)} parameters without a key {missing[:5]}, "
                f"{len(wrong)} of another shape {wrong[:5]}"
            )
    for _, state in wanted:
        check_finite(state, name)
    for module, state in wanted:
        module.load_state_dict(state, strict=False)

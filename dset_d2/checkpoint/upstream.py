"""Released RT-DETR, RT-DETRv2 and D-FINE weights, under whatever names, into our models."""

import logging
import re
from pathlib import Path

from torch import Tensor, nn

from .dinov3 import DEIMV2_DETECTOR, is_dinov3, load_dinov3, weights_hint
from .experts import check_upcycling, upcycle_ffns, warn_of_keys
from .reading import check_finite, read_state_dict, unwrap

logger = logging.getLogger(__name__)

# Upstream's entries that follow from sizes and settings, or repeat others; here they are computed.
COMPUTED = re.compile(
    r"(^|\.)(anchors|valid_mask|num_points_scale|pos_embed\d*|project)$"
    r"|^decoder\.decoder\.(up|reg_scale)$"
)
# What a checkpoint may lack, or hold for nothing: counters, of which frozen norms have none
# upstream, and D-FINE's bins, which other implementations take from their settings.
OPTIONAL = re.compile(r"\.num_batches_tracked$|^decoder\.distribution\.(up|reg_scale)$")

# Older or other upstream names of the same parameters.
RENAMES = (
    # An FFN is a module of its own here.
    (re.compile(r"(\.layers\.\d+)\.(linear[12])\."), r"\1.ffn.\2."),
    # RT-DETR v1 numbers what v2 names.
    (re.compile(r"^((?:encoder|decoder)\.input_proj\.\d+)\.0\."), r"\1.conv."),
    (re.compile(r"^((?:encoder|decoder)\.input_proj\.\d+)\.1\."), r"\1.norm."),
    (re.compile(r"^decoder\.enc_output\.0\."), "decoder.enc_output.proj."),
    (re.compile(r"^decoder\.enc_output\.1\."), "decoder.enc_output.norm."),
    (re.compile(r"^decoder\.(up|reg_scale)$"), r"decoder.distribution.\1"),
    # RT-DETR's HGNetv2 has its padding inside, and other names than D-FINE's.
    (re.compile(r"(\.stem2[ab]\.conv)\.1\."), r"\1."),
    (re.compile(r"\.aggregation_squeeze_conv\."), ".aggregation.0."),
    (re.compile(r"\.aggregation_excitation_conv\."), ".aggregation.1."),
)

# What depends on the number of classes and may start anew for another data set.
CLASS_HEADS = re.compile(r"^decoder\.(enc_score_head|dec_score_head\.\d+|denoising_class_embed)\.")


def rename(key: str) -> str:
    for pattern, replacement in RENAMES:
        key = pattern.sub(replacement, key)
    return key


def load_upstream(model: nn.Module, source: str | Path | dict, whole: bool = False) -> None:
    """Load released RT-DETR, RT-DETRv2 or D-FINE weights, or those of a run of ours, in place.

    A state dict whose keys all belong to the backbone (an ImageNet model) goes there alone, and
    so do a DINOv3's (:func:`load_dinov3`). Class heads of another number of classes keep their
    fresh initialisation, with a warning. A run's count of training steps comes with its weights.

    Args:
        model: a :class:`DETRDetector`.
        source: path of a checkpoint, or a state dict (also one wrapped as upstream does).
        whole: nothing of the model may stay fresh, as for evaluation.

    Raises:
        ValueError: on a key or shape that has no place in the model, or on a parameter of the
            model that the checkpoint lacks.
    """
    if isinstance(source, dict):
        state, name = unwrap(source, "state dict"), "state dict"
    else:
        state, name = read_state_dict(source, weights_hint(model)), str(source)
    if is_dinov3(state):
        if whole:
            raise ValueError(f"{name} holds a backbone alone")
        load_dinov3(model, state, name)
        return
    state = translate(model, state, name, backbone_alone=not whole)
    known = model.state_dict()
    if not whole and all(key.startswith("backbone.") for key in state):
        known = {key: value for key, value in known.items() if key.startswith("backbone.")}
    unknown = sorted(required(state) - known.keys())
    missing = sorted(required(known) - state.keys() - {"clock.steps"})
    if unknown or missing:
        raise ValueError(
            f"{name} does not fit the model: "
            f"{len(unknown)} keys without a place {unknown[:5]}, "
            f"{len(missing)} parameters without a key {missing[:5]}"
        )
    wanted = {key: value for key, value in known.items() if key in state}
    resized = [k for k in wanted if state[k].shape != wanted[k].shape]
    wrong = [k for k in resized if whole or not CLASS_HEADS.match(k)]
    if wrong:
        shapes = f"{tuple(state[wrong[0]].shape)}, the model's {tuple(wanted[wrong[0]].shape)}"
        raise ValueError(f"{name} does not fit the model: {wrong[0]} has shape {shapes}")
    if resized:
        logger.warning("%s: another number of classes; left fresh: %s", name, ", ".join(resized))
    fitting = {k: state[k] for k in wanted if k not in resized}
    check_finite(fitting, name)
    model.load_state_dict(fitting, strict=False)


def load_initial(model: nn.Module, path: str | Path, upcycling: str = "auto") -> None:
    """Load whatever fits of a checkpoint, for a new run to start from: as :func:`load_upstream`,
    but what does not fit stays fresh, with warnings.

    Experts start from the dense FFN that a checkpoint has in their place. The count of training
    steps starts anew, and all schedules with it.

    Args:
        upcycling: how experts start from a dense FFN: a construction of
            :func:`~dset_d2.modeling.sparse.upcycling.upcycle` or "auto"; "none" leaves them
            fresh.

    Raises:
        ValueError: if no parameter fits, or one is not finite; if the upcycling that is asked for
            does not fit the experts.
    """
    check_upcycling(upcycling)
    state, name = read_state_dict(path, weights_hint(model)), str(path)
    if DEIMV2_DETECTOR in state:
        logger.warning("%s: of this DEIMv2 detector the backbone alone is taken", name)
        backbone = (key for key in state if key.startswith("backbone."))
        state = {key.removeprefix("backbone."): state[key] for key in backbone}
    if is_dinov3(state):
        load_dinov3(model, state, name, adapter_optional=True, upcycling=upcycling)
        return
    state = translate(model, state, name)
    state.pop("clock.steps", None)
    state = upcycle_ffns(model, state, name, upcycling)
    known = model.state_dict()
    fitting = {k: v for k, v in state.items() if k in known and v.shape == known[k].shape}
    parameters = {key for key, _ in model.named_parameters()}
    if not parameters & fitting.keys():
        raise ValueError(f"{name}: none of its parameters fits the model")
    check_finite(fitting, name)
    warn_of_keys(name, "of the model's parameters stay fresh", parameters - fitting.keys())
    unplaced = required(state) - fitting.keys()
    warn_of_keys(name, "of its keys have no place in the model", unplaced)
    model.load_state_dict(fitting, strict=False)


def translate(
    model: nn.Module, state: dict[str, Tensor], name: str, backbone_alone: bool = True
) -> dict[str, Tensor]:
    """A state dict under our names, without what is computed here.

    Args:
        backbone_alone: if all keys are of a backbone, they are the model's backbone's.
    """
    state = {rename(key): value for key, value in state.items() if not COMPUTED.search(key)}
    for key in [k for k in state if k.endswith((".up", ".reg_scale")) and not (state[k] > 0).all()]:
        logger.warning("%s: %s must be positive; the config's stays", name, key)
        del state[key]
    backbone = getattr(model, "backbone", None) if backbone_alone else None
    if backbone is not None and required(state) <= backbone.state_dict().keys():
        return {f"backbone.{key}": value for key, value in state.items()}
    return state


def required(state: dict[str, Tensor]) -> set[str]:
    return {key for key in state if not OPTIONAL.search(key)}

"""State dicts out of checkpoint files, without running code that a file may hold."""

from pathlib import Path

import torch
from detectron2.utils.file_io import PathManager
from safetensors.torch import load_file
from torch import Tensor

from ..config import nearest


def read_state_dict(path: str | Path, hint: str = "") -> dict[str, Tensor]:
    """Read the weights of an upstream or Detectron2 checkpoint, the averaged ones if it has any.

    Nothing is unpickled but tensors and plain containers; ``.safetensors`` files hold no more.

    Args:
        path: a file, or an address that Detectron2 fetches.
        hint: where to get the file, for the error that it is not there.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint or holds no state dict.
    """
    file = Path(PathManager.get_local_path(str(path)))
    if file.is_dir():
        found = sorted(file.glob("*.pth"))
        best = [f for f in found if f.name == "model_best.pth"] or found[-1:]
        which = f"; did you mean {best[0]}?" if best else ""
        raise ValueError(f"{path}: a folder, not a checkpoint{which}")
    if not file.is_file():
        beside = [f.name for f in file.parent.glob("*") if f.suffix in (".pth", ".safetensors")]
        hint = hint and f"; {hint}"
        raise FileNotFoundError(f"{path}: no such checkpoint{nearest(file.name, beside)}{hint}")
    with open(file, "rb") as opened:
        start = opened.read(100).lstrip()
    if start.startswith(b"<"):
        raise ValueError(f"{path}: a web page, not a checkpoint; download the file behind it")
    try:
        if file.suffix == ".safetensors":
            checkpoint = load_file(file)
        else:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a checkpoint that is safe to read: {reason}") from error
    return unwrap(checkpoint, str(path))


def unwrap(checkpoint: dict, source: str) -> dict[str, Tensor]:
    """The state dict inside of a checkpoint: ``ema.module``, else ``model``, else itself."""
    state = checkpoint
    for keys in (("ema", "module"), ("ema",), ("model",)):
        inner = checkpoint
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and inner:
            state = inner
            break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{source}: holds no state dict under ema.module, model or at its top")
    return {key.removeprefix("module."): value for key, value in state.items()}


def check_finite(state: dict[str, Tensor], source: str) -> None:
    """Raise a ``ValueError`` if a value that is to be loaded is not a number or has no end."""
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{source}: {key} is not finite")

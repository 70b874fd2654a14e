"""What the tools that compare configs share."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from ..config import apply_overrides, load_config
from ..files import write_atomically


class UsageError(Exception):
    """The command line asks for what cannot be had; the message says why."""


def load_configs(paths: list[str], overrides: list[str]) -> dict[str, DictConfig]:
    """Configs by their files' names, numbered where these repeat; all with the overrides."""
    configs = {}
    seen = Counter()
    for path in paths:
        name = Path(path).stem
        seen[name] += 1
        label = name if seen[name] == 1 else f"{name} ({seen[name]})"
        try:
            configs[label] = apply_overrides(load_config(path), overrides)
        except (FileNotFoundError, KeyError) as error:
            raise UsageError(f"{path}: {error.args[0]}") from error
    return configs


def build_model(cfg: DictConfig, device: str) -> nn.Module:
    """The config's model for inference, with random weights."""
    return instantiate(cfg.model).to(device).eval()


def noise_image(height: int, width: int, seed: int) -> torch.Tensor:
    """(3, height, width) uint8 of numpy's noise, which stands for no real image."""
    noise = np.random.default_rng(seed).integers(256, size=(3, height, width), dtype=np.uint8)
    return torch.from_numpy(noise)


def describe_device(device: str) -> str:
    """The hardware that a time was measured on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def write_json(path: Path, content: dict | list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))

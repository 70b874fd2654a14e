"""What a subject has done with items under settings: each ran once, and is remembered."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..files import write_atomically
from .latency_table import LatencyTable
from .subject import Subject


class Outcomes:
    """Qualities of N items under S settings in T tiers, executed when they are asked for.

    Args:
        table: of the subject; its settings are those that can be chosen.
        file: where they are kept from one run to the next; None: nowhere.
        keep: also keep what the subject put out, in memory.

    Attributes:
        known: (N, K).
        features: (N, T, D), NaN where no first stage was run.
        quality: (N, S), NaN where a setting was not run.
        p50, p95: (N, S) milliseconds, of the table.
        outputs: by item and setting, if they are kept.
    """

    def __init__(
        self,
        subject: Subject,
        items: Sequence[Any],
        table: LatencyTable,
        file: Path | None = None,
        keep: bool = False,
    ) -> None:
        table.check(subject)
        self.subject, self.items, self.table, self.file = subject, items, table, file
        self.space = table.space
        self.known = torch.stack([subject.known(item).float() for item in items])
        times = [table.of(subject, item) for item in items]
        self.p50 = torch.stack([p50 for p50, _ in times])
        self.p95 = torch.stack([p95 for _, p95 in times])
        self.quality = torch.full((len(items), len(self.space)), torch.nan)
        self.features: Tensor | None = None
        self.outputs: dict[tuple[int, int], Any] | None = {} if keep else None
        if file is not None and file.exists():
            self.load(file)

    def run(self, items: Tensor, settings: Tensor) -> Tensor:
        """The qualities (n,) of the items (n,) under the settings (n,)."""
        wanted: dict[tuple[int, int], list[int]] = {}
        for item, setting in self.missing(items, settings):
            wanted.setdefault((item, int(self.space.tier_of[setting])), []).append(setting)
        for (item, tier), together in wanted.items():  # one first stage for all of a tier
            state = self.begin(item, tier)
            for setting in together:
                output = self.subject.finish(state, self.space.settings[setting])
                self.quality[item, setting] = self.subject.quality(output, self.items[item])
                if self.outputs is not None:
                    self.outputs[item, setting] = output
        return self.quality[items, settings]

    def missing(self, items: Tensor, settings: Tensor) -> list[tuple[int, int]]:
        """Which of the pairs have not run yet, or not in this process if outputs are kept."""
        if self.outputs is None:
            unknown = self.quality[items, settings].isnan()
            items, settings = items[unknown], settings[unknown]
        pairs = dict.fromkeys(zip(items.tolist(), settings.tolist()))
        return [pair for pair in pairs if self.outputs is None or pair not in self.outputs]

    def begin(self, item: int, tier: int) -> Any:
        """An item behind the first stage, whose features are kept."""
        state = self.subject.begin(self.items[item], self.space.first(tier))
        if self.features is None:
            shape = (len(self.items), len(self.space.tiers), len(state.features))
            self.features = torch.full(shape, torch.nan)
        self.features[item, tier] = state.features
        return state

    def look(self, items: Tensor) -> Tensor:
        """The features (n, T, D) of items behind the first stage of every tier."""
        items_here = items.unique()
        if self.features is None:
            self.begin(int(items_here[0]), 0)
        missing = self.features[items_here].isnan().any(2).nonzero()
        for index, tier in missing.tolist():
            self.begin(int(items_here[index]), tier)
        assert self.features is not None
        return self.features[items]

    def run_all(self, save_every: int = 50) -> "Outcomes":
        """All items under all settings."""
        settings = torch.arange(len(self.space))
        bar = tqdm(range(len(self.items)), desc="running settings", leave=False, disable=None)
        for item in bar:
            self.run(torch.full_like(settings, item), settings)
            if item % save_every == save_every - 1:
                self.save()
        self.save()
        return self

    def mean_quality(self) -> Tensor:
        """(S,) means over the items that ran; 0 where none did."""
        return self.quality.nanmean(0).nan_to_num(0.0)

    def save(self) -> None:
        if self.file is None:
            return
        content: dict[str, Any] = {"quality": self.quality.numpy(), "labels": self.label()}
        if self.features is not None:
            content["features"] = self.features.numpy()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, lambda file: np.savez(file, **content))

    def load(self, file: Path) -> None:
        with np.load(file) as content:
            if content["labels"].tolist() != self.label().tolist():
                raise ValueError(f"{file}: holds outcomes of other items or settings")
            self.quality = torch.from_numpy(content["quality"])
            if "features" in content:
                self.features = torch.from_numpy(content["features"])

    def label(self) -> np.ndarray:
        """What outcomes are of."""
        known = self.known.double().sum().item()
        return np.array([self.subject.fingerprint(), str(self.space.settings), f"{known:.6f}"])

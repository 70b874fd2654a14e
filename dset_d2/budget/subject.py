"""What the latency table, the controllers and GRPO work on, whatever model it is."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor

Setting = Mapping[str, Any]  # a number for each knob, by the knobs' names
Key = tuple[tuple[str, Any], ...]


class State(Protocol):
    """What the first stage leaves; ``features`` is (D,) float."""

    @property
    def features(self) -> Tensor: ...


class Subject(Protocol):
    """A model that runs in two stages under settings of its knobs."""

    @property
    def settings(self) -> Sequence[Setting]:
        """All that can be chosen, the full one first; all have the same knobs."""

    @property
    def tier(self) -> str:
        """The knob that is chosen before the first stage, such as the input's resolution."""

    @property
    def device(self) -> str:
        """That it runs on."""

    def fingerprint(self) -> str:
        """The same for models that take the same time."""

    def describe(self) -> dict:
        """What JSON can hold of how this subject is made of its model."""

    def known(self, item: Any) -> Tensor:
        """(K,) float: what is known of an item before the first stage, for free."""

    def shape(self, item: Any, setting: Setting) -> str:
        """What decides the time beside the knobs other than the tier: ``1x3x544x960``."""

    def begin(self, item: Any, setting: Setting) -> State:
        """The first stage, for which only the setting's tier counts."""

    def finish(self, state: Any, setting: Setting) -> Any:
        """The rest, by the other knobs; may follow a first stage more than once."""

    def quality(self, output: Any, item: Any) -> float:
        """In [0, 1]."""


def key_of(setting: Setting) -> Key:
    """A setting as what dicts can be looked up by."""
    return tuple(sorted(setting.items()))


def grid(choices: Mapping[str, Sequence]) -> list[dict]:
    """All settings of the values of each knob, the largest values first."""
    values = [sorted(set(given), reverse=True) for given in choices.values()]
    return [dict(zip(choices, chosen)) for chosen in product(*values)]


class Space:
    """The settings that a controller chooses among, S in T tiers.

    Attributes:
        tiers: values of the tier's knob, the full setting's first.
        tier_of: (S,) index of each setting's tier.
        complexity: (S,) mean share of the full setting's values, in [0, 1].
    """

    def __init__(self, settings: Sequence[Setting], tier: str) -> None:
        if not settings or any(set(s) != set(settings[0]) or tier not in s for s in settings):
            raise ValueError(f"settings must all have the same knobs, {tier!r} among them")
        self.settings = [dict(setting) for setting in settings]
        self.tier = tier
        self.tiers = list(dict.fromkeys(setting[tier] for setting in settings))
        self.tier_of = torch.tensor([self.tiers.index(setting[tier]) for setting in settings])
        values = torch.tensor([list(map(float, s.values())) for s in self.settings])
        self.complexity = (values / values[0]).mean(1)
        self.members = self.tier_of == torch.arange(len(self.tiers))[:, None]  # (T, S)

    def __len__(self) -> int:
        return len(self.settings)

    def first(self, tier: int) -> Setting:
        """A setting of a tier, for first stages, to which the rest of it does not matter."""
        return self.settings[int(self.members[tier].nonzero()[0])]

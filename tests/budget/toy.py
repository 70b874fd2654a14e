"""A subject whose best choices are known: hard items need the slow settings, easy ones do not."""

from typing import NamedTuple

import torch
from torch import Tensor

from dset_d2.budget import LatencyTable, Outcomes, grid, key_of
from dset_d2.budget.latency_table import Times, surroundings

# Milliseconds by (size, depth); the table has 5 % more at p95.
COST = {(2, 2): 40.0, (2, 1): 24.0, (1, 2): 20.0, (1, 1): 10.0}


class Item(NamedTuple):
    """``small``: what is in it needs the large input; ``hard``: needs the deep model."""

    small: bool
    hard: bool


class State(NamedTuple):
    features: Tensor
    size: int


class Toy:
    """Quality falls by .4 where an item lacks the size or the depth that it needs. What is small
    is known at once, what is hard shows behind the first stage."""

    tier, device = "size", "cpu"
    settings = grid({"size": (2, 1), "depth": (2, 1)})

    def __init__(self) -> None:
        self.begun = self.finished = 0

    def fingerprint(self) -> str:
        return "toy"

    def describe(self) -> dict:
        return {}

    def known(self, item: Item) -> Tensor:
        return torch.tensor([float(item.small), 0.5])

    def shape(self, item: Item, setting) -> str:
        return f"1x3x{setting['size']}x1"

    def begin(self, item: Item, setting) -> State:
        self.begun += 1
        return State(torch.tensor([float(item.hard), setting["size"] / 10, 0.1]), setting["size"])

    def finish(self, state: State, setting) -> tuple[int, int]:
        assert state.size == setting["size"]
        self.finished += 1
        return setting["size"], setting["depth"]

    def quality(self, output: tuple[int, int], item: Item) -> float:
        size, depth = output
        return 1 - 0.4 * (item.small and size < 2) - 0.4 * (item.hard and depth < 2)


def table(subject: Toy | None = None) -> LatencyTable:
    times = {
        (f"1x3x{size}x1", key_of({"depth": depth})): Times(cost, 1.05 * cost)
        for (size, depth), cost in COST.items()
    }
    about = surroundings(subject or Toy())
    return LatencyTable(about, [dict(s) for s in Toy.settings], Toy.tier, times)


def outcomes(subject: Toy | None = None, count: int = 64, **options) -> Outcomes:
    subject = subject or Toy()
    items = [Item(bool(index & 1), bool(index & 2)) for index in range(count)]
    return Outcomes(subject, items, table(subject), **options)


def optimum(found: Outcomes, budget: float) -> Tensor:
    """(N,) the best feasible quality of each item that ran under all settings."""
    return found.quality.masked_fill(found.p95 > budget, -1).amax(1)

"""Experts of the hidden units of a trained FFN that are active together (MoEfication,
https://arxiv.org/abs/2110.01786), so that a token needs some of them only.

Most hidden units of a trained ReLU network add nothing to most tokens. Units that are active on the
same tokens are put into one group, all groups being equally large, and a router learns by linear
regression how much each group is going to add. The outputs of the chosen groups are summed: with
all groups the FFN is equalled, with k of E it costs k / E of the FFN.

Here two units are active together by how often and how strongly they are: by the sum over tokens
of the product of what each adds to the output, the size of its activation times that of its output
weights. Where a ReLU does not fire this is 0; for other activations, which are never quite 0, it
needs no threshold.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..context import current
from .moe import MoE
from .upcycling import FFNWeights, split_units, take_units

TOKENS = 16384  # at most, of each FFN
CHUNK = 1024  # tokens whose hidden units are held at a time
BLOCK = 512  # units that change places at a time: the assignment takes the third power of it
PASSES = 3  # over all blocks, in each round
ROUNDS = 20
TRIALS = 8  # for each seed
RIDGE = 1e-3  # of the inputs' mean variance


def capture_inputs(
    ffns: Mapping[str, nn.Linear], calibration: Callable[[], object], tokens: int = TOKENS
) -> dict[str, Tensor]:
    """Inputs (T, dim) that FFNs get while a function runs their model, in random order.

    Args:
        ffns: the first layer of each.
        calibration: runs the model on some images, as often as it likes.
        tokens: of more than so many a random choice is kept; padding is left out where the model
            says what is padding.

    Raises:
        ValueError: if one of the FFNs is not run.
    """
    generator = torch.Generator().manual_seed(0)
    kept: dict[str, tuple[Tensor, Tensor]] = {}  # with a random number each, of which the least

    def keep(name: str, x: Tensor) -> None:
        where = current().tokens
        rows = x.detach().flatten(0, -2)
        if where is not None and where.valid is not None:
            rows = rows[where.valid.flatten()]
        keys = torch.rand(len(rows), generator=generator)
        if name in kept:
            keys, rows = torch.cat([kept[name][0], keys]), torch.cat([kept[name][1], rows])
        order = keys.argsort()[:tokens]
        kept[name] = keys[order], rows[order.to(rows.device)]

    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        for name, linear in ffns.items()
    ]
    try:
        with torch.no_grad():
            calibration()
    finally:
        for hook in hooks:
            hook.remove()
    idle = [name for name in ffns if name not in kept or not len(kept[name][1])]
    if idle:
        raise ValueError(f"calibration runs no token through {', '.join(idle)}")
    return {name: rows.float() for name, (_, rows) in kept.items()}


def hidden_units(ffn: FFNWeights, act: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Activations (t, hidden) of the hidden units for tokens (T, dim), some of them at a time."""
    for rows in x.split(CHUNK):
        yield act(F.linear(rows, ffn.w1.float(), ffn.b1.float()))


def contributions(ffn: FFNWeights, act: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """How much each hidden unit adds to the output: (t, hidden), none negative."""
    size = ffn.w2.float().norm(dim=0)
    return (hidden.abs() * size for hidden in hidden_units(ffn, act, x))


@torch.no_grad()
def split_by_coactivation(ffn: FFNWeights, act: nn.Module, x: Tensor, num_groups: int) -> Tensor:
    """(num_groups, d) indices of hidden units that are active together on tokens x (T, dim).

    Raises:
        ValueError: if the groups cannot be equally large.
    """
    hidden = len(ffn.w1)
    if hidden % num_groups:
        raise ValueError(f"{hidden} hidden units cannot be divided by num_experts={num_groups}")
    products = torch.zeros(hidden, hidden, device=x.device)
    for added in contributions(ffn, act, x):
        products += added.T @ added
    return balanced_groups(products.cpu(), num_groups)


def balanced_groups(products: Tensor, num_groups: int) -> Tensor:
    """k-means of vectors of which only the inner products (n, n) are known, into equally large
    groups: (num_groups, n / num_groups) indices, rising within a group.

    The start is k-means++'s, from a fixed seed. A round assigns the vectors to the groups' means
    at the least sum of squared distances; of more than ``BLOCK`` vectors so many at a time change
    places with each other. No round can raise the sum, and the rounds end when it stays.
    """
    generator = torch.Generator().manual_seed(0)
    count = len(products)
    squares = products.diagonal()
    owner = torch.arange(count) // (count // num_groups)
    seeds = spread_seeds(products, num_groups, generator)
    distances = squares[:, None] - 2 * products[:, seeds] + squares[seeds]
    last = torch.inf
    for _ in range(ROUNDS):
        for _ in range(PASSES if count > BLOCK else 1):
            for rows in torch.randperm(count, generator=generator).split(BLOCK):
                places = owner[rows]
                _, order = linear_sum_assignment(distances[rows][:, places].numpy())
                owner[rows] = places[torch.from_numpy(order)]
        members = F.one_hot(owner, num_groups).to(products) / (count // num_groups)
        means = products @ members
        distances = squares[:, None] - 2 * means + (members * means).sum(0)
        total = float(distances.gather(1, owner[:, None]).sum())
        if total >= last * (1 - 1e-4):
            break
        last = total
    return owner.argsort(stable=True).view(num_groups, -1)


def spread_seeds(products: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Greedy k-means++: of some vectors that are drawn by their squared distance from the seeds
    before, the one that leaves the least of these distances."""
    squares = products.diagonal()
    seeds = [int(squares.argmax())]
    nearest = (squares - 2 * products[seeds[0]] + squares[seeds[0]]).clamp(min=0)
    while len(seeds) < count:
        # Equal vectors can be drawn, too.
        drawn = torch.multinomial(nearest.double() + 1e-30, min(TRIALS, count), generator=generator)
        distances = squares - 2 * products[drawn] + squares[drawn, None]  # (trials, n)
        distances = distances.clamp(min=0).minimum(nearest)
        best = int(distances.sum(1).argmin())
        seeds.append(int(drawn[best]))
        nearest = distances[best]
    return seeds


@torch.no_grad()
def fit_router(ffn: FFNWeights, act: nn.Module, x: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (E, dim) and bias (E,) of a router whose logits say what each group (E, d) of hidden
    units adds, by linear regression on tokens (T, dim).

    All are moved and scaled alike, which changes no choice, to a mean of 0 and a variance of 1.
    """
    added = [each[:, units].sum(-1) for each in contributions(ffn, act, x)]
    wanted, inputs = torch.cat(added).double(), x.double()
    mean = inputs.mean(0)
    centred = inputs - mean
    moments = centred.T @ centred
    moments.diagonal().add_(RIDGE * moments.diagonal().mean() + 1e-30)
    weight = torch.linalg.solve(moments, centred.T @ (wanted - wanted.mean(0))).T
    bias = wanted.mean(0) - weight @ mean
    weight, bias = weight - weight.mean(0), bias - bias.mean()
    scale = (inputs @ weight.T + bias).std().clamp(min=1e-30)
    return (weight / scale).float(), (bias / scale).float()


def initialize_from_coactivation(moe: MoE, ffn: FFNWeights, x: Tensor) -> None:
    """Start experts, whose outputs are summed, and their router from the units of a dense FFN that
    are active together on tokens (T, dim), in place.

    Raises:
        ValueError: if the experts are of another kind or width, or the width does not divide.
    """
    config = moe.config
    if config.combine != "sum":
        raise ValueError(f"a split by co-activation needs combine='sum', not {config.combine!r}")
    units = split_by_coactivation(ffn, moe.experts.act, x, config.num_experts)
    if units.shape[1] != moe.experts.w1.shape[1]:
        raise ValueError(
            f"{config.num_experts} experts from {len(ffn.w1)} hidden units need "
            f"expert_dim={units.shape[1]}, not {moe.experts.w1.shape[1]}"
        )
    weight, bias = fit_router(ffn, moe.experts.act, x, units)
    experts = take_units(ffn, units, config)._asdict()
    state = {f"experts.{name}": value for name, value in experts.items()}
    moe.load_state_dict(state | {"router.weight": weight, "router.bias": bias})


class SplitReport(NamedTuple):
    """What splits of an FFN into groups of hidden units are worth.

    Attributes:
        firing: share of the hidden units that fire for some token: whose activation is above 0 of
            a ReLU, above the mean size of the layer's activations for others.
        firing_per_token: share of the hidden units that fire, over tokens.
        errors: by the kind of split, the relative error of the FFN's output with 1, 2, ... of the
            groups, chosen by a router.
    """

    firing: float
    firing_per_token: float
    errors: dict[str, list[float]]


@torch.no_grad()
def report_splits(ffn: FFNWeights, act: nn.Module, x: Tensor, num_groups: int) -> SplitReport:
    """Compare a split by co-activation with a random one and one in order, each with a router of
    its own: they are made by the first half of the tokens (T, dim), and tried on the second."""
    seen, unseen = x.tensor_split(2)
    hidden = len(ffn.w1)
    splits = {
        "coactivation": split_by_coactivation(ffn, act, seen, num_groups),
        "random": torch.randperm(hidden, generator=torch.Generator().manual_seed(0)),
        "order": split_units(ffn, num_groups, hidden // num_groups),
    }
    errors = {
        name: routed_errors(ffn, act, seen, unseen, units.view(num_groups, -1))
        for name, units in splits.items()
    }
    threshold = 0.0
    if not isinstance(act, nn.ReLU):
        sizes = sum(float(h.abs().sum()) for h in hidden_units(ffn, act, x))
        threshold = sizes / (len(x) * hidden)
    fired = torch.zeros(hidden, device=x.device)  # tokens, by unit
    for activations in hidden_units(ffn, act, x):
        fired += (activations.abs() > threshold).sum(0)
    firing = float((fired > 0).float().mean())
    return SplitReport(firing, float(fired.mean()) / len(x), errors)


def routed_errors(
    ffn: FFNWeights, act: nn.Module, seen: Tensor, unseen: Tensor, units: Tensor
) -> list[float]:
    """The relative error of an FFN's output with 1, 2, ... of groups (E, d) of its hidden units,
    chosen by a router that other tokens have taught."""
    weight, bias = fit_router(ffn, act, seen, units)
    w2 = ffn.w2.float()[:, units].permute(1, 2, 0)  # (E, d, dim)
    wrong, whole = unseen.new_zeros(len(units)), unseen.new_zeros(())
    for rows, hidden in zip(unseen.split(CHUNK), hidden_units(ffn, act, unseen)):
        parts = torch.einsum("ted,edc->tec", hidden[:, units], w2)
        order = F.linear(rows, weight, bias).argsort(1, descending=True)
        sums = parts.gather(1, order[..., None].expand_as(parts)).cumsum(1)
        output = sums[:, -1:] + ffn.b2.float()
        wrong += (sums - sums[:, -1:]).square().sum((0, 2))
        whole += output.square().sum()
    return (wrong / whole).sqrt().tolist()

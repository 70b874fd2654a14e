"""Who chooses a setting: the tier before the first stage, the rest from what that stage sees.

All choose among what is feasible, by scores (N, T) of the T tiers and (N, S) of the S settings.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..analysis.latency import synchronised_time
from ..files import write_atomically
from .latency_table import LatencyTable
from .outcomes import Outcomes
from .subject import Space, Subject

RIDGES = 10.0 ** torch.arange(-1, 6)  # strengths of regularisation that are tried


def feasible_settings(p95: Tensor, budget: Tensor) -> Tensor:
    """(N, S) bool: what fits the budgets (N,), by p95 (N, S); the fastest setting in any case."""
    fastest = p95.argmin(1, keepdim=True) == torch.arange(p95.shape[1])
    return (p95 <= budget[:, None]) | fastest


def oracle(quality: Tensor, p50: Tensor, feasible: Tensor) -> Tensor:
    """(N,) the settings of the best quality (N, S), of equally good ones the fastest: what no
    controller can surpass."""
    best = quality.masked_fill(~feasible, -torch.inf).amax(1, keepdim=True)
    good = feasible & (quality >= best - 1e-6)
    return p50.masked_fill(~good, torch.inf).argmin(1)


def matched_random(chosen: Tensor, p95: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) the same settings as are chosen (N,), shuffled over the items: what the mix alone does.

    Only items that take the same times (N, S) swap theirs, so that budgets hold.
    """
    _, group = p95.unique(dim=0, return_inverse=True)
    shuffled = chosen.clone()
    for index in range(int(group.max()) + 1):
        members = (group == index).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        shuffled[members] = chosen[members[order]]
    return shuffled


class Controller(nn.Module):
    """Chooses settings for N items at once; a subclass gives the scores.

    Args:
        space: of the settings.
    """

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.space = space

    def tier_scores(self, known: Tensor, budget: Tensor, feasible: Tensor) -> Tensor:
        """(N, T) of what is known (N, K), under budgets (N,) and what these leave (N, S) bool."""
        raise NotImplementedError

    def setting_scores(
        self, features: Tensor, tier: Tensor, budget: Tensor, feasible: Tensor
    ) -> Tensor:
        """(N, S) of features (N, D) behind the first stage of tiers (N,); those of other tiers
        count for nothing."""
        raise NotImplementedError

    @torch.no_grad()
    def choose_tier(self, known: Tensor, budget: Tensor, feasible: Tensor) -> Tensor:
        """(N,) tiers, of those in which something is feasible."""
        scores = self.tier_scores(known, budget, feasible)
        return scores.masked_fill(~self.open_tiers(feasible), -torch.inf).argmax(1)

    @torch.no_grad()
    def choose(self, features: Tensor, tier: Tensor, budget: Tensor, feasible: Tensor) -> Tensor:
        """(N,) settings, of the feasible ones of these tiers."""
        scores = self.setting_scores(features, tier, budget, feasible)
        allowed = feasible & self.space.members[tier]
        return scores.masked_fill(~allowed, -torch.inf).argmax(1)

    def decide(self, outcomes: Outcomes, items: Tensor, budget: Tensor) -> Tensor:
        """(n,) settings for items (n,) whose first stages need not be run again."""
        feasible = feasible_settings(outcomes.p95[items], budget)
        tier = self.choose_tier(outcomes.known[items], budget, feasible)
        features = outcomes.look(items)[torch.arange(len(items)), tier]
        return self.choose(features, tier, budget, feasible)

    def open_tiers(self, feasible: Tensor) -> Tensor:
        """(N, S) -> (N, T) bool: where something is feasible."""
        return (feasible[:, None] & self.space.members).any(2)

    def best_of_tiers(self, scores: Tensor, feasible: Tensor) -> Tensor:
        """(N, S) -> (N, T): of each tier the best feasible setting's."""
        allowed = feasible[:, None] & self.space.members
        return scores[:, None].masked_fill(~allowed, -torch.inf).amax(2)


class BestStatic(Controller):
    """One setting per budget, whatever the item: the best on the mean among those that fit.

    Args:
        quality: (S,) means over training items. Where none were run, latencies in their place say
            that slower is better.
    """

    def __init__(self, space: Space, quality: Tensor | None = None) -> None:
        super().__init__(space)
        self.register_buffer("quality", torch.zeros(len(space)) if quality is None else quality)

    @classmethod
    def fit(cls, outcomes: Outcomes) -> "BestStatic":
        return cls(outcomes.space, outcomes.mean_quality())

    def tier_scores(self, known: Tensor, budget: Tensor, feasible: Tensor) -> Tensor:
        return self.best_of_tiers(self.quality.expand(len(known), -1), feasible)

    def setting_scores(
        self, features: Tensor, tier: Tensor, budget: Tensor, feasible: Tensor
    ) -> Tensor:
        return self.quality.expand(len(features), -1)


class QualityRegression(Controller):
    """Takes what ridge regressions expect the best quality of.

    That of a tier is expected from what is known, those of its settings from its features.

    Args:
        known_dim, feature_dim: K and D.
    """

    def __init__(self, space: Space, known_dim: int, feature_dim: int) -> None:
        super().__init__(space)
        settings, tiers = len(space), len(space.tiers)
        self.register_buffer("from_known", torch.zeros(known_dim + 1, settings))
        self.register_buffer("from_features", torch.zeros(tiers, feature_dim + 1, settings))

    @classmethod
    def fit(cls, outcomes: Outcomes) -> "QualityRegression":
        """From items that ran under all settings."""
        items = torch.arange(len(outcomes.items))
        features = outcomes.look(items)
        regression = cls(outcomes.space, outcomes.known.shape[1], features.shape[2])
        regression.from_known = ridge(outcomes.known, outcomes.quality)
        weights = [ridge(x, outcomes.quality) for x in features.unbind(1)]
        regression.from_features = torch.stack(weights)
        return regression

    def tier_scores(self, known: Tensor, budget: Tensor, feasible: Tensor) -> Tensor:
        return self.best_of_tiers(with_one(known) @ self.from_known, feasible)

    def setting_scores(
        self, features: Tensor, tier: Tensor, budget: Tensor, feasible: Tensor
    ) -> Tensor:
        return torch.einsum("nd,nds->ns", with_one(features), self.from_features[tier])


def with_one(x: Tensor) -> Tensor:
    """(N, D) -> (N, D + 1), for a constant."""
    return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Linear regression of y (N, S) on standardised x (N, D): weights (D + 1, S), constants last.

    The strength of its regularisation, of :data:`RIDGES`, is the best at leaving one out.
    """
    x, y = x.double(), y.double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    level = y.mean(0)
    u, s, vt = torch.linalg.svd((x - mean) / scale, full_matrices=False)
    projected = u.T @ (y - level)  # (D, S)
    best, chosen = torch.inf, RIDGES[-1].double()
    for strength in RIDGES.double():
        shrink = s**2 / (s**2 + strength)
        residual = y - level - (u * shrink) @ projected
        leverage = (u**2 * shrink).sum(1) + 1 / len(x)
        error = float((residual / (1 - leverage).clamp(min=1e-6)[:, None]).square().mean())
        if error < best:
            best, chosen = error, strength
    weights = vt.T @ ((s / (s**2 + chosen))[:, None] * projected) / scale[:, None]
    return torch.cat([weights, (level - mean @ weights)[None]]).float()


class TwoStagePolicy(Controller):
    """Probabilities of the tiers, from what is known and the budget, and of each tier's settings,
    from the features behind its first stage and the budget.

    Two small networks change log probabilities that start where those of the best static setting
    are high, at every budget.

    Args:
        quality: (S,) as of :class:`BestStatic`.
        known_dim, feature_dim: K and D.
        trust: in the best static setting, as logits.
        hidden_dim: of the networks.
    """

    def __init__(
        self,
        space: Space,
        quality: Tensor,
        known_dim: int,
        feature_dim: int,
        trust: float = 3.0,
        hidden_dim: int = 64,
    ) -> None:
        super().__init__(space)
        self.static = BestStatic(space, quality)
        self.trust = trust
        tiers = len(space.tiers)
        for name, shape in (("known", (known_dim,)), ("features", (tiers, feature_dim))):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_scale", torch.ones(shape))
        self.register_buffer("budget_range", torch.tensor([0.0, 1.0]))  # of its logarithm
        self.tier_net = network(known_dim + 1, hidden_dim, tiers)
        self.setting_net = network(feature_dim + tiers + 1, hidden_dim, len(space))

    @classmethod
    def start(
        cls, outcomes: Outcomes, budgets: tuple[float, float], **settings
    ) -> "TwoStagePolicy":
        """As good as the best static setting.

        Args:
            budgets: the least and the largest that it is for, in milliseconds.
        """
        features = outcomes.look(torch.arange(len(outcomes.items)))
        dims = outcomes.known.shape[1], features.shape[2]
        policy = cls(outcomes.space, outcomes.mean_quality(), *dims, **settings)
        for name, x in (("known", outcomes.known), ("features", features)):
            getattr(policy, f"{name}_mean").copy_(x.mean(0))
            getattr(policy, f"{name}_scale").copy_(x.std(0).clamp(min=1e-6))
        policy.budget_range = torch.tensor(budgets).log()
        return policy

    def standard_budget(self, budget: Tensor) -> Tensor:
        """(N,) -> (N, 1): -1 at the least budget, 1 at the largest."""
        low, high = self.budget_range
        return (2 * (budget.log() - low) / (high - low).clamp(min=1e-6) - 1)[:, None]

    def tier_scores(self, known: Tensor, budget: Tensor, feasible: Tensor) -> Tensor:
        known = (known - self.known_mean) / self.known_scale
        logits = self.tier_net(torch.cat([known, self.standard_budget(budget)], dim=1))
        best = self.static.tier_scores(known, budget, feasible).argmax(1)
        return logits + self.trust * nn.functional.one_hot(best, logits.shape[1])

    def setting_scores(
        self, features: Tensor, tier: Tensor, budget: Tensor, feasible: Tensor
    ) -> Tensor:
        features = (features - self.features_mean[tier]) / self.features_scale[tier]
        which = nn.functional.one_hot(tier, len(self.space.tiers)).to(features)
        inputs = torch.cat([features, which, self.standard_budget(budget)], dim=1)
        logits = self.setting_net(inputs)
        best = self.static.choose(features, tier, budget, feasible)
        return logits + self.trust * nn.functional.one_hot(best, logits.shape[1])

    def log_probabilities(
        self, known: Tensor, features: Tensor, budget: Tensor, feasible: Tensor
    ) -> Tensor:
        """(N, S) of all settings, both decisions joined; -inf where they are not feasible.

        Args:
            features: (N, T, D) behind the first stages of all tiers.
        """
        tiers = self.tier_scores(known, budget, feasible)
        tiers = tiers.masked_fill(~self.open_tiers(feasible), -torch.inf).log_softmax(1)
        joined = torch.full(feasible.shape, -torch.inf)
        for index, members in enumerate(self.space.members):
            tier = torch.full((len(known),), index)
            scores = self.setting_scores(features[:, index], tier, budget, feasible & members)
            allowed = feasible & members
            # Where a tier has nothing, zeros keep its gradient from being undefined.
            scores = scores.masked_fill(~allowed, -torch.inf)
            scores = torch.where(allowed.any(1, keepdim=True), scores, torch.zeros_like(scores))
            inside = scores.log_softmax(1) + tiers[:, index : index + 1]
            joined = torch.where(allowed, inside, joined)
        return joined


def network(inputs: int, hidden_dim: int, outputs: int) -> nn.Sequential:
    """Two layers that put out zeros at first."""
    last = nn.Linear(hidden_dim, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, hidden_dim), nn.ReLU(), last)


class Execution(NamedTuple):
    """A run within a budget.

    Attributes:
        setting: its index in the table.
        milliseconds: measured, the choice included.
        expected: the table's p95 of the setting.
    """

    output: Any
    setting: int
    milliseconds: float
    expected: float


def run_within(
    subject: Subject,
    table: LatencyTable,
    controller: Controller | None,
    item: Any,
    budget_ms: float,
) -> Execution:
    """Run an item in two stages, each under what the controller chooses for it.

    Args:
        controller: None takes the slowest setting that fits.
    """
    start = synchronised_time()
    p50, p95 = table.of(subject, item)
    # Where nothing is known of qualities, what takes longer is taken for better.
    controller = controller or BestStatic(table.space, p50)
    budget = torch.tensor([budget_ms])
    feasible = feasible_settings(p95[None], budget)
    tier = controller.choose_tier(subject.known(item)[None], budget, feasible)
    state = subject.begin(item, table.space.first(int(tier)))
    index = int(controller.choose(state.features[None], tier, budget, feasible))
    output = subject.finish(state, table.settings[index])
    return Execution(output, index, 1e3 * (synchronised_time() - start), float(p95[index]))


CONTROLLERS = {kind.__name__: kind for kind in (BestStatic, QualityRegression, TwoStagePolicy)}


def save_controller(path: Path, controller: Controller) -> None:
    """With its settings, so that :func:`load_controller` needs nothing else."""
    content: dict[str, Any] = {
        "kind": type(controller).__name__,
        "settings": controller.space.settings,
        "tier": controller.space.tier,
        "state": controller.state_dict(),
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load_controller(path: str | Path) -> Controller:
    """Raises a ``ValueError`` that names the file if it is none."""
    content = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(content, dict) or content.get("kind") not in CONTROLLERS:
        raise ValueError(f"{path}: not a controller")
    space, state = Space(content["settings"], content["tier"]), content["state"]
    controller: Controller
    if content["kind"] == "BestStatic":
        controller = BestStatic(space)
    elif content["kind"] == "QualityRegression":
        dims = len(state["from_known"]) - 1, state["from_features"].shape[1] - 1
        controller = QualityRegression(space, *dims)
    else:
        quality = state["static.quality"]
        dims = len(state["known_mean"]), state["features_mean"].shape[1]
        hidden_dim = len(state["tier_net.0.bias"])
        controller = TwoStagePolicy(space, quality, *dims, hidden_dim=hidden_dim)
    controller.load_state_dict(state)
    return controller.eval()

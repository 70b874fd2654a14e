"""Group-relative policy optimisation (https://arxiv.org/abs/2402.03300) of who chooses settings.

One decision per item makes it a contextual bandit: a group of settings is drawn for one item and
budget, and what each is worth is compared with the group's mean. There are few settings, so that
entropy and divergence are computed, not sampled.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import write_atomically
from .controller import TwoStagePolicy, feasible_settings
from .outcomes import Outcomes
from .reward import QualityReward

Reward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GRPOConfig:
    """Settings of the training.

    Args:
        steps: each draws groups and learns from them.
        batch_size: items, each with a budget, per step.
        group_size: settings that are drawn for one of them.
        updates: of the policy per step; with one the clip has nothing to do.
        lr: of Adam.
        clip: how far the ratio of new and old probabilities may leave 1.
        entropy_weight: of the entropy, which is rewarded.
        kl_weight: of the divergence from the policy at the start.
        budgets: in milliseconds, one of which each item of a batch gets; empty: any between the
            table's fastest setting and 1.1 times its slowest, evenly by its logarithm.
        seed: of all that is drawn.
    """

    steps: int = 600
    batch_size: int = 64
    group_size: int = 8
    updates: int = 2
    lr: float = 1e-3
    clip: float = 0.2
    entropy_weight: float = 0.003
    kl_weight: float = 0.003
    budgets: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("group_size", 2), ("updates", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("lr", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("entropy_weight", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if any(budget <= 0 for budget in self.budgets):
            raise ValueError(f"budgets={self.budgets} must be positive")


def advantages(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """What each of a group is better by than its mean, in standard deviations of the whole batch.

    Args:
        rewards: (N, G).

    Returns:
        (N, G), zero in groups without variance, which teach nothing; and which do, (N,) bool.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    teaching = rewards.amax(1) - rewards.amin(1) > 1e-6
    scale = centred[teaching].square().mean().sqrt() if teaching.any() else torch.ones(())
    return torch.where(teaching[:, None], centred / scale, 0.0), teaching


def surrogate(
    log_p: Tensor, old_log_p: Tensor, drawn: Tensor, advantage: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped objective (N,), the mean over each group, to be maximised.

    Args:
        log_p, old_log_p: (N, S) of the present policy and of that which drew.
        drawn: (N, G) settings.
        advantage: (N, G).

    Returns:
        It, and the share of the ratios that the clip holds.
    """
    ratio = (log_p.gather(1, drawn) - old_log_p.gather(1, drawn)).exp()
    limited = ratio.clamp(1 - clip, 1 + clip)
    objective = torch.minimum(ratio * advantage, limited * advantage)
    held = (limited * advantage < ratio * advantage).float().mean()
    return objective.mean(1), held


def entropy(log_p: Tensor) -> Tensor:
    """(N, S), -inf where impossible -> (N,) nats."""
    return -(log_p.exp() * torch.where(log_p.isfinite(), log_p, 0.0)).sum(1)


def divergence(log_p: Tensor, reference: Tensor) -> Tensor:
    """KL of a policy (N, S) from another that can do the same: (N,) nats."""
    gap = torch.where(log_p.isfinite(), log_p - reference, 0.0)
    return (log_p.exp() * gap).sum(1)


class GRPO:
    """Trains a policy on the items of outcomes, which are executed as they are drawn.

    A step depends on the policy, the optimizer and its own number alone, so that a resumed
    training is the same as one that was never ended.

    Attributes:
        history: one row per step.
    """

    def __init__(
        self,
        policy: TwoStagePolicy,
        outcomes: Outcomes,
        budgets: tuple[float, float],
        config: GRPOConfig | None = None,
        reward: Reward | None = None,
    ) -> None:
        self.policy, self.outcomes = policy, outcomes
        self.budgets = budgets
        self.config = config or GRPOConfig()
        self.reward = reward or QualityReward()
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.optimizer = torch.optim.Adam(policy.parameters(), self.config.lr)
        self.history: list[dict[str, float]] = []

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.history)

    def train(self, until: int | None = None) -> TwoStagePolicy:
        """Train to the end, or until some step."""
        self.policy.train()
        while self.step < (until or self.config.steps):
            self.history.append(self.train_step())
        return self.policy.eval()

    def train_step(self) -> dict[str, float]:
        config, outcomes = self.config, self.outcomes
        generator = torch.Generator().manual_seed(1_000_003 * config.seed + self.step)
        items = torch.randint(len(outcomes.items), (config.batch_size,), generator=generator)
        budget = self.draw_budgets(generator)
        feasible = feasible_settings(outcomes.p95[items], budget)
        situation = outcomes.known[items], outcomes.look(items), budget, feasible
        with torch.no_grad():
            old = self.policy.log_probabilities(*situation)
            reference = self.reference.log_probabilities(*situation)
            drawn = old.exp().multinomial(config.group_size, True, generator=generator)
        rows = items[:, None].expand_as(drawn)
        quality = outcomes.run(rows.flatten(), drawn.flatten()).view_as(drawn)
        latency, complexity = outcomes.p50[rows, drawn], outcomes.space.complexity[drawn]
        rewards = self.reward(quality, latency, budget[:, None], complexity)
        advantage, teaching = advantages(rewards)
        held = torch.zeros(())
        for _ in range(config.updates):
            log_p = self.policy.log_probabilities(*situation)
            objective, held = surrogate(log_p, old, drawn, advantage, config.clip)
            objective = (objective * teaching).sum() / teaching.sum().clamp(min=1)
            spread, distance = entropy(log_p).mean(), divergence(log_p, reference).mean()
            loss = -objective - config.entropy_weight * spread + config.kl_weight * distance
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        row = {
            "reward": rewards.mean(),
            "quality": quality.mean(),
            "utilisation": (latency / budget[:, None]).mean(),
            "zero_variance": 1 - teaching.float().mean(),
            "entropy": spread,
            "divergence": distance,
            "clipped": held,
            "executed": outcomes.quality.isfinite().float().mean(),
        }
        return {name: float(value.detach()) for name, value in row.items()}

    def draw_budgets(self, generator: torch.Generator) -> Tensor:
        """(batch_size,) milliseconds."""
        shape = (self.config.batch_size,)
        if self.config.budgets:
            index = torch.randint(len(self.config.budgets), shape, generator=generator)
            return torch.tensor(self.config.budgets)[index]
        low, high = map(math.log, self.budgets)
        return (low + (high - low) * torch.rand(shape, generator=generator)).exp()

    def save(self, folder: Path) -> None:
        """``grpo.pth``, to go on from, and ``grpo.json``, its curves."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "policy": self.policy.state_dict(),
            "reference": self.reference.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        write_atomically(folder / "grpo.pth", lambda file: torch.save(state, file))
        text = json.dumps(self.history)
        write_atomically(folder / "grpo.json", lambda file: file.write(text.encode()))
        self.outcomes.save()

    def load(self, folder: Path) -> None:
        """Go on from where :meth:`save` was called."""
        state = torch.load(folder / "grpo.pth", weights_only=True)
        self.policy.load_state_dict(state["policy"])
        self.reference.load_state_dict(state["reference"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]

"""Mixture-of-experts feed-forward networks: a router, grouped experts, and the layer.

Token-choice top-k routing without capacity limits (https://arxiv.org/abs/1701.06538), with the
Switch Transformer's balance loss (https://arxiv.org/abs/2101.03961) and the router z-loss of
ST-MoE (https://arxiv.org/abs/2202.08906).
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn

from ...clock import check_ramp, ramp
from ..context import Part, current
from ..ffn import FFN
from ..layers import ACTIVATIONS, activation, check_choice
from ..tokens import Regions, TokenLevels, TokenMap

DISPATCHES = ("auto", "sorted", "grouped_mm", "dense")
COMBINATIONS = ("mean", "sum")


@dataclass(frozen=True)
class MoEConfig:
    """Settings of a mixture-of-experts FFN.

    Args:
        num_experts: experts per layer.
        top_k: experts per token.
        expert_dim: hidden units of one expert. None takes ``dim_feedforward / num_experts`` (to
            the nearest multiple of 8 if that is no integer): all experts together have the
            parameters of one dense FFN, a token uses ``top_k / num_experts`` of its FLOPs.
            ``dim_feedforward`` costs ``top_k`` dense FFNs.
        slots: groups of equally many experts, in their order, of which each gives
            ``top_k / slots`` to a token and has ``1 / slots`` of its gates. ``num_experts`` and
            ``top_k``, the knob as well, are multiples of it. 1 chooses among all experts.
        combine: how the outputs of a token's experts make one: "mean", by gates that sum to 1, or
            "sum", in which each counts once, whatever the router thinks of it, so that parts of
            one FFN add up to it (output biases are averaged). The router, which then has a bias,
            learns in both.
        patch_size: tokens of one square of that many cells per side of the feature map share
            their route, by the mean of their logits; 1 routes every token by itself. Queries
            stand on no map and take 1 only.
        act: activation of the experts, "relu", "gelu" or "silu"; None is that of the FFN that
            they replace.
        balance_weight: weight of the balance loss; where a token uses one expert (of each slot)
            it is at least 0.1, unless outputs are summed.
        balance_reduction: of the balance losses of a stack's layers, "sum" or "mean".
        z_loss_weight: weight of the router z-loss.
        dispatch: "sorted" (one GEMM per expert), "grouped_mm" (one grouped GEMM), "dense" (all
            experts in one static GEMM) or "auto".
        temperature: of the router's softmax, from this value at ``start_step`` to 1 at
            ``end_step``.
        layers: indices of the layers that are replaced; None replaces all.
    """

    num_experts: int
    top_k: int = 2
    expert_dim: int | None = None
    slots: int = 1
    combine: str = "mean"
    patch_size: int = 1
    act: str | None = None
    balance_weight: float = 0.03
    balance_reduction: str = "sum"
    z_loss_weight: float = 1e-3
    dispatch: str = "auto"
    temperature: float = 1.0
    start_step: int = 0
    end_step: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts} must be at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must lie in 1..num_experts={self.num_experts}")
        if self.expert_dim is not None and self.expert_dim < 1:
            raise ValueError(f"expert_dim={self.expert_dim} must be at least 1 or None")
        if self.slots < 1:
            raise ValueError(f"slots={self.slots} must be at least 1")
        check_multiple("num_experts", self.num_experts, self.slots)
        check_multiple("top_k", self.top_k, self.slots)
        check_choice("combine", self.combine, COMBINATIONS)
        if self.combine == "sum" and self.slots > 1:
            raise ValueError(f"combine='sum' needs slots=1, not slots={self.slots}")
        if self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size} must be at least 1")
        if self.act is not None:
            check_choice("act", self.act, ACTIVATIONS)
        check_choice("balance_reduction", self.balance_reduction, ("sum", "mean"))
        for name in ("balance_weight", "z_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        check_choice("dispatch", self.dispatch, DISPATCHES)
        check_ramp("MoEConfig", self.start_step, self.end_step)

    def width(self, dim_feedforward: int) -> int:
        """Hidden units of one expert, for the dense FFN that the layer replaces."""
        if self.expert_dim is not None:
            return self.expert_dim
        if dim_feedforward % self.num_experts == 0:
            return dim_feedforward // self.num_experts
        # Grouped GEMMs want rows of 16 bytes.
        return max(8, 8 * round(dim_feedforward / self.num_experts / 8))


def check_multiple(name: str, value: int, slots: int) -> None:
    """Raise a ``ValueError`` for a number of experts that slots cannot share equally."""
    if value % slots:
        raise ValueError(f"{name}={value} must be a multiple of slots={slots}")


def moe_layers(config: MoEConfig | None, num_layers: int) -> list[MoEConfig | None]:
    """The config for each layer of a stack that it replaces, None for the dense ones.

    Its ``layers`` then names them all, so that each layer knows how many share a mean.

    Raises:
        ValueError: if ``layers`` names a layer that is not there.
    """
    if config is None:
        return [None] * num_layers
    replaced = range(num_layers) if config.layers is None else config.layers
    unknown = [index for index in replaced if not 0 <= index < num_layers]
    if unknown:
        raise ValueError(
            f"layers={list(config.layers)} names none of {num_layers} layers: {unknown}"
        )
    config = replace(config, layers=tuple(sorted(set(replaced))))
    return [config if index in config.layers else None for index in range(num_layers)]


class Routing(NamedTuple):
    """Where T tokens go. Probabilities are of all experts, gates of the chosen."""

    logits: Tensor  # (T, E) fp32, before the temperature; means where tokens share their route
    probabilities: Tensor  # (T, E) fp32, summing to 1 / slots in every slot
    gates: Tensor  # (T, k) fp32, summing to 1, or each of 1 where outputs are summed
    experts: Tensor  # (T, k)


def route(
    logits: Tensor, top_k: int, slots: int = 1, temperature: float = 1.0, combine: str = "mean"
) -> Routing:
    """Softmax, top-k and gates, in every slot by itself.

    A softmax over all experts would have the same gates until all probabilities of a slot
    underflow; and to lower the balance loss, a slot whose experts collapsed could give up its
    probability to the other slots instead of spreading it.
    """
    scaled = (logits / temperature).unflatten(-1, (slots, -1))
    probabilities = scaled.softmax(-1)  # (T, slots, E / slots)
    experts = largest(probabilities, top_k // slots)
    gates = probabilities.gather(-1, experts)
    if combine == "sum":
        gates = scaled.log_softmax(-1).gather(-1, experts)
        gates = (gates - gates.detach()).exp()  # as below, also for probabilities that underflow
    elif top_k == slots:
        gates = gates / gates.detach()  # 1, and still a gradient for the router
    else:
        gates = gates / gates.sum(-1, keepdim=True)
    first = torch.arange(0, logits.shape[-1], scaled.shape[-1], device=logits.device)
    return Routing(
        logits,
        (probabilities / slots).flatten(-2),
        (gates / slots).flatten(-2),
        (experts + first[:, None]).flatten(-2),
    )


def largest(probabilities: Tensor, k: int) -> Tensor:
    """(..., n) -> (..., k): indices of the k largest, in falling order.

    Of equal ones the first, on every device. ``torch.topk`` leaves it open which, and where two
    copies of an FFN tie it may take parts of both
    (:func:`~dset_d2.modeling.sparse.upcycling.upcycle`).
    """
    probabilities = probabilities.detach()
    found = [probabilities.argmax(-1, keepdim=True)]
    while len(found) < k:
        probabilities = probabilities.scatter(-1, found[-1], -1.0)
        found.append(probabilities.argmax(-1, keepdim=True))
    return torch.cat(found, -1)


class Router(nn.Module):
    """Linear router in fp32; softmax, top-k, gates (:func:`route`)."""

    def __init__(self, dim: int, num_experts: int, slots: int = 1, combine: str = "mean") -> None:
        super().__init__()
        self.slots = slots
        self.combine = combine
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=0.02)
        bias = nn.Parameter(torch.zeros(num_experts)) if combine == "sum" else None
        self.register_parameter("bias", bias)

    def forward(
        self, x: Tensor, top_k: int, temperature: float = 1.0, regions: Regions | None = None
    ) -> Routing:
        """(T, dim) -> :class:`Routing`, one for all tokens of a region."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            logits = F.linear(x.float(), self.weight.float(), bias)
            if regions is not None:
                logits = regions.mean(logits)
            return route(logits, top_k, self.slots, temperature, self.combine)


class GroupedExperts(nn.Module):
    """The weights of E two-layer FFNs, and three ways to run tokens through their experts."""

    def __init__(
        self,
        dim: int,
        expert_dim: int,
        num_experts: int,
        act: str,
        dropout: float,
        combine: str = "mean",
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.combine = combine
        self.w1 = nn.Parameter(torch.empty(num_experts, expert_dim, dim))
        self.b1 = nn.Parameter(torch.zeros(num_experts, expert_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, expert_dim))
        self.b2 = nn.Parameter(torch.zeros(num_experts, dim))
        self.act = activation(act)
        self.dropout = nn.Dropout(dropout)
        for weights in (self.w1, self.w2):
            for weight in weights:
                nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor, routing: Routing, dispatch: str) -> Tensor:
        """Gate-weighted sum of the chosen experts' outputs: (T, dim) -> (T, dim)."""
        gates = routing.gates.to(x.dtype)
        if dispatch == "dense":
            return self.run_dense(x, gates, routing.experts)
        # Assignments grouped by expert; within an expert tokens keep their order.
        order = routing.experts.flatten().argsort(stable=True)
        rows = x[order // routing.experts.shape[1]]
        if dispatch == "sorted":
            outputs = self.run_sorted(rows, routing.experts)
        else:
            outputs = self.run_grouped(rows, routing.experts, order)
        outputs = outputs * gates.flatten()[order, None].to(outputs.dtype)
        unsorted = torch.empty_like(outputs).index_copy(0, order, outputs)
        return unsorted.unflatten(0, gates.shape).sum(1)

    def counts(self, experts: Tensor) -> Tensor:
        """(E,) assignments per expert."""
        return torch.bincount(experts.flatten(), minlength=self.num_experts)

    def activate(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.act(hidden))

    def output_biases(self, experts: Tensor) -> Tensor:
        """(E, dim): what of its output bias each expert adds, for a choice (T, k) of experts."""
        return self.b2 / experts.shape[1] if self.combine == "sum" else self.b2

    def run_sorted(self, rows: Tensor, experts: Tensor) -> Tensor:
        """One GEMM pair per expert over its segment of rows, whose lengths the host must know."""
        outputs, b2 = [], self.output_biases(experts)
        for expert, segment in enumerate(rows.split(self.counts(experts).tolist())):
            hidden = self.activate(F.linear(segment, self.w1[expert], self.b1[expert]))
            outputs.append(F.linear(hidden, self.w2[expert], b2[expert]))
        return torch.cat(outputs)

    def run_grouped(self, rows: Tensor, experts: Tensor, order: Tensor) -> Tensor:
        """One grouped GEMM per layer; segment lengths stay on the device."""
        ends = self.counts(experts).cumsum(0, dtype=torch.int32)
        owner = experts.flatten()[order]
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        parameters = (self.w1, self.b1, self.w2, self.output_biases(experts))
        w1, b1, w2, b2 = (p.to(dtype) for p in parameters)
        hidden = F.grouped_mm(rows.to(dtype), w1.transpose(1, 2), offs=ends) + b1[owner]
        return F.grouped_mm(self.activate(hidden), w2.transpose(1, 2), offs=ends) + b2[owner]

    def run_dense(self, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Every expert on every token in one GEMM, other experts' gates being 0; static."""
        weight = torch.zeros(len(x), self.num_experts, dtype=gates.dtype, device=x.device)
        weight = weight.scatter(1, experts, gates)
        hidden = self.activate(F.linear(x, self.w1.flatten(0, 1), self.b1.flatten()))
        hidden = hidden.unflatten(1, (self.num_experts, -1)) * weight[..., None]
        w2 = self.w2.permute(1, 0, 2).flatten(1)  # (dim, E * expert_dim)
        b2 = self.output_biases(experts).to(hidden.dtype)
        return F.linear(hidden.flatten(1), w2) + weight.to(hidden.dtype) @ b2


def choose_dispatch(x: Tensor, width: int) -> str:
    """The dispatch that "auto" stands for: static in graph captures, grouped where it is fast."""
    # Not torch.jit.is_tracing(): FLOP counts trace what really runs.
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return "dense"
    aligned = x.shape[-1] % 8 == 0 and width % 8 == 0  # grouped GEMMs want rows of 16 bytes
    if aligned and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        low = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        if torch.bfloat16 in (x.dtype, low):
            return "grouped_mm"
    return "sorted"


class MoERecord(NamedTuple):
    """What a forward leaves of a mixture of experts.

    Attributes:
        valid: (T,) bool, False on padding, which counts for nothing.
        tokens: where the tokens stand; None for queries.
    """

    config: MoEConfig
    routing: Routing
    valid: Tensor | None
    tokens: TokenMap | TokenLevels | None

    def losses(self, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weighted balance and z-losses."""
        config = self.config
        weight = config.balance_weight
        if config.top_k == config.slots and config.combine == "mean":
            weight = max(weight, 0.1)
        if config.balance_reduction == "mean" and config.layers:
            weight = weight / len(config.layers)
        return {
            "balance": weight * balance_loss(self.routing, self.valid),
            "z": config.z_loss_weight * z_loss(self.routing, self.valid, config.slots),
        }

    def statistics(self) -> dict[str, Tensor]:
        """See :func:`routing_statistics`."""
        return routing_statistics(self.routing, self.valid)


class MoE(Part):
    """A mixture-of-experts FFN in place of a dense one.

    Args:
        dim: channels of the tokens.
        dim_feedforward: hidden units of the FFN that it replaces.
        act: activation of that FFN: "relu", "gelu" or "silu".
        dropout: of hidden units, in that FFN.
    """

    kind = "moe"
    construction = "auto"  # how it starts from a dense checkpoint if nothing else is said

    def __init__(
        self, config: MoEConfig, dim: int, dim_feedforward: int, act: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        self.router = Router(dim, config.num_experts, config.slots, config.combine)
        width = config.width(dim_feedforward)
        self.experts = GroupedExperts(
            dim, width, config.num_experts, config.act or act, dropout, config.combine
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim).

        Raises:
            ValueError: if tokens that stand on no feature map shall share routes; if the slots
                cannot share the knob ``top_k`` equally.
        """
        config, context = self.config, current()
        flat = x.reshape(-1, x.shape[-1])
        temperature = ramp(
            context.step, config.start_step, config.end_step, config.temperature, 1.0
        )
        routing = self.router(flat, self.top_k(), temperature, self.regions(x))
        if context.records is not None:
            valid = None if context.tokens is None else context.tokens.valid
            valid = None if valid is None else valid.flatten()
            context.leave(self.record_name, MoERecord(config, routing, valid, context.tokens))
        dispatch = config.dispatch
        if dispatch == "auto":
            dispatch = choose_dispatch(flat, self.experts.w1.shape[1])
        return self.experts(flat, routing, dispatch).view_as(x)

    def regions(self, x: Tensor) -> Regions | None:
        """Which of the tokens (B, N, dim) share their route; None if each has its own."""
        size, where = self.config.patch_size, current().tokens
        if size == 1:
            return None
        if where is None:
            raise ValueError(f"patch_size={size}: these tokens stand on no feature map")
        return where.regions(size, len(x), x.device)

    def top_k(self) -> int:
        """Experts per token in this call."""
        top_k = current().knobs.top_k or self.config.top_k
        check_multiple("top_k", top_k, self.config.slots)
        return top_k

    def knob_limits(self) -> dict[str, float]:
        return {"top_k": self.config.num_experts}

    def active_parameters(self) -> int:
        """Parameters that one token uses: the router and ``top_k`` experts."""
        router, experts = (
            sum(p.numel() for p in part.parameters()) for part in (self.router, self.experts)
        )
        return router + experts * self.top_k() // self.config.num_experts


def make_ffn(
    dim: int, dim_feedforward: int, act: str, dropout: float, moe: MoEConfig | None
) -> nn.Module:
    """A layer's FFN: dense, or experts in its place."""
    if moe is None:
        return FFN(dim, dim_feedforward, act, dropout)
    return MoE(moe, dim, dim_feedforward, act, dropout)


def chosen(routing: Routing) -> Tensor:
    """(T, E): 1 where a token uses an expert."""
    return torch.zeros_like(routing.probabilities).scatter(1, routing.experts, 1.0)


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the tokens (first dimension) that are not padding."""
    if valid is None:
        return values.mean(0)
    weight = valid.to(values.dtype)
    weight = weight / weight.sum().clamp(min=1)
    return torch.einsum("t,t...->...", weight, values)


def balance(share: Tensor, probability: Tensor) -> Tensor:
    """E * sum_i f_i P_i; exactly 1 for a balanced router, larger otherwise.

    Args:
        share: (E,) f_i, expert i's share of all assignments.
        probability: (E,) P_i, its mean probability.
    """
    return len(share) * (share * probability).sum()


def balance_loss(routing: Routing, valid: Tensor | None = None) -> Tensor:
    """The :func:`balance` of the assignments of all processes with the probabilities of this."""
    share = masked_mean(chosen(routing), valid) / routing.experts.shape[1]
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(share)
        share = share / comm.get_world_size()
    return balance(share, masked_mean(routing.probabilities, valid))


def z_loss(routing: Routing, valid: Tensor | None = None, slots: int = 1) -> Tensor:
    """Mean squared log-partition of the router's softmaxes, which keeps its logits small."""
    partitions = routing.logits.unflatten(-1, (slots, -1)).logsumexp(-1)  # (T, slots)
    return masked_mean((partitions**2).mean(-1), valid)


@torch.no_grad()
def routing_statistics(routing: Routing, valid: Tensor | None = None) -> dict[str, Tensor]:
    """Usage (E,), balance (), mean entropy () in nats, co-activation (E, E).

    The usage is in shares of all assignments. The balance is the balance loss without its weight,
    of this process alone. Entry (i, j) of the co-activation is the share of tokens that use both
    experts i and j.
    """
    used = chosen(routing)
    usage = masked_mean(used, valid) / routing.experts.shape[1]
    pairs = masked_mean(used[:, :, None] * used[:, None, :], valid)
    entropy = torch.special.entr(routing.probabilities).sum(-1)
    return {
        "usage": usage,
        "balance": balance(usage, masked_mean(routing.probabilities, valid)),
        "entropy": masked_mean(entropy, valid),
        "coactivation": pairs,
    }

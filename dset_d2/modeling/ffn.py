"""The dense feed-forward network, and the seam where experts take its place."""

from typing import NamedTuple

from timm.layers import Mlp
from torch import Tensor, nn

from .layers import activation


class FFN(nn.Module):
    """Two linear layers with an activation between them: (..., dim) -> (..., dim)."""

    def __init__(self, dim: int, dim_feedforward: int, act: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.activation = activation(act)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class Seam(NamedTuple):
    """A two-layer FFN inside of a block, and how to put another module in its place.

    Attributes:
        block: calls the FFN, with the tokens alone.
        slot: the block's attribute that another module takes.
        bypassed: further attributes that make up the FFN, with what makes each do nothing.
        linear1, linear2: the layers.
        activation: between them.
        dropout: probability that a hidden unit is left out in training.
    """

    block: nn.Module
    slot: str
    bypassed: dict[str, object]
    linear1: nn.Linear
    linear2: nn.Linear
    activation: nn.Module
    dropout: float

    def replace(self, module: nn.Module) -> dict[str, object]:
        """Let the block call ``module`` (..., dim) -> (..., dim); returns what :meth:`put` takes.

        The dropout behind the activation goes with the FFN; what follows the FFN stays.
        """
        return self.put({self.slot: module} | self.bypassed)

    def put(self, attributes: dict[str, object]) -> dict[str, object]:
        """Set attributes of the block; returns those that stood there, to be put back."""
        return put(self.block, attributes)


def put(block: nn.Module, attributes: dict[str, object]) -> dict[str, object]:
    """Set attributes of a block; returns those that stood there."""
    before = {name: getattr(block, name) for name in attributes}
    for name, value in attributes.items():
        setattr(block, name, value)
    return before


def find_ffns(model: nn.Module) -> dict[str, Seam]:
    """The dense FFNs of a model by the names of their blocks.

    Those of this package, of timm's ViTs (``mlp``) and of transformers' layers (``fc1``, ``fc2``).
    """
    seams = ((name, find_ffn(block)) for name, block in model.named_modules())
    return {name: seam for name, seam in seams if seam is not None}


def find_ffn(block: nn.Module) -> Seam | None:
    """The dense FFN that a block calls, if it is of a known kind."""
    children = dict(block.named_children())
    match children:
        case {"ffn": FFN() as ffn}:
            p = ffn.dropout.p
            return Seam(block, "ffn", {}, ffn.linear1, ffn.linear2, ffn.activation, p)
        case {"mlp": Mlp(norm=nn.Identity()) as mlp}:
            return Seam(block, "mlp", {}, mlp.fc1, mlp.fc2, mlp.act, mlp.drop1.p)
        case {"fc1": nn.Linear() as fc1, "fc2": nn.Linear() as fc2}:
            for name in ("activation_fn", "activation"):
                if name in children:
                    bypassed: dict[str, object] = {name: nn.Identity(), "fc2": nn.Identity()}
                    p = getattr(block, "activation_dropout", None)
                    if p is not None:
                        bypassed["activation_dropout"] = 0.0
                    return Seam(block, "fc1", bypassed, fc1, fc2, children[name], p or 0.0)
    return None

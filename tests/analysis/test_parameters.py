import torch
from torch import nn

from dset_d2.analysis import deployed_parameters
from dset_d2.modeling.encoder.fusion_blocks import RepVggBlock
from dset_d2.modeling.sparse import MoE

from ..conftest import sparse_model, tiny_model


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_what_deployment_leaves_out():
    model = tiny_model(num_layers=3, eval_idx=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counts = deployed_parameters(model)
    assert counts.keys() == {"", "backbone", "encoder", "decoder"}
    decoder = model.decoder
    gone = [decoder.denoising_class_embed, decoder.decoder.layers[2], decoder.dec_bbox_head[2]]
    gone += [decoder.dec_score_head[0], decoder.dec_score_head[2]]
    assert counts["decoder"] == (size(decoder), size(decoder) - size(*gone))
    folded = sum(
        size(module) - module.conv1.conv.weight.numel() - len(module.conv1.conv.weight)
        for module in model.encoder.modules()
        if isinstance(module, RepVggBlock)
    )
    assert counts["encoder"] == (size(model.encoder), size(model.encoder) - folded)
    assert counts["backbone"] == (size(model.backbone),) * 2
    assert counts[""] == tuple(map(sum, zip(*(n for name, n in counts.items() if name))))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())


def test_scorers_are_deployed():
    """Also those of a pruner that leaves small images alone."""
    sparse, dense = (
        deployed_parameters(model)[""] for model in (sparse_model(min_tokens=100), tiny_model())
    )
    assert sparse[0] != dense[0]
    assert sparse[0] - sparse[1] == dense[0] - dense[1]


class Pair(nn.Module):
    """Experts apart from each other, of which zeros reach the first alone."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def active_parameters(self) -> int:
        return size(self.experts[0])

    def forward(self, x, *_):
        return self.experts[0](x)


def test_experts_are_deployed_together():
    model = sparse_model()
    (name, *_) = (name for name, m in model.encoder.named_modules() if isinstance(m, MoE))
    before = deployed_parameters(model)["encoder"][1] - size(model.encoder.get_submodule(name))
    model.encoder.set_submodule(name, Pair(32))
    assert deployed_parameters(model)["encoder"][1] == before + 2 * (32 * 32 + 32)

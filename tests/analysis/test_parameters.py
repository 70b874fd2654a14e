import torch
from torch import nn

from dset_d2.inference import deployed_parameters
from dset_d2.modeling.encoder.fusion_blocks import RepVggBlock

from ..conftest import sparse_model, tiny_model


def size(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def folded(part: nn.Module) -> int:
    """Parameters that a part loses: each norm becomes a bias, of two RepVGG branches one stays."""
    norms = (m.num_features for m in part.modules() if isinstance(m, nn.BatchNorm2d))
    branches = (m.conv2.conv.weight for m in part.modules() if isinstance(m, RepVggBlock))
    return sum(norms) + sum(weight.numel() + len(weight) for weight in branches)


def test_what_deployment_leaves_out():
    model = tiny_model(num_layers=3, eval_idx=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counts = deployed_parameters(model)
    assert counts.keys() == {"", "backbone", "encoder", "decoder"}
    decoder = model.decoder
    gone = [decoder.denoising_class_embed, decoder.decoder.layers[2], decoder.dec_bbox_head[2]]
    gone += [decoder.dec_score_head[0], decoder.dec_score_head[2]]
    assert counts["decoder"] == (size(decoder), size(decoder) - size(*gone) - folded(decoder))
    for name in ("backbone", "encoder"):
        part = model.get_submodule(name)
        assert counts[name] == (size(part), size(part) - folded(part))
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

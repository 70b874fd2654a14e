"""Counts against formulas written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from torch import nn

import dset_d2
from dset_d2.analysis import count_activations, count_flops, count_parameters
from dset_d2.modeling.decoder.deformable_attention import Memory, MSDeformableAttention
from dset_d2.modeling.encoder.hybrid_encoder import TransformerEncoderLayer
from tests.conftest import make_inputs, sparse_model, tiny_model


class Call(nn.Module):
    """A function, possibly of modules, as a module."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args):
        return self.function(self, *args)


def flops_of(function, *args, **modules):
    return count_flops(Call(function, **modules), args)


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (0, 6)])
def test_linear(shape):
    report = count_flops(nn.Linear(6, 4), torch.rand(shape))
    assert report.total == torch.Size(shape).numel() * 4
    assert report.by_module == {"": report.total}


def test_linear_of_a_vector():
    """D-FINE's integral over bins, which fvcore's own handle counts 33 times."""
    args = torch.rand(2, 7, 33), torch.rand(33)
    assert flops_of(lambda self, x, weight: F.linear(x, weight), *args).total == 2 * 7 * 33


@pytest.mark.parametrize("groups, stride", [(1, 1), (2, 2), (4, 1)])
def test_conv(groups, stride):
    conv = nn.Conv2d(4, 8, 3, stride, padding=1, groups=groups)
    side = 10 // stride
    expected = 2 * 8 * side * side * (4 // groups) * 9
    assert count_flops(conv, torch.rand(2, 4, 10, 10)).by_operator == {"conv": expected}


def test_transposed_conv():
    conv = nn.ConvTranspose2d(4, 6, 2, stride=2)
    assert count_flops(conv, torch.rand(1, 4, 5, 5)).total == 4 * 6 * 4 * 25


def attention_flops(batch, tokens, dim):
    return {
        "linear": batch * tokens * dim * 4 * dim,  # q, k, v and the output
        "scaled_dot_product_attention": 2 * batch * tokens * tokens * dim,
    }


@pytest.mark.parametrize("padded", [False, True])
def test_multihead_attention_in_eval_is_not_hidden_by_its_fast_path(padded):
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.rand(2, 9, 16)
    padding = torch.arange(9).expand(2, 9) > 6 if padded else None

    def function(self, x):
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)

    assert flops_of(function, x, attention=attention).by_operator == attention_flops(2, 9, 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_multihead_attention_that_returns_its_weights():
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.rand(2, 9, 16)
    padding = torch.zeros(2, 9, dtype=torch.bool)

    def function(self, x):
        return self.attention(x, x, x, key_padding_mask=padding)[0]

    counted = flops_of(function, x, attention=attention).by_operator
    half = 2 * 9 * 9 * 16
    assert counted == {"linear": 2 * 9 * 16 * 64, "baddbmm": half, "bmm": half}


def test_pytorch_encoder_layer():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    report = count_flops(layer, torch.rand(2, 9, 16))
    linear = 2 * 9 * 16 * (4 * 16 + 2 * 32)
    assert report.by_operator["linear"] == linear
    assert report.by_operator["scaled_dot_product_attention"] == 2 * 2 * 9 * 9 * 16


@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention(causal):
    query, key, value = torch.rand(2, 3, 5, 8), torch.rand(2, 3, 7, 8), torch.rand(2, 3, 7, 6)
    report = flops_of(
        lambda self, *x: F.scaled_dot_product_attention(*x, is_causal=causal), query, key, value
    )
    assert report.total == 2 * 3 * 5 * 7 * (8 + 6)


@pytest.mark.parametrize(
    "left, right, expected",
    [
        ((2, 3, 4), (4, 5), 2 * 3 * 4 * 5),
        ((1, 3, 4), (6, 4, 5), 6 * 3 * 4 * 5),  # the batch of the right operand counts
        ((3, 4), (4,), 3 * 4),
        ((4,), (4,), 4),
    ],
)
def test_matmul(left, right, expected):
    report = flops_of(lambda self, a, b: a @ b, torch.rand(left), torch.rand(right))
    assert report.total == expected


@pytest.mark.parametrize(
    "equation, left, right, expected",
    [
        ("bqc,bkc->bqk", (2, 3, 4), (2, 5, 4), 2 * 3 * 4 * 5),
        ("bnd,edf->bnef", (2, 3, 4), (5, 4, 6), 2 * 3 * 4 * 5 * 6),
        ("bnd,bn->bnd", (2, 3, 4), (2, 3), 0),
        ("abx,bc->ac", (2, 3, 4), (3, 5), 2 * 3 * 5),
    ],
)
def test_einsum(equation, left, right, expected):
    function = lambda self, a, b: torch.einsum(equation, a, b)  # noqa: E731
    assert flops_of(function, torch.rand(left), torch.rand(right)).total == expected


def test_einsum_of_three_is_refused():
    x = torch.rand(3, 3)
    with pytest.raises(ValueError, match="einsum 'ab,bc,cd->ad'"):
        flops_of(lambda self, a: torch.einsum("ab,bc,cd->ad", a, a, a), x)


def test_baddbmm():
    args = torch.rand(2, 3, 5), torch.rand(2, 3, 4), torch.rand(2, 4, 5)
    assert flops_of(lambda self, *x: torch.baddbmm(*x), *args).total == 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    "left, right, expected",
    [
        ((48, 16), (3, 16, 32), 48 * 16 * 32),  # rows in groups
        ((3, 16, 32), (3, 32, 16), 3 * 16 * 32 * 16),  # one product per group
        ((16, 48), (48, 32), 16 * 48 * 32),  # the inner dimension in groups
        ((3, 16, 32), (32, 48), 16 * 32 * 48),  # columns in groups
    ],
)
def test_grouped_mm(left, right, expected):
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no grouped_mm")
    args = [torch.rand(left, dtype=torch.bfloat16), torch.rand(right, dtype=torch.bfloat16)]
    # Operands of two dimensions are laid out so that groups of 16 are contiguous.
    offsets = None if len(left) == len(right) == 3 else torch.tensor([16, 32, 48]).int()
    if len(right) == 2:
        args[1] = args[1].t().contiguous().t()
    report = flops_of(lambda self, a, b: F.grouped_mm(a, b, offs=offsets), *args)
    assert report.by_operator == {"_grouped_mm": expected}


class SortedExperts(nn.Module):
    """Top-1 experts: sort the tokens by expert, then one layer per segment."""

    def __init__(self, dim, hidden, experts):
        super().__init__()
        self.router = nn.Linear(dim, experts)
        self.weight = nn.Parameter(torch.rand(experts, hidden, dim))

    def forward(self, x):
        expert = self.router(x).argmax(-1)
        order = expert.argsort()
        rows = x[order].split(expert.bincount(minlength=len(self.weight)).tolist())
        outputs = [F.linear(row, weight) for row, weight in zip(rows, self.weight)]
        return torch.cat(outputs)[order.argsort()]


def test_segments_of_experts():
    torch.manual_seed(0)
    moe = SortedExperts(8, 16, 4)
    x = torch.randn(20, 8)
    rows = moe.router(x).argmax(-1).bincount(minlength=4)
    assert len(set(rows.tolist())) > 1  # uneven segments
    expected = 20 * 8 * 4 + 20 * 8 * 16
    assert count_flops(moe, x).by_operator == {"linear": expected}


def test_deformable_attention():
    attention = MSDeformableAttention(32, 4, (4, 2))
    shapes = [(6, 5), (3, 3)]
    memory = torch.rand(2, 39, 32)

    def function(self, query, reference, memory):
        return self.attention(query, reference, Memory(memory, shapes))

    args = torch.rand(2, 7, 32), torch.rand(2, 7, 4), memory
    report = flops_of(function, *args, attention=attention)
    points = 4 * (4 + 2)
    assert report.by_operator == {
        "linear": 2 * (39 * 32 * 32 + 7 * 32 * (3 * points + 32)),
        "grid_sampler": 4 * 2 * 7 * 32 * (4 + 2),
    }
    assert report.by_module["attention.value_proj"] == 2 * 39 * 32 * 32


def test_encoder_layer():
    layer = TransformerEncoderLayer(32, 4, 64, 0.0, "gelu")
    report = count_flops(layer, (torch.rand(2, 9, 32), torch.rand(1, 9, 32)))
    attention = attention_flops(2, 9, 32)
    ffn = 2 * 9 * 32 * 64
    assert report.by_operator == {
        "linear": attention["linear"] + 2 * ffn,
        "scaled_dot_product_attention": attention["scaled_dot_product_attention"],
        "layer_norm": 2 * 2 * 9 * 32 * 5,
    }
    assert report.by_module["ffn.linear1"] == report.by_module["ffn.linear2"] == ffn
    assert report.by_module["self_attn"] == sum(attention.values())


def test_work_that_nobody_reads_is_counted():
    def function(self, x):
        self.unread(x)
        return self.read(x)

    report = flops_of(function, torch.rand(5, 4), read=nn.Linear(4, 3), unread=nn.Linear(4, 7))
    assert report.by_module == {"": 5 * 4 * 10, "read": 5 * 4 * 3, "unread": 5 * 4 * 7}


def test_unknown_operator_is_an_error():
    inner = Call(lambda self, x: torch.linalg.inv(x))
    with pytest.raises(ValueError, match=r"aten::linalg_inv\w* in module 'inner' \(Call\)"):
        flops_of(lambda self, x: self.inner(x), torch.eye(3), inner=inner)


def test_custom_autograd_function_is_an_error():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ x

    with pytest.raises(ValueError, match="Square"):
        flops_of(lambda self, x: Square.apply(x), torch.eye(3))


def test_model_that_behaves_otherwise_while_traced_is_an_error():
    def function(self, x):
        return x if torch.jit.is_tracing() else x @ x

    with pytest.raises(ValueError, match="traced, .* take 0 multiply-adds, untraced 27"):
        flops_of(function, torch.eye(3))


def flags_and_hooks(model):
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def test_model_is_left_as_it_was(model):
    model.train()
    model.backbone.eval()
    before, state = flags_and_hooks(model), copy.deepcopy(model.state_dict())
    first = count_flops(model, torch.rand(1, 3, 64, 64))
    assert count_flops(model, torch.rand(1, 3, 64, 64)) == first
    with pytest.raises(RuntimeError):
        count_flops(model, torch.rand(1, 4, 64, 64))
    assert flags_and_hooks(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_dicts_and_batches_count_alike(model):
    batch = count_flops(model, torch.rand(1, 3, 64, 96))
    dicts = count_flops(model, make_inputs([(64, 96), (64, 96)]))
    assert dicts.total == 2 * batch.total
    # An image that is padded, and another size beside it, are processed in two batches.
    mixed = count_flops(model, make_inputs([(64, 90), (64, 64)]))
    assert mixed.total == batch.total + count_flops(model, torch.rand(1, 3, 64, 64)).total


def test_modules_add_up(model):
    report = count_flops(model, torch.rand(1, 3, 64, 64))
    assert report.total == report.by_module[""] == sum(report.by_operator.values())
    parts = ("backbone", "encoder", "decoder")
    assert sum(report.by_module[name] for name in parts) == report.total
    layer = report.by_module["decoder.decoder.layers.0"]
    assert report.by_module["decoder.decoder"] == 3 * layer


def test_activations(model):
    assert count_activations(nn.Conv2d(3, 5, 3, padding=1), torch.rand(1, 3, 4, 4))[""] == 80
    layer = TransformerEncoderLayer(32, 4, 64, 0.0, "gelu")
    args = torch.rand(2, 9, 32), torch.rand(1, 9, 32)
    # q, k, v, attention, its projection; the FFN's two layers
    assert count_activations(layer, args)[""] == 2 * 9 * (5 * 32 + 64 + 32)


def test_parameters_that_inference_does_not_use_are_not_active():
    model = tiny_model(num_layers=3, eval_idx=1)
    counts = count_parameters(model, torch.rand(1, 3, 64, 64))
    assert counts[""].total == sum(p.numel() for p in model.parameters())
    assert counts["backbone"].active == counts["backbone"].total
    decoder = model.decoder
    idle = [decoder.denoising_class_embed, decoder.decoder.layers[2], decoder.dec_bbox_head[2]]
    idle += [decoder.dec_score_head[0], decoder.dec_score_head[2]]
    idle = sum(p.numel() for module in idle for p in module.parameters())
    assert counts[""].active == counts[""].total - idle
    assert counts["decoder.decoder.layers.2"].active == 0


def test_experts_declare_their_active_parameters():
    class Declared(SortedExperts):
        def __init__(self):
            super().__init__(8, 16, 4)
            self.shared = nn.Linear(8, 8)

        def active_parameters(self):
            return 8 * 16

    moe, tail = Declared(), nn.Linear(16, 2)
    model = Call(lambda self, x: self.tail(self.moe(x)), moe=moe, tail=tail)
    counts = count_parameters(model, torch.rand(20, 8))
    assert counts["moe"].active == 128
    assert counts["moe.router"].active is None
    assert counts[""].active == 128 + 34


@pytest.mark.parametrize("placement", ["before", "after"])
def test_every_sparse_mechanism_can_be_counted(placement):
    model = sparse_model(placement=placement, keep_ratio=0.3)
    assert count_flops(model, make_inputs([(96, 128)])).total > 0


def test_rtdetrv2_r18():
    """Upstream's graph has 30.6 GMACs by fvcore's handles, 1.1 of them the box head on tokens
    that are not selected; attention's products, 0.2, come on top."""
    cfg = dset_d2.get_config("configs/rtdetr/rtdetrv2_r18_coco.py")
    report = count_flops(instantiate(cfg.model), torch.rand(1, 3, 640, 640))
    tokens, queries, dim = 8400, 300, 256
    box_head = queries * (2 * dim * dim + 4 * dim)
    assert report.by_module["decoder.enc_bbox_head"] == box_head
    attention = 2 * dim * (400**2 + 3 * queries**2)
    assert report.by_operator["scaled_dot_product_attention"] == attention
    assert report.by_operator["grid_sampler"] == 3 * 4 * dim * queries * 12
    upstream = report.total - attention + (tokens - queries) * (2 * dim * dim + 4 * dim)
    assert upstream == pytest.approx(30.6e9, abs=0.05e9)
    assert sum(report.by_operator.values()) == report.total
    parts = ("backbone", "encoder", "decoder")
    assert sum(report.by_module[name] for name in parts) == report.total

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dset_d2.modeling.decoder.deformable_attention import sample_bilinear, sample_discrete
from dset_d2.modeling.decoder.denoising import make_denoising

from ..conftest import make_targets


def embedding(num_classes=5) -> torch.nn.Embedding:
    return torch.nn.Embedding(num_classes + 1, 8, padding_idx=num_classes)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    wanted=st.integers(1, 40),
    queries=st.integers(1, 12),
)
def test_layout(counts, wanted, queries):
    targets = [make_targets(1, n, seed=i)[0] for i, n in enumerate(counts)]
    made = make_denoising(targets, embedding(), queries, wanted)
    slots = max(1, *counts) if len(counts) > 1 else max(1, counts[0])
    assert made.groups == max(1, wanted // slots)
    size = 2 * slots * made.groups
    assert made.content.shape == (len(counts), size, 8)
    assert made.reference.isfinite().all()
    for count, positive, target in zip(counts, made.positive, made.target):
        assert len(positive) == len(target) == count * made.groups
        # Positives come in the first half of each group, one per real box.
        assert ((positive % (2 * slots)) < slots).all()
        assert (positive % (2 * slots) == target).all()
    mask = made.attn_mask
    assert mask[size:, :size].all()  # matching queries see no denoising ones
    assert not mask[:, size:].any()  # all see the matching ones
    group = torch.arange(size) // (2 * slots)
    assert (mask[:size, :size] == (group[:, None] != group)).all()


def test_noise_ranges_and_label_flips():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1]])
    targets = [{"labels": torch.tensor([2]), "boxes": boxes}] * 50
    made = make_denoising(targets, embedding(20), 3, num_denoising=20)
    xyxy = made.reference.sigmoid()
    low, high = xyxy[..., :2] - xyxy[..., 2:] / 2, xyxy[..., :2] + xyxy[..., 2:] / 2
    corners = torch.cat([low, high], -1).view(50, 20, 2, 4)
    original = torch.tensor([0.4, 0.45, 0.6, 0.55])
    half = torch.tensor([0.1, 0.05, 0.1, 0.05])
    moved = (corners - original).abs() / half
    # Where noise swaps two corners of a negative, its size is cut at 0 and they are lost.
    whole = (xyxy[..., 2:] > 1e-4).all(-1).view(50, 20, 2)
    positive, negative = moved[:, :, 0], moved[:, :, 1][whole[:, :, 1]]
    assert whole[:, :, 0].all() and len(negative) > 300
    assert positive.max() <= 1.001 and positive.mean() == pytest.approx(0.5, abs=0.05)
    assert negative.min() >= 0.999 and negative.max() <= 2.001

    table = embedding(20)
    content = make_denoising(targets, table, 3, num_denoising=20).content
    kept = (content == table.weight[2]).all(-1).float().mean()
    # A quarter of the labels is drawn anew from 20 classes.
    assert kept == pytest.approx(1 - 0.25 * 19 / 20, abs=0.04)


def test_without_noise_the_queries_are_the_ground_truth():
    targets = make_targets(2, 3)
    made = make_denoising(targets, embedding(), 4, 6, label_noise_ratio=0, box_noise_scale=0)
    for index, target in enumerate(targets):
        boxes = made.reference[index, made.positive[index]].sigmoid()
        torch.testing.assert_close(boxes, target["boxes"][made.target[index]])


def test_discrete_sampling_rounds_like_upstream_and_clamps_each_axis():
    value = torch.arange(12.0).view(1, 1, 2, 6)  # H 2, W 6
    locations = torch.tensor([[0.0, 0.0], [0.5, 0.4], [2.0, 2.0], [-1.0, 0.9]]).view(1, 1, 4, 2)
    found = sample_discrete(value, locations, None).flatten()
    # x = int(.5 * 6 + .5) = 3, y = int(.4 * 2 + .5) = 1; x clamps at 5, not at the height.
    assert found.tolist() == [0, 9, 11, 6]


def test_bilinear_sampling_at_cell_centres():
    value = torch.rand(1, 2, 3, 4)
    y, x = torch.meshgrid((torch.arange(3) + 0.5) / 3, (torch.arange(4) + 0.5) / 4, indexing="ij")
    found = sample_bilinear(value, torch.stack([x, y], -1)[None], None)
    torch.testing.assert_close(found, value)

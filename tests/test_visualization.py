import numpy as np
import torch

from dset_d2.modeling.sparse.moe import Routing
from dset_d2.visualization import (
    PALETTE,
    SparsityProbe,
    draw_experts,
    draw_kept,
    mean_statistics,
    plot_routing,
    sparsity_pictures,
)

from .conftest import make_inputs, sparse_model

WHITE = np.full((40, 60, 3), 200, np.uint8)


def test_pruned_cells_are_dark():
    drawn = draw_kept(WHITE, (2, 3), np.array([0, 5]))
    assert (drawn[:20, :20] == 200).all() and (drawn[20:, 40:] == 200).all()
    assert (drawn[:20, 20:] == 50).all() and (drawn[20:, :40] == 50).all()


def test_cells_have_their_experts_colour():
    drawn = draw_experts(WHITE, (2, 3), np.array([1, 4]), np.array([0, 2]))
    assert (drawn[:20, 20:40] == 100 + PALETTE[0] // 2).all()
    assert (drawn[20:, 20:40] == 100 + PALETTE[2] // 2).all()
    assert (drawn[:20, :20] == 50).all()  # not routed


def test_probe_sees_what_the_model_did():
    model = sparse_model(keep_ratio=0.5)
    with SparsityProbe(model) as probe, torch.no_grad():
        model(make_inputs([(128, 192)]))
    assert probe.shapes == {"encoder_0": (4, 6)}
    assert len(probe.kept["encoder_0"]) == 12
    assert probe.routings["encoder_0_0"].experts.shape == (12, 2)
    assert probe.routings["decoder_2"].experts.shape == (30, 2)
    assert probe.encoder_of("encoder_0_0") == "encoder_0"
    assert probe.encoder_of("decoder_2") is None
    assert all(not module._forward_hooks for module in model.modules())

    image = np.full((128, 192, 3), 200, np.uint8)
    pictures = sparsity_pictures(image, probe)
    assert pictures.keys() == {"kept_encoder_0", "expert_encoder_0_0"}
    light = pictures["kept_encoder_0"][16::32, 16::32, 0].ravel() == 200
    assert np.flatnonzero(light).tolist() == probe.kept["encoder_0"].tolist()
    shown = pictures["expert_encoder_0_0"][16::32, 16::32].reshape(-1, 3)
    first = probe.routings["encoder_0_0"].experts[:, 0].numpy()
    expected = 100 + PALETTE[first] // 2
    np.testing.assert_array_equal(shown[probe.kept["encoder_0"]], expected)


def test_experts_are_drawn_on_all_tokens_if_pruning_follows_them():
    model = sparse_model(keep_ratio=0.5, placement="after")
    with SparsityProbe(model) as probe, torch.no_grad():
        model(make_inputs([(128, 192)]))
    assert len(probe.kept["encoder_0"]) == 12
    pictures = sparsity_pictures(np.full((128, 192, 3), 200, np.uint8), probe)
    shown = pictures["expert_encoder_0_0"][16::32, 16::32].reshape(-1, 3)
    first = probe.routings["encoder_0_0"].experts[:, 0].numpy()
    np.testing.assert_array_equal(shown, 100 + PALETTE[first] // 2)


def test_load_and_coactivation_are_plotted():
    even = torch.full((4, 3), 1 / 3)
    routings = [
        Routing(even, even, torch.full((4, 2), 0.5), torch.tensor(experts))
        for experts in ([[0, 1]] * 4, [[0, 2]] * 4)
    ]
    statistics = mean_statistics({"decoder_0": routings})
    torch.testing.assert_close(statistics["decoder_0"]["usage"], torch.tensor([0.5, 0.25, 0.25]))
    figure = plot_routing(statistics)
    top, bottom = figure.axes[:2]
    assert [bar.get_height() for bar in top.patches] == [0.5, 0.25, 0.25]
    expected = [[1, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]]
    np.testing.assert_allclose(bottom.images[0].get_array(), expected)

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from dset_d2.modeling import forward_context
from dset_d2.modeling.sparse import MoEConfig, MoERecord, swap_ffn_for_moe
from dset_d2.modeling.sparse.moe import Routing
from dset_d2.modeling.tokens import TokenLevels, TokenMap
from dset_d2.visualization import (
    PALETTE,
    captioned,
    class_colours,
    detection_picture,
    draw_experts,
    draw_kept,
    draw_queries,
    mean_statistics,
    observe,
    plot_heat_map,
    plot_routing,
    routing_records,
    sparsity_pictures,
)

from .conftest import make_inputs, sparse_model, tiny_grounding

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


def test_padding_is_cut_off_before_cells_are_drawn():
    """40 x 160 pixels in a map of 2 x 5 cells: the second row of cells begins at pixel 32."""
    model = sparse_model(keep_ratio=0.5, min_tokens=1)
    with forward_context(record=True) as context, torch.no_grad():
        model(make_inputs([(40, 160)]))
    image = np.full((40, 160, 3), 200, np.uint8)
    drawn = sparsity_pictures(image, context.records)["kept_encoder_0"][:40]
    kept = context.records["pruning/encoder_0"].kept_cells()[0].view(2, 5)
    assert kept.any() and not kept.all()
    rows = np.array([0] * 32 + [1] * 8)
    light = kept.numpy()[rows][:, np.arange(160) // 32]
    np.testing.assert_array_equal(drawn[..., 0] == 200, light)


def run(placement: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What a model leaves of an image with 4 x 6 tokens, and the pictures of it."""
    model = sparse_model(keep_ratio=0.5, placement=placement)
    with forward_context(record=True) as context, torch.no_grad():
        model(make_inputs([(128, 192)]))
    image = np.full((128, 192, 3), 200, np.uint8)
    return context.records, sparsity_pictures(image, context.records)


def test_pictures_show_what_the_model_did():
    records, pictures = run("before")
    assert pictures.keys() == {"kept_encoder_0", "expert_encoder_0_0"}
    kept = records["pruning/encoder_0"].kept.index[0].tolist()
    assert len(kept) == 12
    light = pictures["kept_encoder_0"][:128][16::32, 16::32, 0].ravel() == 200
    assert np.flatnonzero(light).tolist() == kept
    shown = pictures["expert_encoder_0_0"][:128][16::32, 16::32].reshape(-1, 3)
    first = records["moe/encoder_0_0"].routing.experts[:, 0].numpy()
    np.testing.assert_array_equal(shown[kept], 100 + PALETTE[first] // 2)


def test_experts_are_drawn_on_all_tokens_if_pruning_follows_them():
    records, pictures = run("after")
    assert records["pruning/encoder_0"].kept.index.shape == (1, 12)
    shown = pictures["expert_encoder_0_0"][:128][16::32, 16::32].reshape(-1, 3)
    first = records["moe/encoder_0_0"].routing.experts[:, 0].numpy()
    np.testing.assert_array_equal(shown, 100 + PALETTE[first] // 2)


def differs(drawn: np.ndarray, image: np.ndarray) -> np.ndarray:
    """(H, W) bool: which pixels something was drawn on."""
    return np.abs(drawn.astype(int) - image).max(-1) > 30


def test_queries_have_their_experts_colour_at_their_boxes():
    image = np.full((200, 300, 3), 200, np.uint8)
    boxes, experts = (
        np.array([[20.0, 20, 120, 180], [180, 60, 280, 140]]),
        np.array([[2, 0], [1, 3]]),
    )
    drawn = draw_queries(image, boxes, experts)
    assert drawn.shape == image.shape and (drawn[5, 5] == 100).all()
    for (x1, _, x2, y2), (expert, _) in zip(boxes.astype(int), experts):
        edge = drawn[y2, (x1 + x2) // 2].astype(int)
        others = np.delete(PALETTE[:4].astype(int), expert, axis=0)
        distances = np.abs(others - edge).sum(1)
        assert np.abs(PALETTE[expert].astype(int) - edge).sum() < distances.min()
    np.testing.assert_array_equal(draw_queries(image, boxes[:0], experts[:0]), image // 2)


def grounding_with_experts() -> torch.nn.Module:
    """Of two texts, whose queries stand one after the other."""
    model = tiny_grounding(text_limit=14)
    swap_ffn_for_moe(model, MoEConfig(4, 2), layers=["*model.decoder*"])
    return model


@pytest.mark.parametrize("build", [sparse_model, grounding_with_experts])
def test_experts_of_the_decoder_are_drawn_at_their_queries_boxes(build):
    model, (inputs,) = build(), make_inputs([(160, 224)])
    inputs |= {"height": 320, "width": 448}
    image = np.full((320, 448, 3), 200, np.uint8)
    instances, outputs, records = observe(model, inputs)
    assert instances.image_size == (320, 448)
    record = records["moe/decoder_1"]
    count = len(record.routing.experts)
    scores = outputs["pred_logits"][0, :count].sigmoid().amax(-1)
    # The better half of the queries; next, none.
    threshold = float(scores.median())
    pictures = sparsity_pictures(image, records, outputs, threshold)
    decoder = {name for name in pictures if "decoder" in name}
    assert decoder == {f"expert_{n.split('/')[1]}" for n in records if n.startswith("moe/decoder")}
    shown = [index for index in range(count) if scores[index] >= threshold]
    assert 0 < len(shown) < count
    corners = []
    for cx, cy, w, h in (outputs["pred_boxes"][0, shown] * torch.tensor([448, 320] * 2)).tolist():
        corners.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    expected = draw_queries(image, np.array(corners), record.routing.experts[shown].numpy())
    assert differs(expected, image // 2).any()
    assert differs(pictures["expert_decoder_1"][:320], expected).mean() < 1e-3
    none = sparsity_pictures(image, records, outputs, threshold=1.01)["expert_decoder_1"]
    np.testing.assert_array_equal(none[:320], image // 2)
    assert not {name for name in sparsity_pictures(image, records) if "decoder" in name}


def test_experts_on_several_maps_have_a_picture_of_each():
    levels = TokenLevels((TokenMap((2, 2)), TokenMap((1, 1))))
    experts = torch.tensor([[0], [1], [2], [0], [3]])
    even = torch.full((5, 4), 0.25)
    routing = Routing(even, even, torch.ones(5, 1), experts)
    records = {"moe/encoder_0": MoERecord(MoEConfig(4, 1), routing, None, levels)}
    pictures = sparsity_pictures(WHITE, records)
    assert pictures.keys() == {"expert_encoder_0_level0", "expert_encoder_0_level1"}
    centres = pictures["expert_encoder_0_level0"][10:40:20, 15:60:30].reshape(-1, 3)
    np.testing.assert_array_equal(centres, 100 + PALETTE[[0, 1, 2, 0]] // 2)
    whole = pictures["expert_encoder_0_level1"][:40]
    assert (whole == 100 + PALETTE[3] // 2).all()


def test_heat_maps_name_their_rows_and_leave_blank_what_was_not_measured():
    values = np.array([[0.25, 0.75, np.nan], [0.5, 0.5, 0.0]])
    figure = plot_heat_map(values, ["a", "b"], "012", "title", "expert", "layer", "share")
    axes, scale = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    assert [text.get_text() for text in axes.texts] == ["25", "75", "50", "50", "0"]
    np.testing.assert_allclose(np.ma.filled(axes.images[0].get_array(), np.nan), values)
    assert axes.images[0].get_clim() == (0, 0.75) and scale.get_ylabel() == "share"


def test_load_and_coactivation_are_plotted():
    even = torch.full((4, 3), 1 / 3)
    routings = [
        Routing(even, even, torch.full((4, 2), 0.5), torch.tensor(experts))
        for experts in ([[0, 1]] * 4, [[0, 2]] * 4)
    ]
    records = [MoERecord(MoEConfig(3, 2), routing, None, None) for routing in routings]
    assert routing_records({"moe/decoder_0": records[0]}) == {"decoder_0": records[0]}
    statistics = mean_statistics({"decoder_0": records})
    torch.testing.assert_close(statistics["decoder_0"]["usage"], torch.tensor([0.5, 0.25, 0.25]))
    figure = plot_routing(statistics)
    top, bottom = figure.axes[:2]
    assert [bar.get_height() for bar in top.patches] == [0.5, 0.25, 0.25]
    expected = [[1, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5]]
    np.testing.assert_allclose(bottom.images[0].get_array(), expected)
    assert figure.axes[2].get_ylabel() == "share of tokens that use both"  # the scale of colours


def colours_in(picture: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


@pytest.mark.parametrize("count", [1, 8, 10, 80])
def test_classes_differ_in_colour(count):
    assert len(np.unique(class_colours(count), axis=0)) == count


def test_a_class_has_one_colour_in_boxes_and_legend():
    names, colours = ["car", "bus", "van"], class_colours(3)
    image = np.full((120, 300, 3), 40, np.uint8)
    instances = Instances((120, 300))
    instances.pred_boxes = Boxes(torch.tensor([[20.0, 20, 80, 90], [150, 20, 250, 90]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9, 0.2]), torch.tensor([1, 2])
    truth = [{"bbox": [100, 10, 140, 60], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}]
    truth.append(truth[0] | {"bbox": [200, 10, 240, 60], "category_id": 2, "iscrowd": 1})
    picture = detection_picture(image, instances, truth, names)
    assert picture.shape[1] == 600
    left, right, legend = picture[:120, :300], picture[:120, 300:], picture[120:]
    car, bus, van = map(tuple, colours.tolist())
    assert {car, bus} <= colours_in(legend) and van not in colours_in(legend)

    def near(colour, where):
        return (np.abs(where.astype(int) - colour).max(-1) < 60).any()

    assert near(car, left) and near(bus, right) and not near(car, right) and not near(bus, left)
    alone = detection_picture(image, instances, None, names, threshold=0.95)
    np.testing.assert_array_equal(alone, image)  # nothing to tell


def test_captions_stand_below_in_as_many_lines_as_they_need():
    captions = [("kept 50%", None), *((str(i), PALETTE[i]) for i in range(10))]
    narrow, wide = (captioned(np.zeros((20, w, 3), np.uint8), captions) for w in (100, 700))
    assert narrow.shape[0] > wide.shape[0] > 20
    for picture in (narrow, wide):
        assert not picture[:20].any() and {tuple(c) for c in PALETTE.tolist()} <= colours_in(
            picture
        )

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dset_d2.modeling.tokens import Padding, TokenLevels, TokenMap, mean_and_deviation

from ..conftest import make_inputs, tiny_model


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2000), st.integers(1, 250))
def test_cells_with_image_are_counted_exactly(size, padding, columns):
    """Not by a share in float32, which at many sizes is a little too large."""
    padded = Padding(torch.tensor([[size, 1]]), (size + padding, 1))
    expected = math.ceil(Fraction(size * columns, size + padding))
    assert padded.cells(1, columns).tolist() == [[expected, 1]]
    assert int(padded.valid_tokens(1, columns).sum()) == expected


def test_no_column_of_padding_counts_as_image():
    """224 of 416 pixels are 7 columns of 13, though their share in float32 gives 8."""
    _, padding = tiny_model().preprocess(make_inputs([(416, 224), (416, 416)]))
    assert padding.cells(13, 13).tolist() == [[7, 13], [13, 13]]
    valid = padding.valid_tokens(13, 13)[0].view(13, 13)
    assert valid[:, :7].all() and not valid[:, 7:].any()


def test_a_map_of_kept_tokens_knows_their_cells():
    padding = Padding(torch.tensor([[3, 2], [4, 2]]), (4, 2))
    tokens = TokenMap((2, 4), padding)
    first = tokens.prune(torch.tensor([[0, 3, 7], [3, 4, 7]]))
    second = first.prune(torch.tensor([[1, 2], [0, 2]]))
    assert second.index.tolist() == [[3, 7], [3, 7]]
    assert second.valid.tolist() == [[False, False], [True, True]]
    assert tokens.prune(None) is tokens and TokenMap((2, 4)).valid is None


def test_regions_are_squares_of_each_image_and_of_its_padding():
    padding = Padding(torch.tensor([[5, 3], [2, 3]]), (5, 3))
    regions = TokenMap((3, 5), padding).regions(2, 2, torch.device("cpu"))
    first, second = regions.index.view(2, 3, 5)
    assert first.tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    assert second[:, :2].tolist() == [[6, 6], [6, 6], [9, 9]]
    assert regions.count == 24 and second[:, 2:].min() >= 12  # padding's numbers are apart
    values = torch.randn(30, 2, dtype=torch.float64, requires_grad=True)
    means = regions.mean(values).view(2, 3, 5, 2)
    torch.testing.assert_close(means[0, 2, 4], values[14])
    torch.testing.assert_close(means[0, 1, 0], values[[0, 1, 5, 6]].mean(0))
    assert torch.autograd.gradcheck(regions.mean, values)


def test_levels_are_the_maps_one_after_the_other():
    padding = Padding(torch.tensor([[4, 4], [2, 4]]), (4, 4))
    fine = TokenMap((2, 4), padding)
    kept = fine.prune(torch.tensor([[0, 1, 5], [2, 4, 5]]))
    coarse = TokenMap((1, 2), padding)
    levels = TokenLevels((kept, coarse))
    assert fine.maps == (fine,) and levels.maps == (kept, coarse)
    assert levels.valid.tolist() == [[True] * 5, [False, True, True, True, False]]
    assert TokenLevels((TokenMap((2, 4)), TokenMap((1, 2)))).valid is None
    regions = levels.regions(2, 2, torch.device("cpu"))
    first, second = regions.index.view(2, 5).tolist()
    # Squares of 2 x 2 cells of either map, images and padding by themselves.
    assert first[0] == first[1] == first[2] and second[1] == second[2] != second[0]
    assert first[3] == first[4] and second[3] != second[4]
    assert len({*first, *second}) == 6 and max(*first, *second) < regions.count


def test_one_image_alone_has_its_gradients():
    """Those of a batch that holds it twice. BatchNorm on a CPU gives others without our doing."""
    model = tiny_model(num_denoising=0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    image = make_inputs([(64, 96)])
    gradients = []
    for batch in (image, image * 2):
        model.zero_grad()
        sum(model(batch).values()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, twice in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], twice, rtol=1e-3, atol=1e-5, msg=name)


def test_mean_and_deviation_leave_padding_out():
    tokens = torch.randn(2, 5, 3)
    valid = torch.tensor([[True] * 5, [True, True, False, True, False]])
    found = mean_and_deviation(tokens, valid)
    for one, own, row in zip(tokens, valid, found):
        part = one[own]
        torch.testing.assert_close(row, torch.cat([part.mean(0), part.std(0, correction=0)]))
    torch.testing.assert_close(mean_and_deviation(tokens, None)[:1], found[:1])

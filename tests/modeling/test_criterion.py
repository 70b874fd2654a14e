import itertools

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from dset_d2.modeling.criterion import HungarianMatcher, SetCriterion

from ..conftest import make_targets

WEIGHTS = {"vfl": 1.0, "bbox": 5.0, "giou": 2.0}


def predictions(batch=2, queries=6, classes=5, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    boxes = 0.2 + 0.5 * torch.rand(batch, queries, 4, generator=generator)
    logits = torch.randn(batch, queries, classes, generator=generator)
    return {"pred_logits": logits, "pred_boxes": boxes}


def test_matching_is_the_cheapest_of_all_assignments():
    matcher = HungarianMatcher()
    outputs, targets = predictions(), make_targets(2, 3)
    match = matcher([outputs], targets)[0]
    for image in range(2):
        logits, boxes = outputs["pred_logits"][image], outputs["pred_boxes"][image]
        cost = matcher.cost(logits, boxes, targets[image])
        cheapest = min(
            sum(cost[q, t] for t, q in enumerate(order))
            for order in itertools.permutations(range(6), 3)
        )
        mine = match.image == image
        found = cost[match.query[mine], match.target[mine] - 3 * image].sum()
        assert float(found) == pytest.approx(float(cheapest), abs=1e-5)


def test_sets_are_matched_independently():
    matcher = HungarianMatcher()
    sets = [predictions(seed=s) for s in range(3)]
    targets = make_targets(2, 3)
    for alone, together in zip([matcher([x], targets)[0] for x in sets], matcher(sets, targets)):
        for a, b in zip(alone, together):
            assert torch.equal(a, b)


def test_images_without_boxes_match_nothing():
    targets = [*make_targets(1, 2), *make_targets(1, 0)]
    match = HungarianMatcher()([predictions()], targets)[0]
    assert match.image.tolist() == [0, 0]


def test_losses_by_hand():
    """Varifocal, L1 and GIoU of one layer, written out as in the papers."""
    criterion = SetCriterion(5, HungarianMatcher(), WEIGHTS)
    outputs, targets = predictions(), make_targets(2, 3)
    match = criterion.matcher([outputs], targets)[0]
    found = criterion.set_losses(outputs, targets, match, torch.tensor(6.0), "_x")

    labels = torch.cat([t["labels"] for t in targets])
    wanted = torch.cat([t["boxes"] for t in targets])[match.target]
    boxes = outputs["pred_boxes"][match.image, match.query]
    xyxy = box_convert(boxes, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
    iou = box_iou(*xyxy).diag()
    quality = torch.zeros(2, 6, 5)
    quality[match.image, match.query, labels[match.target]] = iou
    p = outputs["pred_logits"].sigmoid()
    matched = torch.zeros_like(quality)
    matched[match.image, match.query, labels[match.target]] = 1
    entropy = -(quality * p.log() + (1 - quality) * (1 - p).log())
    weight = matched * quality + (1 - matched) * 0.75 * p**2
    expected = {
        "loss_vfl_x": (weight * entropy).sum() / 6,
        "loss_bbox_x": 5 * (boxes - wanted).abs().sum() / 6,
        "loss_giou_x": 2 * (1 - generalized_box_iou(*xyxy).diag()).sum() / 6,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)

"""The study in projects/vlm_budget: its training batches, its command."""

import importlib
import json
import random

import pytest
import torch

from ..test_configs import ROOT

pytest.importorskip("transformers", minversion="5.23")


@pytest.fixture
def project(monkeypatch):
    """Its modules, which the command finds beside itself."""
    monkeypatch.syspath_prepend(str(ROOT / "projects/vlm_budget"))
    return importlib.import_module("evaluate"), importlib.import_module("answering")


@pytest.fixture
def network(project):
    """Of the smoke setting's size, with blocks that matter."""
    from dset_d2.budget.language import Qwen3VLMoE

    evaluate, answering = project
    torch.manual_seed(0)
    model = answering.build_model(evaluate.SMOKE.size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return Qwen3VLMoE(model)


@pytest.fixture
def items(project, tmp_path):
    evaluate, answering = project
    (scenes,) = answering.draw_scenes(tmp_path, [4], evaluate.SMOKE.size.image, seed=1)
    return scenes, answering.make_items(scenes, seed=2)


def test_questions_that_share_an_image_are_answered_as_alone(project, network, items):
    from dset_d2.budget.language import LanguageSubject, Question

    evaluate, answering = project
    subject = LanguageSubject(network, (6, 2), (4, 2), (6, 4))
    images, asked = [], []
    for mirror, scene in enumerate(items[0][:2]):
        image, participants = scene.read(bool(mirror))
        images.append(image)
        questions = answering.ask(participants, image.shape[-1], random.Random(mirror))
        asked.append(questions[: 4 + 3 * mirror])  # of unlike lengths
    assert [len(questions) for questions in asked] == [4, 7]
    for setting in (subject.settings[0], subject.settings[-1]):
        packed = answering.pack(network, images, asked, setting["image_tokens"])
        with torch.inference_mode():
            together = answering.answer_packed(network, packed, setting)
        index = 0
        for image, questions in zip(images, asked):
            for question in questions:
                prompt = torch.tensor([2, 1, 3, *answering.encode(question.text)])
                item = Question(image, prompt, int(packed.answers[index]))
                alone = subject.finish(subject.begin(item, setting), setting)
                torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-4)
                assert answering.VOCABULARY[question.answer] == item.answer
                index += 1
        assert index == len(together)


def test_tokens_know_which_boxes_cover_them(project):
    _, answering = project
    from dset_d2.synthetic.questions import Participant

    bus = answering.CATEGORIES.index("Bus")
    # Of 2 x 3 tokens of 32 pixels: from the middle of the first to the right edge, first row.
    objects = [Participant("Bus", (10.0, 2.0, 96.0, 30.0), 9.0)]
    found = answering.cells(objects, (2, 3), (64, 96))
    count = len(answering.CATEGORIES)
    assert found[:, bus].tolist() == [1, 1, 1, 0, 0, 0]
    assert found[:, count + 2 + bus].tolist() == [0, 1, 0, 0, 0, 0]
    # The token in the middle is neither left nor right.
    assert found[:, count : count + 2].tolist() == 2 * [[1, 0], [0, 0], [0, 1]]
    assert found.sum() == 8


def test_a_network_learns_the_scenes_that_it_sees(project, network, items):
    """Loss and accuracy of training come from what was learned: two scenes are learned by heart."""
    evaluate, answering = project
    scenes = items[0][:2]
    first = answering.train_vision(network, scenes, (6,), 2, 2, 1e-3, random.Random(0))
    later = answering.train_vision(network, scenes, (6,), 40, 2, 3e-3, random.Random(0))
    assert later < 0.8 * first
    settings = [{"image_tokens": 6, "top_k": 4, "blocks": 6}]
    settings += [{"image_tokens": 6, "top_k": 2, "blocks": 5}]
    before = answering.train_answers(network, scenes, settings, 1, 0, 2, 0.0, random.Random(0))
    right = answering.train_answers(network, scenes, settings, 60, 0.3, 2, 2e-3, random.Random(0))
    assert before < 0.5 and right > 0.6


def test_the_command_runs_and_uses_what_is_there(project, tmp_path, monkeypatch, capsys):
    evaluate, answering = project
    evaluate.main(["--smoke", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    names = {row["controller"] for row in results["rows"]}
    assert names == {
        *("static", "regression", "GRPO", "GRPO, notes", "random", "oracle", "full"),
    }
    assert len({row["budget"] for row in results["rows"]}) == 3
    for row in results["rows"]:
        best = next(
            other["accuracy"]
            for other in results["rows"]
            if other["controller"] == "oracle" and other["budget"] == row["budget"]
        )
        if row["controller"] != "full":  # which may not fit
            assert 0 <= row["accuracy"] <= best <= 1
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    assert "Repeated measurements differ by" in capsys.readouterr().out

    def never(*_):
        raise AssertionError("what is there was made again")

    for name in ("train_vision", "train_answers", "measure_table", "finish_packed"):
        monkeypatch.setattr(evaluate, name, never)
    evaluate.main(["--smoke", "--output", str(tmp_path)])
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["settings"] == results["settings"]
    with pytest.raises(ValueError, match="is of another training, .* move it away"):
        evaluate.main(["--smoke", "--output", str(tmp_path), "--seed", "1"])


def test_batches_say_of_questions_what_the_subject_says(project, network, items):
    """Qualities and features that fill the outcomes are those of single questions."""
    from dset_d2.budget import Outcomes, measure_table
    from dset_d2.budget.language import LanguageSubject

    evaluate, _ = project
    subject = LanguageSubject(network, (6, 2), (4, 2), (6, 4))
    questions = [item for item, _ in items[1]]
    table = measure_table(subject, questions, rounds=1, warmup=0)
    filled = evaluate.fill(Outcomes(subject, questions, table), items[1], batch=3)
    alone = Outcomes(subject, questions, table).run_all()
    assert torch.equal(filled.quality, alone.quality)
    torch.testing.assert_close(filled.features, alone.features, rtol=0, atol=1e-4)

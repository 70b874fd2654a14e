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
    file = tmp_path / "scenes.pt"
    (scenes,) = answering.draw_scenes(file, [4], evaluate.SMOKE.size.image, seed=1)
    return scenes, answering.make_items(scenes, seed=2)


def test_questions_that_share_an_image_are_answered_as_alone(project, network, items):
    from dset_d2.budget.language import LanguageSubject, Question

    evaluate, answering = project
    subject = LanguageSubject(network, (6, 2), (4, 2), (6, 4))
    images, asked = [], []
    for mirror, scene in enumerate(items[0][:2]):
        image, seen = scene.mirrored() if mirror else scene
        images.append(image)
        questions = answering.ask(seen, image.shape[-1], random.Random(mirror))
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


def test_scenes_are_drawn_once_and_in_groups(project, items, tmp_path, monkeypatch):
    evaluate, answering = project
    file, size = tmp_path / "scenes.pt", evaluate.SMOKE.size.image
    (scenes, _) = items
    assert all(scene.image.shape == (3, *size) for scene in scenes)
    monkeypatch.delattr(answering, "render_scene")  # what is there is not drawn again
    first, others = answering.draw_scenes(file, [1, 3], size, seed=1)
    assert [scene.participants for scene in (*first, *others)] == [s.participants for s in scenes]
    assert torch.equal(others[2].image, scenes[3].image)
    twice = scenes[0].mirrored().mirrored()
    assert torch.equal(twice.image, scenes[0].image)
    for one, again in zip(scenes[0].participants, twice.participants, strict=True):
        assert again.box == pytest.approx(one.box)
    with pytest.raises(ValueError, match="scenes.pt has other scenes, .* move it away"):
        answering.draw_scenes(file, [4], size, seed=2)


def test_tokens_know_what_they_show(project):
    _, answering = project
    from dset_d2.synthetic.questions import Participant

    # Of 2 x 3 tokens of 32 pixels: from the middle of the first to the right edge, first row.
    seen = [
        Participant("Car", (10.0, 2.0, 96.0, 30.0), 9.0, "red"),
        Participant("Car", (70.0, 40.0, 80.0, 60.0), 20.0, "grey"),
        Participant("PedestrianIgnore", (0.0, 0.0, 96.0, 64.0), 5.0),
    ]
    found = answering.cells(seen, (2, 3), (64, 96)).view(2, 3, -1)
    show = {name: found[..., index].int().tolist() for name, index in answering.SHOWN.items()}
    assert show.pop("Car") == [[1, 1, 1], [0, 0, 1]]
    assert show.pop("centre of Car") == [[0, 1, 0], [0, 0, 1]]
    assert show.pop("red") == show.pop("nearest") == [[1, 1, 1], [0, 0, 0]]
    assert show.pop("grey") == [[0, 0, 0], [0, 0, 1]]
    # The token in the middle is neither left nor right.
    assert show.pop("left") == [[1, 0, 0]] * 2 and show.pop("right") == [[0, 0, 1]] * 2
    assert not any(map(sum, sum(show.values(), []))), "others are shown"


def test_a_network_learns_the_scenes_that_it_sees(project, network, items):
    """Loss and accuracy of training come from what was learned: two scenes are learned by heart."""
    evaluate, answering = project
    scenes = items[0][:2]
    settings = [{"image_tokens": 6, "top_k": 4, "blocks": 6}]
    settings += [{"image_tokens": 6, "top_k": 2, "blocks": 5}]
    unchanged = answering.Recipe(1, 1, 0, 2, rate=0.0)
    before = answering.train(network, scenes, settings, unchanged, seed=0)
    after = answering.train(network, scenes, settings, answering.Recipe(40, 60, 0.3, 2, 3e-3), 0)
    assert after["vision_loss"] < 0.8 * before["vision_loss"]
    assert before["training_accuracy"] < 0.5 and after["training_accuracy"] > 0.6
    assert after["minutes"] > 0 and not network.model.training


def test_the_command_runs_and_uses_what_is_there(project, tmp_path, monkeypatch, capsys):
    evaluate, answering = project
    evaluate.main(["--smoke", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    names = {"static", "regression", "GRPO", "GRPO, notes", "random", "oracle", "full"}
    assert {row["who"] for row in results["rows"]} == names
    assert len({row["budget"] for row in results["rows"]}) == 3
    best = {row["budget"]: row["score"] for row in results["rows"] if row["who"] == "oracle"}
    for row in results["rows"]:
        if row["who"] != "full":  # which may not fit
            assert 0 <= row["score"] <= best[row["budget"]] <= 100
    kinds = {row["questions"]: row for row in results["kinds"]}
    count = kinds.pop("all")["count"]
    assert count == sum(row["count"] for row in kinds.values()) <= evaluate.SMOKE.scenes[2]
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    assert "Repeated measurements differ by" in capsys.readouterr().out

    def never(*_):
        raise AssertionError("what is there was made again")

    for name in ("train", "measure_table", "finish_packed"):
        monkeypatch.setattr(evaluate, name, never)
    evaluate.main(["--smoke", "--output", str(tmp_path)])
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["settings"] == results["settings"]
    for file, wrong in (
        ("scenes.pt", "has other scenes"),
        ("network/weights.pt", "is of another training"),
    ):
        with pytest.raises(ValueError, match=f"{file} {wrong}, .* move it away"):
            evaluate.main(["--smoke", "--output", str(tmp_path), "--seed", "1"])
        (tmp_path / file).unlink()


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

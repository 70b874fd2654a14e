"""Qwen3-VL-MoE under a setting: what runs, that nothing runs twice, and that nothing stays."""

import copy
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from dset_d2.analysis.tracing import KernelCounter, inference
from dset_d2.budget.language import Question

pytest.importorskip("transformers", minversion="5.23")

IMAGE = 3  # the token that stands for an image


@pytest.fixture(scope="module")
def model():
    """Seven text blocks, of which the second has a dense FFN, and visual features added twice."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(
        text_config=dict(
            vocab_size=20,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=4,
            mlp_only_layers=[1],
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]),
        ),
        vision_config=dict(
            depth=3,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            patch_size=8,
            out_hidden_size=32,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        image_token_id=IMAGE,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    model = Qwen3VLMoeForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def network(model):
    from dset_d2.budget.language import Qwen3VLMoE

    return Qwen3VLMoE(model)


@pytest.fixture
def subject(network):
    from dset_d2.budget.language import LanguageSubject

    return LanguageSubject(network, image_tokens=[6, 24], top_k=[1, 2, 4], blocks=[7, 6, 5, 4])


@pytest.fixture
def question() -> Question:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=generator)
    return Question(image, torch.tensor([5, IMAGE, 6, 10, 11, 12]), 13)


FULL = {"image_tokens": 24, "top_k": 4, "blocks": 7}


@torch.inference_mode()
def library(model, inputs) -> torch.Tensor:
    return model(**inputs, logits_to_keep=1).logits[0, -1]


def answer(subject, question, **setting) -> torch.Tensor:
    setting = FULL | setting
    return subject.finish(subject.begin(question, setting), setting)


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@contextmanager
def watched(model):
    """Counts the calls of modules, by name, and the (tokens, experts per token) of experts."""
    calls, routed = Counter(), {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith("experts"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, name=name: routed.update({name: tuple(args[1].shape)})
                )
            )
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: calls.update([name])))
    try:
        yield calls, routed
    finally:
        for handle in handles:
            handle.remove()


def test_the_full_setting_is_the_plain_model(subject, network, model, question):
    assert subject.settings[0] == FULL and len(subject.settings) == 2 * 3 * 4
    for tokens in (24, 6):
        plain = library(model, network.inputs(question.image, question.prompt, tokens))
        close(answer(subject, question, image_tokens=tokens), plain)


def test_images_are_read_as_the_librarys_processor_reads_them(network, question):
    inputs = network.inputs(question.image, question.prompt, 24)
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 12]]
    assert inputs["input_ids"].tolist() == [[5, *[IMAGE] * 24, 6, 10, 11, 12]]
    # The first row is the first patch: channel, two equal frames, 8 x 8 pixels.
    patch = question.image[:, None, :8, :8].expand(-1, 2, -1, -1) / 127.5 - 1
    torch.testing.assert_close(inputs["pixel_values"][0], patch.flatten())


@pytest.mark.parametrize(("count", "absent"), [(6, [4]), (5, [3, 5]), (4, [2, 4, 5])])
def test_fewer_blocks_are_the_model_without_the_others(
    count, absent, subject, network, model, question
):
    """Those that deepstack adds to, and the last, stay: 0, 1 and 6."""
    cut = copy.deepcopy(model)
    for index in reversed(absent):
        del cut.model.language_model.layers[index]
    plain = library(cut, network.inputs(question.image, question.prompt, 24))
    close(answer(subject, question, blocks=count), plain)
    assert not torch.allclose(plain, answer(subject, question), atol=1e-3)


@pytest.mark.parametrize("top_k", [1, 2])
def test_fewer_experts_are_the_model_that_is_so_configured(
    top_k, subject, network, model, question
):
    """The first block keeps its own; the library's gates are normalised at any number."""
    few = copy.deepcopy(model)
    for layer in few.model.language_model.layers[2:]:
        layer.mlp.gate.top_k = top_k
        gates = layer.mlp.gate(torch.randn(5, 32))[1]
        torch.testing.assert_close(gates.sum(-1), torch.ones(5))
    plain = library(few, network.inputs(question.image, question.prompt, 24))
    close(answer(subject, question, top_k=top_k), plain)
    assert not torch.allclose(plain, answer(subject, question), atol=1e-3)


def test_each_stage_runs_its_blocks_once_and_only_those(subject, network, model, question):
    setting = FULL | {"top_k": 2, "blocks": 5}
    text = "model.language_model"
    with watched(model) as (calls, routed):
        state = subject.begin(question, setting)
    assert routed == {f"{text}.layers.0.mlp.experts": (29, 4)}
    assert calls["model.visual"] == calls[f"{text}.rotary_emb"] == 1
    assert not calls["lm_head"] and not calls[f"{text}.norm"]
    with watched(model) as (later, routed):
        subject.finish(state, setting)
    assert routed == {f"{text}.layers.{index}.mlp.experts": (29, 2) for index in (2, 4, 6)}
    assert [later[f"{text}.layers.{index}"] for index in range(7)] == [0, 1, 1, 0, 1, 0, 1]
    assert not calls.keys() & later.keys() - {""}, "a module ran in both stages"
    with watched(model) as (plain, _):
        library(model, network.inputs(question.image, question.prompt, 24))
    both, skipped = calls + later, (f"{text}.layers.3", f"{text}.layers.5")
    # A stage 1 runs the parts, not the library's outermost models, whose calls hooks may see.
    leaves = {name for name in plain if not list(model.get_submodule(name).children())}
    for name in leaves:
        assert both[name] == (0 if name.startswith(skipped) else plain[name]), name


def test_every_knob_takes_multiply_adds_away(network, model, question):
    def products(image_tokens=24, top_k=4, blocks=7) -> int:
        inputs = network.inputs(question.image, question.prompt, image_tokens)
        with inference(model), KernelCounter() as counter:
            network.logits(network.finish(network.begin(**inputs), blocks, top_k)[0, -1])
        return counter.products

    full = products()
    expert = 29 * 3 * 32 * 16  # gate, up and down of one expert for each of 29 tokens
    assert full - products(top_k=2) == 5 * 2 * expert  # of six blocks, one is dense
    attention = 29 * 32 * 16 * (4 + 2 + 2 + 4) + 2 * 29 * 29 * 4 * 16
    router = 29 * 32 * 8
    assert full - products(blocks=6) == 4 * expert + attention + router
    assert products(image_tokens=6) < 0.4 * full


def test_one_beginning_serves_several_settings(subject, question):
    state = subject.begin(question, FULL)
    hidden = state.hidden.clone()
    settings = [FULL, FULL | {"top_k": 1, "blocks": 4}, FULL | {"blocks": 5}]
    for setting in (*settings, *settings):
        close(subject.finish(state, setting), answer(subject, question, **setting))
    assert torch.equal(state.hidden, hidden)
    with pytest.raises(ValueError, match="image_tokens=6: the image was read at 24"):
        subject.finish(state, FULL | {"image_tokens": 6})


def snapshot(model) -> list:
    """Everything that a call could leave on the modules: their attributes, hooks and children."""
    return [
        (name, id(module), {key: copy.copy(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


def test_nothing_stays_in_the_users_model(subject, network, model, question):
    inputs = network.inputs(question.image, question.prompt, 24)
    plain = library(model, inputs)
    model.model.rope_deltas = None  # which the library's own call leaves
    before = snapshot(model)
    for setting in subject.settings[::5]:
        answer(subject, question, **setting)
    assert repr(snapshot(model)) == repr(before)
    assert torch.equal(library(model, inputs), plain)


def test_another_thread_sees_nothing_of_a_call(subject, network, model, question):
    inputs = network.inputs(question.image, question.prompt, 24)
    settings = [FULL | {"top_k": 1, "blocks": 4}, FULL | {"top_k": 2}]
    expected = [library(model, inputs), *(answer(subject, question, **s) for s in settings)]
    calls = [lambda: library(model, inputs)]
    calls += [lambda setting=setting: answer(subject, question, **setting) for setting in settings]
    wrong = []

    def repeat(index: int) -> None:
        for _ in range(15):
            if not torch.allclose(calls[index](), expected[index], rtol=0, atol=1e-5):
                wrong.append(index)

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_features_are_of_the_image_and_of_the_question(subject, question):
    state = subject.begin(question, FULL)
    hidden = state.hidden[0]
    torch.testing.assert_close(state.features, torch.cat([hidden[1:25].mean(0), hidden[-1]]))
    # What lies behind the first block does not count; what the image shows does.
    other = subject.begin(question._replace(image=question.image.flip(-1)), FULL)
    assert not torch.allclose(other.features, state.features, atol=1e-3)
    again = subject.begin(question, FULL | {"top_k": 1, "blocks": 4})
    assert torch.equal(again.features, state.features)


def test_the_table_tells_apart_what_differs_in_time(subject, question):
    assert subject.shape(question, FULL) == "24 image tokens, 5 of text"
    smaller = FULL | {"image_tokens": 6, "top_k": 1}
    assert subject.shape(question, smaller) == "6 image tokens, 5 of text"
    longer = question._replace(prompt=torch.cat([question.prompt, torch.full((6,), 10)]))
    assert subject.shape(longer, FULL) == "24 image tokens, 11 of text"
    small = question._replace(image=question.image[:, :32, :32])
    assert subject.shape(small, FULL) == "4 image tokens, 5 of text"


def test_quality_is_whether_the_likeliest_token_is_the_answer(subject, question):
    logits = torch.zeros(20)
    logits[13] = 1
    assert subject.quality(logits, question) == 1
    assert subject.quality(-logits, question) == 0


def test_wrong_values_are_named(network, model, question):
    from dset_d2.budget.language import LanguageSubject, Qwen3VLMoE

    good = dict(image_tokens=[24, 6], top_k=[4, 2], blocks=[7, 5])
    for name, values, message in (
        ("image_tokens", [], r"image_tokens=\[\] must be different numbers of at least 1"),
        ("image_tokens", [6, 6], r"image_tokens=\[6, 6\] must be different"),
        ("top_k", [0], r"top_k=\[0\] must be different numbers of at least 1"),
        ("top_k", [5], "top_k=5 exceeds the network's 4"),
        ("blocks", [7, 2], r"blocks=2 must lie in 3\.\.7"),
        ("blocks", [8], r"blocks=8 must lie in 3\.\.7"),
    ):
        with pytest.raises(ValueError, match=message):
            LanguageSubject(network, **good | {name: values})
    state = network.begin(**network.inputs(question.image, question.prompt, 24))
    with pytest.raises(ValueError, match=r"top_k=5 must lie in 1\.\.4"):
        network.finish(state, 7, 5)
    with pytest.raises(ValueError, match="prompt: 0 tokens stand for the image; one must"):
        network.inputs(question.image, torch.tensor([5, 6, 10]), 24)
    with pytest.raises(TypeError, match="Qwen3VLMoeModel is no Qwen3VLMoeForConditionalGen"):
        Qwen3VLMoE(model.model)


def test_texts_without_images_run(network, model):
    ids = torch.tensor([[10, 11, 12, 13]])
    with torch.inference_mode():
        state = network.begin(input_ids=ids)
        logits = network.logits(network.finish(state, 7, 4)[0, -1])
    close(logits, library(model, {"input_ids": ids}))

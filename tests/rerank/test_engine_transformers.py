import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.config import ConfigError, load_config
from gem_ray.rerank.encoding import ChoiceTree, answer_ids
from gem_ray.rerank.engine import Request, RequestError
from gem_ray.rerank.engine_transformers import TransformersEngine
from gem_ray.rerank.llava import load_llava
from gem_ray.rerank.packing import PackedRow, split_rows
from gem_ray.rerank.prompts import build_prompt


@pytest.fixture(scope="module")
def engine(base):
    return TransformersEngine.from_config(load_config(reranker={"model": str(base), "adapter": None, "batch_size": 4}))


@pytest.fixture(scope="module")
def plain(base):
    """The same model as transformers' documentation uses it."""
    return LlavaForConditionalGeneration.from_pretrained(base).eval(), LlavaProcessor.from_pretrained(base)


@pytest.fixture(scope="module")
def trained_engine(trained):
    return TransformersEngine.from_config(trained)


def test_score_equals_one_full_forward_pass_for_each_candidate(engine, plain, requests):
    model, processor = plain
    for request, choice in zip(requests, engine.choose(requests, "score"), strict=True):
        totals = [_log_likelihood(model, processor, request, answer) for answer in request.choices]
        assert choice.probabilities == pytest.approx(torch.tensor(totals).softmax(0).tolist(), abs=1e-5)
        assert choice.index == int(np.argmax(totals))
        assert choice.probability == choice.probabilities[choice.index]


def test_generate_equals_constrained_greedy_decoding_by_transformers(engine, plain, requests):
    model, processor = plain
    for request, choice in zip(requests, engine.choose(requests, "generate"), strict=True):
        assert request.choices[choice.index] == _constrained_greedy(model, processor, request)


def test_answers_do_not_depend_on_the_rest_of_the_batch(engine, requests):
    together = engine.choose(requests, "score")
    for request, choice in zip(requests, together, strict=True):
        alone = engine.choose([request], "score")[0]
        assert choice.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


def test_an_image_is_encoded_once_for_all_its_requests(base, requests):
    model = load_llava(base)
    engine = TransformersEngine(model, LlavaProcessor.from_pretrained(base), batch_size=2)
    projected = []
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: projected.append(len(output)))
    engine.choose(requests, "score")  # nine requests about three images, two in a batch
    assert sum(projected) == 3


def test_what_the_prompts_about_an_image_share_is_read_once(base, requests):
    model = load_llava(base)
    read = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    engine = TransformersEngine(model, LlavaProcessor.from_pretrained(base), batch_size=3)
    engine.choose(requests[:3], "score")
    for request in requests[:3]:
        engine.choose([request], "score")
    together, *alone = read
    assert together < 0.6 * sum(alone)  # the image, the instruction and half of the text of two


def test_many_questions_about_a_long_post_share_rows_of_bounded_length(base, monkeypatch):
    words = [f"word{index}" for index in range(60)]
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    choices = ("city", "sports_team", "music")
    requests = [
        Request(image, build_prompt(words, at, at + 1, choices), choices) for at in (0, 50, 51, 52, 3, 55, 56, 59)
    ]
    unbounded = TransformersEngine(load_llava(base), LlavaProcessor.from_pretrained(base), max_length=2048)
    longest = max(len(unbounded._encoder.encode(request).prompt) for request in requests) + 100
    engine = TransformersEngine(load_llava(base), LlavaProcessor.from_pretrained(base), max_length=longest)
    lengths = []
    make = PackedRow.of
    monkeypatch.setattr(
        PackedRow, "of", lambda prompts, trees: (row := make(prompts, trees), lengths.append(len(row.ids)))[0]
    )
    bounded = engine.choose(requests, "score")
    assert 1 < len(lengths) < len(requests)
    assert max(lengths) <= longest
    for one, other in zip(bounded, unbounded.choose(requests, "score"), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


@settings(max_examples=100)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1, max_size=8),
    longest=st.integers(6, 60),
)
def test_rows_hold_every_request_once_and_are_as_long_as_they_are_said_to_be(prompts, longest):
    trees = [ChoiceTree.of([[5, 9], [6, 7, 9]])] * len(prompts)
    parts = list(split_rows(prompts, trees, longest))
    assert [prompt for part in parts for prompt in prompts[part]] == prompts
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        row = PackedRow.of(prompts[part], trees[part])
        assert len(row.ids) <= longest or part.stop - part.start == 1
        if following is not None:  # no row ends that has room for the next request
            more = slice(part.start, part.stop + 1)
            assert len(PackedRow.of(prompts[more], trees[more]).ids) > longest


def test_images_are_padded_to_a_square_as_llava_was_trained_unless_a_crop_is_asked_for(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    processor = LlavaProcessor.from_pretrained(base)
    published = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        published, processor.tokenizer, patch_size=8, vision_feature_select_strategy="default"
    ).save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (30, 90, 3), dtype=np.uint8)
    square = np.full((90, 90, 3), [int(255 * mean) for mean in published.image_mean], np.uint8)
    square[30:60] = image
    middle = image[:, 30:60]
    choices = ("city", "sports_team", "music")
    for fit, same in (("pad", square), ("crop", middle)):
        settings = {"model": str(tmp_path), "adapter": None, "image_fit": fit}
        engine = TransformersEngine.from_config(load_config(reranker=settings))
        asked = [Request(each, build_prompt(["a", "b"], 0, 1, choices), choices) for each in (image, same)]
        one, other = engine.choose(asked, "score")
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-2 if fit == "crop" else 1e-6)


def test_a_length_that_leaves_no_room_beside_an_image_is_refused_with_the_numbers(base):
    settings = {"model": str(base), "adapter": None, "max_model_len": 150}
    with pytest.raises(ConfigError, match=r"max_model_len is 150, but .* 16 tokens of an image"):
        TransformersEngine.from_config(load_config(reranker=settings))


def test_a_request_that_is_too_long_fails_alone(engine, requests):
    long = Request(requests[0].image, requests[0].prompt.replace("Text:", "Text:" + " word" * 2000), ("city", "park"))
    answers = engine.choose([requests[0], long, requests[1]], "score")
    assert isinstance(answers[1], RequestError)
    expected = engine.choose(requests[:2], "score")
    assert [answers[0].probabilities, answers[2].probabilities] == [
        pytest.approx(choice.probabilities, abs=1e-5) for choice in expected
    ]


def test_an_image_of_three_rows_is_not_taken_for_one_of_three_channels(trained_engine, colored_requests):
    flat = [replace(request, image=request.image[:3]) for request in colored_requests]
    expected = trained_engine.choose(colored_requests, "score")
    for choice, full in zip(trained_engine.choose(flat, "score"), expected, strict=True):
        assert choice.probabilities == pytest.approx(full.probabilities, abs=1e-4)


def test_a_strip_is_refused_before_it_is_enlarged(engine, requests):
    strip = replace(requests[0], image=np.zeros((1, 1024, 3), np.uint8))
    refused, answered = engine.choose([strip, requests[1]], "score")
    assert isinstance(refused, RequestError)
    assert "1024 × 1" in str(refused)
    assert answered.probabilities == pytest.approx(engine.choose([requests[1]], "score")[0].probabilities, abs=1e-5)


def test_a_trained_adapter_changes_the_answers_and_makes_them_right(engine, trained_engine, colored_requests):
    expected = ["city", "city", "sports_team", "sports_team", "city", "city"]
    for mode in ("score", "generate"):
        assert _answers(trained_engine, colored_requests, mode) == expected
        assert _answers(engine, colored_requests, mode) != expected
    assert all(choice.probability > 0.8 for choice in trained_engine.choose(colored_requests, "score"))


def test_constrained_and_free_greedy_answers_of_a_trained_model_agree(base, adapter, trained_engine, colored_requests):
    from peft import PeftModel

    processor = LlavaProcessor.from_pretrained(base)
    model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), str(adapter)).eval()
    for request, choice in zip(colored_requests, trained_engine.choose(colored_requests, "generate"), strict=True):
        inputs = processor(images=request.image, text=request.prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == f" {request.choices[choice.index]}"


def _answers(engine, requests, mode):
    return [r.choices[c.index] for r, c in zip(requests, engine.choose(requests, mode), strict=True)]


@torch.no_grad()
def _log_likelihood(model, processor, request, answer) -> float:
    inputs = processor(images=request.image, text=f"{request.prompt} {answer}</s>", return_tensors="pt")
    ids = inputs["input_ids"][0]
    count = len(answer_ids(processor.tokenizer, answer))
    logs = model(**inputs).logits[0].log_softmax(-1)
    return sum(float(logs[at - 1, ids[at]]) for at in range(len(ids) - count, len(ids)))


def _constrained_greedy(model, processor, request) -> str:
    inputs = processor(images=request.image, text=request.prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    answers = {choice: answer_ids(processor.tokenizer, choice) for choice in request.choices}

    def allowed(row, ids):
        written = ids[length:].tolist()
        return [a[len(written)] for a in answers.values() if a[: len(written)] == written and len(a) > len(written)]

    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False, prefix_allowed_tokens_fn=allowed)[0, length:]
    return next(choice for choice, answer in answers.items() if answer == ids.tolist())

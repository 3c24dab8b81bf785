import json
import random
import re
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.config import ConfigError
from gem_ray.data.generated import generate
from gem_ray.model_files import CONFIDENCE_FILE
from gem_ray.recipes import recipe_names
from gem_ray.rerank.candidates import StoredCandidates
from gem_ray.rerank.llava import load_llava
from gem_ray.rerank.recipe import RerankerTraining, load_reranker_recipe
from gem_ray.rerank.samples import SampleEncoder
from gem_ray.rerank.train_reranker import LORA_MODULES, answer_loss, train_reranker
from gem_ray.taxonomy import FMNERG


@pytest.fixture(scope="module")
def posts():
    return list(generate(8, 3))


@pytest.fixture
def recipe() -> RerankerTraining:
    """Everything that is random, for a few steps."""
    return RerankerTraining(
        learning_rate=3e-3, epochs=3, batch_size=4, rank=8, alpha=16, device="cpu", checkpoint_steps=2, report_every=1
    )


def _encoder(base) -> SampleEncoder:
    return SampleEncoder(load_llava(base), LlavaProcessor.from_pretrained(base))


def test_the_loss_is_transformers_own_loss_on_the_answers_tokens(base, requests):
    model, processor = load_llava(base), LlavaProcessor.from_pretrained(base)
    encoder = _encoder(base)
    chosen = [requests[0], requests[4], requests[8]]
    answers = [request.choices[-1] for request in chosen]
    samples = [encoder.sample(r.image, r.prompt, answer) for r, answer in zip(chosen, answers, strict=True)]
    total, count = 0.0, 0
    for request, answer, sample in zip(chosen, answers, samples, strict=True):
        inputs = processor(images=request.image, text=f"{request.prompt} {answer}</s>", return_tensors="pt")
        length = len(sample.question.tree.tokens)
        labels = inputs["input_ids"].clone()
        labels[:, :-length] = -100
        total += model(**inputs, labels=labels).loss.item() * length
        count += length
    batch = encoder.collate(samples)
    outputs = model(**batch)
    assert outputs.logits.shape[1] < batch["input_ids"].shape[1] / 3  # the vocabulary's head is costly
    assert answer_loss(outputs, batch["labels"]).item() == pytest.approx(total / count, rel=1e-4)
    assert answer_loss(outputs, batch["labels"], 2 * count).item() == pytest.approx(total / count / 2, rel=1e-4)


def test_the_adapter_is_on_the_language_models_linear_layers_only(base, adapter):
    names = [name for name, _ in LlavaForConditionalGeneration.from_pretrained(base).named_modules()]
    wrapped = {
        re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", key)
        for key in load_file(adapter / "adapter_model.safetensors")
    }
    assert wrapped == {name for name in names if re.fullmatch(LORA_MODULES, name)}
    assert len(wrapped) == 2 * 7  # layers × linear layers
    assert all("language_model" in name for name in wrapped)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["bias"], config["modules_to_save"], config["use_dora"]) == (64, "none", None, False)
    assert config["base_model_name_or_path"] == base.name


def _weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def _assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_is_repeatable_and_lowers_the_loss(base, posts, tmp_path):
    settings = RerankerTraining(learning_rate=3e-3, epochs=4, batch_size=8, rank=8, alpha=16, device="cpu")
    results = [train_reranker(posts, str(base), tmp_path / name, settings) for name in ("one", "two")]
    assert results[0] == results[1]
    _assert_equal(_weights(tmp_path / "one"), _weights(tmp_path / "two"))
    entities = sum(len(post.gold) for post in posts)
    assert results[0]["entities"] == entities
    assert results[0]["steps"] == -(-4 * entities // 8)
    settings = settings.model_copy(update={"report_every": 4})
    result = train_reranker(posts, str(base), tmp_path / "reported", settings)
    assert result["last_loss"] < 0.8 * result["first_loss"]


class KilledError(Exception):
    """What stands for a kill."""


def _kill_at(step):
    def report(number, loss):
        if number == step:
            raise KilledError

    return report


@pytest.mark.parametrize("kills", [(3,), (4, 8)])
def test_resumed_training_gives_the_same_weights(base, posts, recipe, tmp_path, kills):
    whole = train_reranker(posts, str(base), tmp_path / "whole", recipe)
    for step in kills:
        with pytest.raises(KilledError):
            train_reranker(posts, str(base), tmp_path / "resumed", recipe, report=_kill_at(step))
    torch.manual_seed(99)  # another process would not go on with this one's random numbers
    steps = []
    resumed = train_reranker(
        posts, str(base), tmp_path / "resumed", recipe, report=lambda step, loss: steps.append(step)
    )
    assert min(steps) > 2  # it did not begin anew
    _assert_equal(_weights(tmp_path / "whole"), _weights(tmp_path / "resumed"))
    assert resumed == whole
    assert not (tmp_path / "resumed" / "checkpoints").exists()


def test_the_confidence_of_an_earlier_adapter_is_forgotten(base, posts, recipe, tmp_path):
    (tmp_path / CONFIDENCE_FILE).write_text("of other weights")
    train_reranker(posts, str(base), tmp_path, recipe.model_copy(update={"epochs": 1}))
    assert not (tmp_path / CONFIDENCE_FILE).exists()


def test_checkpoints_hold_the_adapter_alone(base, posts, recipe, tmp_path):
    with pytest.raises(KilledError):
        train_reranker(posts, str(base), tmp_path, recipe, report=_kill_at(3))
    (checkpoint,) = (tmp_path / "checkpoints").glob("checkpoint-*")
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()


def test_a_training_with_another_recipe_is_not_gone_on_with(base, posts, recipe, tmp_path):
    with pytest.raises(KilledError):
        train_reranker(posts, str(base), tmp_path, recipe, report=_kill_at(3))
    with pytest.raises(ConfigError, match="started with another recipe"):
        train_reranker(posts, str(base), tmp_path, recipe.model_copy(update={"epochs": 4}))
    first = next(post for post in posts if post.gold)
    place = {"word_start": first.gold[0].word_start, "word_end": first.gold[0].word_end, "candidates": ["city"]}
    for post_id, message in (
        (first.post_id, "started with another set of candidates"),
        ("strange", "has candidates of no mention of these posts"),
    ):
        pq.write_table(pa.Table.from_pylist([{"post_id": post_id, **place}]), tmp_path / "candidates.parquet")
        stored = StoredCandidates(tmp_path / "candidates.parquet", FMNERG, recipe.k)
        with pytest.raises(ValueError, match=message):
            train_reranker(posts, str(base), tmp_path, recipe, stored)


def test_accumulated_gradients_make_the_same_step_as_a_larger_batch(base, posts, recipe, tmp_path):
    """Also where batches hold answers of different lengths."""
    whole = recipe.model_copy(update={"dropout": 0.0, "batch_size": 8})
    parts = whole.model_copy(update={"batch_size": 2, "gradient_accumulation": 4})
    for name, settings in (("whole", whole), ("parts", parts)):
        train_reranker(posts, str(base), tmp_path / name, settings)
    one, other = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)


def test_checkpointed_activations_change_nothing(base, posts, recipe, tmp_path):
    for name, value in (("kept", False), ("again", True)):
        settings = recipe.model_copy(update={"gradient_checkpointing": value, "epochs": 1})
        train_reranker(posts, str(base), tmp_path / name, settings)
    one, other = _weights(tmp_path / "kept"), _weights(tmp_path / "again")
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


def test_a_base_in_half_precision_gets_an_adapter_in_single_precision(base, posts, recipe, tmp_path):
    settings = recipe.model_copy(update={"precision": "bfloat16", "epochs": 1})
    result = train_reranker(posts, str(base), tmp_path, settings)
    assert result["last_loss"] > 0
    assert {weight.dtype for weight in _weights(tmp_path).values()} == {torch.float32}


def test_a_base_in_four_bits_gets_an_adapter_for_the_base_as_it_is(base, posts, recipe, tmp_path, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    adapted = []

    def spy(model, *arguments):
        adapted.append(model)
        return prepare_model_for_kbit_training(model, *arguments)

    monkeypatch.setattr("gem_ray.rerank.train_reranker.prepare_model_for_kbit_training", spy)
    train_reranker(posts, str(base), tmp_path / "whole", recipe)
    train_reranker(posts, str(base), tmp_path / "quantized", recipe.model_copy(update={"four_bit": True}))
    (model,) = adapted
    small = {n for n, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(small) == 2 * 7
    assert all("language_model" in name for name in small)
    one, other = _weights(tmp_path / "whole"), _weights(tmp_path / "quantized")
    assert one.keys() == other.keys()
    # Four bits are near enough for the adapter to learn about the same.
    name = next(name for name in one if name.endswith("lora_B.weight"))
    assert torch.cosine_similarity(one[name].flatten(), other[name].flatten(), dim=0) > 0.5


def test_four_bits_without_bitsandbytes_say_what_to_install(base, posts, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("gem_ray.rerank.train_reranker.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"gem-ray\[quantize\]"):
        train_reranker(posts, str(base), tmp_path, recipe.model_copy(update={"four_bit": True}))


@pytest.mark.parametrize("name", recipe_names("reranker"))
def test_presets_are_valid(name):
    assert load_reranker_recipe(name, seed=3).seed == 3


def test_the_papers_recipe_is_the_default():
    settings = load_reranker_recipe()
    assert (settings.rank, settings.epochs, settings.learning_rate, settings.k) == (64, 3, 5e-6, 5)
    with pytest.raises(ConfigError, match="ranks: no such key"):
        load_reranker_recipe(ranks=3)


def test_training_leaves_the_base_model_as_it_was(base, adapter):
    before = LlavaForConditionalGeneration.from_pretrained(base).state_dict()
    adapted = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), str(adapter))
    with adapted.disable_adapter():
        for name, weight in adapted.get_base_model().state_dict().items():
            if "lora" not in name:
                assert torch.equal(weight, before[name.replace(".base_layer", "")])


def test_posts_without_a_readable_image_are_passed_over_and_left_unchanged(base, posts, tmp_path):
    broken = [replace(posts[0], image_bytes=None), replace(posts[1], image_bytes=b"not an image")]
    with pytest.raises(ValueError, match="no post has both"):
        train_reranker(broken, str(base), tmp_path / "out", RerankerTraining(epochs=1, device="cpu"))
    assert all(post.problems == [] and post.image is None for post in broken)


def test_candidates_can_be_given_by_the_caller(base, posts, tmp_path):
    seen = []

    def rule(post, gold, rng):
        assert isinstance(rng, random.Random)
        seen.append((post.post_id, gold))
        return [gold.fine, "city" if gold.fine != "city" else "state"]

    train_reranker(posts[:3], str(base), tmp_path / "out", RerankerTraining(epochs=2, rank=8, device="cpu"), rule)
    expected = [(post.post_id, gold) for post in posts[:3] for gold in post.gold]
    assert sorted(seen, key=repr) == sorted(expected * 2, key=repr)

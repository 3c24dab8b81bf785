import json
import random
import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.data.generated import generate
from gem_ray.rerank.engine import Request
from gem_ray.rerank.llava import load_llava
from gem_ray.rerank.train import LORA_MODULES, AnswerLoss, RerankerTraining, Sample, train_reranker
from gem_ray.taxonomy import FMNERG


@pytest.fixture(scope="module")
def posts():
    return list(generate(8, 3))


def _sample(loss: AnswerLoss, request: Request, answer: str) -> Sample:
    sample = loss.sample(request.image, request.prompt, answer)
    assert sample is not None
    return sample


def test_the_loss_is_transformers_own_loss_on_the_answers_tokens(base, requests):
    model, processor = load_llava(base), LlavaProcessor.from_pretrained(base)
    loss = AnswerLoss(model, processor)
    chosen = [requests[0], requests[4], requests[8]]
    answers = [request.choices[-1] for request in chosen]
    samples = [_sample(loss, request, answer) for request, answer in zip(chosen, answers, strict=True)]
    total, count = 0.0, 0
    for request, answer, sample in zip(chosen, answers, samples, strict=True):
        inputs = processor(images=request.image, text=f"{request.prompt} {answer}</s>", return_tensors="pt")
        length = len(sample.question.tree.tokens)
        labels = inputs["input_ids"].clone()
        labels[:, :-length] = -100
        total += model(**inputs, labels=labels).loss.item() * length
        count += length
    assert loss(samples).item() == pytest.approx(total / count, rel=1e-4)


def test_samples_about_one_image_share_its_features(base, requests):
    model = load_llava(base)
    projected = []
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: projected.append(len(output)))
    loss = AnswerLoss(model, LlavaProcessor.from_pretrained(base))
    loss([_sample(loss, request, "city") for request in requests])
    assert projected == [3]


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


def test_training_is_repeatable_and_lowers_the_loss(base, posts, tmp_path):
    settings = RerankerTraining(learning_rate=3e-3, epochs=4, batch_size=8, rank=8, alpha=16)
    results = [train_reranker(posts, str(base), tmp_path / name, settings) for name in ("one", "two")]
    assert results[0] == results[1]
    assert results[0]["last_loss"] < 0.8 * results[0]["first_loss"]
    entities = sum(len(post.gold) for post in posts)
    assert results[0]["steps"] == -(-4 * entities // 8)


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
        train_reranker(broken, str(base), tmp_path / "out", RerankerTraining(epochs=1))
    assert all(post.problems == [] and post.image is None for post in broken)


def test_candidates_can_be_given_by_the_caller(base, posts, tmp_path):
    seen = []

    def rule(post, gold, rng):
        assert isinstance(rng, random.Random)
        seen.append((post.post_id, gold))
        return [gold.fine, "city" if gold.fine != "city" else "state"]

    train_reranker(posts[:3], str(base), tmp_path / "out", RerankerTraining(epochs=2, rank=8), FMNERG, rule)
    expected = [(post.post_id, gold) for post in posts[:3] for gold in post.gold]
    assert sorted(seen, key=repr) == sorted(expected * 2, key=repr)

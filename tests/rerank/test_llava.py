import json
import random

import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from gem_ray.data.emblems import EMBLEMS
from gem_ray.data.generated import generate
from gem_ray.nano.llava import confusable_candidates
from gem_ray.nano.llava_model import build_llava
from gem_ray.rerank.encoding import count_image_tokens
from gem_ray.rerank.llava import save_llava
from gem_ray.rerank.tokenizer import train_tokenizer

INDEX = "model.safetensors.index.json"


def test_weights_are_named_as_in_published_checkpoints_however_often_they_are_saved(base, tmp_path):
    before = load_file(base / "model.safetensors")
    assert "vision_tower.vision_model.embeddings.class_embedding" in before
    model, information = LlavaForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    save_llava(model, LlavaProcessor.from_pretrained(base), tmp_path)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_large_checkpoints_are_saved_in_shards_with_published_names(base, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(base)
    save_llava(model, LlavaProcessor.from_pretrained(base), tmp_path, max_shard_size="100KB")
    before, places = load_file(base / "model.safetensors"), json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert len(set(places.values())) > 1
    assert places.keys() == before.keys()
    for name, file in places.items():
        assert torch.equal(load_file(tmp_path / file)[name], before[name])
    again, information = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not information["missing_keys"]
    assert not information["unexpected_keys"]
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def test_the_default_size_stays_below_two_million_parameters(tmp_path):
    build_llava(tmp_path, train_tokenizer(["so this is Ardenza"], 1536))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.num_parameters() < 2_000_000
    processor = LlavaProcessor.from_pretrained(tmp_path)
    inputs = processor(images=torch.zeros(3, 40, 90, dtype=torch.uint8), text="<image>\nx", return_tensors="pt")
    assert inputs["pixel_values"].shape[-2:] == (120, 120)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == count_image_tokens(model.config) == 100


def test_any_text_survives_the_tokenizer(base):
    tokenizer = LlavaProcessor.from_pretrained(base).tokenizer
    text = "naïve 😍 #日本 \u200b &amp; sports_team"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_candidates_of_a_shared_name_hold_both_senses():
    rng = random.Random(0)
    senses = {emblem.name: {other.fine for other in EMBLEMS if other.name == emblem.name} for emblem in EMBLEMS}
    met = 0
    for post in generate(30, 5):
        for gold in post.gold or ():
            candidates = confusable_candidates(post, gold, rng)
            assert len(set(candidates)) == 5
            name = " ".join(post.tokens[gold.word_start : gold.word_end])
            assert {gold.fine} | senses.get(name, set()) <= set(candidates)
            met += len(senses.get(name, ())) == 2
    assert met > 10

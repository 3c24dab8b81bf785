from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertTokenizer, BlipForImageTextRetrieval

from gem_ray.data.emblems import EMBLEMS
from gem_ray.grounding.blip import encode_images
from gem_ray.grounding.decision import Decision
from gem_ray.grounding.matcher import ImageProcessor, MatchQuery, TextProcessor
from gem_ray.nano.blip import (
    CONFUSABLE,
    BlipRecipe,
    NameBank,
    Trainer,
    ask_names,
    name_bank,
)
from gem_ray.nano.blip_scores import decide
from gem_ray.nano.scenes import Scenes, render_scene, render_scenes
from gem_ray.nano.tiny_blip import BlipSize, build_blip, encode_names, match_logits
from gem_ray.taxonomy import FMNERG

SIZE = BlipSize(image_side=32, width=24, image_layers=2, text_layers=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    build_blip(out, [f"{emblem.name} is belong {emblem.fine}." for emblem in EMBLEMS], SIZE)
    return out


@pytest.fixture
def model(folder: Path) -> BlipForImageTextRetrieval:
    return BlipForImageTextRetrieval.from_pretrained(folder)


@pytest.fixture(scope="module")
def bank(folder: Path) -> NameBank:
    tokenizer = BertTokenizer.from_pretrained(folder)
    return name_bank(TextProcessor(tokenizer, len(tokenizer)), seed=0)


def test_known_words_and_categories_are_tokens_and_others_are_spelled(folder):
    tokenizer = BertTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("Redmoor Rovers is belong sports_team.") == [
        "redmoor",
        "rovers",
        "is",
        "belong",
        "sports_team",
        ".",
    ]
    assert tokenizer.tokenize("Zoë") == ["z", "##o", "##e"]
    assert all(len(tokenizer.tokenize(fine)) == 1 for emblem in EMBLEMS for fine in [emblem.fine])
    assert all("[UNK]" not in tokenizer.tokenize(fine) for fine in FMNERG.fine)


def test_fused_passes_equal_the_models_own(model, bank):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
        pixels = torch.randn(2, 3, 32, 32)
        states = model.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(encode_images(model, pixels), states, rtol=1e-4, atol=1e-4)
        rows = torch.tensor([[0, 5, 300], [7, 80, 2]])
        logits, looking = match_logits(model, states, bank.input_ids[rows], bank.attention_mask[rows])
        for image, name in np.ndindex(2, 3):
            row = rows[image, name]
            length = int(bank.attention_mask[row].sum())
            output = model.text_encoder(
                bank.input_ids[row, None, :length], encoder_hidden_states=states[image, None], output_attentions=True
            )
            expected = model.itm_head(output.last_hidden_state[0, 0])
            torch.testing.assert_close(logits[image, name], expected, rtol=1e-4, atol=1e-4)
            on_patches = output.cross_attentions[0][0, :, :, 1:].sum(dim=-1).mean()
            torch.testing.assert_close(looking[image, name], on_patches, rtol=1e-4, atol=1e-4)


def test_names_are_encoded_as_the_models_own_text_encoder_does_without_an_image(model, bank):
    with torch.no_grad():
        rows = torch.tensor([0, 5, 300])
        names = encode_names(model, bank.input_ids[rows], bank.attention_mask[rows])
        for row, name in zip(rows, names, strict=True):
            length = int(bank.attention_mask[row].sum())
            hidden = model.text_encoder(bank.input_ids[row, None, :length]).last_hidden_state[0, 0]
            torch.testing.assert_close(name, F.normalize(model.text_proj(hidden), dim=0), rtol=1e-4, atol=1e-5)


def test_patches_begin_by_attending_to_their_neighbours(tmp_path):
    torch.manual_seed(0)
    build_blip(tmp_path, ["a"], BlipSize(image_side=128, patch=8))
    model = BlipForImageTextRetrieval.from_pretrained(tmp_path)
    with torch.no_grad():
        layer = model.vision_model.encoder.layers[0]
        hidden = layer.layer_norm1(model.vision_model.embeddings(torch.zeros(1, 3, 128, 128)))
        _, attention = layer.self_attn(hidden)
    of_middle = attention[0, :, 1:, 1:].mean(dim=0)[8 * 16 + 8].view(16, 16)
    assert of_middle.argmax() == 8 * 16 + 8
    assert of_middle[7:10, 7:10].mean() > 3 * of_middle.mean()


def test_an_image_is_asked_for_all_it_shows_and_for_what_is_easily_confused(bank):
    rng = np.random.default_rng(0)
    emblem_of_row = {row: emblem for emblem, rows in enumerate(bank.rows) for row in rows}
    for _ in range(50):
        shows = np.zeros(len(EMBLEMS), dtype=bool)
        shows[rng.choice(len(EMBLEMS), size=rng.integers(0, 5), replace=False)] = True
        rows, present = ask_names(shows, bank, 16, rng)
        asked = {emblem_of_row[row]: there for row, there in zip(rows[:-1], present[:-1], strict=True)}
        assert len(asked) == 15
        assert all(there == shows[emblem] for emblem, there in asked.items())
        assert set(np.flatnonzero(shows)) <= set(asked)
        assert {other for emblem in np.flatnonzero(shows) for other in CONFUSABLE[emblem]} <= set(asked)
        assert rows[-1] >= bank.strangers
        assert not present[-1]


def test_bank_holds_every_way_to_write_every_name(bank, folder):
    tokenizer = BertTokenizer.from_pretrained(folder)
    assert [len(rows) for rows in bank.rows] == [len(emblem.surfaces) for emblem in EMBLEMS]
    row = bank.rows[0][0]
    text = MatchQuery(0, EMBLEMS[0].name, EMBLEMS[0].fine).text
    assert bank.input_ids[row, 1 : int(bank.attention_mask[row].sum())].tolist() == tokenizer(text)["input_ids"][1:]


def test_scenes_are_rendered_in_order_whoever_renders_them():
    scenes = render_scenes(6, 3, 32, processes=1)
    assert scenes.squares.shape == (6, 32, 32, 3)
    for index, (square, shows) in enumerate(zip(scenes.squares, scenes.shows, strict=True)):
        expected_square, expected_shows = render_scene(3, index, 32)
        assert (square == expected_square).all()
        assert (shows == expected_shows).all()
    assert 0 < scenes.shows.sum(axis=1).max() <= 4


def test_both_stages_learn(model, folder, bank):
    shows = np.zeros((8, len(EMBLEMS)), dtype=bool)
    shows[np.arange(8), np.arange(8) % 2 * 3] = True
    squares = np.where(shows[:, 0, None, None, None], (220, 20, 20), (20, 20, 220)).astype(np.uint8)
    scenes = Scenes(np.broadcast_to(squares, (8, 32, 32, 3)), shows)
    recipe = replace(
        BlipRecipe(), size=SIZE, images=8, names=6, warm_up_steps=30, warm_up_rate=1e-2, cycles=(30, 60), rate=5e-3
    )
    images = ImageProcessor.from_pretrained(folder)
    trainer = Trainer(model, images, bank, scenes, recipe, np.random.default_rng(0), report=lambda line: None)
    losses = trainer.warm_up()
    assert losses[-1] < 0.2 * losses[0]
    losses = trainer.fit_matching()
    assert losses[-1] < 0.7 * losses[0]


def test_threshold_and_layer_are_chosen_on_generated_posts_and_stored(folder):
    scores = decide(folder, count=12, seed=5)
    chosen = Decision.load(folder)
    assert scores["dev_accuracy"] >= 0.5  # one of all-seen and none-seen always reaches it
    assert len(scores["dev_peak_in_box"]) == SIZE.text_layers
    assert scores["dev_peak_in_box"][chosen.layer] == max(scores["dev_peak_in_box"])

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, BlipForImageTextRetrieval

from gem_ray.data.emblems import EMBLEMS
from gem_ray.grounding.matcher import ImageProcessor, Query, TextProcessor
from gem_ray.nano.blip import (
    NAMESAKES,
    BlipRecipe,
    NameBank,
    Scenes,
    ask_names,
    fit_matching,
    name_bank,
    render_scenes,
    warm_up,
)
from gem_ray.nano.tiny_blip import BlipSize, build_blip, encode_images, match_logits
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
                bank.input_ids[row, None, :length],
                encoder_hidden_states=states[image, None],
                output_attentions=True,
            )
            expected = model.itm_head(output.last_hidden_state[0, 0])
            torch.testing.assert_close(logits[image, name], expected, rtol=1e-4, atol=1e-4)
            on_patches = output.cross_attentions[0][0, :, :, 1:].sum(dim=-1).mean()
            torch.testing.assert_close(looking[image, name], on_patches, rtol=1e-4, atol=1e-4)


def test_an_image_is_asked_for_all_it_shows_and_for_namesakes_that_it_does_not(bank):
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
        assert {other for emblem in np.flatnonzero(shows) for other in NAMESAKES[emblem]} <= set(asked)
        assert rows[-1] >= bank.strangers
        assert not present[-1]


def test_bank_holds_every_way_to_write_every_name(bank, folder):
    tokenizer = BertTokenizer.from_pretrained(folder)
    assert [len(rows) for rows in bank.rows] == [len(emblem.surfaces) for emblem in EMBLEMS]
    row = bank.rows[0][0]
    text = Query(0, EMBLEMS[0].name, EMBLEMS[0].fine).text
    assert bank.input_ids[row, 1 : int(bank.attention_mask[row].sum())].tolist() == tokenizer(text)["input_ids"][1:]


def test_rendered_scenes_are_the_same_for_the_same_seed_and_show_what_they_say():
    one, two = render_scenes(6, 3, 32, 1), render_scenes(6, 3, 32, 1)
    assert one.squares.shape == (6, 32, 32, 3)
    assert (one.squares == two.squares).all()
    assert (one.shows == two.shows).all()
    assert one.shows.sum(axis=1).max() <= 4
    assert one.shows.any()


def test_both_stages_learn(model, folder, bank):
    rng = np.random.default_rng(0)
    shows = np.zeros((8, len(EMBLEMS)), dtype=bool)
    shows[np.arange(8), np.arange(8) % 2 * 3] = True
    squares = np.where(shows[:, 0, None, None, None], (220, 20, 20), (20, 20, 220)).astype(np.uint8)
    scenes = Scenes(np.broadcast_to(squares, (8, 32, 32, 3)), shows)
    recipe = replace(
        BlipRecipe(), size=SIZE, images=8, names=6, warm_up_steps=30, warm_up_rate=1e-2, steps=60, rate=5e-3
    )
    images = ImageProcessor.from_pretrained(folder)
    losses = warm_up(model, images, scenes, recipe, rng, lambda line: None)
    assert losses[-1] < 0.2 * losses[0]
    losses = fit_matching(model, images, bank, scenes, recipe, rng, lambda line: None)
    assert losses[-1] < 0.7 * losses[0]

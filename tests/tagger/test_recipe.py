"""Recipes: the published values, and settings that cannot be."""

import pytest
import yaml

from gem_ray.config import ConfigError
from gem_ray.recipes import recipe_names
from gem_ray.tagger.recipe import TaggerDesign, TaggerTraining, load_tagger_recipe, parse_recipe


@pytest.mark.parametrize(
    ("preset", "encoder"),
    [("paper-bert", "google-bert/bert-base-uncased"), ("paper-roberta", "FacebookAI/roberta-base")],
)
def test_paper_presets_hold_the_papers_values(preset: str, encoder: str) -> None:
    """Appendix C."""
    recipe = load_tagger_recipe(preset)
    assert recipe.encoder == encoder
    assert (recipe.alpha, recipe.beta, recipe.encoder_lr) == (0.1, 0.1, 5e-6)
    assert (recipe.batch_size, recipe.epochs, recipe.max_length, recipe.schedule) == (4, 10, 256, "linear")
    assert recipe.design == TaggerDesign(knowledge="knowledge", coarse_path=True, augmentation=True, crf=True)
    assert recipe.transition_init == "cooccurrence"


def test_every_preset_is_a_recipe_and_survives_yaml() -> None:
    for name in recipe_names("tagger"):
        recipe = load_tagger_recipe(name)
        assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump()))) == recipe


def test_settings_go_over_the_preset() -> None:
    recipe = load_tagger_recipe("paper-bert", epochs=3, lora={"rank": 8}, encoder_lr="5e-4")
    assert (recipe.epochs, recipe.encoder_lr, recipe.batch_size) == (3, 5e-4, 4)
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.alpha) == (8, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "epoch: no such key; did you mean 'epochs'"),
        ({"epochs": 0}, "epochs: .*greater than or equal to 1"),
        ({"lora": {"rnk": 3}}, r"lora\.rnk: no such key; did you mean 'rank'"),
        ({"coarse_path": False}, "augmentation=false with coarse_path=false"),
        ({"consistency": 1.0}, "consistency needs a second view"),
        ({"second_view": "bare", "knowledge": "none"}, "needs knowledge to leave out"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tagger_recipe(None, **settings)


def test_an_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="expected one of nano, paper-bert, paper-roberta"):
        load_tagger_recipe("paper")


def test_design_is_the_part_that_is_stored_with_the_model() -> None:
    assert TaggerTraining(crf=False, knowledge="both").design == TaggerDesign(crf=False, knowledge="both")

"""Model directories in both forms: what goes in comes out, and what does not fit is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gem_ray.records import Post
from gem_ray.tagger.checkpoint import load_encoder, load_tagger, save_tagger
from gem_ray.tagger.features import SubwordEncoder
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.predict import predict_words
from gem_ray.taxonomy import FMNERG, GMNER


@pytest.fixture
def model(encoder_folder: Path) -> DualPathTagger:
    """As if trained with frozen embeddings: everything else differs from the base, in numbers half precision holds."""
    torch.manual_seed(6)
    model = DualPathTagger(load_encoder(str(encoder_folder)), FMNERG, 0.3, 0.2, 0.4, torch.randn(17, 103)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embeddings" not in name:
                parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())
    return model


def same_predictions(one: DualPathTagger, other: DualPathTagger, posts: list[Post], features: SubwordEncoder) -> bool:
    pairs = zip(predict_words(one, posts, features), predict_words(other, posts, features), strict=True)
    return all(a.tags == b.tags and (a.logits == b.logits).all() for a, b in pairs)


def test_the_complete_form_needs_nothing_else(
    model: DualPathTagger, features: SubwordEncoder, posts: list[Post], tmp_path: Path
) -> None:
    save_tagger(model, features.tokenizer, tmp_path)
    loaded, tokenizer = load_tagger(tmp_path)
    assert (loaded.alpha, loaded.beta, loaded.dropout.p, loaded.labels) == (0.3, 0.2, 0.4, FMNERG)
    assert "base_encoder" not in json.loads((tmp_path / "config.json").read_text())
    assert same_predictions(model, loaded, posts, SubwordEncoder(tokenizer, 64))


def test_on_a_base_encoder_only_the_changes_are_stored(
    model: DualPathTagger, features: SubwordEncoder, posts: list[Post], encoder_folder: Path, tmp_path: Path
) -> None:
    save_tagger(model, features.tokenizer, tmp_path, base_encoder=str(encoder_folder))
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    stored = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype is torch.float16 for tensor in stored.values())
    assert not any("embeddings" in name for name in stored)
    assert {name for name in model.state_dict() if "embeddings" not in name} == set(stored)
    loaded, tokenizer = load_tagger(tmp_path)
    assert same_predictions(model, loaded, posts, SubwordEncoder(tokenizer, 64))


def test_a_one_level_tagger_comes_back(
    features: SubwordEncoder, posts: list[Post], encoder_folder: Path, tmp_path: Path
) -> None:
    model = DualPathTagger(load_encoder(str(encoder_folder)), GMNER)
    save_tagger(model, features.tokenizer, tmp_path)
    loaded, _ = load_tagger(tmp_path)
    assert loaded.labels is GMNER
    assert same_predictions(model, loaded, posts, features)


@pytest.mark.parametrize("on_base", [False, True])
def test_missing_and_unexpected_weights_are_named(
    model: DualPathTagger, features: SubwordEncoder, encoder_folder: Path, tmp_path: Path, on_base: bool
) -> None:
    save_tagger(model, features.tokenizer, tmp_path, str(encoder_folder) if on_base else None)
    weights = load_file(tmp_path / "model.safetensors")
    weights["stranger"] = weights.pop("encoder.encoder.layer.0.output.dense.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.bias.*stranger"):
        load_tagger(tmp_path)


def test_a_folder_that_is_no_tagger_is_refused(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_tagger(tmp_path)
    with pytest.raises(ValueError, match="not a tagger's"):
        load_tagger(encoder_folder)

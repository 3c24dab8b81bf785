"""The training loop: it learns, repeats itself, and its parts do what their settings say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

from gem_ray.config import ConfigError
from gem_ray.model_files import CONFIDENCE_FILE
from gem_ray.records import GoldEntity, Post
from gem_ray.tagger.checkpoint import load_encoder, load_tagger
from gem_ray.tagger.features import Batch, SubwordEncoder, load_tokenizer
from gem_ray.tagger.model import DualPathTagger
from gem_ray.tagger.objective import TrainingObjective
from gem_ray.tagger.predict import predict_words
from gem_ray.tagger.recipe import TaggerTraining
from gem_ray.tagger.scores import score_with_and_without_knowledge
from gem_ray.tagger.tagger import Tagger
from gem_ray.tagger.train_tagger import train_tagger
from gem_ray.tagger.trainer import TrainingProgress, parameter_groups
from gem_ray.tagger.views import TrainingViews, collate_views
from gem_ray.taxonomy import FMNERG, decode_bio

PERFECT = {name: {"fine": 1.0, "coarse": 1.0, "span": 1.0} for name in ("with_knowledge", "without_knowledge")}


@pytest.fixture
def settings(encoder_folder: Path) -> TaggerTraining:
    return TaggerTraining(
        encoder=str(encoder_folder),
        epochs=2,
        batch_size=4,
        max_length=64,
        encoder_lr=3e-3,
        head_lr=1e-2,
        crf_lr=1e-2,
        dropout=0.0,
        word_dropout=0.0,
    )


def test_it_learns_eight_posts_by_heart(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    """One model, right with and without knowledge, and still right when read back in half precision."""
    settings = settings.model_copy(update={"epochs": 40, "on_base_encoder": True})
    report = train_tagger(posts, posts, tmp_path, settings)
    assert report["epochs"][-1]["loss"] < 0.2 * report["epochs"][0]["loss"]
    assert report["dev"] == PERFECT
    model, tokenizer = load_tagger(tmp_path)
    Tagger(model, SubwordEncoder(tokenizer, 64))(posts)
    for post in posts:
        found = [(entity.word_start, entity.word_end, entity.fine) for entity in post.entities]
        assert found == [(gold.word_start, gold.word_end, gold.fine) for gold in post.gold or ()]


def test_the_same_seed_gives_the_same_training(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    settings = settings.model_copy(update={"word_dropout": 0.3, "dropout": 0.2})
    runs = [train_tagger(posts, posts, tmp_path, settings) for _ in range(2)]
    losses = [[epoch["loss"] for epoch in run["epochs"]] for run in runs]
    assert losses[0] == losses[1]
    other = train_tagger(posts, posts, tmp_path, settings.model_copy(update={"seed": 1}))
    assert [epoch["loss"] for epoch in other["epochs"]] != losses[0]


def test_frozen_embeddings_stay_the_bases(
    settings: TaggerTraining, posts: list[Post], encoder_folder: Path, tmp_path: Path
) -> None:
    name = "embeddings.word_embeddings.weight"
    before = load_encoder(str(encoder_folder)).state_dict()[name]
    for freeze in (True, False):
        train_tagger(posts, posts, tmp_path, settings.model_copy(update={"freeze_embeddings": freeze}))
        after = load_tagger(tmp_path)[0].encoder.state_dict()[name]
        assert torch.equal(before, after) is freeze


def test_moving_average_is_what_is_saved(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    """A quick average is the model itself, a slow one stays behind it."""
    weights = []
    for decay in (0.0, 1e-6, 0.9999):
        # One epoch: which one is kept must not matter.
        train_tagger(posts, posts, tmp_path, settings.model_copy(update={"epochs": 1, "ema_decay": decay}))
        weights.append(load_tagger(tmp_path)[0].fine_head.weight)
    plain, quick, slow = weights
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=0)
    assert (slow - plain).abs().max() > 1e-3


def test_dropped_knowledge_is_not_seen(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    settings = settings.model_copy(update={"epochs": 1, "knowledge_dropout": 1.0})
    bare = [replace(post, knowledge=None) for post in posts]
    losses = [train_tagger(some, [], tmp_path, settings)["epochs"][0]["loss"] for some in (posts, bare)]
    assert losses[0] == losses[1]


def test_dropped_words_are_not_seen(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    settings = settings.model_copy(update={"epochs": 1, "word_dropout": 1.0})
    other = [replace(post, tokens=[{"paris": "london"}.get(word, word) for word in post.tokens]) for post in posts]
    losses = [train_tagger(some, [], tmp_path, settings)["epochs"][0]["loss"] for some in (posts, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("part", ["encoder", "head", "crf"])
def test_each_part_has_its_own_learning_rate(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path, part: str
) -> None:
    rates = {f"{name}_lr": 1e-2 if name == part else 1e-12 for name in ("encoder", "head", "crf")}
    settings = settings.model_copy(update={**rates, "epochs": 1})
    train_tagger(posts, [], tmp_path / "moved", settings)
    train_tagger(posts, [], tmp_path / "still", settings.model_copy(update={f"{part}_lr": 1e-12}))
    moved, still = (load_tagger(tmp_path / name)[0].state_dict() for name in ("moved", "still"))
    different = {name for name in moved if not torch.allclose(moved[name], still[name], atol=1e-6)}
    kinds = {"crf" if "_crf." in name else "encoder" if name.startswith("encoder.") else "head" for name in different}
    assert kinds == {part}


def test_progress_counts_every_step(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    reports: list[TrainingProgress] = []
    train_tagger(posts, posts, tmp_path, settings, reports.append)
    assert [(report.epoch, report.step) for report in reports] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert all(report.steps == 4 and report.loss > 0 for report in reports)


def test_one_level_labels_train_too(settings: TaggerTraining, tmp_path: Path) -> None:
    posts = [Post("a", "google said", tokens=["google", "said"], gold=[GoldEntity(0, 1, "ORG")])] * 4
    report = train_tagger(posts, posts, tmp_path, settings.model_copy(update={"labels": "gmner", "epochs": 20}))
    assert report["dev"] == PERFECT


def test_scores_are_f1_over_sets_of_mentions(encoder_folder: Path, features: SubwordEncoder, posts: list[Post]) -> None:
    """Gold is what an untrained model says, then bent by known amounts."""
    torch.manual_seed(7)
    model = DualPathTagger(load_encoder(str(encoder_folder)), FMNERG)
    torch.nn.init.normal_(model.fine_head.weight)
    for post, words in zip(posts, predict_words(model, posts, features), strict=True):
        post.gold = [GoldEntity(*span) for span in decode_bio(words.tags)]
    mentions = sum(len(post.gold or ()) for post in posts)
    assert score_with_and_without_knowledge(model, posts, features)["with_knowledge"] == PERFECT["with_knowledge"]
    first, *others = posts[0].gold or []
    posts[0].gold = [replace(first, fine=FMNERG.siblings(first.fine)[0]), *others]
    posts[1].gold = (posts[1].gold or [])[1:]  # one prediction too many
    scores = score_with_and_without_knowledge(model, posts, features)["with_knowledge"]
    assert scores["fine"] == pytest.approx(2 * (mentions - 2) / (2 * mentions - 1))
    assert scores["coarse"] == scores["span"] == pytest.approx(2 * (mentions - 1) / (2 * mentions - 1))


def test_nothing_to_learn_from_is_an_error(settings: TaggerTraining, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training post"):
        train_tagger([Post("a", "google", tokens=["google"])], [], tmp_path, settings)


def test_a_training_that_diverges_ends_with_an_error(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"the loss is nan at step .* the training has diverged"):
        train_tagger(posts, posts, tmp_path, settings.changed(encoder_lr=1e30, head_lr=1e30))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no GPU here for cuda"):
        train_tagger(posts, [], tmp_path, settings.changed(device="cuda"))
    with pytest.raises(ConfigError, match="device"):
        settings.changed(device="gpu")


@pytest.mark.parametrize("on_base", [False, True])
def test_an_adapter_learns_and_is_merged_or_kept_apart(
    settings: TaggerTraining, posts: list[Post], encoder_folder: Path, tmp_path: Path, on_base: bool
) -> None:
    lora = {"rank": 8, "alpha": 16, "dropout": 0.0}
    settings = settings.changed(lora=lora, epochs=40, on_base_encoder=on_base)
    report = train_tagger(posts, posts, tmp_path, settings)
    assert min(scores["fine"] for scores in report["dev"].values()) > 0.9
    loaded, base = load_tagger(tmp_path)[0].encoder.state_dict(), load_encoder(str(encoder_folder)).state_dict()
    changed = {name for name in loaded if not torch.equal(loaded[name], base[name])}
    assert changed == {name for name in loaded if name.endswith("weight") and "layer." in name and "Norm" not in name}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() is on_base
    if on_base:
        assert (tmp_path / "model.safetensors").stat().st_size < 60_000  # heads and CRFs alone


def test_nothing_of_an_earlier_tagger_is_left_in_its_folder(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    settings = settings.changed(on_base_encoder=True)
    train_tagger(posts, posts, tmp_path / "again", settings.changed(lora={"rank": 4}))
    (tmp_path / "again" / CONFIDENCE_FILE).write_text("of other weights")
    for name in ("again", "new"):
        train_tagger(posts, posts, tmp_path / name, settings)
    again, new = ({file.name for file in (tmp_path / name).iterdir()} for name in ("again", "new"))
    assert again == new
    one, other = (load_tagger(tmp_path / name)[0].state_dict() for name in ("again", "new"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("switches", "absent"),
    [
        ({"augmentation": False}, {"transition"}),
        ({"coarse_path": False, "augmentation": False}, {"transition", "coarse_head", "coarse_crf"}),
        ({"crf": False}, {"fine_crf", "coarse_crf"}),
        ({"word_shapes": True}, set()),
        ({"knowledge": "none"}, set()),
    ],
)
def test_every_switch_trains_and_is_stored_with_the_model(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path, switches: dict, absent: set[str]
) -> None:
    settings = settings.changed(**switches, epochs=40)
    report = train_tagger(posts, posts, tmp_path, settings)
    assert report["dev"]["without_knowledge"]["fine"] > 0.9
    model, _ = load_tagger(tmp_path)
    assert model.design == settings.design
    parts = {name.split(".")[0] for name in model.state_dict()}
    whole = {"encoder", "fine_head", "fine_crf", "coarse_head", "coarse_crf", "transition"}
    assert parts - {"shape_embeddings"} == whole - absent
    assert ("shape_embeddings" in parts) is model.design.word_shapes


@pytest.mark.parametrize("kind", ["cooccurrence", "zeros", "random"])
def test_m_begins_as_the_recipe_says(settings: TaggerTraining, posts: list[Post], tmp_path: Path, kind: str) -> None:
    still = {"encoder_lr": 1e-12, "head_lr": 1e-12, "crf_lr": 1e-12}
    train_tagger(posts, [], tmp_path, settings.changed(transition_init=kind, epochs=1, **still))
    matrix = load_tagger(tmp_path)[0].transition.detach()
    city = FMNERG.coarse_tags.index("B-location"), FMNERG.fine_tags.index("B-city")
    assert float(matrix[city]) == pytest.approx(1.0) if kind == "cooccurrence" else float(matrix[city]) < 0.5
    assert float(matrix.sum()) == pytest.approx({"cooccurrence": 6, "zeros": 0, "random": 17}[kind], abs=1e-4)


def test_training_stops_when_dev_no_longer_gains(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    still = {"encoder_lr": 1e-12, "head_lr": 1e-12, "crf_lr": 1e-12}
    with pytest.raises(ConfigError, match=r"patience .* no better on dev posts, and there are none"):
        train_tagger(posts, [], tmp_path, settings.changed(patience=2))
    report = train_tagger(posts, posts, tmp_path, settings.changed(epochs=9, patience=2, **still))
    assert len(report["epochs"]) == 3
    assert report["best_epoch"] == 1


def test_layers_have_lower_rates_the_deeper_they_are(settings: TaggerTraining, encoder_folder: Path) -> None:
    model = DualPathTagger(load_encoder(str(encoder_folder)), FMNERG)
    groups = parameter_groups(model, settings.changed(encoder_lr=1.0, layer_decay=0.5, head_lr=7.0, crf_lr=9.0))
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    layers = model.encoder.encoder.layer
    assert {rate[id(parameter)] for parameter in layers[1].parameters()} == {1.0}
    assert {rate[id(parameter)] for parameter in layers[0].parameters()} == {0.5}
    assert {rate[id(parameter)] for parameter in model.encoder.embeddings.parameters()} == {0.25}
    assert rate[id(model.transition)] == rate[id(model.fine_head.weight)] == 7.0
    assert rate[id(model.fine_crf.transitions)] == 9.0
    assert len(rate) == len(list(model.parameters()))


def test_a_second_view_is_pulled_towards_the_first(settings: TaggerTraining, posts: list[Post], tmp_path: Path) -> None:
    """The loss is the mean of both views' and the divergence, by hand for one post."""
    settings = settings.changed(second_view="bare", consistency=0.7, knowledge_dropout=0.0)
    features = SubwordEncoder(load_tokenizer(Path(settings.encoder)), 64)
    views = TrainingViews(posts[:1], features, settings)
    model = DualPathTagger(load_encoder(settings.encoder), FMNERG, dropout=0.0).eval()
    inputs = collate_views([views[0, 0]], 0)
    first, second = Batch(**inputs["first"]), Batch(**inputs["second"])
    p, q = (model.emissions(batch).fine.detach().softmax(dim=2) for batch in (first, second))
    divergence = sum(float((p[0, word] * (p[0, word] / q[0, word]).log()).sum()) for word in range(5))
    expected = (model(first).item() + model(second).item()) / 2 + 0.7 * divergence
    assert float(TrainingObjective(model, settings)(**inputs)["loss"]) == pytest.approx(expected, rel=1e-5)


def test_a_model_comes_with_its_card_and_its_recipe(
    settings: TaggerTraining, posts: list[Post], tmp_path: Path
) -> None:
    report = train_tagger(posts, posts, tmp_path, settings)
    card = (tmp_path / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["pipeline_tag"] == "token-classification"
    fine = 100 * report["dev"]["with_knowledge"]["fine"]
    assert f"| with knowledge | {fine:.1f} |" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == settings.model_dump(exclude_defaults=True)
    assert json.loads((tmp_path / "config.json").read_text())["recipe"]["batch_size"] == 4


def test_a_byte_level_encoder_learns_too(posts: list[Post], tmp_path: Path) -> None:
    """RoBERTa: first subwords behind their spaces, positions from the padding index on, one kind of segment."""
    words = sorted({word for post in posts for word in [*post.tokens, *(post.knowledge or "").split()]})
    letters = sorted(set("".join(words)))
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *letters, *(f"Ġ{letter}" for letter in letters)]
    merges = [("Ġ", letter) for letter in letters]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    encoder = tmp_path / "encoder"
    RobertaTokenizer(vocabulary, merges, model_max_length=96).save_pretrained(encoder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(
        vocab_size=len(vocabulary), max_position_embeddings=98, type_vocab_size=1, pad_token_id=1, **size
    )
    RobertaModel(config).save_pretrained(encoder)
    features = SubwordEncoder(load_tokenizer(encoder), 96)
    for window in features.encode(posts):
        first = features.tokenizer.convert_ids_to_tokens([window.input_ids[place] for place in window.first_subwords])
        assert first == [f"Ġ{word[0]}" for word in posts[window.post].tokens]
    recipe = TaggerTraining(
        encoder=str(encoder), max_length=96, epochs=40, batch_size=4, encoder_lr=3e-3, head_lr=1e-2, word_dropout=0.0
    )
    report = train_tagger(posts, posts, tmp_path / "model", recipe)
    assert report["dev"]["with_knowledge"]["fine"] > 0.9

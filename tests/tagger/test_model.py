"""The two paths: what eq. 8 and eq. 9 say, written out by hand."""

from pathlib import Path

import pytest
import torch

from gem_ray.tagger.checkpoint import load_encoder
from gem_ray.tagger.features import Batch, SubwordEncoder, collate
from gem_ray.tagger.model import DualPathTagger, coarse_of_fine_tags, tag_cooccurrence
from gem_ray.tagger.recipe import TaggerDesign
from gem_ray.taxonomy import FMNERG, GMNER


@pytest.fixture
def batch(features: SubwordEncoder, posts: list) -> Batch:
    torch.manual_seed(3)
    windows = features.encode(posts[:3])
    for window in windows:
        window.tags = torch.randint(9, (len(window.first_subwords),)).tolist()  # GMNER has 9 tags
    return collate(windows, features.tokenizer.pad_token_id)


@pytest.fixture
def model(encoder_folder: Path) -> DualPathTagger:
    torch.manual_seed(4)
    matrix = torch.randn(17, 103)
    return DualPathTagger(load_encoder(str(encoder_folder)), FMNERG, alpha=0.3, beta=0.2, transition=matrix).eval()


def test_fine_logits_are_augmented_by_the_coarse_ones(model: DualPathTagger, batch: Batch) -> None:
    """Eq. 9, one word and one tag at a time."""
    with torch.no_grad():
        emissions = model.emissions(batch)
        assert emissions.coarse is not None
        hidden = model.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        for row, word in [(0, 0), (1, 2), (2, 4)]:
            vector = hidden[row, batch.first_subwords[row, word]]
            coarse, fine = model.coarse_head(vector), model.fine_head(vector)
            torch.testing.assert_close(emissions.coarse[row, word], coarse)
            for tag in range(0, 103, 7):
                moved = sum(float(coarse[c]) * float(model.transition[c, tag]) for c in range(17))
                expected = 0.2 * moved + 0.8 * float(fine[tag])
                assert float(emissions.fine[row, word, tag]) == pytest.approx(expected, abs=1e-4)


def test_loss_weighs_both_paths(model: DualPathTagger, batch: Batch) -> None:
    """Eq. 8 with the mean over posts, each post's likelihoods asked for alone."""
    names, coarse_index = FMNERG.fine_tags, FMNERG.coarse_tags.index
    emissions = model.emissions(batch)
    assert emissions.coarse is not None
    assert batch.tags is not None
    losses = []
    for row, count in enumerate(batch.word_mask.sum(dim=1).tolist()):
        fine_tags = batch.tags[row, :count].tolist()
        prefixes = [names[tag].partition("-") for tag in fine_tags]
        coarse_tags = [coarse_index(f"{p}-{FMNERG.parent[fine]}" if fine else "O") for p, _, fine in prefixes]
        words = torch.ones(1, count, dtype=torch.bool)
        coarse = -model.coarse_crf(emissions.coarse[row : row + 1, :count], torch.tensor([coarse_tags]), words)
        fine = -model.fine_crf(emissions.fine[row : row + 1, :count], torch.tensor([fine_tags]), words)
        losses.append(0.3 * coarse.item() + 0.7 * fine.item())
    assert model(batch).item() == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_one_level_label_set_has_one_path(encoder_folder: Path, batch: Batch) -> None:
    model = DualPathTagger(load_encoder(str(encoder_folder)), GMNER)
    assert not any("coarse" in name or name == "transition" for name, _ in model.named_parameters())
    emissions = model.eval().emissions(batch)
    assert emissions.coarse is None
    likelihood = model.fine_crf(emissions.fine, batch.tags, batch.word_mask, reduction="mean")
    assert model(batch).item() == pytest.approx(-likelihood.item(), rel=1e-5)


@pytest.mark.parametrize("crf", [True, False])
def test_the_design_says_whether_tags_depend_on_their_neighbours(encoder_folder: Path, crf: bool) -> None:
    model = DualPathTagger(load_encoder(str(encoder_folder)), FMNERG, design=TaggerDesign(crf=crf))
    learnt = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert learnt & {"coarse_crf", "fine_crf"} == ({"coarse_crf", "fine_crf"} if crf else set())


def test_loss_needs_gold_tags(model: DualPathTagger, features: SubwordEncoder, posts: list) -> None:
    with pytest.raises(ValueError, match="without gold tags"):
        model(collate(features.encode(posts[:1]), 0))


def test_every_fine_tag_belongs_to_its_parents_tag() -> None:
    index = coarse_of_fine_tags(FMNERG).tolist()
    for fine, coarse in [("O", "O"), ("B-actor", "B-person"), ("I-website", "I-other"), ("I-park", "I-location")]:
        assert FMNERG.coarse_tags[index[FMNERG.fine_tags.index(fine)]] == coarse


def test_cooccurrence_counts_training_tags_and_normalises_rows() -> None:
    tag = FMNERG.fine_tags.index
    sentences = [["B-actor", "I-actor", "O"], ["B-actor", "O", "B-coach", "O", "O"], ["B-actor", "B-city"]]
    matrix = tag_cooccurrence(FMNERG, [[tag(name) for name in sentence] for sentence in sentences])
    person, city = FMNERG.coarse_tags.index("B-person"), FMNERG.coarse_tags.index("B-location")
    assert matrix.shape == (17, 103)
    assert float(matrix[person, tag("B-actor")]) == 0.75
    assert float(matrix[person, tag("B-coach")]) == 0.25
    assert float(matrix[city, tag("B-city")]) == 1.0
    assert float(matrix[0, 0]) == 1.0
    assert float(matrix.sum()) == 4.0  # O, B-person, I-person, B-location; the other rows are 0

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.taxonomy import FMNERG, GMNER, LABEL_SETS, LabelSetName, bio_tags, decode_bio, encode_bio, gmner_category

TWITTER10000 = Path(__file__).parents[1].parent / "shared" / "data" / "twitter10000"
needs_data = pytest.mark.skipif(not TWITTER10000.is_dir(), reason="Twitter10000 is not in ../shared")


def _sentences(file: Path):
    """Columns of each post, read without the package's reader."""
    for block in file.read_text(encoding="utf-8").split("IMGID:")[1:]:
        rows = [line.split("\t") for line in block.split("\n")[1:] if line.strip("\n")]
        yield [list(column) for column in zip(*rows, strict=True)]


def test_fmnerg_has_51_fine_categories_under_8_coarse_ones():
    assert (len(FMNERG.coarse), len(FMNERG.fine)) == (8, 51)
    assert len(set(FMNERG.fine)) == 51
    assert (len(FMNERG.coarse_tags), len(FMNERG.fine_tags)) == (17, 103)
    assert FMNERG.is_hierarchical


def test_gmner_has_four_categories_and_one_level():
    assert GMNER.coarse == GMNER.fine == ("PER", "LOC", "ORG", "OTHER")
    assert not GMNER.is_hierarchical
    assert LABEL_SETS == {"fmnerg": FMNERG, "gmner": GMNER}
    assert get_args(LabelSetName) == tuple(LABEL_SETS)


def test_every_fine_category_has_its_coarse_one_and_its_siblings():
    for fine in FMNERG.fine:
        group = FMNERG.tree[FMNERG.parent[fine]]
        assert fine in group
        assert {fine, *FMNERG.siblings(fine)} == set(group)
        assert fine not in FMNERG.siblings(fine)
    assert FMNERG.siblings("festival") == ("sports_event", "event_other")


def test_bio_tags_are_where_their_indices_say():
    tags = bio_tags(FMNERG.fine)
    assert tags[0] == "O"
    for index, fine in enumerate(FMNERG.fine):
        assert tags[1 + 2 * index : 3 + 2 * index] == (f"B-{fine}", f"I-{fine}")


def test_an_unknown_category_has_no_gmner_category():
    with pytest.raises(KeyError):
        gmner_category("wizard")


@needs_data
def test_the_tree_is_the_one_that_the_public_annotations_use():
    seen = set()
    for split in ("train", "dev"):
        for _, coarse_tags, fine_tags in _sentences(TWITTER10000 / "txt_fine" / f"{split}.txt"):
            for coarse, fine in zip(coarse_tags, fine_tags, strict=True):
                assert coarse[:2] == fine[:2]
                if fine != "O":
                    assert FMNERG.parent[fine[2:]] == coarse[2:]
                    seen.add(fine[2:])
    assert seen == set(FMNERG.fine)


@needs_data
def test_fine_categories_map_to_the_gmner_annotations_of_the_same_words():
    for split in ("train", "dev"):
        fine_posts = _sentences(TWITTER10000 / "txt_fine" / f"{split}.txt")
        gmner_posts = _sentences(TWITTER10000 / "txt" / f"{split}.txt")
        for (_, _, fine_tags), (_, gmner_tags) in zip(fine_posts, gmner_posts, strict=True):
            mapped = ["O" if tag == "O" else tag[:2] + gmner_category(tag[2:]) for tag in fine_tags]
            assert mapped == gmner_tags


@needs_data
@pytest.mark.parametrize(("split", "posts", "entities"), [("train", 7000, 11779), ("dev", 1500, 2450)])
def test_decoding_finds_the_published_number_of_entities(split, posts, entities):
    sentences = list(_sentences(TWITTER10000 / "txt_fine" / f"{split}.txt"))
    spans = [decode_bio(fine_tags) for _, _, fine_tags in sentences]
    assert (len(sentences), sum(map(len, spans))) == (posts, entities)
    for found, (_, _, fine_tags) in zip(spans, sentences, strict=True):
        assert encode_bio(found, len(fine_tags)) == fine_tags


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ([], []),
        (["O", "O"], []),
        (["B-x", "I-x", "O"], [(0, 2, "x")]),
        (["B-x", "B-x"], [(0, 1, "x"), (1, 2, "x")]),  # adjacent entities are two
        (["I-x", "I-x"], [(0, 2, "x")]),  # an orphan opens
        (["B-x", "I-y", "I-y"], [(0, 1, "x"), (1, 3, "y")]),  # so does one of another category
        (["B-x", "O", "I-x"], [(0, 1, "x"), (2, 3, "x")]),
        (["B-sports_team", "I-sports_team"], [(0, 2, "sports_team")]),
    ],
)
def test_decoding_follows_the_scoring_protocol(tags, spans):
    assert decode_bio(tags) == spans


@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), max_size=12))
def test_decoding_agrees_with_a_word_by_word_definition(tags):
    """Brute force: a word opens an entity if it is tagged and does not continue the one before it."""

    def opens(i):
        return tags[i] != "O" and not (tags[i][0] == "I" and i > 0 and tags[i - 1][1:] == tags[i][1:])

    spans = []
    for start in filter(opens, range(len(tags))):
        end = start + 1
        while end < len(tags) and tags[end] != "O" and not opens(end):
            end += 1
        spans.append((start, end, tags[start][2:]))
    assert decode_bio(tags) == spans


@given(st.data())
def test_encoding_is_undone_by_decoding(data):
    spans, position = [], 0
    for category in data.draw(st.lists(st.sampled_from(["city", "band"]), max_size=5)):
        start = position + data.draw(st.integers(0, 2))
        position = start + data.draw(st.integers(1, 3))
        spans.append((start, position, category))
    assert decode_bio(encode_bio(spans, position + 1)) == spans

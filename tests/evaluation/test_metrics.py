"""The scoring protocol, rule by rule, against counts made by hand."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.data import twitter10000
from gem_ray.data.tokenize import word_spans
from gem_ray.evaluation.metrics import Scores, evaluate
from gem_ray.evaluation.rules import EvaluationError, Rules, judge, touched_words
from gem_ray.records import Box, Entity, GoldEntity, Post
from gem_ray.taxonomy import FMNERG, GMNER

TWITTER10000 = Path(__file__).parents[2].parent / "shared" / "data" / "twitter10000"

TOKENS = ["Taylor", "Swift", "sings", "in", "New", "York", ",", "then", "Paris"]
FACE = Box(10, 10, 30, 30)
SWIFT = GoldEntity(0, 2, "musician", (FACE,))
NEW_YORK = GoldEntity(4, 6, "city")


def gold_post(*gold, post_id="p", tokens=TOKENS, size=(100, 100)):
    return Post(post_id, " ".join(tokens), list(tokens), image_width=size[0], image_height=size[1], gold=list(gold))


def entity(word_start, word_end, fine, box=None, score=0.9, tokens=TOKENS):
    spans = word_spans(" ".join(tokens), tokens)
    return characters(spans[word_start][0], spans[word_end - 1][1], fine, box, score, tokens)


def characters(start, end, fine, box=None, score=0.9, tokens=TOKENS):
    # Word offsets that are wrong on purpose: the characters decide.
    return Entity(" ".join(tokens)[start:end], start, end, 97, 98, FMNERG.parent.get(fine, fine), fine, score, box=box)


def predicted_post(*entities, post_id="p", tokens=TOKENS):
    return Post(post_id, " ".join(tokens), entities=list(entities))


def counts(scores: Scores):
    return scores.right, scores.predicted, scores.gold


def test_precision_recall_and_f1_follow_from_the_counts():
    scores = Scores(right=2, predicted=4, gold=5)
    assert (scores.precision, scores.recall) == (0.5, 0.4)
    assert scores.f1 == pytest.approx(2 * 0.5 * 0.4 / 0.9)


def test_division_by_zero_gives_zero():
    report = evaluate([gold_post()], [])
    assert all(scores.to_dict() == Scores(0, 0, 0).to_dict() for scores in report.tasks.values())
    assert Scores(0, 0, 0).f1 == Scores(0, 3, 0).f1 == Scores(0, 0, 3).f1 == 0.0
    assert report.groundable_accuracy == 0.0


def test_mner_asks_for_span_and_category_whatever_the_region():
    report = evaluate([gold_post(SWIFT, NEW_YORK)], [predicted_post(entity(0, 2, "musician"), entity(4, 6, "state"))])
    assert counts(report.mner) == (1, 2, 2)


def test_eeg_asks_for_span_and_region_whatever_the_category():
    report = evaluate(
        [gold_post(SWIFT, NEW_YORK)], [predicted_post(entity(0, 2, "city", FACE), entity(4, 6, "city", FACE))]
    )
    assert counts(report.eeg) == (1, 2, 2)


def test_mnerg_asks_for_all_three():
    right, no_box, other = entity(0, 2, "musician", FACE), entity(0, 2, "musician"), entity(0, 2, "actor", FACE)
    assert [evaluate([gold_post(SWIFT)], [predicted_post(p)]).mnerg.right for p in (right, no_box, other)] == [1, 0, 0]


def test_span_is_counted_without_category_and_region():
    report = evaluate([gold_post(SWIFT)], [predicted_post(entity(0, 2, "city"), entity(0, 1, "musician"))])
    assert counts(report.span) == (1, 2, 1)


def test_a_shorter_or_longer_span_is_wrong():
    report = evaluate(
        [gold_post(SWIFT)], [predicted_post(entity(0, 1, "musician", FACE), entity(0, 3, "musician", FACE))]
    )
    assert counts(report.mnerg) == counts(report.span) == (0, 2, 1)


def test_the_post_id_belongs_to_the_key():
    posts = [gold_post(SWIFT, post_id="a"), gold_post(post_id="b")]
    assert counts(evaluate(posts, [predicted_post(entity(0, 2, "musician"), post_id="b")]).mner) == (0, 1, 1)


def test_coarse_mner_accepts_a_sibling_category():
    report = evaluate([gold_post(SWIFT, NEW_YORK)], [predicted_post(entity(0, 2, "actor"), entity(4, 6, "road"))])
    assert counts(report.mner) == (0, 2, 2)
    assert counts(report.coarse_mner) == (2, 2, 2)


@pytest.mark.parametrize(
    ("fine", "category"),
    [
        ("musician", "PER"), ("band", "ORG"), ("city", "LOC"), ("sports_facility", "LOC"), ("music", "OTHER"),
        ("festival", "OTHER"), ("game", "OTHER"), ("animal", "OTHER"),
    ],
)  # fmt: skip
def test_gmner_maps_fine_categories_to_the_four(fine, category):
    gold = [gold_post(GoldEntity(0, 2, category))]
    assert evaluate(gold, [predicted_post(entity(0, 2, fine))], labels=GMNER).mner.right == 1
    # Gold may be fine as well.
    gold = [gold_post(GoldEntity(0, 2, fine))]
    assert evaluate(gold, [predicted_post(entity(0, 2, category))], labels=GMNER).coarse_mner.right == 1


def test_a_category_of_another_label_set_is_refused_by_name():
    with pytest.raises(EvaluationError, match="'PER' is not one of fmnerg"):
        evaluate([gold_post(SWIFT)], [predicted_post(entity(0, 2, "PER"))])


def test_offsets_that_cut_words_count_as_the_words_they_touch():
    # "aylor Sw" of "Taylor Swift"
    assert evaluate([gold_post(SWIFT)], [predicted_post(characters(1, 9, "musician"))]).mner.right == 1
    # One character into "sings" is one word too many.
    assert evaluate([gold_post(SWIFT)], [predicted_post(characters(0, 14, "musician"))]).mner.right == 0


def test_offsets_are_mapped_to_the_golds_words_not_the_predictions():
    post = predicted_post(entity(0, 2, "musician"))
    post.tokens = ["Tay", "lor", "Swift"]
    assert evaluate([gold_post(SWIFT)], [post]).mner.right == 1


def test_the_text_may_be_spaced_as_it_was_written():
    tokens = ["#", "Swift", "!"]
    written = Post("p", "#Swift!", entities=[Entity("Swift", 1, 6, 0, 0, "person", "musician", 0.9)])
    assert evaluate([gold_post(GoldEntity(1, 2, "musician"), tokens=tokens)], [written]).mner.right == 1


def test_gold_without_tokens_counts_in_the_systems_own_words():
    gold = Post("p", "seen: New York!", gold=[GoldEntity(2, 4, "city")])
    found = Post("p", "seen: New York!", entities=[Entity("New York", 6, 14, 2, 4, "location", "city", 0.9)])
    assert evaluate([gold], [found]).mner.right == 1


@pytest.mark.parametrize("words", [(-1, 1), (2, 2), (2, len(TOKENS) + 1)])
def test_gold_of_words_that_the_post_has_not_is_refused_by_post(words):
    with pytest.raises(EvaluationError, match=r"post 'p': the gold mention of the words .* is not within the post's"):
        evaluate([gold_post(GoldEntity(*words, "city"))], [])


def test_a_text_without_the_golds_words_is_refused_by_post():
    other = Post("p", "something else", entities=[Entity("else", 10, 14, 1, 2, "location", "city", 0.9)])
    with pytest.raises(EvaluationError, match="'p'"):
        evaluate([gold_post(SWIFT)], [other])


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 2, (0, 1)), (0, 3, (0, 1)), (0, 4, (0, 2)), (2, 3, (1, 1)), (4, 5, (1, 2)), (5, 9, (1, 3)), (8, 9, (3, 3))],
)
def test_touched_words(start, end, expected):
    # "ab cde fg": words at [0, 2), [3, 6), [7, 8)
    assert touched_words(start, end, [(0, 2), (3, 6), (7, 8)]) == expected


def test_an_entity_of_white_space_is_a_false_positive():
    assert counts(evaluate([gold_post(SWIFT)], [predicted_post(characters(6, 7, "musician"))]).span) == (0, 1, 1)


def test_gold_without_boxes_asks_for_no_box():
    def right(box):
        return evaluate([gold_post(NEW_YORK)], [predicted_post(entity(4, 6, "city", box))]).eeg.right

    assert right(None) == 1
    assert right(FACE) == 0


def test_gold_with_boxes_asks_for_one():
    assert evaluate([gold_post(SWIFT)], [predicted_post(entity(0, 2, "musician"))]).eeg.right == 0


def test_overlap_with_any_gold_box_is_enough():
    gold = GoldEntity(0, 2, "musician", (Box(60, 60, 90, 90), FACE))
    assert evaluate([gold_post(gold)], [predicted_post(entity(0, 2, "musician", FACE))]).eeg.right == 1


def test_an_overlap_of_exactly_the_threshold_is_wrong():
    half = Box(10, 10, 30, 20)  # half of FACE, inside it: IoU is exactly 0.5
    gold, found = [gold_post(SWIFT)], [predicted_post(entity(0, 2, "musician", half))]
    assert FACE.iou(half) == 0.5
    assert evaluate(gold, found).eeg.right == 0
    assert evaluate(gold, found, iou=0.49).eeg.right == 1


def test_a_repeated_span_keeps_the_higher_score():
    found = predicted_post(entity(0, 2, "actor", score=0.8), entity(0, 2, "musician", FACE, score=0.9))
    assert counts(evaluate([gold_post(SWIFT)], [found]).mnerg) == (1, 1, 1)
    worse = predicted_post(entity(0, 2, "musician", FACE, score=0.3), entity(0, 2, "actor", score=0.9))
    assert counts(evaluate([gold_post(SWIFT)], [worse]).mner) == (0, 1, 1)


def test_a_post_that_was_annotated_twice_counts_once():
    found = [predicted_post(entity(0, 2, "musician", FACE))] * 2
    assert counts(evaluate([gold_post(SWIFT)], found).mnerg) == (1, 1, 1)


def test_the_same_text_at_two_places_is_two_mentions():
    tokens = ["Paris", "loves", "Paris"]
    gold = gold_post(GoldEntity(0, 1, "city"), GoldEntity(2, 3, "city"), tokens=tokens)
    found = predicted_post(entity(2, 3, "city", tokens=tokens), tokens=tokens)
    assert counts(evaluate([gold], [found]).mner) == (1, 1, 2)


def test_adjacent_mentions_are_two():
    gold = gold_post(GoldEntity(0, 1, "musician"), GoldEntity(1, 2, "musician"))
    assert counts(evaluate([gold], [predicted_post(entity(0, 2, "musician"))]).mner) == (0, 1, 2)


def test_posts_without_gold_entities_count_their_predictions_as_wrong():
    posts = [gold_post(NEW_YORK, post_id="a"), gold_post(post_id="b")]
    found = [predicted_post(entity(4, 6, "city"), post_id=name) for name in "ab"]
    assert counts(evaluate(posts, found).mnerg) == (1, 2, 1)


def test_posts_without_predictions_count_their_golds_as_missed():
    posts = [gold_post(NEW_YORK, post_id=name) for name in "abc"]
    found = [predicted_post(entity(4, 6, "city"), post_id="a"), predicted_post(post_id="b")]
    report = evaluate(posts, found)
    assert counts(report.mnerg) == (1, 1, 3)
    assert report.unannotated_posts == 1


def test_predicted_posts_outside_the_split_are_wrong_and_told():
    report = evaluate([gold_post(NEW_YORK)], [predicted_post(entity(4, 6, "city"), post_id="stranger")])
    assert counts(report.mner) == (0, 1, 1)
    assert report.unknown_posts == 1


def test_a_post_that_carries_no_gold_is_refused():
    with pytest.raises(EvaluationError, match="'p' has no gold"):
        evaluate([Post("p", "text")], [])


def test_small_counts_mentions_with_a_box_below_one_fiftieth():
    # The image has 10,000 pixels: 200 is the border.
    small = GoldEntity(0, 2, "musician", (Box(0, 0, 90, 90), Box(0, 0, 199, 1)))
    border = GoldEntity(4, 6, "city", (Box(0, 0, 20, 10),))
    found = predicted_post(entity(0, 2, "actor", Box(0, 0, 90, 90)), entity(4, 6, "city", Box(0, 0, 20, 10)))
    assert counts(evaluate([gold_post(small, border)], [found]).small) == (1, 1, 1)


def test_large_counts_mentions_whose_boxes_are_all_above_one_half():
    large = GoldEntity(0, 2, "musician", (Box(0, 0, 100, 51), Box(0, 0, 100, 100)))
    mixed = GoldEntity(4, 6, "city", (Box(0, 0, 100, 51), Box(0, 0, 10, 10)))
    border = GoldEntity(8, 9, "city", (Box(0, 0, 100, 50),))
    report = evaluate([gold_post(large, mixed, border, NEW_YORK)], [predicted_post(entity(0, 2, "musician"))])
    assert counts(report.large) == (0, 1, 1)


def test_the_image_size_may_come_from_the_prediction():
    gold = gold_post(SWIFT, size=(None, None))
    found = predicted_post(entity(0, 2, "musician", FACE))
    assert counts(evaluate([gold], [found]).small) == (0, 0, 0)
    found.image_width, found.image_height = 1000, 1000
    assert counts(evaluate([gold], [found]).small) == (1, 1, 1)


def test_groundable_accuracy_is_over_the_found_mentions():
    paris = GoldEntity(8, 9, "city", (FACE,))
    far = Box(70, 70, 90, 90)  # the wrong region, and yet rightly groundable
    found = predicted_post(entity(0, 2, "actor", far), entity(4, 6, "city", far))
    assert evaluate([gold_post(SWIFT, NEW_YORK, paris)], [found]).groundable_accuracy == 0.5


def test_per_category_splits_mner_and_mnerg():
    found = predicted_post(entity(0, 2, "musician"), entity(4, 6, "state"), entity(8, 9, "state"))
    report = evaluate([gold_post(SWIFT, NEW_YORK)], [found])
    assert list(report.per_category) == ["musician", "city", "state"]
    assert counts(report.per_category["musician"].mner) == (1, 1, 1)
    assert counts(report.per_category["musician"].mnerg) == (0, 1, 1)
    assert counts(report.per_category["city"].mner) == (0, 0, 1)
    assert counts(report.per_category["state"].mner) == (0, 2, 0)


def test_text_key_forgives_the_place_and_collapses_duplicates():
    tokens = ["Paris", "loves", "Paris", ",", "Paris"]
    gold = gold_post(GoldEntity(0, 1, "city"), GoldEntity(2, 3, "city"), tokens=tokens)
    found = predicted_post(entity(4, 5, "city", tokens=tokens), tokens=tokens)
    assert counts(evaluate([gold], [found]).mnerg) == (0, 1, 2)
    assert counts(evaluate([gold], [found], protocol="text-key").mnerg) == (1, 1, 1)


def test_text_key_keeps_categories_apart():
    tokens = ["Paris", "loves", "Paris"]
    gold = gold_post(GoldEntity(0, 1, "city"), GoldEntity(2, 3, "musician"), tokens=tokens)
    found = predicted_post(entity(0, 1, "musician", tokens=tokens), tokens=tokens)
    report = evaluate([gold], [found], protocol="text-key")
    assert counts(report.mner) == (1, 1, 2)
    # One prediction is right for one mention, though two have its text.
    assert counts(report.span) == counts(report.eeg) == (1, 1, 2)


def test_text_key_counts_within_each_post():
    """One post has two gold mentions of a text and one prediction, another the reverse: two are right, not three."""
    tokens = ["Paris", "loves", "Paris"]
    golds = [
        gold_post(GoldEntity(0, 1, "city"), GoldEntity(2, 3, "musician"), tokens=tokens, post_id="a"),
        gold_post(GoldEntity(0, 1, "city"), tokens=tokens, post_id="b"),
    ]
    city, state = entity(0, 1, "city", tokens=tokens), entity(2, 3, "state", tokens=tokens)
    found = [
        predicted_post(city, tokens=tokens, post_id="a"),
        predicted_post(city, state, tokens=tokens, post_id="b"),
    ]
    assert counts(evaluate(golds, found, protocol="text-key").span) == (2, 3, 3)


def test_text_key_never_counts_more_right_than_there_are():
    gold = gold_post(GoldEntity(8, 9, "city"))
    found = predicted_post(entity(8, 9, "city"), entity(8, 9, "state"), entity(8, 9, "country"))
    assert counts(evaluate([gold], [found], protocol="text-key").span) == (1, 3, 1)


def test_judge_says_what_is_wrong_and_what_was_missed():
    paris = GoldEntity(8, 9, "city")
    post = predicted_post(entity(0, 2, "actor", FACE), entity(4, 6, "city", FACE), entity(6, 7, "city"))
    post.tokens = TOKENS
    verdicts, missed = judge(post, [SWIFT, NEW_YORK, paris], Rules())
    assert [(v.span, v.category, v.region) for v in verdicts] == [
        (True, False, True),
        (True, True, False),
        (False, False, False),
    ]
    assert missed == [paris]


def test_json_is_what_the_design_says():
    values = evaluate([gold_post(SWIFT)], [predicted_post(entity(0, 2, "musician"))]).to_dict()
    for task in ("mner", "eeg", "mnerg", "span", "coarse_mner", "small", "large"):
        assert set(values[task]) == {"precision", "recall", "f1", "predicted", "gold", "right"}
    assert values["mner"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "right": 1, "predicted": 1, "gold": 1}


# ---- Against independent truths --------------------------------------------------------------------------------------

sides = st.integers(0, 12)
boxes = st.builds(lambda x, y, w, h: Box(x, y, x + w, y + h), sides, sides, sides, sides)


@given(boxes, boxes)
def test_iou_equals_counted_pixels(first, second):
    def pixels(box):
        return {(x, y) for x in range(box.x1, box.x2) for y in range(box.y1, box.y2)}

    union = pixels(first) | pixels(second)
    expected = len(pixels(first) & pixels(second)) / len(union) if union else 0.0
    assert first.iou(second) == expected


@st.composite
def gold_posts(draw):
    tokens = draw(st.lists(st.text("abcé🚀\u200b", min_size=1, max_size=4), min_size=1, max_size=9))
    cuts = sorted(draw(st.sets(st.integers(0, len(tokens)), max_size=6)))
    categories, regions = st.sampled_from(FMNERG.fine), st.lists(boxes.filter(lambda box: box.area), max_size=2)
    regions_of = {}  # every mention of a text gets all of its boxes
    gold = []
    for start, end in pairwise(cuts):
        text = " ".join(tokens[start:end])
        regions_of.setdefault(text, tuple(draw(regions)))
        gold.append(GoldEntity(start, end, draw(categories), regions_of[text]))
    return gold_post(*gold, post_id=draw(st.text("pq", min_size=1, max_size=3)), tokens=tokens)


def perfect(post: Post) -> Post:
    entities = [
        entity(gold.word_start, gold.word_end, gold.fine, gold.boxes[0] if gold.boxes else None, tokens=post.tokens)
        for gold in post.gold
    ]
    return predicted_post(*entities, post_id=post.post_id, tokens=post.tokens)


@given(
    st.lists(gold_posts(), max_size=4, unique_by=lambda post: post.post_id),
    st.sampled_from([FMNERG, GMNER]),
    st.sampled_from(["strict", "text-key"]),
)
def test_perfect_predictions_score_one(posts, labels, protocol):
    report = evaluate(posts, map(perfect, posts), labels=labels, protocol=protocol)
    for scores in (report.mner, report.eeg, report.mnerg, report.span, report.coarse_mner):
        assert scores.right == scores.predicted == scores.gold
        assert scores.f1 == (1.0 if scores.gold else 0.0)


@pytest.mark.skipif(not TWITTER10000.is_dir(), reason="the Twitter10000 annotations are not beside the project")
@pytest.mark.parametrize("labels", [FMNERG, GMNER], ids=["fmnerg", "gmner"])
def test_a_system_that_never_sees_anything_scores_the_published_sanity_figure(labels):
    gold = twitter10000.read_split(TWITTER10000, "dev", labels=labels)
    blind = [perfect(post) for post in gold]
    for post in blind:
        for mention in post.entities:
            mention.box = None
    report = evaluate(gold, blind, labels=labels)
    assert counts(report.mner) == (2450, 2450, 2450)
    assert counts(report.eeg) == counts(report.mnerg) == (2450 - 991, 2450, 2450)
    assert f"{100 * report.eeg.f1:.2f}" == "59.55"
    assert report.groundable_accuracy == report.eeg.recall


@pytest.mark.skipif(not TWITTER10000.is_dir(), reason="the Twitter10000 annotations are not beside the project")
def test_gold_boxes_are_right_for_themselves_on_real_posts():
    gold = twitter10000.read_split(TWITTER10000, "dev")
    report = evaluate(gold, map(perfect, gold))
    assert report.mnerg.f1 == report.small.f1 == report.large.f1 == 1.0
    assert report.small.gold > 0
    assert report.large.gold > 0

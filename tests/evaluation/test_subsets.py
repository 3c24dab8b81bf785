"""Scores of a part of the mentions, against counts made by hand."""

from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.subsets import keep_mentions
from gem_ray.records import Entity, GoldEntity, Post

TOKENS = ["Ann", "meets", "Bob", "Ray", "in", "Paris", "today"]
TEXT = " ".join(TOKENS)


def entity(name, fine):
    start = TEXT.index(name)
    return Entity(name, start, start + len(name), 0, 1, "person", fine, 0.9)


def test_mentions_that_are_not_wanted_leave_gold_and_prediction():
    gold = [
        Post("p", TEXT, TOKENS, gold=[GoldEntity(0, 1, "actor"), GoldEntity(2, 4, "actor"), GoldEntity(5, 6, "city")])
    ]
    found = [entity("Ann", "actor"), entity("Bob", "actor"), entity("Paris", "state"), entity("today", "city")]
    predicted = [Post("p", TEXT, TOKENS, entities=found)]
    people = evaluate(*keep_mentions(gold, predicted, lambda name: name != "Paris"))
    assert (people.mner.right, people.mner.predicted, people.mner.gold) == (1, 3, 2)  # `today` touches no gold
    places = evaluate(*keep_mentions(gold, predicted, {"Paris"}.__contains__))
    assert (places.span.right, places.mner.right, places.mner.predicted, places.mner.gold) == (1, 0, 2, 1)
    long = keep_mentions(gold, predicted, {"Bob Ray"}.__contains__)
    assert [each.text for each in long[1][0].entities] == ["Bob", "today"]
    assert len(gold[0].gold or ()) == 3  # what was given stays as it is
    assert len(predicted[0].entities) == 4

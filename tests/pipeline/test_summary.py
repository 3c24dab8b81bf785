"""What a run's summary counts, from the rows themselves."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from gem_ray.commands.annotate import _about_abstaining
from gem_ray.config import load_config
from gem_ray.pipeline.account import Account
from gem_ray.pipeline.summary import RunSummary
from gem_ray.pipeline.tables import annotations_table
from gem_ray.records import Box, Entity, Post, Status
from gem_ray.tally import Tally


def post(*verdicts: bool | None, width: int | None = 640) -> Post:
    box = {True: Box(0, 0, 1, 1), False: None, None: None}
    entities = [
        Entity("Paris", 0, 5, 0, 1, "location", "city", 0.5, seen=seen, box=box[seen], reranked=bool(seen))
        for seen in verdicts
    ]
    return Post("p", "Paris", entities=entities, image_width=width, image_height=width)


def tally(status: Status, *posts: Post) -> Tally:
    table = annotations_table(posts, "run", {"tagger": "t@1"})
    return Tally.of(pa.concat_tables([table.slice(0, 1), table.slice(1)]), status)


def summary(counts: Tally, config: dict[str, Any] | None = None) -> RunSummary:
    config = load_config().model_dump(mode="json") if config is None else config
    return RunSummary("r", "posts", "out", "now", 1.0, counts.rows, Account(), 0.2, counts, {}, config)


def test_what_was_not_judged_is_counted_apart_from_what_is_not_seen() -> None:
    good = tally(Status.OK, post(True, False, None), post(None, width=None), post(), post(None, True))
    assert (good.entities, good.grounded, good.not_seen, good.not_judged, good.reranked) == (6, 2, 1, 3, 2)
    assert good.not_judged_with_image == 2
    bad = tally(Status.DEGRADED, post(None, None), post(False))
    assert (bad.not_judged, bad.not_judged_with_image, bad.not_seen) == (2, 0, 1)
    both = good + bad
    assert (both.entities, both.not_judged, both.not_judged_with_image, both.not_seen) == (9, 5, 2, 2)
    assert Tally.from_dict(both.to_dict()) == both
    assert RunSummary.from_dict(summary(both).to_dict()) == summary(both)


def test_real_photos_get_a_sentence_that_says_what_was_not_done_and_what_does_it() -> None:
    """Also where `run.json` is of an earlier version, with other keys."""
    photos, config = tally(Status.OK, post(None), post(None, None)), load_config()
    sentence = _about_abstaining(summary(photos, {"serving": {"gone": 1}}), config)
    assert sentence is not None
    assert "3 entities tagged by the text alone" in sentence
    assert "48 invented entities" in sentence
    assert sentence.endswith("gem-ray annotate posts OTHER-OUTPUT --preset cpu")
    assert not load_config("cpu").grounder.matcher.model.startswith("nano:")
    assert _about_abstaining(summary(photos), load_config(overrides=["grounder.enabled=false"])) is None
    assert _about_abstaining(summary(tally(Status.OK, post(True), post(False))), config) is None
    assert _about_abstaining(summary(tally(Status.DEGRADED, post(None, width=None))), config) is None

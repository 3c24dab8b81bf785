"""What checked posts prove of a whole run: scores with intervals, claims, how many more checks, and what changed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gem_ray.data.files import whole_text
from gem_ray.evaluation.predictions import iterate_rows
from gem_ray.evaluation.significance import counts_by_post
from gem_ray.plurals import counted
from gem_ray.records import Post
from gem_ray.review.changes import Changes, compare_runs
from gem_ray.review.corrections import Corrections
from gem_ray.review.estimate import (
    CONFIDENCE,
    MEASURES,
    Checks,
    Estimate,
    claim_settled,
    difference,
    estimate,
    posts_for_claim,
    posts_for_width,
    refuse_too_few,
)
from gem_ray.review.folder import Review

TASKS = ("mner", "eeg", "mnerg", "span")
_OF_REGIONS = ("eeg", "mnerg")
_CLAIM = re.compile(rf"({'|'.join(TASKS)})\.({'|'.join(MEASURES)})\s*>=\s*(0?\.\d+|0|1(?:\.0*)?)")


@dataclass(frozen=True)
class Claim:
    """That a measure of the whole run is at least so high."""

    task: str
    measure: str
    at_least: float

    @classmethod
    def parse(cls, text: str) -> Claim:
        """Of `mner.f1>=0.65`.

        Raises:
            ValueError: it has another form.
        """
        found = _CLAIM.fullmatch(text.strip())
        if not found:
            raise ValueError(
                f"--claim takes TASK.MEASURE>=SHARE as mner.f1>=0.65, with a task of {', '.join(TASKS)} and a measure "
                f"of {', '.join(MEASURES)}; not {text!r}"
            )
        return cls(found[1], found[2], float(found[3]))

    def __str__(self) -> str:
        return f"{self.task}.{self.measure}>={self.at_least:g}"


@dataclass(frozen=True)
class ClaimVerdict:
    """What the checks say of a claim.

    Attributes:
        claim: that is made.
        holds: True or False once it is settled; None while it is not.
        posts: how many checked posts in all would probably settle it; None where no number is known.
    """

    claim: Claim
    holds: bool | None
    posts: int | None


@dataclass(frozen=True)
class Certificate:
    """What is proven of a run.

    Attributes:
        review: the sample.
        checked: posts that count: the beginning of the sample's order.
        beyond: checked posts behind the first one that is missing, which do not count.
        first_missing: id of that post; None if all are checked.
        estimates: task -> measure -> estimate; tasks that cannot be judged are not there.
        left_out: task -> why it is not in `estimates`.
        width: the half width that is wanted, if one is.
        posts_for_width: task -> measure -> how many checked posts in all it takes.
        claims: what the checks say of each claim.
        iou: the overlap that a right box exceeds.
        remarks: of reading the export.
        against: the second run, if there is one.
        changes: what it changed.
        differences: task -> measure -> how much better it is on the checked posts.
    """

    review: Review
    checked: int
    beyond: int
    first_missing: str | None
    estimates: dict[str, dict[str, Estimate]]
    left_out: dict[str, str]
    width: float | None = None
    posts_for_width: dict[str, dict[str, int | None]] = field(default_factory=dict)
    claims: list[ClaimVerdict] = field(default_factory=list)
    iou: float = 0.5
    remarks: Counter[str] = field(default_factory=Counter)
    against: str | None = None
    changes: Changes | None = None
    differences: dict[str, dict[str, Estimate]] = field(default_factory=dict)

    @property
    def planned(self) -> int:
        """Posts of the sample."""
        return len(self.review.posts)

    @property
    def is_complete(self) -> bool:
        """Whether all posts of the sample are checked."""
        return self.checked == self.planned

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `gem-ray review certify`; ratios from 0 to 1."""
        facts = self.review.facts
        return {
            "run": facts.run,
            "run_id": facts.run_id,
            "labels": facts.labels,
            "iou": self.iou,
            "design": asdict(facts.design) if facts.design else None,
            "frame": asdict(facts.frame),
            "unfinished_run": facts.unfinished,
            "planned": self.planned,
            "checked": self.checked,
            "beyond_the_first_missing": self.beyond,
            "first_missing": self.first_missing,
            "confidence": CONFIDENCE,
            "tasks": _as_dicts(self.estimates),
            "left_out": self.left_out,
            "width": self.width,
            "posts_for_width": self.posts_for_width,
            "claims": [{"claim": str(each.claim), "holds": each.holds, "posts": each.posts} for each in self.claims],
            "remarks": dict(self.remarks),
            "against": self.against,
            "changes": self.changes.to_dict() if self.changes else None,
            "differences": _as_dicts(self.differences),
        }


def certify(
    review: Review,
    corrections: Corrections,
    *,
    claims: Sequence[Claim] = (),
    width: float | None = None,
    iou: float = 0.5,
    against: str | None = None,
) -> Certificate:
    """Estimate a run's scores from its checked posts.

    Only posts up to the first unchecked one count: those behind a gap are not a random sample any more.

    Args:
        review: the sample.
        corrections: what people made of it.
        claims: to be settled.
        width: a half width of intervals that is wanted.
        iou: a region is right above this overlap.
        against: the output of a second run over the same posts.

    Raises:
        FileNotFoundError: `against` is not a run.
        ValueError: the review was chosen for training, too few posts are checked, a claim is about a task that cannot
            be judged, or the second run lacks posts.
    """
    if review.facts.design is None:
        raise ValueError(
            f"the posts of {review.path} were chosen to teach, so they say nothing of the run: "
            "draw others with `gem-ray review sample`"
        )
    gold = corrections.in_order(review)
    planned = len(review.posts)
    checks = _checks(review, gold, iou)
    try:
        refuse_too_few(checks)
    except ValueError as error:
        missing = review.posts[len(gold)].post_id if len(gold) < planned else None
        hint = f"; the first that is not checked is {missing!r}, number {len(gold) + 1}" if missing is not None else ""
        raise ValueError(f"{error}{hint}") from None
    left_out = _unjudged(review, corrections, gold)
    estimates = {task: found for task, found in estimate(checks).items() if task not in left_out}
    for claim in claims:
        if claim.task in left_out:
            raise ValueError(f"{claim} cannot be settled: {left_out[claim.task]}")
    return Certificate(
        review,
        len(gold),
        len(corrections.posts) - len(gold),
        review.posts[len(gold)].post_id if len(gold) < planned else None,
        estimates,
        left_out,
        width,
        {task: _posts_for_width(checks, found, width) for task, found in estimates.items()} if width else {},
        [_verdict(checks, estimates[claim.task][claim.measure], claim) for claim in claims],
        iou,
        corrections.remarks,
        against,
        compare_runs(review.facts.run, against) if against else None,
        _differences(checks, review, gold, estimates, iou, against) if against else {},
    )


def write_certificate(certificate: Certificate, out: Path) -> None:
    """Write `certificate.json` and `certificate.html` into a folder."""
    from gem_ray.review.page import render_certificate

    with whole_text(out / "certificate.json") as file:
        file.write(json.dumps(certificate.to_dict(), indent=2) + "\n")
    with whole_text(out / "certificate.html") as file:
        file.write(render_certificate(certificate))


def _checks(review: Review, gold: Sequence[Post], iou: float) -> Checks:
    facts, first = review.facts, len(gold)
    right, _, golds = _counts(review, gold, review.posts, iou)
    return Checks(
        facts.order,
        np.array(facts.auxiliary[:first], float).reshape(first, len(facts.frame.totals)),
        np.array(facts.frame.totals),
        facts.frame.mentions,
        right,
        golds,
        len(review.posts),
    )


def _counts(
    review: Review, gold: Sequence[Post], annotated: Iterable[Post], iou: float
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Mentions of each gold post that are right, by task, predicted and gold.

    Gold and predictions are paired by row, since a `post_id` may stand twice.
    """
    names = [str(post.row_id) for post in gold]
    predictions = {str(post.row_id): post for post in annotated}
    counts = counts_by_post(
        [replace(post, post_id=name) for post, name in zip(gold, names, strict=True)],
        [replace(predictions[name], post_id=name) for name in names],
        labels=review.facts.label_set,
        iou=iou,
    )
    if not names:
        nothing: np.ndarray = np.zeros(0)
        return dict.fromkeys(TASKS, nothing), nothing, nothing
    tables = {task: np.array([counts[task][name] for name in names], float) for task in TASKS}
    return {task: table[:, 0] for task, table in tables.items()}, tables["span"][:, 1], tables["span"][:, 2]


def _unjudged(review: Review, corrections: Corrections, gold: Sequence[Post]) -> dict[str, str]:
    """Tasks about regions that nobody could judge, and why."""
    shown = sum(post.row_id in corrections.with_image for post in gold)
    hidden = sum(bool(post.image_width) and post.row_id not in corrections.with_image for post in gold)
    if hidden:
        why = f"{counted(hidden, 'checked post')} had an image that the checker was not shown: sample with --images"
    elif not shown:
        why = "no checked post was shown with an image"
    else:
        return {}
    return dict.fromkeys(_OF_REGIONS, why)


def _posts_for_width(checks: Checks, found: dict[str, Estimate], width: float) -> dict[str, int | None]:
    return {measure: posts_for_width(checks, each, width) for measure, each in found.items()}


def _verdict(checks: Checks, found: Estimate, claim: Claim) -> ClaimVerdict:
    holds = claim_settled(checks, found, claim.at_least)
    return ClaimVerdict(
        claim, holds, len(checks) if holds is not None else posts_for_claim(checks, found, claim.at_least)
    )


def _differences(
    checks: Checks,
    review: Review,
    gold: Sequence[Post],
    estimates: Mapping[str, dict[str, Estimate]],
    iou: float,
    run: str,
) -> dict[str, dict[str, Estimate]]:
    """How much better a second run is, from the same checks; what it predicts elsewhere is estimated as well."""
    rows = iterate_rows(run, row_ids=[post.row_id for post in gold if post.row_id is not None])
    annotated = [Post.from_annotation(row) for row in rows]
    if missing := {post.row_id for post in gold} - {post.row_id for post in annotated}:
        raise ValueError(f"{run} lacks {counted(len(missing), 'checked post')}: it is not a run over the same posts")
    right, predicted, _ = _counts(review, gold, annotated, iou)
    then = estimate(replace(checks, right=right, predicted=predicted))
    return {
        task: {measure: difference(checks, found[measure], then[task][measure]) for measure in MEASURES}
        for task, found in estimates.items()
    }


def _as_dicts(estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, Any]]:
    return {task: {measure: each.to_dict() for measure, each in found.items()} for task, found in estimates.items()}

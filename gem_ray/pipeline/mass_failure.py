"""A run most of whose posts fail alike is ended early: what it costs would buy rows that are worth nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gem_ray.records import ProblemKind

if TYPE_CHECKING:
    from gem_ray.tally import Tally

JUDGED_FROM = 1000  # posts of a run that goes on: of fewer, too many may fail by chance
_EXAMPLES = 3
# A post is none the worse for these: a stage of the user's own has left it out, or its gold is of no use.
_HARMLESS = (ProblemKind.FILTERED, ProblemKind.BAD_GOLD)


def mass_failure(tally: Tally, max_share: float) -> str | None:
    """Why a run with these rows has failed, with examples; None where it has not.

    Args:
        tally: of the rows that are done.
        max_share: of posts that may have problems of one kind.
    """
    counts = {kind: count for kind, count in tally.problems.items() if kind not in _HARMLESS}
    if missing := counts.get(ProblemKind.IMAGE_MISSING):
        counts[ProblemKind.IMAGE_MISSING] = missing - tally.without_image
    kind = max(counts, key=counts.__getitem__, default=None)
    if kind is None or counts[kind] <= max_share * tally.rows:
        return None
    examples = "; ".join(f"{each['post_id']}: {each['message']}" for each in tally.examples[kind][:_EXAMPLES])
    return (
        f"{counts[kind]:,} of {tally.rows:,} posts have the problem {kind}, more than the {100 * max_share:g}% of "
        f"--max-problem-share. For example {examples}. Mend the cause and run the command again: it continues, and "
        "once it has finished, --only-problems does the failed posts again"
    )

"""`gem-ray review sample`: posts for people to check, as a review folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gem_ray.evaluation.predictions import iterate_images
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.export.images import ImageReferences
from gem_ray.export.writing import ExportTally
from gem_ray.review.design import Design, Kind, draw
from gem_ray.review.estimate import FEWEST
from gem_ray.review.folder import FACTS, Facts, Frame, read_review, run_facts, write_review
from gem_ray.review.population import Population, read_population
from gem_ray.review.teaching import choose_for_training


def sample_for_certificate(
    run: str,
    out: Path,
    posts: int,
    *,
    kind: Kind = "uncertainty",
    seed: int = 0,
    images: str | None = None,
    without: Sequence[Path] = (),
    blind: bool = False,
) -> ExportTally:
    """Draw posts with known probabilities, and write them as a review.

    Args:
        run: an output directory of `annotate`.
        out: the folder to write.
        posts: how many; fewer if the run has no more.
        kind: of the design.
        seed: of the draw.
        images: the shards that were annotated, or a folder of images.
        without: reviews whose posts are left out, because models were trained on them.
        blind: leave the predictions out of the tasks.

    Raises:
        FileExistsError: `out` holds a review already.
        FileNotFoundError: there is no run, or one of `without` is no review.
        ValueError: too few posts for an interval, or none at all.
    """
    _refuse_existing(out)
    population, left_out = _population(run, without)
    posts = min(posts, len(population))
    if posts < min(FEWEST, len(population)):
        raise ValueError(f"{posts:,} checked posts prove nothing: --posts {FEWEST} is the least that gives an interval")
    return _draw(run, out, population, Design.of_size(kind, posts, seed), posts, images, left_out, blind=blind)


def continue_sample(run: str, out: Path, posts: int, earlier: Path, images: str | None = None) -> ExportTally:
    """Write a review of `posts` posts that begins with an earlier one's; its tasks are only the new posts.

    Args:
        run, out, images: as for `sample_for_certificate`.
        posts: how many in all.
        earlier: the review to continue.

    Raises:
        FileExistsError, FileNotFoundError: as `sample_for_certificate`.
        ValueError: the earlier review was not drawn from this run as it is now, or has as many posts.
    """
    _refuse_existing(out)
    review = read_review(earlier)
    if review.facts.design is None:
        raise ValueError(f"{earlier} was chosen for training; draw a sample for a certificate instead of continuing it")
    if review.facts.frame.left_out:
        raise ValueError(f"{earlier} left out posts of other reviews and cannot be continued; draw a new sample")
    population, _ = _population(run, ())
    before = [post.row_id for post in review.posts]
    posts = min(posts, len(population))
    if posts <= len(before):
        raise ValueError(f"{earlier} has {len(before):,} posts already, and --posts says how many there are in all")
    order = draw(population.spread, review.facts.design)
    is_same_run = run_facts(run)["run_id"] == review.facts.run_id
    if not is_same_run or population.row_ids[order.posts[: len(before)]].tolist() != before:
        raise ValueError(f"{run} is not what {earlier} was drawn from: draw a new sample")
    return _draw(
        run, out, population, review.facts.design, posts, images, earlier=len(before), blind=review.facts.blind
    )


def sample_for_training(
    run: str, out: Path, posts: int, *, images: str | None = None, without: Sequence[Path] = ()
) -> ExportTally:
    """Choose the posts that teach most, and write them as a review; see `teaching`.

    Args:
        run, out, posts, images, without: as for `sample_for_certificate`.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: as `sample_for_certificate`.
    """
    _refuse_existing(out)
    population, left_out = _population(run, without)
    chosen = choose_for_training(population, run, posts)
    facts = Facts(**run_facts(run), frame=_frame(population, left_out))
    return write_review(out, facts, population.row_ids[chosen].tolist(), _references(images, run, out), run)


def _draw(
    run: str,
    out: Path,
    population: Population,
    design: Design,
    posts: int,
    images: str | None,
    left_out: int = 0,
    earlier: int = 0,
    blind: bool = False,
) -> ExportTally:
    order = draw(population.spread, design)
    first = order.posts[:posts]
    facts = Facts(
        **run_facts(run),
        frame=_frame(population, left_out),
        design=design,
        sizes=order.sizes.tolist(),
        shares=order.shares.tolist(),
        stratum=order.stratum[:posts].tolist(),
        auxiliary=population.auxiliary[first].tolist(),
        earlier=earlier,
        blind=blind,
    )
    return write_review(out, facts, population.row_ids[first].tolist(), _references(images, run, out), run)


def _population(run: str, without: Sequence[Path]) -> tuple[Population, int]:
    population = read_population(run)
    known = {post.row_id for review in map(read_review, without) for post in review.posts if post.row_id is not None}
    rest = population.without(known) if known else population
    if not len(rest):
        raise EvaluationError(f"{run}: all its posts are in the reviews that are left out")
    return rest, len(population) - len(rest)


def _frame(population: Population, left_out: int) -> Frame:
    totals = np.sum(population.auxiliary, axis=0).tolist()
    return Frame(len(population), int(population.mentions.sum()), totals, population.empty, left_out)


def _references(images: str | None, run: str, out: Path) -> ImageReferences | None:
    return ImageReferences(iterate_images(images, run), out) if images else None


def _refuse_existing(out: Path) -> None:
    if (out / FACTS).exists():
        raise FileExistsError(f"{out} holds a review already; write to another folder or remove it first")

"""The certificate for people: a self-contained page, and tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from gem_ray.evaluation.score_report import TASK_TITLES
from gem_ray.look.console import table_console
from gem_ray.look.pages import page, percent
from gem_ray.plurals import counted
from gem_ray.review.certificate import Certificate, ClaimVerdict
from gem_ray.review.estimate import MEASURES, Estimate

MEASURE_TITLES = {"precision": "precision", "recall": "recall", "f1": "F1"}
DESIGN_TITLES = {
    "uniform": "a simple random sample",
    "stratified": "a sample stratified by uncertainty, from each stratum its share",
    "uncertainty": "a sample stratified by uncertainty, in which uncertain posts are more frequent",
}


def render_certificate(certificate: Certificate) -> str:
    """The HTML page."""
    facts, changes = certificate.review.facts, certificate.changes
    return page("gem_ray.review", "certificate.html.j2").render(
        title="Certificate",
        certificate=certificate,
        facts=facts,
        design=DESIGN_TITLES[facts.design.kind] if facts.design else "",
        tasks=TASK_TITLES,
        measures=MEASURE_TITLES,
        verdict=verdict_sentence,
        notes=notes(certificate),
        moves=[(f"{before} → {then}", count) for before, then, count in changes.moves] if changes else [],
    )


def print_certificate(certificate: Certificate, console: Console | None = None) -> None:
    """Print scores, claims, and what is to be said about them."""
    console = console or table_console()
    frame = certificate.review.facts.frame
    title = (
        f"{counted(certificate.checked, 'checked post')} of {certificate.planned:,}, for {counted(frame.posts, 'post')}"
    )
    console.print(_score_table(certificate, title))
    for line in [*(verdict_sentence(certificate, verdict) for verdict in certificate.claims), *notes(certificate)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def verdict_sentence(certificate: Certificate, verdict: ClaimVerdict) -> str:
    """What the checks say of a claim."""
    claim = str(verdict.claim)
    if verdict.holds is not None:
        return f"{claim}: {'yes' if verdict.holds else 'no'}, and no further checks are needed"
    if verdict.posts is None:
        return f"{claim}: not settled; the estimate is too close to it for any number of checks"
    return f"{claim}: not settled; about {_more(certificate, verdict.posts)} would settle it"


def notes(certificate: Certificate) -> list[str]:
    """What a reader must know beside the figures."""
    frame, said = certificate.review.facts.frame, []
    if not certificate.is_complete:
        said.append(
            f"Post {certificate.first_missing!r}, number {certificate.checked + 1} of the sample, is not checked. Only "
            "the posts before it count. If checking stopped because of what was found, the interval for all times "
            "holds, and the other does not."
        )
    if certificate.beyond:
        said.append(f"{counted(certificate.beyond, 'checked post')} behind it do not count until it is checked.")
    for why in dict.fromkeys(certificate.left_out.values()):
        tasks = " and ".join(TASK_TITLES[task] for task, reason in certificate.left_out.items() if reason == why)
        said.append(f"Not certified: {tasks}, because {why}.")
    if any(each.value is None for found in certificate.estimates.values() for each in found.values()):
        said.append("A dash stands where nothing was predicted, or the checked posts have no gold mention.")
    if certificate.review.facts.unfinished:
        said.append(
            f"The run was not finished when the sample was drawn: this is about its {counted(frame.posts, 'post')} of "
            "then, and says nothing of later ones."
        )
    if frame.empty:
        said.append(f"{counted(frame.empty, 'post')} of the run without text are not counted.")
    if frame.left_out:
        said.append(f"{counted(frame.left_out, 'post')} of earlier reviews are left out: this is about all others.")
    said.append(
        "The checkers did not see the predictions."
        if certificate.review.facts.blind
        else "The checkers saw the predictions, and may have let some pass that they would not have made: "
        "a sample drawn with --blind shows how many."
    )
    said += [f"{remark}: {count:,}." for remark, count in certificate.remarks.items()]
    if certificate.differences:
        said.append(
            "The second run was compared on the checked posts. If its models were trained on them, it looks better "
            "than it is: certify it by a sample of its own, with --without this review."
        )
    return said


def _score_table(certificate: Certificate, title: str) -> Table:
    table = Table("task", title=title, title_justify="left", caption_justify="left")
    for name in ("measure", "estimate", "95 % interval", "at all times"):
        table.add_column(name, justify="right")
    if certificate.width:
        table.add_column(f"for ±{100 * certificate.width:g}", justify="right")
    for task, found in certificate.estimates.items():
        for measure in MEASURES:
            each = found[measure]
            cells = [TASK_TITLES[task] if measure == MEASURES[0] else "", MEASURE_TITLES[measure], *_cells(each)]
            if certificate.width:
                posts = certificate.posts_for_width[task][measure]
                cells.append("–" if posts is None else _more(certificate, posts))
            table.add_row(*cells)
    return table


def _cells(each: Estimate) -> tuple[str, str, str]:
    if each.value is None:
        return "–", "–", "–"
    return percent(each.value), _range(each.low, each.high), _range(*each.always)


def _range(low: float, high: float) -> str:
    return f"{percent(low)} … {percent(high)}"


def _more(certificate: Certificate, posts: int) -> str:
    return f"{max(0, posts - certificate.checked):,} more"

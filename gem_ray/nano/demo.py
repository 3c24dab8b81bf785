"""`gem-ray demo`: generated posts through the whole system, scored, with parts left out, and shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from gem_ray.annotator import Annotator
from gem_ray.config import Config, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.data.unseen_names import is_unseen
from gem_ray.evaluation.gallery import write_gallery_of_run
from gem_ray.evaluation.metrics import Report, evaluate
from gem_ray.evaluation.predictions import read_gold, read_predictions
from gem_ray.evaluation.report import print_comparison, write_report
from gem_ray.evaluation.subsets import keep_mentions
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.records import Post
from gem_ray.taxonomy import FMNERG

UNSEEN_NAMES = 0.4  # of the entities that the posts mention
KNOWN, UNSEEN = "known names", "unseen names"


def run_demo(out: Path, count: int, seed: int, console: Console | None = None) -> dict[str, Report]:
    """Generate, annotate on Ray Data, score, compare with parts left out, and write the gallery.

    Args:
        out: gets `posts/`, `annotations/`, `run.json`, `metrics.json` with those of known and of unseen names beside
            it, and `gallery.html`.
        count: how many posts.
        seed: of the posts; the embedded models were trained on others than the default.
        console: where to print.

    Returns:
        The scores of the whole system, on all mentions and on names that training posts have and have not, and of the
        system without its reranker and without its grounder.
    """
    console = console or Console()
    shards = out / "posts"
    config = load_config(overrides=["grounder.matcher.save_heatmaps=true"])
    console.print(f"[bold]1/4[/] generating {count} posts (seed {seed}) → {shards}")
    write_posts(generate(count, seed, UNSEEN_NAMES), shards)
    console.print(f"[bold]2/4[/] annotating them on Ray → {out / 'annotations'}")
    summary = annotate_dataset(str(shards), str(out), config, fresh=True)
    console.print(f"    {summary.rows} posts in {summary.seconds:.0f} s, {summary.rows_per_second:.1f} a second")
    console.print("[bold]3/4[/] scoring, and annotating again without the reranker and without the grounder")
    gold, predicted = read_gold(shards), read_predictions(out)
    reports = {"gem-ray (nano)": evaluate(gold, predicted, labels=FMNERG)} | by_name(gold, predicted)
    reports["without reranker"] = _score_without("reranker", config, shards)
    reports["without grounder"] = _score_without("grounder", config, shards)
    for name, file in (("gem-ray (nano)", "metrics"), (KNOWN, "metrics-known"), (UNSEEN, "metrics-unseen")):
        write_report(reports[name], out / f"{file}.json")
    print_comparison(reports, console)
    console.print("[bold]4/4[/] gallery")
    write_gallery_of_run(out, shards, out / "gallery.html")
    console.print(
        f"\nOpen [bold]{out / 'gallery.html'}[/] in a browser. Scores: {out / 'metrics.json'}; facts of the run: "
        f"{out / 'run.json'}.\nYour own posts: [bold]gem-ray shards jsonl posts.jsonl posts/[/], then "
        "[bold]gem-ray annotate posts/ out/[/]."
    )
    return reports


def by_name(gold: Sequence[Post], predicted: Sequence[Post]) -> dict[str, Report]:
    """Scores apart: of mentions whose names training posts have, and of those whose names it never saw."""
    known = keep_mentions(gold, predicted, lambda name: not is_unseen(name))
    return {
        KNOWN: evaluate(*known, labels=FMNERG),
        UNSEEN: evaluate(*keep_mentions(gold, predicted, is_unseen), labels=FMNERG),
    }


def _score_without(part: str, config: Config, shards: Path) -> Report:
    section = getattr(config, part).model_copy(update={"enabled": False})
    annotator = Annotator.from_config(config.model_copy(update={part: section}))
    posts = list(read_posts(str(shards)))
    return evaluate(list(read_gold(shards)), annotator.annotate(posts), labels=FMNERG)

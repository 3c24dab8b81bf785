"""`gem-ray demo`: generated posts through the whole system, scored, with parts left out, and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from gem_ray.config import Config, load_config
from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.data.unseen_names import is_unseen
from gem_ray.evaluation.gallery import write_gallery_of_run
from gem_ray.evaluation.metrics import ScoreReport, evaluate
from gem_ray.evaluation.predictions import read_gold, read_predictions
from gem_ray.evaluation.score_report import print_comparison, write_scores
from gem_ray.evaluation.subsets import keep_mentions
from gem_ray.pipeline.run import annotate_dataset
from gem_ray.pipeline.session import ray_session
from gem_ray.plurals import counted
from gem_ray.records import Post
from gem_ray.taxonomy import FMNERG

UNSEEN_NAMES = 0.4  # of the entities that the posts mention
_WHOLE = "gem-ray (nano)"
_ALL = "all mentions"
_MENTIONS: dict[str, Callable[[str], bool]] = {
    _ALL: lambda name: True,
    "known names": lambda name: not is_unseen(name),
    "unseen names": is_unseen,
}

Comparison = dict[str, dict[str, ScoreReport]]  # mentions -> system -> scores


def run_demo(
    out: Path, count: int, seed: int, unseen_names: float = UNSEEN_NAMES, console: Console | None = None
) -> Comparison:
    """Generate, annotate on Ray Data, score, compare with parts left out, and write the gallery.

    Args:
        out: gets `posts/`, `annotations/`, `run.json`, `metrics.json`, `comparison.json` and `gallery.html`.
        count: how many posts.
        seed: of the posts; the embedded models were trained on others than the default.
        unseen_names: share of the mentioned entities with names that training never saw.
        console: where to print.

    Returns:
        The scores of the whole system and of it without its reranker and without its grounder: of all mentions, and
        apart of those whose names training posts have and of those whose names they have not.
    """
    console = console or Console()
    shards = out / "posts"
    config = load_config(overrides=["grounder.matcher.save_heatmaps=true"])
    console.print(f"[bold]1/4[/] generating {counted(count, 'post')} (seed {seed}) → {shards}")
    write_posts(generate(count, seed, unseen_names), shards)
    console.print(f"[bold]2/4[/] annotating them on Ray → {out / 'annotations'}")
    with ray_session(config):
        summary = annotate_dataset(str(shards), str(out), config, fresh=True)
        console.print(
            f"    {counted(summary.rows, 'post')} in {summary.seconds:.0f} s, {summary.rows_per_second:.1f} a second"
        )
        console.print("[bold]3/4[/] scoring, and annotating again without the reranker what it was asked about")
        gold, whole = list(read_gold(shards)), list(read_predictions(out))
        systems = {
            _WHOLE: whole,
            "without reranker": _without_reranker(config, shards, whole),
            "without grounder": [without_grounder(post) for post in whole],
        }
    comparison = compare(gold, systems)
    write_scores(comparison[_ALL][_WHOLE], out / "metrics.json")
    _write_comparison(comparison, out / "comparison.json")
    for mentions, reports in comparison.items():
        print_comparison(reports, f"F1, {mentions}", console)
    console.print("[bold]4/4[/] gallery")
    write_gallery_of_run(shards, out, out / "gallery.html")
    console.print(
        f"\nOpen [bold]{out / 'gallery.html'}[/] in a browser. Scores: {out / 'comparison.json'}; facts of the run: "
        f"{out / 'run.json'}.\nYour own posts: [bold]gem-ray shards jsonl posts.jsonl posts/[/], then "
        "[bold]gem-ray annotate posts/ out/[/]."
    )
    return comparison


def compare(gold: Sequence[Post], systems: Mapping[str, Sequence[Post]]) -> Comparison:
    """Scores of several systems: of all mentions, and of known and unseen names apart where there are both."""
    comparison = {
        mentions: {
            system: evaluate(*keep_mentions(gold, predicted, is_wanted), labels=FMNERG)
            for system, predicted in systems.items()
        }
        for mentions, is_wanted in _MENTIONS.items()
    }
    are_apart = all(report.mner.gold for reports in comparison.values() for report in reports.values())
    return comparison if are_apart else {_ALL: comparison[_ALL]}


def without_grounder(post: Post) -> Post:
    """The post as it was before the grounder, which comes last and changes nothing else."""
    of_match, of_box = ("seen", "match_score", "seen_probability"), ("box", "box_source", "box_score", "box_confidence")
    nothing: dict[str, Any] = dict.fromkeys((*of_match, "point", *of_box, "heatmap"))
    return replace(post, entities=[replace(entity, **nothing) for entity in post.entities])


def _without_reranker(config: Config, shards: Path, whole: Sequence[Post]) -> list[Post]:
    """The posts of a run as they were without the reranker: those about which it was asked are annotated again."""
    reranker = config.reranker.model_copy(update={"enabled": False})
    asked = {post.post_id for post in whole if any(entity.reranked for entity in post.entities)}
    if not asked:
        return list(whole)
    with TemporaryDirectory() as folder:
        posts, annotations = str(Path(folder, "posts")), str(Path(folder, "annotations"))
        write_posts((post for post in read_posts(str(shards)) if post.post_id in asked), posts)
        without = config.model_copy(update={"reranker": reranker})
        annotate_dataset(posts, annotations, without, progress=lambda reading: None)
        changed = {post.post_id: post for post in read_predictions(annotations)}
    return [changed.get(post.post_id, post) for post in whole]


def _write_comparison(comparison: Comparison, path: Path) -> None:
    """Ratios from 0 to 1, and counts."""
    values = {
        mentions: {
            system: {task: scores.to_dict() for task, scores in report.tasks.items()}
            for system, report in reports.items()
        }
        for mentions, reports in comparison.items()
    }
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

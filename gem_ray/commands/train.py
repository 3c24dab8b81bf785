"""`gem-ray train` and `gem-ray nano`: models are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gem_ray.commands.options import (
    DataOption,
    ImagesOption,
    OutOption,
    RecipeSetOption,
    SeedOption,
    SplitOption,
    labelled_posts,
    parse_recipe_settings,
    refuse,
    refuse_without_root,
)

if TYPE_CHECKING:
    from gem_ray.records import Post
    from gem_ray.tagger.recipe import TaggerTraining
    from gem_ray.tagger.trainer import TrainingProgress

WorkersOption = Annotated[
    int,
    typer.Option(help="Processes that share the work through Ray Train; all must see OUT at the same path.", min=1),
]

app = typer.Typer(help="Train a component.", no_args_is_help=True)
nano = typer.Typer(help="The embedded models.", no_args_is_help=True)


@app.command("tagger", epilog="Example: `gem-ray train tagger --data data/twitter10000 --out models/tagger`")
def train_tagger_command(
    context: typer.Context,
    data: DataOption,
    out: OutOption,
    recipe: Annotated[
        str | None, typer.Option(help="`nano`, `paper-bert` or `paper-roberta`; default: for a small encoder.")
    ] = None,
    split: SplitOption = "train",
    dev: Annotated[
        Path | None, typer.Option(help="Shards to choose the epoch by; without them the last epoch is kept.")
    ] = None,
    dev_split: Annotated[str, typer.Option(help="The same, as a split of a Twitter10000 root.")] = "dev",
    workers: WorkersOption = 1,
    recipe_set: RecipeSetOption = None,
) -> None:
    """The dual-path CRF tagger (§3.2). The same command resumes from the last checkpoint."""
    from gem_ray.tagger.recipe import load_tagger_recipe

    refuse_without_root(context, data, dev)
    settings = load_tagger_recipe(recipe, **parse_recipe_settings(recipe_set))
    posts = (
        labelled_posts(data, split, labels=settings.labels),
        _dev_posts(data, dev, dev_split, labels=settings.labels),
    )
    if workers > 1:
        from gem_ray.cluster.train_on_workers import train_tagger_on_workers

        report = train_tagger_on_workers(*posts, out, settings, workers)
    else:
        from gem_ray.tagger.train_tagger import train_tagger

        report = train_tagger(*posts, out, settings, _tagger_progress())
    scores = f"F1 on dev {report['dev']}" if posts[1] else "the last, as there are no dev posts to choose by"
    typer.echo(f"kept epoch {report['best_epoch']}: {scores}\nmodel: {out}")
    if posts[1]:
        _store_confidence(posts[1], out, settings)


def _store_confidence(dev: list[Post], out: Path, settings: TaggerTraining) -> None:
    """Fitted to the dev posts: the tagger has not learnt from them, though they have chosen its epoch."""
    from gem_ray.config import load_config
    from gem_ray.evaluation.confidences import store_tagger

    trained = {"model": str(out), "max_length": settings.max_length}
    try:
        store_tagger(dev, load_config(labels=settings.labels, tagger=trained), f"its {len(dev)} dev posts")
    except ValueError as error:  # it finds nothing yet
        typer.echo(f"entities will have no confidence: {error}")


@app.command("reranker", epilog="Example: `gem-ray train reranker --data posts/ --base models/llava --out lora/`")
def train_reranker_command(
    context: typer.Context,
    data: DataOption,
    out: OutOption,
    base: Annotated[str, typer.Option(help="The LLaVA checkpoint under the adapter.")] = "nano:reranker",
    recipe: Annotated[str | None, typer.Option(help="`paper`, `one-gpu` or `nano`; default: the paper's.")] = None,
    split: SplitOption = "train",
    images: ImagesOption = None,
    candidates: Annotated[
        Path | None,
        typer.Option(
            help="Output of `gem-ray train candidates`; default: the paper's rule.", exists=True, dir_okay=False
        ),
    ] = None,
    workers: WorkersOption = 1,
    recipe_set: RecipeSetOption = None,
) -> None:
    """A LoRA adapter for the LLaVA reranker (§3.3.2). The same command resumes from the last checkpoint."""
    from gem_ray.rerank.candidates import StoredCandidates
    from gem_ray.rerank.recipe import load_reranker_recipe
    from gem_ray.taxonomy import LABEL_SETS

    refuse_without_root(context, data)
    settings = load_reranker_recipe(recipe, **parse_recipe_settings(recipe_set))
    posts = labelled_posts(data, split, images, settings.labels)
    rule = StoredCandidates(candidates, LABEL_SETS[settings.labels], settings.k) if candidates else None
    if workers > 1:
        from gem_ray.cluster.train_on_workers import train_reranker_on_workers

        report = train_reranker_on_workers(posts, base, out, settings, workers, rule)
    else:
        from gem_ray.rerank.train_reranker import train_reranker

        report = train_reranker(posts, base, out, settings, rule, _print_step)
    typer.echo(f"{report}\nadapter: {out}")


@app.command("candidates", epilog="Example: `gem-ray train candidates --data data/twitter10000 --out folds/`")
def train_candidates_command(
    context: typer.Context,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for `candidates.parquet`.")],
    recipe: Annotated[str | None, typer.Option(help="The tagger's recipe.")] = None,
    split: SplitOption = "train",
    folds: Annotated[int, typer.Option(help="Taggers to train, each on the posts of all other folds.", min=2)] = 5,
    k: Annotated[int, typer.Option(help="Candidates to store for each mention.", min=1)] = 10,
    recipe_set: RecipeSetOption = None,
) -> None:
    """The tagger's candidates on held-out folds, to train the reranker on."""
    from gem_ray.evaluation.fold_candidates import store_fold_candidates
    from gem_ray.tagger.recipe import load_tagger_recipe

    refuse_without_root(context, data)
    settings = load_tagger_recipe(recipe, **parse_recipe_settings(recipe_set))
    posts = labelled_posts(data, split, labels=settings.labels)
    typer.echo(f"candidates: {store_fold_candidates(posts, out, settings, folds, k, typer.echo)}")


@app.command("matcher", epilog="Example: `gem-ray train matcher --data posts/ --out models/matcher`")
def train_matcher_command(
    context: typer.Context,
    data: DataOption,
    out: OutOption,
    base: Annotated[str, typer.Option(help="The BLIP image–text matching checkpoint to start from.")] = "nano:matcher",
    split: SplitOption = "train",
    dev: Annotated[Path | None, typer.Option(help="Shards to choose the threshold and the epoch by.")] = None,
    dev_split: Annotated[str, typer.Option(help="The same, as a split of a Twitter10000 root.")] = "dev",
    images: ImagesOption = None,
    recipe_set: RecipeSetOption = None,
) -> None:
    """The BLIP matcher (§3.4.1). The same command resumes from the last checkpoint."""
    from gem_ray.config import parse_settings
    from gem_ray.grounding.matcher_recipe import MatcherTraining
    from gem_ray.grounding.train_matcher import train_matcher

    refuse_without_root(context, data, dev)
    settings = parse_settings(MatcherTraining, parse_recipe_settings(recipe_set))
    chosen_by = _dev_posts(data, dev, dev_split, images, settings.labels)
    posts = labelled_posts(data, split, images, settings.labels)
    report = train_matcher(posts, chosen_by, base, out, settings, report=_print_step)
    typer.echo(f"{report}\nmodel: {out}")


@app.command(
    "text-segmenter", epilog="Example: `gem-ray train text-segmenter --data posts/ --base nano:text-segmenter --out m/`"
)
def train_text_segmenter_command(
    context: typer.Context,
    data: DataOption,
    out: OutOption,
    base: Annotated[str, typer.Option(help="The CLIPSeg checkpoint to start from.")] = "nano:text-segmenter",
    split: SplitOption = "train",
    images: ImagesOption = None,
    recipe_set: RecipeSetOption = None,
) -> None:
    """The text-prompted segmenter (§3.4.3), on gold boxes as masks."""
    from gem_ray.config import ImageConfig, parse_settings
    from gem_ray.data.images import ImageLoader
    from gem_ray.grounding.text_segmenter_recipe import TextSegmenterTraining
    from gem_ray.grounding.train_text_segmenter import samples_from_posts, train_text_segmenter

    refuse_without_root(context, data)
    loader = ImageLoader(ImageConfig())
    posts = labelled_posts(data, split, images)
    for post in posts:
        loader.load(post)
    settings = parse_settings(TextSegmenterTraining, parse_recipe_settings(recipe_set))
    train_text_segmenter(list(samples_from_posts(posts)), base, out, settings, report=_print_step)
    typer.echo(f"model: {out}")


@nano.command("build", epilog="Example: `gem-ray nano build --only matcher`")
def nano_build(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="Folder for the models; default: the package itself.")] = None,
    tweets: Annotated[Path, typer.Option(help="A Twitter10000 root, for the tagger.")] = Path("data/twitter10000"),
    only: Annotated[list[str] | None, typer.Option(help="Train only this model. Repeatable.")] = None,
    jobs: Annotated[int, typer.Option(help="Models to train in parallel.", min=1)] = 2,
    seed: SeedOption = 0,
) -> None:
    """Train the embedded models from scratch."""
    from gem_ray.nano.build import WEIGHTS, build

    if only and "tagger" not in only:
        refuse(context, "tweets", because="is for the tagger, which --only leaves out")
    build(
        out or WEIGHTS,
        tweets=tweets,
        seed=seed,
        only=only or (),
        jobs=jobs,
        on_done=lambda name, scores: typer.echo(f"{name}: {scores}"),
    )


def _dev_posts(
    data: Path, dev: Path | None, split: str, images: Path | None = None, labels: str = "fmnerg"
) -> list[Post]:
    """Posts to choose by: shards of their own, or a split of a Twitter10000 root; else there are none."""
    from gem_ray.data.twitter10000 import is_root

    source = dev or (data if is_root(data) else None)
    return labelled_posts(source, split, images, labels) if source else []


def _print_step(step: int, loss: float) -> None:
    typer.echo(f"step {step}: loss {loss:.4f}")


def _tagger_progress() -> Callable[[TrainingProgress], None]:
    def show(progress: TrainingProgress) -> None:
        if progress.step % 50 == 0:
            typer.echo(f"epoch {progress.epoch}, step {progress.step} of {progress.steps}: loss {progress.loss:.3f}")

    return show

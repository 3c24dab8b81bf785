"""The `gem-ray` command. Heavy imports are inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from gem_ray.pipeline.submit import LOCAL_ADDRESS, Job

if TYPE_CHECKING:
    from gem_ray.pipeline.summary import RunSummary
    from gem_ray.records import Post
    from gem_ray.tagger.trainer import Progress

T = TypeVar("T")

app = typer.Typer(
    name="gem-ray",
    help="Bulk annotation of social posts: fine-grained entities in the text, and where they are seen in the image.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
shards = typer.Typer(help="Make Parquet shards out of other formats.", no_args_is_help=True)
train = typer.Typer(help="Train a component.", no_args_is_help=True)
nano = typer.Typer(help="The embedded default's models.", no_args_is_help=True)
app.add_typer(shards, name="shards")
app.add_typer(train, name="train")
app.add_typer(nano, name="nano")

EXIT_FAILED, EXIT_USAGE, EXIT_REJECTED = 1, 2, 3


class Protocol(StrEnum):
    """How predicted mentions are keyed."""

    STRICT = "strict"
    TEXT_KEY = "text-key"


class Labels(StrEnum):
    """Label sets."""

    FMNERG = "fmnerg"
    GMNER = "gmner"


PresetOption = Annotated[str, typer.Option("--preset", "-p", help="Start from this preset.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file over the preset.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", "-s", help="One key: `filter.gamma=0.3`. Repeatable.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]
PerShardOption = Annotated[int, typer.Option(help="Posts in a shard.", min=1)]


@app.callback()
def _common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
    json_logs: Annotated[bool, typer.Option(help="Progress and results as JSON lines, for machines.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    import logging

    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    context.obj = {"debug": debug, "json_logs": json_logs}


@app.command(epilog="Example: `gem-ray demo --out out/demo --posts 200`")
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("out/demo"),
    posts: Annotated[int, typer.Option(help="How many posts.", min=1)] = 200,
    seed: SeedOption = 7,
) -> None:
    """Generated posts through the whole system: annotations, scores, ablations and a gallery."""
    from gem_ray.nano.demo import run_demo

    run_demo(out, posts, seed)


@app.command(epilog="Example: `gem-ray annotate posts/ out/ --set filter.gamma=0.3`")
def annotate(
    context: typer.Context,
    input: Annotated[str, typer.Argument(help="Parquet or WebDataset shards: a file or a folder.")],
    output: Annotated[str, typer.Argument(help="Folder for the annotations and `run.json`.")],
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N posts.", min=1)] = None,
    fresh: Annotated[bool, typer.Option(help="Begin anew; what is at OUTPUT is replaced when that is done.")] = False,
    only_problems: Annotated[
        bool, typer.Option(help="Do again the rows of a finished run that were degraded or rejected.")
    ] = False,
) -> None:
    """Annotate every post of a data set, or go on where this command stopped.

    Exit code 3: done, but some rows were rejected.
    """
    from gem_ray.config import load_config
    from gem_ray.pipeline.progress import json_lines
    from gem_ray.pipeline.run import annotate_dataset

    settings = load_config(preset, config, set_ or ())
    as_json = context.obj["json_logs"]
    progress = json_lines() if as_json else None
    summary = annotate_dataset(
        input, output, settings, limit=limit, fresh=fresh, only_problems=only_problems, progress=progress
    )
    _print_summary(summary, output, as_json)
    if summary.rejected:
        raise typer.Exit(EXIT_REJECTED)


@app.command(epilog="Example: `gem-ray plan --preset one-gpu --gpus 1 --gpu-memory 24`")
def plan(
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
    gpus: Annotated[int, typer.Option(help="Cards.", min=0)] = 0,
    gpu_memory: Annotated[
        float | None, typer.Option(help="Memory of a card, in GB; the card's, or 24, if not given.", min=1)
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="CPUs; as many as it takes if not given.", min=1)] = None,
    card: Annotated[
        str | None, typer.Option(help="Which card, for its speed: `rtx-4090`, `a100-80gb`, `h100`, …")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="`run.json` of an earlier run, for its speeds.", exists=True)
    ] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="For the cost of a million posts.", min=0)] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """What runs where, with which batch, and what it will cost. Exit code 2: it does not fit.

    The `config` of the JSON, given to `annotate --config`, bounds the pools as they were planned.
    """
    import json as json_library

    from gem_ray.config import load_config
    from gem_ray.planning.plan import make_plan, measured_seconds
    from gem_ray.planning.table import print_plan

    speeds = measured_seconds(measured) if measured else None
    result = make_plan(load_config(preset, config, set_ or ()), gpus, gpu_memory, cpus, card, speeds)
    if json:
        typer.echo(json_library.dumps(result.to_dict(), indent=2))
    else:
        print_plan(result, price_per_gpu_hour)
    result.check()


@app.command(epilog="Example: `gem-ray evaluate posts/ out/ --json scores.json`")
def evaluate(
    gold: Annotated[Path, typer.Argument(help="Shards with a `gold` column, or a Twitter10000 root with `--split`.")],
    predictions: Annotated[Path, typer.Argument(help="An output folder of `annotate`.")],
    split: Annotated[str | None, typer.Option(help="Split of a Twitter10000 root.")] = None,
    labels: Annotated[Labels, typer.Option(help="Label set.")] = Labels.FMNERG,
    protocol: Annotated[Protocol, typer.Option(help="How mentions are keyed.")] = Protocol.STRICT,
    iou: Annotated[float, typer.Option(help="A box is right above this.", min=0, max=1)] = 0.5,
    json: Annotated[Path | None, typer.Option(help="Write the scores here.")] = None,
) -> None:
    """Score annotations against gold: MNER, EEG, MNERG and their company."""
    from gem_ray.evaluation.metrics import evaluate as score
    from gem_ray.evaluation.predictions import read_gold, read_predictions
    from gem_ray.evaluation.report import print_report, write_report
    from gem_ray.taxonomy import LABEL_SETS

    label_set = LABEL_SETS[labels.value]
    report = score(
        read_gold(gold, split, label_set),
        read_predictions(predictions),
        labels=label_set,
        protocol=protocol.value,
        iou=iou,
    )
    print_report(report)
    if json is not None:
        write_report(report, json)


@app.command(epilog="Example: `gem-ray calibrate --data posts/ --budget 0.15 --rerank`")
def calibrate(
    data: Annotated[Path, typer.Option(help="Shards with a `gold` column, or a Twitter10000 root.")],
    out: Annotated[Path, typer.Option(help="Folder for `calibration.json` and `calibration.png`.")] = Path(
        "out/calibration"
    ),
    split: Annotated[str, typer.Option(help="Split of a Twitter10000 root.")] = "dev",
    images: Annotated[Path | None, typer.Option(help="Images of a Twitter10000 root, named by image id.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Propose the γ that sends at most this share to the reranker.", min=0, max=1)
    ] = None,
    rerank: Annotated[bool, typer.Option("--rerank", help="Ask the configured reranker about every entity.")] = False,
    reranked: Annotated[
        Path | None, typer.Option(help="Or take its answers from this output of `annotate --set filter.gamma=0`.")
    ] = None,
    k: Annotated[int, typer.Option(help="Candidates in which the gold category is looked for.", min=1)] = 5,
    bin_width: Annotated[float, typer.Option(help="Of entropy, in nats.", min=0.01)] = 0.2,
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Accuracy, top-K recall and share of entities by entropy on a dev set, and which γ follows (Figure 5)."""
    from gem_ray.config import ConfigError, load_config
    from gem_ray.evaluation import calibration, calibration_report, dev_set

    if rerank and reranked:
        raise ConfigError("--rerank and --reranked: say one of them")
    settings = load_config(preset, config, set_ or ())
    answers = dev_set.EarlierRun(reranked) if reranked else dev_set.ConfiguredReranker(settings) if rerank else None
    posts = _labelled(data, split, images, settings.labels)
    entities = list(dev_set.judge_dev_set(posts, settings, k, answers))
    result = calibration.calibrate(entities, k, settings.filter.gamma, budget, bin_width)
    calibration_report.print_calibration(result)
    calibration_report.write_calibration(result, out)
    typer.echo(f"figures: {out / 'calibration.json'}, plot: {out / 'calibration.png'}")


@app.command(epilog="Example: `gem-ray gallery out/ posts/ gallery.html`")
def gallery(
    annotations: Annotated[Path, typer.Argument(help="An output folder of `annotate`.")],
    images: Annotated[Path, typer.Argument(help="The shards that were annotated: images, and gold if there is any.")],
    out: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    limit: Annotated[int, typer.Option(help="At most this many posts.", min=1)] = 5000,
) -> None:
    """One self-contained page with posts, entities, boxes and heat maps."""
    from gem_ray.evaluation.gallery import write_gallery_of_run

    write_gallery_of_run(annotations, images, out, limit=limit)
    typer.echo(f"gallery: {out}")


@shards.command("twitter10000", epilog="Example: `gem-ray shards twitter10000 data/twitter10000 posts/ --split dev`")
def shards_twitter10000(
    root: Annotated[Path, typer.Argument(help="The folder with `txt`, `txt_fine`, `xml` and `knowledge`.")],
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    split: Annotated[str, typer.Option(help="`train` or `dev`.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images, named by image id.")] = None,
    labels: Annotated[Labels, typer.Option(help="Which annotations become the gold column.")] = Labels.FMNERG,
    knowledge: Annotated[bool, typer.Option(help="Keep the caption and knowledge columns.")] = True,
    per_shard: PerShardOption = 1000,
) -> None:
    """The GMNER / FMNERG data set, with gold."""
    from dataclasses import replace

    from gem_ray.data.convert import embedded
    from gem_ray.data.twitter10000 import read_split
    from gem_ray.taxonomy import LABEL_SETS

    posts = read_split(root, split, LABEL_SETS[labels.value], images)
    if not knowledge:
        posts = [replace(post, caption=None, knowledge=None) for post in posts]
    _write_shards(embedded(posts, images) if images else posts, out, per_shard)


@shards.command("generated", epilog="Example: `gem-ray shards generated posts/ --posts 1000 --seed 7`")
def shards_generated(
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    posts: Annotated[int, typer.Option(help="How many posts.", min=1)] = 200,
    seed: SeedOption = 7,
    per_shard: PerShardOption = 1000,
) -> None:
    """Posts about invented entities, with images and gold."""
    from gem_ray.data.generated import generate

    _write_shards(generate(posts, seed), out, per_shard)


@shards.command("jsonl", epilog="Example: `gem-ray shards jsonl posts.jsonl posts/`")
def shards_jsonl(
    file: Annotated[Path, typer.Argument(help="One object a line: post_id, text, image or image_uri, …", exists=True)],
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    embed_images: Annotated[bool, typer.Option(help="Put images beside the file into the shards.")] = True,
    per_shard: PerShardOption = 1000,
) -> None:
    """JSON lines."""
    from gem_ray.data.convert import from_jsonl

    _write_shards(from_jsonl(file, embed_images), out, per_shard)


@shards.command("csv", epilog="Example: `gem-ray shards csv posts.csv posts/`")
def shards_csv(
    file: Annotated[Path, typer.Argument(help="With a header: post_id, text, image_uri, …", exists=True)],
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    embed_images: Annotated[bool, typer.Option(help="Put images beside the file into the shards.")] = True,
    per_shard: PerShardOption = 1000,
) -> None:
    """Comma-separated values."""
    from gem_ray.data.convert import from_csv

    _write_shards(from_csv(file, embed_images), out, per_shard)


@shards.command("folder", epilog="Example: `gem-ray shards folder pictures/ posts/`")
def shards_folder(
    folder: Annotated[Path, typer.Argument(help="Images, and a text file of the same name beside each.", exists=True)],
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    per_shard: PerShardOption = 1000,
) -> None:
    """A folder of images with their texts."""
    from gem_ray.data.convert import from_folder

    _write_shards(from_folder(folder), out, per_shard)


@shards.command("webdataset", epilog="Example: `gem-ray shards webdataset tars/ posts/`")
def shards_webdataset(
    path: Annotated[str, typer.Argument(help="A tar, or a folder of tars.")],
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    per_shard: PerShardOption = 1000,
) -> None:
    """WebDataset tars (`annotate` also reads them as they are)."""
    from gem_ray.data.convert import from_webdataset

    _write_shards(from_webdataset(path), out, per_shard)


DataOption = Annotated[Path, typer.Option(help="Shards with a `gold` column, or a Twitter10000 root.")]
OutOption = Annotated[Path, typer.Option(help="The model directory to write.")]
SplitOption = Annotated[str, typer.Option(help="Split of a Twitter10000 root to learn from.")]
ImagesOption = Annotated[Path | None, typer.Option(help="Images of a Twitter10000 root, named by image id.")]
RecipeOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="One setting of the recipe: `epochs=3`. Repeatable.")
]


@train.command("tagger", epilog="Example: `gem-ray train tagger --data data/twitter10000 --out models/tagger`")
def train_tagger_command(
    data: DataOption,
    out: OutOption,
    preset: Annotated[
        str | None, typer.Option("--preset", "-p", help="A recipe: `nano`, `paper-bert`, `paper-roberta`.")
    ] = None,
    split: SplitOption = "train",
    dev: Annotated[Path | None, typer.Option(help="Shards to choose the epoch by.")] = None,
    dev_split: Annotated[str, typer.Option(help="The same, as a split of a Twitter10000 root.")] = "dev",
    workers: Annotated[
        int, typer.Option(help="Processes that share the work, by Ray Train; OUT must be a folder that all see.", min=1)
    ] = 1,
    set_: RecipeOption = None,
) -> None:
    """The dual-path CRF tagger (§3.2). Stopped, the same command goes on from the last checkpoint."""
    from gem_ray.tagger.recipe import load_recipe

    settings = load_recipe(preset, **_overrides(set_))
    posts = _labelled(data, split, labels=settings.labels), _labelled(dev or data, dev_split, labels=settings.labels)
    if workers > 1:
        from gem_ray.pipeline.train_tagger import train_tagger_on_workers

        report = train_tagger_on_workers(*posts, out, settings, workers)
    else:
        from gem_ray.tagger.train import train_tagger

        report = train_tagger(*posts, out, settings, _tagger_progress())
    typer.echo(f"kept epoch {report['best_epoch']}: F1 on dev {report['dev']}\nmodel: {out}")


@train.command("reranker", epilog="Example: `gem-ray train reranker --data posts/ --base models/llava --out lora/`")
def train_reranker_command(
    data: DataOption,
    out: OutOption,
    base: Annotated[str, typer.Option(help="The LLaVA checkpoint under the adapter.")] = "nano:reranker",
    split: SplitOption = "train",
    images: ImagesOption = None,
    set_: RecipeOption = None,
) -> None:
    """A LoRA adapter for the LLaVA reranker (§3.3.2)."""
    from gem_ray.rerank.train import RerankerTraining, train_reranker

    settings = _recipe(RerankerTraining, set_)
    report = train_reranker(_labelled(data, split, images), base, out, settings, report=_print_step)
    typer.echo(f"{report}\nadapter: {out}")


@train.command("matcher", epilog="Example: `gem-ray train matcher --data posts/ --out models/matcher`")
def train_matcher_command(
    data: DataOption,
    out: OutOption,
    base: Annotated[str, typer.Option(help="The BLIP image–text matching checkpoint to start from.")] = "nano:matcher",
    split: SplitOption = "train",
    images: ImagesOption = None,
    set_: RecipeOption = None,
) -> None:
    """The BLIP matcher (§3.4.1)."""
    from gem_ray.grounding.train_matcher import MatcherTraining, train_matcher

    report = train_matcher(_labelled(data, split, images), base, out, _recipe(MatcherTraining, set_))
    typer.echo(f"{report}\nmodel: {out}")


@train.command(
    "text-segmenter", epilog="Example: `gem-ray train text-segmenter --data posts/ --base nano:text-segmenter --out m/`"
)
def train_text_segmenter_command(
    data: DataOption,
    out: OutOption,
    base: Annotated[str, typer.Option(help="The CLIPSeg checkpoint to start from.")] = "nano:text-segmenter",
    split: SplitOption = "train",
    images: ImagesOption = None,
    set_: RecipeOption = None,
) -> None:
    """The text-prompted segmenter (§3.4.3), on gold boxes as masks."""
    from gem_ray.config import ImageConfig
    from gem_ray.data.images import ImageLoader
    from gem_ray.grounding.train_text_segmenter import TextSegmenterTraining, samples_from_posts, train_text_segmenter

    loader = ImageLoader(ImageConfig())
    posts = _labelled(data, split, images)
    for post in posts:
        loader.load(post)
    settings = _recipe(TextSegmenterTraining, set_)
    train_text_segmenter(list(samples_from_posts(posts)), base, out, settings, report=_print_step)
    typer.echo(f"model: {out}")


@app.command(
    epilog="Example: `gem-ray submit annotate --address http://127.0.0.1:8265 -- s3://bucket/posts/ s3://bucket/out/`"
)
def submit(
    job: Annotated[Job, typer.Argument(help="What to run.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="After `--`: the command's own arguments.")] = None,
    address: Annotated[
        str, typer.Option(help="The cluster's dashboard.", envvar="RAY_API_SERVER_ADDRESS")
    ] = LOCAL_ADDRESS,
    working_dir: Annotated[Path, typer.Option(help="The checkout whose source runs.", file_okay=False)] = Path(),
    include: Annotated[
        list[str] | None, typer.Option(help="A file or folder in it that goes too: a config. Repeatable.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="`NAME=value` for the job, or `NAME` as it is here. Repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the log and end as the job ends.")] = True,
) -> None:
    """Run a command as a job on a Ray cluster. With token authentication: `RAY_AUTH_MODE=token`, `RAY_AUTH_TOKEN=…`."""
    from gem_ray.pipeline.submit import commands_for, follow_job, job_environment, submit_job

    runtime_env = job_environment(working_dir, include or (), env or ())
    submission_id = submit_job(job, arguments or (), address, runtime_env)
    typer.echo(submission_id)
    typer.echo(commands_for(submission_id, address), err=True)
    if wait:
        raise typer.Exit(follow_job(submission_id, address))


@app.command(epilog="Example: `gem-ray experiment tagger --data data/twitter10000 --out out/tagger --seeds 3`")
def experiment(
    name: Annotated[str, typer.Argument(help="`tagger`, `tagger-recipe`, or a YAML file of the same form.")],
    data: Annotated[Path, typer.Option(help="A Twitter10000 root.")],
    out: Annotated[Path, typer.Option(help="Folder for the table and the runs.")],
    seeds: Annotated[int, typer.Option(help="Trainings of each variant.", min=1)] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Just this variant. Repeatable.")] = None,
    set_: RecipeOption = None,
) -> None:
    """Variants of a recipe over several seeds, in one table. What is done is not done again."""
    from gem_ray.experiments.definition import load_experiment
    from gem_ray.experiments.run import run_experiment
    from gem_ray.tagger.scores import one_line

    definition, overrides = load_experiment(name), _overrides(set_)
    run_experiment(
        definition,
        _labelled(data, "train"),
        _labelled(data, "dev"),
        out,
        seeds=seeds,
        overrides=overrides,
        only=only or (),
        on_done=lambda variant, seed, result: typer.echo(f"{variant}, seed {seed}: {one_line(result['dev'])}"),
    )
    typer.echo(f"table: {out / 'table.md'}")


@nano.command("build", epilog="Example: `gem-ray nano build --tweets data/twitter10000 --only matcher`")
def nano_build(
    out: Annotated[Path | None, typer.Option(help="Folder for the models; the package's own if not given.")] = None,
    tweets: Annotated[Path | None, typer.Option(help="A Twitter10000 root, for the tagger.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Just this model. Repeatable.")] = None,
    jobs: Annotated[int, typer.Option(help="Models trained at a time.", min=1)] = 2,
    seed: SeedOption = 0,
) -> None:
    """Train the embedded models again, from scratch."""
    from gem_ray.nano.build import DEFAULT_TWEETS, WEIGHTS, build

    build(
        out or WEIGHTS,
        tweets=tweets or DEFAULT_TWEETS,
        seed=seed,
        only=only or (),
        jobs=jobs,
        on_done=lambda name, scores: typer.echo(f"{name}: {scores}"),
    )


def main() -> None:
    """Run the command; errors that a user can mend are a sentence, not a traceback."""
    from gem_ray.config import ConfigError

    try:
        app()
    except (OSError, ValueError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED) from None


def _write_shards(posts: Iterable[Post], out: str, per_shard: int) -> None:
    from gem_ray.data.shards import write_posts

    typer.echo(f"{write_posts(posts, out, per_shard)} posts in {out}")


def _labelled(data: Path, split: str, images: Path | None = None, labels: str = "fmnerg") -> list[Post]:
    """Posts with gold, from shards or from a Twitter10000 root."""
    from gem_ray.data.convert import embedded
    from gem_ray.data.shards import read_posts
    from gem_ray.data.twitter10000 import read_split
    from gem_ray.taxonomy import LABEL_SETS

    if not (data / "txt_fine").is_dir():
        return list(read_posts(data))
    posts = read_split(data, split, LABEL_SETS[labels], images)
    return list(embedded(posts, images)) if images else posts


def _overrides(overrides: list[str] | None) -> dict[str, Any]:
    """Values of `key=value` arguments.

    Raises:
        ConfigError: an override that is no `key=value`.
    """
    import yaml

    from gem_ray.config import ConfigError

    for override in overrides or ():
        if "=" not in override:
            raise ConfigError(f"--set takes key=value, not {override!r}")
    pairs = (override.split("=", 1) for override in overrides or ())
    return {name.strip(): yaml.safe_load(value) for name, value in pairs}


def _recipe(kind: type[T], overrides: list[str] | None) -> T:
    """A recipe with some settings changed.

    Raises:
        ConfigError: an override that is no `key=value`, or names no setting, or has a value of the wrong kind.
    """
    from pydantic import TypeAdapter, ValidationError

    from gem_ray.config import ConfigError

    values = _overrides(overrides)
    known = list(TypeAdapter(kind).json_schema()["properties"])
    for name in values:
        if name not in known:
            raise ConfigError(f"{name}: no such setting; expected one of {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError(str(error)) from None


def _print_step(step: int, loss: float) -> None:
    typer.echo(f"step {step}: loss {loss:.4f}")


def _tagger_progress() -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        if progress.step % 50 == 0:
            typer.echo(f"epoch {progress.epoch}, step {progress.step} of {progress.steps}: loss {progress.loss:.3f}")

    return show


def _print_summary(summary: RunSummary, output: str, as_json: bool) -> None:
    """What happened; the number of rejected rows is on the last line."""
    import json

    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
        return
    tally = summary.tally
    typer.echo(
        f"{summary.annotated} posts in {summary.seconds:.1f} s ({summary.rows_per_second:.1f} a second), "
        f"{summary.rows} in all: "
        f"{tally.entities} entities, {tally.grounded} seen in the image, {tally.reranked} reranked"
    )
    for kind, count in sorted(tally.problems.items()):
        typer.echo(f"  {kind}: {count}")
    typer.echo(f"annotations: {output}/annotations, facts: {output}/run.json")
    typer.echo(", ".join(f"{status} {count}" for status, count in sorted(tally.statuses.items())))

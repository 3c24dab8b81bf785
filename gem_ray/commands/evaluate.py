"""Commands that score and compare: `evaluate`, `calibrate`, `gallery`, `experiment`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gem_ray.commands.options import (
    ConfigOption,
    Labels,
    PresetOption,
    Protocol,
    RecipeOption,
    SetOption,
    labelled_posts,
    parse_overrides,
)

app = typer.Typer()


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
    posts = labelled_posts(data, split, images, settings.labels)
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


@app.command(epilog="Example: `gem-ray experiment tagger --data data/twitter10000 --out out/tagger --seeds 3`")
def experiment(
    name: Annotated[str, typer.Argument(help="`tagger`, `tagger-recipe`, or a YAML file of the same form.")],
    data: Annotated[Path, typer.Option(help="A Twitter10000 root, or a folder with shards in `train/` and `dev/`.")],
    out: Annotated[Path, typer.Option(help="Folder for the table and the runs.")],
    seeds: Annotated[int, typer.Option(help="Trainings of each variant.", min=1)] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Just this variant. Repeatable.")] = None,
    set_: RecipeOption = None,
) -> None:
    """Variants of a recipe over several seeds, in one table. What is done is not done again."""
    from gem_ray.experiments.data import read_experiment_posts
    from gem_ray.experiments.definition import load_experiment
    from gem_ray.experiments.run import run_experiment
    from gem_ray.tagger.scores import one_line

    definition, overrides = load_experiment(name), parse_overrides(set_)
    run_experiment(
        definition,
        partial(read_experiment_posts, data),
        out,
        seeds=seeds,
        overrides=overrides,
        only=only or (),
        on_done=lambda variant, seed, result: typer.echo(f"{variant}, seed {seed}: {one_line(result['dev'])}"),
    )
    typer.echo(f"table: {out / 'table.md'}")

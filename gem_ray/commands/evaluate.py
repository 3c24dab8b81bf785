"""Commands that score and compare: `evaluate`, `errors`, `calibrate`, `gallery`, `experiment`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gem_ray.commands.options import (
    ConfigOption,
    JsonOption,
    PresetOption,
    ProtocolOption,
    RecipeSetOption,
    SetOption,
    labelled_posts,
    parse_recipe_settings,
    refuse,
    refuse_without_root,
    write_json,
)
from gem_ray.taxonomy import LabelSetName

app = typer.Typer()


@app.command(epilog="Example: `gem-ray evaluate posts/ out/ --json scores.json`")
def evaluate(
    gold: Annotated[str, typer.Argument(help="Shards with a `gold` column, or a Twitter10000 root with `--split`.")],
    predictions: Annotated[str, typer.Argument(help="An output folder of `annotate`.")],
    split: Annotated[str | None, typer.Option(help="Split of a Twitter10000 root.")] = None,
    labels: Annotated[LabelSetName, typer.Option(help="Label set.")] = "fmnerg",
    protocol: ProtocolOption = "strict",
    iou: Annotated[float, typer.Option(help="IoU above which a box is right.", min=0, max=1)] = 0.5,
    against: Annotated[
        str | None, typer.Option(help="Another output folder, compared by paired bootstrap over posts.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Score annotations against gold: MNER, EEG, MNERG, spans and more."""
    from gem_ray.evaluation.metrics import evaluate as score
    from gem_ray.evaluation.predictions import check_same_rows, read_gold, read_predictions_of
    from gem_ray.evaluation.score_report import print_differences, print_scores, score_values
    from gem_ray.evaluation.significance import compare
    from gem_ray.taxonomy import LABEL_SETS

    label_set = LABEL_SETS[labels]
    how: Any = {"labels": label_set, "protocol": protocol, "iou": iou}
    posts = read_gold(gold, split, label_set, predictions)
    annotated = read_predictions_of(posts, predictions)
    if against:
        check_same_rows(posts, predictions, against)
    others = read_predictions_of(posts, against) if against else []
    report = score(posts, annotated, **how)
    differences = compare(posts, annotated, others, **how) if against else {}
    if write_json(score_values(report, differences), json):
        return
    print_scores(report)
    if differences:
        print_differences(differences, str(against))


@app.command(epilog="Example: `gem-ray errors posts/ out/ errors.html --train train/`")
def errors(
    gold: Annotated[str, typer.Argument(help="Shards with a `gold` column, or a Twitter10000 root with `--split`.")],
    predictions: Annotated[str, typer.Argument(help="An output folder of `annotate`.")],
    out: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    split: Annotated[str | None, typer.Option(help="Split of a Twitter10000 root.")] = None,
    labels: Annotated[LabelSetName, typer.Option(help="Label set.")] = "fmnerg",
    train: Annotated[
        str | None, typer.Option(help="Training posts, to tell rare categories; of a Twitter10000 root, its `train`.")
    ] = None,
    images: Annotated[str | None, typer.Option(help="Shards or a folder with the images; default: GOLD.")] = None,
    worst: Annotated[int, typer.Option(help="Posts to show.", min=0)] = 40,
) -> None:
    """Write a page of errors: spans, confused and rare categories, and the worst posts with their images."""
    from gem_ray.config import ImageConfig
    from gem_ray.data.twitter10000 import is_root
    from gem_ray.evaluation.error_report import write_error_report
    from gem_ray.evaluation.errors import find_errors, training_counts
    from gem_ray.evaluation.predictions import read_gold, read_images, read_predictions_of
    from gem_ray.taxonomy import LABEL_SETS

    label_set = LABEL_SETS[labels]
    posts = read_gold(gold, split, label_set, predictions)
    found = find_errors(
        posts,
        read_predictions_of(posts, predictions),
        labels=label_set,
        training=training_counts(read_gold(train, "train" if is_root(train) else None, label_set), label_set)
        if train
        else None,
        worst=worst,
    )
    shown = {case.post.post_id for case in found.worst}
    source = images or (None if split else gold)
    pictures = dict(read_images(source, ImageConfig(), shown, predictions)) if source else {}
    write_error_report(found, out, images=pictures, labels=label_set)
    typer.echo(f"error report: {out}")


@app.command(epilog="Example: `gem-ray calibrate --data posts/ --accept 0.95 --out out/calibration`")
def calibrate(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="Shards with a `gold` column, or a Twitter10000 root.")],
    out: Annotated[
        Path, typer.Option(help="Folder for `calibration.json`, `calibration.png` and `thresholds.yaml`.")
    ] = Path("out/calibration"),
    split: Annotated[str, typer.Option(help="Split of a Twitter10000 root.")] = "dev",
    images: Annotated[Path | None, typer.Option(help="Images of a Twitter10000 root, named by image id.")] = None,
    max_share: Annotated[
        float | None, typer.Option(help="Propose the γ that sends at most this share to the reranker.", min=0, max=1)
    ] = None,
    accept: Annotated[
        float | None,
        typer.Option(
            help="Find the confidence above which entities are right with at least this probability.",
            min=0.5,
            max=0.999,
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Find the confidence above which the tagger alone is right with at least this probability: entities "
            "below it go to the reranker.",
            min=0.5,
            max=0.999,
        ),
    ] = None,
    delta: Annotated[
        float,
        typer.Option(
            help="With `--accept`, `--target`: highest probability that it does not hold.", min=0.001, max=0.5
        ),
    ] = 0.05,
    store: Annotated[
        bool,
        typer.Option(
            "--store",
            help="Fit `confidence` to these posts, which no model may have been trained on, and keep it with the "
            "tagger; with `--rerank` and `--ground`, with the reranker and the matcher too.",
        ),
    ] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Ask the configured reranker about every entity.")] = False,
    ground: Annotated[bool, typer.Option("--ground", help="With `--store`: fit the matcher's, too.")] = False,
    reranked: Annotated[
        Path | None,
        typer.Option(
            help="Take the answers from this output of `annotate --set filter.gamma=0 --set "
            "reranker.decision=answer` instead."
        ),
    ] = None,
    k: Annotated[int, typer.Option(help="Candidates among which the gold category is looked for.", min=1)] = 5,
    bin_width: Annotated[float, typer.Option(help="Width of a bin of entropy, in nats.", min=0.01)] = 0.2,
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
) -> None:
    """Calibrate on labelled posts: γ by entropy (Figure 5), confidence, and what can go unchecked."""
    from gem_ray.config import ConfigError, load_config
    from gem_ray.evaluation import (
        acceptance_report,
        calibration,
        calibration_report,
        confidences,
        dev_set,
        grounder_confidence,
    )

    if rerank and reranked:
        raise ConfigError("--rerank and --reranked are mutually exclusive")
    if ground and not store:
        raise ConfigError("--ground needs --store")
    if accept is None and target is None:
        refuse(context, "delta", because="is of --accept and --target, and neither is there")
    refuse_without_root(context, data)
    settings = load_config(preset, config, set_ or ())
    answers = dev_set.EarlierRun(reranked) if reranked else dev_set.ConfiguredReranker(settings) if rerank else None
    posts = labelled_posts(data, split, images, settings.labels)
    if store:
        if accept is not None or target is not None:
            raise ConfigError(
                "--store with --accept or --target: what was fitted to posts cannot be tested on them; take others"
            )
        fitted_on = f"{len(posts)} posts of {data.resolve().name}"
        typer.echo(f"confidence: {confidences.store_tagger(posts, settings, fitted_on)}")
        if rerank:
            typer.echo(f"confidence: {confidences.store_reranker(posts, settings, fitted_on)}")
        if ground:
            typer.echo(f"confidence: {grounder_confidence.store_grounder(posts, settings, fitted_on)}")
    entities = list(dev_set.judge_dev_set(posts, settings, k, answers))
    result = calibration.calibrate(entities, k, settings.filter.gamma, max_share, bin_width)
    calibration_report.write_calibration(result, out)
    calibration_report.print_calibration(result)
    typer.echo(f"figures: {out / 'calibration.json'}, plot: {out / 'calibration.png'}")
    if target is not None:
        found = acceptance_report.certify_tagger(posts, settings, target, delta)
        settings = acceptance_report.promised(found, "routing", settings)
        typer.echo(f"tagger: {acceptance_report.describe(found)}; the others go to the reranker")
        acceptance_report.write_promises(settings, out)  # which holds whatever --accept finds
    if accept is not None:
        found = acceptance_report.certify_posts(posts, settings, accept, delta)
        settings = acceptance_report.promised(found, "acceptance", settings)
        typer.echo(f"system: {acceptance_report.describe(found)}")
    if target is not None or accept is not None:
        typer.echo(f"thresholds: {acceptance_report.write_promises(settings, out)}, for `annotate --config`")


@app.command(epilog="Example: `gem-ray gallery posts/ out/ gallery.html`")
def gallery(
    posts: Annotated[str, typer.Argument(help="The shards that were annotated: images, and gold if there is any.")],
    annotations: Annotated[str, typer.Argument(help="An output folder of `annotate`.")],
    out: Annotated[Path, typer.Argument(help="The HTML page to write.")],
    limit: Annotated[int, typer.Option(help="At most this many posts.", min=1)] = 5000,
) -> None:
    """Write one self-contained page with posts, entities, boxes and heat maps."""
    from gem_ray.evaluation.gallery import write_gallery_of_run

    write_gallery_of_run(posts, annotations, out, limit=limit)
    typer.echo(f"gallery: {out}")


@app.command(epilog="Example: `gem-ray experiment figure3 --data data/twitter10000 --out out/experiments`")
def experiment(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="`table1`, `figure5`, `cost` …, or a YAML file of the same form.")],
    data: Annotated[Path, typer.Option(help="A Twitter10000 root, or a folder with shards in `train/` and `dev/`.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs, which experiments share, and for `NAME/table.md`.")],
    seeds: Annotated[int, typer.Option(help="Trainings of each variant that trains a tagger.", min=1)] = 3,
    only: Annotated[list[str] | None, typer.Option(help="Run only this variant. Repeatable.")] = None,
    tabulate: Annotated[bool, typer.Option("--tabulate", help="Run nothing; tabulate the finished runs.")] = False,
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
    recipe_set: RecipeSetOption = None,
) -> None:
    """Compare variants of the system, as a table or figure of the paper does. Finished runs are skipped."""
    from gem_ray.config import load_config
    from gem_ray.experiments.data import read_experiment_posts
    from gem_ray.experiments.definition import load_experiment
    from gem_ray.experiments.run import refuse_overruled, run_experiment

    definition, base = load_experiment(name), load_config(preset, config, set_ or ())
    overrides = parse_recipe_settings(recipe_set)
    refuse_overruled(definition, only or (), base, set_ or (), overrides)
    if not any(variant.is_trained for variant in definition.variants if variant.name in (only or [variant.name])):
        refuse(context, "seeds", because="is of variants that train a tagger, and none of these does")
    run_experiment(
        definition,
        partial(read_experiment_posts, data),
        out,
        seeds=seeds,
        overrides=overrides,
        base=base,
        only=only or (),
        run_missing=not tabulate,
        on_done=lambda variant, seed, result: typer.echo(f"{variant}, seed {seed}: done"),
    )
    typer.echo((out / definition.name / "table.md").read_text(encoding="utf-8"))
    typer.echo(f"table, figures and plot: {out / definition.name}")

"""Commands that annotate: `demo`, `annotate`, `plan`, `submit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gem_ray.cluster.submit import LOCAL_ADDRESS, Job
from gem_ray.commands.options import (
    EXIT_REJECTED,
    MAX_PROBLEM_SHARE,
    ConfigOption,
    MapOption,
    PresetOption,
    SeedOption,
    SetOption,
    SkipOption,
    UnseenNamesOption,
    parse_columns,
)
from gem_ray.plurals import counted

if TYPE_CHECKING:
    from gem_ray.pipeline.summary import RunSummary

app = typer.Typer()


@app.command(epilog="Example: `gem-ray demo --out out/demo --posts 200`")
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("out/demo"),
    posts: Annotated[int, typer.Option(help="How many posts.", min=1)] = 200,
    seed: SeedOption = 7,
    unseen_names: UnseenNamesOption = 0.4,
) -> None:
    """Generated posts through the whole system: annotations, scores, ablations and a gallery."""
    from gem_ray.nano.demo import run_demo

    run_demo(out, posts, seed, unseen_names)


@app.command(epilog="Example: `gem-ray annotate posts/ out/ --set filter.gamma=0.3`")
def annotate(
    context: typer.Context,
    input: Annotated[str, typer.Argument(help="Parquet or WebDataset shards: a file or a folder.")],
    output: Annotated[str, typer.Argument(help="Folder for the annotations and `run.json`.")],
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
    map_: MapOption = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N posts.", min=1)] = None,
    fresh: Annotated[bool, typer.Option(help="Begin anew; what is at OUTPUT is replaced when that is done.")] = False,
    update: Annotated[bool, typer.Option(help="Take in files that were added to INPUT since.")] = False,
    only_problems: Annotated[
        bool, typer.Option(help="Do again the rows of a finished run that were degraded or rejected.")
    ] = False,
    skip_bad_files: SkipOption = False,
    max_problem_share: Annotated[
        float, typer.Option(help="End when more of the posts have problems of one kind; 1: never.", min=0, max=1)
    ] = MAX_PROBLEM_SHARE,
) -> None:
    """Annotate every post of a data set, or continue where this command stopped.

    Exit code 1: failed, or too many posts did. 3: done, but some rows were rejected, or some files not read.
    """
    from gem_ray.config import load_config
    from gem_ray.pipeline.mass_failure import mass_failure
    from gem_ray.pipeline.progress import json_lines
    from gem_ray.pipeline.run import annotate_dataset

    settings = load_config(preset, config, set_ or ())
    as_json = context.obj["json_logs"]
    progress = json_lines() if as_json else None
    if sum((fresh, update, only_problems)) > 1:
        raise typer.BadParameter("--fresh, --update and --only-problems are mutually exclusive")
    summary = annotate_dataset(
        input,
        output,
        settings,
        columns=parse_columns(map_),
        limit=limit,
        fresh=fresh,
        update=update,
        only_problems=only_problems,
        skip_bad_files=skip_bad_files,
        max_problem_share=max_problem_share,
        progress=progress,
    )
    _print_summary(summary, output.rstrip("/"), as_json)
    if failure := mass_failure(summary.tally, max_problem_share):
        raise RuntimeError(failure)
    if summary.rejected or summary.unread:
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
    from gem_ray.cluster.submit import commands_for, follow_job, job_environment, submit_job

    runtime_env = job_environment(working_dir, include or (), env or ())
    submission_id = submit_job(job, arguments or (), address, runtime_env)
    typer.echo(submission_id)
    typer.echo(commands_for(submission_id, address), err=True)
    if wait:
        raise typer.Exit(follow_job(submission_id, address))


def _print_summary(summary: RunSummary, output: str, as_json: bool) -> None:
    """What happened; the number of rejected rows is on the last line."""
    import json

    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
        return
    tally = summary.tally
    if summary.annotated:
        speed = f"{summary.seconds:.1f} s ({summary.rows_per_second:.1f} a second)"
        done = f"{counted(summary.annotated, 'post')} in {speed}, {summary.rows:,} in all"
    else:
        done = f"nothing to do, {counted(summary.rows, 'post')} in all"
    typer.echo(
        f"{done}: {counted(tally.entities, 'entity', 'entities')}: {tally.grounded:,} seen in the image, "
        f"{tally.not_seen:,} not seen, {tally.not_judged:,} not judged; {tally.reranked:,} reranked"
    )
    if sentence := _about_abstaining(summary):
        typer.echo(sentence)
    if summary.unread:
        unknown = sum(file["rows"] is None for file in summary.unread)
        more = f" and those of {counted(unknown, 'file')} without a footer that says how many" if unknown else ""
        rows, files = counted(summary.unread_rows, "row"), counted(len(summary.unread), "file")
        typer.echo(f"not read: {rows}{more}, in {files}; see {output}/run.json")
    for kind, count in sorted(tally.problems.items()):
        typer.echo(f"  {kind}: {count}")
    if tally.problems:
        typer.echo(f"why, with examples: {output}/_run/report.html")
    typer.echo(f"annotations: {output}/annotations, facts: {output}/run.json")
    typer.echo(", ".join(f"{status} {count}" for status, count in sorted(tally.statuses.items())))


def _about_abstaining(summary: RunSummary) -> str | None:
    """What the embedded models have not done with images that they do not know, and the command that does it."""
    from gem_ray.checkpoints import resolve
    from gem_ray.config import parse_config
    from gem_ray.scope import Scope

    config, count = parse_config(summary.config), summary.tally.not_judged_with_image
    matcher = config.grounder.matcher.model
    if not (count and config.grounder.enabled and matcher.startswith("nano:")):
        return None
    scope = Scope.load(resolve(matcher))
    assert scope is not None  # `gem-ray nano build` writes it
    reranker_too = config.reranker.enabled and config.reranker.model.startswith("nano:")
    entities = counted(count, "entity", "entities")
    left_out = "not reranked and not looked for" if reranker_too else "not looked for"
    return (
        f"{entities} tagged by the text alone, {left_out} in the image: {matcher} knows only "
        f"{scope.knows}. For real photos: gem-ray annotate {summary.input} OTHER-OUTPUT --preset cpu"
    )

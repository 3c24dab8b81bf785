"""Commands that annotate: `demo`, `annotate`, `plan`, `submit`."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gem_ray.cluster.submit import LOCAL_ADDRESS, Job
from gem_ray.commands.options import (
    EXIT_INTERRUPTED,
    EXIT_REJECTED,
    MAX_PROBLEM_SHARE,
    ConfigOption,
    JsonOption,
    MapOption,
    PresetOption,
    PriceOption,
    RequestPriceOption,
    SeedOption,
    SetOption,
    SkipOption,
    UnseenNamesOption,
    configured,
    finite,
    parse_columns,
    refuse,
    same_command,
    write_json,
)
from gem_ray.plurals import counted

if TYPE_CHECKING:
    from gem_ray.config import Config
    from gem_ray.pipeline.account import Account
    from gem_ray.pipeline.summary import RunSummary
    from gem_ray.planning.plan import Plan
    from gem_ray.planning.workload import Workload

app = typer.Typer()


@app.command(epilog="Example: `gem-ray demo --out out/demo --posts 200`")
def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("out/demo"),
    posts: Annotated[int, typer.Option(help="How many posts.", min=1)] = 200,
    seed: SeedOption = 7,
    unseen_names: UnseenNamesOption = 0.4,
) -> None:
    """Run the whole system on generated posts: annotations, scores, ablations and a gallery."""
    from gem_ray.ray_private.fork_server import start_fork_server

    start_fork_server()
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
    fresh: Annotated[bool, typer.Option(help="Start a new run; when done, it replaces what is at OUTPUT.")] = False,
    update: Annotated[bool, typer.Option(help="Add the files that are new in INPUT to the run.")] = False,
    only_problems: Annotated[
        bool, typer.Option(help="Redo the rows of a finished run that were degraded or rejected.")
    ] = False,
    skip_bad_files: SkipOption = False,
    max_problem_share: Annotated[
        float,
        typer.Option(
            help="Fail when more of the posts have the same kind of problem; 1: never.", min=0, max=1, callback=finite
        ),
    ] = MAX_PROBLEM_SHARE,
    price: PriceOption = None,
    request_price: RequestPriceOption = 0.0,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Stop, to be resumed, when the run has cost this much; needs --price.", min=0, callback=finite
        ),
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(help="Warn when the run will finish later: `2h30m` from now, or `2026-12-31T18:00`.")
    ] = None,
) -> None:
    """Annotate every post of a data set, or resume an unfinished run.

    Runs on the Ray cluster that `RAY_ADDRESS` names (`auto` on its nodes), else on this machine.

    Exit code 1: failed, or too many posts did. 3: done, but some rows were rejected, or some files not read.
    """
    from gem_ray.ray_private.fork_server import start_fork_server

    settings = configured(preset, config, set_, unused="serving")
    start_fork_server()
    from gem_ray.pipeline.limits import RunLimits, parse_deadline
    from gem_ray.pipeline.mass_failure import mass_failure
    from gem_ray.pipeline.progress import json_lines
    from gem_ray.pipeline.run import annotate_dataset

    as_json = context.obj["json_logs"]
    progress = json_lines() if as_json else None
    limits = RunLimits(price, budget, parse_deadline(deadline, datetime.now(UTC)) if deadline else None, request_price)
    if sum((fresh, update, only_problems)) > 1:
        raise typer.BadParameter("--fresh, --update and --only-problems are mutually exclusive")
    try:
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
            limits=limits,
            progress=progress,
        )
    except (KeyboardInterrupt, SystemExit) as stop:  # Ray makes SIGTERM the latter
        begun = ["--fresh"] * fresh + ["--update"] * update
        typer.echo(f"\nstopped; finished rows are in {output}, and {same_command(begun)} continues", err=True)
        if isinstance(stop, SystemExit):
            raise
        raise typer.Exit(EXIT_INTERRUPTED) from None
    with suppress(BrokenPipeError):  # who read it has gone (`| head -1`); the run is finished all the same
        _print_summary(summary, settings, output.rstrip("/"), as_json)
    if failure := mass_failure(summary.tally, max_problem_share):
        raise RuntimeError(failure)
    if failure := mass_failure(summary.newest, max_problem_share):
        raise RuntimeError(f"of the files that were added last: {failure}")
    if summary.rejected or summary.unread:
        raise typer.Exit(EXIT_REJECTED)


@app.command(epilog="Example: `gem-ray plan --preset one-gpu --gpus 1 --gpu-memory 24 --posts 10000000 --price 0.5`")
def plan(
    context: typer.Context,
    preset: PresetOption = "nano",
    config: ConfigOption = None,
    set_: SetOption = None,
    gpus: Annotated[str, typer.Option(help="GPUs: how many, or which: `8xl40s+4xa10g`.")] = "0",
    gpu_memory: Annotated[
        float | None, typer.Option(help="Memory of a GPU in GB; default: the card's, else 24.", min=1)
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(help="CPUs; without GPUs, of one machine; default: as many as the plan needs.", min=1)
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(help="Model of the GPU, for its speed: `rtx-4090`, `h100`, …, or `name:memory=24,tflops=165`."),
    ] = None,
    posts: Annotated[int, typer.Option(help="Posts to plan for.", min=1)] = 1_000_000,
    price: PriceOption = None,
    request_price: RequestPriceOption = 0.0,
    probe: Annotated[
        str | None,
        typer.Option(help="Input, of which a few hundred posts are tagged to measure what they ask of the models."),
    ] = None,
    map_: MapOption = None,
    like: Annotated[
        str | None, typer.Option(help="`run.json` of an earlier run, also on S3, for its posts and its speed.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Plan which model runs where, how long a run takes and what it costs. Exit code 2: it does not fit.

    The `config` of the JSON, given to `annotate --config`, bounds the pools as they were planned.
    """
    from gem_ray.planning.cards import Fleet
    from gem_ray.planning.earlier_run import read_run
    from gem_ray.planning.estimate import estimate
    from gem_ray.planning.plan import make_plan
    from gem_ray.planning.table import print_plan
    from gem_ray.planning.workload import TWEETS

    settings = configured(preset, config, set_, unused="serving")
    if probe and like:
        raise typer.BadParameter("--probe and --like are mutually exclusive")
    if map_ and not probe:
        raise typer.BadParameter("--map names the columns of the input that --probe reads")
    if price is None and gpus == "0":
        refuse(context, "request_price", because="needs --price: what an hour of a machine costs")
    work, speeds = read_run(like, settings) if like else (TWEETS, None)
    if probe:
        from gem_ray.planning.probe import probe as measure

        found = measure(probe, settings, columns=parse_columns(map_))
        work, speeds = found.work, found.seconds or None

    def make(fleet: Fleet, cpus: int | None, work: Workload) -> Plan:
        return make_plan(settings, fleet, cpus=cpus, measured=speeds, work=work)

    result = make(Fleet.parse(gpus, gpu_memory, card), cpus, work)
    expected = estimate(make, result, posts, settings.pipeline.rows_per_group, price, request_price)
    facts = result.to_dict() | {"estimate": expected and expected.to_dict()}
    if not write_json(facts, json):
        print_plan(result, expected)
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
    working_dir: Annotated[Path, typer.Option(help="Checkout to upload and run.", file_okay=False)] = Path(),
    include: Annotated[
        list[str] | None, typer.Option(help="Another file or folder of the checkout to upload. Repeatable.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="`NAME=value` for the job, or `NAME` as it is here. Repeatable.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the log, and exit as the job does.")] = True,
) -> None:
    """Run a command as a job on a Ray cluster. With token authentication: `RAY_AUTH_MODE=token`, `RAY_AUTH_TOKEN=…`."""
    from gem_ray.cluster.submit import commands_for, follow_job, job_environment, submit_job

    runtime_env = job_environment(working_dir, include or (), env or ())
    submission_id = submit_job(job, arguments or (), address, runtime_env)
    typer.echo(submission_id)
    again = same_command(arguments or ())
    typer.echo(commands_for(submission_id, address, again), err=True)
    if wait:
        raise typer.Exit(follow_job(submission_id, address, again))


def _print_summary(summary: RunSummary, config: Config, output: str, as_json: bool) -> None:
    """What happened; the number of rejected rows is on the last line."""
    import json

    from gem_ray.redaction import redacted

    if as_json:
        typer.echo(json.dumps(redacted(summary.to_dict())))
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
        + (f"; {tally.accepted:,} accepted" if summary.accepted_share is not None else "")
    )
    if summary.account.annotated:
        typer.echo(_about_cost(summary.account))
    if sentence := _about_abstaining(summary, config):
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


def _about_cost(account: Account) -> str:
    """What all starts have taken, in a line."""
    unpriced = f" (not priced: {counted(account.unpriced_starts, 'start')})" if account.unpriced_starts else ""
    cost = "" if account.money is None else f", cost {account.money:,.2f}{unpriced}"
    starts = f"{account.starts} starts" if account.starts > 1 else "one start"
    pool = account.bottleneck
    busiest = f"; the busiest pool is {pool}, {account.pools[pool].busy_share:.0%} of its time" if pool else ""
    return f"in all: {account.seconds:,.0f} s in {starts}{cost}{busiest}"


def _about_abstaining(summary: RunSummary, config: Config) -> str | None:
    """What the embedded models have not done with images that they do not know, and the command that does it."""
    from gem_ray.model_paths import resolve
    from gem_ray.scope import Scope

    count, matcher = summary.tally.not_judged_with_image, config.grounder.matcher.model
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

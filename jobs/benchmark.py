"""What the system costs and gains: `python jobs/benchmark.py {throughput,tagger,memory,resume,…} --out DIR …`."""

from pathlib import Path
from typing import Annotated

import typer

from gem_ray.benchmarks.results import write_result

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)

OutOption = Annotated[Path, typer.Option(help="Folder for inputs, outputs and `NAME.json`.")]


@app.command()
def throughput(
    out: OutOption = Path("out/benchmark"),
    posts: Annotated[int, typer.Option(help="Generated posts.", min=16)] = 2000,
    plain_posts: Annotated[int, typer.Option(help="Of which the plain way is timed on so many.", min=1)] = 200,
    preset: Annotated[str, typer.Option(help="Models and placement.")] = "nano",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One key of the configuration.")] = None,
) -> None:
    """The pipeline against one process that takes one post and one entity at a time, and against its slowest stage."""
    from gem_ray.benchmarks.throughput import measure_throughput
    from gem_ray.config import load_config

    write_result(
        out, "throughput", measure_throughput(out, load_config(preset, overrides=set_ or ()), posts, plain_posts)
    )


@app.command()
def tagger(
    out: OutOption = Path("out/benchmark"),
    tweets: Annotated[
        Path | None, typer.Option(help="A Twitter10000 root: its dev split, not generated posts.")
    ] = None,
    posts: Annotated[int, typer.Option(help="At most so many.", min=16)] = 1024,
    rounds: Annotated[int, typer.Option(help="Pairs of measurements.", min=1)] = 4,
    preset: Annotated[str, typer.Option(help="Model and batch.")] = "nano",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One key of the configuration.")] = None,
) -> None:
    """Tagging in batches against tagging post by post, text alone."""
    from gem_ray.benchmarks.tagger import measure_tagger
    from gem_ray.config import load_config
    from gem_ray.data.generated import generate
    from gem_ray.data.twitter10000 import read_split

    texts = read_split(tweets, "dev")[:posts] if tweets else list(generate(posts, seed=7))
    write_result(out, "tagger", measure_tagger(load_config(preset, overrides=set_ or ()), texts, rounds))


@app.command()
def review(
    run: Annotated[str, typer.Argument(help="An output folder of `annotate`, over posts with gold.")],
    gold: Annotated[str, typer.Argument(help="The posts with gold: shards, or a Twitter10000 root for its dev split.")],
    out: OutOption = Path("out/benchmark"),
    audits: Annotated[int, typer.Option(help="Simulated audits of each kind.", min=50)] = 1000,
) -> None:
    """Whether certificates keep their promise, and how many posts they take, in simulated audits of a known run."""
    from gem_ray.data.twitter10000 import is_root
    from gem_ray.evaluation.predictions import read_gold
    from gem_ray.review.audits import measure_review

    write_result(out, "review", measure_review(read_gold(gold, "dev" if is_root(gold) else None), run, audits))


@app.command()
def confidence(
    tweets: Annotated[Path, typer.Option(help="A Twitter10000 root, for its dev split.")],
    out: OutOption = Path("out/benchmark"),
    posts: Annotated[int, typer.Option(help="Generated posts, for the reranker.", min=100)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the generated posts.")] = 30_000,
    preset: Annotated[str, typer.Option(help="Models.")] = "nano",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One key of the configuration.")] = None,
) -> None:
    """How far `confidence` can be trusted, by folds; and what a bad reranker can do."""
    from gem_ray.benchmarks.confidence import measure_confidence, write_plot
    from gem_ray.config import load_config
    from gem_ray.data.generated import generate
    from gem_ray.data.twitter10000 import read_split

    config = load_config(preset, overrides=set_ or ())
    result, plot = measure_confidence(config, read_split(tweets, "dev"), list(generate(posts, seed)))
    write_result(out, "confidence", result)
    write_plot(plot, out / "confidence.png")


@app.command()
def decoding(out: OutOption = Path("out/benchmark")) -> None:
    """Peak memory of the largest images that the limits admit, one at a time and 32 at once."""
    from gem_ray.benchmarks.decoding import measure_decoding

    write_result(out, "decoding", measure_decoding(out / "decoding"))


@app.command()
def plan(
    out: OutOption = Path("out/benchmark"),
    posts: Annotated[int, typer.Option(help="Generated posts.", min=100)] = 5000,
    seed: Annotated[int, typer.Option(help="Of the posts.")] = 11,
    preset: Annotated[str, typer.Option(help="Models and placement; without cards.")] = "nano",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One key of the configuration.")] = None,
) -> None:
    """What `gem-ray plan --probe` says of a run on this machine, against the run."""
    from gem_ray.benchmarks.plan import measure_plan
    from gem_ray.config import load_config

    write_result(out, "plan", measure_plan(out / "plan", load_config(preset, overrides=set_ or ()), posts, seed))


@app.command("planned-clusters")
def planned_clusters(
    out: OutOption = Path("out/benchmark"),
    only: Annotated[list[str] | None, typer.Option(help="One cluster, by name; may be repeated.")] = None,
    batches: Annotated[int, typer.Option(help="Of each actor, at the least.", min=4)] = 12,
    rate: Annotated[float, typer.Option(help="Batches a second that the machine can do beside them.", min=0.1)] = 1.0,
) -> None:
    """What `gem-ray plan` says of five GPU clusters, against runs on pretended ones."""
    from gem_ray.benchmarks.planned_clusters import CLUSTERS, measure_planned_clusters

    folder = out / "planned-clusters"
    write_result(out, "planned-clusters", measure_planned_clusters(folder, only or [*CLUSTERS], batches, rate))


@app.command("cpu-costs")
def cpu_costs(out: OutOption = Path("gem_ray/planning")) -> None:
    """What one core does for a post beside the models; `gem-ray plan` reads it where it is written by default."""
    from gem_ray.benchmarks.cpu_costs import measure_cpu_costs

    write_result(out, "cpu-costs", measure_cpu_costs())


@app.command("real-photos")
def real_photos(
    tweets: Annotated[Path, typer.Option(help="A Twitter10000 root: its dev split.")],
    out: OutOption = Path("out/benchmark"),
    preset: Annotated[str, typer.Option(help="Models.")] = "nano",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One key of the configuration.")] = None,
) -> None:
    """Dev tweets with a real photo each against the same without: what vision models that know no photos change."""
    from gem_ray.benchmarks.real_photos import compare_with_text_only
    from gem_ray.config import load_config
    from gem_ray.data.twitter10000 import read_split

    posts = read_split(tweets, "dev")
    write_result(out, "real-photos", compare_with_text_only(posts, load_config(preset, overrides=set_ or ())))


@app.command()
def reranker(
    out: OutOption = Path("out/benchmark"),
    entities: Annotated[int, typer.Option(help="Hard entities of generated posts.", min=10)] = 500,
    vllm: Annotated[bool, typer.Option(help="Also on vLLM.")] = True,
    preset: Annotated[str, typer.Option(help="Models, γ and K.")] = "nano",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One key of the configuration.")] = None,
) -> None:
    """The engines against one `generate` call for every entity: speed, and whether they say the same."""
    from gem_ray.benchmarks.reranker import measure_reranker_engines
    from gem_ray.config import load_config

    config = load_config(preset, overrides=set_ or ())
    write_result(out, "reranker", measure_reranker_engines(config, entities, with_vllm=vllm))


@app.command("reranker-gpu")
def reranker_gpu(
    out: OutOption = Path("out/benchmark"),
    tiny: Annotated[bool, typer.Option(help="A small model, to try it without a GPU.")] = False,
) -> None:
    """A LLaVA-1.5-7B with random weights through the transformers engine, against the card's limit."""
    from gem_ray.benchmarks.reranker_gpu import measure_reranker_gpu, table

    result = measure_reranker_gpu(tiny=tiny)
    write_result(out, "reranker-gpu", result)
    print(table(result))


@app.command()
def memory(
    out: OutOption = Path("out/benchmark"),
    rows: Annotated[list[int] | None, typer.Option(help="Length of an input. Repeatable.")] = None,
) -> None:
    """Peak memory of the driver over short and long inputs."""
    from gem_ray.benchmarks.memory import measure_memory

    write_result(out, "memory", measure_memory(out, tuple(rows or (20_000, 200_000))))


@app.command("scale-out")
def scale_out(
    out: OutOption = Path("out/benchmark"),
    gpus: Annotated[int, typer.Option(help="Pretended GPUs.", min=1)] = 16,
    batch_seconds: Annotated[float, typer.Option(help="Time that a GPU takes for a batch.", min=0)] = 8.0,
    groups: Annotated[int, typer.Option(help="Groups, published one after the other.", min=1)] = 3,
) -> None:
    """How busy the GPUs of a pretended cluster are, also at the borders of groups."""
    from gem_ray.benchmarks.scale_out import measure_scale_out

    write_result(out, f"scale-out-{gpus}", measure_scale_out(out / f"scale-out-{gpus}", gpus, batch_seconds, groups))


@app.command()
def resume(
    out: OutOption = Path("out/benchmark"),
    rows: Annotated[int, typer.Option(help="Posts of text.", min=1000)] = 50_000,
) -> None:
    """What it costs to be killed half-way and started again."""
    from gem_ray.benchmarks.resume import measure_resume

    write_result(out, "resume", measure_resume(out / "resume", rows))


@app.command()
def chaos(
    location: Annotated[str, typer.Argument(help="A folder, local or `s3://`, for posts and annotations.")],
    out: OutOption = Path("out/benchmark"),
    posts: Annotated[int, typer.Option(help="Generated posts.", min=100)] = 5000,
    shards: Annotated[int, typer.Option(help="Files that hold them.", min=1)] = 50,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One key of the configuration.")] = None,
) -> None:
    """A run whose driver, an actor and a node are killed, against an undisturbed one."""
    from gem_ray.benchmarks.chaos import measure_chaos

    write_result(out, "chaos", measure_chaos(location, posts, shards, tuple(set_ or ())))


@app.command()
def grounder(
    out: OutOption = Path("out/benchmark"),
    posts: Annotated[int, typer.Option(help="Posts with an image and three entities.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Pairs of measurements.", min=1)] = 2,
    sam: Annotated[bool, typer.Option(help="Also with SAM, end to end.")] = True,
) -> None:
    """Matching, tracing and SAM in batches against one entity at a time; models of the published base sizes."""
    from gem_ray.benchmarks.grounder import measure_grounder

    write_result(out, "grounder", measure_grounder(posts, rounds, sam))


@app.command("grounder-gpu")
def grounder_gpu(out: OutOption = Path("out/benchmark")) -> None:
    """Matcher and SAM of the paper's sizes on a GPU, random weights, over batch sizes."""
    from gem_ray.benchmarks.grounder_gpu import as_table, measure_grounder_gpu

    result = measure_grounder_gpu()
    write_result(out, "grounder-gpu", result)
    (out / "grounder-gpu.md").write_text(as_table(result))


@app.command("grounding")
def grounding(
    out: OutOption = Path("out/benchmark"),
    posts: Annotated[int, typer.Option(help="Generated posts.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Of the posts; the embedded models were trained on others.")] = 7,
    only: Annotated[list[str] | None, typer.Option(help="Just this variant. Repeatable.")] = None,
    preset: Annotated[str, typer.Option(help="Models.")] = "nano",
    set_: Annotated[list[str] | None, typer.Option("--set", help="One key of the configuration.")] = None,
) -> None:
    """What each choice of the grounder is worth on gold mentions, with a picture of the worst."""
    from gem_ray.benchmarks.grounding_table import as_table, measure_grounding
    from gem_ray.config import load_config

    results = measure_grounding(load_config(preset, overrides=set_ or ()), posts, seed, out, only or ())
    write_result(out, "grounding", results)
    (out / "grounding.md").write_text(as_table(results))


if __name__ == "__main__":
    app()

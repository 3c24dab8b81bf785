"""`gem-ray review`: posts that people check, what they corrected, and what it proves of the whole run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gem_ray.commands.options import SeedOption, refuse
from gem_ray.plurals import counted

app = typer.Typer(help="Have people check a sample of a run, and certify the whole.", no_args_is_help=True)


class DesignKind(StrEnum):
    """How posts are drawn."""

    UNIFORM = "uniform"
    STRATIFIED = "stratified"
    UNCERTAINTY = "uncertainty"


class Purpose(StrEnum):
    """What checked posts are for."""

    CERTIFICATE = "certificate"
    TRAINING = "training"


ReviewArgument = Annotated[Path, typer.Argument(help="A folder that `review sample` wrote.")]
ExportArgument = Annotated[
    Path, typer.Argument(help="Label Studio's export of its tasks, in the format JSON.", exists=True, dir_okay=False)
]


@app.command("sample", epilog="Example: `gem-ray review sample out/ review/ --posts 300 --images posts/`")
def sample(
    context: typer.Context,
    annotations: Annotated[str, typer.Argument(help="An output folder of `annotate`.")],
    out: Annotated[Path, typer.Argument(help="Folder for the tasks and for how they were drawn.")],
    posts: Annotated[int, typer.Option(help="Posts to check.", min=1)] = 300,
    for_: Annotated[
        Purpose, typer.Option("--for", help="`certificate`: a random sample. `training`: the posts that teach most.")
    ] = Purpose.CERTIFICATE,
    design: Annotated[
        DesignKind,
        typer.Option(
            help="`uncertainty`: uncertain posts more often; `stratified`: in proportion; `uniform`: all alike."
        ),
    ] = DesignKind.UNCERTAINTY,
    images: Annotated[
        str | None,
        typer.Option(
            help="The shards that were annotated, or a folder of images; without, checkers see none, and boxes are not "
            "certified."
        ),
    ] = None,
    after: Annotated[
        Path | None, typer.Option(help="Extend this review to --posts in all; only the new ones become tasks.")
    ] = None,
    without: Annotated[
        list[Path] | None, typer.Option(help="Leave out the posts of this review: a model learnt them. Repeatable.")
    ] = None,
    blind: Annotated[
        bool, typer.Option("--blind", help="Leave the predictions out of the tasks, to not bias the checkers.")
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """Choose posts to check, and write them as tasks for Label Studio with the predictions in them."""
    from gem_ray.config import ConfigError
    from gem_ray.review.sample import continue_sample, sample_for_certificate, sample_for_training

    if after and (without or blind or for_ is Purpose.TRAINING):
        raise ConfigError("--after continues a sample as it was drawn: no --without, --blind or --for training with it")
    if blind and for_ is Purpose.TRAINING:
        raise ConfigError("--blind is for certificates; --for training saves work by showing the predictions")
    if after:
        refuse(context, "design", "seed", because="says how a sample is drawn: --after continues one as it was drawn")
    if for_ is Purpose.TRAINING:
        refuse(context, "design", "seed", because="is for certificates: --for training takes the posts that teach most")
    if after:
        tally = continue_sample(annotations, out, posts, after, images)
    elif for_ is Purpose.TRAINING:
        tally = sample_for_training(annotations, out, posts, images=images, without=without or ())
    else:
        tally = sample_for_certificate(
            annotations, out, posts, kind=design.value, seed=seed, images=images, without=without or (), blind=blind
        )
    typer.echo(f"{out / 'tasks.json'}: {counted(tally.posts, 'task')}, {counted(tally.entities, 'entity', 'entities')}")
    for remark, count in tally.remarks.items():
        typer.echo(f"{remark}: {count:,}")
    typer.echo(f"import them into a Label Studio project with the labelling interface of {out / 'tasks-setup.xml'}")


@app.command("read", epilog="Example: `gem-ray review read review/ export.json corrections/ --images posts/`")
def read(
    review: ReviewArgument,
    export: ExportArgument,
    out: Annotated[str, typer.Argument(help="Folder for the shards.")],
    images: Annotated[
        str | None, typer.Option(help="The shards that were annotated: puts images into the new ones.")
    ] = None,
) -> None:
    """Convert checked posts to shards with gold, for `train`, `evaluate` and `calibrate`."""
    from gem_ray.review.corrections import read_corrections
    from gem_ray.review.folder import read_review
    from gem_ray.review.gold import write_gold

    sample_ = read_review(review)
    corrections = read_corrections(export, sample_)
    written = write_gold(sample_, corrections, out, images)
    mentions = sum(len(post.gold or ()) for post in corrections.posts.values())
    typer.echo(f"{out}: {counted(written, 'post')} with {counted(mentions, 'gold mention')}")
    for remark, count in corrections.remarks.items():
        typer.echo(f"{remark}: {count:,}")


@app.command(
    "certify", epilog="Example: `gem-ray review certify review/ export.json out/certificate --claim 'mner.f1>=0.6'`"
)
def certify(
    review: ReviewArgument,
    export: ExportArgument,
    out: Annotated[Path, typer.Argument(help="Folder for `certificate.html` and `certificate.json`.")],
    claim: Annotated[list[str] | None, typer.Option(help="Claim to test: `mner.f1>=0.65`. Repeatable.")] = None,
    width: Annotated[
        float | None,
        typer.Option(help="Estimate how many checks intervals of ± this need: `0.03`.", min=0.001, max=0.5),
    ] = None,
    iou: Annotated[float, typer.Option(help="IoU above which a box is right.", min=0, max=1)] = 0.5,
    against: Annotated[
        str | None, typer.Option(help="A second run over the same posts: what it changed, and whether it is better.")
    ] = None,
) -> None:
    """Certify precision, recall and F1 of the whole run, with 95 % intervals."""
    from gem_ray.review.certificate import Claim, write_certificate
    from gem_ray.review.certificate import certify as prove
    from gem_ray.review.corrections import read_corrections
    from gem_ray.review.folder import read_review
    from gem_ray.review.page import print_certificate

    claims = [Claim.parse(text) for text in claim or ()]
    sample_ = read_review(review)
    corrections = read_corrections(export, sample_)
    certificate = prove(sample_, corrections, claims=claims, width=width, iou=iou, against=against)
    write_certificate(certificate, out)
    print_certificate(certificate)
    typer.echo(f"certificate: {out / 'certificate.html'}, figures: {out / 'certificate.json'}")

"""`gem-ray shards`: Parquet shards out of other formats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gem_ray.commands.options import (
    EXIT_REJECTED,
    MapOption,
    PerShardOption,
    SeedOption,
    UnseenNamesOption,
    parse_columns,
)
from gem_ray.plurals import counted
from gem_ray.taxonomy import LabelSetName

if TYPE_CHECKING:
    from gem_ray.records import Post

_SHOWN_REASONS = 5
_SHOWN_CHARACTERS = 200  # of what stands for an image: an image in base64 is no path either

OutArgument = Annotated[str, typer.Argument(help="Folder for the shards.")]
EmbedOption = Annotated[bool, typer.Option(help="Put images beside the file into the shards.")]

app = typer.Typer(help="Convert other formats to Parquet shards.", no_args_is_help=True)


@app.command("twitter10000", epilog="Example: `gem-ray shards twitter10000 data/twitter10000 posts/ --split dev`")
def shards_twitter10000(
    root: Annotated[Path, typer.Argument(help="The folder with `txt`, `txt_fine`, `xml` and `knowledge`.")],
    out: OutArgument,
    split: Annotated[str, typer.Option(help="`train` or `dev`.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images, named by image id.")] = None,
    labels: Annotated[LabelSetName, typer.Option(help="Which annotations become the gold column.")] = "fmnerg",
    knowledge: Annotated[bool, typer.Option(help="Keep the caption and knowledge columns.")] = True,
    per_shard: PerShardOption = 1000,
) -> None:
    """The GMNER / FMNERG data set, with gold."""
    from dataclasses import replace

    from gem_ray.data.convert import embedded
    from gem_ray.data.twitter10000 import read_split
    from gem_ray.taxonomy import LABEL_SETS

    posts = read_split(root, split, LABEL_SETS[labels], images)
    if not knowledge:
        posts = [replace(post, caption=None, knowledge=None) for post in posts]
    _write_shards(embedded(posts, images) if images else posts, out, per_shard)


@app.command("generated", epilog="Example: `gem-ray shards generated posts/ --posts 1000 --seed 7`")
def shards_generated(
    out: OutArgument,
    posts: Annotated[int, typer.Option(help="How many posts.", min=1)] = 200,
    seed: SeedOption = 7,
    per_shard: PerShardOption = 1000,
    unseen_names: UnseenNamesOption = 0.0,
) -> None:
    """Posts about invented entities, with images and gold."""
    from gem_ray.data.generated import generate

    _write_shards(generate(posts, seed, unseen_names), out, per_shard)


@app.command("jsonl", epilog="Example: `gem-ray shards jsonl posts.jsonl posts/`")
def shards_jsonl(
    file: Annotated[Path, typer.Argument(help="One object a line: post_id, text, image or image_uri, …", exists=True)],
    out: OutArgument,
    embed_images: EmbedOption = True,
    map_: MapOption = None,
    per_shard: PerShardOption = 1000,
) -> None:
    """JSON lines, or one JSON array; also compressed."""
    from gem_ray.data.convert import from_jsonl

    _write_shards(from_jsonl(file, embed_images, parse_columns(map_)), out, per_shard)


@app.command("csv", epilog="Example: `gem-ray shards csv posts.csv posts/`")
def shards_csv(
    file: Annotated[Path, typer.Argument(help="With a header: post_id, text, image_uri, …", exists=True)],
    out: OutArgument,
    embed_images: EmbedOption = True,
    map_: MapOption = None,
    quotes: Annotated[bool, typer.Option(help='Treat `"` as the quote character.')] = True,
    escape: Annotated[
        str | None, typer.Option(help="Character before which others have no meaning: pandas' `escapechar`.")
    ] = None,
    per_shard: PerShardOption = 1000,
) -> None:
    """Values separated by commas, semicolons, tabs or `|`; also compressed."""
    from gem_ray.data.convert import CSV_MARKS, from_csv

    if escape is not None and (len(escape) != 1 or escape in CSV_MARKS):
        raise typer.BadParameter(f"{escape!r} is not one character, or it separates or encloses cells")
    _write_shards(from_csv(file, embed_images, parse_columns(map_), quotes, escape), out, per_shard)


@app.command("folder", epilog="Example: `gem-ray shards folder pictures/ posts/`")
def shards_folder(
    folder: Annotated[
        Path, typer.Argument(help="Images, and a text file of the same name beside each.", exists=True, file_okay=False)
    ],
    out: OutArgument,
    per_shard: PerShardOption = 1000,
) -> None:
    """A folder of images with their texts."""
    from gem_ray.data.convert import from_folder

    left_out: list[str] = []
    _write_shards(from_folder(folder, left_out), out, per_shard, left_out)


@app.command("parquet", epilog="Example: `gem-ray shards parquet tweets/ posts/ --map post_id=id,text=tweet`")
@app.command("webdataset", epilog="Example: `gem-ray shards webdataset tars/ posts/`")
def shards_again(
    path: Annotated[str, typer.Argument(help="A Parquet file or a tar, or a folder of them.")],
    out: OutArgument,
    map_: MapOption = None,
    per_shard: PerShardOption = 1000,
) -> None:
    """Rewrite shards: to another size, with renamed columns, and with Parquet's footers."""
    from gem_ray.data.shards import read_posts

    _write_shards(read_posts(path, columns=parse_columns(map_)), out, per_shard)


def _write_shards(posts: Iterable[Post], out: str, per_shard: int, left_out: Sequence[str] = ()) -> None:
    """Write the posts and say what is wrong with them; exit code 3 if some will be rejected.

    `left_out` is read once all posts are written: files that belong to none.
    """
    from gem_ray.data.shards import write_posts

    wrong: list[str] = []
    rejected: list[str] = []
    typer.echo(f"posts in {out}: {write_posts(_noting(posts, wrong, rejected), out, per_shard):,}")
    if left_out:
        more = ", …" if len(left_out) > _SHOWN_REASONS else ""
        names = ", ".join(left_out[:_SHOWN_REASONS])
        typer.secho(f"neither image nor text, hidden, or links to folders: {len(left_out)} ({names}{more})", err=True)
    for reason in wrong[:_SHOWN_REASONS]:
        typer.secho(reason, fg="yellow", err=True)
    if wrong:
        count = f"{counted(len(wrong), 'post')} with a problem; {len(rejected):,} cannot be annotated"
        typer.secho(count, fg="yellow", err=True)
    if rejected:
        raise typer.Exit(EXIT_REJECTED)


def _problem(post: Post) -> str | None:
    """The first thing that is wrong with a post, its image's header included."""
    from gem_ray.config import ImageConfig
    from gem_ray.data.images import ImageError, image_suffix

    if post.problems:
        return post.problems[0].message
    if post.image_uri is not None and "://" not in post.image_uri:
        return f"there is no image at {post.image_uri[:_SHOWN_CHARACTERS]} that can be read"
    try:
        if post.image_bytes is not None:
            image_suffix(post.image_bytes, ImageConfig())
    except ImageError as error:
        return str(error)
    return None


def _noting(posts: Iterable[Post], wrong: list[str], rejected: list[str]) -> Iterator[Post]:
    """The same posts; what is wrong with one is noted, since a shard has no place for the reason."""
    for post in posts:
        if reason := _problem(post):
            wrong.append(f"{post.post_id}: {reason}")
        if post.is_rejected:
            rejected.append(post.post_id)
        yield post

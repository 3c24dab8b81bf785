"""Reading what is compared: the output of `annotate`, and gold from shards or from a Twitter10000 root."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from PIL import Image
from pyarrow import fs

from gem_ray.config import ImageConfig
from gem_ray.data import shards, twitter10000
from gem_ray.data.fetch import Fetcher, ImageError
from gem_ray.data.formats import IMAGE_SUFFIXES
from gem_ray.data.listing import find_shards, list_shards
from gem_ray.data.output import (
    ANNOTATIONS,
    RUN_FACTS,
    RUNS,
    SUCCESS,
    InputOfRun,
    annotation_paths,
    input_of_run,
    live_run,
)
from gem_ray.data.storage import Storage, open_storage
from gem_ray.evaluation.joins import id_by_row, is_named_by_row, matched, with_distinct_ids
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.records import ANNOTATION_SCHEMA, SCHEMA_VERSION, SCHEMA_VERSION_KEY, Post, model_rows
from gem_ray.taxonomy import FMNERG, LabelSet

_COLUMNS = [name for name in ANNOTATION_SCHEMA.names if name not in ("status", "run_id", "models")]
_ROWS_PER_BATCH = 1024
_REQUIRED = ("post_id", "text", "entities")


def read_predictions(path: Path | str) -> list[Post]:
    """The annotated posts of a run, in the order of its files.

    Args:
        path: an output directory of `annotate`, or its `annotations` folder; local or `s3://`.

    Raises:
        FileNotFoundError: there are no annotations at `path`.
        EvaluationError: there are Parquet files, but they are not annotations.
    """
    return list(iterate_predictions(path))


def iterate_predictions(path: Path | str) -> Iterator[Post]:
    """`read_predictions`, a batch of rows in memory at a time."""
    return map(Post.from_annotation, iterate_rows(path, _COLUMNS))


def iterate_rows(
    path: Path | str, columns: Sequence[str] = ANNOTATION_SCHEMA.names, row_ids: Collection[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Annotations as plain values that `Post.from_annotation` reads, a batch of rows in memory at a time.

    Args:
        path: as for `read_predictions`; also one Parquet file of it.
        columns: of the output row; those that the files do not have are left out.
        row_ids: only these rows; all if None.

    Raises:
        FileNotFoundError, EvaluationError: as `read_predictions`.
    """
    for batch in iterate_batches(path, columns, row_ids):
        yield from map(_second_edition, batch.to_pylist())


def iterate_batches(
    path: Path | str, columns: Sequence[str], row_ids: Collection[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """Annotations as Arrow's columns, a batch of rows in memory at a time; the arguments are those of `iterate_rows`.

    Raises:
        FileNotFoundError, EvaluationError: as `read_predictions`.
    """
    dataset = _open_annotations(path)
    there = [name for name in columns if name in dataset.schema.names]
    wanted = None if row_ids is None else ds.field("row_id").isin(pa.array(sorted(row_ids), pa.int64()))
    for file in dataset.get_fragments():
        yield from file.to_batches(columns=there, filter=wanted, batch_size=_ROWS_PER_BATCH)


def count_rows(path: Path | str) -> int:
    """How many rows `iterate_rows` gives, from the files' footers.

    Raises:
        FileNotFoundError, EvaluationError: as `read_predictions`.
    """
    return _open_annotations(path).count_rows()


def read_gold(
    path: Path | str, split: str | None = None, labels: LabelSet = FMNERG, annotations: Path | str | None = None
) -> list[Post]:
    """A gold split, without its images but with their sizes where they are known.

    Args:
        path: a Twitter10000 root (see `twitter10000.is_root`), or shards with a `gold` column.
        split: which split of a Twitter10000 root.
        labels: which of Twitter10000's two annotations.
        annotations: as for `read_inputs`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        EvaluationError: a root without `split`, shards with one, or shards without gold.
    """
    if twitter10000.is_root(path):
        if split is None:
            raise EvaluationError(f"{path} is a Twitter10000 root: say which split, as --split dev")
        return with_distinct_ids(twitter10000.read_split(Path(path), split, labels=labels))
    posts = with_distinct_ids(read_inputs(path, annotations))
    if split is not None:
        raise EvaluationError(
            f"{path} is no Twitter10000 root: --split means nothing there; give the folder of the split"
        )
    if not any(post.gold is not None for post in posts):
        raise EvaluationError(f"{path} has no gold: its rows need a `gold` column, as `gem-ray shards` writes it")
    return posts


def read_predictions_of(gold: Sequence[Post], path: Path | str) -> list[Post]:
    """What was predicted for a gold split, with the ids that it has; see `read_predictions`.

    Args:
        gold: as `read_gold` gives it.
        path: as for `read_predictions`.

    Raises:
        FileNotFoundError: there are no annotations at `path`.
        EvaluationError: they are of none of its posts, or nobody can tell of which; or as `read_predictions`.
    """
    annotated = list(matched(iterate_predictions(path), gold))
    if {post.post_id for post in gold}.isdisjoint(post.post_id for post in annotated):
        raise EvaluationError(f"{path} annotates no post of the gold split: no `post_id` is in both")
    return annotated


def check_same_rows(gold: Sequence[Post], annotations: Path | str, others: Path | str) -> None:
    """Refuse two outputs whose rows cannot be told to be the same, where ids alone do not tell either.

    Raises:
        EvaluationError: ids stand twice in `gold`, and the two runs have numbered the files differently.
    """
    first, second = _input_of(annotations), _input_of(others)
    if first and second and first.names != second.names and any(map(is_named_by_row, gold)):
        raise EvaluationError(
            f"ids stand twice, and the files of {annotations} and {others} are numbered differently, as --update "
            "does: evaluate them one by one"
        )


def read_inputs(path: Path | str, annotations: Path | str | None = None) -> Iterator[Post]:
    """The posts of shards, without their images but with their sizes; none for a folder of images.

    Args:
        path: the shards.
        annotations: of them, as for `read_predictions`; posts have the rows and columns that their run has read.

    Raises:
        FileNotFoundError, ValueError: the shards cannot be read.
    """
    if not _image_files(Path(path)):
        yield from map(_without_image, shards.read_numbered_posts(path, _input_of(annotations)))


def read_images(
    path: Path | str, config: ImageConfig, ids: Collection[str], annotations: Path | str | None = None
) -> Iterator[tuple[str, bytes]]:
    """Post id and encoded image, one at a time; images that may not or cannot be fetched are left out.

    Args:
        path: the shards that were annotated, or a local folder of images named by post id.
        config: where the shards' `image_uri` may lead.
        ids: of the posts whose images are read; see `joins` for those that stand twice.
        annotations: as for `read_inputs`.

    Raises:
        FileNotFoundError: neither shards nor images are at `path`.
    """
    fetcher = Fetcher(config)
    for post_id, row_id, image in iterate_images(path, annotations):
        by_row = id_by_row(post_id, row_id)
        if by_row in ids or post_id in ids:
            with suppress(ImageError):
                data = fetcher.fetch(image) if isinstance(image, str) else image
                yield by_row if by_row in ids else post_id, data


def iterate_images(
    path: Path | str, annotations: Path | str | None = None
) -> Iterator[tuple[str, int | None, bytes | str]]:
    """Post id, row id and image of the posts that have one; images of a folder have no row.

    The image is as it is there: encoded, or the `image_uri`, which is not followed.

    Args:
        path: as for `read_images`.
        annotations: as for `read_inputs`.

    Raises:
        FileNotFoundError: neither shards nor images are at `path`.
    """
    files = _image_files(Path(path))
    if files:
        yield from ((file.stem, None, file.read_bytes()) for file in files)
        return
    for post in shards.read_numbered_posts(path, _input_of(annotations)):
        image = post.image_bytes or post.image_uri
        if image:
            yield post.post_id, post.row_id, image


def read_run(path: Path | str) -> dict[str, Any]:
    """The facts that `annotate` wrote beside its annotations; empty if there are none.

    Those of a run that has not finished yet are what it began with: `run_id`, `input`, `models` and `config`.

    Args:
        path: an output directory of `annotate`, or its `annotations` folder; local or `s3://`.
    """
    for storage in _outputs(str(path)):
        facts, run_id = storage.read_json(RUN_FACTS) or {}, live_run(storage)
        if run_id is not None and facts.get("run_id") != run_id:
            manifest = storage.read_json(f"{RUNS}/{run_id}/manifest.json") or {}
            facts = {name: manifest[name] for name in ("run_id", "input", "models", "config") if name in manifest}
        if facts:
            return facts
    return {}


def is_unfinished(path: Path | str) -> bool:
    """Whether the run whose annotations are at `path` has not published all its rows."""
    return any(live_run(storage) is not None and not storage.exists(SUCCESS) for storage in _outputs(str(path)))


def _image_files(folder: Path) -> list[Path]:
    """Of a folder of images; none of one with shards, where a picture may lie beside them."""
    if not folder.is_dir():
        return []
    images = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    try:
        return [] if images and find_shards(folder) else images
    except FileNotFoundError:
        return images


def _open_annotations(path: Path | str) -> ds.Dataset:
    dataset = _open(str(path))
    missing = [name for name in _REQUIRED if name not in dataset.schema.names]
    if missing:
        raise EvaluationError(
            f"{path} does not hold annotations: its Parquet files have no column {', '.join(missing)}"
        )
    version = int((dataset.schema.metadata or {}).get(SCHEMA_VERSION_KEY, 1))
    if version > SCHEMA_VERSION:
        raise EvaluationError(
            f"{path} was written by a later gem-ray: its rows are of edition {version}, and this one reads up to "
            f"{SCHEMA_VERSION}; update gem-ray"
        )
    return dataset


def _second_edition(row: dict[str, Any]) -> dict[str, Any]:
    """A row of edition 1, whose `models` were a map and whose entities did not say `seen`, as one of edition 2.

    Recognized by its shape: tools that rewrite Parquet files drop the metadata.
    """
    models = row.get("models")
    if models and isinstance(models[0], tuple):
        row["models"] = model_rows(dict(models))
    for entity in row.get("entities") or ():
        if "seen" not in entity:
            judged = entity.get("match_score") is not None
            entity |= {"seen": entity.get("box") is not None if judged else None, "confidence": None}
    return row


def _open(path: str) -> ds.Dataset:
    filesystem, paths = _published(path) or _found(path)
    try:
        return ds.dataset(paths, filesystem=filesystem, format="parquet")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise EvaluationError(f"{path} cannot be read as annotations: {error}") from error


def _published(path: str) -> tuple[fs.FileSystem, list[str]] | None:
    """The files that a run has published; None if no run says."""
    for storage in _outputs(path):
        if paths := annotation_paths(storage):
            return storage.filesystem, paths
    return None


def _input_of(annotations: Path | str | None) -> InputOfRun | None:
    found = map(input_of_run, _outputs(str(annotations)) if annotations is not None else ())
    return next((run for run in found if run is not None), None)


def _outputs(path: str) -> Iterator[Storage]:
    """Where a run may have written: a folder itself, or the one whose `annotations` it is."""
    folder = path.rstrip("/")
    for output in (folder, folder.removesuffix(f"/{ANNOTATIONS}")):
        storage = open_storage(output)
        if storage.filesystem.get_file_info(storage.root).is_file:
            return
        yield storage


def _found(path: str) -> tuple[fs.FileSystem, list[str]]:
    for folder in (f"{path.rstrip('/')}/{ANNOTATIONS}", path):
        try:
            listing = list_shards(folder)
        except FileNotFoundError:
            continue
        return listing.filesystem, listing.paths
    raise FileNotFoundError(f"there are no annotations at {path}: give an output directory of `gem-ray annotate`")


def _without_image(post: Post) -> Post:
    """Drop the encoded image; its header gives the size, of which only the area is used (so rotation is no matter)."""
    if post.image_bytes is not None and post.image_width is None:
        # An image that cannot be read, for whatever reason, has no size; the post's gold still counts.
        with suppress(Exception), Image.open(io.BytesIO(post.image_bytes)) as image:
            post.image_width, post.image_height = image.size
    post.image_bytes = None
    return post

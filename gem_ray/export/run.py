"""From a run's annotations to a file of another tool: a row at a time, and whole or not at all."""

from __future__ import annotations

from pathlib import Path

from gem_ray.config import ConfigError
from gem_ray.data.files import whole_text
from gem_ray.evaluation.predictions import count_rows, is_unfinished, iterate_images, iterate_rows, read_run
from gem_ray.export.coco import write_coco
from gem_ray.export.conll import write_conll
from gem_ray.export.images import ImageReferences
from gem_ray.export.jsonl import write_jsonl
from gem_ray.export.label_studio import labelling_setup, write_label_studio
from gem_ray.export.writing import ExportTally
from gem_ray.pipeline.progress import OnReading, reader, reporting
from gem_ray.taxonomy import FMNERG, LABEL_SETS, LabelSet

_OF_IMAGES = ("coco", "label-studio")


def export_annotations(
    annotations: str,
    out: Path,
    form: str,
    *,
    images: str | None = None,
    labels: LabelSet | None = None,
    report: OnReading | None = None,
) -> ExportTally:
    """Write the annotations in another format; for Label Studio also its setup, as `STEM-setup.xml` beside `out`.

    Args:
        annotations: what `iterate_rows` takes.
        out: the file to write, in a folder that is made if it is not there.
        form: `coco`, `jsonl`, `conll` or `label-studio`.
        images: the shards that were annotated, or a folder of images named by post id: where the images are.
            Those that are in the shards become files in the folder `images` beside `out`.
        labels: the categories; by default what the run says it has, else FMNERG.
        report: told of the progress; by default a bar is shown at a terminal.

    Raises:
        ConfigError: images are given for a format without any.
        FileExistsError: `out` is there already.
        FileNotFoundError: nothing is at `annotations` or `images`.
        ValueError: what is there are no annotations, or not with these categories.
    """
    if images and form not in _OF_IMAGES:
        raise ConfigError(f"--images is for {' and '.join(_OF_IMAGES)}: there are none in {form}")
    setup = out.with_name(f"{out.stem}-setup.xml") if form == "label-studio" else None
    for path in filter(None, (out, setup)):
        if path.exists():
            raise FileExistsError(f"{path} exists already; write to another file or remove it first")
    labels = labels or LABEL_SETS[read_run(annotations).get("config", {}).get("labels", FMNERG.name)]
    tally = ExportTally()
    unfinished = is_unfinished(annotations)
    total, rows = count_rows(annotations), iterate_rows(annotations)
    references = ImageReferences(iterate_images(images, annotations), out.parent) if images else None
    with reporting(report, reader(lambda: tally.posts, total), title="exporting"), whole_text(out) as file:
        match form:
            case "coco":
                write_coco(rows, file, tally, labels, references)
            case "jsonl":
                write_jsonl(rows, file, tally)
            case "conll":
                write_conll(rows, file, tally)
            case "label-studio":
                write_label_studio(rows, file, tally, references)
    if setup:
        with whole_text(setup) as file:
            file.write(labelling_setup(labels))
    if unfinished:
        tally.remarks["posts so far of a run that is not finished"] = tally.posts
    return tally

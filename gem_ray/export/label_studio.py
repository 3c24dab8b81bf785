"""Label Studio: tasks with predictions to import (labelstud.io/guide/predictions), and the setup of their project."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TextIO
from urllib.parse import quote

from gem_ray.export.images import ImageReferences
from gem_ray.export.writing import ExportTally, JsonArray
from gem_ray.records import Box, Entity, Post
from gem_ray.taxonomy import LabelSet

# Names of the setup's tags, which regions refer to.
TEXT, IMAGE, ENTITY, BOX = "text", "image", "entity", "box"

_LOCAL_FILES = "/data/local-files/?d="  # where Label Studio serves files of its document root
_SEEN = {True: "seen in the image", False: "not seen in the image", None: "not judged against the image"}
_ADDRESS = re.compile(r"(https?|s3|gs)://", re.IGNORECASE)


def write_label_studio(
    rows: Iterable[dict[str, Any]], file: TextIO, tally: ExportTally, references: ImageReferences | None
) -> None:
    """Write a task for each row: text, image, and as a prediction of the run the spans, and the boxes related to them.

    Label Studio counts characters as Python does, by code points, and shows HTML escapes as they are.

    Args:
        rows: annotations, as `iterate_rows` gives them.
        file: UTF-8 text.
        tally: counts on.
        references: where the images are; without, `data.image` is empty.
    """
    tasks = JsonArray(file)
    for row in rows:
        post = without_nul(Post.from_annotation(row))
        image = _address(references.find(post)) if references else ""
        result = [part for number, entity in enumerate(post.entities) for part in _parts(post, entity, number)]
        tasks.append(_task(post, image, row.get("run_id"), result))
        tally.posts += 1
        tally.entities += len(post.entities)
        tally.boxes += sum(part["type"] == "rectanglelabels" for part in result)
        if not image:
            tally.remarks["posts without an image"] += 1
    tasks.close()
    file.write("\n")


def labelling_setup(labels: LabelSet) -> str:
    """The XML that a project needs for these tasks, with every category for spans and for boxes."""
    choices = "\n".join(f'    <Label value="{fine}"/>' for fine in labels.fine)
    return f"""<View>
  <Image name="{IMAGE}" value="${IMAGE}"/>
  <RectangleLabels name="{BOX}" toName="{IMAGE}">
{choices}
  </RectangleLabels>
  <Text name="{TEXT}" value="${TEXT}"/>
  <Labels name="{ENTITY}" toName="{TEXT}">
{choices}
  </Labels>
</View>
"""


def without_nul(post: Post) -> Post:
    """Label Studio's database takes no U+0000; another character in its place keeps the offsets."""
    entities = [replace(entity, text=_replaced(entity.text)) for entity in post.entities]
    return replace(post, post_id=_replaced(post.post_id), text=_replaced(post.text), entities=entities)


def _replaced(text: str) -> str:
    return text.replace("\0", "\ufffd")


def _task(post: Post, image: str, run_id: str | None, result: list[dict[str, Any]]) -> dict[str, Any]:
    # The score is that of the least certain mention: tasks are sorted by it.
    score = min((entity.certainty for entity in post.entities), default=None)
    prediction = {"model_version": run_id, "score": score, "result": result}
    return {
        "data": {TEXT: post.text, IMAGE: image, "post_id": post.post_id, "status": post.status, "row_id": post.row_id},
        "predictions": [] if post.is_rejected else [prediction],
    }


def _address(reference: str | None) -> str:
    """A path is one below the document root."""
    if reference is None or _ADDRESS.match(reference):
        return reference or ""
    return _LOCAL_FILES + quote(reference)


def _parts(post: Post, entity: Entity, number: int) -> list[dict[str, Any]]:
    span_id, box_id = f"{ENTITY}-{number}", f"{BOX}-{number}"
    span = _region(span_id, entity.certainty, ENTITY, TEXT, "labels", entity.fine)
    span["value"] |= {"start": entity.start, "end": entity.end, "text": entity.text}
    span["meta"] = {"text": [_SEEN[entity.seen]]}
    if not (entity.box and post.image_width and post.image_height):
        return [span]
    box = _region(box_id, entity.box_score, BOX, IMAGE, "rectanglelabels", entity.fine)
    box["value"] |= _percent(entity.box, post.image_width, post.image_height)
    box |= {"original_width": post.image_width, "original_height": post.image_height, "image_rotation": 0}
    return [span, box, {"type": "relation", "from_id": span_id, "to_id": box_id, "direction": "right"}]


def _region(name: str, score: float | None, control: str, of: str, kind: str, fine: str) -> dict[str, Any]:
    return {
        "id": name,
        "from_name": control,
        "to_name": of,
        "type": kind,
        "score": score,
        "value": {kind: [fine]},
    }


def _percent(box: Box, width: int, height: int) -> dict[str, float]:
    return {
        "x": 100 * box.x1 / width,
        "y": 100 * box.y1 / height,
        "width": 100 * (box.x2 - box.x1) / width,
        "height": 100 * (box.y2 - box.y1) / height,
        "rotation": 0,
    }

"""COCO object detection (cocodataset.org/#format-data): images, boxes and categories in one JSON file."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO

from gem_ray.export.images import ImageReferences
from gem_ray.export.writing import ExportTally, JsonArray, to_json
from gem_ray.records import Box, Entity, Post
from gem_ray.taxonomy import LabelSet


def write_coco(
    rows: Iterable[dict[str, Any]],
    file: TextIO,
    tally: ExportTally,
    labels: LabelSet,
    references: ImageReferences | None,
) -> None:
    """Write images as they come, and what is seen in them after the last one.

    Args:
        rows: annotations, as `iterate_rows` gives them.
        file: UTF-8 text on this machine; boxes wait beside it until their turn comes.
        tally: counts on.
        labels: the categories; their ids count from 1 in this order.
        references: names of the image files; without, they are named by the posts.

    Raises:
        ValueError: a box has a category that is not one of `labels`.
    """
    ids = {fine: number for number, fine in enumerate(labels.fine, start=1)}
    categories = [{"id": ids[fine], "name": fine, "supercategory": labels.parent[fine]} for fine in labels.fine]
    file.write(f'{{"info": {{"description": "gem-ray"}}, "licenses": [], "categories": {to_json(categories)},\n')
    file.write('"images": ')
    with TemporaryFile("w+", encoding="utf-8", dir=Path(file.name).parent) as waiting:
        images, annotations = JsonArray(file), JsonArray(waiting)
        for post in map(Post.from_annotation, rows):
            tally.posts += 1
            if not (post.image_width and post.image_height):
                tally.remarks["posts left out, because the size of their image is not known"] += 1
                continue
            reference = references.find(post) if references else None
            if references and not reference:
                tally.remarks["posts whose image was not found, and is named by their id"] += 1
            image_id = tally.posts
            images.append(_image(post, image_id, reference or _file_name(post.post_id)))
            if any(entity.seen is None for entity in post.entities):
                tally.remarks["images with entities that were not judged (`not_judged`): they may show more"] += 1
            for entity in post.entities:
                if entity.box:
                    tally.boxes += 1
                    annotations.append(_annotation(entity, entity.box, tally.boxes, image_id, ids))
        tally.entities = tally.boxes
        images.close()
        annotations.close()
        file.write(',\n"annotations": ')
        waiting.seek(0)
        shutil.copyfileobj(waiting, file)
    file.write("}\n")


def _image(post: Post, image_id: int, name: str) -> dict[str, Any]:
    return {
        "id": image_id,
        "file_name": name,
        "width": post.image_width,
        "height": post.image_height,
        "post_id": post.post_id,
        # What is in the text and has no box: looked for and not found, and not looked for.
        "not_seen": sum(entity.seen is False for entity in post.entities),
        "not_judged": sum(entity.seen is None for entity in post.entities),
    }


def _file_name(post_id: str) -> str:
    """A post's id as a path that stays in its folder: readers join it to one."""
    name = post_id.replace("\\", "/").replace("\0", "")
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _annotation(entity: Entity, box: Box, number: int, image_id: int, ids: Mapping[str, int]) -> dict[str, Any]:
    if entity.fine not in ids:
        raise ValueError(f"{entity.fine!r} is not a category of this label set; say which one it is, with --labels")
    return {
        "id": number,
        "image_id": image_id,
        "category_id": ids[entity.fine],
        "bbox": [box.x1, box.y1, box.x2 - box.x1, box.y2 - box.y1],
        "area": box.area,
        "segmentation": [],  # readers take the field for granted
        "iscrowd": 0,
        "score": entity.score,
        "confidence": entity.confidence,
        "accepted": entity.accepted,
        "box_score": entity.box_score,
        "box_confidence": entity.box_confidence,
        "text": entity.text,
        "start": entity.start,
        "end": entity.end,
    }

"""Reader of the Twitter10000 annotations (GMNER, FMNERG): real tweets with gold entities and boxes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from gem_ray.data.formats import IMAGE_SUFFIXES
from gem_ray.records import Box, GoldEntity, Post
from gem_ray.taxonomy import FMNERG, LabelSet, decode_bio

# Label set -> the folder of its BIO files; the last column is the finest level.
_FOLDERS = {"fmnerg": "txt_fine", "gmner": "txt"}


def is_root(path: Path | str) -> bool:
    """Whether a folder is laid out as a Twitter10000 root, and not one of shards."""
    return any((Path(path) / folder).is_dir() for folder in _FOLDERS.values())


def read_split(root: Path, split: str, labels: LabelSet = FMNERG, images: Path | None = None) -> list[Post]:
    """Posts of a split, with tokens, caption, knowledge and gold.

    The text is the tokens joined by single spaces. `image_uri` is the image's name in `images`, where it is there
    (`convert.embedded` puts the bytes in its place); the image's size is the one that the box file tells.

    Args:
        root: the folder that holds `txt`, `txt_fine`, `xml` and `knowledge`.
        split: `train` or `dev`.
        labels: `FMNERG` or `GMNER`.
        images: folder of the images, named by image id.

    Raises:
        FileNotFoundError: no such root or split.
        ValueError: a line, a tag or a box file that cannot be read; the message names it.
    """
    file = Path(root) / _FOLDERS[labels.name] / f"{split}.txt"
    if not file.is_file():
        raise FileNotFoundError(f"there is no split {split!r} of Twitter10000 at {file}")
    auxiliary = _read_knowledge(Path(root) / "knowledge" / f"{split}.jsonl")
    names = _image_names(images)
    posts = []
    for image_id, tokens, tags in _read_bio(file, labels):
        regions = _read_boxes(Path(root) / "xml" / f"{image_id}.xml")
        caption, knowledge = auxiliary.get(image_id, (None, None))
        posts.append(
            Post(
                post_id=image_id,
                text=" ".join(tokens),
                tokens=tokens,
                caption=caption,
                knowledge=knowledge,
                image_width=regions.width,
                image_height=regions.height,
                image_uri=names.get(image_id),
                gold=_gold(tokens, tags, regions),
            )
        )
    return posts


@dataclass
class _Regions:
    """A box file: the image's size, and boxes by the text of their entity."""

    width: int | None = None
    height: int | None = None
    boxes: defaultdict[str, list[Box]] = field(default_factory=lambda: defaultdict(list))


class _NoDoctype(ElementTree.TreeBuilder):
    """A document type could define entities that grow without end, or read files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type, which box files have not")


def _gold(tokens: list[str], tags: list[str], regions: _Regions) -> list[GoldEntity]:
    return [
        GoldEntity(start, end, fine, tuple(regions.boxes.get(" ".join(tokens[start:end]), ())))
        for start, end, fine in decode_bio(tags)
    ]


def _read_bio(file: Path, labels: LabelSet) -> Iterator[tuple[str, list[str], list[str]]]:
    """Image id, tokens and finest tags of each post."""
    known = set(labels.fine_tags)
    for block in file.read_text(encoding="utf-8").split("\n\n"):
        header, *lines = block.strip("\n").split("\n")
        if not header:
            continue
        image_id = header.removeprefix("IMGID:")
        # The id becomes a file name.
        if image_id == header or Path(image_id).name != image_id:
            raise ValueError(f"{file}: {header[:80]!r} is not IMGID:<id>")
        columns = [line.split("\t") for line in lines]
        for cells in columns:
            if len(cells) < 2 or cells[-1] not in known:
                raise ValueError(f"{file}: post {image_id}: {cells} does not end in a {labels.name} tag")
        yield image_id, [cells[0] for cells in columns], [cells[-1] for cells in columns]


def _read_boxes(file: Path) -> _Regions:
    """LabelImg's VOC, 1-based and inclusive; no file: nothing is seen."""
    regions = _Regions()
    if not file.is_file():
        return regions
    try:
        tree = ElementTree.fromstring(file.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
        regions.width, regions.height = (_number(tree, f"size/{side}") or None for side in ("width", "height"))
        for entry in tree.iter("object"):
            x1, y1, x2, y2 = (_number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
            regions.boxes[entry.findtext("name", "")].append(Box(x1 - 1, y1 - 1, x2, y2))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file} is not a box file: {error}") from error
    return regions


def _number(element: ElementTree.Element, path: str) -> int:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"<{element.tag}> has no {path}")
    return int(text)


def _read_knowledge(file: Path) -> dict[str, tuple[str | None, str | None]]:
    """Image id -> caption and knowledge, None where there is none."""
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["image_id"]: (row.get("caption") or None, row.get("knowledge") or None) for row in rows}


def _image_names(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    return {path.stem: path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}

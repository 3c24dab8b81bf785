"""CoNLL-U Plus (universaldependencies.org/ext-format.html): a word a line, with IOB2 tags of the fine categories.

The word's number comes first because a tweet's word may be `#`, which readers of comments would take for one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from gem_ray.export.writing import ExportTally
from gem_ray.records import Post
from gem_ray.taxonomy import encode_bio

_HEADER = "# global.columns = ID FORM GEM:NER\n"


def write_conll(rows: Iterable[dict[str, Any]], file: TextIO, tally: ExportTally) -> None:
    """Write the posts that have words, each after a comment with its id; the others are counted.

    Args:
        rows: annotations, as `iterate_rows` gives them.
        file: UTF-8 text.
        tally: counts on.
    """
    file.write(_HEADER)
    for post in map(Post.from_annotation, rows):
        tally.posts += 1
        if post.is_rejected or not post.tokens:
            tally.remarks["posts left out, because they are rejected or have no words"] += 1
        elif not _lie_on_words(post):
            tally.remarks["posts left out, because their entities overlap or lie on no words"] += 1
        else:
            file.write(_sentence(post))
            tally.entities += len(post.entities)


def _sentence(post: Post) -> str:
    spans = [(entity.word_start, entity.word_end, entity.fine) for entity in post.entities]
    tagged = zip(post.tokens, encode_bio(spans, len(post.tokens)), strict=True)
    lines = [f"{number}\t{_one_line(word)}\t{tag}" for number, (word, tag) in enumerate(tagged, start=1)]
    return "\n".join([f"# post_id = {_one_line(post.post_id)}", *lines, "", ""])


def _lie_on_words(post: Post) -> bool:
    free = 0
    for start, end in sorted((entity.word_start, entity.word_end) for entity in post.entities):
        if not free <= start < end <= len(post.tokens):
            return False
        free = end
    return True


def _one_line(text: str) -> str:
    """A user's words and ids may hold tabs and line ends, which mean something here."""
    return " ".join(text.split())

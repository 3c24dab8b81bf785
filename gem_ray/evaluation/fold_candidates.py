"""Candidates for training the reranker as it will get them: the tagger's own, of posts that it was not trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from gem_ray.atomic import atomic_file
from gem_ray.data.shards import fingerprint
from gem_ray.records import Post
from gem_ray.rerank.candidates import CANDIDATES_SCHEMA
from gem_ray.rerank.uncertainty import category_probabilities, most_probable

if TYPE_CHECKING:
    from gem_ray.tagger.recipe import TaggerTraining


def store_fold_candidates(
    posts: Sequence[Post],
    out: Path,
    settings: TaggerTraining,
    folds: int = 5,
    k: int = 10,
    report: Callable[[str], None] = lambda _: None,
) -> Path:
    """For every gold mention, the K most probable categories of a tagger that has not seen its post.

    A tagger is trained for each fold, on the posts of all others. Call it again to resume after a stop: finished folds
    are skipped.

    Args:
        posts: with `tokens` and `gold`.
        out: gets `candidates.parquet`, which `StoredCandidates` reads; the folds' taggers are there meanwhile.
        settings: the tagger's recipe.
        folds: into how many parts the posts are cut, by a hash of their ids.
        k: candidates that are stored.
        report: called with a line for every fold.

    Returns:
        The path of `candidates.parquet`.

    Raises:
        ValueError: a fold, or all posts but those of a fold, hold no gold mention; or `out` holds folds of other posts,
            of another recipe or of other settings.
    """
    _check_same(posts, out, settings, folds, k)
    fold_numbers = [fold_of(post.post_id, folds) for post in posts]
    tables = []
    for fold in range(folds):
        file = out / f"fold-{fold}.parquet"
        if not file.exists():
            held_out = [post for post, number in zip(posts, fold_numbers, strict=True) if number == fold and post.gold]
            others = [post for post, number in zip(posts, fold_numbers, strict=True) if number != fold]
            if not held_out:
                raise ValueError(f"fold {fold} of {folds} holds no gold mention: take fewer folds, or more posts")
            _write(_candidates(held_out, others, out / f"fold-{fold}", settings, k), file)
        tables.append(pq.read_table(file))
        report(f"fold {fold + 1} of {folds}: {tables[-1].num_rows} mentions")
    _write(pa.concat_tables(tables), out / "candidates.parquet")
    return out / "candidates.parquet"


def _check_same(posts: Sequence[Post], out: Path, settings: TaggerTraining, folds: int, k: int) -> None:
    facts = {"posts": fingerprint(posts), "folds": folds, "k": k, "recipe": settings.model_dump(mode="json")}
    file = out / "folds.json"
    if not file.exists():
        with atomic_file(file) as partial:
            partial.write_text(json.dumps(facts, indent=2) + "\n")
    elif json.loads(file.read_text()) != facts:
        raise ValueError(f"{out} holds folds of other posts or by other settings; take another folder")


def _candidates(
    held_out: Sequence[Post], others: Sequence[Post], out: Path, settings: TaggerTraining, k: int
) -> pa.Table:
    from gem_ray.tagger.checkpoint import load_tagger
    from gem_ray.tagger.features import SubwordEncoder
    from gem_ray.tagger.predict import predict_words
    from gem_ray.tagger.train_tagger import train_tagger

    if not (out / "config.json").exists():
        train_tagger(others, [], out, settings)
    model, tokenizer = load_tagger(out)
    words = predict_words(model, held_out, SubwordEncoder(tokenizer, settings.max_length, model.design))
    rows = []
    for post, predictions in zip(held_out, words, strict=True):
        for gold in post.gold or ():
            logits = predictions.logits[gold.word_start : gold.word_end].mean(axis=0, keepdims=True)
            best = most_probable(category_probabilities(logits), k)[0]
            fines = [model.labels.fine[position] for position in best]
            rows.append((post.post_id, gold.word_start, gold.word_end, fines))
    return pa.table(list(zip(*rows, strict=True)), schema=CANDIDATES_SCHEMA)


def fold_of(post_id: str, folds: int) -> int:
    """Which of several folds a post is in, by a hash of its id."""
    return int.from_bytes(hashlib.sha256(post_id.encode()).digest()[:8]) % folds


def _write(table: pa.Table, file: Path) -> None:
    """All of it or nothing: what is there is complete."""
    with atomic_file(file) as partial:
        pq.write_table(table, partial)

"""The command line: help, exit codes, and errors that a user can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer.main
from typer.testing import CliRunner

from gem_ray import __version__
from gem_ray.cli import app
from gem_ray.config import ConfigError
from gem_ray.data.generated import generate
from gem_ray.data.shards import read_posts, write_posts
from gem_ray.pipeline.tables import annotations_table
from gem_ray.records import ANNOTATION_SCHEMA, Entity, Post, ProblemKind


def gem_ray(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gem_ray", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    children = getattr(command, "commands", None)  # a group's; typer brings a click of its own
    if children is None:
        yield " ".join(path), command
    for name, child in (children or {}).items():
        yield from commands(child, (*path, name))


@pytest.mark.parametrize(("name", "command"), list(commands(typer.main.get_command(app))))
def test_help_of_every_command_has_an_example(name: str, command: click.Command) -> None:
    assert command.help
    assert f"Example: `gem-ray {name} " in (command.epilog or "")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train tagger --data SHARDS --out m --split dev", "--split is of a Twitter10000 root"),
        ("train tagger --data SHARDS --out m --dev-split dev", "--dev-split is of a Twitter10000 root"),
        ("train tagger --data ROOT --out m --dev SHARDS --dev-split train", "--dev-split is of a Twitter10000 root"),
        ("train reranker --data SHARDS --out m --split train", "--split is of a Twitter10000 root"),
        ("train reranker --data SHARDS --out m --images pictures", "--images is for a Twitter10000 root"),
        ("train candidates --data SHARDS --out m --split train", "--split is of a Twitter10000 root"),
        ("train matcher --data SHARDS --out m --dev SHARDS --images pictures", "--images is for a Twitter10000 root"),
        ("train matcher --data SHARDS --out m --dev-split dev", "--dev-split is of a Twitter10000 root"),
        ("train text-segmenter --data SHARDS --out m --split train", "--split is of a Twitter10000 root"),
        ("reranker-tables --data SHARDS --out m --split dev", "--split is of a Twitter10000 root"),
        ("calibrate --data SHARDS --split dev", "--split is of a Twitter10000 root"),
        ("calibrate --data SHARDS --delta 0.1", "--delta is of --accept and --target"),
        ("experiment figure4 --data SHARDS --out m --seeds 2", "--seeds is of variants that train a tagger"),
        ("experiment figure4 --data SHARDS --out m --recipe-set epochs=2", "--recipe-set epochs has no effect"),
        ("experiment tagger --data SHARDS --out m --recipe-set seed=2", "--recipe-set seed has no effect"),
        ("experiment figure4 --data SHARDS --out m --set grounder.enabled=true", "--set grounder.enabled=true has no"),
        ("experiment tagger --data SHARDS --out m --set device=cuda", "--set device=cuda has no effect"),
        ("plan --request-price 5", "--request-price needs --price"),
        ("review sample out m --for training --design uniform", "--design is for certificates"),
        ("review sample out m --for training --seed 3", "--seed is for certificates"),
        ("review sample out m --after earlier --seed 3", "--seed says how a sample is drawn"),
        ("nano build --out m --only matcher --tweets ROOT", "--tweets is for the tagger"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(command: str, says: str, tmp_path: Path) -> None:
    for place in ("SHARDS", "ROOT/txt_fine"):
        (tmp_path / place).mkdir(parents=True)
    words = [str(tmp_path / word) if word in ("SHARDS", "ROOT", "m") else word for word in command.split()]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError), result.output
    assert str(result.exception).startswith(says)
    assert not (tmp_path / "m").exists()


def test_every_json_may_go_to_a_pipe() -> None:
    asked = [
        param
        for _, command in commands(typer.main.get_command(app))
        for param in command.params
        if "--json" in param.opts
    ]
    assert len(asked) == 4
    assert all("`-` prints JSON alone" in (param.help or "") for param in asked)  # type: ignore[attr-defined]


def test_the_version_is_told() -> None:
    done = gem_ray("--version")
    assert (done.returncode, done.stdout) == (0, f"gem-ray {__version__}\n")


def test_unknown_key_is_a_usage_error_that_names_the_nearest(tmp_path: Path) -> None:
    done = gem_ray("annotate", tmp_path, tmp_path / "out", "--set", "filter.gama=1")
    assert done.returncode == 2
    assert "filter.gama" in done.stderr
    assert "gamma" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_input_fails_with_its_path_and_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = gem_ray("annotate", tmp_path / "nowhere", tmp_path / "out")
    assert done.returncode == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in gem_ray("--debug", "annotate", tmp_path / "nowhere", tmp_path / "out").stderr


def test_missing_and_forbidden_buckets_fail_with_a_sentence(s3: Any, faulty_s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket("posts")
    done = gem_ray("annotate", bucket, "s3://no-such-bucket/out")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "there is no bucket s3://no-such-bucket" in done.stderr
    faulty_s3.share, faulty_s3.kinds = 1, ["forbidden"]
    done = gem_ray("annotate", f"{bucket}/posts", tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "may not be listed (AccessDenied)" in done.stderr


def test_unknown_option_is_a_usage_error() -> None:
    assert gem_ray("annotate", "--no-such-option").returncode == 2


def test_generated_shards_hold_what_the_corpus_generates(tmp_path: Path) -> None:
    done = gem_ray("shards", "generated", tmp_path / "posts", "--posts", 5, "--seed", 4, "--per-shard", 2)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "posts").glob("*.parquet"))) == 3
    assert [post.text for post in read_posts(tmp_path / "posts")] == [post.text for post in generate(5, 4)]


def test_jsonl_becomes_shards_with_their_images(tmp_path: Path) -> None:
    post = next(generate(1, 4))
    (tmp_path / "a.jpg").write_bytes(post.image_bytes or b"")
    rows = [{"post_id": "1", "text": post.text, "image": "a.jpg"}, {"post_id": "2", "text": "no image"}]
    (tmp_path / "posts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = gem_ray("shards", "jsonl", tmp_path / "posts.jsonl", tmp_path / "posts")
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "posts")
    assert table["image"].to_pylist() == [post.image_bytes, None]


def test_shards_say_what_is_wrong_with_the_posts_that_they_hold(tmp_path: Path) -> None:
    lines = [
        '{"post_id": "a", "text": "Paris"}',
        "{",
        '{"post_id": "c", "text": "Rome", "image": "nope.jpg"}',
        '{"id": 4}',
    ]
    (tmp_path / "posts.jsonl").write_text("\n".join(lines))
    done = gem_ray("shards", "jsonl", tmp_path / "posts.jsonl", tmp_path / "posts")
    assert done.returncode == 3
    assert done.stdout.strip().endswith(": 4")
    assert "posts.jsonl:2: the line is not valid JSON" in done.stderr
    assert "c: there is no image at nope.jpg that can be read" in done.stderr
    assert "3 posts with a problem; 2 cannot be annotated" in done.stderr


def test_scores_of_other_posts_are_refused(tmp_path: Path) -> None:
    gold, others = list(generate(2, seed=4)), list(generate(2, seed=5))
    write_posts(gold, tmp_path / "posts")
    (tmp_path / "out" / "annotations").mkdir(parents=True)
    pq.write_table(annotations_table(others, "run", {}), tmp_path / "out" / "annotations" / "part.parquet")
    for command in (["evaluate"], ["errors"]):
        page = [tmp_path / "page.html"] if command == ["errors"] else []
        done = gem_ray(*command, tmp_path / "posts", tmp_path / "out", *page)
        assert done.returncode == 1
        assert "annotates no post of" in done.stderr


def test_an_experiment_without_data_or_with_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    done = gem_ray("experiment", "table1", "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "there is nothing at" in done.stderr
    assert not (tmp_path / "out" / "table1").exists()
    (tmp_path / "mine.yaml").write_text("title: x\ncolumns: []\nvariants: [{name: a, label: A, setings: {}}]\n")
    done = gem_ray("experiment", tmp_path / "mine.yaml", "--data", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "setings: no such key; did you mean 'settings'?" in done.stderr


def test_an_export_says_what_it_wrote_and_left_out_and_which_formats_there_are(tmp_path: Path) -> None:
    posts = [Post("a", "in Paris", ["in", "Paris"]), Post("b", "")]
    posts[0].entities = [Entity("Paris", 3, 8, 1, 2, "location", "city", 0.5)]
    posts[1].fail("prepare", ProblemKind.BAD_RECORD, "text is empty")
    pq.write_table(pa.Table.from_pylist([post.annotation() for post in posts]), tmp_path / "rows.parquet")
    out = tmp_path / "words.conllup"
    done = gem_ray("export", tmp_path / "rows.parquet", out, "--format", "conll")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{out}: 2 posts read, 1 entity and 0 boxes written",
        "posts left out, because they are rejected or have no words: 1",
    ]
    done = gem_ray("export", tmp_path / "rows.parquet", out, "--format", "conll")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "exists already" in done.stderr
    done = gem_ray("--json-logs", "export", tmp_path / "rows.parquet", tmp_path / "x", "--format", "conll")
    *_, result = map(json.loads, done.stdout.splitlines())
    remarks = {"posts left out, because they are rejected or have no words": 1}
    assert result == {"posts": 2, "entities": 1, "boxes": 0, "remarks": remarks, "out": str(tmp_path / "x")}
    done = gem_ray("export", tmp_path / "rows.parquet", tmp_path / "out", "--format", "yolo")
    assert (done.returncode, "label-studio" in done.stderr) == (2, True)


def test_unknown_setting_of_a_recipe_is_a_usage_error(tmp_path: Path) -> None:
    done = gem_ray("train", "tagger", "--data", tmp_path, "--out", tmp_path / "model", "--recipe-set", "epoch=3")
    assert done.returncode == 2
    assert "epochs" in done.stderr


def test_unknown_embedded_model_is_named(tmp_path: Path) -> None:
    done = gem_ray("nano", "build", "--out", tmp_path, "--only", "taggger")
    assert done.returncode == 1
    assert "taggger" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "tagger", "--recipe", "papr-bert"), "expected one of nano, paper-bert, paper-roberta"),
        (("train", "tagger", "--recipe-set", "coarse_path=false"), "set augmentation=false with coarse_path=false"),
        (("experiment", "tagr"), "give a YAML file, or one of cost, figure3"),
    ],
)
def test_recipes_and_experiments_that_are_not_there_are_usage_errors(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = gem_ray(*arguments, "--data", tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve generated posts with gold and images."""
    folder = tmp_path_factory.mktemp("labelled")
    write_posts(generate(12, seed=3), folder)
    return folder


def test_an_experiment_leaves_table_plot_and_runs_that_other_commands_read(labelled: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(
        "title: Own\nagainst: all\ncolumns: [{label: MNERG, metric: mnerg.f1}, {label: s, metric: seconds.total}]\n"
        "variants:\n  - {name: all, label: all}\n"
        "  - {name: text, label: text alone, config: {reranker: {enabled: false}, grounder: {enabled: false}}}\n"
    )
    out = tmp_path / "out"
    done = gem_ray("experiment", own, "--data", labelled, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "| text alone |" in done.stdout
    assert {file.name for file in (out / "own").iterdir()} == {
        "table.md",
        "table.csv",
        "plot.png",
        "results.json",
        "experiment.yaml",
    }
    whole, text = (out / "runs" / name / "seed-0" / "without-knowledge" for name in ("all", "text"))
    scores = tmp_path / "scores.json"
    done = gem_ray("evaluate", labelled, whole, "--against", text, "--json", scores)
    assert done.returncode == 0, done.stderr
    assert "paired bootstrap" in done.stdout
    found = json.loads(scores.read_text())
    rows = json.loads((out / "own" / "results.json").read_text())["rows"]
    assert found["mnerg"]["f1"] == pytest.approx(rows["all"]["MNERG"]["mean"])
    assert found["against"]["mnerg"]["second"] == pytest.approx(rows["text alone"]["MNERG"]["mean"])
    page = tmp_path / "errors.html"
    done = gem_ray("errors", labelled, text, page, "--train", labelled)
    assert done.returncode == 0, done.stderr
    assert "data:image/jpeg;base64," in page.read_text()


def test_an_experiment_without_training_posts_says_where_to_put_them(labelled: Path, tmp_path: Path) -> None:
    done = gem_ray("experiment", "figure3", "--data", labelled, "--out", tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert f"put shards in {labelled / 'train'}" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_a_terminal_that_lacks_characters_loses_no_scores(tmp_path: Path, encoding: str) -> None:
    posts = list(generate(2, seed=4))
    write_posts(posts, tmp_path / "posts")
    (tmp_path / "out" / "annotations").mkdir(parents=True)
    rows = pa.Table.from_pylist([post.annotation() for post in posts], ANNOTATION_SCHEMA)
    pq.write_table(rows, tmp_path / "out" / "annotations" / "a.parquet")
    command = [sys.executable, "-m", "gem_ray", "evaluate", "posts", "out"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [*command, "--json", "scores.json"], cwd=tmp_path, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text())["posts"] == 2


ENDS = {
    "stopped": "raise SystemExit(15)",  # what Ray makes of SIGTERM
    "finished": "return SimpleNamespace(tally=Tally(), newest=Tally(), rejected=1, unread=[])",
}


@pytest.mark.parametrize(("end", "code"), [("stopped", 143), ("finished", 3)])
def test_a_run_that_is_stopped_says_how_it_continues_and_one_that_nobody_reads_is_done(end: str, code: int) -> None:
    run = f"""
from types import SimpleNamespace
import gem_ray.pipeline.run
from gem_ray.cli import command
from gem_ray.commands import annotate
from gem_ray.tally import Tally

def run(*_, **__):
    {ENDS[end]}

def tell(*_):
    raise BrokenPipeError

gem_ray.pipeline.run.annotate_dataset = run
annotate._print_summary = tell
command()
"""
    command = [sys.executable, "-c", run, "annotate", "in", "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "finished rows are in out" in done.stderr) == (code, end == "stopped")
    assert "Traceback" not in done.stderr

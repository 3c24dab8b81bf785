"""No credential of a configuration, an input or an output is stored, logged or shown."""

import json
import logging
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from gem_ray.config import Config, ConfigError, load_config, preset_names
from gem_ray.pipeline.logs import JsonFormatter
from gem_ray.records import Post, ProblemKind
from gem_ray.redaction import HIDDEN, RedactingFormatter, redacted

MARK = "s3cr3t"
# Of what RFC 3986 allows in user information and in a query's values; the mark is what must not be seen.
PIECE = st.text(string.ascii_letters + string.digits + "-._~!$'()*+,;:%", max_size=8)
PASSWORD = st.builds(lambda before, after: f"{before}{MARK}{after}", PIECE, PIECE)
NAMES = [
    "token",
    "access_token",
    "api_key",
    "apikey",
    "API-KEY",
    "password",
    "secret",
    "client_secret",
    "sig",
    "key",
    "X-Amz-Signature",
    "X-Amz-Security-Token",
    "X-Amz-Credential",
    "AWSAccessKeyId",
]
URL = st.one_of(
    PASSWORD.map(lambda password: f"https://user:{password}@host:8000/v1?model=a"),
    PASSWORD.map(lambda password: f"http://{password}@host/v1"),
    PASSWORD.map(lambda password: f"https://us@er:pa@{password}@host/v1"),
    st.tuples(PASSWORD, st.sampled_from(["/", "?", "#", "@"])).map(lambda p: f"https://user:a{p[1]}b{p[0]}@host/v1"),
    st.tuples(st.sampled_from(NAMES), PASSWORD).map(lambda p: f"https://host/v1?a=1&{p[0]}={p[1]}&b=2"),
    st.tuples(st.sampled_from(NAMES), PASSWORD).map(lambda p: f"https://user:{p[1]}@host/v1?{p[0]}={p[1]}"),
)


def texts(section: BaseModel, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key that may hold a text, a path, or texts."""
    found = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found += texts(value, (*path, name))
        elif any(word in str(field.annotation) for word in ("str", "Path", "dict", "list")):
            found.append((*path, name))
    return found


FULL = load_config(
    overrides=[
        "knowledge.explainer.base_url=http://127.0.0.1:1/v1",
        "reranker.endpoint.base_url=http://127.0.0.1:1/v1",
    ]
)
KEYS = texts(FULL)


def with_value(key: tuple[str, ...], text: str, shape: int = 0) -> Config:
    """The configuration with a text at a key, in one of the shapes that the key may have."""
    config = FULL.model_copy(deep=True)
    section: Any = config
    for name in key[:-1]:
        section = getattr(section, name)
    kind = str(type(section).model_fields[key[-1]].annotation)
    shapes: list[Any] = [text]
    if "dict" in kind:
        shapes = [{"name": text}, {"api_key": text}, {text: "value"}]
    elif "list" in kind:
        shapes = [[text], ["another", text]]
    elif "Path" in kind:
        shapes = [Path(text)]
    vars(section)[key[-1]] = shapes[shape % len(shapes)]  # whatever its key may be
    return config


def test_the_keys_are_all_there() -> None:
    """Otherwise the tests below could pass by looking at nothing."""
    for key in ("knowledge.explainer.base_url", "reranker.endpoint.base_url", "tagger.model", "reranker.adapters"):
        assert tuple(key.split(".")) in KEYS
    assert len(KEYS) > 20


@given(st.sampled_from(KEYS), URL, st.integers(0, 5))
def test_no_credential_anywhere_in_a_configuration_is_stored(key: tuple[str, ...], url: str, shape: int) -> None:
    config = with_value(key, url, shape)
    stored = json.dumps(config.public())
    assert MARK not in stored
    assert config.public() == redacted(config.public()), "resuming compares what is stored with what is there now"


@given(st.sampled_from(KEYS), URL)
def test_two_passwords_are_one_configuration(key: tuple[str, ...], url: str) -> None:
    """Whoever changes a password can resume."""
    assert with_value(key, url).public() == with_value(key, url.replace(MARK, f"{MARK}-of-another-year")).public()


@pytest.mark.parametrize("preset", preset_names())
def test_what_holds_no_credential_is_as_it_was(preset: str) -> None:
    config = load_config(preset)
    assert config.public() == config.model_dump(mode="json")


@pytest.mark.parametrize(
    "text",
    [
        "org/name@main",
        "org/name@refs/pr/4:weights/sam.pth",
        "s3://bucket/models/org/name@0123abc:file",
        "s3://anonymous@bucket/posts",
        "http://127.0.0.1:8000/v1?user=a@b",
        "https://example.org/@someone/post?page=2#top",
        "max_tokens=16, tokens=all, 576 image tokens: too many",
        "somebody@example.org wrote: secret places, and a password for all",
        "/data/token/model",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


@given(URL)
def test_what_is_hidden_is_hidden_once(url: str) -> None:
    assert HIDDEN in redacted(url)
    assert redacted(redacted(url)) == redacted(url)


@given(URL)
def test_logs_problems_and_errors_hide_it(url: str) -> None:
    record = logging.LogRecord("httpx", logging.INFO, "", 0, "HTTP Request: POST %s", (url,), None)
    assert MARK not in RedactingFormatter("%(message)s").format(record)
    assert MARK not in JsonFormatter().format(record)
    post = Post("1", "text")
    post.fail("load_image", ProblemKind.IMAGE_MISSING, f"{url} is not there")
    assert MARK not in post.problems[0].message
    for override in (f"knowledge.explainer.base_url=x{url}", f"image.max_side={url}", f"image.api_key={url}", url):
        with pytest.raises(ConfigError) as caught:
            load_config(overrides=[override])
        assert MARK not in str(caught.value)


@pytest.mark.parametrize("arguments", [[], ["--debug"]])
def test_the_command_hides_it(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "gem_ray", *arguments, "plan"]
    override = f"knowledge.explainer.base_url=ftp://user:{MARK}@host/v1"
    done = subprocess.run([*command, "--set", override], capture_output=True, text=True)
    assert done.returncode == 2
    assert "base_url" in done.stderr
    assert MARK not in done.stdout + done.stderr

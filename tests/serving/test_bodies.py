"""Bodies: what they may be, what is answered about wrong ones, and that neither work nor answer grows with them."""

from __future__ import annotations

import asyncio
import base64
import encodings
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import Request

from gem_ray.config import load_config
from gem_ray.serving import bodies
from gem_ray.serving.messages import MAX_TOKENS, BatchIn, PostIn
from gem_ray.serving.problems import ProblemError

TEXT = "Paris tonight"
EMOJI = "\U0001f600"
MAX_CHARS = 100


@pytest.fixture(scope="module")
def api(endpoint):
    with endpoint(max_body_bytes=2**20, body_timeout_s=30) as api:
        yield api


@pytest.fixture(scope="module")
def short(endpoint):
    """With short texts, beside which bodies are long."""
    with endpoint(max_batch_posts=2, body_timeout_s=30) as api:
        api.service.config.text.max_chars = MAX_CHARS
        yield api


NUMBERS = st.sampled_from([1, 3, 2001, 30_000])
MANY = st.builds(lambda item, number: [item] * number, st.sampled_from([0, {}, "", "a", None, []]), NUMBERS)
KEYS = st.builds(lambda number: {f"k{index}": 0 for index in range(number)}, NUMBERS)
FIELDS = ("text", "post_id", "tokens", "caption", "knowledge", "image", "image_url")
POSTS = st.builds(dict, KEYS | st.just({}), **{name: MANY | st.sampled_from([0, "", "a", {}]) for name in FIELDS})


@settings(max_examples=40)
@given(post=POSTS, others=MANY, keys=KEYS)
def test_a_wrong_body_has_few_errors_however_much_is_wrong(post, others, keys):
    """Each costs time in one go, and none but the first ones is told."""
    for model, values in ((PostIn, post), (BatchIn, {"posts": [post, *others]}), (BatchIn, {"posts": [post]} | keys)):
        try:
            model.model_validate(values)
        except ValidationError as error:
            assert error.error_count() <= len(FIELDS)  # noqa: PT017


LONG = st.builds(
    lambda character, number: character * number,
    st.sampled_from(["a", "\u0416", EMOJI, "\0", '"', "\ud800"]),
    st.sampled_from([1, MAX_CHARS, 20_000]),
)
LONG_POSTS = st.builds(
    lambda known, key, value: known | ({key: value} if key else {}),
    st.fixed_dictionaries(
        {"text": LONG},
        optional={
            "tokens": st.lists(LONG, max_size=3),
            **{name: LONG for name in FIELDS if name not in ("text", "tokens")},
        },
    ),
    st.just("") | LONG,
    st.just(0) | LONG,
)


@settings(max_examples=60)
@given(post=LONG_POSTS, accept=st.sampled_from(["application/json", "application/x-ndjson"]))
@example({"text": "a", "k" * 500_000: 1}, "")
@example({"text": "a" * 500_000}, "")
@example({"text": "a", "tokens": ["a" * 500_000]}, "")
def test_no_answer_is_as_long_as_what_was_asked(short, post, accept):
    for path, values in (("/v1/annotate", post), ("/v1/annotate/batch", {"posts": [post, {"text": TEXT}]})):
        headers = {"Content-Type": "application/json", "Accept": accept}
        answer = short.client.post(path, content=json.dumps(values).encode(), headers=headers)
        assert answer.status_code in (200, 403, 413, 422), answer.text[:200]
        assert len(answer.content) < 10_000


def largest(character, limits):
    """A post of all that it may hold, of one kind of characters."""
    words = limits["max_text_chars"] // 2
    text = f"{character} " * words
    tokens = [character] * min(words, limits["max_tokens"])
    long = character * limits["max_text_chars"]
    image = base64.b64encode(b"\xff" * limits["max_image_bytes"]).decode()
    return {
        "text": text,
        "tokens": tokens,
        "caption": long,
        "knowledge": long,
        "image": image,
        "post_id": character * 512,
    }


@pytest.mark.parametrize("character", ["a", "\u0416", EMOJI, '"', "\x01"])
@pytest.mark.parametrize("is_ascii", [True, False])
def test_what_is_within_the_limits_fits(api, character, is_ascii):
    limits = api.client.get("/v1/limits").json()
    assert limits["max_image_bytes"] > 300_000
    body = json.dumps(largest(character, limits), ensure_ascii=is_ascii).encode()
    answer = api.client.post("/v1/annotate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text[:300]


def test_a_batch_of_the_largest_texts_fits(endpoint):
    with endpoint(max_batch_posts=4, body_timeout_s=30) as api:
        limits = api.client.get("/v1/limits").json()
        body = {"posts": [largest(EMOJI, limits | {"max_image_bytes": 0})] * 4}
        answer = api.client.post("/v1/annotate/batch", json=body)
        assert answer.status_code == 200, answer.text[:300]


def test_base64_may_have_its_slashes_escaped(api):
    """As PHP's `json_encode` does."""
    image = base64.b64encode(bytes(range(256)) * 1200).decode().replace("/", r"\/")
    body = json.dumps({"text": TEXT}).encode()[:-1] + f',"image":"{image}"}}'.encode()
    answer = api.client.post("/v1/annotate", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text


def test_more_posts_than_a_key_may_ever_have_are_too_many_and_not_too_soon(endpoint, monkeypatch, assert_problem):
    from gem_ray.serving.keys import new_key

    key, digest = new_key()
    monkeypatch.setenv("GEM_RAY_API_KEYS", f"{digest} one")
    with endpoint(max_in_flight_per_key=4) as api:
        api.client.headers["Authorization"] = f"Bearer {key}"
        limit = api.client.get("/v1/limits").json()["max_batch_posts"]
        assert limit == 4
        for number, status in ((limit, 200), (limit + 1, 413)):
            answer = api.client.post("/v1/annotate/batch", json={"posts": [{"text": TEXT}] * number})
            assert answer.status_code == status, answer.text
        assert "more than 4 posts" in assert_problem(answer, 413)["detail"]


WRONG = {
    "no text": ({"text": ""}, "text"),
    "blank": ({"text": " "}, "text"),
    "half a character": ({"text": "Paris \ud83d"}, "text"),
    "half a character in a token": ({"tokens": ["Paris", "\ud83d"]}, "tokens"),
    "two images": ({"image": "QUJD", "image_url": "https://a.example/b.jpg"}, "image"),
    "many tokens": ({"tokens": ["a"] * (MAX_TOKENS + 1)}, "tokens"),
    "other tokens": ({"tokens": ["Berlin"]}, "tokens"),
    "no id": ({"post_id": ""}, "post_id"),
    "a long id": ({"post_id": "a" * 513}, "post_id"),
    "a long text": ({"text": "a" * 10_001}, "text"),
    "long tokens": ({"tokens": ["a" * 10_001]}, "tokens"),
    "a long caption": ({"caption": "a" * 10_001}, "caption"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_costs_its_row_and_not_the_batch(api, assert_problem, name):
    wrong, field = {"text": TEXT, "post_id": "mine"} | WRONG[name][0], WRONG[name][1]
    headers = {"Content-Type": "application/json"}
    alone = api.client.post("/v1/annotate", content=json.dumps(wrong).encode(), headers=headers)
    assert field in assert_problem(alone, 422)["detail"]
    body = json.dumps({"posts": [{"text": TEXT}, wrong, {"text": TEXT}]}).encode()
    rows = api.client.post("/v1/annotate/batch", content=body, headers=headers).json()["annotations"]
    assert [row["status"] for row in rows] == ["degraded", "rejected", "degraded"]
    assert rows[1]["problems"][0]["stage"] == "prepare"
    assert field in rows[1]["problems"][0]["message"]
    assert (rows[1]["post_id"] == "mine") == (field != "post_id")
    assert rows[1]["text"] == wrong["text"][:10_000].replace("\ud83d", "?")


@pytest.mark.parametrize(
    "wrong",
    [0, None, [], {}, {"text": 7}, {"text": TEXT, "image": 7}, {"text": "", "likes": 1}, {"text": TEXT, "tokens": "a"}],
)
def test_a_post_of_another_shape_is_a_wrong_batch(api, assert_problem, wrong):
    answer = api.client.post("/v1/annotate/batch", json={"posts": [{"text": TEXT}, wrong]})
    assert "posts.1" in assert_problem(answer, 422)["detail"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"text":"a"}}', b'{"text":NaN}', b'{"text":"\\ud800}', b'{"text":"\xff"}', b"[" * 1000]
)
def test_what_is_no_json_is_said_to_be_none(api, assert_problem, body):
    answer = api.client.post("/v1/annotate", content=body, headers={"Content-Type": "application/json"})
    assert assert_problem(answer, 422)["detail"]


@pytest.mark.parametrize("text", [TEXT, f"{TEXT} {EMOJI}"])
def test_a_file_of_json_may_come_from_any_editor(api, text):
    body = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8-sig")
    answer = api.client.post("/v1/annotate", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["text"] == text


KIND = {"Content-Type": "multipart/form-data; boundary=y"}


def part(name, value=b"z"):
    return b'--y\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), value)


FORM = part("text", TEXT.encode()) + part('image"; filename="i', b"\xff\xd8\xff and so on") + b"--y--\r\n"


@pytest.mark.parametrize("charset", ["punycode", "idna", "utf-7", "latin-1", "x" * 50_000])
def test_only_utf_8_is_read(api, assert_problem, charset):
    """Some of Python's codecs take minutes for a megabyte, and it keeps each name that it does not know for good."""
    known = len(encodings._cache)
    kind = f"{KIND['Content-Type']}; charset={charset}"
    assert_problem(api.client.post("/v1/annotate", content=FORM, headers={"Content-Type": kind}), 415)
    assert len(encodings._cache) == known


def test_a_form_that_is_no_utf_8_is_not_guessed_at(api, assert_problem):
    form = part("text", "Zürich und Köln".encode()[:-4] + b"\xff") + b"--y--\r\n"
    assert "UTF-8" in assert_problem(api.client.post("/v1/annotate", content=form, headers=KIND), 422)["detail"]


def test_an_empty_field_of_a_form_is_one_that_is_not_given(api):
    form = part("text", TEXT.encode()) + b"".join(part(name, b"") for name in FIELDS[1:]) + b"--y--\r\n"
    answer = api.client.post("/v1/annotate", content=form, headers=KIND)
    assert answer.status_code == 200, answer.text
    row = answer.json()
    assert (len(row["post_id"]), row["tokens"], row["caption"], row["knowledge"]) == (32, TEXT.split(), None, None)
    assert [problem["kind"] for problem in row["problems"]] == ["image_missing"]


def test_an_image_that_is_sent_as_a_text_is_told_what_it_lacks(api, assert_problem):
    """As .NET's `ByteArrayContent` comes without a name; it is no text in a wrong encoding."""
    form = part("text", TEXT.encode()) + part("image", b"\x89PNG and so on") + b"--y--\r\n"
    answer = api.client.post("/v1/annotate", content=form, headers=KIND)
    assert "image: the part must be a file, with a filename" in assert_problem(answer, 422)["detail"]


@settings(max_examples=60)
@given(end=st.integers(0, len(FORM)))
@example(len(FORM) - len(b"\r\n--y--\r\n"))
def test_a_form_that_is_cut_anywhere_is_refused(api, end):
    answer = api.client.post("/v1/annotate", content=FORM[:end], headers=KIND)
    assert answer.status_code == (200 if end >= len(FORM) - len(b"\r\n") else 422), answer.text


@pytest.mark.parametrize(
    "parts", [part("likes"), part("text") * 2, part("image"), part('text"; filename="t'), part("tokens") + part("mood")]
)
def test_a_form_is_refused_at_its_first_wrong_part(parts):
    read = 0

    async def receive():
        nonlocal read
        read += 1
        return {"type": "http.request", "body": parts if read == 1 else part(f"f{read}") * 100, "more_body": read < 50}

    headers = [(b"content-type", KIND["Content-Type"].encode())]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    with pytest.raises(ProblemError) as caught:
        asyncio.run(bodies._from_form(request))
    assert caught.value.status == 422
    assert read <= 2  # a part ends where the next begins


@pytest.mark.parametrize("kind", [KIND["Content-Type"], "application/json"])
def test_others_have_their_turn_while_a_body_is_looked_at_that_comes_in_one_part(kind):
    turns = 0
    body = part("tokens", b"a") * 2000 + part("text", b"a") + b"--y--\r\n"
    if kind != KIND["Content-Type"]:
        body = json.dumps({"text": "a", "tokens": ["a"] * 2000, "caption": "a" * 100_000}).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def scenario():
        watching = asyncio.create_task(others())
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", kind.encode())]}
        await bodies.read_post(Request(scope, receive), load_config())
        watching.cancel()

    asyncio.run(scenario())
    assert turns > len(body) / 20_000


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("application/x-ndjson", "application/x-ndjson"),
        ("Application/X-NDJSON;q=0.5", "application/x-ndjson"),
        ("application/json, application/x-ndjson", "application/x-ndjson"),
        ("application/json;q=0.5, application/x-ndjson", "application/x-ndjson"),
        ("application/json, application/x-ndjson;q=0.5", "application/json"),
        ("application/x-ndjson;q=0", "application/json"),
        ("application/json;q=0.5\napplication/x-ndjson", "application/x-ndjson"),
        ("application/x-ndjson; q=0.000", "application/json"),
        ("application/x-ndjson;q=much", "application/json"),
        ("text/application/x-ndjsonish", "application/json"),
    ],
)
def test_lines_are_for_those_who_ask_for_them(api, accept, kind):
    headers = [("Accept", each) for each in accept.split("\n")]
    answer = api.client.post("/v1/annotate/batch", json={"posts": [{"text": TEXT}]}, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].partition(";")[0] == kind

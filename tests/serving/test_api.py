"""Routes of the API, their answers and their errors, over real HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from importlib import resources
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from gem_ray.data.tokenize import tokenize
from gem_ray.serving.messages import AnnotationOut
from gem_ray.serving.scrape import merge
from gem_ray.taxonomy import FMNERG_TREE

DASHBOARD = Path(__file__).parents[2] / "clusters" / "grafana-dashboard.json"
TEXT = "Taylor Swift is in Paris tonight"


@pytest.fixture(scope="session")
def shown(posts):
    """A post of whose entities one is seen."""
    return next(post for post in posts if any(entity.boxes for entity in post.gold))


def in_json(post, **fields):
    return {"text": post.text, "image": base64.b64encode(post.image_bytes).decode()} | fields


def told(row):
    """What does not differ from one request to the next."""
    return {name: value for name, value in row.items() if name not in ("post_id", "seconds")}


def photo(most_bytes):
    """A PNG of noise, almost as large as allowed."""
    side = int((most_bytes * 0.99 / 3) ** 0.5)
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(encoded, "PNG")
    assert 0.95 * most_bytes < len(encoded.getvalue()) <= most_bytes
    return encoded.getvalue()


@pytest.mark.parametrize("share", [0.5, 1])  # gRPC by itself takes 4 MiB
def test_images_as_large_as_the_limits_say_are_annotated(service, shown, share):
    image = photo(int(service.client.get("/v1/limits").json()["max_image_bytes"] * share))
    form = {"data": {"text": shown.text}, "files": {"image": ("a.png", image, "image/png")}}
    post = {"text": shown.text, "image": base64.b64encode(image).decode()}
    for path, body in [("", form), ("", {"json": post}), ("/batch", {"json": {"posts": [post]}})]:
        answer = service.client.post(f"/v1/annotate{path}", **body)
        assert answer.status_code == 200, answer.text
        row = answer.json()["annotations"][0] if path else answer.json()
        assert (row["status"], row["problems"]) == ("ok", [])


def test_a_form_and_json_give_the_same_answer(service, shown):
    form = service.annotate(shown)
    as_json = service.client.post("/v1/annotate", json=in_json(shown, post_id="7"))
    assert form.status_code == as_json.status_code == 200
    assert told(form.json()) == told(as_json.json())
    assert as_json.json()["post_id"] == "7"
    assert form.json()["post_id"]


def test_an_answer_holds_the_fields_of_a_row_and_how_it_came_about(service, shown):
    answer = service.annotate(shown).json()
    AnnotationOut.model_validate(answer, extra="forbid", strict=False)
    assert answer["text"] == shown.text
    assert answer["tokens"] == tokenize(shown.text)
    assert answer["status"] == "ok"
    assert any(entity["box"] for entity in answer["entities"])
    assert all(answer["text"][e["start"] : e["end"]] == e["text"] for e in answer["entities"])
    roles = {
        "tag": {"tagger", "tagger_encoder"},
        "rerank": {"reranker", "reranker_adapter"},
        "ground": {"matcher", "sam", "text_segmenter"},
    }
    needed = roles.keys() & answer["seconds"].keys()
    models = {model["role"]: model["reference"] for model in answer["models"]}
    assert models.keys() == set().union(*(roles[stage] for stage in needed))
    assert models["tagger"].startswith("nano:tagger@")
    assert {"prepare", "tag", "load_image", "ground", "waiting"} <= answer["seconds"].keys()
    assert answer["gamma"] == 0.2


def test_heat_maps_are_given_to_those_who_ask(service, shown):
    without = service.annotate(shown).json()
    entities = service.annotate(shown, params={"heatmaps": "true"}).json()["entities"]
    assert not any(entity["heatmap"] for entity in without["entities"])
    for entity in entities:
        assert (entity["heatmap"] is not None) == (entity["point"] is not None)
        if entity["heatmap"]:
            data = base64.b64decode(entity["heatmap"]["data"], validate=True)
            assert len(data) == entity["heatmap"]["height"] * entity["heatmap"]["width"]
            assert max(data) == 255


def test_words_caption_and_knowledge_may_come_along(service):
    words = ["Taylor Swift", "is in Paris", "tonight"]
    form = {"text": TEXT, "tokens": words, "caption": "a singer", "knowledge": "Taylor Swift is a singer."}
    for answer in (service.client.post("/v1/annotate", data=form), service.client.post("/v1/annotate", json=form)):
        if answer.status_code == 415:  # without a file, httpx sends another kind of form
            continue
        assert {name: answer.json()[name] for name in form} == form
    parts = [(name, (None, value)) for name in ("text", "caption", "knowledge") for value in [form[name]]]
    answer = service.client.post("/v1/annotate", files=[*parts, *(("tokens", (None, word)) for word in words)])
    assert {name: answer.json()[name] for name in form} == form


def test_a_post_without_image_is_annotated_and_says_so(service):
    answer = service.client.post("/v1/annotate", json={"text": TEXT}).json()
    assert answer["status"] == "degraded"
    assert [problem["kind"] for problem in answer["problems"]] == ["image_missing"]
    assert {entity["text"] for entity in answer["entities"]} >= {"Taylor Swift", "Paris"}


def test_a_batch_answers_in_order_and_keeps_failures_to_their_posts(service, posts):
    asked = [in_json(post, post_id=str(index)) for index, post in enumerate(posts[:6])]
    asked.insert(2, {"text": "   ", "post_id": "blank"})
    asked.insert(4, {"text": TEXT, "post_id": "no picture", "image": base64.b64encode(b"no picture").decode()})
    answer = service.client.post("/v1/annotate/batch", json={"posts": asked})
    rows = answer.json()["annotations"]
    assert [row["post_id"] for row in rows] == [post["post_id"] for post in asked]
    assert [row["status"] for row in rows] == ["ok", "ok", "rejected", "ok", "degraded", "ok", "ok", "ok"]
    assert rows[4]["problems"][0]["kind"] == "image_unreadable"


def test_a_batch_is_streamed_as_posts_are_done(service, posts):
    asked = [in_json(post, post_id=str(index)) for index, post in enumerate(posts[:10])]
    asked.append({"text": TEXT, "post_id": "10"})
    with service.client.stream(
        "POST", "/v1/annotate/batch", json={"posts": asked}, headers={"Accept": "application/x-ndjson"}
    ) as answer:
        assert answer.headers["content-type"].startswith("application/x-ndjson")
        rows = [json.loads(line) for line in answer.iter_lines()]
    assert sorted(row["index"] for row in rows) == list(range(11))
    assert all(row["post_id"] == str(row["index"]) for row in rows)
    again = service.client.post("/v1/annotate/batch", json={"posts": asked}).json()["annotations"]
    entities = {row["index"]: [(e["text"], e["fine"]) for e in row["entities"]] for row in rows}
    assert [entities[index] for index in range(11)] == [[(e["text"], e["fine"]) for e in r["entities"]] for r in again]


def test_facts(service):
    taxonomy = service.client.get("/v1/taxonomy").json()
    assert taxonomy == {"labels": "fmnerg", "coarse": {name: list(fine) for name, fine in FMNERG_TREE.items()}}
    limits = service.client.get("/v1/limits").json()
    assert limits["max_text_chars"] == 2000
    assert limits["max_batch_posts"] == 32
    assert (limits["gamma"], limits["k"], limits["api_key"]) == (0.2, 2, False)


def test_state(service):
    assert service.client.get("/healthz").status_code == 200
    assert service.client.get("/readyz").text == "ready\n"


def test_no_answer_lets_other_sites_in(service):
    answer = service.client.options(
        "/v1/annotate", headers={"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    )
    assert not any(name.startswith("access-control") for name in answer.headers)
    answer = service.client.get("/v1/limits", headers={"Origin": "https://elsewhere.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert answer.headers["content-security-policy"] == "default-src 'self'; img-src 'self' blob: data:"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_and_all_its_parts_are_served_as_they_are(service):
    folder = resources.files("gem_ray.serving") / "page"
    names = [file.name for file in folder.iterdir()]
    assert "index.html" in names
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "json": "application/json"}
    for name in names:
        answer = service.client.get(f"/{name}")
        assert answer.content == (folder / name).read_bytes()
        kind = kinds.get(name.rpartition(".")[2])
        assert kind is None or answer.headers["content-type"].startswith(kind)
    assert service.client.get("/").content == (folder / "index.html").read_bytes()


FORM = b'--y\r\nContent-Disposition: form-data; name="%s"\r\n\r\nz\r\n--y--\r\n'


def form_in(charset):
    return {"Content-Type": f"multipart/form-data; boundary=y; charset={charset}"}


def batch_of(count):
    return {"posts": [{"text": TEXT}] * count}


@pytest.mark.parametrize(
    ("path", "request_", "status"),
    [
        ("/v1/annotate", {"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415),
        ("/v1/annotate", {"content": b"x"}, 415),
        ("/v1/annotate", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 422),
        ("/v1/annotate", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 422),
        ("/v1/annotate", {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=y"}}, 422),
        ("/v1/annotate", {"content": FORM % b"text", "headers": form_in("punycode")}, 415),
        ("/v1/annotate", {"content": FORM % rb"\ud800", "headers": form_in("unicode_escape")}, 415),
        ("/v1/annotate", {"json": {}}, 422),
        ("/v1/annotate", {"json": {"text": ""}}, 422),
        ("/v1/annotate", {"json": {"text": " \n "}}, 422),
        ("/v1/annotate", {"json": {"text": 7}}, 422),
        ("/v1/annotate", {"json": {"text": TEXT, "likes": 3}}, 422),
        ("/v1/annotate", {"json": {"text": TEXT, "tokens": ["Berlin"]}}, 422),
        ("/v1/annotate", {"json": {"text": TEXT, "image": "???"}}, 422),
        ("/v1/annotate", {"json": {"text": TEXT, "image": "", "image_url": "https://a.example/b.jpg"}}, 422),
        ("/v1/annotate", {"json": {"text": "a" * 2001}}, 422),
        ("/v1/annotate", {"json": {"text": TEXT, "knowledge": "a" * 2001}}, 422),
        ("/v1/annotate", {"json": {"text": TEXT, "post_id": "a" * 513}}, 422),
        ("/v1/annotate", {"content": b'{"text": "\\ud800"}', "headers": {"Content-Type": "application/json"}}, 422),
        ("/v1/annotate", {"json": {"text": TEXT}, "params": {"heatmaps": "perhaps"}}, 422),
        ("/v1/annotate", {"files": {"text": ("t", b"a file")}}, 422),
        ("/v1/annotate", {"data": {"text": TEXT, "image": "no file"}, "files": {"tokens": (None, "x")}}, 422),
        ("/v1/annotate", {"data": {"text": TEXT}, "files": {"image": ("i", b"\0" * 9_000_001)}}, 413),
        ("/v1/annotate", {"json": {"text": TEXT, "image": base64.b64encode(b"\0" * 9_000_001).decode()}}, 413),
        ("/v1/annotate", {"json": {"text": "a" * 16_000_000}}, 413),
        ("/v1/annotate/batch", {"json": {"posts": []}}, 422),
        ("/v1/annotate/batch", {"json": batch_of(33)}, 413),
        ("/v1/annotate/batch", {"data": {"text": TEXT}, "files": {"image": ("i", b"")}}, 415),
        ("/healthz", {"json": {}}, 405),
    ],
)
def test_what_is_wrong_with_a_request_is_a_problem(service, assert_problem, path, request_, status):
    problem = assert_problem(service.client.post(path, **request_), status)
    assert problem["detail"]


def test_what_is_not_there(service, assert_problem):
    assert_problem(service.client.get("/v1/nothing"), 404)
    assert_problem(service.client.get("/../../etc/passwd"), 404)
    assert_problem(service.client.get("/%2e%2e/%2e%2e/etc/passwd"), 404)


def test_a_body_without_length_is_cut_off_at_the_limit(service, assert_problem):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 500_000_000:
            sent += 100_000
            yield b" " * 100_000

    headers = {"Content-Type": "application/json"}
    try:
        answer = service.client.post("/v1/annotate", content=endless(), headers=headers)
    except httpx.TransportError:  # the service hung up while we were still sending
        pass
    else:
        assert_problem(answer, 413)
    assert sent < 250_000_000
    assert service.client.get("/healthz").status_code == 200


def test_metrics_are_one_page_of_what_one_asks_for(service, posts):
    service.annotate(posts[0])
    names = {*re.findall(r"ray_gem_ray_(?:http|posts_)\w+", DASHBOARD.read_text()), "ray_gem_ray_batch_posts_count"}
    asked = [*(f"{name}{{" for name in names), 'endpoint="/metrics"', 'endpoint="/v1/annotate"']
    deadline = time.monotonic() + 30
    while missing := [part for part in asked if part not in (page := service.client.get("/metrics")).text]:
        assert time.monotonic() < deadline, missing  # exported from time to time
        time.sleep(0.5)
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert page.text.count("\n") < 800
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    assert len(families) == sum(line.startswith("# TYPE") for line in page.text.splitlines())
    for name, family in families.items():
        # As `promtool check metrics`: help for each, counters end with _total, and nobody else does.
        assert family.documentation, name
        assert all(
            sample.name.endswith(("_total", "_created")) == (family.type == "counter") for sample in family.samples
        )
        assert family.type != "unknown", name
        known = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(known) == len(set(known)), name
    assert any(name.startswith("ray_serve_") for name in families)
    requests = families["ray_gem_ray_http_requests"].samples
    assert {sample.labels["endpoint"] for sample in requests} >= {"/v1/annotate", "/metrics"}
    (limit,) = families["ray_gem_ray_posts_limit"].samples
    assert limit.value == 40


def test_pages_of_several_nodes_are_merged_family_by_family():
    ours = ["# HELP ray_gem_ray_a x", "# TYPE ray_gem_ray_a counter"]
    name = "ray_serve_proxy_status"
    serves = [f"# HELP {name} y", f"# TYPE {name} gauge", f"{name} 5.0"]
    first = [*ours, 'ray_gem_ray_a{n="1"} 1.0', "# HELP other x", "other 3"]
    second = [*serves, *ours, 'ray_gem_ray_a{n="2"} 2.0']
    merged = merge(["\n".join(first), "\n".join(second)]).splitlines()
    assert merged == [*ours, 'ray_gem_ray_a{n="1"} 1.0', 'ray_gem_ray_a{n="2"} 2.0', *serves]

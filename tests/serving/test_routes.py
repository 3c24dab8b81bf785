"""Methods, paths and kinds of bodies that clients, scanners and browsers try."""

from __future__ import annotations

import base64
import gzip
import json
import re

import httpx
import pytest

from gem_ray.serving.app import guarded

TEXT = "Paris tonight"
READ = ["/healthz", "/v1/taxonomy", "/v1/limits", "/openapi.json", "/", "/style.css"]
WRITTEN = ["/v1/annotate", "/v1/annotate/batch"]


@pytest.fixture(scope="module")
def api(endpoint):
    with endpoint() as api:
        yield api


@pytest.mark.parametrize("path", READ)
def test_what_can_be_read_has_a_head_and_options(api, assert_problem, path):
    got = api.client.get(path)
    head = api.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    same = ("content-type", "content-length", "content-security-policy")
    assert [head.headers[name] for name in same] == [got.headers[name] for name in same]
    options = api.client.options(path)
    assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
    refused = api.client.post(path, json={})
    assert_problem(refused, 405)
    assert refused.headers["allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("path", WRITTEN)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "TRACE"])
def test_a_wrong_method_is_told_the_right_ones(api, path, method):
    refused = api.client.request(method, path)
    assert (refused.status_code, refused.headers["allow"]) == (405, "OPTIONS, POST")
    assert api.client.options(path).headers["allow"] == "OPTIONS, POST"


@pytest.mark.parametrize("path", [*READ[:-2], *WRITTEN])
def test_a_slash_at_the_end_changes_nothing(api, path):
    """A redirect would name the scheme of the connection, which behind a TLS proxy is the wrong one."""
    post = {"json": {"text": TEXT} if path == "/v1/annotate" else {"posts": [{"text": TEXT}]}}
    method = "POST" if path in WRITTEN else "GET"
    answer = api.client.request(method, f"{path}/", **(post if method == "POST" else {}))
    assert (answer.status_code, answer.history) == (200, [])


@pytest.mark.parametrize("slashes", ["", "/", "//"])
@pytest.mark.parametrize("path", ["/", "/index.html", "/docs", "/docs.html", "/style.css"])
def test_a_page_is_found_with_its_links_whatever_slashes_stand_at_its_end(api, path, slashes):
    page = api.client.get(f"{path}{slashes}", follow_redirects=True)
    assert page.status_code == 200
    assert page.content == api.client.get(path).content
    for link in re.findall(r'(?:src|href)="([^"#:]+)"', page.text):
        assert api.client.get(page.url.join(link)).status_code == 200, link


@pytest.fixture(scope="module")
def mounted(api, listening):
    """The same service behind a `route_prefix`, as Serve calls it."""
    app = guarded(api.service)

    async def behind_prefix(scope, receive, send):
        assert scope["path"].startswith("/gem")  # Serve answers the others itself
        await app(scope | {"root_path": "/gem"}, receive, send)

    with listening(behind_prefix) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        yield client


@pytest.mark.parametrize("path", ["/gem", "/gem/", "/gem/docs", "/gem/docs/"])
def test_a_page_is_found_with_its_links_behind_a_prefix(api, mounted, path):
    page = mounted.get(path, follow_redirects=True)
    assert page.status_code == 200
    assert page.content == api.client.get("/docs" if "docs" in path else "/").content
    for link in re.findall(r'(?:src|href)="([^"#:]+)"', page.text):
        assert mounted.get(page.url.join(link)).status_code == 200, link


def test_the_api_is_found_behind_a_prefix(mounted):
    assert mounted.post("/gem/v1/annotate/", json={"text": TEXT}).status_code == 200
    assert mounted.get("/gem/openapi.json").json()["servers"] == [{"url": "/gem"}]


@pytest.mark.parametrize("path", ["/", "/app.js", "/client.js", "/docs", "/v1/limits"])
def test_what_was_read_before_is_asked_for_again(api, path):
    """A page of one version does not run with scripts of another."""
    answer = api.client.get(path)
    assert answer.headers["cache-control"] == "no-cache"
    if "etag" in answer.headers:
        again = api.client.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.headers["cache-control"]) == (304, "no-cache")


@pytest.mark.parametrize("range_", ["bytes=0-3", "bytes=0-1,3-4", "bytes=x", "bytes=999999-", "lines=1"])
def test_a_page_is_given_whole(api, range_):
    whole = api.client.get("/style.css")
    answer = api.client.get("/style.css", headers={"Range": range_})
    assert (answer.status_code, answer.content) == (200, whole.content)


@pytest.mark.parametrize("path", ["/v2/annotate", "/v1", "/index.htm", "/.git/config", "/%2e%2e/keys.txt"])
def test_what_is_not_there_is_a_problem(api, assert_problem, path):
    assert_problem(api.client.get(path), 404)


JSON = json.dumps({"text": TEXT}).encode()


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, gzip.compress(JSON, mtime=0)),
        ({"Content-Type": "application/json", "Content-Encoding": "br"}, JSON),
        ({"Content-Type": "application/json; charset=utf-16"}, JSON.decode().encode("utf-16")),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"text=Paris"),
        ({"Content-Type": "text/json"}, JSON),
        ({"Content-Type": ""}, JSON),
        ({}, JSON),
    ],
)
def test_a_body_of_another_kind_is_415(api, assert_problem, headers, body):
    refused = api.client.post("/v1/annotate", content=body, headers=headers)
    assert_problem(refused, 415)
    if "Content-Encoding" in headers:
        assert refused.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=UTF-8", "Application/JSON ; x=y"])
def test_kinds_of_json(api, kind):
    headers = {"Content-Type": kind, "Content-Encoding": "identity"}
    assert api.client.post("/v1/annotate", content=JSON, headers=headers).status_code == 200


IMAGE = b"\x89PNG and so on"
IN_BASE64 = base64.b64encode(IMAGE).decode()


@pytest.mark.parametrize(
    "fields",
    [
        {"image": IN_BASE64},
        {"image": f"data:image/png;base64,{IN_BASE64}"},
        {"image": f"DATA:;BASE64,{IN_BASE64}"},
        {"image_url": f"data:image/png;base64,{IN_BASE64}"},
    ],
)
def test_an_image_may_be_a_data_url(api, fields):
    for path, body in (("/v1/annotate", {}), ("/v1/annotate/batch", {"posts": [{"text": TEXT} | fields]})):
        api.tagger.posts.clear()
        assert api.client.post(path, json=body or {"text": TEXT} | fields).status_code == 200
        # The tagger reads no image; what matters is that there is one.
        (row,) = api.tagger.posts
        assert not row.lacks_image


def test_a_form_has_one_image_too(api, assert_problem):
    url = f"data:image/png;base64,{IN_BASE64}"
    file = ("image", ("x", IMAGE))
    assert_problem(api.client.post("/v1/annotate", data={"text": TEXT, "image_url": "https://a"}, files=[file]), 422)
    api.tagger.posts.clear()
    assert api.client.post("/v1/annotate", files={"text": (None, TEXT), "image_url": (None, url)}).status_code == 200
    assert not api.tagger.posts[0].lacks_image


BAD = {
    "no base64": {"image": "???"},
    "cut off": {"image": IN_BASE64[:-1]},
    "padding within": {"image": "QQ==QUJD"},
    "a data URL of another kind": {"image": "data:image/svg+xml,%3Csvg/%3E"},
    "a bad data URL": {"image_url": "data:image/png;base64,???"},
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_image_costs_its_row_and_not_the_batch(api, assert_problem, name):
    bad = {"text": TEXT} | BAD[name]
    assert_problem(api.client.post("/v1/annotate", json=bad), 422)
    answer = api.client.post("/v1/annotate/batch", json={"posts": [{"text": TEXT}, bad, {"text": TEXT}]})
    assert answer.status_code == 200, answer.text
    rows = answer.json()["annotations"]
    assert [row["problems"][0]["kind"] for row in rows] == ["image_missing", "image_unreadable", "image_missing"]
    assert rows[1]["status"] == "degraded"
    assert all(row["entities"] for row in rows)


@pytest.mark.parametrize("image", [7, True, ["QUJD"], {"reason": "x"}])
def test_an_image_of_another_type_is_a_wrong_batch(api, assert_problem, image):
    assert_problem(api.client.post("/v1/annotate/batch", json={"posts": [{"text": TEXT, "image": image}]}), 422)


@pytest.mark.parametrize("field", ["text", "caption", "knowledge"])
def test_one_long_text_costs_its_row_and_not_the_batch(api, assert_problem, field):
    long = {"text": TEXT} | {field: "a" * 10_001}
    assert_problem(api.client.post("/v1/annotate", json=long), 422)
    answer = api.client.post("/v1/annotate/batch", json={"posts": [long, {"text": TEXT}]})
    assert [row["status"] for row in answer.json()["annotations"]] == ["rejected", "degraded"]


def test_one_large_image_costs_its_row_and_not_the_batch(endpoint, assert_problem):
    with endpoint(max_batch_posts=2) as api:
        limit = api.client.get("/v1/limits").json()["max_image_bytes"]
        api.service.config.image.max_bytes = limit = min(limit, 1000)
        large = {"text": TEXT, "image": base64.b64encode(b"x" * (limit + 1)).decode()}
        assert_problem(api.client.post("/v1/annotate", json=large), 413)
        answer = api.client.post("/v1/annotate/batch", json={"posts": [large, {"text": TEXT}]})
        kinds = [row["problems"][0]["kind"] for row in answer.json()["annotations"]]
        assert kinds == ["image_too_large", "image_missing"]


SITES = [
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "none"}, 200),
    ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Origin": "https://elsewhere.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://[::bad"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
]


@pytest.mark.parametrize(("headers", "status"), SITES)
@pytest.mark.parametrize("path", WRITTEN)
def test_a_page_of_another_site_cannot_post(api, headers, status, path):
    """A form needs no permission for that: `multipart/form-data` is one of the kinds that browsers always send."""
    body = {"text": TEXT} if path == "/v1/annotate" else {"posts": [{"text": TEXT}]}
    assert api.client.post(path, json=body, headers=headers).status_code == status
    if path == "/v1/annotate":
        form = httpx.post(api.client.base_url.join(path), files={"text": (None, TEXT)}, headers=headers)
        assert form.status_code == status


def test_its_own_page_can_post(api):
    origin = str(api.client.base_url).rstrip("/")
    assert api.client.post("/v1/annotate", json={"text": TEXT}, headers={"Origin": origin}).status_code == 200


PROXIES = ["Via", "Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "X-Client-IP"]
PROXIES += ["CF-Connecting-IP", "True-Client-IP", "Fastly-Client-IP", "X-Original-Forwarded-For", "X-Cluster-Client-IP"]
PROXIES += ["Client-IP", "X-Forwarded", "Forwarded-For", "X-Remote-IP", "X-Remote-Addr", "X-Originating-IP", "CF-Ray"]
PROXIES += ["X-Azure-ClientIP", "X-Envoy-External-Address", "CDN-Loop", "X-Amzn-Trace-Id"]


@pytest.mark.parametrize("header", PROXIES)
def test_without_keys_nobody_is_served_through_a_proxy(api, assert_problem, header):
    assert_problem(api.client.get("/v1/limits", headers={header: "203.0.113.9"}), 403)

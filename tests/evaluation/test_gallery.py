"""The gallery page: read as a file, and shown in a real browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from gem_ray.data.shards import write_posts
from gem_ray.evaluation.gallery import write_gallery, write_gallery_of_run
from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.records import (
    ANNOTATION_SCHEMA,
    Box,
    Candidate,
    Entity,
    GoldEntity,
    HeatMap,
    Point,
    Post,
    ProblemKind,
)

HOSTILE = '</script><script>document.title="pwned"</script><img src=x onerror=alert(1)> & "\u202eNew York'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def encoded(width, height, kind="PNG"):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def mention(text, name, fine="city", coarse="location", **fields):
    start = text.index(name)
    return Entity(name, start, start + len(name), 0, 0, coarse, fine, fields.pop("score", 0.75), **fields)


def seen_post():
    text = "👩‍🚀 lands in New York with NASA"
    city = mention(
        text, "New York", match_score=0.9, seen=True, box=Box(100, 50, 300, 150), box_source="sam",
        point=Point(200, 100),
        candidates=[Candidate("city", 0.75), Candidate("state", 0.25)], entropy=0.56, reranked=True,
        heatmap=HeatMap(2, 3, bytes([0, 51, 102, 153, 204, 255])),
    )  # fmt: skip
    agency = mention(text, "NASA", "government_agency", "organization", match_score=0.1, seen=False)
    return Post("seen", text, ["👩‍🚀", "lands", "in", "New", "York", "with", "NASA"], entities=[city, agency])


def degraded_post():
    post = Post("degraded", "Paris, Paris", ["Paris", ",", "Paris"])
    post.entities = [mention(post.text, "Paris")]
    post.fail("load_image", ProblemKind.IMAGE_UNREADABLE, "the image is a PDF document")
    return post


def hostile_post():
    return Post(f"id {HOSTILE}", HOSTILE, entities=[mention(HOSTILE, "New York")])


GOLD = {
    "seen": [GoldEntity(3, 5, "city", (Box(110, 50, 300, 150),)), GoldEntity(6, 7, "company")],
    "degraded": [GoldEntity(0, 1, "city"), GoldEntity(2, 3, "country")],
}


def write(out, posts=None, **options):
    posts = posts if posts is not None else [seen_post(), degraded_post(), hostile_post()]
    options = {"images": {"seen": encoded(400, 200)}, "gold": GOLD, "max_image_side": 100, **options}
    write_gallery(posts, out, **options)
    return out


class Page(HTMLParser):
    """The elements of a page: tag, attributes, text."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.elements = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2].append(data)

    def by_id(self, name):
        for _, attributes, text in self.elements:
            if attributes.get("id") == name:
                return attributes, "".join(text)
        return None


def test_every_post_is_in_the_page(tmp_path):
    posts = [Post(f"p{i}", f"text {i}") for i in range(300)]
    page = Page(write(tmp_path / "g.html", posts, images={}, gold=None))
    _, data = page.by_id("data")
    assert [(post["post_id"], post["text"]) for post in json.loads(data)["posts"]] == [
        (p.post_id, p.text) for p in posts
    ]


def test_hostile_text_stays_text(tmp_path):
    path = write(tmp_path / "g.html", title=HOSTILE, facts={HOSTILE: HOSTILE})
    page = Page(path)
    _, data = page.by_id("data")
    assert json.loads(data)["posts"][2]["text"] == HOSTILE
    assert "pwned" not in "".join(
        "".join(text) for tag, attributes, text in page.elements if tag == "script" and not attributes.get("type")
    )
    assert not [tag for tag, _, _ in page.elements if tag == "img"]


def test_the_page_asks_for_nothing(tmp_path):
    report = evaluate([Post("seen", "a", ["a"], gold=[])], [])
    page = Page(write(tmp_path / "g.html", report=report, facts={"site": "https://example.org"}))
    for _, attributes, _ in page.elements:
        assert not {"src", "href", "action", "data", "poster", "srcset"} & attributes.keys() - {"href"}
        assert attributes.get("href", "#").startswith("#")
    style = "".join("".join(text) for tag, _, text in page.elements if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_only_the_pages_own_script_may_run(tmp_path):
    page = Page(write(tmp_path / "g.html"))
    (policy,) = [a["content"] for tag, a, _ in page.elements if tag == "meta" and "http-equiv" in a]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_images_are_small_jpegs_that_know_the_originals_size(tmp_path):
    attributes, text = Page(write(tmp_path / "g.html")).by_id("picture-0")
    assert (attributes["data-width"], attributes["data-height"]) == ("400", "200")
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    assert (image.format, image.size) == ("JPEG", (100, 50))


@pytest.mark.parametrize("kind", ["mapping", "function", "pairs"])
def test_images_come_as_mapping_function_or_pairs(tmp_path, kind):
    images = {"degraded": encoded(40, 40), "stranger": encoded(40, 40)}
    source = {"mapping": images, "function": images.get, "pairs": iter(images.items())}[kind]
    page = Page(write(tmp_path / "g.html", images=source))
    assert [a["id"] for _, a, _ in page.elements if a.get("id", "").startswith("picture-")] == ["picture-1"]


def test_an_unreadable_image_leaves_the_post_without(tmp_path):
    assert Page(write(tmp_path / "g.html", images={"seen": b"no image"})).by_id("picture-0") is None


def test_verdicts_follow_the_scoring_rules(tmp_path):
    _, data = Page(write(tmp_path / "g.html")).by_id("data")
    seen, degraded, hostile = json.loads(data)["posts"]
    city, agency = seen["verdicts"]
    gold_box = {"x1": 110, "y1": 50, "x2": 300, "y2": 150}
    assert (city["span"], city["category"], city["region"], city["boxes"]) == (True, True, True, [gold_box])
    assert city["iou"] == pytest.approx(0.95)
    assert (agency["span"], agency["category"], agency["region"], agency["gold"]) == (True, False, True, "company")
    assert [(gold["start"], gold["end"], gold["fine"]) for gold in degraded["missed"]] == [(7, 12, "country")]
    assert hostile["verdicts"] == [None]


def test_numbers_that_json_lacks_become_null(tmp_path):
    post = Post("p", "Paris", entities=[mention("Paris", "Paris", score=float("nan"))])
    _, data = Page(write(tmp_path / "g.html", [post], gold=None)).by_id("data")
    assert json.loads(data)["posts"][0]["entities"][0]["score"] is None


def test_the_page_of_a_run_has_its_order_its_facts_and_its_scores(tmp_path):
    posts = [degraded_post(), seen_post()]
    rows = [post.annotation() | {"run_id": "r", "models": []} for post in posts]
    (tmp_path / "out" / "annotations").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, ANNOTATION_SCHEMA), tmp_path / "out" / "annotations" / "part-0.parquet")
    facts = {
        "input": "posts/",
        "run_id": "run-7",
        "rows_per_second": 2.5,
        "reranked_share": 0.5,
        "models": {"tagger": "t@1"},
    }
    (tmp_path / "out" / "run.json").write_text(json.dumps(facts | {"config": {}}))
    inputs = [Post("seen", seen_post().text, seen_post().tokens, image_bytes=encoded(400, 200), gold=GOLD["seen"])]
    inputs += [Post("degraded", "Paris, Paris", ["Paris", ",", "Paris"], gold=GOLD["degraded"])]
    write_posts(inputs, tmp_path / "posts")

    write_gallery_of_run(tmp_path / "posts", tmp_path / "out", tmp_path / "g.html")
    page = Page(tmp_path / "g.html")
    _, data = page.by_id("data")
    assert [post["post_id"] for post in json.loads(data)["posts"]] == ["seen", "degraded"]
    assert page.by_id("picture-0") is not None
    text = "".join("".join(text) for _, _, text in page.elements)
    assert "run-7" in text
    assert "t@1" in text
    assert "57.14" in text  # MNER: 2 right of 3 predicted and 4 gold

    write_gallery_of_run(tmp_path / "posts", tmp_path / "out", tmp_path / "one.html", limit=1)
    _, data = Page(tmp_path / "one.html").by_id("data")
    assert [post["post_id"] for post in json.loads(data)["posts"]] == ["seen"]

    write_posts([Post("another", "text", image_bytes=encoded(40, 20))], tmp_path / "others")
    with pytest.raises(EvaluationError, match="none of the posts at"):
        write_gallery_of_run(tmp_path / "others", tmp_path / "out", tmp_path / "none.html")


# ---- In a real browser -----------------------------------------------------------------------------------------------

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page is not looked at")


def dom(path, tmp_path, fragment="", width=1280):
    """The page's elements after its script has run."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1400", "--dump-dom",
        f"file://{path}{fragment}",
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return answer.stdout


def cards(page):
    return re.findall(r'<article class="card" data-post="(\d+)" data-status="(\w+)"', page)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: the page is not looked at")
    folder = tmp_path_factory.mktemp("gallery")
    return dom(write(folder / "g.html"), folder)


def test_the_browser_shows_a_card_for_each_post(shown):
    assert cards(shown) == [("0", "ok"), ("1", "degraded"), ("2", "ok")]
    assert "the image is a PDF document" in shown


def test_the_browser_marks_the_entities_behind_emoji(shown):
    # An astronaut is one grapheme, three code points and five UTF-16 units.
    marks = re.findall(r"<mark[^>]*>([^<]*)<small> ([^<]*)</small></mark>", shown)
    assert marks[:3] == [("New York", "city"), ("NASA", "government agency"), ("Paris", "city")]
    assert marks[3] == ("Paris", "missed: country")


def test_the_browser_draws_boxes_in_the_originals_pixels(shown):
    assert 'viewBox="0 0 400 200"' in shown
    assert re.search(r'<rect x="100" y="50" width="200" height="100" class="box"', shown)
    assert re.search(r'<rect x="110" y="50" width="190" height="100" class="gold"', shown)


def test_the_browser_runs_nothing_of_a_hostile_post(shown):
    assert "<title>gem-ray gallery</title>" in shown
    body = shown[: shown.index('<script type="application/json"')]
    assert "<img src=x" not in body
    assert html.escape("<img src=x onerror=alert(1)>", quote=False) in body


@in_browser
@pytest.mark.parametrize(
    ("fragment", "expected"),
    [
        ("#status=degraded", ["1"]),
        ("#grounded=unjudged", ["1", "2"]),
        ("#grounded=absent", ["0"]),  # the mention that the system missed in the other has no judgement of its own
        ("#post=degraded", ["1"]),
        ("#coarse=location,organization&grounded=absent&verdict=category&q=nasa", ["0"]),
    ],
)
def test_the_address_sets_the_filters(tmp_path, fragment, expected):
    assert [position for position, _ in cards(dom(write(tmp_path / "g.html"), tmp_path, fragment))] == expected


@in_browser
def test_posts_with_low_confidence_come_first_and_each_leads_to_its_row(tmp_path):
    def post(number, score, confidence=None):
        entity = mention("Paris", "Paris", score=score, confidence=confidence)
        return Post(f"p{number}", "Paris", entities=[entity], row_id=2**32 + number)

    posts = [post(0, 0.9), post(1, 0.2, 0.8), post(2, 0.7), Post("none", "nothing", row_id=9)]
    path = write(tmp_path / "g.html", posts, images={}, gold=None, annotations="out/annotations")
    page = dom(path, tmp_path)
    assert [position for position, _ in cards(page)] == ["2", "1", "0", "3"]
    assert 'href="#post=p2"' in page
    assert "file 1, row 2" in page
    page = dom(path, tmp_path, "#post=p2")
    assert [position for position, _ in cards(page)] == ["2"]
    assert "WHERE row_id = 4294967298" in page
    shown = html.unescape(re.search(r'<pre[^>]*aria-label="Output row">(.*?)</pre>', page, re.DOTALL).group(1))
    assert Post.from_annotation(json.loads(shown)) == posts[2]


@in_browser
def test_the_browser_makes_cards_only_as_they_are_needed(tmp_path):
    posts = [Post(f"p{i}", f"text {i}") for i in range(2000)]
    page = dom(write(tmp_path / "g.html", posts, images={}, gold=None), tmp_path)
    assert 24 <= len(cards(page)) < 200
    assert "2,000 posts" in page

"""Pages and reports in a real browser: readable by everybody at any width, light, dark, in high contrast and print."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gem_ray.evaluation.error_report import write_error_report
from gem_ray.evaluation.errors import find_errors
from gem_ray.evaluation.gallery import write_gallery
from gem_ray.evaluation.metrics import evaluate
from gem_ray.look.pages import colour, page, tenths
from gem_ray.pipeline.account import PoolTime
from gem_ray.records import Box, Candidate, Entity, GoldEntity, Post, ProblemKind

HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)> \u202eباريس 👩‍🚀 " + "w" * 300
PAGES = ["gallery", "errors", "report"]


def mention(text: str, name: str, fine: str, coarse: str, **fields) -> Entity:
    start = text.index(name)
    return Entity(name, start, start + len(name), 0, 0, coarse, fine, **fields)


def hostile_post() -> Post:
    post = Post(f"id {HOSTILE}", HOSTILE, caption=HOSTILE, row_id=1)
    post.entities = [mention(HOSTILE, "باريس", "city", "location", score=0.2, reranked=True)]
    post.entities.append(mention(HOSTILE, "w" * 300, "event_other", "event", score=0.9))
    post.fail("load_image", ProblemKind.IMAGE_UNREADABLE, HOSTILE)
    return post


def post_of_forty() -> Post:
    names = [f"Name{number} of Somewhere" for number in range(40)]
    text = ", ".join(names)
    kinds = [("musician", "person"), ("sports_team", "organization"), ("city", "location"), ("event_other", "event")]
    entities = [
        mention(
            text, name, *kinds[number % 4], score=0.3 + number / 80, seen=[True, False, None][number % 3],
            box=Box(8 * number, 5 * number, 40 + 8 * number, 30 + 5 * number) if number % 3 == 0 else None,
            candidates=[Candidate("city", 0.6), Candidate("event_other", 0.4)],
        )
        for number, name in enumerate(names)
    ]  # fmt: skip
    gold = [GoldEntity(3 * n, 3 * n + 3, "musician", (Box(4, 4, 60, 40),) if n % 2 else ()) for n in range(20)]
    return Post("forty", text, text.split(), entities=entities, gold=gold, image_width=400, image_height=300)


def run_facts() -> dict:
    example = {"post_id": HOSTILE, "status": "degraded", "stage": "load_image", "message": HOSTILE, "text": HOSTILE}
    pool = PoolTime(actors=2, loading=1.5, busy=9.5, idle=1.0).to_dict()
    return {
        "run_id": "run-7", "input": "s3://" + "long/" * 60, "output": "out", "started_at": "today", "annotated": 9,
        "seconds": 3.0, "rows_per_second": 3.0, "rows": 9, "statuses": {"ok": 7, "degraded": 1, "rejected": 1},
        "entities": 20, "grounded": 8, "not_judged": 4, "reranked_share": 0.25, "accepted_share": None,
        "problems": {"image_unreadable": 1}, "examples": {"image_unreadable": [example]},
        "confidences": [0, 0, 1, 2, 3, 1, 2, 3, 4, 4], "unread": [{"file": HOSTILE, "reason": HOSTILE, "rows": None}],
        "left_out": [{"files": 3, "examples": [HOSTILE], "reason": "no input"}], "models": {"tagger": "m" * 200},
        "account": {
            "seconds": 5, "starts": 1, "annotated": 9, "money": 0.1, "unpriced_starts": 0,
            "per_thousand_posts": {"money": 11.0}, "written_bytes": 1e6, "bottleneck": "text",
            "stage_seconds": {"load_image": 1.0, "tag": 8.0},
            "pools": {"text": pool}, "stage_counts": {"knowledge": {"from_cache": 3}},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    forty = post_of_forty()
    buffer = io.BytesIO()
    Image.fromarray(np.full((300, 400, 3), 90, np.uint8)).save(buffer, "PNG")
    images = {"forty": buffer.getvalue()}
    many = [Post(f"p{n}", f"text {n}", row_id=n) for n in range(1000)]
    gold = {"forty": forty.gold or []}
    report = evaluate([forty], [forty])
    write_gallery([forty, hostile_post(), *many], folder / "gallery.html", images=images, gold=gold, report=report,
                  facts={HOSTILE: HOSTILE}, gamma=0.2, annotations="out/annotations")  # fmt: skip
    write_error_report(find_errors([forty], [forty], training={"musician": 30}), folder / "errors.html", images=images)
    html = page("gem_ray.pipeline", "run_report.html.j2").render(title="Run run-7", run=run_facts())
    (folder / "report.html").write_text(html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.fixture
def show(browser, files: dict[str, Path]):
    """Opens a page of its own file; it may ask for nothing, and nothing in it may break its policy."""
    contexts, asked, complaints = [], [], []

    def show(name: str, width: int, **options):
        viewport = {"width": width, "height": 900}
        context = browser.new_context(viewport=viewport, reduced_motion="reduce", offline=True, **options)
        contexts.append(context)
        shown = context.new_page()
        shown.on("request", lambda request: asked.append(request.url))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("dialog", lambda dialog: complaints.append(dialog.message))
        shown.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        shown.goto(files[name].as_uri())
        return shown

    yield show
    for context in contexts:
        context.close()
    assert {url for url in asked if not url.startswith(("file:", "data:"))} == set()
    assert complaints == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1440, "dark"), (390, "light")])
def test_pages_are_accessible_and_as_wide_as_the_screen(show, name: str, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    shown = show(name, width, color_scheme=scheme)
    assert shown.title() != "pwned"
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(shown).response["violations"]
    assert [(each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in found] == []


@pytest.mark.parametrize("name", PAGES)
def test_high_contrast_keeps_bars_and_points(show, name: str) -> None:
    shown = show(name, 1440, forced_colors="active")
    colours = shown.locator(".meter i, .track b").evaluate_all(
        "nodes => nodes.filter(node => node.checkVisibility()).map(node => getComputedStyle(node).backgroundColor)"
    )
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours
    assert ground not in colours


@pytest.mark.parametrize("name", PAGES)
def test_print_is_dark_on_white_without_controls(show, name: str) -> None:
    shown = show(name, 760, color_scheme="dark")
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.evaluate("document.documentElement.scrollWidth") <= 760
    assert shown.locator("#theme:visible, .skip:visible, nav:visible").count() == 0


def test_categories_are_written_as_people_write_them(files: dict[str, Path]) -> None:
    for name in ("errors", "report"):
        text = files[name].read_text(encoding="utf-8")
        assert "event_other" not in text
        assert ">image unreadable<" in text or name == "errors"


def test_the_gallery_names_what_it_found_in_a_row_for_each_mention(show) -> None:
    shown = show("gallery", 1440)
    first = shown.locator("article").first
    assert "باريس" in first.inner_text()  # the least sure of all
    forty = shown.locator("article", has=shown.locator("code", has_text="forty"))
    assert forty.locator("button.mention").count() == 40
    assert forty.locator(".tag").count() == 14
    frame, picture = forty.locator(".picture").bounding_box(), forty.locator("img").bounding_box()
    assert picture["height"] <= frame["height"] + 1  # all of it can be seen
    assert picture["width"] / picture["height"] == pytest.approx(400 / 300, rel=0.02)
    forty.locator("button.mention").nth(3).hover()
    assert "IoU" in shown.inner_text("#tip")


@pytest.mark.parametrize("width", [1440, 390])
def test_labels_are_over_no_other_and_one_without_room_waits_until_its_mention_is_chosen(show, width: int) -> None:
    shown = show("gallery", width)
    forty = shown.locator("article", has=shown.locator("code", has_text="forty"))
    forty.scroll_into_view_if_needed()
    boxes = [label.bounding_box() for label in forty.locator(".tag:visible").all()]
    assert 0 < len(boxes) < forty.locator(".tag").count()
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            apart = [abs(one[a] - other[a]) >= (one if one[a] < other[a] else other)[b] - 1
                     for a, b in (("x", "width"), ("y", "height"))]  # fmt: skip
            assert any(apart)
    waiting = forty.locator(".tag.covered").first
    forty.locator(f"button.mention[data-mention='{waiting.get_attribute('data-mention')}']").hover()
    assert waiting.is_visible()


def test_what_the_theme_lacks_is_named() -> None:
    assert colour("ink").startswith("#")
    with pytest.raises(KeyError, match="pink"):
        colour("pink")


def test_tenths_are_named_by_their_ends() -> None:
    names = [name for name, _ in tenths(range(10))]
    assert (names[0], names[-1]) == ("0.0 – 0.1", "0.9 – 1.0")

"""What the page says when something is refused, broken, busy or gone; the post is never lost."""

import json

import pytest


def refuse(page, status, problem=None, headers=None, body=None, times=None):
    page.route(
        "**/v1/annotate*",
        lambda route: route.fulfill(
            status=status,
            headers={"Content-Type": "application/problem+json"} | (headers or {}),
            body=body or json.dumps({"status": status, "title": "Refused", "detail": problem}),
        ),
        times=times,
    )


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (413, "more than this service takes"),
        (422, "cannot be annotated as it is"),
        (500, "Something went wrong in the service"),
        (503, "not ready"),
    ],
)
def test_refusals_are_explained_and_the_post_is_kept(page, status, words, annotate):
    refuse(page, status, problem="the reason <b>why</b>", times=1)
    page.fill("#text", "Paris")
    page.press("#text", "Control+Enter")
    page.locator("#error .notice").wait_for()
    shown = page.inner_text("#error")
    assert words in shown
    assert "the reason <b>why</b>" in shown
    assert page.input_value("#text") == "Paris"
    annotate(page)
    assert page.inner_text("#error") == ""
    assert page.locator("mark", has_text="Paris").count() == 1


def test_a_proxys_error_page_is_no_riddle(page):
    refuse(page, 502, headers={"Content-Type": "text/html"}, body="<h1>Bad gateway</h1>")
    page.fill("#text", "Paris")
    page.press("#text", "Control+Enter")
    page.locator("#error", has_text="Something went wrong in the service").wait_for()


def test_a_busy_service_says_when_to_come_back(page):
    refuse(page, 429, problem="64 requests are waiting", headers={"Retry-After": "2"}, times=1)
    page.fill("#text", "Paris")
    page.press("#text", "Control+Enter")
    page.locator("#error", has_text="try again in 2 seconds").wait_for()
    page.locator("#error", has_text="You can try again now.").wait_for()
    page.get_by_role("button", name="Try again").click()
    page.locator("mark").wait_for()
    assert page.locator("mark").count() == 1


def test_a_service_with_keys_asks_for_one(page):
    def ask(route):
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, content_type="application/problem+json", body='{"title": "Unauthorized"}')

    page.route("**/v1/annotate*", ask)
    page.fill("#text", "Paris")
    page.press("#text", "Control+Enter")
    page.get_by_label("API key").wait_for()
    assert "asks for an API key" in page.inner_text("#error")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    page.locator("#error", has_text="does not know this API key").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"
    page.fill("#key", "sesame")
    page.keyboard.press("Enter")
    page.locator("mark", has_text="Paris").wait_for()
    assert page.get_by_label("API key").is_hidden()


def test_what_can_be_no_key_is_explained(page):
    refuse(page, 401)
    page.fill("#text", "Paris")
    page.press("#text", "Control+Enter")
    page.get_by_label("API key").wait_for()
    page.keyboard.type("ключ")
    page.keyboard.press("Enter")
    page.locator("#error", has_text="cannot be an API key").wait_for()
    assert page.evaluate("document.activeElement.id") == "key"


def test_an_example_that_is_not_there_is_explained(page):
    page.fill("#text", "mine")
    page.route("**/*.jpg", lambda route: route.abort())
    page.locator(".example:has(img)").first.click()
    page.locator("#error", has_text="The service does not answer").wait_for()
    assert page.input_value("#text") == "mine"
    assert page.get_by_role("button", name="Try again").count() == 0


def test_a_lost_network_is_explained_and_the_request_can_be_repeated(page):
    page.context.set_offline(True)
    page.fill("#text", "Paris")
    page.press("#text", "Control+Enter")
    page.locator("#error", has_text="The service does not answer").wait_for()
    page.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    page.locator("mark", has_text="Paris").wait_for()
    assert page.inner_text("#error") == ""


def test_a_file_that_has_gone_since_it_was_chosen_is_no_lost_network(page, files, tmp_path, annotate):
    image = tmp_path / "image.jpg"
    image.write_bytes((files / "gen-7-000197.jpg").read_bytes())
    page.set_input_files("#file", image)
    page.locator("#file-name", has_text="image.jpg").wait_for()
    image.unlink()
    page.fill("#text", "Paris")
    page.press("#text", "Control+Enter")
    page.locator("#error", has_text="The image cannot be read").wait_for()
    assert page.get_by_role("button", name="Try again").count() == 0
    page.click("#remove")
    assert annotate(page, "Paris")["status"] == "degraded"


def test_what_would_be_refused_is_not_sent(page):
    sent = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    page.click("#annotate")
    page.locator("#error", has_text="Write a post first").wait_for()
    assert page.evaluate("document.activeElement.id") == "text"
    limits = page.request.get(f"{page.url}v1/limits").json()
    page.fill("#text", "🏆" * (limits["max_text_chars"] + 1))
    assert "characters, 1 too many" in page.inner_text("#length")
    page.click("#annotate")
    page.locator("#error", has_text="The post is too long").wait_for()
    large = b"\0" * (min(limits["max_image_bytes"], limits["max_body_bytes"]) + 1)
    page.set_input_files("#file", {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": large})
    page.locator("#remove").wait_for()
    page.fill("#text", "Paris")
    page.click("#annotate")
    page.locator("#error", has_text="The image is too large").wait_for()
    assert sent == []


def test_an_unreadable_image_leaves_the_text_annotated(page, annotate):
    annotate(page, "Paris in spring", b"\xff\xd8\xff\xe0 broken")
    assert "cannot show it" in page.inner_text("#file-name")
    assert "could not be read" in page.inner_text(".problem")
    assert page.locator("mark", has_text="Paris").count() == 1


def test_a_request_can_be_cancelled(page, annotate):
    page.route("**/v1/annotate*", lambda route: None)
    page.fill("#text", "Paris")
    page.press("#text", "Control+Enter")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Annotate").wait_for()
    assert page.inner_text("#status") == "Cancelled."
    page.unroute("**/v1/annotate*")
    annotate(page)
    assert page.locator("mark").count() == 1

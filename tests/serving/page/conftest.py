"""The page in a real browser, in front of a real HTTP service with the embedded models."""

from pathlib import Path

import numpy as np
import pytest

from gem_ray.data.generated import make_post

PAGE = Path(__file__).parents[3] / "gem_ray" / "serving" / "page"


@pytest.fixture(scope="session")
def address(service):
    """Base URL of the service."""
    return f"{service.url}/"


@pytest.fixture
def visit(browser, address):
    """Opens the page; whatever a test does with it, it asks only its own service, and breaks no rule of its policy."""
    contexts, requested, complaints = [], [], []

    def open_page(**options):
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
        )
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if "Policy" in message.text else None)
        page.goto(address)
        page.locator(".taxonomy").wait_for()
        page.locator(".example").last.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [url for url in requested if not url.startswith(address)] == []
    assert complaints == []


@pytest.fixture
def page(visit):
    return visit()


@pytest.fixture(scope="session")
def files():
    """The folder of the page's files."""
    return PAGE


@pytest.fixture(scope="session")
def corpus_post():
    """Gives post `number` of the generated corpus of a seed."""
    return lambda number, seed=7: make_post(np.random.default_rng([seed, number]), f"gen-{seed}-{number:06d}")


@pytest.fixture(scope="session")
def post(corpus_post):
    """One with three boxes, of which two lie nearly over each other."""
    return corpus_post(3)


@pytest.fixture(scope="session")
def annotate():
    """Puts a post in, annotates it, and gives back the service's answer."""

    def annotate(page, text=None, image=None):
        if image is not None:
            page.set_input_files("#file", {"name": "post.jpg", "mimeType": "image/jpeg", "buffer": image})
            page.locator("#remove").wait_for()
        if text is not None:
            page.fill("#text", text)
        with page.expect_response("**/v1/annotate*") as response:
            page.press("#text", "Control+Enter")
        page.locator(".totals, #error .notice").first.wait_for()
        return response.value.json()

    return annotate

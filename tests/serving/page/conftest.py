"""The page in a real browser, in front of a real HTTP service with the embedded models."""

import base64
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Form, UploadFile
from fastapi.staticfiles import StaticFiles

from gem_ray.annotator import Annotator, models_of
from gem_ray.config import load_config
from gem_ray.data.generated import make_post
from gem_ray.data.prepare import post_from_row
from gem_ray.taxonomy import FMNERG

PAGE = Path(__file__).parents[3] / "gem_ray" / "serving" / "page"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
POLICY = "default-src 'self'; img-src 'self' blob: data:"
GAMMA = 0.4


def make_app():
    config = load_config(overrides=["grounder.matcher.save_heatmaps=true", f"filter.gamma={GAMMA}"])
    annotator, models, busy = Annotator.from_config(config), models_of(config), threading.Lock()
    app = FastAPI()

    @app.middleware("http")
    async def add_policy(request, call_next):
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    @app.get("/v1/taxonomy")
    def taxonomy():
        return {"labels": "fmnerg", "coarse": FMNERG.tree}

    @app.get("/v1/limits")
    def limits():
        return {
            "max_body_bytes": 10**6,
            "max_image_bytes": 10**6,
            "max_text_chars": config.text.max_chars,
            "gamma": GAMMA,
        }

    @app.post("/v1/annotate")
    def annotate(text: str = Form(), image: UploadFile | None = None):
        post = post_from_row({"post_id": "p", "text": text, "image": image.file.read() if image else None})
        with busy:
            before = [stage.seconds for stage in annotator.stages]
            annotator.annotate([post])
            seconds = {stage.name: stage.seconds - start for stage, start in zip(annotator.stages, before, strict=True)}
        row = post.annotation()
        for entity in row["entities"]:
            if entity["heatmap"]:
                entity["heatmap"]["data"] = base64.b64encode(entity["heatmap"]["data"]).decode()
        return row | {"run_id": "online-1", "models": models, "seconds": seconds, "gamma": GAMMA}

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


@pytest.fixture(scope="package")
def address():
    """Base URL of the service."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="package")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: the page is not driven")
    from playwright.sync_api import sync_playwright

    flags = ["gpu", "quic", "background-networking", "component-update", "sync", "extensions"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            chromium_sandbox=False,
            args=["--no-first-run", *(f"--disable-{flag}" for flag in flags)],
        )
        yield browser
        browser.close()


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

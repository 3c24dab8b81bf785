"""What the page shows of an answer: files, boxes, labels, heat maps, marks, numbers."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def test_the_examples_are_posts_of_the_generated_corpus(files, corpus_post):
    shown = [example for example in json.loads((files / "examples.json").read_text("utf-8")) if example["image"]]
    assert len(shown) >= 3
    for example in shown:
        seed, number = map(int, re.fullmatch(r"gen-(\d+)-(\d+)\.jpg", example["image"]).groups())
        made = corpus_post(number, seed)
        assert example["text"] == made.text
        assert (files / example["image"]).read_bytes() == made.image_bytes


def test_the_page_refers_to_its_own_files_only(files):
    shared = files.parents[1] / "look" / "static"
    for file in [*files.glob("*.*"), *shared.glob("*.*")]:
        if file.suffix in {".html", ".css", ".js"}:
            code = file.read_text(encoding="utf-8")
            assert not re.search(r"//[\w-]+\.\w|url\(|@import", code.replace("http://www.w3.org/", "")), file.name
    html = (files / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for name in re.findall(r'(?:src|href)="([^"#]+)"', html):
        assert (files / name).is_file() or (shared / name).is_file() or name == "openapi.json"


def rectangles(page, selector):
    script = "nodes => nodes.map(node => node.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])"
    return np.array(page.locator(selector).evaluate_all(script))


def test_boxes_lie_where_the_answer_says_at_any_size(page, annotate, post):
    answer = annotate(page, post.text, post.image_bytes)
    boxes = {i: entity["box"] for i, entity in enumerate(answer["entities"]) if entity["box"]}
    assert len(boxes) == 3
    for width, height in ((1280, 900), (390, 844), (820, 500)):
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(50)
        ((left, top, right, bottom),) = rectangles(page, "#pixels")
        assert (right - left) / (bottom - top) == pytest.approx(320 / 240, rel=0.01)
        scale = (right - left) / answer["image_width"]
        for number, box in boxes.items():
            expected = [
                left + scale * box["x1"],
                top + scale * box["y1"],
                left + scale * box["x2"],
                top + scale * box["y2"],
            ]
            (shown,) = rectangles(page, f"g[data-mention='{number}'] .box")
            np.testing.assert_allclose(shown, expected, atol=1)


def test_labels_stay_inside_the_image_and_off_each_other(page, annotate, post):
    annotate(page, post.text, post.image_bytes)
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(100)
        (stage,) = rectangles(page, "#stage")
        labels = rectangles(page, ".tag")
        assert len(labels) == 3
        assert (labels[:, :2] >= stage[:2] - 1).all()
        assert (labels[:, 2:] <= stage[2:] + 1).all()
        for i, one in enumerate(labels):
            for other in labels[i + 1 :]:
                overlap = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
                assert (overlap <= 0).any()


def test_photos_are_shown_upright_and_reduced(page, annotate):
    pixels = np.full((1500, 3000, 3), 90, np.uint8)
    pixels[300:600, 2400:2700] = (250, 20, 20)
    photo, stored = Image.fromarray(pixels), io.BytesIO()
    exif = photo.getexif()
    exif[0x0112] = 6  # what is stored must be turned by a quarter, clockwise
    photo.rotate(90, expand=True).save(stored, "JPEG", exif=exif)
    answer = annotate(page, "Paris in spring", stored.getvalue())
    assert (answer["image_width"], answer["image_height"]) == (3000, 1500)
    size, inside, outside = page.evaluate(
        """() => {
            const canvas = document.getElementById("pixels");
            const [width, height, context] = [canvas.width, canvas.height, canvas.getContext("2d")];
            const at = (x, y) => [...context.getImageData(x * width, y * height, 1, 1).data];
            return [[width, height], at(0.85, 0.3), at(0.3, 0.85)];
        }"""
    )
    assert size == [2048, 1024]
    assert inside[0] > 200 > 100 > inside[1]
    assert abs(outside[0] - outside[1]) < 10
    assert "3000 × 1500" in page.inner_text("#file-name")


def turned(post, kind, **options):
    """The image of a post as a phone stores it that was held sideways."""
    stored, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(post.image_bytes)).rotate(90, expand=True).save(stored, kind, exif=exif, **options)
    return stored.getvalue()


def test_boxes_lie_on_a_webp_as_browsers_show_it(page, annotate, post):
    """They take no notice of what its EXIF says about its sides."""
    answer = annotate(page, post.text, turned(post, "WEBP", lossless=True))
    assert (answer["image_width"], answer["image_height"]) == (240, 320)
    assert page.evaluate("document.getElementById('pixels').width") == 240


def test_boxes_lie_over_no_picture_that_the_browser_shows_turned_another_way(page, annotate, post):
    """Chromium reads this EXIF, which no standard allows."""
    answer = annotate(page, post.text, turned(post, "JPEG").replace(b"Exif\0\0", b"Exif\0\xff", 1))
    assert (answer["image_width"], answer["image_height"]) == (240, 320)
    assert page.evaluate("document.getElementById('pixels').width") == 1
    assert "turns it another way" in page.inner_text("#file-name")
    assert page.locator("[data-download='annotation.png']").count() == 0


def test_an_image_that_is_decoded_late_does_not_replace_one_that_was_chosen_after_it(page):
    page.evaluate(
        """() => {
            const decode = window.createImageBitmap.bind(window);
            window.createImageBitmap = async (file) => {
                if (file.name === "slow.png") await new Promise((done) => setTimeout(done, 500));
                return decode(file);
            };
        }"""
    )
    for name, width in (("slow.png", 300), ("quick.png", 100)):
        data = io.BytesIO()
        Image.new("RGB", (width, 50)).save(data, "PNG")
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data.getvalue()})
    page.locator("#file-name", has_text="quick.png, 100 × 50").wait_for()
    page.wait_for_timeout(800)
    assert page.evaluate("document.getElementById('pixels').width") == 100
    assert "quick.png" in page.inner_text("#file-name")


def test_the_heat_map_of_the_chosen_entity_lies_over_the_image(page, annotate, post):
    answer = annotate(page, post.text, post.image_bytes)
    assert page.locator(".heated").count() == 0
    page.locator(".mention").nth(2).click()
    assert page.locator(".heated").count() == 1
    heat = answer["entities"][2]["heatmap"]
    values = np.frombuffer(base64.b64decode(heat["data"]), np.uint8).reshape(heat["height"], heat["width"])
    shown = page.evaluate(
        """() => {
            const canvas = document.getElementById("heat");
            const [width, height, context] = [canvas.width, canvas.height, canvas.getContext("2d")];
            return [height, width, [...context.getImageData(0, 0, width, height).data]];
        }"""
    )
    alpha = np.array(shown[2]).reshape(shown[0], shown[1], 4)[..., 3]
    assert alpha.shape == values.shape
    assert np.unravel_index(alpha.argmax(), alpha.shape) == np.unravel_index(values.argmax(), values.shape)
    page.mouse.move(5, 5)
    page.keyboard.press("Escape")
    assert page.locator(".heated").count() == 0


def test_marks_are_right_behind_emoji(page, annotate):
    # An astronaut is one grapheme, three code points and five UTF-16 units.
    text = "👩‍🚀🏆 Taylor Swift lands in New York 🎤🎸 and meets Google & <b>NASA</b>"
    answer = annotate(page, text)
    names = [entity["text"] for entity in answer["entities"]]
    assert {"Taylor Swift", "New York"} <= set(names)
    assert page.locator("mark").evaluate_all("marks => marks.map(mark => mark.firstChild.data)") == names
    page.locator("mark small").evaluate_all("notes => notes.forEach(note => note.remove())")
    assert page.locator(".text").evaluate("node => node.textContent") == text


def test_the_inspector_says_what_the_answer_says(page):
    with page.expect_response("**/v1/annotate*") as response:
        page.locator(".example").first.click()
    page.locator(".totals").wait_for()
    entities, gamma = response.value.json()["entities"], response.value.json()["gamma"]
    assert page.input_value("#text") == page.inner_text(".example >> nth=0")
    assert any(entity["reranked"] for entity in entities)
    for number, entity in enumerate(entities):
        page.locator(".mention").nth(number).hover()
        panel = page.inner_text("#inspector")
        for candidate in entity["candidates"]:
            assert f"{candidate['probability']:.3f}" in panel
        for key in ("entropy", "score", "match_score", "box_score"):
            assert f"{entity[key]:.3f}" in panel
        assert ("so the reranker looked at the image" in panel) == entity["reranked"]
        assert entity["box_source"] in panel
    line = page.locator("#inspector .gauge b").bounding_box()
    bar = page.locator("#inspector .gauge .meter").bounding_box()
    full = max(3 * gamma, entities[-1]["entropy"])
    assert line["x"] + line["width"] / 2 - bar["x"] == pytest.approx(bar["width"] * gamma / full, abs=1.5)


def test_times_models_and_the_answer_are_there_to_see_and_copy(visit, annotate):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    answer = annotate(page, "Paris in spring")
    assert [row.split("\n")[0] for row in page.locator("#times li").all_inner_texts()] == [
        stage.replace("_", " ") for stage in answer["seconds"]
    ]
    for model in answer["models"]:
        assert model["reference"] in page.inner_text("#facts")
    page.get_by_text("JSON", exact=True).click()
    page.get_by_role("button", name="Copy: JSON").click()
    page.get_by_text("Copied.").wait_for()
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == answer


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_curl_command_gives_the_same(page, tmp_path, annotate, post):
    text = f"@home 'quoted' \"twice\" $HOME {post.text}"
    answer = annotate(page, text, post.image_bytes)
    page.get_by_text("The same with curl").click()
    command = page.inner_text("[aria-label='The same with curl'] code")
    (tmp_path / "post.jpg").write_bytes(post.image_bytes)
    run = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(run.stdout)["text"] == text
    assert json.loads(run.stdout)["entities"][0]["box"] == answer["entities"][0]["box"]


def test_the_python_code_gives_the_same_with_caption_knowledge_and_tokens(page, tmp_path, annotate):
    text = "@home 'quoted' \"twice\" \\n Paris 🏆"
    page.get_by_text("Caption, knowledge, words").click()
    page.fill("#caption", "a tower")
    page.fill("#knowledge", "Paris is a city.\nIn France.")
    page.fill("#tokens", " ".join(text.split()))
    answer = annotate(page, text)
    assert (answer["caption"], answer["knowledge"]) == ("a tower", "Paris is a city.\nIn France.")
    assert answer["tokens"] == text.split()
    page.get_by_text("The same with Python").click()
    code = page.locator("[aria-label='The same with Python'] code").inner_text()
    client = Path(__file__).parents[3] / "client"
    command = [sys.executable, "-c", f"{code}\nprint(annotation.tokens == {text.split()!r}, annotation.caption)"]
    env = os.environ | {"PYTHONPATH": str(client)}
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=True)
    lines = run.stdout.splitlines()
    assert lines[-1] == "True a tower"
    assert len(lines) == 1 + len(answer["entities"]) > 1
    assert all(line.startswith(entity["text"]) for line, entity in zip(lines, answer["entities"], strict=False))


def test_a_small_box_can_be_looked_at_closely(page, annotate, post):
    def small(route):
        answer = route.fetch().json()
        answer["entities"][0]["box"] = {"x1": 300, "y1": 200, "x2": 312, "y2": 208}
        route.fulfill(json=answer)

    page.route("**/v1/annotate*", small)
    annotate(page, post.text, post.image_bytes)
    page.locator(".mention").first.click()
    page.get_by_role("button", name="Zoom in").click()
    (window,), (box,) = rectangles(page, "#window"), rectangles(page, "g[data-mention='0'] .box")
    assert (box[:2] >= window[:2] - 1).all()
    assert (box[2:] <= window[2:] + 1).all()
    assert (box[2:] - box[:2]).max() > 0.4 * (window[2] - window[0])
    page.get_by_role("button", name="Zoom in").click()
    (box,) = rectangles(page, "g[data-mention='0'] .box")
    assert (box[2:] - box[:2]).max() < 0.1 * (window[2] - window[0])


def test_the_picture_is_saved_with_its_boxes(page, annotate, post, tmp_path):
    answer = annotate(page, post.text, post.image_bytes)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download picture").click()
    download.value.save_as(tmp_path / "annotation.png")
    shown = np.asarray(Image.open(tmp_path / "annotation.png").convert("RGB")).astype(int)
    original = np.asarray(Image.open(io.BytesIO(post.image_bytes)).convert("RGB")).astype(int)
    assert shown.shape == original.shape
    for entity in answer["entities"]:
        box = {name: int(value) for name, value in entity["box"].items()}
        middle = (box["y1"] + box["y2"]) // 2
        assert abs(shown[middle, box["x1"]] - original[middle, box["x1"]]).max() > 40


def test_a_picture_that_this_browser_cannot_show_is_not_offered(page, annotate, post):
    """As a TIFF is in most of them, which the service reads."""
    data = io.BytesIO()
    Image.open(io.BytesIO(post.image_bytes)).save(data, "TIFF")
    answer = annotate(page, post.text, data.getvalue())
    assert answer["image_width"]
    page.get_by_role("button", name="Download JSON").wait_for()
    assert page.get_by_role("button", name="Download picture").count() == 0


def test_what_is_saved_is_there_long_after_the_click(page, annotate):
    annotate(page, "Paris in spring")
    page.evaluate("URL.revokeObjectURL = (url) => { window.revoked = url; }")
    with page.expect_download():
        page.get_by_role("button", name="Download JSON").click()
    assert page.evaluate("window.revoked") is None

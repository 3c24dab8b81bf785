"""Ways in, and the page for everyone: mouse, keyboard, touch, screen reader, light and dark."""

import base64
import re

import pytest
from axe_playwright_python.sync_playwright import Axe


def transfer(page, kind, target, image=None, text=None):
    """A drop or paste event that brings a file or a text."""
    page.evaluate(
        """([kind, target, image, text]) => {
            const data = new DataTransfer();
            if (image) {
                const bytes = Uint8Array.from(atob(image), (character) => character.charCodeAt(0));
                data.items.add(new File([bytes], "dropped.jpg", { type: "image/jpeg" }));
            }
            if (text) data.setData("text/uri-list", text);
            const options = { bubbles: true, cancelable: true };
            const event = kind === "paste"
                ? new ClipboardEvent(kind, { ...options, clipboardData: data })
                : new DragEvent(kind, { ...options, dataTransfer: data });
            document.querySelector(target).dispatchEvent(event);
        }""",
        [kind, target, image and base64.b64encode(image).decode(), text],
    )


@pytest.mark.parametrize(("kind", "target"), [("drop", "main"), ("paste", "#text")])
def test_an_image_can_be_dropped_or_pasted(page, kind, target, annotate, post):
    transfer(page, kind, target, post.image_bytes)
    page.locator("#file-name", has_text="dropped.jpg, 320 × 240").wait_for()
    assert annotate(page, post.text)["image_width"] == 320


def choose(page, file):
    """As a person does: the browser itself decides whether that is a change."""
    browser = page.context.new_cdp_session(page)
    root = browser.send("DOM.getDocument")["root"]["nodeId"]
    node = browser.send("DOM.querySelector", {"nodeId": root, "selector": "#file"})
    browser.send("DOM.setFileInputFiles", {"files": [str(file)], **node})


def test_the_same_file_can_be_chosen_after_another_was_dropped(page, files, post):
    for _ in range(2):
        choose(page, files / "gen-7-000197.jpg")
        page.locator("#file-name", has_text="gen-7-000197.jpg").wait_for()
        transfer(page, "drop", "main", post.image_bytes)
        page.locator("#file-name", has_text="dropped.jpg").wait_for()


def hold(page, requests):
    """Keeps a request; what is given back waits until it comes."""
    held = []
    page.route(requests, lambda route: held.append(route))

    def wait():
        while not held:
            page.wait_for_timeout(10)
        return held[0]

    return wait


def test_a_double_click_annotates(page):
    held = hold(page, "**/v1/annotate*")
    page.fill("#text", "Paris")
    page.dblclick("#annotate")
    held().continue_()
    page.locator("mark", has_text="Paris").wait_for()


def test_an_example_that_comes_late_does_not_replace_what_was_written_meanwhile(page):
    held = hold(page, "**/*.jpg")
    page.locator(".example:has(img)").first.click()
    route = held()
    page.fill("#text", "mine")
    with page.expect_response("**/*.jpg"):
        route.continue_()
    page.wait_for_timeout(200)
    assert page.input_value("#text") == "mine"
    assert page.inner_text("#file-name") == ""


def test_a_dropped_link_is_not_fetched_but_explained(page):
    transfer(page, "drop", "main", text="https://example.org/photo.jpg")
    assert "save the image" in page.inner_text("#error")


def test_another_image_takes_the_old_result_away(page, corpus_post, annotate, post):
    annotate(page, post.text, post.image_bytes)
    page.set_input_files("#file", {"name": "b.jpg", "mimeType": "image/jpeg", "buffer": corpus_post(4).image_bytes})
    page.locator("#file-name", has_text="b.jpg").wait_for()
    assert page.locator(".box, .totals, #times li").count() == 0
    page.get_by_role("button", name="Remove the image").click()
    assert page.locator("#stage").is_hidden()
    assert annotate(page)["image_width"] is None
    assert "There is no image" in page.inner_text("#result")


def test_everything_can_be_done_with_the_keyboard(page):
    def tab_to(selector):
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"the Tab key never comes to {selector}")

    tab_to(".skip")
    tab_to(".example")
    page.keyboard.press("Enter")
    page.locator(".mention").first.wait_for()
    tab_to("#file")
    tab_to("#text")
    page.keyboard.press("Control+A")
    page.keyboard.type("so this is Halcyon and Taylor Swift in Paris")
    page.locator("#status", has_text="entities").wait_for()
    with page.expect_response("**/v1/annotate*") as response:
        page.keyboard.press("Control+Enter")
    names = [entity["text"] for entity in response.value.json()["entities"]]
    assert len(names) >= 2
    page.locator(".mention", has_text=names[-1]).wait_for()
    assert page.evaluate("document.activeElement.id") == "text"
    tab_to(".mention")
    for key, chosen in (("ArrowDown", 1), ("End", len(names) - 1), ("ArrowDown", 0), ("ArrowUp", len(names) - 1)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.id") == f"mention-{chosen}"
        assert page.locator("[aria-selected='true']").count() == 1
        assert page.locator("#inspector").get_attribute("aria-labelledby") == f"mention-{chosen}"
        assert names[chosen] in page.inner_text("#inspector")
    tab_to("#inspector")
    tab_to("summary")
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1


# Each piece of text that is seen, its ratio of contrast (WCAG 2.2) to the background under it, where that is a colour.
CONTRASTS = """() => {
    const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const over = (colors) => {  // composed from the lowest to the highest
        context.clearRect(0, 0, 1, 1);
        for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (rgb) => {
        const [r, g, b] = rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
        if (node.closest(".unseen, .skip, noscript")) continue;
        const backgrounds = [];
        for (let up = node; up; up = up.parentElement) backgrounds.unshift(getComputedStyle(up).backgroundColor);
        const below = luminance(over(backgrounds));
        const above = luminance(over([...backgrounds, getComputedStyle(node).color]));
        found.push([walker.currentNode.data.trim(), (Math.max(above, below) + 0.05) / (Math.min(above, below) + 0.05)]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out(visit, scheme, annotate, post):
    page = visit(color_scheme=scheme)
    contrasts = page.evaluate(CONTRASTS)
    text = (
        "Taylor Swift of Google won an Oscar for Titanic at the Super Bowl in Paris, spent the afternoon in the "
        "galleries of Lantern Museum, stuck on the boss in Starhold, the chorus of Blue Static is stuck in my head"
    )
    entities = annotate(page, text)["entities"]
    assert len({entity["coarse"] for entity in entities}) >= 7
    for number in range(len(entities)):
        page.locator(".mention").nth(number).click()
        contrasts += page.evaluate(CONTRASTS)
    page.fill("#text", " ")
    page.click("#annotate")
    page.locator("#error .notice").wait_for()
    contrasts += page.evaluate(CONTRASTS)
    annotate(page, post.text, post.image_bytes)
    contrasts += page.evaluate(CONTRASTS)
    assert len(contrasts) > 400
    assert {text for text, ratio in contrasts if ratio < 4.5} == set()


def test_assistive_technology_finds_its_way(page, annotate, post):
    first = annotate(page, post.text, post.image_bytes)["entities"][0]
    assert first["text"] == "Wexmoor Tech"
    score = f"{100 * first['score']:.0f}%"
    tree = page.locator("body").aria_snapshot()
    for line in (
        '- link "Skip to the result"',
        '- heading "gem-ray" [level=1]',
        '- region "Try one"',
        '- button "Choose an image"',
        '- img "The post’s image"',
        '- button "Remove the image"',
        '- textbox "Post"',
        '- button "Annotate"',
        '- region "Result"',
        '- tablist "Entities"',
        f'- tab "Wexmoor Tech educational institution {score} seen in the image" [selected]',
        f'- tabpanel "Wexmoor Tech educational institution {score} seen in the image"',
        '- region "Models"',
    ):
        assert line in tree
    assert not re.search(r"- (button|link|textbox|img|tab|tabpanel)(:| *$)", tree, re.MULTILINE)  # one without a name
    assert "3 entities, 3 seen in the image" in page.inner_text("#status")


@pytest.mark.parametrize("width", [320, 390, 820])
def test_nothing_sticks_out_sideways(visit, width, annotate, post):
    page = visit(viewport={"width": width, "height": 844}, has_touch=True)
    annotate(page, post.text + " " + "w" * 200, post.image_bytes)
    page.locator(".mention").first.tap()
    assert page.locator(".heated").count() == 1
    page.locator("summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_at_400_percent_the_picture_does_not_cover_what_is_read(visit, annotate, post):
    """320 × 256 pixels: WCAG 2.2, 1.4.10."""
    page = visit(viewport={"width": 320, "height": 256})
    annotate(page, post.text, post.image_bytes)
    page.locator(".mention").last.scroll_into_view_if_needed()
    assert page.locator(".pictured").evaluate("node => node.getBoundingClientRect().bottom") < 128


@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1440)])
def test_axe_finds_nothing(visit, scheme, width, annotate, post):
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 900})
    violations = []
    for state in ("empty", "annotated", "refused"):
        if state == "annotated":
            annotate(page, post.text, post.image_bytes)
        elif state == "refused":
            page.fill("#text", " ")
            page.click("#annotate")
            page.locator("#error .notice").wait_for()
        found = Axe().run(page).response["violations"]
        violations += [(state, each["id"], [node["html"] for node in each["nodes"]]) for each in found]
    assert violations == []


def test_high_contrast_keeps_bars(visit, annotate, post):
    page = visit(forced_colors="active")
    annotate(page, post.text, post.image_bytes)
    colours = page.locator(".meter i").evaluate_all(
        "nodes => nodes.map((node) => getComputedStyle(node).backgroundColor)"
    )
    assert len(colours) > 8
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") not in colours

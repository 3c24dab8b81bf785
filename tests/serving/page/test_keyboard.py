"""The page without a pointer, and with more entities than fit on a screen."""

import json


def tab_to(page, selector, most=40):
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not in the tab order")


def test_from_an_empty_page_to_a_downloaded_result(page, post, tmp_path):
    with page.expect_file_chooser() as chooser:
        tab_to(page, "#file")  # inside: the browser is told to report choosers only a moment after `expect` returns
        page.keyboard.press("Enter")
    chooser.value.set_files({"name": "post.jpg", "mimeType": "image/jpeg", "buffer": post.image_bytes})
    page.locator("#remove").wait_for()
    tab_to(page, "#text")
    page.keyboard.type(post.text)
    with page.expect_response("**/v1/annotate*") as response:
        page.keyboard.press("Control+Enter")
    page.locator(".totals").wait_for()
    tab_to(page, "[data-download]")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename == "annotation.json"
    download.value.save_as(tmp_path / "annotation.json")
    assert json.loads((tmp_path / "annotation.json").read_text("utf-8")) == response.value.json()


def test_the_details_stay_on_the_screen_beside_forty_entities(page, annotate):
    names = [f"Paris{number}" for number in range(40)]
    changed_answer(page, lambda entity: [entity | {"text": name} for name in names])
    annotate(page, "Paris")
    assert page.locator(".mention").count() == 40
    for key in ("Home", "End"):
        page.locator(".mention[aria-selected=true]").press(key)
        top, bottom = page.locator("#inspector").evaluate(
            "node => [node.getBoundingClientRect().top, node.getBoundingClientRect().bottom]"
        )
        assert 0 <= top < bottom <= page.viewport_size["height"]
        chosen = page.locator(".mention[aria-selected=true]")
        assert chosen.evaluate("node => node.checkVisibility() && node === document.activeElement")


def test_repeats_are_one_row_and_each_can_be_reached(page, annotate):
    def twice_and_another(entity):
        second = entity | {"start": 10, "end": 15, "score": 0.25, "confidence": None}
        return [entity | {"score": 0.75, "confidence": None}, second, entity | {"text": "Lyon", "start": 20, "end": 24}]

    changed_answer(page, twice_and_another)
    annotate(page, "Paris and Paris and Lyon")
    assert page.locator(".mention").count() == 2
    row = page.locator(".mention").first
    assert "2 times" in row.inner_text()
    assert "25–75%" in row.inner_text()
    row.press("Home")
    assert page.locator("mark.active").count() == 2
    assert "1 of 2 mentions" in page.inner_text("#inspector")
    tab_to(page, "[data-turn='1']")
    page.keyboard.press("Enter")
    assert "2 of 2 mentions" in page.inner_text("#inspector")
    assert "0.250" in page.inner_text("#inspector")
    assert page.evaluate("document.activeElement.dataset.turn") == "1"


def changed_answer(page, entities_of):
    """The service's answer, with other entities made of its only one."""

    def fulfill(route):
        answer = route.fetch().json()
        (entity,) = [each for each in answer["entities"] if each["start"] == 0]
        route.fulfill(json=answer | {"entities": entities_of(entity)})

    page.route("**/v1/annotate*", fulfill)

"""The page without a pointer, and with more entities than fit on a screen."""

import json


def tab_to(page, selector, most=40):
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not in the tab order")


def test_from_an_empty_page_to_a_downloaded_result(page, post, tmp_path):
    tab_to(page, "#file")
    with page.expect_file_chooser() as chooser:
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
    def many(route):
        answer = route.fetch().json()
        (entity,) = answer["entities"]
        answer["entities"] = [entity] * 40
        route.fulfill(json=answer)

    page.route("**/v1/annotate*", many)
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

"""The page of the API's description."""

from __future__ import annotations


def test_every_operation_is_shown_and_can_be_tried_without_anything_from_elsewhere(visit, address):
    page = visit()
    page.goto(f"{address}docs")
    page.locator(".opblock").nth(8).wait_for()
    assert page.locator(".opblock-summary-path").count() == 9
    page.locator("#operations-facts-get_version .opblock-summary-control").click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    answer = page.locator(".live-responses-table tbody")
    answer.wait_for()
    assert '"api": "v1"' in answer.inner_text()


def test_of_a_form_only_what_is_filled_in_is_sent(visit, address):
    page = visit()
    page.goto(f"{address}docs")
    page.locator("#operations-annotate-annotate .opblock-summary-control").click()
    page.get_by_role("button", name="Try it out").click()
    page.locator(".opblock-section-request-body select").select_option("multipart/form-data")
    page.get_by_placeholder("text", exact=True).fill("Paris")
    with page.expect_response("**/v1/annotate*") as response:
        page.get_by_role("button", name="Execute").click()
    answer = response.value.json()
    assert response.value.status == 200, answer
    assert (answer["text"], answer["caption"], answer["knowledge"]) == ("Paris", None, None)
    assert answer["post_id"] != "null"

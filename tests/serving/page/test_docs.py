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

"""The round trip through Label Studio.

`label-studio-export.json` is what Label Studio 1.23.2 exported after `round_trip`. With its command in the environment
variable LABEL_STUDIO (pip install label-studio, in an environment of its own) the round trip is made anew.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from gem_ray.records import Box, GoldEntity
from gem_ray.review.certificate import certify
from gem_ray.review.corrections import UNSEEN, read_corrections
from gem_ray.review.folder import read_review

EXPORT = Path(__file__).with_name("label-studio-export.json")
TOKEN = "5f0ed2c1a5c94c7f9d0c7e3a4b1d2e6f8091a2b3"
UNCHECKED = 21  # tasks from this one on are left alone


def corrected(task: dict, number: int) -> list[dict]:
    """What a person makes of the predictions: another category, another span, a moved box, a deletion."""
    result = json.loads(json.dumps(task["predictions"][0]["result"])) if task["predictions"] else []
    spans = [part for part in result if part["type"] == "labels"]
    if number == 0:
        spans[0]["value"]["labels"] = ["person_other"]
    if number == 1:
        gone = {spans[0]["id"]}
        result = [part for part in result if not gone & {part.get("id"), part.get("from_id")}]
    if number == 2:
        start = task["data"]["text"].rindex("waits")
        value = {"start": start, "end": start + 5, "text": "waits", "labels": ["event_other"]}
        result.append({"id": "new", "from_name": "entity", "to_name": "text", "type": "labels", "value": value})
    for box in (part for part in result if part["type"] == "rectanglelabels" and number % 5 == 0):
        box["value"]["x"] = 50
    return result


def round_trip(command: str, review: Path, folder: Path) -> bytes:
    """Import the review's tasks into a new Label Studio, check them through its API, and export them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder / "data"),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
    }
    who = ["--username", "checker@example.org", "--password", "checks-posts", "--user-token", TOKEN]
    where = ["--port", str(port), "--internal-host", "127.0.0.1", "--no-browser"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [command, "start", *who, *where], env=os.environ | settings, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return _check_posts(f"http://127.0.0.1:{port}", review, process)
        finally:
            process.terminate()
            process.wait(30)


def _check_posts(address: str, review: Path, process: subprocess.Popen) -> bytes:
    with httpx.Client(base_url=address, headers={"Authorization": f"Token {TOKEN}"}, timeout=60) as client:

        def ask(method: str, path: str, body=None, **query):
            answer = client.request(method, path, json=body, params=query)
            answer.raise_for_status()
            return answer

        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            try:
                ask("GET", "/health")
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        setup = (review / "tasks-setup.xml").read_text()
        project = ask("POST", "/api/projects/", {"title": "review", "label_config": setup}).json()["id"]
        tasks = json.loads((review / "tasks.json").read_text(encoding="utf-8"))
        ask("POST", f"/api/projects/{project}/import", tasks, commit_to_project="true")
        listed = ask("GET", "/api/tasks/", project=project, page_size=100, fields="all").json()["tasks"]
        for number, task in enumerate(sorted(listed, key=lambda each: each["id"])[:UNCHECKED]):
            first = task["predictions"][0]["result"] if task["predictions"] else []
            made = ask("POST", f"/api/tasks/{task['id']}/annotations/", {"result": first}).json()["id"]
            ask("PATCH", f"/api/annotations/{made}/", {"result": corrected(task, number)})
        skipped = sorted(listed, key=lambda each: each["id"])[UNCHECKED]["id"]
        ask("POST", f"/api/tasks/{skipped}/annotations/", {"result": [], "was_cancelled": True})
        return ask("GET", f"/api/projects/{project}/export", exportType="JSON", download_all_tasks="true").content


@pytest.fixture(scope="module")
def review(review_path):
    return read_review(review_path)


@pytest.mark.skipif("LABEL_STUDIO" not in os.environ, reason="LABEL_STUDIO names no command")
def test_a_new_round_trip_gives_the_stored_one(review, tmp_path):
    export = tmp_path / "export.json"
    export.write_bytes(round_trip(os.environ["LABEL_STUDIO"], review.path, tmp_path))
    if keep := os.environ.get("LABEL_STUDIO_EXPORT"):
        shutil.copy(export, keep)
    assert read_corrections(export, review).posts == read_corrections(EXPORT, review).posts


def test_spans_categories_boxes_and_deletions_come_back(review):
    corrections = read_corrections(EXPORT, review)
    assert list(corrections.posts) != []
    assert corrections.in_order(review) == [corrections.posts[post.row_id] for post in review.posts[:UNCHECKED]]
    remarks = {"tasks that nobody has checked": len(review.posts) - UNCHECKED, UNSEEN: UNCHECKED}  # they were scripted
    assert corrections.remarks == remarks
    for number, post in enumerate(review.posts[:UNCHECKED]):
        gold = corrections.posts[post.row_id].gold
        expected = [GoldEntity(e.word_start, e.word_end, e.fine, (e.box,) if e.box else ()) for e in post.entities]
        moved = (Box(200, 50, 400, 150),)
        if number % 5 == 0:
            expected = [GoldEntity(g.word_start, g.word_end, g.fine, moved if g.boxes else ()) for g in expected]
        if number == 0:
            expected[0] = GoldEntity(expected[0].word_start, expected[0].word_end, "person_other")
        if number == 1:
            expected = expected[1:]
        if number == 2:
            place = post.tokens.index("waits")
            expected.append(GoldEntity(place, place + 1, "event_other"))
        assert gold == expected, number


def test_the_export_certifies_what_was_corrected(review):
    """A wrong category, a mention too many, one missed, and boxes that were moved away."""
    certificate = certify(review, read_corrections(EXPORT, review))
    assert (certificate.checked, certificate.planned, certificate.left_out) == (21, 24, {})
    f1 = {task: found["f1"].value for task, found in certificate.estimates.items()}
    assert 0.8 < f1["mner"] < f1["span"] < 1
    assert f1["mnerg"] < f1["mner"]
    assert f1["eeg"] < f1["span"]

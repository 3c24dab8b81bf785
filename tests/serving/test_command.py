"""`gem-ray serve` as a command: what it refuses, its keys, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from gem_ray.serving.keys import new_key

TEXT = "Taylor Swift is in Paris tonight"
TEXT_ONLY = ("--set", "reranker.enabled=false", "--set", "grounder.enabled=false")


def test_other_machines_are_not_let_in_without_keys(command):
    process = command("serve", "--host", "0.0.0.0")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "gem-ray new-key" in out


def test_wrong_settings_are_named_before_anything_starts(command, tmp_path):
    for arguments in (["--set", "serving.max_in_flite=3"], ["--config", str(tmp_path / "none.yaml")]):
        process = command("serve", *arguments)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 2, out
        assert "max_in_flite" in out or "none.yaml" in out


def test_a_model_that_is_not_there_is_named(command, port):
    process = command("serve", "--port", port(), "--set", "tagger.model=nano:nowhere", *TEXT_ONLY)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "nano:nowhere" in out


def test_nobody_else_gets_into_the_ray_of_the_service(service):
    """Its ports are open to the network, and Ray runs what it is sent."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in service.descendants()}
    raylet = next(pid for pid, command in commands.items() if "raylet/raylet --" in command)
    address = re.search(r"--gcs-address=(\S+)", commands[raylet]).group(1)
    environment = Path(f"/proc/{raylet}/environ").read_text().split("\0")
    connect = f"import ray; ray.init({address!r}, logging_level='ERROR'); print(ray.cluster_resources())"
    mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}):
        tried = subprocess.run([sys.executable, "-c", connect], env=mine | token, capture_output=True, text=True)
        assert tried.returncode != 0
        assert "CPU" not in tried.stdout
    known = dict(each.split("=", 1) for each in environment if each.startswith("RAY_AUTH_"))
    tried = subprocess.run([sys.executable, "-c", connect], env=mine | known, capture_output=True, text=True)
    assert "CPU" in tried.stdout, tried.stderr


def test_a_service_with_keys_finishes_what_it_has_begun_when_it_is_stopped(command, port, until_up):
    key, digest = new_key()
    number = port()
    process = command("serve", "--port", number, *TEXT_ONLY, GEM_RAY_API_KEYS=digest)
    try:
        until_up(process)
        url = f"http://127.0.0.1:{number}/v1/annotate/batch"
        headers = {"Authorization": f"Bearer {key}"}
        batch = {"posts": [{"text": f"{TEXT} {index}"} for index in range(60)]}
        assert httpx.post(url, json=batch).status_code == 401
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(httpx.post, url, json=batch, headers=headers, timeout=60) for _ in range(2)]
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert all(len(answer.json()["annotations"]) == 60 for answer in answers)
        assert process.wait(60) == 0
    finally:
        process.kill()

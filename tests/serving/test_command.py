"""`gem-ray serve` as a command: what it refuses, its keys, and how it ends."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from gem_ray.config import ServingConfig
from gem_ray.serving.keys import ApiKeys, new_key

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


def test_cards_that_are_not_there_are_not_waited_for(command, port):
    process = command(
        "serve", "--port", port(), "--set", "serving.pools.tag.num_gpus=0.5", *TEXT_ONLY, CUDA_VISIBLE_DEVICES=""
    )
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "the replicas reserve 0.5 + 0.5 GPUs (num_gpus of each of min_replicas); there are 0 here" in out


def test_the_ray_of_the_service_is_closed_by_a_token(service):
    """Its ports are open to the network, and Ray runs what it is sent."""
    servers = [*service.running("raylet/raylet"), *service.running("gcs_server")]
    assert len(servers) >= 2
    tokens = set()
    for pid in servers:
        variables = dict(
            each.split("=", 1) for each in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in each
        )
        assert variables["RAY_AUTH_MODE"] == "token"
        tokens.add(variables["RAY_AUTH_TOKEN"])
    (token,) = tokens
    assert len(token) == 64


def test_a_new_key_is_told_and_its_hash_is_kept(command, tmp_path):
    file = tmp_path / "keys.txt"
    keys = []
    for _ in range(2):
        out, _ = command("new-key", "--to", file).communicate(timeout=60)
        keys.append(out.split()[-1])
    known = ApiKeys.from_config(ServingConfig(api_keys_file=file))
    assert all(key in known for key in keys)
    assert len(set(keys)) == 2


def test_a_service_with_keys_finishes_what_it_has_begun_when_it_is_stopped(command, port, until_up):
    key, digest = new_key()
    number = port()
    process = command("serve", "--port", number, *TEXT_ONLY, GEM_RAY_API_KEYS=digest)
    try:
        until_up(process)
        url = f"http://127.0.0.1:{number}/v1/annotate/batch"
        headers = {"Authorization": f"Bearer {key}"}
        batch = {"posts": [{"text": f"{TEXT} {index}"} for index in range(30)]}
        assert httpx.post(url, json=batch).status_code == 401
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(httpx.post, url, json=batch, headers=headers, timeout=60) for _ in range(2)]
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert all(len(answer.json()["annotations"]) == 30 for answer in answers)
        assert process.wait(60) == 0
    finally:
        process.kill()

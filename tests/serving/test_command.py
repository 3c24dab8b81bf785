"""`gem-ray serve` as a command: what it refuses, its keys, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from ray.serve._private.http_util import set_socket_reuse_port
from typer.testing import CliRunner

from gem_ray.cli import app
from gem_ray.commands import serve as commands
from gem_ray.config import ConfigError, ServingConfig, load_config
from gem_ray.serving.environment import prepare_own_ray
from gem_ray.serving.keys import ApiKeys, new_key
from gem_ray.serving.session import ServingError, hold_port, serving

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
TEXT = "Taylor Swift is in Paris tonight"
TEXT_ONLY = ("--set", "reranker.enabled=false", "--set", "grounder.enabled=false")


def test_other_machines_are_not_let_in_without_keys(command):
    process = command("serve", "--host", "0.0.0.0")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "gem-ray new-key" in out


def test_wrong_settings_are_named_before_anything_starts(command, tmp_path):
    for arguments in (["--set", "serving.max_in_flite=3"], ["--serve-config", str(tmp_path / "none.yaml")]):
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


def test_a_port_in_use_is_refused_before_anything_starts(command, port, tmp_path):
    """Whether or not its owner shares it, as Serve's proxies do."""
    number = port()
    for is_shared in (False, True):
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, is_shared)
            other.bind(("127.0.0.1", number))
            other.listen()
            started = time.monotonic()
            process = command("serve", "--port", number, *TEXT_ONLY)
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 1
            assert f"cannot listen on 127.0.0.1, port {number}: Address already in use" in out
            assert time.monotonic() - started < 30


def test_a_port_is_kept_while_a_service_starts(port):
    """Two that are started together do not share it either, and one can be started again at once."""
    number = port()
    with hold_port("127.0.0.1", number):
        with pytest.raises(ServingError, match="in use"):
            hold_port("127.0.0.1", number)
        with socket.socket() as proxy:
            set_socket_reuse_port(proxy)
            proxy.bind(("127.0.0.1", number))
            proxy.listen()
            with socket.create_connection(("127.0.0.1", number)) as client:
                server, _ = proxy.accept()
                server.close()  # first, so that its end of the connection is what lingers
                assert client.recv(1) == b""
    hold_port("127.0.0.1", number).close()
    with pytest.raises(ServingError, match="cannot listen on 203"):
        hold_port("203.0.113.1", number)


def test_a_listener_on_any_address_of_the_name_is_noticed(port, monkeypatch):
    """`localhost` is `::1`, too, where there is IPv6; where there is none, nobody listens on it."""
    number = port()
    addresses = [
        (socket.AF_INET6, socket.SOCK_STREAM, 0, "", ("2001:db8::1", number, 0, 0)),  # not of this machine
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", number)),
        (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.2", number)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
    hold_port("localhost", number).close()
    with socket.socket() as other:
        other.bind(("127.0.0.2", number))
        other.listen()
        with pytest.raises(ServingError, match="cannot listen on localhost"):
            hold_port("localhost", number)


@pytest.mark.parametrize("error", [ConfigError("bad"), RuntimeError("Ray says no"), KeyError("x")])
def test_a_reload_that_fails_ends_nothing(monkeypatch, error):
    """Not the service, and not the reload of what is right: a key may just have been revoked."""
    done, signals = [], iter([signal.SIGHUP, signal.SIGTERM])

    class Signals:
        put = None

        def get(self):
            return next(signals)

    class Service:
        url = "http://127.0.0.1:1"

        def reload_keys(self):
            done.append("keys")
            raise error

    def deploy(_):
        done.append("config")
        raise error

    monkeypatch.setattr("queue.SimpleQueue", Signals)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("gem_ray.serving.environment.prepare_own_ray", lambda: None)
    monkeypatch.setattr("gem_ray.serving.session.serving", lambda _: nullcontext(Service()))
    monkeypatch.setattr("gem_ray.ray_private.serve.deploy", deploy)
    output = CliRunner().invoke(app, ["serve", "--serve-config", str(ROOT / "serve_configs" / "nano.yaml")])
    assert output.exit_code == 0, output.output
    assert done == ["keys", "config"]
    assert output.stderr.count("reload failed; keeping the current") == 2
    assert "finishing running requests" in output.stdout


def test_an_empty_address_of_a_ray_opens_nothing(monkeypatch):
    """As compose files give it: the service's own Ray has a token, and other machines are let in with keys only."""
    monkeypatch.setattr("os.environ", {"RAY_ADDRESS": ""})
    prepare_own_ray()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.setattr("gem_ray.serving.session.ours", lambda _: [("", load_config())])
    schema = SimpleNamespace(http_options=SimpleNamespace(host="0.0.0.0", port=0))
    with pytest.raises(ConfigError, match="lets other machines in"), serving(schema):
        pass


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
    for number in (1, 2):
        out, _ = command("new-key", "--to", file, "--name", f"newsroom-{number}").communicate(timeout=60)
        keys.append(out.split()[-1])
    known = ApiKeys.from_config(ServingConfig(api_keys_file=file))
    assert [known.name_of(key) for key in keys] == ["newsroom-1", "newsroom-2"]
    assert len(set(keys)) == 2


def test_a_new_key_has_a_line_of_its_own(tmp_path, capsys):
    """Also behind one that somebody has left without its end."""
    file = tmp_path / "keys.txt"
    file.write_text("# of the newsroom")
    commands.new_key(to=file, name="newsroom")
    assert ApiKeys(file=file).name_of(capsys.readouterr().out.split()[-1]) == "newsroom"


def test_a_service_with_keys_finishes_what_it_has_begun_when_it_is_stopped(command, port, until_up, tmp_path):
    """Beside it, what only the whole service has: slow senders at Serve's proxy, and SIGHUP."""
    key, digest = new_key()
    file = tmp_path / "keys"
    file.write_text(digest)
    number = port()
    process = command("serve", "--port", number, *TEXT_ONLY, "--set", f"serving.api_keys_file={file}")
    try:
        until_up(process)
        _check_slow_senders(number, key)
        _check_reload(process, number, key, file)
        url = f"http://127.0.0.1:{number}/v1/annotate/batch"
        headers = {"Authorization": f"Bearer {key}"}
        batch = {"posts": [{"text": f"{TEXT} {index}"} for index in range(30)]}
        assert httpx.post(url, json=batch).status_code == 401
        headers["Accept"] = "application/x-ndjson"
        with ExitStack() as stack:
            asked = [
                stack.enter_context(httpx.stream("POST", url, json=batch, headers=headers, timeout=60))
                for _ in range(2)
            ]
            lines = [answer.iter_lines() for answer in asked]
            begun = [next(each) for each in lines]
            process.send_signal(signal.SIGTERM)
            rows = [json.loads(line) for first, rest in zip(begun, lines, strict=True) for line in (first, *rest)]
        assert [answer.status_code for answer in asked] == [200, 200]
        assert Counter(row["index"] for row in rows) == dict.fromkeys(range(30), 2)
        assert not any("problem" in row for row in rows)
        assert process.wait(60) == 0
    finally:
        process.kill()


def _check_slow_senders(port, key):
    sent = "POST /v1/annotate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
    body = f"{sent}Authorization: Bearer {key}\r\n\r\n{{"
    with ExitStack() as stack, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for text in [sent] * 70 + [body] * 70:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(text.encode())
        time.sleep(0.5)
        seconds = []
        for _ in range(20):
            started = time.perf_counter()
            assert client.get("/healthz").status_code == 200
            seconds.append(time.perf_counter() - started)
        assert sorted(seconds)[10] < 0.1
        answer = client.post(
            "/v1/annotate", json={"text": TEXT}, headers={"Authorization": f"Bearer {key}"}, timeout=60
        )
        assert answer.status_code == 200
        connection.settimeout(30)
        assert b" 408 " in connection.recv(100)


def _check_reload(process, port, key, file):
    """Of a file that looks as before: SIGHUP reads it all the same."""
    url, headers = f"http://127.0.0.1:{port}/v1/limits", {"Authorization": f"Bearer {key}"}
    assert httpx.get(url, headers=headers).status_code == 200
    before, digest = file.stat(), file.read_text()
    file.write_text("0" * 64)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 20
    while httpx.get(url, headers=headers).status_code != 401:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    file.write_text(digest)
    assert httpx.get(url, headers=headers).status_code == 200

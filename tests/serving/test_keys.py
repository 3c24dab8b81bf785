"""API keys: who may ask, and from where."""

from __future__ import annotations

import hashlib
import socket

import httpx
import pytest

from gem_ray.config import ConfigError, ServingConfig
from gem_ray.serving.guard import Guard
from gem_ray.serving.keys import ApiKeys, new_key

KEY, HASH = new_key()


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def ask(listening):
    def ask(keys, path="/v1/annotate", host="127.0.0.1", **headers):
        with listening(Guard(hello, ApiKeys("\n".join(keys)), ServingConfig()), host="0.0.0.0") as port:
            return httpx.get(f"http://{host}:{port}{path}", headers=headers)

    return ask


def test_keys_are_known_by_their_hashes(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    other = hashlib.sha256(b"other").hexdigest()
    file.write_text(f"# of the newsroom\n{HASH.upper()}\n\n")
    monkeypatch.setenv("KEYS", f"{other}, {hashlib.sha256(b'third').hexdigest()}")
    keys = ApiKeys.from_config(ServingConfig(api_keys_file=file, api_keys_env="KEYS"))
    assert all(keys.name_of(key) for key in (KEY, "other", "third"))
    assert not any(keys.name_of(key) for key in ("", HASH, KEY[:-1], f"{KEY} ", "\ud800"))
    assert KEY not in file.read_text()


def test_without_hashes_there_are_no_keys(monkeypatch):
    monkeypatch.delenv("GEM_RAY_API_KEYS", raising=False)
    assert not ApiKeys.from_config(ServingConfig())


def test_keys_have_names_or_the_first_digits_of_their_hashes(tmp_path):
    (first, one), (second, two), (third, three) = new_key(), new_key(), new_key()
    file = tmp_path / "keys"
    file.write_text(f"{one} newsroom\n{two}   j.doe@example.com\n")
    keys = ApiKeys(three, file)
    assert [keys.name_of(key) for key in (first, second, third)] == ["newsroom", "j.doe@example.com", three[:8]]
    with pytest.raises(ConfigError):
        ApiKeys(f"{one} two words")


def test_a_file_may_come_from_any_editor(tmp_path):
    (first, one), (second, two) = new_key(), new_key()
    file = tmp_path / "keys"
    file.write_bytes(f"\ufeff{one} newsroom\r\n\r\n{two} archive".encode())
    keys = ApiKeys(file=file)
    assert [keys.name_of(key) for key in (first, second)] == ["newsroom", "archive"]


def test_a_change_of_the_file_is_taken_over_at_once(tmp_path, endpoint):
    """A key that was revoked must not work until somebody restarts the service."""
    (revoked, first), (stays, second), (late, third) = new_key(), new_key(), new_key()
    file = tmp_path / "keys"
    file.write_text(f"{first} a\n{second} b\n")
    with endpoint(api_keys_file=str(file)) as api:

        def statuses():
            headers = [{"Authorization": f"Bearer {key}"} for key in (revoked, stays, late)]
            return [api.client.get("/v1/limits", headers=each).status_code for each in headers]

        assert statuses() == [200, 200, 401]
        (tmp_path / "new").write_text(f"{third} c\n{second} b\n")
        (tmp_path / "new").rename(file)
        assert statuses() == [401, 200, 200]
        file.write_text(KEY)  # somebody has put the key there, not its hash
        assert statuses() == [401, 200, 200]
        file.unlink()
        assert statuses() == [401, 200, 200]
        file.write_text("")  # the last key is revoked: this opens the service to nobody
        assert statuses() == [401, 401, 401]
        file.write_text(f"{second}\n")
        assert statuses() == [401, 200, 401]


def test_what_is_no_hash_is_named(tmp_path):
    file = tmp_path / "keys"
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys.from_config(ServingConfig(api_keys_file=file))
    file.write_text(f"# of the newsroom\n{HASH}\n{KEY}\n")
    with pytest.raises(ConfigError, match=r"line 3: .* 64 hex digits") as caught:
        ApiKeys.from_config(ServingConfig(api_keys_file=file))
    assert KEY not in str(caught.value)


def test_two_keys_differ():
    assert new_key() != new_key()


def test_a_known_key_lets_in_and_any_other_does_not(ask, assert_problem):
    assert ask([HASH], authorization=f"Bearer {KEY}").text == "hello"
    assert ask([HASH], authorization=f"bearer  {KEY}").text == "hello"
    for wrong in ({}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"authorization": f"Bearer {HASH}"}):
        answer = ask([HASH], **wrong)
        assert_problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/limits", "/v1/annotate/batch", "/metrics"):
        assert_problem(ask([HASH], path), 401)
    for path in ("/", "/style.css", "/healthz", "/readyz", "/openapi.json"):
        assert ask([HASH], path).text == "hello"


def test_without_keys_other_machines_are_not_served(ask, assert_problem):
    address = _address_of_this_machine()
    assert ask([]).text == "hello"
    assert_problem(ask([], host=address), 403)
    assert ask([HASH], host=address, authorization=f"Bearer {KEY}").text == "hello"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "127.0.0.7"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": "127.0.0.1.rebound.example:8000"}, 403),
        ({"x-forwarded-for": "203.0.113.9"}, 403),
        ({"forwarded": "for=203.0.113.9"}, 403),
    ],
)
def test_without_keys_a_name_that_leads_here_and_a_proxy_are_not_served(listening, headers, status):
    with listening(Guard(hello, ApiKeys(), ServingConfig())) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/v1/limits", headers=headers).status_code == status


def _address_of_this_machine():
    """Not its loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return probe.getsockname()[0]


async def failing(scope, receive, send):
    raise KeyError("/secret/path")


def test_a_bug_is_a_problem_that_tells_nothing(listening, assert_problem):
    with listening(Guard(failing, ApiKeys(), ServingConfig())) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/")
    assert "secret" not in assert_problem(answer, 500)["detail"]

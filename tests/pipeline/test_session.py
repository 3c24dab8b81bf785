"""What a run asks of this machine before it loads a model."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from gem_ray.config import load_config
from gem_ray.pipeline import session
from gem_ray.planning.plan import PlanError
from gem_ray.ray_private import core
from gem_ray.ray_private.core import connect_to_ray

ON_A_CARD = ["knowledge.captioner=null", "reranker.enabled=false", "grounder.enabled=false"]


def test_models_that_the_card_of_this_machine_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("one-gpu", reranker={"enabled": True, "adapter": "models/reranker-lora"})
    monkeypatch.setattr(session, "_card_memory_gb", lambda: 12.0)
    with pytest.raises(PlanError, match=r"rerank needs .* a 12 GB card"):
        session._check_cards(config, gpus=1)
    monkeypatch.setattr(session, "_card_memory_gb", lambda: 23.6)  # what a card that is sold as 24 GB says
    session._check_cards(config, gpus=1)


def test_a_run_that_no_number_of_its_cards_holds_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three actors with 0.6 of a card each, and two cards."""
    config = load_config("cluster", overrides=["pipeline.pools.ground={num_gpus: 0.6, min_actors: 3, max_actors: 3}"])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 64.0, "GPU": 2.0})
    with pytest.raises(ValueError, match="needs at least 3 GPUs and Ray has 2"):
        session._check_resources(config, can_grow=False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 64.0, "GPU": 3.0})
    nodes = [{"Alive": True, "Resources": {"CPU": 64.0, "GPU": 0.5}}, {"Alive": True, "Resources": {"GPU": 1.0}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    with pytest.raises(ValueError, match=r"no node has the 1 CPUs and 0\.6 GPUs that an actor of ground"):
        session._check_resources(config, can_grow=False)
    nodes.append({"Alive": True, "Resources": {"CPU": 64.0, "GPU": 1.0}})
    session._check_resources(config, can_grow=False)


def test_models_on_cpus_ask_for_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_card_memory_gb", lambda: 0.1)
    session._check_cards(load_config("nano"), gpus=1)


def test_a_model_whose_size_is_not_known_is_fetched_before_the_card_is_judged(
    monkeypatch: pytest.MonkeyPatch, hub: Any
) -> None:
    header = b'{"a": {"dtype": "F16", "shape": [1000, 30000000], "data_offsets": [0, 0]}}'
    weights = len(header).to_bytes(8, "little") + header
    hub.push("org/tagger", {"config.json": b'{"model_type": "roberta"}', "model.safetensors": weights})
    monkeypatch.setattr(session, "_card_memory_gb", lambda: 24.0)
    with pytest.raises(PlanError, match="tag needs"):
        session._check_cards(load_config("one-gpu", overrides=["tagger.model=org/tagger", *ON_A_CARD]), gpus=1)
    assert hub.sent["org/tagger/model.safetensors"] == len(weights)


def test_without_a_home_a_local_ray_gets_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment: dict[str, str] = {"HOME": str(tmp_path)}
    monkeypatch.setattr("os.environ", environment)
    core._give_token_without_home()
    assert "RAY_AUTH_TOKEN" not in environment  # Ray keeps one in the home
    environment["HOME"] = "/proc/nobody"
    core._give_token_without_home()
    token = environment["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    core._give_token_without_home()
    assert environment["RAY_AUTH_TOKEN"] == token  # Ray reads it once in a process


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("/tmp/" + "x" * 40, "RAY_TMPDIR is longer than the 39 bytes"),
        ("/proc/nobody", "RAY_TMPDIR names another folder"),
    ],
)
def test_a_folder_that_ray_cannot_use_is_refused_before_anything_starts(
    folder: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too long for the names of sockets, of which Ray's daemons would tell their logs alone, and not writable."""
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with pytest.raises(OSError, match=said):
        core.start_local_ray()


def test_an_empty_address_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose files give it: the local Ray that is meant is judged as one, and does not wait for nodes."""
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(session, "start_local_ray", lambda **_: None)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(ValueError, match="needs at least 2 CPUs and Ray has 1"), session.ray_session(load_config()):
        pass


def test_an_address_of_a_ray_client_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data ends there with an AttributeError, after everything has been counted and loaded."""
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with (
        pytest.raises(ValueError, match=r"RAY_ADDRESS is ray://head:10001, a Ray Client.*`gem-ray submit`"),
        session.ray_session(load_config()),
    ):
        pass


def test_an_address_at_which_no_ray_answers_is_said_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gem_ray.ray_private.core._ANSWERS_WITHIN_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(ConnectionError, match=f"no Ray answers at {address}, .*refused"),
            session.ray_session(load_config()),
        ):
            pass


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:{}", "localhost:{}"])
def test_what_is_no_silent_address_is_left_to_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("ray.init", lambda address, **_: asked.append(address))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = address.format(server.getsockname()[1])
        connect_to_ray(address)
    assert asked == [address]

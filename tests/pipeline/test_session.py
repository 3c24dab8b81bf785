"""What a run asks of this machine before it loads a model."""

from __future__ import annotations

import pytest

from gem_ray.config import load_config
from gem_ray.pipeline import session
from gem_ray.planning.plan import PlanError


def test_models_that_the_card_of_this_machine_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("one-gpu")
    monkeypatch.setattr(session, "_card_memory_gb", lambda: 12.0)
    with pytest.raises(PlanError, match=r"rerank needs .* a 12 GB card"):
        session._check_cards(config, gpus=1)
    monkeypatch.setattr(session, "_card_memory_gb", lambda: 23.6)  # what a card that is sold as 24 GB says
    session._check_cards(config, gpus=1)


def test_models_on_cpus_ask_for_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_card_memory_gb", lambda: 0.1)
    session._check_cards(load_config("nano"), gpus=1)

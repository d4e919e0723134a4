"""GET /v1/models."""

from __future__ import annotations

import openai
import pytest

from engine.errors import ConfigError
from server.settings import load_settings
from tests.server.conftest import MODEL, RunningServer


def test_official_client_lists_and_retrieves_the_model(hello: RunningServer) -> None:
    (card,) = hello.openai.models.list().data
    assert (card.id, card.object, card.owned_by) == (MODEL, "model", "medusa-serve")
    assert card.model_dump()["max_model_len"] == 4096
    assert hello.openai.models.retrieve(MODEL) == card


def test_every_name_is_served_and_listed(hello: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello.context, "model_names", (MODEL, "gpt-4o", "org/alias"))
    assert [card.id for card in hello.openai.models.list()] == [MODEL, "gpt-4o", "org/alias"]
    card = hello.openai.models.retrieve("org/alias")
    assert (card.id, card.model_dump()["root"]) == ("org/alias", MODEL)
    answer = hello.openai.completions.create(model="gpt-4o", prompt="x")
    assert answer.model == "gpt-4o"
    with pytest.raises(openai.NotFoundError):
        hello.openai.models.retrieve("org")


def test_names_with_commas_between_them() -> None:
    def names(value: object) -> tuple[str, ...]:
        return load_settings({"served_model_name": value}).model_names

    assert names("a") == ("a",)
    assert names("a,org/b , c") == ("a", "org/b", "c")
    assert names(["a", "b", "a"]) == ("a", "b")
    for bad in ("", "a,,b", ",a", "a, ,b"):
        with pytest.raises(ConfigError, match="served-model-name"):
            names(bad)

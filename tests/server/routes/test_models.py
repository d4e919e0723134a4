"""GET /v1/models."""

from __future__ import annotations

from typing import Any

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


@pytest.mark.parametrize("given", [{}, {"model": None}, {"model": ""}])
@pytest.mark.parametrize("stream", [False, True])
def test_without_a_name_it_is_the_served_model(
    hello: RunningServer, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], stream: bool
) -> None:
    monkeypatch.setattr(hello.context, "model_names", (MODEL, "gpt-4o"))
    for path, asked in (
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("completions", {"prompt": "x"}),
    ):
        answer = hello.http.post(f"/v1/{path}", json={**asked, **given, "stream": stream})
        assert answer.status_code == 200
        assert f'"model":"{MODEL}"' in answer.text
    for path, asked in (("tokenize", {"prompt": "x"}), ("detokenize", {"tokens": [1]})):
        assert hello.http.post(f"/{path}", json={**asked, **given}).status_code == 200
    assert hello.http.get("/v1/models/").status_code == 404


def test_names_with_commas_between_them() -> None:
    def names(value: object) -> tuple[str, ...]:
        return load_settings({"served_model_name": value}).model_names

    assert names("a") == ("a",)
    assert names("a,org/b , c") == ("a", "org/b", "c")
    assert names(["a", "b", "a"]) == ("a", "b")
    for bad in ("", "a,,b", ",a", "a, ,b"):
        with pytest.raises(ConfigError, match="served-model-name"):
            names(bad)

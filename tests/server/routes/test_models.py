"""GET /v1/models."""

from __future__ import annotations

from tests.server.conftest import MODEL, RunningServer


def test_official_client_lists_and_retrieves_the_model(hello: RunningServer) -> None:
    (card,) = hello.openai.models.list().data
    assert (card.id, card.object, card.owned_by) == (MODEL, "model", "medusa-serve")
    assert card.model_dump()["max_model_len"] == 4096
    assert hello.openai.models.retrieve(MODEL) == card

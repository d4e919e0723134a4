"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter

from server.context import Context, ServerContext
from server.responses import ModelCard, ModelList
from server.routes.generate import ERRORS

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def list_models(context: Context) -> ModelList:
    """The model this server serves, under each of its names."""
    return ModelList(data=[_card(context, name) for name in context.model_names])


@router.get("/v1/models/{name:path}", responses={404: ERRORS[404], "4XX": ERRORS["4XX"]})
async def get_model(name: str, context: Context) -> ModelCard:
    """The served model by one of its names; a hub id has a slash in it."""
    context.check_model(name)
    return _card(context, name)


def _card(context: ServerContext, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=context.created,
        root=context.model_names[0],
        max_model_len=context.engine.info.max_model_len,
    )

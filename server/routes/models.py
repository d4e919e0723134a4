"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter

from server.context import Context, ServerContext
from server.responses import ModelCard, ModelList

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def list_models(context: Context) -> ModelList:
    """The one model this server serves."""
    return ModelList(data=[_card(context)])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, context: Context) -> ModelCard:
    """The served model by name; a hub id has a slash in it."""
    context.check_model(name)
    return _card(context)


def _card(context: ServerContext) -> ModelCard:
    return ModelCard(
        id=context.settings.model_name,
        created=context.created,
        max_model_len=context.engine.info.max_model_len,
    )

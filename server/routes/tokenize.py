"""POST /tokenize, in vLLM's shape."""

from __future__ import annotations

from fastapi import APIRouter

from server.context import Context
from server.responses import TokenizeResponse
from server.schemas import TokenizeRequest

__all__ = ["router"]

router = APIRouter()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, context: Context) -> TokenizeResponse:
    """Token ids of a prompt or of a conversation, as a completion would see it."""
    if body.model is not None:
        context.check_model(body.model)
    if body.messages is not None:
        tokens = await context.encode(
            context.text.encode_chat,
            [message.as_template_input() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
        )
    else:
        tokens = await context.encode(
            context.text.encode, body.prompt or "", add_special_tokens=body.add_special_tokens is not False
        )
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=context.engine.info.max_model_len,
        tokens=tokens,
        token_strs=context.text.token_strings(tokens) if body.return_token_strs else None,
    )

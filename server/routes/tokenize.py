"""POST /tokenize and POST /detokenize, in vLLM's shape, and GET /tokenizer_info."""

from __future__ import annotations

from fastapi import APIRouter

from engine.errors import RequestError
from server.context import Context
from server.reasoning_use import check_effort, template_variables
from server.responses import DetokenizeResponse, TokenizeResponse, TokenizerInfo
from server.routes.generate import ERRORS
from server.schemas.tokenize import DetokenizeRequest, TokenizeRequest

__all__ = ["router"]

router = APIRouter()


@router.post("/tokenize", responses=ERRORS)
async def tokenize(body: TokenizeRequest, context: Context) -> TokenizeResponse:
    """Token ids of a prompt or of a conversation, as a completion would see it."""
    context.check_model(context.name_of(body.model))
    if body.prompt is None:
        options, form = body.template_options(), context.thought_format
        known = context.text.template_variables(tools=bool(options["tools"]))
        options["template_kwargs"] = template_variables(body, known)
        tokens = await context.in_thread(context.text.encode_chat, body.template_input(), **options)
        if form is not None:
            check_effort(body, form.thought(context.text, tokens, body.begun_text))
    else:
        special = body.add_special_tokens is not False
        tokens = await context.in_thread(
            context.text.encode, body.prompt, add_special_tokens=special, param="prompt"
        )
    return TokenizeResponse(
        count=len(tokens),
        max_model_len=context.engine.info.max_model_len,
        tokens=tokens,
        token_strs=context.text.token_strings(tokens) if body.return_token_strs else None,
    )


@router.post("/detokenize", responses=ERRORS)
async def detokenize(body: DetokenizeRequest, context: Context) -> DetokenizeResponse:
    """The text of token ids, special tokens by their names."""
    context.check_model(context.name_of(body.model))
    size = context.engine.info.vocab_size
    if beyond := [token for token in body.tokens if token >= size]:
        message = f"tokens: {beyond[0]} is not a token of this model (it has {size})"
        raise RequestError(message, param="tokens")
    text = await context.in_thread(context.text.decode, body.tokens, skip_special_tokens=False)
    return DetokenizeResponse(prompt=text)


@router.get("/tokenizer_info")
async def tokenizer_info(context: Context) -> TokenizerInfo:
    """What a client has to know of the tokenizer to do without a copy of it."""
    tokenizer, text = context.text.tokenizer, context.text
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return TokenizerInfo(tokenizer_class=type(tokenizer).__name__, chat_template=text.chat_template, **named)

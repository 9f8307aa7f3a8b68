"""`POST /tokenize` and `POST /detokenize`: the tokenizer as the generation routes use it."""

from __future__ import annotations

from typing import Any

import orjson
from quart import Blueprint, Response

from jaxserve.api.context import ServerContext, server_context
from jaxserve.api.prompts import PromptEncoder
from jaxserve.api.protocol import DetokenizeRequest, TokenizeRequest
from jaxserve.api.request_body import read_json_object
from jaxserve.api.respond import (
    in_executor,
    json_response,
    note_ignored,
    prompt_encoder,
    request_protocol,
)
from jaxserve.template_worker import RenderJob

blueprint = Blueprint("tokenization", __name__)


@blueprint.post("/tokenize")
async def tokenize() -> Response:
    """Token ids of a text or a conversation, as the generation routes would feed them to the model."""
    context = server_context()
    context.engine.check_serving()
    body = await read_json_object()
    protocol, encoder = request_protocol(context), prompt_encoder(context)

    def prepare() -> tuple[TokenizeRequest, dict[str, Any] | RenderJob]:
        request = protocol.tokenize(body)
        if isinstance(request.prompt, str):
            return request, _tokenize(encoder, request, request.prompt)
        if request.prompt.brings_template:
            return request, encoder.render_job(request.prompt)
        return request, _tokenize(encoder, request, encoder.render(request.prompt))

    request, result = await in_executor(context, prepare)
    if isinstance(result, RenderJob):
        text = await context.templates.render(result)
        result = await in_executor(context, lambda: _tokenize(encoder, request, text))
    return note_ignored(json_response(orjson.dumps(result)), request.ignored_fields)


def _tokenize(encoder: PromptEncoder, request: TokenizeRequest, text: str) -> dict[str, Any]:
    ids = encoder.encode(text, request.add_special_tokens) if text else []
    strings = (
        [encoder.tokenizer.token_str(token_id) for token_id in ids] if request.return_token_strs else None
    )
    return {
        "count": len(ids),
        "max_model_len": encoder.max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }


@blueprint.post("/detokenize")
async def detokenize() -> Response:
    """The text of token ids, special tokens included."""
    context = server_context()
    context.engine.check_serving()
    body = await read_json_object()
    protocol = request_protocol(context)

    def prepare() -> tuple[DetokenizeRequest, str]:
        request = protocol.detokenize(body)
        return request, _detokenize(context, request)

    request, text = await in_executor(context, prepare)
    return note_ignored(json_response(orjson.dumps({"prompt": text})), request.ignored_fields)


def _detokenize(context: ServerContext, request: DetokenizeRequest) -> str:
    return context.tokenizer.decode(request.tokens, skip_special_tokens=False)

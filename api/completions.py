"""`POST /v1/completions`."""

from __future__ import annotations

from quart import Blueprint, Response

from jaxserve.api.context import server_context
from jaxserve.api.prompts import TokenizedPrompt
from jaxserve.api.protocol import CompletionRequest
from jaxserve.api.request_body import read_json_object
from jaxserve.api.respond import (
    Arrival,
    in_executor,
    note_ignored,
    prompt_encoder,
    request_protocol,
    respond,
)
from jaxserve.api.responses import CompletionRenderer

blueprint = Blueprint("completions", __name__)


@blueprint.post("/v1/completions")
async def create_completion() -> Response:
    """Continue one or more prompts."""
    context, arrival = server_context(), Arrival.now()
    context.engine.check_serving()
    body = await read_json_object()
    protocol, encoder = request_protocol(context), prompt_encoder(context)

    def prepare() -> tuple[CompletionRequest, list[TokenizedPrompt]]:
        request = encoder.with_bad_words(protocol.completion(body))
        return request, encoder.completion(request)

    request, prompts = await in_executor(context, prepare)
    renderer = CompletionRenderer(
        arrival.head(context, request, "cmpl"), context.tokenizer, prompts, request.sampling.n, request.output
    )
    response = await respond(context, arrival, request, prompts, renderer)
    return note_ignored(response, request.ignored_fields)

"""`POST /v1/chat/completions`."""

from __future__ import annotations

from quart import Blueprint, Response

from jaxserve.api.context import server_context
from jaxserve.api.prompts import TokenizedPrompt
from jaxserve.api.protocol import ChatRequest
from jaxserve.api.request_body import read_json_object
from jaxserve.api.respond import (
    Arrival,
    compiled,
    in_executor,
    note_ignored,
    prompt_encoder,
    request_protocol,
    respond,
)
from jaxserve.api.responses import ChatRenderer
from jaxserve.template_worker import RenderJob

blueprint = Blueprint("chat", __name__)


@blueprint.post("/v1/chat/completions")
async def create_chat_completion() -> Response:
    """Continue a conversation."""
    context, arrival = server_context(), Arrival.now()
    context.engine.check_serving()
    body = await read_json_object()
    protocol, encoder = request_protocol(context), prompt_encoder(context)

    def prepare() -> tuple[ChatRequest, TokenizedPrompt | RenderJob]:
        request = encoder.with_shown_calls(encoder.with_bad_words(protocol.chat(body)))
        if request.prompt.brings_template:
            return request, encoder.render_job(request.prompt)
        return request, encoder.chat(request)

    request, prompt = await in_executor(context, prepare)
    if isinstance(prompt, RenderJob):
        text = await context.templates.render(prompt)
        prompt = await in_executor(context, lambda: encoder.chat(request, text))
    if request.tools is not None:
        await compiled(context, request.tools.schemas)
    renderer = ChatRenderer(
        arrival.head(context, request, "chatcmpl"),
        context.tokenizer,
        [prompt],
        request.sampling.n,
        request.output,
        role=encoder.role(request.prompt),
        tools=request.tools,
    )
    response = await respond(context, arrival, request, [prompt], renderer)
    return note_ignored(response, request.ignored_fields)

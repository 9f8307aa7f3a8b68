"""What completion and chat routes share: a body becomes prompts in the engine, deltas become a response."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
from quart import Response, g

from jaxserve.api.constraints import RequestConstraint
from jaxserve.api.context import ServerContext
from jaxserve.api.errors import HttpError, error_body
from jaxserve.api.generation import ChoiceDelta, Generation, RequestTimings, Usage
from jaxserve.api.prompts import PromptEncoder, TokenizedPrompt
from jaxserve.api.protocol import GenerationRequest, Protocol, protocol_for
from jaxserve.api.request_tables import ProtocolConfig
from jaxserve.api.responses import DONE, Renderer, ResponseHead, event
from jaxserve.api.sse import sse_response
from jaxserve.constraints.constraint import CompiledConstraint
from jaxserve.errors import JaxserveError, QueueFullError, RequestError
from jaxserve.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
MAX_IGNORED_HEADER_CHARS = 2048
MAX_BLAME_S = 1.5  # to find the part of a constraint that is at fault
T = TypeVar("T")


def request_protocol(context: ServerContext) -> Protocol:
    """The request tables for the model that is being served."""
    config, info, defaults = context.config, context.engine.info, context.generation_defaults
    return protocol_for(
        ProtocolConfig(
            model_names=config.model_names,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            max_logprobs=config.engine.max_logprobs,
            temperature=1.0 if defaults.temperature is None else defaults.temperature,
            top_p=1.0 if defaults.top_p is None else defaults.top_p,
            top_k=-1 if defaults.top_k is None else defaults.top_k,
            min_p=0.0 if defaults.min_p is None else defaults.min_p,
            repetition_penalty=1.0 if defaults.repetition_penalty is None else defaults.repetition_penalty,
            return_tokens_as_token_ids=config.return_tokens_as_token_ids,
            force_include_usage=config.enable_force_include_usage,
            ignore_unknown_fields=config.unknown_fields == "ignore",
            request_chat_template=config.request_chat_template,
            guided_decoding_backend=config.guided_decoding_backend,
            tool_call_parser=config.tool_call_parser,
            scheduling_policy=config.engine.scheduling_policy,
        )
    )


def prompt_encoder(context: ServerContext) -> PromptEncoder:
    """Template and tokenizer of the model that is being served."""
    return PromptEncoder(
        tokenizer=context.tokenizer,
        chat_template=context.chat_template,
        max_model_len=context.engine.info.max_model_len,
        template_kwargs=context.config.default_chat_template_kwargs,
        response_role=context.config.response_role,
        eos_token_ids=context.generation_defaults.eos_token_ids,
    )


async def in_executor(context: ServerContext, function: Callable[[], T]) -> T:
    """Run what may take long (a body may be megabytes) beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(context.executor, function)


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """When a request came and what it is called."""

    request_id: str
    created: int  # whole Unix seconds
    monotonic: float

    @classmethod
    def now(cls) -> Arrival:
        return cls(request_id=g.request_id, created=int(time.time()), monotonic=time.monotonic())

    def head(self, context: ServerContext, request: GenerationRequest, prefix: str) -> ResponseHead:
        """What all chunks of the response share."""
        return ResponseHead(
            id=f"{prefix}-{request.request_id or self.request_id}",
            created=self.created,
            model=context.config.model_names[0],
            system_fingerprint=context.system_fingerprint,
        )


async def compiled(context: ServerContext, asked: RequestConstraint) -> CompiledConstraint:
    """The constraint, compiled where it can be killed.

    Raises:
        RequestError: it is refused; the field at fault is one of its parts, if that alone would be refused.
        QueueFullError: too many others are being compiled.
    """
    assert context.constraints is not None, "a handler ran before the server was ready"
    started = time.monotonic()
    try:
        return await context.constraints.compile(asked.constraint, param=asked.param)
    except QueueFullError:
        raise
    except RequestError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_BLAME_S):
                for param, part in asked.parts:
                    await context.constraints.compile(part, param=param)
        raise
    finally:
        context.metrics.observe_grammar(time.monotonic() - started)


async def respond(
    context: ServerContext,
    arrival: Arrival,
    request: GenerationRequest,
    prompts: Sequence[TokenizedPrompt],
    renderer: Renderer,
) -> Response:
    """Generate, and answer as a stream or whole.

    Raises:
        RequestError: the constraint is refused.
        QueueFullError: too many requests are waiting.
        EngineError: the engine cannot serve, or failed before anything was sent.
        HttpError: the request's time was up before the first token.
    """
    constraint = None if request.constraint is None else await compiled(context, request.constraint)
    if request.length.max_tokens == 0 and request.sampling.prompt_logprobs is None:
        return _echo_alone(request, prompts, renderer)
    release = context.admission.admit(sum(len(prompt.token_ids) for prompt in prompts))

    def ended(timings: RequestTimings) -> None:
        release()
        context.metrics.observe_request(timings)

    if context.config.enable_log_requests:
        lengths = [len(prompt.token_ids) for prompt in prompts]
        logger.info("%s prompt tokens %s, %s", arrival.request_id, lengths, _describe(request.sampling))
    generation = Generation(
        context.engine,
        context.tokenizer,
        prompts,
        request.sampling,
        request_id=arrival.request_id,
        eos_token_ids=context.generation_defaults.eos_token_ids,
        constraint=constraint,
        cache_salt=request.cache_salt,
        priority=request.priority,
        arrived_at=arrival.monotonic,
        timeout_s=context.config.request_timeout_s,
        observe=ended,
    )
    if request.output.stream:
        return await _stream(context, arrival, generation, renderer)
    return await _whole(context, generation, renderer)


def _describe(params: SamplingParams) -> str:
    """Sampling parameters for the log; what may be text of the client's, or long, is only counted."""
    counted = {"stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words_token_ids"}
    shown = {
        name: f"({len(value)})" if name in counted and value else value
        for name, value in msgspec.structs.asdict(params).items()
    }
    return " ".join(f"{name}={value}" for name, value in shown.items() if value not in (None, ()))


def _echo_alone(
    request: GenerationRequest, prompts: Sequence[TokenizedPrompt], renderer: Renderer
) -> Response:
    """`max_tokens: 0` with echo: the engine has nothing to do."""
    usage = Usage(sum(len(prompt.token_ids) for prompt in prompts), 0, 0)
    deltas = [ChoiceDelta(i, finish_reason="length") for i in range(len(prompts) * request.sampling.n)]
    if not request.output.stream:
        renderer.collect(deltas)
        return json_response(renderer.response(usage))

    async def events() -> AsyncIterator[bytes]:
        yield renderer.chunks(deltas, usage) + renderer.last_chunks(usage)

    return sse_response(events(), on_close=lambda: None)


async def _whole(context: ServerContext, generation: Generation, renderer: Renderer) -> Response:
    with closing(generation):
        generation.start()
        async for deltas in generation.steps():
            await _rendered(context, partial(renderer.collect, deltas), slow=_is_slow(deltas))
        render = partial(renderer.response, generation.usage)
        slow = generation.params.prompt_logprobs is not None
        return json_response(await _rendered(context, render, slow=slow))


def _is_slow(deltas: Sequence[ChoiceDelta]) -> bool:
    """Whether rendering takes long: the logprobs of whole prompts may be megabytes."""
    return any(delta.prompt_logprobs for delta in deltas)


async def _rendered(context: ServerContext, render: Callable[[], T], *, slow: bool) -> T:
    """What `render` returns; what is slow must not hold up the event loop."""
    return await in_executor(context, render) if slow else render()


async def _stream(
    context: ServerContext, arrival: Arrival, generation: Generation, renderer: Renderer
) -> Response:
    """Wait for the first text, so that what fails before it has an HTTP status of its own; but no longer than
    the client may go without a keep-alive."""
    with ExitStack() as cleanup:
        cleanup.callback(generation.close)
        generation.start()
        steps = generation.steps()
        first = asyncio.ensure_future(anext(steps))
        cleanup.callback(first.cancel)
        await asyncio.wait({first}, timeout=context.config.sse_keep_alive_interval_s or None)
        if first.done():
            first.result()
        events = _events(context, generation, renderer, first, steps, arrival.request_id)
        return sse_response(events, on_close=cleanup.pop_all().close)


async def _events(
    context: ServerContext,
    generation: Generation,
    renderer: Renderer,
    first: Awaitable[list[ChoiceDelta]],
    steps: AsyncIterator[list[ChoiceDelta]],
    request_id: str,
) -> AsyncIterator[bytes]:
    """One write per step."""
    try:
        deltas: list[ChoiceDelta] | None = await first
        while deltas is not None:
            render = partial(_step_events, generation, renderer, deltas)
            if written := await _rendered(context, render, slow=_is_slow(deltas)):
                yield written
            deltas = await anext(steps, None)
    except (JaxserveError, HttpError) as error:
        logger.warning("request %s failed in its stream: %s", request_id, error)
        yield event(error_body(error, request_id).to_dict()) + DONE
    except Exception as error:
        logger.exception("request %s failed in its stream", request_id)
        yield event(error_body(error, request_id).to_dict()) + DONE


def _step_events(generation: Generation, renderer: Renderer, deltas: Sequence[ChoiceDelta]) -> bytes:
    chunks = renderer.chunks(deltas, generation.usage if renderer.shows_usage else None)
    return chunks + renderer.last_chunks(generation.usage) if generation.finished else chunks


def json_response(body: bytes) -> Response:
    return Response(body, content_type="application/json")


def note_ignored(response: Response, ignored_fields: Sequence[str]) -> Response:
    """Tell the client which unknown fields were dropped (`--unknown-fields ignore`)."""
    if ignored_fields:
        paths = (re.sub(r"[^!-+\--~]", "?", path) for path in ignored_fields)  # visible ASCII but no comma
        response.headers["X-Ignored-Fields"] = ",".join(paths)[:MAX_IGNORED_HEADER_CHARS]
    return response

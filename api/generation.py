"""From the engine's steps to text: one `Generation` per API request, whatever its prompts and choices.

Streaming and not streaming are the same code: `Generation.steps` yields, per engine step, one `ChoiceDelta`
for each choice that has something to show; a non-streaming response is those deltas joined.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from jaxserve.api.errors import request_timeout
from jaxserve.api.prompts import TokenizedPrompt
from jaxserve.detokenizer import Detokenizer
from jaxserve.engine_client import EngineClient, RequestStream
from jaxserve.errors import EngineError, RequestFailedError
from jaxserve.messages import AddRequest, FinishReason, SequenceOutput, TopLogprobs
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer import Tokenizer

_engine_ids = itertools.count()


@dataclass(slots=True)
class ChoiceDelta:
    """What one step adds to one choice.

    Attributes:
        logprobs: parallel to `token_ids`; None if not asked for.
        finish_reason: set in the choice's last delta.
        stop_reason: the stop string, or the stop token's id.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: each prompt once, all choices."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class RequestTimings:
    """One request as metrics see it, when it has ended. Times are `time.monotonic()` seconds.

    Attributes:
        finish_reason: of its first choice; "abort" if the client went away or time was up, "error" if the
            engine failed.
        scheduled_at: when the engine first ran it; None: never.
        first_token_at: None: there was no token.
        inter_token_s: for every token of a choice but its first: seconds since the one before.
        max_tokens: the largest of its prompts.
    """

    finish_reason: FinishReason
    n: int
    max_tokens: int
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    arrived_at: float
    scheduled_at: float | None
    first_token_at: float | None
    finished_at: float
    inter_token_s: tuple[float, ...]


class TokenClock:
    """When the tokens of a request came.

    Args:
        num_choices: each has its own first token.
    """

    def __init__(self, num_choices: int) -> None:
        self.first_token_at: float | None = None
        self.inter_token_s: list[float] = []
        self._last_token_at: list[float | None] = [None] * num_choices

    def count(self, index: int, num_tokens: int, now: float) -> None:
        """Choice `index` has got tokens; those that came at once share the time since the one before."""
        if not num_tokens:
            return
        last = self._last_token_at[index]
        self._last_token_at[index] = now
        if self.first_token_at is None:
            self.first_token_at = now
        if last is None:
            self.inter_token_s += [0.0] * (num_tokens - 1)
        else:
            self.inter_token_s += [(now - last) / num_tokens] * num_tokens


class Choice:
    """One generated sequence on its way to text.

    While text is withheld (it may become a stop string, or is an incomplete character), tokens wait with
    their logprobs, so that nothing of a token is shown before its text.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._include_stop = params.include_stop_str_in_output
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
        )
        self._waiting_ids: list[int] = []
        self._waiting_logprobs: list[TopLogprobs] | None = None if params.logprobs is None else []

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def advance(self, output: SequenceOutput) -> ChoiceDelta | None:
        """Take a step's tokens; None if there is nothing to show yet."""
        ids = output.token_ids
        ends_with_stop_token = output.finish_reason == "stop" and not self._include_stop
        delta = self._detokenizer.push(ids[:-1] if ends_with_stop_token else ids)
        text, stop_string, num_used = delta.text, delta.stopped, delta.num_tokens_used
        if stop_string is None:
            num_used = len(ids)
            if output.finish_reason is not None:
                rest = self._detokenizer.finish()
                text, stop_string = text + rest.text, rest.stopped
        self._take(ids[:num_used], output.logprobs)
        if stop_string is not None:
            return self._end(text, "stop", stop_string)
        if output.finish_reason is not None:
            return self._end(text, output.finish_reason, output.stop_reason)
        shown = self._show(text, withholding=self._detokenizer.is_holding_back)
        return shown if text or shown.logprobs else None

    def _take(self, ids: list[int], logprobs: list[TopLogprobs] | None) -> None:
        self.num_tokens += len(ids)
        self._waiting_ids += ids
        if self._waiting_logprobs is not None and logprobs is not None:
            self._waiting_logprobs += logprobs[: len(ids)]

    def _show(self, text: str, *, withholding: bool) -> ChoiceDelta:
        if withholding or not (text or self._waiting_logprobs):
            return ChoiceDelta(self.index, text)
        ids, self._waiting_ids = self._waiting_ids, []
        logprobs = self._waiting_logprobs
        if logprobs is not None:
            self._waiting_logprobs = []
        return ChoiceDelta(self.index, text, ids, logprobs)

    def _end(self, text: str, reason: FinishReason, stop_reason: str | int | None) -> ChoiceDelta:
        ids, logprobs = self._waiting_ids, self._waiting_logprobs
        self.finish_reason = reason
        return ChoiceDelta(self.index, text, ids, logprobs, reason, stop_reason)


class MergedStream:
    """The outputs of several requests as they arrive, those of one engine step together."""

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self._arrived: list[SequenceOutput] = []
        self._error: BaseException | None = None
        self._wake = asyncio.Event()
        self._tasks = {asyncio.create_task(self._pump(stream)) for stream in streams}
        for task in self._tasks:
            task.add_done_callback(self._ended)

    def __aiter__(self) -> MergedStream:
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self._tasks:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        arrived, self._arrived = self._arrived, []
        return arrived

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _pump(self, stream: RequestStream) -> None:
        async for outputs in stream:
            self._arrived += outputs
            self._wake.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()
        self._wake.set()


class Generation:
    """The prompts of one API request in the engine, `n` sequences each; choice index = prompt index · n + i.

    `close` must be called however the request ends; it ends in the engine what has not ended there.

    Args:
        request_id: for logs; ids inside the engine are made unique from it.
        arrived_at: `time.monotonic()` of the request's arrival.
        timeout_s: for the whole request, from its arrival; 0: none.
        observe: told once, when the request has ended.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        prompts: Sequence[TokenizedPrompt],
        params: SamplingParams,
        *,
        request_id: str,
        eos_token_ids: tuple[int, ...],
        cache_salt: str | None = None,
        arrived_at: float,
        timeout_s: float = 0.0,
        observe: Callable[[RequestTimings], None] = lambda _: None,
    ) -> None:
        self.prompts = prompts
        self.params = params
        self.choices = [Choice(i, tokenizer, params) for i in range(len(prompts) * params.n)]
        self._arrived_at = arrived_at
        self._scheduled_at: float | None = None
        self._clock = TokenClock(len(self.choices))
        self._failed = False
        self._observe = observe
        self._engine = engine
        self._request_id = request_id
        self._eos_token_ids = eos_token_ids
        self._cache_salt = cache_salt
        self._timeout_s = timeout_s
        self._deadline = arrived_at + timeout_s if timeout_s else None
        self._first_index: dict[str, int] = {}  # engine id → index of its first choice
        self._cached_tokens: dict[str, int] = {}
        self._num_completion_tokens = 0
        self._merged: MergedStream | None = None
        self._stream: AsyncIterator[list[SequenceOutput]] | None = None
        self._closed = False

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            completion_tokens=self._num_completion_tokens,
            cached_tokens=sum(self._cached_tokens.values()),
        )

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return all(choice.finished for choice in self.choices)

    def start(self) -> None:
        """Hand all prompts to the engine.

        Raises:
            EngineError: the engine does not serve; nothing is left behind in it.
        """
        streams = []
        for i, prompt in enumerate(self.prompts):
            engine_id = f"{self._request_id}#{next(_engine_ids)}"
            streams.append(self._engine.submit(self._add_request(engine_id, prompt)))
            self._first_index[engine_id] = i * self.params.n
        if len(streams) == 1:
            self._stream = aiter(streams[0])
        else:
            self._stream = self._merged = MergedStream(streams)

    def _add_request(self, engine_id: str, prompt: TokenizedPrompt) -> AddRequest:
        return AddRequest(
            request_id=engine_id,
            prompt_token_ids=prompt.token_ids,
            params=msgspec.structs.replace(self.params, max_tokens=prompt.max_tokens),
            eos_token_ids=self._eos_token_ids,
            cache_salt=self._cache_salt,
        )

    async def steps(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Deltas, step by step, until every choice is finished.

        Raises:
            EngineError: the engine failed, altogether or for this request.
            HttpError: the request's time is up.
        """
        while not self.finished:
            outputs = await self._next_step()
            now = time.monotonic()
            deltas = [delta for output in outputs if (delta := self._advance(output, now)) is not None]
            if deltas:
                yield deltas

    async def _next_step(self) -> list[SequenceOutput]:
        assert self._stream is not None, "start comes first"
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(self._stream)
        except TimeoutError as error:
            raise request_timeout(f"The request took longer than {self._timeout_s:g} seconds.") from error
        except StopAsyncIteration as error:
            self._failed = True
            raise RequestFailedError("the engine ended the request before it was finished") from error
        except EngineError:
            self._failed = True
            raise

    def _advance(self, output: SequenceOutput, now: float) -> ChoiceDelta | None:
        choice = self.choices[self._first_index[output.request_id] + output.index]
        if choice.finished:
            return None
        if output.finish_reason in ("error", "abort"):
            self._failed = True
            raise RequestFailedError(output.error or "the engine ended the request")
        if self._scheduled_at is None:
            self._scheduled_at = output.scheduled_at
        if output.index == 0:
            self._cached_tokens.setdefault(output.request_id, output.num_cached_tokens)
        if not output.token_ids and output.finish_reason is None:
            return None
        num_before = choice.num_tokens
        delta = choice.advance(output)
        self._num_completion_tokens += choice.num_tokens - num_before
        self._clock.count(choice.index, choice.num_tokens - num_before, now)
        ended = delta is not None and delta.finish_reason is not None
        if ended and output.finish_reason is None:  # a stop string: the engine does not know
            self._engine.abort(output.request_id, [output.index])
        return delta

    def close(self) -> None:
        """End what has not ended. Safe to call more than once."""
        if self._closed:
            return
        self._closed = True
        self._abort_unfinished()
        if self._merged is not None:
            self._merged.close()
        self._observe(self._timings())

    def _abort_unfinished(self) -> None:
        n = self.params.n
        for engine_id, first in self._first_index.items():
            if not all(choice.finished for choice in self.choices[first : first + n]):
                self._engine.abort(engine_id)

    def _timings(self) -> RequestTimings:
        usage = self.usage
        ended = (self.choices[0].finish_reason or "abort") if self.finished else "abort"
        return RequestTimings(
            finish_reason="error" if self._failed else ended,
            n=self.params.n,
            max_tokens=max(prompt.max_tokens for prompt in self.prompts),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            generation_tokens=usage.completion_tokens,
            arrived_at=self._arrived_at,
            scheduled_at=self._scheduled_at,
            first_token_at=self._clock.first_token_at,
            finished_at=time.monotonic(),
            inter_token_s=tuple(self._clock.inter_token_s),
        )

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
from typing import Any

import msgspec

from jaxserve.api.errors import request_timeout
from jaxserve.api.prompts import TokenizedPrompt
from jaxserve.constraints.constraint import CompiledConstraint
from jaxserve.detokenizer import Detokenizer
from jaxserve.engine_client import EngineClient, RequestStream
from jaxserve.errors import EngineError, RequestFailedError
from jaxserve.messages import AddRequest, FinishReason, SequenceOutput, TopLogprobs
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # what is reported of anything less likely: JSON has no infinity
_engine_ids = itertools.count()


@dataclass(slots=True)
class ChoiceDelta:
    """What one step adds to one choice.

    Attributes:
        logprobs: parallel to `token_ids`; None if not asked for.
        finish_reason: set in the choice's last delta.
        stop_reason: the stop string, or the stop token's id.
        prompt_logprobs: of the prompt, from its second token on; in the choice's first delta, if they were asked for.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[TopLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request: each prompt once, all choices that are returned."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class RequestTimings:
    """One request as metrics see it, when it has ended. Times are `time.monotonic()` seconds.

    Attributes:
        finish_reason: of its first sequence; "abort" if the client went away or time was up, "error" if the
            engine failed.
        scheduled_at: when the engine first ran it; None: never.
        first_token_at: None: there was no token.
        inter_token_s: for every token of a choice but its first: seconds since the one before.
        max_tokens: the largest of its prompts.
        generation_tokens: of all sequences that were generated, also of those that were not the best.
    """

    finish_reason: FinishReason
    n: int
    best_of: int
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
        num_sequences: each has its own first token.
    """

    def __init__(self, num_sequences: int) -> None:
        self.first_token_at: float | None = None
        self.inter_token_s: list[float] = []
        self._last_token_at: list[float | None] = [None] * num_sequences

    def count(self, index: int, num_tokens: int, now: float) -> None:
        """Sequence `index` has got tokens; those that came at once share the time since the one before."""
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

    Args:
        end_token_ids: ids that end a sequence; as its last token they have no text, unless it is asked for.

    Attributes:
        num_tokens: those that count: none behind the one that completed a stop string.
        cumulative_logprob: the sum of their logprobs as they are reported; 0 if the engine reports none.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        end_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.index = index
        self.num_tokens = 0
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self._end_token_ids = frozenset() if params.include_stop_str_in_output else end_token_ids
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        self._waiting_ids: list[int] = []
        self._waiting_logprobs: list[TopLogprobs] | None = None if params.logprobs is None else []

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def advance(self, output: SequenceOutput) -> ChoiceDelta | None:
        """Take a step's tokens; None if there is nothing to show yet."""
        ids = output.token_ids
        delta = self._detokenizer.push(ids[:-1] if self._ends_with_silent_token(output) else ids)
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

    def _ends_with_silent_token(self, output: SequenceOutput) -> bool:
        """Not so if a stop string ended the sequence (a beam's end is found by the engine): its text is cut here."""
        if output.finish_reason != "stop" or isinstance(output.stop_reason, str):
            return False
        return bool(output.token_ids) and output.token_ids[-1] in self._end_token_ids

    def _take(self, ids: list[int], logprobs: list[TopLogprobs] | None) -> None:
        self.num_tokens += len(ids)
        self._waiting_ids += ids
        if self._waiting_logprobs is not None and logprobs is not None:
            counted = logprobs[: len(ids)]
            self._waiting_logprobs += counted
            self.cumulative_logprob += sum(max(entry.logprob, MIN_LOGPROB) for entry in counted)

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
    """The prompts of one API request in the engine, `n` choices each; choice index = prompt index · n + i.

    With `best_of` > n the choices are the best of more sequences, and are known only at the end.

    `close` must be called however the request ends; it ends in the engine what has not ended there.

    Args:
        constraint: what each choice's text must be.
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
        constraint: CompiledConstraint | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        arrived_at: float,
        timeout_s: float = 0.0,
        observe: Callable[[RequestTimings], None] = lambda _: None,
    ) -> None:
        self.prompts = prompts
        self.params = params
        # beam search returns its n best itself
        self._per_prompt = params.n if params.use_beam_search else params.num_sequences
        end_token_ids = frozenset((*eos_token_ids, *params.stop_token_ids))
        self._sequences = [
            Choice(i, tokenizer, params, end_token_ids) for i in range(len(prompts) * self._per_prompt)
        ]
        self._returned = self._sequences
        self._arrived_at = arrived_at
        self._scheduled_at: float | None = None
        self._clock = TokenClock(len(self._sequences))
        self._failed = False
        self._observe = observe
        self._engine = engine
        self._request_id = request_id
        self._eos_token_ids = eos_token_ids
        self._constraint = constraint
        self._cache_salt = cache_salt
        self._priority = priority
        self._timeout_s = timeout_s
        self._deadline = arrived_at + timeout_s if timeout_s else None
        self._timer: asyncio.TimerHandle | None = None
        self._late = False
        self._waiter: asyncio.Task[Any] | None = None  # whoever waits for the next step
        self._num_unfinished = len(self._sequences)
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._prompt_index: dict[str, int] = {}  # by engine id
        self._cached_tokens: dict[str, int] = {}
        self._prompt_logprobs: list[list[TopLogprobs]] = [[] for _ in prompts]
        self._begun: set[int] = set()  # sequences that have had a delta
        self._merged: MergedStream | None = None
        self._stream: AsyncIterator[list[SequenceOutput]] | None = None
        self._closed = False

    @property
    def usage(self) -> Usage:
        """So far."""
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(sequence.num_tokens for sequence in self._returned),
            cached_tokens=sum(self._cached_tokens.values()),
        )

    @property
    def finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return self._num_unfinished == 0

    def start(self) -> None:
        """Hand all prompts to the engine.

        Raises:
            EngineError: the engine does not serve; nothing is left behind in it.
        """
        streams = []
        for i, prompt in enumerate(self.prompts):
            engine_id = f"{self._request_id}#{next(_engine_ids)}"
            streams.append(self._engine.submit(self._add_request(engine_id, prompt)))
            self._prompt_index[engine_id] = i
        if len(streams) == 1:
            self._stream = aiter(streams[0])
        else:
            self._stream = self._merged = MergedStream(streams)
        if self._deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(self._deadline, self._expire)

    def _add_request(self, engine_id: str, prompt: TokenizedPrompt) -> AddRequest:
        return AddRequest(
            request_id=engine_id,
            prompt_token_ids=prompt.token_ids,
            params=msgspec.structs.replace(self.params, max_tokens=prompt.max_tokens),
            eos_token_ids=self._eos_token_ids,
            cache_salt=self._cache_salt,
            constraint=self._constraint,
            priority=self._priority,
        )

    def steps(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Deltas, step by step, until every choice is finished.

        Raises:
            EngineError: the engine failed, altogether or for this request.
            HttpError: the request's time is up.
        """
        return self._all_steps() if self._per_prompt == self.params.n else self._best()

    async def _all_steps(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Of all sequences; a delta's index is the sequence's."""
        while not self.finished:
            outputs = await self._next_step()
            now = time.monotonic()
            for output in outputs:
                if output.prompt_logprobs:
                    self._prompt_logprobs[self._prompt_index[output.request_id]] += output.prompt_logprobs
            deltas = [delta for output in outputs if (delta := self._advance(output, now)) is not None]
            if deltas:
                yield deltas

    async def _best(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Of the n sequences of each prompt with the highest cumulative logprob, best first: all in one step."""
        parts: list[list[ChoiceDelta]] = [[] for _ in self._sequences]
        async for deltas in self._all_steps():
            for delta in deltas:
                parts[delta.index].append(delta)
        self._returned = []
        for first in range(0, len(self._sequences), self._per_prompt):
            candidates = self._sequences[first : first + self._per_prompt]
            candidates.sort(key=lambda sequence: -sequence.cumulative_logprob)  # stable: ties stay in order
            self._returned += candidates[: self.params.n]
        yield [_whole(index, parts[sequence.index]) for index, sequence in enumerate(self._returned)]

    async def _next_step(self) -> list[SequenceOutput]:
        """One timer serves the whole request: one a step would cost as much as all the rest of a wait."""
        assert self._stream is not None, "start comes first"
        self._check_time()
        self._waiter = asyncio.current_task()
        try:
            return await anext(self._stream)
        except asyncio.CancelledError:
            # as in asyncio.timeout: if somebody else has cancelled the task, too, that counts
            if self._late and self._waiter is not None and self._waiter.uncancel() == 0:
                self._check_time()
            raise
        except StopAsyncIteration as error:
            raise self._failure("the engine ended the request before it was finished") from error
        except EngineError:
            self._failed = True
            raise
        finally:
            self._waiter = None

    def _expire(self) -> None:
        self._late = True
        if self._waiter is not None:
            self._waiter.cancel()

    def _check_time(self) -> None:
        if self._late:
            raise request_timeout(f"The request took longer than {self._timeout_s:g} seconds.")

    def _advance(self, output: SequenceOutput, now: float) -> ChoiceDelta | None:
        prompt_index = self._prompt_index[output.request_id]
        sequence = self._sequences[prompt_index * self._per_prompt + output.index]
        if sequence.finished:
            return None
        if output.finish_reason in ("error", "abort"):
            raise self._failure(output.error or "the engine ended the request")
        if self._scheduled_at is None:
            self._scheduled_at = output.scheduled_at
        if output.index == 0:
            self._cached_tokens.setdefault(output.request_id, output.num_cached_tokens)
        if not output.token_ids and output.finish_reason is None:
            return None
        num_before = sequence.num_tokens
        delta = sequence.advance(output)
        self._clock.count(sequence.index, sequence.num_tokens - num_before, now)
        if delta is None:
            return None
        if delta.finish_reason is not None:
            self._num_unfinished -= 1
            if output.finish_reason is None:  # a stop string: the engine does not know
                self._engine.abort(output.request_id, [output.index])
        if sequence.index not in self._begun:
            self._begun.add(sequence.index)
            delta.prompt_logprobs = self._logprobs_of_prompt(prompt_index)
        return delta

    def _logprobs_of_prompt(self, index: int) -> list[TopLogprobs] | None:
        if self.params.prompt_logprobs is None:
            return None
        logprobs, expected = self._prompt_logprobs[index], len(self.prompts[index].token_ids) - 1
        if len(logprobs) != expected:
            raise self._failure(f"the engine gave {len(logprobs)} of {expected} prompt logprobs")
        return logprobs

    def _failure(self, message: str) -> RequestFailedError:
        self._failed = True
        return RequestFailedError(message)

    def close(self) -> None:
        """End what has not ended. Safe to call more than once."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._abort_unfinished()
        if self._merged is not None:
            self._merged.close()
        self._observe(self._timings())

    def _abort_unfinished(self) -> None:
        for engine_id, index in self._prompt_index.items():
            first = index * self._per_prompt
            if not all(sequence.finished for sequence in self._sequences[first : first + self._per_prompt]):
                self._engine.abort(engine_id)

    def _timings(self) -> RequestTimings:
        usage = self.usage
        ended = (self._sequences[0].finish_reason or "abort") if self.finished else "abort"
        return RequestTimings(
            finish_reason="error" if self._failed else ended,
            n=self.params.n,
            best_of=self.params.num_sequences,
            max_tokens=max(prompt.max_tokens for prompt in self.prompts),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            generation_tokens=sum(sequence.num_tokens for sequence in self._sequences),
            arrived_at=self._arrived_at,
            scheduled_at=self._scheduled_at,
            first_token_at=self._clock.first_token_at,
            finished_at=time.monotonic(),
            inter_token_s=tuple(self._clock.inter_token_s),
        )


def _whole(index: int, deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """All deltas of a sequence as one, which gets another index."""
    first, last = deltas[0], deltas[-1]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return ChoiceDelta(
        index,
        "".join(delta.text for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
        logprobs,
        last.finish_reason,
        last.stop_reason,
        first.prompt_logprobs,
    )

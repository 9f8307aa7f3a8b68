"""An engine client without an engine: tests say what it generates, and see what it was asked to do.

Scripted (`script=`): every request gets the steps that the script returns for it, one event-loop turn apart.
By hand (no script): `emit` sends outputs, `fail` ends all open streams with an error.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

from jaxserve.engine_client import EngineLoad
from jaxserve.errors import EngineError, RequestError
from jaxserve.messages import (
    AddRequest,
    EngineInfo,
    EngineStats,
    FinishReason,
    SequenceOutput,
    TopLogprobs,
)

Script = Callable[[AddRequest], list[list[SequenceOutput]]]


def fake_info(*, max_model_len: int = 64, vocab_size: int = 512, max_num_seqs: int = 8) -> EngineInfo:
    return EngineInfo(
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=64,
        block_size=16,
        num_blocks=65,
        kv_cache_dtype="float32",
        platform="cpu",
        summary=["KV cache: 64 blocks of 16 = 1,024 tokens"],
    )


class FakeRequestStream:
    """Outputs of one request; ends when each of its sequences is finished or aborted."""

    def __init__(self, request: AddRequest) -> None:
        params = request.params
        self.live = set(range(params.n if params.use_beam_search else params.num_sequences))
        self._arrived: asyncio.Queue[list[SequenceOutput] | EngineError | None] = asyncio.Queue()
        self._ended = False

    def __aiter__(self) -> FakeRequestStream:
        return self

    async def __anext__(self) -> list[SequenceOutput]:
        if self._ended and self._arrived.empty():
            raise StopAsyncIteration
        arrived = await self._arrived.get()
        if isinstance(arrived, EngineError):
            self._ended = True
            raise arrived
        if arrived is None:
            raise StopAsyncIteration
        return arrived

    def put(self, outputs: Iterable[SequenceOutput]) -> None:
        wanted = [output for output in outputs if output.index in self.live]
        if wanted:
            self._arrived.put_nowait(wanted)
        self.end({output.index for output in wanted if output.finish_reason is not None})

    def end(self, indices: set[int]) -> None:
        self.live -= indices
        if not self.live and not self._ended:
            self._ended = True
            self._arrived.put_nowait(None)

    def fail(self, error: EngineError) -> None:
        if not self._ended:
            self.live.clear()
            self._arrived.put_nowait(error)


class FakeEngineClient:
    """Implements `jaxserve.engine_client.EngineClient`.

    Attributes:
        submitted: every request, in order.
        aborted: every call of `abort`, in order.
        fixed_load: if set, `load` is this.
        error: if set, `check_serving` and `submit` raise it.
    """

    def __init__(self, *, script: Script | None = None, info: EngineInfo | None = None) -> None:
        self.script = script
        self.submitted: list[AddRequest] = []
        self.aborted: list[tuple[str, list[int] | None]] = []
        self.error: EngineError | None = None
        self.profiling = False
        self.fixed_load: EngineLoad | None = None
        self.stats = EngineStats()
        self._info = info or fake_info()
        self._streams: dict[str, FakeRequestStream] = {}

    @property
    def info(self) -> EngineInfo:
        if self.error is not None:
            raise self.error
        return self._info

    @property
    def live(self) -> dict[str, set[int]]:
        """Sequences that neither finished nor were aborted, by request id."""
        return {request_id: stream.live for request_id, stream in self._streams.items() if stream.live}

    @property
    def load(self) -> EngineLoad:
        if self.fixed_load is not None:
            return self.fixed_load
        live = self.live
        return EngineLoad(len(live), 0, sum(len(indices) for indices in live.values()))

    def check_serving(self) -> None:
        if self.error is not None:
            raise self.error

    def submit(self, request: AddRequest) -> FakeRequestStream:
        self.check_serving()
        assert request.request_id not in self._streams, "request ids must be unique"
        self.submitted.append(request)
        stream = self._streams[request.request_id] = FakeRequestStream(request)
        if self.script is not None:
            self._play(stream, iter(self.script(request)))
        return stream

    def abort(self, request_id: str, indices: list[int] | None = None) -> None:
        self.aborted.append((request_id, indices))
        stream = self._streams[request_id]
        stream.end(set(stream.live) if indices is None else set(indices))

    async def profile(self, *, running: bool) -> None:
        self.check_serving()
        if running == self.profiling:
            raise RequestError("A trace is running already." if running else "A trace is not running.")
        self.profiling = running

    def emit(self, *outputs: SequenceOutput) -> None:
        """One step: outputs of any requests."""
        for request_id in dict.fromkeys(output.request_id for output in outputs):
            self._streams[request_id].put(o for o in outputs if o.request_id == request_id)

    def fail(self, error: EngineError) -> None:
        """The engine ends: every open stream raises, and so does every later call."""
        self.error = error
        for stream in self._streams.values():
            stream.fail(error)

    def _play(self, stream: FakeRequestStream, steps: Iterable[list[SequenceOutput]]) -> None:
        remaining = iter(steps)

        def play_one() -> None:
            step = next(remaining, None)
            if step is not None and stream.live:
                stream.put(step)
                asyncio.get_running_loop().call_soon(play_one)

        asyncio.get_running_loop().call_soon(play_one)


def generate(
    request: AddRequest,
    token_ids: Sequence[Sequence[int]],
    *,
    finish_reason: FinishReason = "stop",
    stop_reason: int | str | None = None,
    tokens_per_step: int = 1,
    num_cached_tokens: int = 0,
    logprobs: Callable[[int, int], TopLogprobs] | None = None,
) -> list[list[SequenceOutput]]:
    """Steps in which sequence i of the request generates `token_ids[i]`, one after the other like an engine.

    Args:
        finish_reason: comes with each sequence's last token.
        logprobs: (token id, k) → what is reported; called if the request asks for k logprobs of generated tokens, or
            of those of the prompt.
    """
    now = time.monotonic()
    steps = [
        [
            SequenceOutput(request.request_id, i, [], num_cached_tokens=num_cached_tokens, scheduled_at=now)
            for i in range(len(token_ids))
        ]
    ]
    if request.params.prompt_logprobs is not None and logprobs is not None:
        k = request.params.prompt_logprobs
        entries = [logprobs(token_id, k) for token_id in request.prompt_token_ids[1:]]
        for start in range(0, len(entries), 3):  # in chunks, as long prompts are computed
            part = entries[start : start + 3]
            steps.append([SequenceOutput(request.request_id, 0, [], prompt_logprobs=part)])
    if request.params.max_tokens == 0:
        ends = [SequenceOutput(request.request_id, i, [], "length") for i in range(len(token_ids))]
        return [*steps, ends]
    for start in range(0, max(len(ids) for ids in token_ids), tokens_per_step):
        step = []
        for i, ids in enumerate(token_ids):
            new = list(ids[start : start + tokens_per_step])
            if not new:
                continue
            last = start + tokens_per_step >= len(ids)
            k = request.params.logprobs
            step.append(
                SequenceOutput(
                    request.request_id,
                    i,
                    new,
                    finish_reason=finish_reason if last else None,
                    stop_reason=stop_reason if last else None,
                    logprobs=None if k is None or logprobs is None else [logprobs(t, k) for t in new],
                    num_cached_tokens=num_cached_tokens,
                )
            )
        steps.append(step)
    return steps

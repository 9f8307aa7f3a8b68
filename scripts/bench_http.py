"""What the API process costs per streamed chunk: N streams over real sockets, from an engine that costs nothing.

The server runs in this process, the client in another. Prints chunks per second and the server's processor time
per chunk; `--profile` prints where it goes. The tokenizer and template are the demo model's.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from jaxserve.api.admission import Admission
from jaxserve.api.app import create_app
from jaxserve.api.context import ServerContext
from jaxserve.api.http_server import HttpServer, listen
from jaxserve.api.metrics import Metrics
from jaxserve.chat_template import load_chat_template
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.constraints.worker import ConstraintWorker
from jaxserve.demo_model import fetch_demo_model
from jaxserve.engine_client import EngineLoad, OutputStream, RequestStream
from jaxserve.generation_config import GenerationDefaults
from jaxserve.messages import AddRequest, EngineInfo, EngineStats, SequenceOutput
from jaxserve.tokenizer import load_tokenizer

MODEL = "demo"


class FreeEngine:
    """An `EngineClient` that steps whenever every stream has taken its tokens of the step before."""

    def __init__(self, vocab_size: int) -> None:
        self.info = EngineInfo(
            max_model_len=8192,
            vocab_size=vocab_size,
            max_num_seqs=1024,
            max_num_batched_tokens=1024,
            block_size=16,
            num_blocks=1024,
            kv_cache_dtype="float32",
            platform="cpu",
            summary=[],
        )
        self.stats = EngineStats()
        self.load = EngineLoad()
        self._running: dict[str, _Running] = {}
        self._stepping = False

    def check_serving(self) -> None:
        """It always does."""

    def submit(self, request: AddRequest) -> RequestStream:
        running = self._running[request.request_id] = _Running(request)
        if not self._stepping:
            self._stepping = True
            asyncio.get_running_loop().call_soon(self._step)
        return running.stream

    def abort(self, request_id: str, indices: list[int] | None = None) -> None:
        """A stream that nobody reads costs nothing."""

    async def profile(self, *, running: bool) -> None:
        """Nothing runs here."""

    def _step(self) -> None:
        """The next one comes in the loop's next turn, behind all who have been woken by this one."""
        for request_id, running in list(self._running.items()):
            if not running.advance():
                del self._running[request_id]
        self._stepping = bool(self._running)
        if self._stepping:
            asyncio.get_running_loop().call_soon(self._step)


class _Running:
    """A request, whose stream is that of the real client."""

    def __init__(self, request: AddRequest) -> None:
        self.stream = OutputStream(request)
        self._request_id = request.request_id
        self._num_left = request.params.max_tokens

    def advance(self) -> bool:
        """Give it a token; whether more are to come."""
        self._num_left -= 1
        reason = None if self._num_left else "length"
        token_id = 1000 + self._num_left % 2000
        self.stream.put([SequenceOutput(self._request_id, 0, [token_id], finish_reason=reason)])
        return self._num_left > 0


CLIENT = """
import asyncio, json, sys, time
port, streams, tokens, rounds = map(int, sys.argv[1:])
body = json.dumps({"model": "demo", "stream": True, "max_tokens": tokens, "ignore_eos": True,
                   "messages": [{"role": "user", "content": "Tell me a story."}]}).encode()
head = (b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\n"
        b"Content-Type: application/json\\r\\nConnection: close\\r\\n")
async def one():
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head + b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
    status = await reader.readline()
    assert b" 200 " in status, status + await reader.read()
    chunks = 0
    while data := await reader.read(1 << 16):
        chunks += data.count(b"data: {")
    writer.close()
    return chunks
async def main():
    await asyncio.gather(*(one() for _ in range(streams)))
    for _ in range(rounds):
        began = time.perf_counter()
        chunks = sum(await asyncio.gather(*(one() for _ in range(streams))))
        print(json.dumps([chunks, time.perf_counter() - began]), flush=True)
asyncio.run(main())
"""


def make_context(engine: FreeEngine, config: ServerConfig) -> ServerContext:
    tokenizer = load_tokenizer(fetch_demo_model())
    context = ServerContext(
        config=config,
        engine=engine,
        metrics=Metrics(),
        admission=Admission(engine, config),
        executor=ThreadPoolExecutor(1),
        created=int(time.time()),
        system_fingerprint="bench",
        constraints=ConstraintWorker(fetch_demo_model(), 49152, (2,)),
    )
    context.set_model(tokenizer, load_chat_template(None, tokenizer), GenerationDefaults(eos_token_ids=(2,)))
    return context


async def run(arguments: argparse.Namespace) -> None:
    engine_config = EngineConfig(model=str(fetch_demo_model()))
    config = ServerConfig(
        engine=engine_config, served_model_names=(MODEL,), port=0, max_num_queued_reqs=1 << 20
    )
    context = make_context(FreeEngine(vocab_size=49152), config)
    listener = listen(config)
    port = listener.getsockname()[1]
    stop = asyncio.Event()
    serving = asyncio.create_task(HttpServer(create_app(context), config, listener).serve(stop))
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CLIENT,
        *map(str, (port, arguments.streams, arguments.tokens, arguments.rounds)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdout is not None
    profile = cProfile.Profile()
    if arguments.profile:
        profile.enable()
    before = time.process_time()
    while line := await client.stdout.readline():
        chunks, seconds = json.loads(line)
        spent, before = time.process_time() - before, time.process_time()
        print(
            f"{arguments.streams} streams: {chunks:,} chunks in {seconds:.2f} s, {chunks / seconds:,.0f} chunks/s, "
            f"{spent / chunks * 1e6:.1f} µs of the server's processor time a chunk",
            flush=True,
        )
    if arguments.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)
    await client.wait()
    stop.set()
    await serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()

"""The server's life: start, serve, drain, end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import jaxserve
from jaxserve.api.admission import Admission
from jaxserve.api.app import create_app
from jaxserve.api.context import ServerContext
from jaxserve.api.errors import unavailable
from jaxserve.api.http_server import HttpServer
from jaxserve.api.metrics import Metrics
from jaxserve.chat_template import load_chat_template
from jaxserve.config import ServerConfig
from jaxserve.constraints.worker import ConstraintWorker
from jaxserve.engine_client import SocketEngineClient
from jaxserve.errors import EngineStartingError
from jaxserve.generation_config import load_generation_defaults
from jaxserve.messages import EngineInfo
from jaxserve.models.loader.hub import resolve_model
from jaxserve.tokenizer import load_tokenizer

logger = logging.getLogger("jaxserve")
POLL_S = 0.05
FAREWELL_S = 1.0  # for the last events of streams that are cut off
HARD_LIMIT_S = 10.0  # behind the drain, should anything refuse to end
KILL_LIMIT_S = 4.0  # to give back an engine's memory


class Server:
    """One run of the server.

    Args:
        config: with the names of the model.
        path: of the model.
        listener: as from `listen`.
        engine: on its way to be ready; who started it stops it.
        started: on the monotonic clock.
    """

    def __init__(
        self,
        config: ServerConfig,
        path: Path,
        listener: socket.socket,
        engine: SocketEngineClient,
        started: float,
    ) -> None:
        self._config = config
        self._path = path
        self._listener = listener
        self._started = started
        name = config.model_names[0]
        self._engine = engine
        self._metrics = Metrics(name, lambda: self._engine.stats, self._engine_info)
        engine.on_step = self._metrics.observe_step
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        fingerprint = sha256(f"{jaxserve.__version__} {name}".encode()).hexdigest()[:12]
        self._context = ServerContext(
            config=config,
            engine=self._engine,
            metrics=self._metrics,
            admission=Admission(self._engine, config, self._metrics.count_rejection),
            executor=self._executor,
            created=int(time.time()),
            system_fingerprint=f"jaxserve-{fingerprint}",
        )
        self._http = HttpServer(create_app(self._context), config, listener)
        self._context.num_connections = lambda: self._http.num_connections
        self._stop = asyncio.Event()
        self._drain_task: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Start everything at once, serve, drain; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        http = asyncio.create_task(self._http.serve(self._stop))
        start = asyncio.create_task(self._start())
        try:
            await asyncio.wait({http, start}, return_when=asyncio.FIRST_COMPLETED)
            if start.done() and start.exception() is not None:
                self._stop.set()
            elif not start.done():  # a signal came during the start
                start.cancel()
            await http
            await asyncio.gather(start, return_exceptions=True)
        finally:
            self._context.templates.process.close()
            if self._context.constraints is not None:
                self._context.constraints.process.close()
            self._executor.shutdown(wait=False, cancel_futures=True)
        if not start.cancelled() and (error := start.exception()) is not None:
            raise error
        return 0

    async def _start(self) -> None:
        """Load the tokenizer while the engine process loads the model."""
        logger.info("starting: /health answers at %s", self._address())
        await self._engine.connect()
        self._context.templates.process.start()
        loading = asyncio.get_running_loop().run_in_executor(self._executor, self._load_text_side)
        ready = asyncio.ensure_future(self._engine.wait_ready())
        try:
            await asyncio.gather(loading, ready)
        finally:
            ready.cancel()
        info = ready.result()
        self._start_constraints(info)
        gc.collect()
        gc.freeze()  # what lives as long as the server: a collection beside streams need not walk it
        for line in info.summary:
            logger.info("%s", line)
        seconds = time.monotonic() - self._started
        logger.info("ready in %.1f s: %s at %s", seconds, self._config.model_names[0], self._address())

    def _start_constraints(self, info: EngineInfo) -> None:
        """Its worker loads beside the first requests; one that needs it waits."""
        worker = ConstraintWorker(
            self._tokenizer_path(), info.vocab_size, self._context.generation_defaults.eos_token_ids
        )
        self._context.constraints = worker
        worker.process.start()

    def _tokenizer_path(self) -> Path:
        source = self._config.engine.tokenizer
        return resolve_model(source) if source else self._path

    def _address(self) -> str:
        if self._config.uds:
            return f"unix:{self._config.uds}"
        scheme = "https" if self._config.ssl_certfile else "http"
        host = self._config.host.strip("[]")
        port = self._listener.getsockname()[1]  # --port 0 lets the system choose
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{self._config.root_path}"

    def _load_text_side(self) -> None:
        started = time.monotonic()
        config = self._config
        tokenizer = load_tokenizer(self._tokenizer_path())
        template = load_chat_template(config.chat_template, tokenizer)
        defaults = load_generation_defaults(
            self._path, config.generation_config, config.override_generation_config, tokenizer
        )
        if template is None:
            logger.info("the model has no chat template: /v1/chat/completions needs --chat-template")
        self._context.set_model(tokenizer, template, defaults)
        logger.info("tokenizer and chat template loaded in %.1f s", time.monotonic() - started)

    def _engine_info(self) -> EngineInfo | None:
        try:
            return self._engine.info
        except EngineStartingError:
            return None

    # --- the end --------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._context.draining:
            logger.warning("second signal: ending now")
            self._end_hard(1)
        self._context.draining = True
        logger.info("shutting down: %d requests are open", self._context.num_open_requests)
        self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Wait for the open requests; cut off what is left at the limit, with a word to its client."""
        await self._until_no_request_is_open(self._config.shutdown_timeout_s)
        left = self._context.num_open_requests
        if left:
            logger.warning("shutting down: %d requests are cut off", left)
            self._engine.fail_all(unavailable("draining", "The server is shutting down.", retry_after_s=10))
            await self._until_no_request_is_open(FAREWELL_S)
        asyncio.get_running_loop().call_later(HARD_LIMIT_S, self._end_hard, 0)
        self._stop.set()

    async def _until_no_request_is_open(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while self._context.num_open_requests and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)

    def _end_hard(self, status: int) -> NoReturn:
        if not self._engine.kill_and_wait(KILL_LIMIT_S):
            logger.warning("the engine process has not given back its memory yet")
        sys.stderr.flush()
        os._exit(status)

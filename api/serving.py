"""The server's life: start, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import hypercorn.asyncio
from hypercorn.config import Config

import jaxserve
from jaxserve.api.admission import Admission
from jaxserve.api.app import create_app
from jaxserve.api.context import ServerContext
from jaxserve.api.errors import unavailable
from jaxserve.api.metrics import Metrics
from jaxserve.chat_template import load_chat_template
from jaxserve.config import ServerConfig
from jaxserve.engine_client import SocketEngineClient
from jaxserve.errors import EngineStartingError
from jaxserve.generation_config import load_generation_defaults
from jaxserve.messages import EngineInfo
from jaxserve.models.loader.hub import resolve_model
from jaxserve.tokenizer import load_tokenizer

logger = logging.getLogger("jaxserve")
MAX_HEADER_BYTES = 16 << 10
LOOPBACK = ("127.", "localhost", "::1", "[::1]")
POLL_S = 0.05
FAREWELL_S = 1.0  # for the last events of streams that are cut off
HARD_LIMIT_S = 10.0  # behind the drain, should a connection refuse to close


def serve(config: ServerConfig) -> int:
    """Serve until told to end; returns the exit status.

    Raises:
        ConfigError, ModelLoadError: the model or a flag is wrong.
    """
    config = replace(config, served_model_names=config.model_names)
    path = resolve_model(config.engine.model)
    config = replace(config, engine=replace(config.engine, model=str(path)))
    if not config.uds and not config.host.startswith(LOOPBACK) and not config.api_keys:
        logger.warning(
            "NO API KEY: everybody who can reach %s can use this server. Set JAXSERVE_API_KEY.", config.host
        )
    return asyncio.run(_Server(config, path).run())


class _Server:
    """One run of the server."""

    def __init__(self, config: ServerConfig, path: Path) -> None:
        self._config = config
        self._path = path
        self._started = time.monotonic()
        name = config.model_names[0]
        self._engine = SocketEngineClient(
            config.engine,
            stall_limit_s=config.stall_limit_s,
            on_step=lambda stats: self._metrics.observe_step(stats),
        )
        self._metrics = Metrics(name, lambda: self._engine.stats, self._engine_info)
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
        self._stop = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Start everything at once, serve, drain; the engine process is gone when this returns."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        http = asyncio.create_task(
            hypercorn.asyncio.serve(
                create_app(self._context), self._hypercorn_config(), shutdown_trigger=self._stop.wait
            )
        )
        start = asyncio.create_task(self._start())
        try:
            await asyncio.wait({http, start}, return_when=asyncio.FIRST_COMPLETED)
            if not start.done():  # the address is taken, or a signal came during the start
                start.cancel()
            elif start.exception() is not None:
                self._stop.set()
                await http
                raise start.exception() or RuntimeError
            await http
        finally:
            await self._engine.stop()
            self._executor.shutdown(wait=False, cancel_futures=True)
        return self._status

    async def _start(self) -> None:
        """Load the tokenizer while the engine process loads the model."""
        await self._engine.start()
        loading = asyncio.get_running_loop().run_in_executor(self._executor, self._load_text_side)
        ready = asyncio.ensure_future(self._engine.wait_ready())
        try:
            await asyncio.gather(loading, ready)
        finally:
            ready.cancel()
        info = ready.result()
        for line in info.summary:
            logger.info("%s", line)
        if self._config.uds:
            address = f"unix:{self._config.uds}"
        else:
            scheme = "https" if self._config.ssl_certfile else "http"
            address = f"{scheme}://{self._config.host}:{self._config.port}{self._config.root_path}"
        seconds = time.monotonic() - self._started
        logger.info("ready in %.1f s: %s at %s", seconds, self._config.model_names[0], address)

    def _load_text_side(self) -> None:
        config = self._config
        source = config.engine.tokenizer
        tokenizer = load_tokenizer(resolve_model(source) if source else self._path)
        template = load_chat_template(config.chat_template, tokenizer)
        defaults = load_generation_defaults(
            self._path, config.generation_config, config.override_generation_config, tokenizer
        )
        if defaults.repetition_penalty not in (None, 1.0):
            logger.warning(
                "the model's generation config asks for a repetition_penalty of %g, which this version does not apply",
                defaults.repetition_penalty,
            )
        self._context.set_model(tokenizer, template, defaults)

    def _engine_info(self) -> EngineInfo | None:
        try:
            return self._engine.info
        except EngineStartingError:
            return None

    def _hypercorn_config(self) -> Config:
        server = self._config
        config = Config()
        config.bind = [f"unix:{server.uds}" if server.uds else f"{_bracketed(server.host)}:{server.port}"]
        config.root_path = server.root_path
        config.keyfile, config.certfile = server.ssl_keyfile, server.ssl_certfile
        config.ca_certs = server.ssl_ca_certs
        config.h11_max_incomplete_size = MAX_HEADER_BYTES
        config.include_server_header = False
        config.graceful_timeout = FAREWELL_S
        config.shutdown_timeout = FAREWELL_S
        config.errorlog = logging.getLogger("jaxserve.http")
        config.errorlog.setLevel(logging.WARNING)
        config.accesslog = None
        config.backlog = 1024
        return config

    # --- the end --------------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        if self._context.draining:
            logger.warning("second signal: ending now")
            self._engine.kill()
            os._exit(1)
        self._context.draining = True
        logger.info("shutting down: %d requests left", self._context.admission.num_requests)
        self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Wait for the running requests; cut off what is left at the limit, with a word to its client."""
        deadline = time.monotonic() + self._config.shutdown_timeout_s
        while self._context.admission.num_requests and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        left = self._context.admission.num_requests
        if left:
            logger.warning("shutting down: %d requests cut off", left)
            self._engine.fail_all(unavailable("draining", "The server is shutting down.", retry_after_s=10))
            cut = time.monotonic() + FAREWELL_S
            while self._context.admission.num_requests and time.monotonic() < cut:
                await asyncio.sleep(POLL_S)
        asyncio.get_running_loop().call_later(HARD_LIMIT_S, self._end_hard)
        self._stop.set()

    def _end_hard(self) -> None:
        self._engine.kill()
        sys.stderr.flush()
        os._exit(0)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host

"""From a configuration to a server; `jaxserve.api.server`, which takes long to import, once the engine has begun."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import msgspec

from jaxserve.api.http_server import hypercorn_config, listen
from jaxserve.config import ServerConfig
from jaxserve.engine_client import ENGINE_COMMAND, SocketEngineClient, engine_environment
from jaxserve.models.loader.hub import resolve_model

logger = logging.getLogger("jaxserve")


def serve(config: ServerConfig) -> int:
    """Serve until told to end; returns the exit status.

    Raises:
        ConfigError, ModelLoadError: the model or a flag is wrong.
    """
    config = replace(config, served_model_names=config.model_names)
    hypercorn_config(config)  # raises early if a TLS file is wrong
    path = resolve_model(config.engine.model)
    config = replace(config, engine=replace(config.engine, model=str(path)))
    if not config.uds and not config.api_keys and not is_loopback(config.host):
        logger.warning(
            "NO API KEY: everybody who can reach %s can use this server. Set JAXSERVE_API_KEY.", config.host
        )
    with listen(config) as listener:
        try:
            return asyncio.run(_serve(config, path, listener))
        finally:
            if config.uds:
                Path(config.uds).unlink(missing_ok=True)


async def _serve(config: ServerConfig, path: Path, listener: socket.socket) -> int:
    started = time.monotonic()
    engine = SocketEngineClient(
        config.engine,
        stall_limit_s=config.stall_limit_s,
        command=(*ENGINE_COMMAND, "--log-level", config.log_level),
    )
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):  # until the server has something to drain
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await engine.spawn()
        from jaxserve.api.server import Server  # half a second, in which the engine begins

        return await Server(config, path, listener, engine, started).run()
    except asyncio.CancelledError:
        return 0
    finally:
        await engine.stop()


def follow(config: ServerConfig) -> NoReturn:
    """Become a process that serves nobody and runs what process 0 runs.

    Raises:
        ConfigError, ModelLoadError: the model is wrong.
    """
    path = resolve_model(config.engine.model)
    engine = msgspec.json.encode(asdict(replace(config.engine, model=str(path)))).decode()
    command = [sys.executable, "-m", "jaxserve.follower", "--log-level", config.log_level, engine]
    os.execve(sys.executable, command, engine_environment())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)

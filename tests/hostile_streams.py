"""Streams that decode while hostile constraints arrive: who is held up, and by how much."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import httpx

from jaxserve.constraints.constraint import Constraint
from tests.hostile_constraints import request_fields

AT_ONCE = 5  # constraints in a row before an equally long pause


class Refusal(NamedTuple):
    """The answer to one constraint."""

    name: str
    status: int
    code: str
    seconds: float


@dataclass
class Observation:
    """What happened.

    Attributes:
        refusals: in the order in which they were asked for.
        beside: seconds between two tokens of a stream while constraints were being refused.
        alone: those while the streams had the server for themselves.
        tokens: of each stream, counted from the first constraint on.
    """

    refusals: list[Refusal] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


async def observe(
    url: str, model: str, constraints: Mapping[str, Constraint], *, num_streams: int = 16, max_tokens: int
) -> Observation:
    """Send every constraint, one after the other, while streams decode; with pauses as long as it takes.

    Args:
        url: of the server, without a path.
        max_tokens: of each stream; more than come in that time.
    """
    limits = httpx.Limits(max_connections=num_streams + 1)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        stamps: list[list[float]] = [[] for _ in range(num_streams)]
        started = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            streams = [
                group.create_task(_stream(client, model, max_tokens, i, stamps, started))
                for i in range(num_streams)
            ]
            await started.wait()
            result, begin = Observation(), time.monotonic()
            busy = await _send_all(client, model, constraints, result)
            ended = [stream.done() for stream in streams]
            for stream in streams:
                stream.cancel()
    assert not any(ended), "the streams were too short for so many constraints"
    for times in stamps:
        result.tokens.append(sum(at > begin for at in times))
        for before, at in pairwise(at for at in times if at > begin):
            overlaps = any(before < end and at > start for start, end in busy)
            (result.beside if overlaps else result.alone).append(at - before)
    return result


async def _send_all(
    client: httpx.AsyncClient, model: str, constraints: Mapping[str, Constraint], result: Observation
) -> list[tuple[float, float]]:
    """The times when constraints were being refused."""
    busy = []
    names = list(constraints)
    for first in range(0, len(names), AT_ONCE):
        start = time.monotonic()
        for name in names[first : first + AT_ONCE]:
            result.refusals.append(await _refusal(client, model, name, constraints[name]))
        end = time.monotonic()
        busy.append((start, end))
        await asyncio.sleep(end - start)
    return busy


async def _refusal(client: httpx.AsyncClient, model: str, name: str, constraint: Constraint) -> Refusal:
    body = {"model": model, "prompt": "x", "max_tokens": 8, **request_fields(constraint)}
    started = time.monotonic()
    response = await client.post("/v1/completions", json=body)
    seconds = time.monotonic() - started
    answer: dict[str, Any] = response.json()
    return Refusal(name, response.status_code, str(answer.get("error", {}).get("code")), seconds)


async def _stream(
    client: httpx.AsyncClient,
    model: str,
    max_tokens: int,
    index: int,
    stamps: Sequence[list[float]],
    started: asyncio.Event,
) -> None:
    """Note when a stream's tokens come; say when every stream has one."""
    body = {"model": model, "prompt": f"Stream {index}:", "max_tokens": max_tokens, "ignore_eos": True}
    body |= {"stream": True, "seed": index}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                stamps[index].append(time.monotonic())
                if not started.is_set() and all(stamps):
                    started.set()

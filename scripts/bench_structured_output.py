"""What constraints cost a server: python scripts/bench_structured_output.py [URL]; for any server with OpenAI's API.

Takes every sixth schema of tests/conformance_schemas.py as response_format. One by one: time to the first token without
a constraint, with it for the first time, and again; the difference is what compiling costs, and what a known one does.
Then all of them, `--concurrency` at a time, constrained and free with as many tokens. What the server refuses is
counted, and what jsonschema calls invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.conformance import Case, all_cases

EVERY = 6


class Answer(NamedTuple):
    """`text`: None if the request was refused, and then `reason` says why."""

    text: str | None
    num_tokens: int
    first_token_s: float
    seconds: float
    cut: bool = False
    reason: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--every", type=int, default=EVERY, help="take each so manieth schema")
    asyncio.run(_run(parser.parse_args()))


async def _run(args: argparse.Namespace) -> None:
    cases = [case for case in all_cases() if case.name.startswith("schema/")][:: args.every]
    async with httpx.AsyncClient(base_url=args.url, timeout=300) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        server = _Server(client, model)
        for _ in range(2):
            await server.ask(
                cases[0], 0, constrained=False, max_tokens=2
            )  # what a first request pays is not meant
        await _one_by_one(server, cases)
        await _all_at_once(server, cases, args)


class _Server:
    """Asks one server."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def ask(
        self, case: Case, seed: int, *, constrained: bool, max_tokens: int, ignore_eos: bool = False
    ) -> Answer:
        """A streamed answer."""
        prompt = f"Give an example of: {case.name.partition('/')[2]}"
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "seed": seed,
        }
        body |= {"temperature": 1, "max_tokens": max_tokens, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "ignore_eos": ignore_eos}
        if constrained:
            schema = json.loads(case.constraint.text or '{"type": "object"}')
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema},
            }
        started, first, text, usage, reason = time.perf_counter(), 0.0, "", 0, None
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return Answer(None, 0, 0.0, 0.0, reason=response.text[:200])
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return Answer(None, 0, 0.0, 0.0, reason=str(chunk["error"])[:200])
                for choice in chunk["choices"]:
                    content = choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
                    text += content
                    if content and not first:
                        first = time.perf_counter() - started
                usage = (chunk.get("usage") or {}).get("completion_tokens", usage)
        return Answer(text, usage, first, time.perf_counter() - started, reason == "length")


async def _one_by_one(server: _Server, cases: Sequence[Case]) -> None:
    free, cold, warm = [], [], []
    for case in cases:
        for _ in range(2):  # the first time, the prompt is new
            plain = await server.ask(case, 0, constrained=False, max_tokens=2, ignore_eos=True)
        first = await server.ask(case, 0, constrained=True, max_tokens=2)
        again = await server.ask(case, 0, constrained=True, max_tokens=2)
        if first.text is None or again.text is None:
            print(f"REFUSED {case.name}: {first.reason or again.reason}")
            continue
        free.append(plain.first_token_s)
        cold.append(first.first_token_s)
        warm.append(again.first_token_s)
    print(f"first token of {len(free)}: free {_percentiles(free)}; constrained, new {_percentiles(cold)}")
    print(f"    known {_percentiles(warm)}")
    extra = [c - f for c, f in zip(cold, free, strict=True)]
    print(f"    new, less free: {_percentiles(extra)}")


async def _all_at_once(server: _Server, cases: Sequence[Case], args: argparse.Namespace) -> None:
    limit = asyncio.Semaphore(args.concurrency)

    async def ask(case: Case, **options: Any) -> Answer:
        async with limit:
            return await server.ask(case, 1, **options)

    started = time.perf_counter()
    answers = await asyncio.gather(
        *(ask(case, constrained=True, max_tokens=args.max_tokens) for case in cases)
    )
    seconds = time.perf_counter() - started
    pairs = [(case, a) for case, a in zip(cases, answers, strict=True) if a.text is not None]
    num_tokens = sum(answer.num_tokens for _, answer in pairs)
    started = time.perf_counter()
    await asyncio.gather(
        *(ask(case, constrained=False, max_tokens=max(1, a.num_tokens), ignore_eos=True) for case, a in pairs)
    )
    free_seconds = time.perf_counter() - started
    print(
        f"{args.concurrency} at a time: {num_tokens} tokens, {num_tokens / seconds:.1f} tok/s; as many without"
    )
    print(f"    constraints {num_tokens / free_seconds:.1f} tok/s")
    for case, answer in pairs:
        error = None if answer.cut else case.error(answer.text or "")
        if error is not None:
            print(f"VIOLATION {case.name}: {answer.text!r:.200}: {error}")
    print(
        f"{len(cases)} schemas, {len(cases) - len(pairs)} refused, {sum(a.cut for _, a in pairs)} cut by max_tokens"
    )


def _percentiles(seconds: Sequence[float]) -> str:
    p50, p99 = (1000 * value for value in np.percentile(seconds, [50, 99]))
    return f"p50 {p50:.1f} ms, p99 {p99:.1f} ms"


if __name__ == "__main__":
    main()

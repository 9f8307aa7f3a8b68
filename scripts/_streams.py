"""Streams of completions, as the load generators bench_stall.py, bench_growth.py and bench_peers.py need them."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from urllib.parse import urlsplit
from urllib.request import urlopen

TOKEN_IDS = range(1000, 40_000)  # random tokens of prompts: far from the special ones of any usual vocabulary


class Client:
    """A server and its first model. Sockets are read directly, so that the client takes little of the machine.

    Args:
        url: the server's, without a path.
        seed: of the prompts; two clients of one seed ask for the same.
    """

    def __init__(self, url: str, seed: int = 0) -> None:
        self.url = url.rstrip("/")
        address = urlsplit(self.url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        with urlopen(f"{self.url}/v1/models") as answer:
            self.model: str = json.load(answer)["data"][0]["id"]
        self._random = random.Random(seed)

    def prompt(self, num_tokens: int) -> list[int]:
        """Random token ids."""
        return self._random.choices(TOKEN_IDS, k=num_tokens)

    async def stream(self, prompt: list[int], max_tokens: int, times: list[float]) -> None:
        """Stream a completion of exactly `max_tokens` tokens; the arrival of each is added to `times`
        (`time.perf_counter()` seconds) at once. Cancelling ends the connection, and so the request. Of a server
        that does not say which tokens a chunk has (llama.cpp's), one with text is taken to have one.

        Raises:
            RuntimeError: the server does not answer with a stream, or ends it with an error.
        """
        wanted = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
        body = json.dumps(wanted | {"ignore_eos": True, "temperature": 0, "return_token_ids": True}).encode()
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError((status + await reader.read()).decode())
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[len("data: ") :])
                    if "error" in chunk:
                        raise RuntimeError(chunk["error"]["message"])
                    now = time.perf_counter()
                    for choice in chunk["choices"]:
                        ids = choice.get("token_ids")
                        times += [now] * (bool(choice.get("text")) if ids is None else len(ids))
        finally:
            writer.close()

    async def complete(
        self, prompts: list[list[int]], max_tokens: int, concurrency: int
    ) -> list[tuple[float, list[float]]]:
        """All prompts as in `stream`, so many at a time: whoever ends is followed by the next.

        Returns:
            When each began, and when its tokens came.
        """
        waiting, ends = list(prompts), list[tuple[float, list[float]]]()

        async def one_after_the_other() -> None:
            while waiting:
                times: list[float] = []
                ends.append((time.perf_counter(), times))
                await self.stream(waiting.pop(), max_tokens, times)

        await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
        return ends

    def metric(self, name: str) -> float:
        """The value of a metric, labels aside; several lines of one name are added up.

        Raises:
            KeyError: there is none of that name.
        """
        found = [float(line.split()[-1]) for line in self._metric_lines(name)]
        if not found:
            raise KeyError(name)
        return sum(found)

    def labels(self, name: str) -> dict[str, str]:
        """Labels of the one series of a metric.

        Raises:
            KeyError: there is none of that name.
        """
        for line in self._metric_lines(name):
            return dict(re.findall(r'(\w+)="([^"]*)"', line))
        raise KeyError(name)

    def _metric_lines(self, name: str) -> list[str]:
        with urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return [line for line in lines if re.split("[{ ]", line, maxsplit=1)[0] == name]

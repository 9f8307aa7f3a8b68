"""What a long prompt does to streams: python scripts/bench_stall.py [--url URL] [--prompt-tokens 7900].

Needs a running server. `--streams` streams decode; then a prompt of `--prompt-tokens` random tokens arrives. Prints the
time between two tokens of a stream before it came and until its first token, and how long that one took.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from itertools import pairwise

import numpy as np
from _streams import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=7900)
    parser.add_argument("--alone-s", type=float, default=10.0, help="seconds without the long prompt")
    parser.add_argument(
        "--max-tokens", type=int, default=4000, help="of each stream: they must outlast it all"
    )
    args = parser.parse_args()
    asyncio.run(run(Client(args.url, seed=time.time_ns()), args))


async def run(client: Client, args: argparse.Namespace) -> None:
    times: list[list[float]] = [[] for _ in range(args.streams)]
    streams = [asyncio.create_task(client.stream(client.prompt(100), args.max_tokens, own)) for own in times]
    while not all(times):
        await asyncio.sleep(0.1)
    began = time.perf_counter()
    await asyncio.sleep(args.alone_s)
    arrived = time.perf_counter()
    first: list[float] = []
    await client.stream(client.prompt(args.prompt_tokens), 1, first)
    assert not any(stream.done() for stream in streams), (
        "the streams ended first: give them more --max-tokens"
    )
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    p99s = []
    for name, start, end in (("alone", began, arrived), ("beside the prompt", arrived, first[0])):
        gaps = [b - a for own in times for a, b in pairwise(own) if a > start and b <= end]
        p50, p99, most = 1000 * np.percentile(gaps, [50, 99, 100])
        p99s.append(p99)
        print(f"{name:18s} {len(gaps):6d} gaps, p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {most:.1f} ms")
    print(f"p99 {p99s[1] / p99s[0]:.2f} x; {args.prompt_tokens} tokens took {first[0] - arrived:.1f} s")


if __name__ == "__main__":
    main()

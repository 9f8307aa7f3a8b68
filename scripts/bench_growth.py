"""How speed and memory grow with load: python scripts/bench_growth.py [--url URL] [--pid PID] [--load 16:128 1:7900].

Needs a running server with room for it (`--max-num-seqs` for the largest concurrency). Each load is C:T, C streams at a
time with prompts of T random tokens, each answered by `--max-tokens` tokens; whoever ends is followed by the next.
Prints a table: output and prompt tokens a second, median and 99th percentile of the time to the first token and of the
time per token after it (of a request), the longest gap between two tokens, and the KV blocks in use as tokens of a
sequence; with `--pid`, the server's process, also the resident memory (MiB) of the API process and of all below it,
before, at most and after. Says at the end how many programs were compiled meanwhile; a server that is right has none.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from _streams import Client

LOADS = ("1:128", "4:128", "16:128", "64:128", "256:128", "1:512", "1:2048", "1:7900", "16:2048")
WATCH_S = 1.0
MIB = 1 << 20


@dataclass
class Server:
    """A server as seen from outside.

    Attributes:
        pid: of its API process; None: its memory is not looked at.
    """

    client: Client
    pid: int | None
    block_size: int = field(init=False)
    num_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        labels = self.client.labels("jaxserve:cache_config_info")
        self.block_size, self.num_blocks = int(labels["block_size"]), int(labels["num_gpu_blocks"])

    def resident(self) -> tuple[int, int]:
        """MiB of the API process, and of all processes below it."""
        if self.pid is None:
            return 0, 0
        parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdecimal()}
        below, found = {self.pid}, True
        while found:
            found = {pid for pid, parent in parents.items() if parent in below} - below
            below |= found
        return _resident(self.pid), sum(_resident(pid) for pid in below - {self.pid})

    def tokens_per_sequence(self) -> float:
        """KV tokens that a running sequence holds, its last block counted whole."""
        running = self.client.metric("jaxserve:num_requests_running")
        used = self.client.metric("jaxserve:kv_cache_usage_perc") * (self.num_blocks - 1) * self.block_size
        return used / running if running else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="of the server, on this machine")
    parser.add_argument("--load", nargs="+", default=LOADS, help="CONCURRENCY:PROMPT-TOKENS")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="requests of each stream")
    parser.add_argument("--least", type=int, default=4, help="requests of a load, however few its streams")
    args = parser.parse_args()
    asyncio.run(run(Server(Client(args.url, seed=time.time_ns()), args.pid), args))


async def run(server: Server, args: argparse.Namespace) -> None:
    compiled = server.client.metric("jaxserve:xla_compilations_total")
    print(
        "| streams | prompt | out tok/s | prompt tok/s | TTFT p50, p99 | TPOT p50, p99 | longest gap | KV | RSS |"
    )
    print("| --- " * 9 + "|")
    for load in args.load:
        concurrency, prompt_tokens = map(int, load.split(":"))
        print(await measured(server, concurrency, prompt_tokens, args), flush=True)
    compiled = server.client.metric("jaxserve:xla_compilations_total") - compiled
    print(f"{compiled:.0f} programs were compiled meanwhile")


async def measured(server: Server, concurrency: int, prompt_tokens: int, args: argparse.Namespace) -> str:
    """One row of the table."""
    client = server.client
    count = max(args.rounds * concurrency, args.least)
    prompts = [client.prompt(prompt_tokens) for _ in range(count)]
    before, held, most = server.resident(), [0.0], [(0, 0)]

    async def watch() -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            held.append(await asyncio.to_thread(server.tokens_per_sequence))
            most.append(await asyncio.to_thread(server.resident))

    watching = asyncio.create_task(watch())
    started = time.perf_counter()
    ends = await client.complete(prompts, args.max_tokens, concurrency)
    seconds = time.perf_counter() - started
    watching.cancel()
    first = [1000 * (times[0] - begun) for begun, times in ends]
    per_token = [1000 * (times[-1] - times[0]) / (len(times) - 1) for _, times in ends]
    longest = max(1000 * (b - a) for _, times in ends for a, b in pairwise(times))
    after = server.resident()
    memory = "; ".join(
        f"{a} → {max(m)} → {b}"
        for a, m, b in zip(before, zip(*most, before, after, strict=True), after, strict=True)
    )
    tokens = sum(len(times) for _, times in ends)
    return (
        f"| {concurrency} | {prompt_tokens:,} | {tokens / seconds:.1f} | {count * prompt_tokens / seconds:,.0f} "
        f"| {_spread(first)} | {_spread(per_token)} | {longest:,.0f} ms | {max(held):,.0f} | {memory} |"
    )


def _spread(milliseconds: list[float]) -> str:
    p50, p99 = np.percentile(milliseconds, [50, 99])
    return f"{p50:,.0f}, {p99:,.0f} ms" if p99 >= 100 else f"{p50:.1f}, {p99:.1f} ms"


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0  # it has ended


def _resident(pid: int) -> int:
    """MiB that are in memory."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return next((int(line.split()[1]) * 1024 // MIB for line in lines if line.startswith("VmRSS")), 0)


if __name__ == "__main__":
    main()

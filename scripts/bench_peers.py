"""jaxserve beside other servers, in turn on the same machine: python scripts/bench_peers.py NAME=PORT=COMMAND …

    python scripts/bench_peers.py --turns 3 \\
        'vLLM=8101=vllm serve DIR --served-model-name smollm2 --port 8101' \\
        'jaxserve=8000=python -m jaxserve.api --model DIR --served-model-name smollm2 --port 8000'

In each turn every server is started, answers one request to warm up, then the loads one after the other, and is
stopped. Prompts are random token ids, the same for every server and others in every turn and load; every answer has
exactly as many tokens as its load says. Between servers, while none runs, the machine's own limits are measured: how
fast all processors read memory, and how fast JAX multiplies a prompt with a weight in bfloat16. Prints each
measurement as it comes, and at the end a Markdown table: medians over the turns, smallest and largest in brackets, and
the ratio to the first server (above 1: better than it). Of a server that counts them (jaxserve), also the programs
compiled meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import IO, NamedTuple
from urllib.request import urlopen

import jax
import jax.numpy as jnp
import numpy as np
from _streams import TOKEN_IDS, Client

READY_S = 600.0  # vLLM compiles for almost two minutes
STOP_S = 60.0
POLL_S = 0.05


class Load(NamedTuple):
    """`shared` of the prompt's tokens are the same in all prompts; `measure` names the figure that tells."""

    concurrency: int
    requests: int
    prompt: int
    tokens: int
    shared: int = 0
    measure: str = "output tok/s"


LOADS = {
    "c1": Load(1, 4, 128, 128, measure="TPOT ms"),
    "c16": Load(16, 32, 128, 128),
    "c64": Load(64, 96, 128, 128),
    "prefill": Load(4, 16, 1024, 1, measure="prompt tok/s"),
    "shared prefix": Load(8, 64, 1024, 16, shared=922, measure="prompt tok/s"),
}
LESS_IS_BETTER = ("ms", "s to ready")
Figures = dict[tuple[str, str], float]  # (load, measure) → value


class Server(NamedTuple):
    name: str
    port: int
    command: list[str]

    @classmethod
    def parse(cls, text: str) -> Server:
        name, port, command = text.split("=", 2)
        return cls(name, int(port), shlex.split(command))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("servers", nargs="+", type=Server.parse, metavar="NAME=PORT=COMMAND")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--load", nargs="*", choices=LOADS, default=list(LOADS), help="none: starts alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    limits: dict[str, list[float]] = defaultdict(list)
    for turn in range(args.turns):
        for server in args.servers:
            for name, value in machine_limits().items():
                limits[name].append(value)
            for key, value in measured(server, args.load, args.seed + turn).items():
                found[server.name][key].append(value)
                print(f"turn {turn + 1}, {server.name}: {key[0]} {value:.1f} {key[1]}", flush=True)
    print()
    print_table([server.name for server in args.servers], found)
    print()
    for name, values in limits.items():
        print(f"{name}: {spread(values)}")


def measured(server: Server, loads: list[str], seed: int) -> Figures:
    """One turn of one server.

    Raises:
        RuntimeError: it ended, was not ready in READY_S, or failed a request.
    """
    figures: Figures = {}
    with running(server) as seconds:
        figures["start", "s to ready"] = seconds
        client = Client(f"http://127.0.0.1:{server.port}")
        asyncio.run(client.stream(client.prompt(16), 16, []))
        compiled = compilations(client)
        for name in loads:
            for measure, value in asyncio.run(measured_load(client, name, seed)).items():
                figures[name, measure] = value
        if compiled is not None:
            figures["all", "programs compiled"] = (compilations(client) or 0.0) - compiled
    return figures


def compilations(client: Client) -> float | None:
    with contextlib.suppress(KeyError, OSError):
        return client.metric("jaxserve:xla_compilations_total")
    return None


@contextlib.contextmanager
def running(server: Server) -> Iterator[float]:
    """The server, from its start until it has ended; gives the seconds until it was ready."""
    if answers(server.port):
        raise RuntimeError(f"{server.name}: something answers on port {server.port} already")
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(server.command, stdout=log, stderr=log, start_new_session=True)
        try:
            while not answers(server.port):
                late = time.perf_counter() - started > READY_S
                if late or process.poll() is not None:
                    why = f"was not ready in {READY_S:.0f} s" if late else f"ended with {process.returncode}"
                    raise RuntimeError(f"{server.name} {why}:\n{tail(log)}")
                time.sleep(POLL_S)
            yield time.perf_counter() - started
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            with contextlib.suppress(ProcessLookupError):  # what is left of it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-20:])


async def measured_load(client: Client, name: str, seed: int) -> dict[str, float]:
    """Figures of a load, by measure.

    Raises:
        RuntimeError: an answer has another number of tokens than was asked for.
    """
    load = LOADS[name]
    rng = random.Random(f"{name} {seed}")  # no load's prompts begin like another's: caches would find them
    prefix = rng.choices(TOKEN_IDS, k=load.shared)
    prompts = [prefix + rng.choices(TOKEN_IDS, k=load.prompt - load.shared) for _ in range(load.requests)]
    started = time.perf_counter()
    ends = await client.complete(prompts, load.tokens, load.concurrency)
    seconds = time.perf_counter() - started
    if wrong := {len(times) for _, times in ends} - {load.tokens}:
        raise RuntimeError(f"{name}: answers of {sorted(wrong)} tokens instead of {load.tokens}")
    firsts = [1000 * (times[0] - begun) for begun, times in ends]
    figures = {
        "output tok/s": load.requests * load.tokens / seconds,
        "prompt tok/s": load.requests * load.prompt / seconds,
        "TTFT ms": statistics.median(firsts),
    }
    if load.tokens > 1:
        each = [1000 * (times[-1] - times[0]) / (load.tokens - 1) for _, times in ends]
        figures["TPOT ms"] = statistics.median(each)
        figures["TPOT p99 ms"] = float(np.percentile(each, 99))
    return figures


def machine_limits() -> dict[str, float]:
    """What the machine itself can do, by two measurements of a second each."""
    arrays = [np.ones(8_000_000) for _ in range(os.cpu_count() or 1)]

    def read() -> float:
        threads = [threading.Thread(target=np.sum, args=(array,)) for array in arrays]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(array.nbytes for array in arrays) / (time.perf_counter() - started) / 1e9

    rows, outputs, inputs = 1024, 3072, 576  # of a prompt through the demo model's widest layer
    x, weight = (jnp.ones((n, inputs), jnp.bfloat16) for n in (rows, outputs))
    product = jax.jit(
        partial(
            jax.lax.dot_general,
            dimension_numbers=(((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
    )
    product(x, weight).block_until_ready()

    def multiply() -> float:
        started = time.perf_counter()
        product(x, weight).block_until_ready()
        return 2 * rows * outputs * inputs / (time.perf_counter() - started) / 1e9

    return {
        "memory read, GB/s": max(read() for _ in range(15)),
        "bfloat16 products, GFLOP/s": max(multiply() for _ in range(15)),
    }


def print_table(names: list[str], found: dict[str, dict[tuple[str, str], list[float]]]) -> None:
    first = names[0]
    print(f"| load | {first} | " + " | ".join(f"{name} | ratio" for name in names[1:]) + " |")
    print("| --- " * (2 * len(names)) + "|")
    rows = dict.fromkeys(row for name in names for row in found[name])
    for load, measure in rows:
        telling = load not in LOADS or LOADS[load].measure == measure
        cells = [f"**{load}**, {measure}" if telling else f"{load}, {measure}"]
        for name in names:
            values = found[name][load, measure]
            cells.append(spread(values))
            if name != first:
                cells.append(ratio(values, found[first][load, measure], measure))
        print("| " + " | ".join(cells) + " |")


def ratio(values: list[float], others: list[float], measure: str) -> str:
    """Of the medians, above 1 where `values` are the better ones; empty where one has none or is 0."""
    ours, theirs = (statistics.median(v) if v else 0.0 for v in (values, others))
    if not ours or not theirs:
        return ""
    return f"{theirs / ours if measure.endswith(LESS_IS_BETTER) else ours / theirs:.2f}"


def spread(values: list[float]) -> str:
    if not values:
        return ""
    digits = 1 if min(values) < 100 else 0
    middle = f"{statistics.median(values):,.{digits}f}"
    return f"{middle} ({min(values):,.{digits}f} – {max(values):,.{digits}f})" if len(values) > 1 else middle


if __name__ == "__main__":
    sys.exit(main())

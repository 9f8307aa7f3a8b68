"""What loading a checkpoint takes of the host: python scripts/bench_load.py MODEL [--quantization int8].

Seconds, and the most memory of its own (anonymous, not a file's pages) that the process came to have, weights included.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.llama import Llama, checkpoint_slots
from jaxserve.models.loader import load_params, open_checkpoint, resolve_model
from jaxserve.sharding import DeviceGroup
from jaxserve.step import ModelDefinition

SAMPLE_S = 0.002


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--quantization", choices=("none", "int8"), default="none")
    parser.add_argument("--load-format", default="auto")
    args = parser.parse_args()
    checkpoint = open_checkpoint(resolve_model(args.model), args.load_format)
    devices = DeviceGroup.of(1)
    definition = ModelDefinition.of(
        lambda: Llama(
            checkpoint.config,
            dtype=jnp.dtype("bfloat16"),
            max_model_len=2048,
            quantized=args.quantization == "int8",
        )
    )
    before, started = own_bytes(), time.monotonic()
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    shards = load_params(
        checkpoint,
        [checkpoint_slots(checkpoint.config)],
        dict(zip(definition.names, definition.shapes, strict=True)),
        np.dtype("bfloat16"),
        devices.put_weight,
        quantized=[n for n, d in zip(definition.names, definition.dtypes, strict=True) if d == jnp.int8],
    )
    jax.block_until_ready(shards)
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    weights = sum(x.nbytes for x in shards[0].values())
    print(
        f"{args.quantization}: {weights / 2**20:,.0f} MiB of weights in {seconds:.1f} s; at most "
        f"{(peak[0] - before) / 2**20:,.0f} MiB more than before"
    )


def own_bytes() -> int:
    """Anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this needs Linux")


if __name__ == "__main__":
    main()

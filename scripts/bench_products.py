"""Weight products in bfloat16 and in int8, by number of rows: python scripts/bench_products.py [--rows 1 8 16].

Microseconds a product, each with a weight of its own, so that weights come from memory as they do in a model.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.layers import QuantizedRows, matmul, matmul_int8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 16, 64, 256])
    parser.add_argument("--shape", type=int, nargs=2, default=[3072, 576], metavar=("OUT", "IN"))
    parser.add_argument("--weights", type=int, default=30)
    args = parser.parse_args()
    outputs, inputs = args.shape
    rng = np.random.default_rng(0)
    int8 = [jnp.asarray(rng.integers(-127, 128, (outputs, inputs)), jnp.int8) for _ in range(args.weights)]
    bfloat16 = [weight.astype(jnp.bfloat16) for weight in int8]
    scale = jnp.ones(outputs)
    print(f"jax {jax.__version__}, {args.weights} weights of {outputs} × {inputs}")
    for rows in args.rows:
        x = jnp.asarray(rng.integers(-127, 128, (rows, inputs)), jnp.bfloat16)
        quantized = QuantizedRows(x.astype(jnp.int8), jnp.ones((rows, 1)))
        wide = measure(matmul, x, bfloat16)
        narrow = measure(functools.partial(multiply_int8, scale), quantized, int8)
        both = measure(functools.partial(multiply_int8, scale), x, int8)
        print(
            f"{rows:4d} rows: bfloat16 {wide:5.0f} µs; int8 {narrow:5.0f} µs ({wide / narrow:.2f} x), "
            f"{both:5.0f} µs where the inputs are quantized anew for each",
            flush=True,
        )


def multiply_int8(scale: jax.Array, x: Any, weight: jax.Array) -> jax.Array:
    return matmul_int8(x, weight, scale)


def measure(product: Callable[..., jax.Array], x: Any, weights: list[jax.Array]) -> float:
    """Median microseconds of one product."""

    def all_products(x: Any, weights: list[jax.Array]) -> list[jax.Array]:
        return [product(x, weight) for weight in weights]

    run = jax.jit(all_products).lower(x, weights).compile()
    jax.block_until_ready(run(x, weights))
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        jax.block_until_ready(run(x, weights))
        seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds) / len(weights)


if __name__ == "__main__":
    main()

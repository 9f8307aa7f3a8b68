"""Parts of a step that several devices compute in a way of their own, on one and on two virtual ones:
`python -m tests.two_devices_worker`. Prints a JSON object: a part's name → what each number of devices gave."""

from __future__ import annotations

import json
import os
from typing import Any

PARTS = ("one row", "one row, int8", "prompt ratings in a loop", "prompt ratings in branches")
VOCAB_SIZE, NUM_TOKENS, MAX_LOGPROBS = 300, 530, 3


def main() -> None:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    results = {name: [compute(name, num_devices) for num_devices in (1, 2)] for name in PARTS}
    print(json.dumps(results))


def compute(name: str, num_devices: int) -> list[Any]:
    import jax
    import numpy as np

    from jaxserve.sharding import EVERYWHERE, SHARDED, DeviceGroup

    devices = DeviceGroup.of(num_devices)
    rng = np.random.RandomState(0)
    if name.startswith("one row"):
        function, global_arrays = one_row(devices, rng, quantized="int8" in name), 2
    else:
        function, global_arrays = ratings(devices, rng, unroll="branches" in name), 1
    step, sharded, whole = function
    specs = (SHARDED,) * global_arrays + (EVERYWHERE,) * len(whole)
    out = jax.jit(devices.spread(step, in_specs=specs, out_specs=EVERYWHERE))(*sharded, *whole)
    values: list[Any] = np.asarray(out).tolist()
    return values


def one_row(devices: Any, rng: Any, *, quantized: bool) -> tuple[Any, list[Any], list[Any]]:
    """A bfloat16 row whose inputs are spread over the devices, as `Linear` adds it up."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxserve.models.layers import Linear, quantize_rows, uses_partial_sums

    group, inputs, outputs = devices.group, 192, 24
    row = rng.randn(inputs).astype(np.float32)
    weight = rng.randint(-127, 128, (outputs, inputs)).astype(np.float32)
    share = inputs // group.size
    weights = np.concatenate([weight[:, i * share : (i + 1) * share] for i in range(group.size)])

    def step(row: jax.Array, weight: jax.Array) -> jax.Array:
        linear = Linear(
            share,
            outputs,
            bias=True,
            dtype=jnp.dtype("bfloat16"),
            quantized=quantized,
            summed_over=group,
            fine=True,
        )
        linear.weight = nnx.Param(weight)
        linear.bias = nnx.Param(jnp.full(outputs, 1000.0, jnp.bfloat16))
        if quantized:
            linear.scale = nnx.Param(jnp.full(outputs, 0.5))
        x = row[None]
        assert uses_partial_sums(x, weight)
        rows = quantize_rows(x, group, fine=True) if quantized else x
        steps = rows.steps() if quantized else x.astype(jnp.float32)  # type: ignore[union-attr]
        return jnp.stack([linear.add_up(linear.partial_sums(steps[0]), rows), linear(x)])

    dtype = "int8" if quantized else "bfloat16"
    return step, [jnp.asarray(row, jnp.bfloat16), jnp.asarray(weights, dtype)], []


def ratings(devices: Any, rng: Any, *, unroll: bool) -> tuple[Any, list[Any], list[Any]]:
    """Of more tokens than are rated in one branch."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxserve.sharding import VocabShard
    from jaxserve.step import _prompt_logprobs

    vocab = VocabShard(VOCAB_SIZE, devices.group)
    table = np.zeros((vocab.num_local * devices.group.size, 32), np.float32)
    table[:VOCAB_SIZE] = rng.randn(VOCAB_SIZE, 32)
    hidden = jnp.asarray(rng.randn(NUM_TOKENS, 32), jnp.float32)
    inputs = {
        "prompt_tokens": jnp.arange(NUM_TOKENS, dtype=jnp.int32),
        "prompt_targets": jnp.asarray(rng.randint(0, VOCAB_SIZE, NUM_TOKENS), jnp.int32),
        "counts": jnp.asarray([0, 0, 0, 0, NUM_TOKENS - 1, 0], jnp.int32),
    }

    def step(table: jax.Array, hidden: jax.Array, inputs: Any) -> jax.Array:
        class Model:
            """Only its output layer."""

            def logits(self, hidden: jax.Array) -> jax.Array:
                return hidden @ table.T

        model: Any = Model()
        rated = _prompt_logprobs(model, hidden, inputs, vocab, MAX_LOGPROBS, unroll=unroll)[: NUM_TOKENS - 1]
        ids = 2 + MAX_LOGPROBS
        # logprobs are returned as bits; compare them as numbers
        logprobs = jax.lax.bitcast_convert_type(
            jnp.concatenate([rated[:, :1], rated[:, ids:]], axis=1), jnp.float32
        )
        return jnp.concatenate([logprobs, rated[:, 1:ids].astype(jnp.float32)], axis=1)

    return step, [jnp.asarray(table)], [hidden, inputs]


if __name__ == "__main__":
    main()

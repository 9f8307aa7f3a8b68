"""Runs one batch of requests on 1, 2, 4 and 8 virtual devices: `python tensor_parallel_worker.py DIRECTORY`.

In a process of its own, because XLA must be told of the devices before it starts. Prints a JSON object: a model's name
and the number of its devices → what each request gave.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

NUM_DEVICES = 8
VOCAB_SIZE = 300  # no multiple of the number of devices
MAX_TOKENS = 32
NUM_REQUESTS = {"none": 100, "int8": 50}
CASES = [  # kv heads, devices, quantization
    (2, 1, "none"), (2, 2, "none"), (2, 4, "none"), (2, 8, "none"), (8, 1, "none"), (8, 4, "none"),
    (8, 1, "int8"), (8, 4, "int8"),
]  # fmt: skip


def case_name(num_kv_heads: int, num_devices: int, quantization: str) -> str:
    return f"{num_kv_heads} kv heads on {num_devices}, {quantization}"


def write_config(directory: Path, num_kv_heads: int) -> str:
    """A model of random weights; its directory."""
    path = directory / f"{num_kv_heads} kv heads"
    path.mkdir(exist_ok=True)
    # four heads on each of up to 8 devices: of fewer, XLA:CPU sums in another order, and the last bit decides what int8
    # a number on the brink becomes
    num_heads = 32 if num_kv_heads == 8 else 8
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8 * num_heads,
        "intermediate_size": 12 * num_heads,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "attention_bias": num_kv_heads == 2,
        "mlp_bias": num_kv_heads == 2,
        "tie_word_embeddings": num_kv_heads == 2,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def mixed_params(rng: random.Random) -> dict[str, Any]:
    """Every kind of work that the sampler has for a row."""
    params: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0, 1.5]),
        "top_p": rng.choice([1.0, 1.0, 0.9, 0.5]),
        "top_k": rng.choice([-1, -1, 5, 40]),
        "min_p": rng.choice([0.0, 0.0, 0.1]),
        "seed": rng.randrange(2**63),
        "max_tokens": rng.randrange(1, 12),
        "n": rng.choice([1, 1, 1, 2]),
        "logprobs": rng.choice([None, 0, 5]),
        "prompt_logprobs": rng.choice([None, None, 3]),
    }
    tokens = range(VOCAB_SIZE)
    match rng.randrange(6):
        case 0:
            params |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.5}
        case 1:
            params["logit_bias"] = tuple((i, rng.uniform(-5, 5)) for i in rng.sample(tokens, 80))
        case 2:
            params["allowed_token_ids"] = tuple(rng.sample(tokens, rng.choice([1, 10, 100])))
        case 3:
            params |= {
                "use_beam_search": True,
                "n": 3,
                "temperature": 0.0,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
            }
            params["prompt_logprobs"] = None
    return params


def main() -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
    from jax.experimental.layout import Layout

    from jaxserve import LLM, SamplingParams, model_runner, sharding
    from jaxserve.weight_layouts import VOCAB_TABLES

    # one program is enough: what differs between buckets is no matter of devices
    defaults = model_runner.PLATFORM_DEFAULTS["cpu"]
    model_runner.PLATFORM_DEFAULTS["cpu"] = defaults._replace(smallest_buckets=(MAX_TOKENS,))
    rng = random.Random(0)
    prefixes = [[rng.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(3)]
    prompts, params = [], []
    for _ in range(100):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
        prompts.append(rng.choice(prefixes)[: rng.randrange(41)] + own)
        params.append(SamplingParams(**mixed_params(rng), ignore_eos=True))
    results: dict[str, list[Any]] = {}
    for num_kv_heads, num_devices, quantization in CASES:
        # one device has a compiler's layouts, several those that some chip could want
        by_columns = Layout((1, 0)) if num_devices > 1 else None
        sharding.weight_layout = lambda name, *_, want=by_columns: want if name in VOCAB_TABLES else None  # type: ignore[misc]
        llm = LLM(
            write_config(Path(sys.argv[1]), num_kv_heads),
            skip_tokenizer=True,
            load_format="dummy",
            max_num_seqs=16,
            max_num_batched_tokens=MAX_TOKENS,
            block_size=8,
            kv_cache_memory_bytes=4 << 20,
            compilation_cache=False,
            tensor_parallel_size=num_devices,
            async_scheduling=num_devices > 1,
            quantization=quantization,
        )
        count = NUM_REQUESTS[quantization]
        outputs = llm.generate(prompts[:count], params[:count])
        results[case_name(num_kv_heads, num_devices, quantization)] = [
            {
                "tokens": [output.token_ids for output in request.outputs],
                "top_ids": [p.top_ids for output in request.outputs for p in output.logprobs],
                "logprobs": [
                    [p.logprob, *p.top_logprobs]
                    for p in [p for output in request.outputs for p in output.logprobs]
                    + request.prompt_logprobs
                ],
            }
            for request in outputs
        ]
        assert llm.engine.stats().xla_compilations == 0
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""What scripts/aot_check.py compiles: attention by itself, and whole serving steps, with abstract arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.kernels import pallas_tpu_layout
from jaxserve.kernels.metadata import MAX_UNTILED_TOKENS, QUERY_TILE, AttentionMetadata
from jaxserve.kernels.paged_attention import PoolShape, paged_attention, pool_struct
from jaxserve.kv_cache import KVCacheSpec
from jaxserve.logits_processors import BITS, SlotTables
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Llama
from jaxserve.sharding import EVERYWHERE, SHARDED, DeviceGroup, VocabShard, shard_config
from jaxserve.slot_tables import MAX_BIASES
from jaxserve.step import ModelDefinition, Pools, make_step
from jaxserve.step_inputs import StepShape

BACKENDS = {"tpu": "pallas_tpu", "gpu": "pallas_triton"}
BLOCK_SIZES = {"tpu": 128, "gpu": 32}
KERNEL_POOL_BYTES = 4 << 30  # only shapes, nothing is allocated
MAX_NUM_SEQS = 256
SMALL_NUM_SEQS, SMALL_KV_CACHE_BYTES = 64, 8 << 30  # sequences at once where there is room for few
USEFUL_KV_CACHE_BYTES = 2 << 30  # the least that a model is served with
RESERVED_BYTES = 1 << 30  # of a device, for programs and temporaries
MAX_MODEL_LEN = 8192

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
MODELS = {"SmolLM2-135M": SMOLLM2_135M, "Llama-3.1-8B": LLAMA_3_1_8B}


class Program(NamedTuple):
    """Something to compile.

    Attributes:
        name: as the table shows it.
        function: takes the arguments.
        arguments: pytrees of jax.ShapeDtypeStruct.
        donated: which argument is the pool, to be updated in place.
        num_devices: that share it; arguments of more than one know where they lie.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: int
    num_devices: int = 1


def num_bytes(tree: Any) -> int:
    """Of all arrays of a pytree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# -- attention by itself ----------------------------------------------------------------------------------------


def kernel_program(
    platform: str,
    T: int,
    H: int,
    K: int,
    D: int,
    *,
    S: int = 64,
    block_size: int | None = None,
    max_model_len: int = MAX_MODEL_LEN,
    dtype: str = "bfloat16",
    kv_dtype: str = "bfloat16",
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    decode_only: bool = False,
) -> Program:
    """Paged attention on one layer's pool of KERNEL_POOL_BYTES."""
    backend, B = BACKENDS[platform], block_size or BLOCK_SIZES[platform]
    one = pool_struct(backend, PoolShape(1, K, B, D, jnp.dtype(kv_dtype)), platform)
    shape = PoolShape(KERNEL_POOL_BYTES // num_bytes(one), K, B, D, jnp.dtype(kv_dtype))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    num_tiles = 0 if decode_only or T <= MAX_UNTILED_TOKENS else T // QUERY_TILE + S
    metadata = AttentionMetadata(
        block_tables=ints((S, -(-max_model_len // B))),
        seq_lens=ints((S,)),
        query_start_loc=ints((S + 1,)),
        positions=ints((T,)),
        token_rows=ints((T,)),
        slot_mapping=ints((T,)),
        num_single_tokens=ints(()),
        tiles=ints((num_tiles, 2)),
        num_tiles=ints(()),
    )
    parts = ["decode" if decode_only else "mixed", f"T{T} H{H} K{K} D{D} B{B}", f"{dtype}/{kv_dtype}"]
    parts += [f"window {sliding_window}"] * (sliding_window is not None)
    parts += [f"cap {soft_cap:g}"] if soft_cap is not None else []
    attend = functools.partial(
        paged_attention,
        scale=D**-0.5,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        decode_only=decode_only,
        backend=backend,
    )
    q = jax.ShapeDtypeStruct((T, H, D), jnp.dtype(dtype))
    kv = jax.ShapeDtypeStruct((T, K, D), jnp.dtype(dtype))
    pool = pool_struct(backend, shape, platform)
    return Program(f"attention {' '.join(parts)}", attend, (q, kv, kv, pool, metadata), donated=3)


def quick_kernels(platform: str) -> Iterator[Program]:
    """Llama-3.1-8B, SmolLM2, and the corners of what the kernels promise."""
    kernel = functools.partial(kernel_program, platform)
    yield kernel(64, 32, 8, 128, decode_only=True)
    yield kernel(512, 32, 8, 128)
    yield kernel(16, 9, 3, 64, decode_only=True)
    yield kernel(512, 9, 3, 64, block_size=16)
    yield kernel(256, 32, 8, 128, kv_dtype="int8")
    yield kernel(256, 32, 8, 128, kv_dtype="float8_e4m3fn")
    wide = {"dtype": "float32", "kv_dtype": "float32", "sliding_window": 4096, "soft_cap": 50.0}
    # a layer of many tiles: float32 needs the most of every kind of memory that is small
    yield kernel(128, 16, 16, 256, block_size=256, **wide)  # type: ignore[arg-type]


def all_kernels(platform: str) -> Iterator[Program]:
    """Every head_dim with every pair of dtypes, every block size and every number of kv heads."""
    kernel = functools.partial(kernel_program, platform)
    yield from quick_kernels(platform)
    for head_dim in (64, 80, 96, 128, 256):
        for dtype in ("bfloat16", "float32"):
            for kv_dtype in pallas_tpu_layout.POOL_DTYPES:
                yield kernel(
                    128, 8, 2, head_dim, dtype=dtype, kv_dtype=kv_dtype, sliding_window=1024, soft_cap=30.0
                )
    for block_size in (16, 32, 64, 256):
        for kv_dtype in ("bfloat16", "int8"):
            yield kernel(256, 8, 2, 64, kv_dtype=kv_dtype, block_size=block_size, max_model_len=4096)
    for H, K in ((1, 1), (8, 1), (28, 4), (64, 8), (16, 16), (128, 16)):
        yield kernel(64, H, K, 128, decode_only=True)
        yield kernel(2048, H, K, 128, S=256)


# -- whole steps ------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """`num_layers`: so many of the model's own; they are unrolled, so that fewer are only fewer."""

    name: str
    config: dict[str, Any]
    num_layers: int

    def __str__(self) -> str:
        whole = self.config["num_hidden_layers"]
        return self.name if self.num_layers == whole else f"{self.name} ({self.num_layers} of {whole} layers)"


def step_program(
    platform: str,
    devices: Sequence[Any],
    memory: int,
    model: Model,
    num_tokens: int,
    *,
    decode_only: bool = False,
    dtype: str = "bfloat16",
) -> Program:
    """The serving step as the engine compiles it for devices of so much memory each, among which the model is split."""
    config = ModelConfig.from_hf(model.config | {"num_hidden_layers": model.num_layers})
    device_group = DeviceGroup(devices)
    group, share = device_group.group, shard_config(config, len(devices))
    B, weights, struct = BLOCK_SIZES[platform], jnp.dtype(dtype), jax.ShapeDtypeStruct
    definition = ModelDefinition.of(
        lambda: Llama(config, dtype=weights, max_model_len=MAX_MODEL_LEN, group=group)
    )
    leaves = definition.abstract()
    spec = KVCacheSpec.of(share, B, weights, platform, BACKENDS[platform])
    kv_cache_bytes = int(0.9 * memory) - RESERVED_BYTES - num_bytes(leaves)
    num_blocks = kv_cache_bytes // spec.bytes_per_block
    max_num_seqs = MAX_NUM_SEQS if kv_cache_bytes > SMALL_KV_CACHE_BYTES else SMALL_NUM_SEQS
    shape = StepShape(
        num_tokens,
        min(num_tokens, max_num_seqs),
        MAX_MODEL_LEN // B,
        prompt_logprobs=not decode_only,
        decode_only=decode_only,
    )
    step = make_step(
        definition,
        shape,
        VocabShard(config.vocab_size, group),
        max_logprobs=20,
        processed_logprobs=False,
        attention_backend=BACKENDS[platform],
        unroll_layers=True,
    )
    tokens, sampled = struct((num_blocks, B), jnp.int32), struct((max_num_seqs,), jnp.int32)
    pools: Any = Pools(spec.abstract(num_blocks), tokens, sampled)  # type: ignore[arg-type]
    biases = (max_num_seqs + 1, MAX_BIASES)
    masks = (max_num_seqs + 1, -(-config.vocab_size // BITS))
    tables: Any = SlotTables(
        struct(biases, jnp.int32),  # type: ignore[arg-type]
        struct(biases, jnp.float32),  # type: ignore[arg-type]
        struct(masks, jnp.uint32),  # type: ignore[arg-type]
    )
    kind = "decode" if decode_only else "mixed"
    name = f"step {model} TP{len(devices)} {kind} T{num_tokens} S{shape.num_rows} {dtype}"
    spread = device_group.spread(
        step, in_specs=(SHARDED, SHARDED, EVERYWHERE, EVERYWHERE), out_specs=(EVERYWHERE, SHARDED)
    )
    everywhere: Any = (tables, struct((shape.size,), jnp.int32))
    arguments = (
        device_group.abstract_weights(definition.names, leaves),
        device_group.abstract_shards(pools),
        *device_group.abstract_everywhere(everywhere),
    )
    return Program(name, spread, arguments, donated=1, num_devices=len(devices))


def room(memory: int, model: Model) -> int:
    """Bytes that the weights, in bfloat16, leave for a pool."""
    config = ModelConfig.from_hf(model.config | {"num_hidden_layers": model.num_layers})
    shapes = ModelDefinition.of(lambda: Llama(config, dtype=jnp.dtype("bfloat16"), max_model_len=64)).shapes
    return int(0.9 * memory) - RESERVED_BYTES - 2 * sum(map(math.prod, shapes))


def quick_steps(platform: str, devices: Sequence[Any], memory: int) -> Iterator[Program]:
    """The smallest program of a small model and the largest of a large one, each cut to a few layers."""
    small, large = (Model(name, config, 4) for name, config in MODELS.items())
    yield step_program(platform, devices[:1], memory, small, 16, decode_only=True)
    yield step_program(platform, devices[:1], memory, large, 2048)


def all_steps(platform: str, devices: Sequence[Any], memory: int) -> Iterator[Program]:
    """With all layers, as far as the devices have room for them."""
    yield from quick_steps(platform, devices, memory)
    for name, config in MODELS.items():
        model = Model(name, config, config["num_hidden_layers"])
        if room(memory, model) > USEFUL_KV_CACHE_BYTES:
            # where there is little room, large steps would take much of it for their temporaries
            largest = 2048 if room(memory, model) > SMALL_KV_CACHE_BYTES else 512
            for num_tokens in (16, 256):
                yield step_program(platform, devices[:1], memory, model, num_tokens, decode_only=True)
            for num_tokens in (256, largest):
                yield step_program(platform, devices[:1], memory, model, num_tokens)
    if len(devices) >= 4:
        model = Model("Llama-3.1-8B", LLAMA_3_1_8B, 32)
        yield step_program(platform, devices[:4], memory, model, 256, decode_only=True)
        yield step_program(platform, devices[:4], memory, model, 2048)

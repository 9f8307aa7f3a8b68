"""What scripts/aot_check.py compiles: attention by itself, and whole serving steps, with abstract arguments.

`Kernel` and `Step` say what; they are small, so that another process can be told. `program` makes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
from jaxserve.sharding import EVERYWHERE, SHARDED, DeviceGroup, TensorParallel, VocabShard, shard_config
from jaxserve.slot_tables import MAX_BIASES
from jaxserve.step import ModelDefinition, Pools, make_step
from jaxserve.step_shapes import StepProgram, StepShape
from jaxserve.weight_layouts import loop_copies_table

BACKENDS = {"tpu": "pallas_tpu", "gpu": "pallas_triton"}
BLOCK_SIZES = {"tpu": 128, "gpu": 32}
KERNEL_POOL_BYTES = 5 << 30  # more than Triton's 32-bit offsets reach; only shapes, nothing is allocated
MAX_NUM_SEQS = 256
SMALL_NUM_SEQS, SMALL_POOL_BYTES = 64, 8 << 30  # sequences at once where there is room for few
SMALL_NUM_TOKENS = 512
FEW_NUM_SEQS = 16
USEFUL_POOL_BYTES = 2 << 30  # the least that a model is served with
MEMORY_UTILIZATION = 0.9  # the engine's default
RESERVED_BYTES = 1 << 30  # of a device, for programs and temporaries
WEIGHTS = jnp.dtype("bfloat16")  # but for the quantized ones
QUICK_LAYERS = 2
MAX_MODEL_LEN = 8192

HEAD_DIMS = (64, 80, 96, 128)  # of the backend for Hopper

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
LLAMA_3_3_70B = LLAMA_3_1_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODELS = {"SmolLM2-135M": SMOLLM2_135M, "Llama-3.1-8B": LLAMA_3_1_8B, "Llama-3.3-70B": LLAMA_3_3_70B}


class Program(NamedTuple):
    """Something to compile.

    Attributes:
        function: takes the arguments.
        arguments: pytrees of jax.ShapeDtypeStruct.
        donated: which argument is the pool, to be updated in place.
        weights: which argument is the weights, to be read where they are; None: there are none.
        num_devices: that share it; arguments of more than one know where they lie.
        other_bytes: of a device's memory, for what is served but left out here.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: int
    weights: int | None = None
    num_devices: int = 1
    other_bytes: int = 0


def num_bytes(tree: Any) -> int:
    """Of all arrays of a pytree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# -- attention by itself ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Paged attention on one layer's pool of KERNEL_POOL_BYTES. Letters as in docs/kernels.md.

    Attributes:
        backend: None: the one that its platform prefers.
    """

    T: int
    H: int
    K: int
    D: int
    B: int
    S: int = 64
    max_model_len: int = MAX_MODEL_LEN
    dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    sliding_window: int | None = None
    soft_cap: float | None = None
    decode_only: bool = False
    backend: str | None = None

    num_devices = 1

    @property
    def name(self) -> str:
        parts = [
            "attention",
            *([] if self.backend is None else [self.backend]),
            "decode" if self.decode_only else "mixed",
            f"T{self.T} H{self.H} K{self.K} D{self.D} B{self.B}",
            f"{self.dtype}/{self.kv_dtype}",
        ]
        parts += [f"window {self.sliding_window}"] * (self.sliding_window is not None)
        parts += [f"cap {self.soft_cap:g}"] if self.soft_cap is not None else []
        return " ".join(parts)

    def program(self, platform: str, devices: Sequence[Any], memory: int) -> Program:
        """For any device of a platform."""
        del devices, memory
        backend, kv_dtype = self.backend or BACKENDS[platform], jnp.dtype(self.kv_dtype)
        one = pool_struct(backend, PoolShape(1, self.K, self.B, self.D, kv_dtype), platform)
        num_blocks = KERNEL_POOL_BYTES // num_bytes(one)
        pool = pool_struct(backend, PoolShape(num_blocks, self.K, self.B, self.D, kv_dtype), platform)
        ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        untiled = self.decode_only or self.T <= MAX_UNTILED_TOKENS
        metadata = AttentionMetadata(
            block_tables=ints((self.S, -(-self.max_model_len // self.B))),
            seq_lens=ints((self.S,)),
            query_start_loc=ints((self.S + 1,)),
            positions=ints((self.T,)),
            token_rows=ints((self.T,)),
            slot_mapping=ints((self.T,)),
            num_single_tokens=ints(()),
            tiles=ints((0 if untiled else self.T // QUERY_TILE + self.S, 2)),
            num_tiles=ints(()),
        )
        attend = functools.partial(
            paged_attention,
            scale=self.D**-0.5,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
            decode_only=self.decode_only,
            backend=backend,
        )
        q = jax.ShapeDtypeStruct((self.T, self.H, self.D), jnp.dtype(self.dtype))
        kv = jax.ShapeDtypeStruct((self.T, self.K, self.D), jnp.dtype(self.dtype))
        return Program(attend, (q, kv, kv, pool, metadata), donated=3)


def quick_kernels(platform: str) -> Iterator[Kernel]:
    """What `quick_steps` leave out of Llama-3.1-8B's and SmolLM2's, and the corners of what the kernels promise."""
    kernel = functools.partial(Kernel, B=BLOCK_SIZES[platform])
    yield kernel(T=64, H=32, K=8, D=128, decode_only=True)
    yield kernel(T=512, H=9, K=3, D=64, B=16)
    yield kernel(T=256, H=32, K=8, D=128, kv_dtype="int8")
    yield kernel(T=256, H=32, K=8, D=128, kv_dtype="float8_e4m3fn")
    # a layer of many tiles: float32 needs the most of every kind of memory that is small
    yield kernel(
        T=128,
        H=16,
        K=16,
        D=256,
        B=256,
        dtype="float32",
        kv_dtype="float32",
        sliding_window=4096,
        soft_cap=50.0,
    )


def all_kernels(platform: str) -> Iterator[Kernel]:
    """Every head_dim with every pair of dtypes, every block size and every number of kv heads."""
    kernel = functools.partial(Kernel, B=BLOCK_SIZES[platform])
    yield from quick_kernels(platform)
    yield kernel(T=512, H=32, K=8, D=128)
    yield kernel(T=16, H=9, K=3, D=64, decode_only=True)
    for D in (64, 80, 96, 128, 256):
        for dtype in ("bfloat16", "float32"):
            for kv_dtype in pallas_tpu_layout.POOL_DTYPES:
                yield kernel(
                    T=128, H=8, K=2, D=D, dtype=dtype, kv_dtype=kv_dtype, sliding_window=1024, soft_cap=30.0
                )
    for B in (16, 32, 64, 256):
        for kv_dtype in ("bfloat16", "int8"):
            yield kernel(T=256, H=8, K=2, D=64, B=B, kv_dtype=kv_dtype, max_model_len=4096)
    for H, K in ((1, 1), (8, 1), (28, 4), (64, 8), (16, 16), (128, 16)):
        yield kernel(T=64, H=H, K=K, D=128, decode_only=True)
        yield kernel(T=2048, H=H, K=K, D=128, S=256)


def hopper_kernels(*, quick: bool) -> Iterator[Kernel]:
    """Of the backend for Hopper alone: the same corners of what it can do, which is less."""
    kernel = functools.partial(Kernel, B=BLOCK_SIZES["gpu"], backend="mosaic_gpu")
    yield kernel(T=64, H=32, K=8, D=128, decode_only=True)
    if quick:
        return
    yield kernel(T=512, H=9, K=3, D=64, B=16)
    yield kernel(T=16, H=9, K=3, D=64, decode_only=True)
    for D in HEAD_DIMS:
        for dtype in ("bfloat16", "float16"):
            yield kernel(
                T=128, H=8, K=2, D=D, dtype=dtype, kv_dtype=dtype, sliding_window=1024, soft_cap=30.0
            )
    for B in (16, 64, 128, 256):
        yield kernel(T=256, H=8, K=2, D=64, B=B, max_model_len=4096)
    for H, K in ((1, 1), (28, 4), (71, 1), (128, 1), (128, 16)):
        yield kernel(T=64, H=H, K=K, D=128, decode_only=True)


# -- whole steps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model as it is served.

    Attributes:
        name: in MODELS.
        quantized: whether weights are int8, else bfloat16.
        num_devices: among which it is split.
        num_layers: so many of its own; they are unrolled, so that the others would only be more of the same. None: all.
    """

    name: str
    quantized: bool = False
    num_devices: int = 1
    num_layers: int | None = None

    def __str__(self) -> str:
        layers = "" if self.num_layers is None else f" ({self.num_layers} of {self._all_layers} layers)"
        return f"{self.name}{layers} {'int8' if self.quantized else 'bfloat16'} TP{self.num_devices}"

    @property
    def _all_layers(self) -> int:
        return int(MODELS[self.name]["num_hidden_layers"])

    @property
    def config(self) -> ModelConfig:
        num_layers = self.num_layers or self._all_layers
        return ModelConfig.from_hf(MODELS[self.name] | {"num_hidden_layers": num_layers})

    @property
    def weight_bytes(self) -> int:
        """Of a device's share, of as many layers as there are here."""
        return num_bytes(definition_of(self).abstract())

    @property
    def other_bytes(self) -> int:
        """Of a device's share of the other layers."""
        return replace(self, num_layers=None).weight_bytes - self.weight_bytes

    def pool_bytes(self, memory: int) -> int:
        """What a device of so much memory has for its share of the KV pool, beside all layers."""
        return int(MEMORY_UTILIZATION * memory) - RESERVED_BYTES - self.weight_bytes - self.other_bytes


@functools.cache
def definition_of(model: Model) -> ModelDefinition:
    """A device's share."""
    return ModelDefinition.of(
        lambda: Llama(
            model.config,
            dtype=WEIGHTS,
            max_model_len=MAX_MODEL_LEN,
            quantized=model.quantized,
            group=TensorParallel(model.num_devices),
        )
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """The serving step as the engine compiles it.

    Attributes:
        max_num_seqs: of the engine; `decode_only` steps have as many rows as tokens.
        backend: of attention; None: the platform's.
    """

    model: Model
    num_tokens: int
    max_num_seqs: int = MAX_NUM_SEQS
    decode_only: bool = False
    backend: str | None = None

    @property
    def num_rows(self) -> int:
        return min(self.num_tokens, self.max_num_seqs)

    @property
    def num_devices(self) -> int:
        return self.model.num_devices

    @property
    def name(self) -> str:
        kind = "decode" if self.decode_only else "mixed"
        backend = f" {self.backend}" if self.backend else ""
        return f"step {self.model} {kind} T{self.num_tokens} S{self.num_rows}{backend}"

    def program(self, platform: str, devices: Sequence[Any], memory: int) -> Program:
        """For devices of so much memory each, as many as the model is split among; the pool takes what is left."""
        config, definition = self.model.config, definition_of(self.model)
        device_group = DeviceGroup(devices)
        group, B, struct = device_group.group, BLOCK_SIZES[platform], jax.ShapeDtypeStruct
        backend = self.backend or BACKENDS[platform]
        spec = KVCacheSpec.of(shard_config(config, group.size), B, WEIGHTS, platform, backend)
        num_blocks = self.model.pool_bytes(memory) // spec.bytes_per_block
        shape = StepShape(
            self.num_tokens,
            self.num_rows,
            MAX_MODEL_LEN // B,
            prompt_logprobs=not self.decode_only,
            decode_only=self.decode_only,
        )
        step = make_step(
            definition,
            StepProgram((shape,)),
            VocabShard(config.vocab_size, group),
            max_logprobs=20,
            processed_logprobs=False,
            attention_backend=backend,
            unroll_layers=True,
            unroll_prompts=loop_copies_table(definition.table_dtype, device_group.kind, group.size),
        )
        tokens, sampled = struct((num_blocks, B), jnp.int32), struct((self.max_num_seqs,), jnp.int32)
        pools: Any = Pools(spec.abstract(num_blocks), tokens, sampled)  # type: ignore[arg-type]
        biases = (self.max_num_seqs + 1, MAX_BIASES)
        masks = (self.max_num_seqs + 1, -(-config.vocab_size // BITS))
        tables: Any = SlotTables(
            struct(biases, jnp.int32),  # type: ignore[arg-type]
            struct(biases, jnp.float32),  # type: ignore[arg-type]
            struct(masks, jnp.uint32),  # type: ignore[arg-type]
        )
        spread = device_group.spread(
            step, in_specs=(SHARDED, SHARDED, EVERYWHERE, EVERYWHERE), out_specs=(EVERYWHERE, SHARDED)
        )
        everywhere: Any = (tables, struct((shape.size,), jnp.int32))
        arguments = (
            device_group.abstract_weights(definition.names, definition.abstract()),
            device_group.abstract_shards(pools),
            *device_group.abstract_everywhere(everywhere),
        )
        return Program(
            spread,
            arguments,
            donated=1,
            weights=0,
            num_devices=len(devices),
            other_bytes=self.model.other_bytes,
        )


def quick_steps(memory: int) -> Iterator[Step]:
    """A small model's program for prompts and a large model's smallest, each cut to a few layers."""
    small, *large = (
        Model(name, quantized, num_layers=QUICK_LAYERS)
        for name, quantized in (("SmolLM2-135M", False), ("Llama-3.1-8B", False), ("Llama-3.1-8B", True))
    )
    yield Step(model=replace(small, num_layers=1), num_tokens=256, max_num_seqs=FEW_NUM_SEQS)
    model = next(model for model in large if model.pool_bytes(memory) >= USEFUL_POOL_BYTES)
    yield Step(model=model, num_tokens=FEW_NUM_SEQS, max_num_seqs=FEW_NUM_SEQS, decode_only=True)


def quick_split_step() -> Step:
    """Of a model that is split among devices."""
    model = Model("Llama-3.1-8B", num_devices=4, num_layers=QUICK_LAYERS)
    return Step(model=model, num_tokens=FEW_NUM_SEQS, max_num_seqs=FEW_NUM_SEQS, decode_only=True)


def hopper_steps(num_layers: int | None) -> Iterator[Step]:
    """With the backend for Hopper alone."""
    model = Model("Llama-3.1-8B", num_layers=num_layers)
    step = functools.partial(Step, model=model, backend="mosaic_gpu")
    yield step(num_tokens=MAX_NUM_SEQS, decode_only=True)
    yield step(num_tokens=2048)


def all_steps(memory: int, num_devices: int, num_layers: int | None) -> Iterator[Step]:
    """Of each model that so many devices at most have room for, a step of decoding alone and the largest one.

    Args:
        num_layers: that models are cut to; None: they are whole.
    """
    yield from quick_steps(memory)
    models = [Model("SmolLM2-135M", num_layers=num_layers)]
    models += [Model("Llama-3.1-8B", q, n, num_layers) for n in (1, 4) for q in (False, True)]
    models += [Model("Llama-3.3-70B", True, 8, num_layers)]
    for model in models:
        if model.num_devices <= num_devices and model.pool_bytes(memory) >= USEFUL_POOL_BYTES:
            yield from _steps(model, memory)


def _steps(model: Model, memory: int) -> Iterator[Step]:
    # where there is little room, large steps would take much of it for their temporaries
    little = model.pool_bytes(memory) < SMALL_POOL_BYTES
    max_num_seqs, largest = (SMALL_NUM_SEQS, SMALL_NUM_TOKENS) if little else (MAX_NUM_SEQS, 2048)
    yield Step(model=model, num_tokens=max_num_seqs, max_num_seqs=max_num_seqs, decode_only=True)
    yield Step(model=model, num_tokens=largest, max_num_seqs=max_num_seqs)

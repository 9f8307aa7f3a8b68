"""Tensor parallelism (Megatron-LM, Shoeybi et al. 2019): one model over several chips.

Every chip runs the step on a smaller model: its share of the heads, of the MLP and of the vocabulary. The whole step is
one `shard_map`, so that what the chips tell each other stands in the code: two sums a layer, one for the embedding, and
in the sampler a maximum, a few sums and the best candidates of each; never [S, V].

What each chip has of its own (parameters, pools) is kept as one global array with the chips' shards end to end along
the first axis, whatever the array means: a chip's shard is contiguous and has the shape that its model asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.weight_layouts import weight_layout

AXIS = "tp"
VOCAB_GROUP = 128  # tokens of which only the largest is looked at first
VOCAB_ROWS = 128  # rows of the table [VOCAB_ROWS, columns] that the vocabulary is drawn from

TopK = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
Tree = TypeVar("Tree")
Step = TypeVar("Step", bound=Callable[..., Any])


@dataclass(frozen=True)
class TensorParallel:
    """The chips that compute one step together. Its methods are called inside the step, on every chip alike; with one
    chip they do nothing.

    Attributes:
        size: number of chips.
    """

    size: int = 1

    @property
    def rank(self) -> jax.Array | int:
        """Which one this chip is."""
        return 0 if self.size == 1 else lax.axis_index(AXIS)

    def sum(self, x: jax.Array) -> jax.Array:
        return x if self.size == 1 else lax.psum(x, AXIS)

    def max(self, x: jax.Array) -> jax.Array:
        return x if self.size == 1 else lax.pmax(x, AXIS)

    def min(self, x: jax.Array) -> jax.Array:
        return x if self.size == 1 else lax.pmin(x, AXIS)

    def gather(self, x: jax.Array, axis: int) -> jax.Array:
        """The chips' arrays end to end along `axis`."""
        return x if self.size == 1 else lax.all_gather(x, AXIS, axis=axis, tiled=True)


ONE_CHIP = TensorParallel()


def first_true(x: jax.Array) -> jax.Array:
    """bool [S, n] → [S] int32; n where none is."""
    n = x.shape[-1]
    return jnp.min(jnp.where(x, jnp.arange(n, dtype=jnp.int32), n), axis=-1)


def count_true(x: jax.Array) -> jax.Array:
    """bool […, n] → […] int32. Summed in float32, exactly up to 2²⁴: of a sum of integers XLA:CPU makes a tree of
    windows, which takes as long to compile as a layer."""
    return jnp.sum(x.astype(jnp.float32), axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class VocabShard:
    """A chip's share of the vocabulary: whole rows of a table [rows, columns] in which token v is in row v // columns.
    The last rows may be padding, which has a logit of −inf.

    Arrays over the vocabulary have it as their last axis, of `num_local` tokens. With one chip that is V.

    Attributes:
        size: V.
    """

    size: int
    group: TensorParallel = ONE_CHIP

    @property
    def num_columns(self) -> int:
        return -(-self.size // VOCAB_ROWS)

    @property
    def num_local(self) -> int:
        """Tokens of a chip, padding included: the same for all."""
        if self.group.size == 1:
            return self.size
        return -(-VOCAB_ROWS // self.group.size) * self.num_columns

    @property
    def first(self) -> jax.Array | int:
        """Id of the chip's first token."""
        return self.group.rank * self.num_local

    def ids(self) -> jax.Array:
        """[num_local] int32."""
        ids = jnp.arange(self.num_local, dtype=jnp.int32)
        return ids if self.group.size == 1 else self.first + ids

    def local(self, ids: jax.Array, elsewhere: int) -> jax.Array:
        """Token ids → indices into the chip's share; `elsewhere` for those that it does not have."""
        if self.group.size == 1:
            return ids
        index = ids - self.first
        return jnp.where((index >= 0) & (index < self.num_local), index, elsewhere)

    def mask_padding(self, logits: jax.Array) -> jax.Array:
        if self.group.size * self.num_local == self.size:
            return logits
        return jnp.where(self.ids() < self.size, logits, -jnp.inf)

    def sum(self, x: jax.Array) -> jax.Array:
        """[…, V] → […, 1]."""
        return self.group.sum(jnp.sum(x, axis=-1, keepdims=True))

    def count(self, x: jax.Array) -> jax.Array:
        """bool […, V] → […, 1] int32: how many are true."""
        return self.group.sum(count_true(x)[..., None])

    def max(self, x: jax.Array) -> jax.Array:
        """[…, V] → […, 1]."""
        return self.group.max(jnp.max(x, axis=-1, keepdims=True))

    def logsumexp(self, x: jax.Array) -> jax.Array:
        """[…, V] → […, 1]."""
        if self.group.size == 1:
            return jax.nn.logsumexp(x, axis=-1, keepdims=True)
        peak = self.max(x)
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
        return jnp.log(self.sum(jnp.exp(x - peak))) + peak

    def argmax(self, x: jax.Array) -> jax.Array:
        """[S, V] → [S] int32, the lowest id on a tie: of the first group of neighbours with the largest member the
        first such. XLA:CPU does not vectorize a maximum that carries its index along (ten times as slow)."""
        S, V = x.shape
        table = x.reshape(S, -1, VOCAB_GROUP if V % VOCAB_GROUP == 0 else V)
        members = jnp.max(table, axis=-1)
        peak = self.max(members)
        group = first_true(members == peak)
        inside = jnp.take_along_axis(table, group[:, None, None], axis=1, mode="clip")[:, 0]
        offset = first_true(inside == peak)
        index = self.first + group * table.shape[2] + offset
        found = jnp.where(offset < table.shape[2], index, self.size - 1)
        return self.group.min(jnp.minimum(found, self.size - 1))

    def take(self, x: jax.Array, ids: jax.Array) -> jax.Array:
        """x [S, V] at ids [S, n] → [S, n]."""
        if self.group.size == 1:
            return jnp.take_along_axis(x, ids, axis=-1, mode="promise_in_bounds")
        index = self.local(ids, -1)
        found = jnp.take_along_axis(x, jnp.maximum(index, 0), axis=-1, mode="promise_in_bounds")
        return self.group.max(jnp.where(index >= 0, found, -jnp.inf))

    def top_k(self, x: jax.Array, k: int, top_k_of: TopK) -> tuple[jax.Array, jax.Array]:
        """[S, V] → (values [S, k], ids [S, k]), descending, the lower id first on a tie; k at most V. Each chip sends
        no more than its own k best, which `top_k_of` finds, there and of them all."""
        values, ids = top_k_of(x, min(k, self.num_local))
        if self.group.size == 1:
            return values, ids
        # chips come in order of their ids, so that a tie is settled as it would be by one chip
        values, ids = (self.group.gather(part, axis=1) for part in (values, ids + self.first))
        values, best = top_k_of(values, k)
        return values, jnp.take_along_axis(ids, best, axis=-1, mode="promise_in_bounds")


def shard_config(config: ModelConfig, size: int) -> ModelConfig:
    """The model that each of `size` chips runs. Where there are more chips than kv heads, several have the same one.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    if size == 1:
        return config
    c = config
    for name, value in (("attention heads", c.num_heads), ("MLP columns", c.intermediate_size)):
        if value % size:
            raise ConfigError(f"--tensor-parallel-size {size} must divide the model's {value:,} {name}.")
    if c.num_kv_heads % size and size % c.num_kv_heads:
        raise ConfigError(
            f"--tensor-parallel-size {size} must divide the model's {c.num_kv_heads} kv heads, or be a multiple "
            "of them."
        )
    return replace(
        c,
        num_heads=c.num_heads // size,
        num_kv_heads=max(1, c.num_kv_heads // size),
        intermediate_size=c.intermediate_size // size,
        vocab_size=VocabShard(c.vocab_size, TensorParallel(size)).num_local,
    )


class DeviceGroup:
    """The chips of an engine, and how arrays come to lie on them. One chip is used as it is, without a mesh.

    Attributes:
        group: what the step sees of it.
        local_shards: which chips are this process's.
    """

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.group = TensorParallel(len(devices))
        self._devices = list(devices)
        here = jax.process_index()
        self.local_shards = [i for i, device in enumerate(devices) if device.process_index == here]

    @classmethod
    def of(cls, size: int) -> DeviceGroup:
        """`size` devices, of every process as many.

        Raises:
            ConfigError: there are fewer.
        """
        chosen: list[jax.Device] = []
        share = size // jax.process_count()
        for process in range(jax.process_count()):
            devices = [device for device in jax.devices() if device.process_index == process]
            if share > len(devices):
                raise ConfigError(
                    f"--tensor-parallel-size {size} needs {share} devices in each process; process {process} has "
                    f"{len(devices)} ({devices[0].platform})."
                )
            chosen += devices[:share]
        return cls(chosen)

    @property
    def devices(self) -> list[jax.Device]:
        """Those of this process, in the order of `local_shards`."""
        return [self._devices[i] for i in self.local_shards]

    @property
    def kind(self) -> str:
        """Such as "TPU v4"."""
        return str(self._devices[0].device_kind)

    @property
    def platform(self) -> str:
        return str(self._devices[0].platform)

    def put_shards(self, shards: Sequence[npt.NDArray[Any] | jax.Array]) -> jax.Array:
        """One array a local chip → their global array. The arrays are given away."""
        if self.group.size == 1:
            placed: list[jax.Array] = jax.device_put(list(shards), self._devices)
            return placed[0]
        rows, *rest = shards[0].shape
        return self._assemble((rows * self.group.size, *rest), self._sharded, shards)

    def put_everywhere(self, array: npt.NDArray[Any]) -> jax.Array:
        """The same array on every chip. It is given away."""
        if self.group.size == 1:
            return self.put_shards([array])
        return self._assemble(array.shape, self._everywhere, [array] * len(self.local_shards))

    def put_weight(self, shard: int, name: str, array: npt.NDArray[Any]) -> jax.Array:
        """A parameter of a local chip's model, laid out as `weight_layout` says."""
        sharding = SingleDeviceSharding(self.devices[shard])
        layout = weight_layout(name, array.dtype, self.devices[shard].device_kind, self.group.size)
        placed: jax.Array = jax.device_put(array, sharding if layout is None else Format(layout, sharding))
        return placed

    def zeros(self, tree: Tree) -> Tree:
        """Arrays of zeros for a tree of a chip's shapes (ShapeDtypeStruct)."""

        def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return self.put_shards([jnp.zeros(leaf.shape, leaf.dtype, device=d) for d in self.devices])

        zeros: Tree = jax.tree.map(make, tree)
        return zeros

    def abstract_shards(self, tree: Tree) -> Tree:
        """A chip's shapes (ShapeDtypeStruct) → those of the global arrays."""
        if self.group.size == 1:
            return tree

        def widen(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            rows, *rest = leaf.shape
            return jax.ShapeDtypeStruct((rows * self.group.size, *rest), leaf.dtype, sharding=self._sharded)

        widened: Tree = jax.tree.map(widen, tree)
        return widened

    def abstract_weights(
        self, names: Sequence[str], leaves: Sequence[jax.ShapeDtypeStruct]
    ) -> list[jax.ShapeDtypeStruct]:
        """Likewise for parameters, which lie as `put_weight` lays them."""
        sharding: Sharding = SingleDeviceSharding(self._devices[0]) if self.group.size == 1 else self._sharded

        def with_layout(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            layout = weight_layout(name, leaf.dtype, self.kind, self.group.size)
            if layout is None:
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=Format(layout, sharding))

        return [with_layout(*each) for each in zip(names, self.abstract_shards(list(leaves)), strict=True)]

    def abstract_everywhere(self, tree: Tree) -> Tree:
        """Likewise for arrays that are the same on every chip."""
        if self.group.size == 1:
            return tree
        placed: Tree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._everywhere), tree
        )
        return placed

    def spread(self, step: Step, in_specs: Any, out_specs: Any) -> Step:
        """`step` on every chip, each with its shards of what is SHARDED and the whole of what is EVERYWHERE."""
        if self.group.size == 1:
            return step
        # the check of what differs between chips would want it said of every loop's first value
        return jax.shard_map(step, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    @cached_property
    def _mesh(self) -> Mesh:
        return Mesh(np.array(self._devices), (AXIS,))

    @cached_property
    def _sharded(self) -> NamedSharding:
        return NamedSharding(self._mesh, SHARDED)

    @cached_property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self._mesh, EVERYWHERE)

    def _assemble(
        self, shape: tuple[int, ...], sharding: NamedSharding, shards: Sequence[npt.NDArray[Any] | jax.Array]
    ) -> jax.Array:
        placed: list[jax.Array] = jax.device_put(list(shards), self.devices)
        return jax.make_array_from_single_device_arrays(shape, sharding, placed)


SHARDED, EVERYWHERE = PartitionSpec(AXIS), PartitionSpec()

"""Layers of a decoder-only transformer in `flax.nnx`.

Weights keep the checkpoint's layout [out, in] and are contracted on the last axis of both: XLA:CPU runs that
form fastest, and nothing needs a transpose while loading. Products accumulate in float32; asking for a
bfloat16 result directly makes XLA:CPU fall off its fast path (12 × slower for the output layer).

Quantized weights are int8 with one scale per output channel. Their inputs are quantized as they come, with one scale
per row, so that a row's result depends on no other; sums of int32 are exact in any order (one row on a CPU: float32).

One row of 16 bits is bound by reading the weights; what XLA:CPU's library makes of it, be it a product or a sum, takes
twice as long. Two kernels share the work: in `partial_sums`, which LLVM turns into vectors, each of LANES neighbouring
columns is added to those that are a multiple of LANES further on; what is left of an output is added up behind it.
Fused they would add one element after the other.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.kernels.paged_attention import current_platform
from jaxserve.kernels.reference import INT8_MAX
from jaxserve.sharding import ONE_CHIP, TensorParallel, VocabShard

LayerIndex = int | jax.Array

LANES = 16  # neighbouring columns that go into different sums
MAX_TERMS = 20  # of a partial sum
# XLA fuses nothing into 16 others, but makes an array of it first: so a weight is taken as two arrays of the same bits.
# And slices of bfloat16 XLA:CPU rounds once more, of integers it does not.
VIEWS = {"bfloat16": (jnp.uint16, jnp.int16), "int8": (jnp.int8, jnp.uint8)}
MAX_TERMS_OF_VIEW = 15
SWAPPED_ROWS = (16, 64)  # from so many rows to so many, XLA:CPU is faster with weights on the left
REST_STEPS = 2 * INT8_MAX  # of which one rounding leaves at most half
CONTRACT_LAST = (((1,), (1,)), ((), ()))


class QuantizedRows(NamedTuple):
    """values [T, in] int8 · scales [T, 1] float32, and for inputs that are `fine` what that leaves of them:
    rests [T, in] int8 · scales / REST_STEPS."""

    values: jax.Array
    scales: jax.Array
    rests: jax.Array | None = None

    def steps(self) -> jax.Array:
        """[T, in] float32: how many `scales` each element is."""
        values = self.values.astype(jnp.float32)
        return values if self.rests is None else values + self.rests.astype(jnp.float32) / REST_STEPS


class PartialSums(NamedTuple):
    """One row of a product in parts: sums [out, n, LANES] float32, to be added up for each output, and, if there are,
    scale [out] float32 and bias [out]."""

    sums: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None


def quantize_rows(x: jax.Array, group: TensorParallel = ONE_CHIP, *, fine: bool = False) -> QuantizedRows:
    """[T, in]: the largest element of a row becomes ±127; of the whole row, where chips have a share of it each."""
    x = x.astype(jnp.float32)
    scales = group.max(jnp.max(jnp.abs(x), axis=-1, keepdims=True)) / INT8_MAX
    steps = x / jnp.where(scales > 0, scales, 1.0)
    values = jnp.round(steps)
    rests = jnp.round((steps - values) * REST_STEPS).astype(jnp.int8) if fine else None
    return QuantizedRows(values.astype(jnp.int8), scales, rests)


def matmul_int8(
    x: jax.Array | QuantizedRows,
    weight: jax.Array,
    scale: jax.Array,
    group: TensorParallel = ONE_CHIP,
    *,
    fine: bool = False,
) -> jax.Array:
    """x [T, in] · (weight [out, in] int8 · scale [out]) → [T, out] float32; `in` may be spread over the chips of a
    group, whose sums are added up while they are integers, so that several chips give what one gives; of one row on a
    CPU they are float32, equal up to rounding."""
    values, scales, rests = rows = x if isinstance(x, QuantizedRows) else quantize_rows(x, group, fine=fine)
    if not isinstance(x, QuantizedRows) and uses_partial_sums(x, weight):
        return group.sum(_added_up(rows.steps()[0], weight))[None] * (scales * scale)
    T = values.shape[0]
    if rests is not None:  # rows of the same product, so that the weights are read once
        values = jnp.concatenate([values, rests])
    elif T == 1:  # XLA:CPU has no fast product of one row; reading the weights bounds two rows as well
        values = jnp.broadcast_to(values, (2, values.shape[1]))
    sums = lax.dot_general(values, weight, CONTRACT_LAST, preferred_element_type=jnp.int32)
    if rests is None:
        return group.sum(sums[:T]).astype(jnp.float32) * (scales * scale)
    sums = group.sum(sums).astype(jnp.float32)
    return (sums[:T] + sums[T:] / REST_STEPS) * (scales * scale)


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, in] · weight [out, in] → [T, out] float32."""
    if uses_partial_sums(x, weight):
        return _added_up(x[0].astype(jnp.float32), weight)[None]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    on_cpu = current_platform() == "cpu"
    if len(x) == 1 and x.dtype != jnp.float32 and on_cpu:  # XLA:CPU has no fast product of one row
        return matmul(jnp.broadcast_to(x, (8, x.shape[1])), weight)[:1]
    if _swaps_operands(x, weight) and on_cpu:
        product = lax.dot_general(weight, x, CONTRACT_LAST, precision, preferred_element_type=jnp.float32)
        swapped: jax.Array = lax.optimization_barrier(product)  # else XLA swaps them back
        return swapped.T
    return lax.dot_general(x, weight, CONTRACT_LAST, precision, preferred_element_type=jnp.float32)


def uses_partial_sums(x: jax.Array, weight: jax.Array) -> bool:
    """Whether this product is made of `partial_sums`."""
    one_row = x.shape[0] == 1 and x.dtype != jnp.float32
    return one_row and _num_terms(weight) > 0 and current_platform() == "cpu"


def _added_up(row: jax.Array, weight: jax.Array) -> jax.Array:
    """row [in] float32 · weight [out, in] → [out] float32."""
    sums = jax.eval_shape(partial_sums, row, weight)
    # What a branch returns is not fused with what takes it, and that is all the branch is for: where one input is NaN,
    # every output is.
    nothing = partial(jnp.full, sums.shape, jnp.nan, sums.dtype)
    return jnp.sum(lax.cond(jnp.isnan(row[0]), nothing, partial(partial_sums, row, weight)), axis=(1, 2))


@jax.jit  # traced once for all layers
def partial_sums(row: jax.Array, weight: jax.Array) -> jax.Array:
    """row [in] float32 · weight [out, in] → [out, n, LANES] float32, n = in / (terms of a sum · LANES); the product is
    their sum for each output."""
    outputs, num_terms = len(weight), _num_terms(weight)
    row = row.reshape(-1, num_terms, LANES)
    views = [
        lax.bitcast_convert_type(weight, dtype).reshape(outputs, -1, num_terms, LANES)
        for dtype in _view_dtypes(weight)
    ]
    terms = (_float32(views[i % len(views)][:, :, i]) * row[:, i] for i in range(num_terms))
    return reduce(jnp.add, terms)


def _float32(x: jax.Array) -> jax.Array:
    """16-bit integers are bits of bfloat16, those of 8 bits are int8."""
    if x.dtype in (jnp.uint16, jnp.int16):
        wide = x.astype(jnp.uint32 if x.dtype == jnp.uint16 else jnp.int32)
        return lax.bitcast_convert_type(wide << 16, jnp.float32)
    return (x.astype(jnp.int8) if x.dtype == jnp.uint8 else x).astype(jnp.float32)


def _view_dtypes(weight: jax.Array) -> tuple[jnp.dtype, ...]:
    return tuple(jnp.dtype(dtype) for dtype in VIEWS.get(weight.dtype.name, (weight.dtype,)))


def _num_terms(weight: jax.Array) -> int:
    """Of a partial sum, as many as its inputs divide into; 0 if they do not."""
    most = min(MAX_TERMS, MAX_TERMS_OF_VIEW * len(_view_dtypes(weight)))
    return max((n for n in range(2, most + 1) if weight.shape[1] % (n * LANES) == 0), default=0)


def _swaps_operands(x: jax.Array, weight: jax.Array) -> bool:
    """Whether XLA:CPU is faster with x transposed: it packs what is on the right, and here that is smaller."""
    (outputs, inputs), rows = weight.shape, x.shape[0]
    return x.dtype != jnp.float32 and outputs < inputs and SWAPPED_ROWS[0] <= rows <= SWAPPED_ROWS[1]


class Linear(nnx.Module):
    """x [T, in] → [T, out] in float32, as the product was accumulated: who uses it rounds it, once.

    Args:
        summed_over: chips that have a share of the inputs each; their products are added up.
        fine: inputs of a quantized one take two int8 numbers each.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        quantized: bool = False,
        summed_over: TensorParallel = ONE_CHIP,
        fine: bool = False,
    ) -> None:
        self.summed_over = summed_over
        self.fine = fine
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), jnp.int8 if quantized else dtype))
        self.scale = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if quantized else None
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: jax.Array | QuantizedRows) -> jax.Array:
        out = self.product(x)
        if self.bias is not None:
            out += self.bias[...].astype(jnp.float32)
        return out

    def partial_sums(self, row: jax.Array) -> PartialSums:
        """What of one row's product reads the parameters, where it `uses_partial_sums`; row [in] float32, if quantized
        its `steps`."""
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        return PartialSums(partial_sums(row, self.weight[...]), scale, bias)

    def add_up(self, parts: PartialSums, x: jax.Array | QuantizedRows) -> jax.Array:
        """The rest of it: [1, out] float32."""
        out = self.summed_over.sum(jnp.sum(parts.sums, axis=(1, 2)))
        if isinstance(x, QuantizedRows) and parts.scale is not None:
            out *= x.scales[0] * parts.scale
        if parts.bias is not None:
            out += parts.bias.astype(jnp.float32)
        return out[None]

    def product(self, x: jax.Array | QuantizedRows) -> jax.Array:
        """Without the bias. Only quantized weights take quantized inputs."""
        if self.scale is not None:
            return matmul_int8(x, self.weight[...], self.scale[...], self.summed_over, fine=self.fine)
        assert not isinstance(x, QuantizedRows)
        return self.summed_over.sum(matmul(x, self.weight[...]))


class Embedding(nnx.Module):
    """Token ids [T] → [T, E] float32.

    Args:
        vocab: which rows of the table a chip has.
    """

    def __init__(
        self, vocab: VocabShard, features: int, *, dtype: jnp.dtype, quantized: bool = False
    ) -> None:
        self.vocab = vocab
        self.weight = nnx.Param(jnp.zeros((vocab.num_local, features), jnp.int8 if quantized else dtype))
        self.scale = nnx.Param(jnp.zeros((vocab.num_local,), jnp.float32)) if quantized else None

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        index = self.vocab.local(token_ids, elsewhere=-1)
        rows = self.weight[...].at[index].get(mode="clip").astype(jnp.float32)
        if self.scale is not None:
            rows = rows * self.scale[...].at[index].get(mode="clip")[:, None]
        if self.vocab.group.size == 1:
            return rows
        return self.vocab.group.sum(jnp.where(index[:, None] >= 0, rows, 0.0))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [R, E] → [R, V] float32, where the table is the output layer as well."""
        if self.scale is not None:
            return matmul_int8(hidden, self.weight[...], self.scale[...], fine=True)
        return matmul(hidden, self.weight[...])


class RMSNorm(nnx.Module):
    """`rms_norm` with parameters, those of `num_layers` layers in one: as parameters of their own they would cost a
    program more to compile than all else in its layers."""

    def __init__(self, features: int, *, eps: float, dtype: jnp.dtype, num_layers: int = 1) -> None:
        self.weight = nnx.Param(jnp.zeros((num_layers * features,), dtype))
        self.features = features
        self.eps = eps

    def __call__(self, x: jax.Array, layer: LayerIndex = 0) -> jax.Array:
        return rms_norm(x, self.weight[...].reshape(-1, self.features)[layer], self.eps)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalization (Zhang & Sennrich 2019): float32 [T, E] → the weight's dtype."""
    y = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * y).astype(weight.dtype)


def rotary_embedding(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate pairs (i, i + D/2) of every head (RoPE, Su et al. 2021, in the half-split form of Llama).

    Args:
        x: [T, heads, D] float32.
        cos, sin: [T, D/2] float32.
    """
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

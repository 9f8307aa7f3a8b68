"""Layers of a decoder-only transformer in `flax.nnx`.

Weights keep the checkpoint's layout [out, in] and are contracted on the last axis of both: XLA:CPU runs that
form fastest, and nothing needs a transpose while loading. Products accumulate in float32; asking for a
bfloat16 result directly makes XLA:CPU fall off its fast path (12 × slower for the output layer).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.sharding import ONE_CHIP, TensorParallel, VocabShard

MAX_SUMMED_ROWS = 1 << 15


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, in] · weight [out, in] → [T, out] float32."""
    if x.shape[0] == 1 and x.dtype != jnp.float32:
        if weight.shape[0] > MAX_SUMMED_ROWS:  # XLA:CPU does not fuse a sum as large as the output layer's
            return matmul(jnp.broadcast_to(x, (8, x.shape[1])), weight)[:1]
        # one row is bound by reading the weights: a sum reads them as they are, a product repacks them first
        return jnp.sum(weight.astype(jnp.float32) * x[0].astype(jnp.float32)[None, :], axis=1)[None]
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, dims, precision=precision, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """x [T, in] → [T, out] in float32, as the product was accumulated: who uses it rounds it, once.

    Args:
        summed_over: chips that have a share of the inputs each; their products are added up.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        summed_over: TensorParallel = ONE_CHIP,
    ) -> None:
        self.summed_over = summed_over
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), dtype))
        self.bias = nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.summed_over.sum(matmul(x, self.weight[...]))
        if self.bias is not None:
            out += self.bias[...].astype(jnp.float32)
        return out


class Embedding(nnx.Module):
    """Token ids [T] → [T, E] float32.

    Args:
        vocab: which rows of the table a chip has.
    """

    def __init__(self, vocab: VocabShard, features: int, *, dtype: jnp.dtype) -> None:
        self.vocab = vocab
        self.weight = nnx.Param(jnp.zeros((vocab.num_local, features), dtype))

    def __call__(self, token_ids: jax.Array) -> jax.Array:
        index = self.vocab.local(token_ids, elsewhere=-1)
        rows = self.weight[...].at[index].get(mode="clip").astype(jnp.float32)
        if self.vocab.group.size == 1:
            return rows
        return self.vocab.group.sum(jnp.where(index[:, None] >= 0, rows, 0.0))


class RMSNorm(nnx.Module):
    """`rms_norm` with parameters."""

    def __init__(self, features: int, *, eps: float, dtype: jnp.dtype) -> None:
        self.weight = nnx.Param(jnp.zeros((features,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.weight[...], self.eps)


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

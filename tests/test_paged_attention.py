"""Every implementation of paged attention against the plain reference, on ragged batches over scattered blocks."""

from __future__ import annotations

from array import array

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxserve.block_manager import BlockCopy
from jaxserve.kernels import pallas_tpu_layout, reference
from jaxserve.kernels.blocked_attention import EXP2_16_BITS, EXP2_32_BITS, exp2, reinterpret
from jaxserve.kernels.lanes import (
    GROUP_CHUNK,
    MAX_SPLITS,
    MERGE_COST,
    group_size,
    max_groups,
    max_lanes,
    plan_lanes,
)
from jaxserve.kernels.metadata import AttentionMetadata, Lanes
from jaxserve.kernels.paged_attention import (
    PoolShape,
    Request,
    ServingShape,
    backend_for,
    choose_backend,
    paged_attention,
    passed_over,
    pool_struct,
)
from jaxserve.kernels.reference import QuantizedPool
from jaxserve.sampling_params import SamplingParams
from jaxserve.sequence import Sequence
from jaxserve.step import Pools, copy_blocks
from jaxserve.step_inputs import pack_step
from jaxserve.step_plan import ScheduledRow, StepPlan
from jaxserve.step_shapes import StepProgram, StepShape

BLOCK_SIZE = 16
NUM_BLOCKS = 168
Pool = jax.Array | QuantizedPool
MAX_MODEL_LEN = 1280
SWEEP = pytest.mark.sweep


def make_plan(
    rows: list[tuple[int, int]], rng: np.random.RandomState, block_size: int = BLOCK_SIZE
) -> StepPlan:
    """Rows of (tokens computed before, tokens of this step), over blocks scattered through the pool."""
    free = list(rng.permutation(np.arange(1, NUM_BLOCKS)))
    plan = StepPlan()
    for computed, num_tokens in sorted(rows, key=lambda row: row[1] > 1):
        tokens = [1] * (computed + num_tokens)
        sequence = Sequence("r", 0, tokens, SamplingParams(), seed=0, max_model_len=MAX_MODEL_LEN)
        sequence.num_computed_tokens = computed
        sequence.block_table = array("i", [int(free.pop()) for _ in range(-(-len(tokens) // block_size))])
        plan.rows.append(ScheduledRow(sequence, num_tokens, ()))
    return plan


def metadata_of(
    plan: StepPlan,
    bucket: int,
    block_size: int = BLOCK_SIZE,
    max_model_len: int = MAX_MODEL_LEN,
    *,
    lanes: bool = False,
) -> AttentionMetadata:
    shape = StepShape(bucket, min(bucket, 64), -(-max_model_len // block_size), lanes=lanes)
    inputs = {
        k: jnp.asarray(v)
        for k, v in shape.unpack(pack_step(plan, StepProgram((shape,)), shape, block_size)).items()
    }
    single, num_tiles = inputs["counts"][:2]
    names = (
        "block_tables",
        "seq_lens",
        "query_start_loc",
        "positions",
        "token_rows",
        "slot_mapping",
        "tiles",
    )
    return AttentionMetadata(
        **{n: inputs[n] for n in names},
        num_single_tokens=single,
        num_tiles=num_tiles,
        lanes=Lanes(inputs["lanes"], inputs["lane_groups"], inputs["merged_tokens"], inputs["counts"][6])
        if lanes
        else None,
    )


def to_blocked(pool: Pool) -> Pool:
    """A plain pool, [N, 2, K, B, D], as the blocked implementation keeps it on a CPU."""
    if isinstance(pool, QuantizedPool):
        return QuantizedPool(to_blocked(pool.values), pool.scales)  # type: ignore[arg-type]
    N, _, K, B, D = pool.shape
    struct = pool_struct("blocked", PoolShape(N, K, B, D, pool.dtype), "cpu")
    struct = getattr(struct, "values", struct)
    stored = reinterpret(pool, struct.dtype)  # type: ignore[union-attr]
    keys, values = stored[:, 0].swapaxes(-1, -2).reshape(N, K, B * D), stored[:, 1].reshape(N, K, B * D)
    return jnp.stack([keys, values], axis=1)


def run_both(
    rows: list[tuple[int, int]],
    bucket: int,
    heads: tuple[int, int, int],
    window: int | None,
    dtype: str,
    kv: str | None = None,
    block_size: int = BLOCK_SIZE,
    max_model_len: int = MAX_MODEL_LEN,
) -> tuple[np.ndarray, np.ndarray, int]:
    """(ours, reference, number of real tokens), with a pool of dtype `kv` in the form that the CPU keeps."""
    H, K, D = heads
    rng = np.random.RandomState(0)
    plan = make_plan(rows, rng, block_size)
    metadata = metadata_of(plan, bucket, block_size, max_model_len, lanes=window is None)
    context = np.zeros((NUM_BLOCKS, 2, K, block_size, D), np.float32)
    for row in plan.rows:
        for position in range(row.sequence.num_computed_tokens):
            block = row.sequence.block_table[position // block_size]
            context[block, :, :, position % block_size] = rng.randn(2, K, D)
    element = jnp.dtype(kv or dtype)
    pool = jnp.asarray(context, element)
    if element.itemsize == 1:
        pool = QuantizedPool(*reference.quantize_kv(jnp.asarray(context), element))
    q = jnp.asarray(rng.randn(bucket, H, D), dtype)
    k, v = (jnp.asarray(rng.randn(bucket, K, D), dtype) for _ in range(2))
    expected_pool = reference.write_kv(pool, k, v, metadata.slot_mapping)
    expected = reference.paged_attention(q, expected_pool, metadata, scale=0.2, sliding_window=window)
    out, new_pool = paged_attention(q, k, v, to_blocked(pool), metadata, scale=0.2, sliding_window=window)
    for ours, theirs in zip(
        jax.tree.leaves(new_pool), jax.tree.leaves(to_blocked(expected_pool)), strict=True
    ):
        # what was written is what the reference writes, but for the null block
        np.testing.assert_array_equal(np.asarray(ours[1:]), np.asarray(theirs[1:]))
    return np.asarray(out, np.float32), np.asarray(expected, np.float32), plan.num_tokens


CASES = {
    "decode": ([(3, 1), (130, 1), (0, 1), (255, 1)], 8),
    "small chunks in a small bucket": ([(0, 9), (17, 1), (40, 13)], 32),
    "one prompt": ([(0, 200)], 256),
    "chunk behind a context": ([(300, 150)], 256),
    "mixed": ([(99, 1), (33, 1), (0, 70), (150, 65), (7, 3)], 256),
    "more decoding than one group": ([(7 * i % 90, 1) for i in range(41)], 64),
    "no whole number of large groups": ([(7 * i % 90, 1) for i in range(41)], 48),
    "four tiles at a time and two": ([(600, 130), (1030, 66), (511, 40)], 256),
    "two tiles at a time and one": ([(520, 66), (513, 50)], 128),
    "one tile behind a long context": ([(1100, 60)], 64),
    "one stream far ahead of the others": ([(5 * i, 1) for i in range(15)] + [(1233, 1)], 16),
    "three streams far ahead, in two groups": (
        [(620, 1), (560, 1), *((i % 15, 1) for i in range(37)), (600, 1)],
        64,
    ),
    "few over lanes to spare": ([(900, 1), (350, 1), (20, 1)], 8),
    "few over lanes to spare, beside a prompt": ([(600, 1), (700, 1), (130, 70)], 128),
    "one stream far ahead, beside a prompt": ([(1233, 1), (40, 1), (3, 1), (0, 70)], 128),
}


@pytest.mark.parametrize("window", [None, pytest.param(5, marks=SWEEP), 100])
@pytest.mark.parametrize(("rows", "bucket"), CASES.values(), ids=CASES.keys())
def test_equals_the_reference_in_float32(
    rows: list[tuple[int, int]], bucket: int, window: int | None
) -> None:
    ours, expected, n = run_both(rows, bucket, (6, 2, 16), window, "float32")
    np.testing.assert_allclose(ours[:n], expected[:n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param((4, 4, 16), marks=SWEEP),
        pytest.param((8, 1, 32), marks=SWEEP),
        (16, 8, 16),  # more kv heads than independent parts
        pytest.param((9, 3, 64), marks=SWEEP),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [pytest.param("mixed", marks=SWEEP), "four tiles at a time and two"])
def test_every_grouping_of_heads(case: str, heads: tuple[int, int, int]) -> None:
    rows, bucket = CASES[case]
    ours, expected, n = run_both(rows, bucket, heads, None, "float32")
    np.testing.assert_allclose(ours[:n], expected[:n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "kv", "tolerance"),
    [
        ("bfloat16", "bfloat16", 2e-2),
        pytest.param("bfloat16", "float16", 1e-2, marks=SWEEP),  # computed in float32
        pytest.param("float16", "float16", 5e-3, marks=SWEEP),
        pytest.param("float32", "bfloat16", 1e-5, marks=SWEEP),
        ("float32", "int8", 1e-5),
        pytest.param("float32", "float8_e4m3fn", 1e-5, marks=SWEEP),
        pytest.param("bfloat16", "int8", 2e-2, marks=SWEEP),
        ("bfloat16", "float8_e4m3fn", 2e-2),
    ],
)
@pytest.mark.parametrize(
    "case", ["decode", "two tiles at a time and one", pytest.param("mixed", marks=SWEEP)]
)
def test_every_dtype_of_the_pool(case: str, dtype: str, kv: str, tolerance: float) -> None:
    """Against the reference with an equally rounded pool, so that only attention itself is compared."""
    rows, bucket = CASES[case]
    ours, expected, n = run_both(rows, bucket, (6, 2, 16), None, dtype, kv)
    np.testing.assert_allclose(ours[:n], expected[:n], rtol=tolerance, atol=tolerance)


@pytest.mark.heavy
@pytest.mark.parametrize("block_size", [8, 24, 512, *(pytest.param(n, marks=SWEEP) for n in (64, 128, 256))])
@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_every_block_size(block_size: int, kv: str) -> None:
    """Also those that do not divide the chunks of a context or are larger; the last chunk begins with a table's last
    block, and tables may be shorter than a chunk."""
    rows = [(99, 1), (511, 1), (0, 70), (447, 65), (7, 3)]
    ours, expected, n = run_both(rows, 256, (6, 2, 16), None, "float32", kv, block_size, max_model_len=512)
    np.testing.assert_allclose(ours[:n], expected[:n], rtol=1e-5, atol=1e-6)


@pytest.mark.heavy
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 370), st.integers(1, 128)), min_size=1, max_size=4),
    st.sampled_from([None, 1, 33, 128]),
)
def test_any_batch(rows: list[tuple[int, int]], window: int | None) -> None:
    bucket = 512 if sum(n for _, n in rows) > 64 else 64
    ours, expected, n = run_both(rows, bucket, (4, 2, 8), window, "float32")
    np.testing.assert_allclose(ours[:n], expected[:n], rtol=1e-5, atol=1e-6)


def chunks_taken(lanes: np.ndarray, size: int) -> int:
    """How long the groups take."""
    return int(sum(-(-lanes[i : i + size, 2].max() // GROUP_CHUNK) for i in range(0, len(lanes), size)))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 9000) | st.integers(1, 300), min_size=1, max_size=64),
    st.sampled_from([16, 64, 256]),
)
@example([4000] * 9 + [128] * 23, 64)  # one more than may be split
@example(([4000] * 5 + [128] * 27) * 2, 64)  # five in one group, and three left for the other
def test_lanes_cover_each_context_once_and_take_no_longer_than_one_for_each(
    lens: list[int], block_size: int
) -> None:
    batch = next(size for size in (1, 8, 16, 32, 64, 128, 256) if size >= len(lens))
    size = group_size(batch)
    lanes, groups, merged = plan_lanes(
        np.array(lens, np.int32), batch, block_size=block_size, max_blocks=9000 // block_size + 1
    )
    assert len(lanes) == size * len(groups) <= max_lanes(batch)
    assert len(groups) <= max_groups(batch)
    parts: dict[int, list[tuple[int, int]]] = {}
    for token, block, length in lanes.tolist():
        assert 0 <= token < batch
        assert block * block_size < max(1, lens[token] if token < len(lens) else 0)
        if length:
            parts.setdefault(token, []).append((block * block_size, block * block_size + length))
    for token, length in enumerate(lens):
        ends = [0, *(end for _, end in parts[token])]
        assert ends[-1] == length
        assert [start for start, _ in parts[token]] == ends[:-1]
    assert sorted(merged.tolist()) == sorted(token for token, own in parts.items() if len(own) > 1)
    assert len(merged) <= MAX_SPLITS
    assert [i for _, begin, end in groups.tolist() for i in range(begin, end)] == list(range(len(merged)))
    for g, (first, begin, end) in enumerate(groups.tolist()):
        own_lanes = lanes[g * size : (g + 1) * size]
        for token in merged[begin:end].tolist():
            assert np.sum((own_lanes[:, 0] == token) & (own_lanes[:, 2] > 0)) == len(parts[token])
        if first < batch:  # results are where they belong, but for parts, and what lies behind the tokens
            at = np.arange(first, first + size)
            assert np.all((own_lanes[:, 0] == at) | (at >= len(lens)))
    whole = np.zeros((-(-len(lens) // size) * size, 3), np.int32)
    whole[: len(lens), 2] = lens
    if block_size <= GROUP_CHUNK:
        assert chunks_taken(lanes, size) + MERGE_COST * len(merged) <= chunks_taken(whole, size)


def test_a_long_context_does_not_hold_up_short_ones() -> None:
    lens = np.array([400] * 15 + [7900], np.int32)
    lanes, groups, merged = plan_lanes(lens, 16, block_size=64, max_blocks=128)
    assert groups.tolist() == [[0, 0, 0], [16, 0, 1]]
    assert merged.tolist() == [15]
    assert chunks_taken(lanes, 16) == 7 + 8  # instead of 124


@pytest.mark.parametrize(("lens", "chunks"), [([1000] * 2, 4), ([1000] * 4, 8), ([7900, 400], 18)], ids=str)
def test_few_tokens_are_attended_over_lanes_that_are_to_spare(lens: list[int], chunks: int) -> None:
    lanes, groups, _ = plan_lanes(np.array(lens, np.int32), 8, block_size=64, max_blocks=128)
    assert len(groups) == 1
    assert chunks_taken(lanes, 8) == chunks


@pytest.mark.parametrize(("polynomial", "tolerance"), [(EXP2_16_BITS, 4e-6), (EXP2_32_BITS, 2e-7)])
def test_powers_of_two_are_as_exact_as_promised(polynomial: tuple[float, ...], tolerance: float) -> None:
    """Compiled, since XLA would simplify some ways to split a number into whole and rest."""
    x = np.linspace(-126, 0, 100_001, dtype=np.float32)
    np.testing.assert_allclose(jax.jit(exp2, static_argnums=1)(x, polynomial), np.exp2(x), rtol=tolerance)
    ends = jnp.asarray([0.0, -127.0, -1e30, np.nan])
    np.testing.assert_array_equal(exp2(ends, polynomial), [1, 0, 0, np.nan])


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit: longer contexts beside it only add chunks that are masked out."""
    alone, _, _ = run_both([(37, 1)], 8, (6, 2, 16), None, "float32")
    rng = np.random.RandomState(0)
    crowd = make_plan([(37, 1), (300, 1), (129, 1)], rng)
    single = metadata_of(crowd, 8)
    pool = to_blocked(jnp.asarray(rng.randn(NUM_BLOCKS, 2, 2, BLOCK_SIZE, 16), jnp.float32))
    q, k, v = (jnp.asarray(rng.randn(8, h, 16), jnp.float32) for h in (6, 2, 2))
    together, _ = paged_attention(q, k, v, pool, single, scale=0.2)
    crowd.rows = crowd.rows[:1]
    only, _ = paged_attention(q, k, v, pool, metadata_of(crowd, 8), scale=0.2)
    np.testing.assert_array_equal(np.asarray(together[0]), np.asarray(only[0]))
    assert np.isfinite(alone).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_stays_in_its_row(dtype: str) -> None:
    """In tiles as well, which write past their row's end and read past its last token."""
    rng = np.random.RandomState(0)
    plan = make_plan([(100, 70), (20, 40), (600, 30)], rng)
    q, k, v = (rng.randn(256, heads, 16).astype(np.float32) for heads in (6, 2, 2))
    q[7] = v[100] = np.nan  # one token of the first row, and what those behind it in the second see
    pool = to_blocked(jnp.asarray(rng.randn(NUM_BLOCKS, 2, 2, BLOCK_SIZE, 16), dtype))
    arrays = (jnp.asarray(x, dtype) for x in (q, k, v))
    out, _ = paged_attention(*arrays, pool, metadata_of(plan, 256), scale=0.2)
    (with_nan,) = np.isnan(np.asarray(out[: plan.num_tokens], np.float32)).any((1, 2)).nonzero()
    assert 7 in with_nan
    assert set(range(100, 110)) <= set(with_nan) <= {7, *range(70, 110)}


def test_nan_stays_in_its_row_where_lanes_of_several_are_put_together() -> None:
    rng = np.random.RandomState(0)
    plan = make_plan([(900, 1), (800, 1), (3, 1)], rng)
    q, k, v = (rng.randn(8, heads, 16).astype(np.float32) for heads in (6, 2, 2))
    pool = to_blocked(jnp.asarray(rng.randn(NUM_BLOCKS, 2, 2, BLOCK_SIZE, 16), jnp.float32))

    def attend() -> np.ndarray:
        metadata = metadata_of(plan, 8, lanes=True)
        assert metadata.lanes is not None
        assert np.asarray(metadata.lanes.groups)[0].tolist() == [0, 0, 2]
        return np.asarray(paged_attention(*map(jnp.asarray, (q, k, v)), pool, metadata, scale=0.2)[0])

    expected = attend()
    q[0] = np.nan
    out = attend()
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1:3], expected[1:3])


def test_nan_stays_in_its_row_where_a_lane_takes_as_long_as_longer_ones() -> None:
    """The second half of the first row's context is in a lane beside longer ones, at the end of its table."""
    block_size, num_blocks = 64, 24
    rng = np.random.RandomState(0)
    rows = [(num_blocks * block_size - 1, 1)] + [((num_blocks - 1) * block_size - 1, 1)] * 6
    plan = make_plan(rows, rng, block_size)
    metadata = metadata_of(plan, 8, block_size, num_blocks * block_size, lanes=True)
    assert metadata.lanes is not None
    assert np.asarray(metadata.lanes.lanes)[7].tolist() == [0, 12, 12 * block_size]
    pool = rng.randn(NUM_BLOCKS, 2, 2, block_size, 16).astype(np.float32)
    pool[list(plan.rows[1].sequence.block_table[:4])] = np.nan
    q, k, v = (jnp.asarray(rng.randn(8, heads, 16), jnp.float32) for heads in (6, 2, 2))
    out, _ = paged_attention(q, k, v, to_blocked(jnp.asarray(pool)), metadata, scale=0.2)
    assert np.isnan(np.asarray(out[:7])).any((1, 2)).nonzero()[0].tolist() == [1]


# -- which implementation ---------------------------------------------------------------------------------------


def request(
    *, layout: str = "plain", dtype: str = "bfloat16", num_tokens: int = 16, soft_cap: float | None = None
) -> Request:
    """Shapes only, of a small model with 2 kv heads of 64 lanes and blocks of 16 tokens."""

    def struct(*shape: int, dtype: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    pool = {
        "plain": struct(8, 2, 2, 16, 64),
        "tpu": struct(*pallas_tpu_layout.pool_shape(8, 2, 16, 64)),
        "blocked": struct(8, 2, 2, 16 * 64),
        "unscaled": struct(8, 2, 2, 16 * 64, dtype="int8"),
    }[layout]
    metadata = AttentionMetadata(*[struct(4, 8, dtype="int32")] * 9)
    kv = struct(num_tokens, 2, 64)
    return Request(struct(num_tokens, 4, 64), kv, kv, pool, metadata, 1.0, None, soft_cap, False)


@pytest.mark.parametrize(
    ("layout", "platform", "expected"),
    [
        ("blocked", "cpu", "blocked"),
        ("plain", "gpu", "pallas_triton"),
        ("tpu", "tpu", "pallas_tpu"),
        ("blocked", "tpu", "blocked"),
    ],
)
def test_auto_takes_what_the_platform_prefers(layout: str, platform: str, expected: str) -> None:
    assert choose_backend(request(layout=layout), "auto", platform) == expected


def serving(head_dim: int = 64, num_heads: int = 4, block_size: int = 16) -> ServingShape:
    pool = PoolShape(8, 2, block_size, head_dim, jnp.dtype("bfloat16"))
    return ServingShape(256, 8, 4, num_heads, jnp.dtype("bfloat16"), pool)


def test_a_model_is_served_by_what_can_do_it_in_its_own_layout() -> None:
    assert backend_for(serving(), "auto", "tpu") == "pallas_tpu"
    assert backend_for(serving(head_dim=512), "auto", "tpu") == "blocked"
    assert backend_for(serving(), "auto", "gpu") == "pallas_triton"
    assert backend_for(serving(), "auto", "cpu") == "blocked"
    with pytest.raises(ValueError, match="pallas_tpu does not fit: block_size 8 is not one of 16"):
        backend_for(serving(block_size=8), "pallas_tpu", "tpu")


def test_what_would_be_faster_says_why_it_was_passed_over() -> None:
    assert passed_over(serving(), "pallas_tpu", "tpu") == {}
    assert passed_over(serving(), "blocked", "cpu") == {}
    (reason,) = passed_over(serving(head_dim=512), "blocked", "tpu").items()
    assert reason[0] == "pallas_tpu"
    assert "head_dim 512" in reason[1]
    assert list(passed_over(serving(block_size=8), "blocked", "gpu")) == ["pallas_triton"]


def test_pools_have_their_backends_layout() -> None:
    shape = PoolShape(8, 2, 16, 64, jnp.dtype("bfloat16"))
    blocked = pool_struct("blocked", shape, "cpu")
    assert (blocked.shape, blocked.dtype) == ((8, 2, 2, 1024), jnp.uint16)  # type: ignore[union-attr]
    plain = pool_struct("pallas_triton", shape, "gpu")
    assert (plain.shape, plain.dtype) == ((8, 2, 2, 16, 64), jnp.bfloat16)  # type: ignore[union-attr]
    assert pool_struct("blocked", shape, "gpu").dtype == jnp.bfloat16  # type: ignore[union-attr]
    quantized = pool_struct("pallas_tpu", shape._replace(dtype=jnp.dtype("int8")), "tpu")
    assert [x.shape for x in quantized] == [(8, 2, 16, 128), (8, 2, 2, 128)]  # type: ignore[union-attr]


def test_none_fits_and_every_backend_says_why() -> None:
    with pytest.raises(ValueError, match="No attention backend fits on cpu") as error:
        choose_backend(request(soft_cap=30.0), "auto", "cpu")
    assert "pallas_tpu: it runs on TPU, this is cpu" in str(error.value)
    assert "pallas_triton: it runs on GPU, this is cpu" in str(error.value)
    assert "blocked: it has no soft cap" in str(error.value)
    assert "reference: it is taken only where it is asked for" in str(error.value)


@pytest.mark.parametrize(
    ("backend", "changes", "platform", "reason"),
    [
        ("pallas_tpu", {}, "cpu", "it runs on TPU, this is cpu"),
        ("pallas_tpu", {}, "tpu", r"it must be \[N, K, B, 2 · lanes\]"),
        ("pallas_tpu", {"layout": "tpu", "dtype": "float16"}, "tpu", "queries are float16"),
        ("pallas_triton", {}, "cpu", "it runs on GPU, this is cpu"),
        ("pallas_triton", {"layout": "tpu"}, "gpu", r"it must be \[N, 2, K, B, 64\]"),
        ("mosaic_gpu", {}, "cpu", "it runs on GPU, this is cpu"),
        ("mosaic_gpu", {"layout": "tpu"}, "gpu", r"it must be \[N, 2, K, B, 64\]"),
        ("mosaic_gpu", {"dtype": "float32"}, "gpu", "wgmma takes both in bfloat16 or both in float16"),
        ("blocked", {"layout": "unscaled"}, "cpu", "a pool of int8 needs scales"),
        (
            "blocked",
            {"layout": "blocked", "num_tokens": 17},
            "cpu",
            "17 tokens are neither at most 16 nor a multiple of it",
        ),
        ("blocked", {"layout": "tpu"}, "tpu", r"it must be \[N, 2, 2, B · 64\]"),
        ("reference", {"layout": "tpu"}, "tpu", r"it must be \[N, 2, 2, B, 64\]"),
        (
            "fast",
            {},
            "cpu",
            "There is no attention backend 'fast': use auto or pallas_tpu, pallas_triton, mosaic_gpu",
        ),
    ],
)
def test_a_named_backend_that_does_not_fit_is_refused(
    backend: str, changes: dict[str, object], platform: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        choose_backend(request(**changes), backend, platform)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_can_be_asked_for(dtype: str) -> None:
    """Bits of a bfloat16 pool included, and with what only it has."""
    rng = np.random.RandomState(0)
    metadata = metadata_of(make_plan([(3, 1), (20, 7)], rng), 16)
    q, k, v = (jnp.asarray(rng.randn(16, h, 16), dtype) for h in (4, 2, 2))
    pool = jnp.asarray(rng.randn(NUM_BLOCKS, 2, 2, BLOCK_SIZE, 16), dtype)
    stored = jax.lax.bitcast_convert_type(pool, jnp.uint16) if dtype == "bfloat16" else pool
    out, after = paged_attention(q, k, v, stored, metadata, scale=0.2, soft_cap=1.5, backend="reference")
    expected_pool = reference.write_kv(pool, k, v, metadata.slot_mapping)
    expected = reference.paged_attention(q, expected_pool, metadata, scale=0.2, soft_cap=1.5)
    assert after.dtype == stored.dtype
    np.testing.assert_allclose(
        np.asarray(out[:8], np.float32), np.asarray(expected[:8], np.float32), rtol=1e-2, atol=1e-2
    )


def test_a_soft_cap_bounds_the_scores() -> None:
    """One visible token weighs at most e^(2 · cap) times another, however large the scores are."""
    rng = np.random.RandomState(0)
    metadata = metadata_of(make_plan([(1, 1)], rng), 8)
    pool = jnp.zeros((NUM_BLOCKS, 2, 1, BLOCK_SIZE, 4))
    block = int(metadata.block_tables[0, 0])
    pool = pool.at[block, 0, 0, 0].set(100.0).at[block, 1, 0, 0].set(1.0)  # the other token: K = V = 0
    q = jnp.full((8, 1, 4), 100.0)
    out = reference.paged_attention(q, pool, metadata, scale=1.0, soft_cap=2.0)
    np.testing.assert_allclose(out[0], 1 / (1 + np.exp(-2.0)), rtol=1e-6)


def test_a_shape_finds_its_inputs_in_a_larger_shapes_layout() -> None:
    rng = np.random.RandomState(3)
    small, large = StepShape(64, 8, 20), StepShape(128, 16, 20, prompt_logprobs=True)
    plan = make_plan([(5, 1), (0, 1), (3, 40)], rng)
    own = small.unpack(pack_step(plan, StepProgram((small,)), small, BLOCK_SIZE))
    program = StepProgram((small, large))
    for shape in program.shapes:
        buffer = pack_step(plan, program, shape, BLOCK_SIZE)
        assert large.unpack(buffer)["shape_index"] == program.shapes.index(shape)
        narrow = small.narrow(large.unpack(buffer))
        for name in own.keys() - {"shape_index"}:
            np.testing.assert_array_equal(narrow[name], own[name], name)


def test_blocks_are_copied_in_order_and_only_as_many_as_asked() -> None:
    tokens = jnp.arange(6).reshape(6, 1)
    kv = jnp.stack([tokens + 10.0 * layer for layer in range(2)])
    pools = Pools(kv=kv, tokens=tokens, sampled=jnp.zeros(1, jnp.int32))
    copies = np.array([BlockCopy(1, 2), BlockCopy(2, 3), BlockCopy(4, 5)], np.int32)
    copied = copy_blocks(pools, jnp.asarray(copies), jnp.int32(2))
    assert copied.kv[:, :, 0].tolist() == [[0, 1, 1, 1, 4, 5], [10, 11, 11, 11, 14, 15]]
    assert copied.tokens[:, 0].tolist() == [0, 1, 1, 1, 4, 5]

"""The sampler against plain numpy, and its promises: greedy, masks, seeds, independence of the batch."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import sampler
from jaxserve.logits_processors import ProcessorInputs, SlotTables
from jaxserve.sampler import SampleOutputs, SamplingInputs, sample
from jaxserve.sharding import TensorParallel, VocabShard

Array = np.ndarray
SWEEP = pytest.mark.sweep


def inputs_for(rows: int, **values: Any) -> SamplingInputs:
    """Neutral sampling inputs; each value is a scalar or one per row."""
    neutral: dict[str, tuple[Any, Any]] = {
        "temperature": (1.0, jnp.float32),
        "top_p": (1.0, jnp.float32),
        "min_p": (0.0, jnp.float32),
        "top_k": (0, jnp.int32),
        "seed_low": (0, jnp.uint32),
        "seed_high": (0, jnp.uint32),
        "choice": (0, jnp.int32),
        "position": (0, jnp.int32),
        "num_logprobs": (-1, jnp.int32),
        "num_candidates": (0, jnp.int32),
    }
    fields = {
        name: jnp.broadcast_to(jnp.asarray(values.get(name, default), dtype), (rows,))
        for name, (default, dtype) in neutral.items()
    }
    return SamplingInputs(**fields, processors=no_processors(rows))


def no_processors(rows: int) -> ProcessorInputs:
    """Nothing is changed in any row."""
    zeros, floats = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.float32)
    return ProcessorInputs(
        rows=zeros,
        num_rows=jnp.int32(0),
        slot=zeros,
        num_biases=zeros,
        prompt_len=zeros,
        num_counted=zeros,
        repetition=floats,
        frequency=floats,
        presence=floats,
        normalize=zeros > 0,
        block_tables=jnp.zeros((rows, 1), jnp.int32),
        token_pool=jnp.zeros((1, 8), jnp.int32),
        tables=SlotTables(
            bias_ids=jnp.zeros((1, 64), jnp.int32),
            bias_values=jnp.zeros((1, 64)),
            masks=jnp.full((1, 200), 0xFFFFFFFF, jnp.uint32),
        ),
    )


@partial(jax.jit, static_argnames=("vocab", "max_logprobs", "processed_logprobs"))
def jitted_sample(
    logits: jax.Array, inputs: SamplingInputs, num_rows: jax.Array | None = None, **settings: Any
) -> SampleOutputs:
    """With all rows in use, as on accelerators, or only the first `num_rows`, as on a CPU."""
    return sample(logits, len(logits) if num_rows is None else num_rows, lambda: inputs, **settings)


PADDED = (1, 16, 64, 72, 400)  # numbers of rows: few, because compiling the sampler is most of the time here


def run(logits: Array, inputs: SamplingInputs, *, max_logprobs: int = 5, processed: bool = False) -> Any:
    rows = len(logits)
    more = next((size - rows for size in PADDED if size >= rows), 0)
    if more:
        together = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), inputs[:-1], inputs_for(more)[:-1])
        inputs = SamplingInputs(*together, processors=no_processors(rows + more))
    out = jitted_sample(
        jnp.pad(jnp.asarray(logits, jnp.float32), ((0, more), (0, 0))),
        inputs,
        vocab=VocabShard(logits.shape[-1]),
        max_logprobs=max_logprobs,
        processed_logprobs=processed,
    )
    return unpack(jax.tree.map(lambda x: np.asarray(x)[:rows], out), max_logprobs)


class Sampled(NamedTuple):
    """SampleOutputs, field by field."""

    token_ids: Array
    logprobs: Array
    ranks: Array
    top_ids: Array
    top_logprobs: Array


def unpack(out: SampleOutputs, max_logprobs: int) -> Sampled:
    logprobs, ranks, top_ids, top_logprobs = np.split(out.logprobs, [1, 2, 2 + max_logprobs], axis=1)
    floats = np.float32
    return Sampled(
        out.token_ids, logprobs[:, 0].view(floats), ranks[:, 0], top_ids, top_logprobs.view(floats)
    )


def allowed_tokens(logits: Array, *, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The set that may be drawn, by sorting: the definition."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    p = np.exp(scaled[order] - scaled[order[0]])
    p /= p.sum()
    size = int(np.searchsorted(np.cumsum(p), top_p, side="left")) + 1 if top_p < 1.0 else len(order)
    order, p = order[:size], p[:size]
    return {int(t) for t, q in zip(order, p, strict=True) if q >= min_p * p[0]}


@partial(jax.jit, static_argnames="vocab")
def kept(scaled: jax.Array, inputs: SamplingInputs, vocab: VocabShard) -> jax.Array:
    """[S, V] bool: what the filters leave."""
    keep: jax.Array = sampler._filtered(scaled, scaled, sampler._filters(inputs, vocab), vocab, 1)[0]
    return keep


def drawn_tokens(logits: Array, num_draws: int, **values: Any) -> list[int]:
    """`num_draws` draws from one row's logits at successive positions."""
    inputs = inputs_for(num_draws, position=np.arange(num_draws), **values)
    return run(np.tile(logits, (num_draws, 1)), inputs).token_ids.tolist()


@pytest.mark.parametrize(
    ("rows", "processed"),
    [
        (16, False),
        pytest.param(24, False, marks=SWEEP),
        pytest.param(40, False, marks=SWEEP),
        pytest.param(40, True, marks=pytest.mark.heavy),
    ],
)
@pytest.mark.parametrize("used", [0, 1, 8, 9, 16, 24])
def test_rows_that_are_not_in_use_change_nothing(rows: int, used: int, processed: bool) -> None:
    """They are skipped, whatever they hold; those in use give what they give where all are computed."""
    used = min(used, rows)
    rng = np.random.RandomState(rows + used)
    logits = rng.randn(48, 200) * 3
    logits[used:] = np.nan
    settings: dict[str, Any] = {"top_p": 0.8, "top_k": 20, "seed_low": np.arange(rows), "num_logprobs": 2}
    inputs = inputs_for(rows, temperature=np.arange(rows) % 3 * 0.5, **settings)
    changed = np.flatnonzero(np.arange(rows) % 7 == 2)
    changed = changed[changed < used]
    inputs = inputs._replace(
        top_k=jnp.where(jnp.arange(rows) < used, inputs.top_k, 0),
        top_p=jnp.where(jnp.arange(rows) < used, inputs.top_p, 1.0),
        processors=inputs.processors._replace(
            rows=jnp.zeros(rows, jnp.int32).at[: len(changed)].set(changed),
            num_rows=jnp.int32(len(changed)),
            slot=jnp.ones(rows, jnp.int32),
            num_biases=jnp.ones(rows, jnp.int32),
            repetition=jnp.ones(rows),
            tables=SlotTables(
                bias_ids=jnp.full((2, 64), 123, jnp.int32),
                bias_values=jnp.full((2, 64), 1e3),
                masks=jnp.full((2, 7), 0xFFFFFFFF, jnp.uint32),
            ),
        ),
    )
    fixed = {"vocab": VocabShard(200), "max_logprobs": 5, "processed_logprobs": processed}
    some = jitted_sample(jnp.asarray(logits, jnp.float32), inputs, jnp.int32(used), **fixed)
    all_of_them = jitted_sample(jnp.nan_to_num(jnp.asarray(logits[:rows], jnp.float32)), inputs, **fixed)
    for name, a, b in zip(some._fields, some, all_of_them, strict=True):
        np.testing.assert_array_equal(a[:used], b[:used], name)
    assert set(changed) <= set(np.flatnonzero(np.asarray(some.token_ids) == 123))


def test_greedy_takes_the_lowest_id_on_a_tie_and_ignores_the_filters() -> None:
    logits = np.zeros((3, 300))
    logits[0, [7, 3, 250]] = 5.0
    logits[1, 299] = 1.0
    out = run(logits, inputs_for(3, temperature=0.0, top_p=0.1, top_k=1, min_p=1.0))
    assert out.token_ids.tolist() == [3, 299, 0]


@pytest.mark.parametrize("vocab_size", [200, 5000])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.3},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"top_k": 50, "top_p": 0.5},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.1},
        {"top_k": 4000, "top_p": 0.99},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_draws_only_and_all_of_the_allowed_tokens(
    vocab_size: int, filters: dict[str, float], temperature: float
) -> None:
    logits = np.random.RandomState(1).randn(vocab_size) * 2
    settings: Any = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    allowed = allowed_tokens(logits, temperature=temperature, **settings)
    drawn = set(drawn_tokens(logits, 400, temperature=temperature, **settings))
    assert drawn <= allowed
    if len(allowed) <= 8:
        assert drawn == allowed
    scaled = jnp.asarray(logits[None] / temperature, jnp.float32)
    keep = kept(scaled, inputs_for(1, temperature=temperature, **settings), VocabShard(vocab_size))
    assert set(np.flatnonzero(np.asarray(keep)[0]).tolist()) == allowed


def test_top_k_one_equals_greedy_with_ties() -> None:
    logits = np.round(np.random.RandomState(2).randn(64, 300))  # many equal maxima
    greedy = run(logits, inputs_for(64, temperature=0.0)).token_ids
    single = run(logits, inputs_for(64, temperature=1.5, top_k=1, position=np.arange(64))).token_ids
    assert single.tolist() == greedy.tolist()


def test_draws_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    counts = np.bincount(drawn_tokens(logits, 40_000), minlength=4) / 40_000
    np.testing.assert_allclose(counts, [0.5, 0.25, 0.125, 0.125], atol=0.01)  # four standard errors


def test_a_draw_depends_on_seed_choice_and_position_only() -> None:
    rng = np.random.RandomState(3)
    rows = rng.randn(16, 300)
    keys: Any = {
        "seed_low": rng.randint(0, 2**31, 16),
        "choice": np.arange(16),
        "position": rng.randint(0, 999, 16),
    }
    together = run(rows, inputs_for(16, **keys)).token_ids
    alone = [
        run(rows[i : i + 1], inputs_for(1, **{k: v[i] for k, v in keys.items()})).token_ids[0]
        for i in range(16)
    ]
    assert together.tolist() == alone
    shuffled = rng.permutation(16)
    again = run(rows[shuffled], inputs_for(16, **{k: v[shuffled] for k, v in keys.items()})).token_ids
    assert again.tolist() == together[shuffled].tolist()


@pytest.mark.heavy
def test_a_row_that_the_candidates_do_not_cover_changes_nothing_for_the_others() -> None:
    rng = np.random.RandomState(4)
    peaked, flat = rng.randn(3000) * 5, rng.randn(3000) * 0.01
    alone = run(peaked[None], inputs_for(1, top_p=0.9, position=11)).token_ids[0]
    top_p = np.array([0.9, 0.99])
    both = run(np.stack([peaked, flat]), inputs_for(2, top_p=top_p, position=np.array([11, 12]))).token_ids
    assert both[0] == alone


def test_different_seeds_choices_and_positions_give_different_draws() -> None:
    flat = np.zeros(300)
    for field in ("seed_low", "seed_high", "choice", "position"):
        values = {field: np.arange(50)}
        tokens = run(np.tile(flat, (50, 1)), inputs_for(50, **values)).token_ids
        assert len(set(tokens.tolist())) > 35, field  # 46 are to be expected


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    rng = np.random.RandomState(5)
    logits = rng.randn(2, 300)
    out = run(logits, inputs_for(2, temperature=0.7, top_k=3, num_logprobs=4))
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row in range(2):
        token = out.token_ids[row]
        assert out.logprobs[row] == pytest.approx(expected[row, token], abs=1e-5)
        assert out.ranks[row] == 1 + (logits[row] > logits[row, token]).sum()
        order = np.argsort(-logits[row])[:5]
        assert out.top_ids[row].tolist() == order.tolist()
        np.testing.assert_allclose(out.top_logprobs[row], expected[row, order], atol=1e-5)


def test_processed_logprobs_are_those_of_the_distribution_that_was_sampled_from() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    out = run(logits, inputs_for(1, temperature=0.5, top_k=2, num_logprobs=4), max_logprobs=4, processed=True)
    p = np.array([0.25, 0.09]) / 0.34
    np.testing.assert_allclose(np.exp(out.top_logprobs[0, :2]), p, atol=1e-5)
    assert np.isneginf(out.top_logprobs[0, 2:]).all()
    assert np.exp(out.logprobs[0]) == pytest.approx(p[out.token_ids[0]], abs=1e-5)


@pytest.mark.parametrize("V", [640, 1000, 1024])
def test_the_few_largest_are_those_of_a_stable_sort_whatever_their_ties_and_groups(V: int) -> None:
    k = 4
    rows = np.random.default_rng(V).integers(0, 9, (16, V)).astype(np.float32)  # full of ties
    rows[0] = -np.inf
    rows[1] = -np.inf
    rows[1, [V - 1, V - 3]] = 1.0
    rows[2, 128 * np.arange(1, k + 1)] = 10.0  # each in a group of its own
    rows[3, 300:304] = 10.0  # all in one
    values, ids = jax.jit(sampler.top_few, static_argnums=1)(jnp.asarray(rows), k)
    expected = np.argsort(-rows, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(rows, expected, axis=-1))


def test_more_logprobs_than_tokens_are_padded() -> None:
    out = run(np.zeros((1, 3)), inputs_for(1, num_logprobs=5))
    assert out.top_ids.shape == (1, 5)
    assert np.isneginf(out.top_logprobs[0, 3:]).all()


@pytest.mark.parametrize("value", [-1e30, -3.5, -0.0, 0.0, 1e-20, 7.0, 3e38])
def test_sortable_integers_keep_the_order_of_floats(value: float) -> None:
    around = np.array([-np.inf, value, np.inf], np.float32)
    keys = np.asarray(sampler._sortable(jnp.asarray(around)))
    assert keys[0] < keys[1] < keys[2]


@pytest.mark.sweep
def test_more_rows_than_are_sampled_at_a_time_are_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.RandomState(6)
    rows, vocab_size = 72, 1100  # in groups of 8, of 16 and of 72
    logits = rng.randn(rows, vocab_size) * 3
    values: Any = {
        "temperature": rng.choice([0.0, 0.7, 1.3], rows),
        "top_k": rng.choice([0, 5, 40], rows),
        "top_p": rng.choice([1.0, 0.8], rows),
        "position": np.arange(rows),
        "num_logprobs": rng.choice([-1, 3], rows),
    }
    in_groups = run(logits, inputs_for(rows, **values), processed=True)
    first = run(logits[:64], inputs_for(64, **{k: v[:64] for k, v in values.items()}), processed=True)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:64], b), in_groups, first)
    monkeypatch.setattr(sampler, "ROW_GROUP", rows)
    jax.clear_caches()
    at_once = run(logits, inputs_for(rows, **values), processed=True)
    jax.tree.map(np.testing.assert_array_equal, in_groups, at_once)


@pytest.mark.parametrize(("num_devices", "expected"), [(1, 16), (4, 64), (8, 128)])
def test_several_devices_take_more_rows_at_a_time(num_devices: int, expected: int) -> None:
    sizes = []

    def note(rows: Any) -> jax.Array:
        sizes.append(rows.size)
        return jnp.zeros((rows.size, 1))

    sampler._by_row_groups(note, 256, 256, VocabShard(1000, TensorParallel(num_devices)))
    assert set(sizes) == {expected}


@pytest.mark.parametrize("vocab_size", [384, 385])
def test_the_likeliest_token_is_the_lowest_of_equals(vocab_size: int) -> None:
    """Whether or not the vocabulary divides into groups of neighbours."""
    rows = np.random.RandomState(0).randint(0, 4, (50, vocab_size)).astype(np.float32)
    rows[0] = -np.inf
    assert VocabShard(vocab_size).argmax(jnp.asarray(rows)).tolist() == rows.argmax(axis=-1).tolist()


@pytest.mark.parametrize("vocab_size", [100, 384, 385])
@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_the_likeliest_are_those_of_a_sort(vocab_size: int, count: int) -> None:
    """In its order, the lowest of equal ids first; nothing behind those that are wanted."""
    rows = np.random.RandomState(0).randint(0, 30, (20, vocab_size)).astype(np.float32)
    rows[1, 50:] = -np.inf
    values, ids = jax.jit(sampler.likeliest, static_argnums=1)(jnp.asarray(rows), 40, count=jnp.int32(count))
    expected = np.argsort(-rows, axis=-1, kind="stable")[:, :count]
    assert np.asarray(ids)[:, :count].tolist() == expected.tolist()
    assert np.asarray(values)[:, :count].tolist() == np.take_along_axis(rows, expected, axis=1).tolist()
    assert (np.asarray(values)[:, count:] == -np.inf).all()


def test_of_equal_tokens_the_lowest_ids_are_kept() -> None:
    """Where top-k or top-p cuts through equals."""
    logits = np.zeros(300)
    logits[[5, 200]] = 1.0
    assert set(drawn_tokens(logits, 200, top_k=4)) == {5, 200, 0, 1}
    mass = 2 * np.e / (2 * np.e + 298)
    assert set(drawn_tokens(logits, 200, top_p=mass + 2.5 / (2 * np.e + 298))) == {5, 200, 0, 1, 2}


@pytest.mark.parametrize("top_p", [1e-46, 1e-39, 1e-8])
def test_however_small_top_p_is_the_likeliest_token_is_left(top_p: float) -> None:
    logits = np.random.RandomState(0).randn(300)
    assert set(drawn_tokens(logits, 20, top_p=top_p)) == {int(logits.argmax())}


def test_zeros_of_either_sign_are_equal() -> None:
    logits = np.full(300, -1.0)
    logits[[3, 5]] = -0.0, 0.0
    assert set(drawn_tokens(logits, 20, top_k=1)) == {3}

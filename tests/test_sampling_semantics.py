"""What each sampling parameter means, proved through the model's own distribution.

The tiny model's whole vocabulary fits among the reported log-probabilities, so each test compares distributions and
not only tokens. The expected ones are computed here in numpy, from logits of the model without the sampler.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxserve.config import EngineConfig
from jaxserve.engine import Engine
from jaxserve.errors import RequestError
from jaxserve.llm import LLM
from jaxserve.messages import AddRequest, FinishReason, TopLogprobs
from jaxserve.model_runner import ModelRunner
from jaxserve.sampling_params import SamplingParams
from tests.tiny_beams import EOS, FIRST_CHARACTER, VOCAB_SIZE, write_beam_model

Array = np.ndarray
Request = tuple[list[int], SamplingParams]
REFERENCE: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "tiny_beams.json").read_text("utf-8")
)
PROMPTS = [
    [random.Random(i).randrange(FIRST_CHARACTER, VOCAB_SIZE) for _ in range(1 + 5 * i)] for i in range(8)
]
IMPOSSIBLE = -1e30  # anything below is −inf, however it is written


# --- running ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beam_model(tmp_path_factory.mktemp("tiny") / "model")


def options(mode: str) -> dict[str, Any]:
    return {
        "dtype": "float32",
        "max_num_seqs": 32,
        "max_num_batched_tokens": 32,
        "block_size": 8,
        "kv_cache_memory_bytes": 4 << 20,
        "max_logprobs": VOCAB_SIZE,
        "logprobs_mode": mode,
    }


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> LLM:
    return LLM(str(model_path), **options("raw"))


@pytest.fixture
def llm(loaded: LLM) -> LLM:
    """With an engine of its own: engines of one model runner overwrite what the other has cached."""
    loaded._engine = Engine(loaded.engine.model_runner, tokenizer=loaded.tokenizer)
    return loaded


def test_prompts_have_priorities_where_the_engine_has_them(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="needs --scheduling-policy priority"):
        llm.generate([[5], [6]], priority=[0, 1])
    with pytest.raises(ValueError, match="2 prompts, but 1 priorities"):
        llm.generate([[5], [6]], priority=[0])
    asked: list[int] = []
    monkeypatch.setattr(llm.engine, "add_request", lambda request: asked.append(request.priority))
    llm.generate([[5], [6]], priority=[3, -1])
    llm.generate([[5], [6]], priority=2)
    assert asked == [3, -1, 2, 2]


@pytest.fixture(scope="module")
def raw(loaded: LLM) -> ModelRunner:
    return loaded.engine.model_runner


@pytest.fixture(scope="module")
def processed(model_path: Path) -> ModelRunner:
    return ModelRunner(EngineConfig(model=str(model_path), **options("processed")))


@dataclass
class Choice:
    """One sequence as it came out of the engine."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TopLogprobs] = field(default_factory=list)
    end: tuple[FinishReason | None, int | str | None] = (None, None)


def generate(
    target: ModelRunner | Engine, requests: list[Request], *, eos: tuple[int, ...] = (EOS,), **limits: Any
) -> list[list[Choice]]:
    """All requests at once, in an engine of its own unless one is given; the choices of each."""
    engine = target if isinstance(target, Engine) else make_engine(target, **limits)
    num_compiled = engine.stats().xla_compilations
    results = [[Choice() for _ in range(params.num_sequences)] for _, params in requests]
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(
            AddRequest(request_id=str(i), prompt_token_ids=prompt, params=params, eos_token_ids=eos)
        )
    while engine.has_work:
        for output in engine.step().outputs:
            choice = results[int(output.request_id)][output.index]
            assert choice.end == (None, None)
            if output.prompt_logprobs:
                assert not choice.tokens
            choice.tokens += output.token_ids
            choice.logprobs += output.logprobs or []
            choice.prompt_logprobs += output.prompt_logprobs or []
            if output.finish_reason is not None:
                choice.end = (output.finish_reason, output.stop_reason)
    assert engine.block_manager.usage == 0.0
    assert engine.stats().xla_compilations == num_compiled
    return results


def make_engine(runner: ModelRunner, **limits: Any) -> Engine:
    return Engine(runner, replace(runner.limits, **limits))


def run_one(runner: ModelRunner, prompt: list[int], params: SamplingParams) -> Choice:
    """A single sequence."""
    return generate(runner, [(prompt, params)])[0][0]


def sampling(**values: Any) -> SamplingParams:
    """A dozen tokens that nothing ends, with the whole distribution reported."""
    defaults = {"max_tokens": 12, "logprobs": VOCAB_SIZE, "seed": 0, "ignore_eos": True}
    return SamplingParams(**(defaults | values))


def distribution(entry: TopLogprobs) -> Array:
    """[V] reported log-probabilities; −inf where a token is impossible."""
    values = np.full(VOCAB_SIZE, -np.inf)
    values[entry.top_ids] = entry.top_logprobs
    assert sorted(entry.top_ids) == list(range(VOCAB_SIZE))
    values[values < IMPOSSIBLE] = -np.inf
    return values


# --- the definition, in numpy -----------------------------------------------------------------------------------


def penalized(scores: Array, prompt: list[int], output: list[int], params: SamplingParams) -> Array:
    """Scores after bias, masks and penalties, in the contract's order."""
    scores = scores.astype(np.float64)
    for token_id, bias in params.logit_bias:
        scores[token_id] += bias
    impossible = np.zeros(len(scores), bool)
    if params.allowed_token_ids is not None:
        impossible[:] = True
        impossible[list(params.allowed_token_ids)] = False
    for *head, last in params.bad_words_token_ids:
        impossible[last] |= output[len(output) - len(head) :] == head
    if len(output) < params.min_tokens:
        impossible[[*([] if params.ignore_eos else [EOS]), *params.stop_token_ids]] = True
    scores[impossible] = -np.inf
    scores = repetition(scores, {*prompt, *output}, params.repetition_penalty)
    for token_id, count in Counter(output).items():
        scores[token_id] -= params.frequency_penalty * count + params.presence_penalty
    return scores


def repetition(scores: Array, seen: set[int], penalty: float) -> Array:
    factor = np.where(scores > 0, 1 / penalty, penalty)
    is_seen = np.isin(np.arange(len(scores)), list(seen))
    return np.where(is_seen, scores * factor, scores)


def filtered(scores: Array, params: SamplingParams) -> tuple[Array, float]:
    """Log-probabilities after temperature, top-k, top-p and min-p; and how far, in mass, a token that is kept or
    dropped is from being the other: below float32's error the sets may differ. (The likeliest is always kept.)"""
    scaled = scores / params.temperature
    order = np.argsort(-scaled, kind="stable")
    keep = np.isfinite(scaled)
    if 0 < params.top_k < len(scaled):
        keep[order[params.top_k :]] = False
    p = softmax(np.where(keep, scaled, -np.inf))
    margin = 1.0
    if params.top_p < 1.0:
        mass_before = np.cumsum(p[order]) - p[order]
        keep[order[mass_before >= params.top_p]] = False
        margin = float(np.abs(mass_before[1:] - params.top_p).min())
    if params.min_p > 0.0:
        keep &= p >= params.min_p * p.max()
        margin = min(margin, float(np.abs(p[order[1:]] / p.max() - params.min_p).min()))
    with np.errstate(divide="ignore"):
        return np.log(softmax(np.where(keep, scaled, -np.inf))), margin


def softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def log_softmax(scores: Array) -> Array:
    scores = scores.astype(np.float64)
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


def logits_of(runner: ModelRunner, prompt: list[int], output: list[int]) -> Array:
    """[len(output), V] logits that each output token was chosen from, without the sampler."""
    return runner.prompt_logits(prompt + output)[len(prompt) - 1 : -1]


def expected_distributions(
    runner: ModelRunner, prompt: list[int], output: list[int], params: SamplingParams
) -> list[tuple[Array, float]]:
    logits = logits_of(runner, prompt, output)
    return [
        filtered(penalized(row, prompt, output[:i], params), params) for i, row in enumerate(logits)
    ]  # fmt: skip


def assert_distributions_match(runner: ModelRunner, requests: list[Request]) -> int:
    """Generates for all of them in one batch; every reported distribution is the expected one, every token is
    possible. Returns how many distributions had both possible and impossible tokens."""
    num_cut = num_ties = total = 0
    for (prompt, params), choices in zip(requests, generate(runner, requests), strict=True):
        for choice in choices:
            assert len(choice.tokens) == len(choice.logprobs)
            expected = expected_distributions(runner, prompt, choice.tokens, params)
            for token, entry, (logprobs, margin) in zip(
                choice.tokens, choice.logprobs, expected, strict=True
            ):
                total += 1
                if margin < 1e-5:
                    num_ties += 1
                    continue
                found = distribution(entry)
                assert np.flatnonzero(np.isfinite(found)).tolist() == (
                    np.flatnonzero(np.isfinite(logprobs)).tolist()
                ), params
                possible = np.isfinite(logprobs)
                np.testing.assert_allclose(
                    found[possible], logprobs[possible], atol=2e-4, err_msg=str(params)
                )
                assert possible[token]
                assert entry.logprob == pytest.approx(found[token], abs=1e-6)
                assert entry.rank == 1 + int((found > found[token] + 1e-7).sum())
                num_cut += not possible.all()
    assert num_ties <= total // 50
    return num_cut


# --- filters ------------------------------------------------------------------------------------------------------


def test_raw_logprobs_are_the_models_whatever_is_asked(raw: ModelRunner) -> None:
    params = sampling(
        temperature=0.6,
        top_k=5,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        logit_bias=((7, 3.0),),
        min_tokens=12,
        allowed_token_ids=tuple(range(3, 30)),
    )
    for (prompt, _), (choice,) in zip(
        [(p, params) for p in PROMPTS], generate(raw, [(p, params) for p in PROMPTS]), strict=True
    ):
        logprobs = log_softmax(logits_of(raw, prompt, choice.tokens))
        for row, token, entry in zip(logprobs, choice.tokens, choice.logprobs, strict=True):
            np.testing.assert_allclose(distribution(entry), row, atol=1e-4, rtol=1e-5)
            assert entry.logprob == pytest.approx(row[token], abs=1e-4)
            assert entry.rank == 1 + int((row > row[token]).sum())


@pytest.mark.heavy
def test_both_modes_draw_the_same(raw: ModelRunner, processed: ModelRunner) -> None:
    requests = mixed_requests(32)
    tokens = [[[c.tokens for c in choices] for choices in generate(r, requests)] for r in (raw, processed)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_top_k_of_one_equals_greedy(raw: ModelRunner, temperature: float) -> None:
    greedy = generate(raw, [(p, sampling(temperature=0.0, max_tokens=24)) for p in PROMPTS])
    single = generate(
        raw, [(p, sampling(temperature=temperature, top_k=1, max_tokens=24, seed=5)) for p in PROMPTS]
    )
    assert [c.tokens for (c,) in single] == [c.tokens for (c,) in greedy]
    for prompt, (choice,) in zip(PROMPTS, greedy, strict=True):
        assert choice.tokens == logits_of(raw, prompt, choice.tokens).argmax(axis=-1).tolist()


def test_a_tiny_temperature_is_greedy_and_its_filters_are_idle(raw: ModelRunner) -> None:
    greedy = generate(raw, [(p, sampling(temperature=0.0)) for p in PROMPTS])
    other = generate(raw, [(p, sampling(temperature=9e-6, top_p=0.1, top_k=3, min_p=0.9)) for p in PROMPTS])
    assert [c.tokens for (c,) in other] == [c.tokens for (c,) in greedy]


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.4},
        {"temperature": 1.9},
        {"top_k": 3},
        {"top_k": VOCAB_SIZE - 1},
        {"top_p": 0.2},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.02},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.7},
        {"temperature": 0.7, "top_p": 0.95, "min_p": 0.05},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_filters_keep_exactly_the_set_of_their_definition(
    processed: ModelRunner, filters: dict[str, Any]
) -> None:
    requests = [(prompt, sampling(seed=seed, **filters)) for prompt in PROMPTS for seed in range(2)]
    num_cut = assert_distributions_match(processed, requests)
    assert (num_cut > 0) == bool({"top_k", "top_p", "min_p"} & set(filters))


def test_filters_that_are_off_keep_everything(processed: ModelRunner) -> None:
    for off in ({"top_k": 0}, {"top_k": -1}, {"top_k": VOCAB_SIZE}, {"top_k": 10**9}, {"top_p": 1.0}):
        assert assert_distributions_match(processed, [(PROMPTS[3], sampling(**off))]) == 0


# --- bias, masks, penalties -------------------------------------------------------------------------------------

BIAS = ((5, 2.5), (9, -100.0), (EOS, 1.5), (39, -0.75))
CHANGES: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.3},
    "presence below zero": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.8},
    "frequency below zero": {"frequency_penalty": -0.4},
    "repetition": {"repetition_penalty": 1.4},
    "repetition below one": {"repetition_penalty": 0.6},
    "strong repetition": {"repetition_penalty": 50.0},
    "all penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    "bias": {"logit_bias": BIAS},
    "bias before repetition": {"logit_bias": BIAS, "repetition_penalty": 1.7},
    "allowed": {"allowed_token_ids": (4, 7, 9, 20, 21, 33)},
    "allowed and penalties": {"allowed_token_ids": (4, 7, 9), "frequency_penalty": 1.0},
    "bad words": {"bad_words_token_ids": ((5,), (8, 8), (11, 12, 13), (20, 21))},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": (7, 12), "ignore_eos": False},
    "min_tokens and ignore_eos": {"min_tokens": 6, "stop_token_ids": (7, 12)},
    "everything": {
        "logit_bias": BIAS,
        "allowed_token_ids": (*range(0, 40, 2), 5, 7, 9, 39),
        "bad_words_token_ids": ((8,), (4, 4)),
        "min_tokens": 4,
        "stop_token_ids": (10,),
        "ignore_eos": False,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.6,
        "temperature": 1.2,
        "top_k": 15,
        "top_p": 0.97,
        "min_p": 0.01,
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_scores_change_by_the_formula(processed: ModelRunner, change: str) -> None:
    values = {"temperature": 1.5} | CHANGES[change]
    requests = [(prompt, sampling(seed=seed, **values)) for prompt in PROMPTS for seed in range(2)]
    assert_distributions_match(processed, requests)


def test_all_changes_side_by_side_in_one_batch(processed: ModelRunner) -> None:
    """Rows with and without each change, so that one that leaks into its neighbours is found."""
    requests = [
        (PROMPTS[i % 8], sampling(seed=i, **({"temperature": 0.9} | values)))
        for i, values in enumerate([*CHANGES.values(), {}, *CHANGES.values(), {}])
    ]
    assert assert_distributions_match(processed, requests) > 50


def test_only_the_repetition_penalty_looks_at_the_prompt(processed: ModelRunner) -> None:
    prompt = PROMPTS[4]
    neutral = distribution(run_one(processed, prompt, sampling(max_tokens=1)).logprobs[0])
    for name in ("presence_penalty", "frequency_penalty"):
        entry = run_one(processed, prompt, sampling(max_tokens=1, **{name: 2.0})).logprobs[0]
        np.testing.assert_allclose(distribution(entry), neutral, atol=1e-6)
    entry = run_one(processed, prompt, sampling(max_tokens=1, repetition_penalty=1.5)).logprobs[0]
    shift = distribution(entry) - neutral
    unseen = sorted(set(range(VOCAB_SIZE)) - set(prompt))
    np.testing.assert_allclose(shift[unseen], shift[unseen[0]], atol=1e-4)
    assert (np.abs(shift[sorted(set(prompt))] - shift[unseen[0]]) > 1e-3).mean() > 0.9


@pytest.mark.parametrize("row", REFERENCE["repetition_penalty"], ids=lambda row: str(row["penalty"]))
def test_the_repetition_formula_is_that_of_transformers(row: dict[str, Any]) -> None:
    """Of the definition above, which the engine is compared with."""
    found = repetition(np.array(row["scores"]), set(row["ids"]), row["penalty"])
    np.testing.assert_allclose(found, row["expected"], atol=1e-5)


def test_the_definition_is_that_of_transformers_processors(raw: ModelRunner) -> None:
    """Of all of them together: its likeliest tokens are those that transformers' greedy search takes."""
    for case in REFERENCE["greedy"]:
        params = msgspec.convert(case["params"], SamplingParams)
        prompt, output = case["prompt"], case["sequences"][0]
        rows = logits_of(raw, prompt, output)
        likeliest = [int(penalized(row, prompt, output[:i], params).argmax()) for i, row in enumerate(rows)]
        assert "tie" in case or likeliest == output, case["params"]


def test_greedy_search_under_processors_is_that_of_transformers(raw: ModelRunner) -> None:
    cases = [case for case in REFERENCE["greedy"] if "tie" not in case and "stop" not in case["params"]]
    assert len(cases) > 80
    requests = [(case["prompt"], msgspec.convert(case["params"], SamplingParams)) for case in cases]
    for case, (choice,) in zip(cases, generate(raw, requests), strict=True):
        assert choice.tokens == case["sequences"][0], case["params"]
        assert list(choice.end) == case["ends"][0], case["params"]


ONE_TOKEN_SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1e-4},
    {"temperature": 2.0, "top_k": 3, "top_p": 1e-6, "min_p": 1.0},
    {"logit_bias": ((7, -100.0), (8, 100.0))},
    {"repetition_penalty": 50.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    {"repetition_penalty": 1e-3, "presence_penalty": -2.0, "frequency_penalty": -2.0},
]


@pytest.mark.parametrize("values", ONE_TOKEN_SETTINGS, ids=str)
def test_the_only_token_that_a_mask_leaves_is_certain(processed: ModelRunner, values: dict[str, Any]) -> None:
    params = sampling(allowed_token_ids=(7,), **(values | {"logprobs": 1}))
    choice = run_one(processed, [3, 4, 5], params)
    assert choice.tokens == [7] * 12
    assert {(top.logprob, top.top_ids[0], top.top_logprobs[0]) for top in choice.logprobs} == {(0.0, 7, 0.0)}


def test_a_bias_of_100_decides_and_one_of_minus_100_forbids(raw: ModelRunner) -> None:
    always = run_one(raw, PROMPTS[2], sampling(logit_bias=((17, 100.0),), temperature=2.0))
    assert always.tokens == [17] * 12
    favourites = Counter(t for (c,) in generate(raw, [(p, sampling()) for p in PROMPTS]) for t in c.tokens)
    banned = tuple((token, -100.0) for token, _ in favourites.most_common(10))
    choices = generate(raw, [(p, sampling(logit_bias=banned, seed=s)) for p in PROMPTS for s in range(4)])
    assert not {t for (c,) in choices for t in c.tokens} & {t for t, _ in banned}


def test_a_thousand_biases_or_bad_words_are_not_too_many(processed: ModelRunner) -> None:
    biases = tuple((i % VOCAB_SIZE, 0.01 * (i % 7)) for i in range(VOCAB_SIZE))
    words = tuple((3 + i % 37, 3 + i // 37) for i in range(512))
    request = (PROMPTS[3], sampling(logit_bias=biases, bad_words_token_ids=words, max_tokens=6))
    assert assert_distributions_match(processed, [request]) > 0


def test_bad_words_are_never_completed_but_their_beginnings_are_fine(raw: ModelRunner) -> None:
    free = [c.tokens for (c,) in generate(raw, [(p, sampling(temperature=0.0)) for p in PROMPTS])]
    for prompt, tokens in zip(PROMPTS, free, strict=True):
        for length in (1, 2, 3, 5):
            word = tuple(tokens[4 : 4 + length])
            params = sampling(temperature=0.0, bad_words_token_ids=(word,))
            other = run_one(raw, prompt, params).tokens
            assert not contains(other, word)
            first = next(i for i in range(12) if contains(tokens[: i + 1], word))
            assert other[:first] == tokens[:first]  # nothing changes before its last token
            assert other[first] != tokens[first]


def contains(tokens: list[int], word: tuple[int, ...]) -> bool:
    return any(tuple(tokens[i : i + len(word)]) == word for i in range(len(tokens)))


# --- ends -----------------------------------------------------------------------------------------------------

WANTS_EOS = ((EOS, 100.0),)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_before_min_tokens(raw: ModelRunner, temperature: float) -> None:
    for min_tokens in (0, 1, 5, 11):
        params = sampling(
            temperature=temperature, logit_bias=WANTS_EOS, min_tokens=min_tokens, ignore_eos=False
        )
        choice = run_one(raw, PROMPTS[1], params)
        assert len(choice.tokens) == min_tokens + 1
        assert EOS not in choice.tokens[:-1]
        assert choice.end == ("stop", None)


def test_min_tokens_masks_stop_ids_too(raw: ModelRunner) -> None:
    params = sampling(stop_token_ids=(30,), logit_bias=((30, 100.0),), min_tokens=4, ignore_eos=False)
    choice = run_one(raw, PROMPTS[1], params)
    assert len(choice.tokens) == 5
    assert not {30, EOS} & set(choice.tokens[:-1])
    assert choice.end == ("stop", 30)


def test_min_tokens_of_max_tokens_never_ends_early(raw: ModelRunner) -> None:
    params = sampling(logit_bias=WANTS_EOS, min_tokens=12, ignore_eos=False)
    choice = run_one(raw, PROMPTS[0], params)
    assert choice.end == ("length", None)
    assert EOS not in choice.tokens


def test_ignore_eos_neither_stops_nor_masks(raw: ModelRunner) -> None:
    choice = run_one(raw, PROMPTS[1], sampling(logit_bias=WANTS_EOS, min_tokens=6))
    assert choice.tokens == [EOS] * 12
    assert choice.end == ("length", None)


@pytest.mark.parametrize(
    ("stop_token_ids", "ignore_eos", "end"),
    [
        ((), False, ("stop", None)),
        ((EOS,), False, ("stop", None)),  # an end of sequence comes first
        ((EOS,), True, ("stop", EOS)),
        ((30,), True, ("length", None)),
    ],
)
def test_which_end_it_is(
    raw: ModelRunner, stop_token_ids: tuple[int, ...], ignore_eos: bool, end: tuple[str, int | None]
) -> None:
    params = sampling(
        logit_bias=WANTS_EOS, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos, max_tokens=3
    )
    choice = run_one(raw, PROMPTS[1], params)
    assert choice.end == end
    assert len(choice.tokens) == (3 if end[0] == "length" else 1)


def test_several_end_of_sequence_ids(raw: ModelRunner) -> None:
    for token_id in (EOS, 17):
        params = sampling(logit_bias=((token_id, 100.0),), ignore_eos=False, min_tokens=2)
        ((choice,),) = generate(raw, [(PROMPTS[1], params)], eos=(EOS, 17))
        assert len(choice.tokens) == 3
        assert not {EOS, 17} & set(choice.tokens[:2])
        assert choice.end == ("stop", None)


# --- what does not matter ----------------------------------------------------------------------------------------


def mixed_requests(count: int) -> list[Request]:
    """Everything that sampling has, in every combination that chance gives."""
    rng = random.Random(11)
    requests: list[Request] = []
    for _ in range(count):
        values: dict[str, Any] = {"temperature": rng.choice([0.0, 0.7, 1.0, 1.5])}
        for name in rng.sample(sorted(CHANGES), rng.choice([0, 1, 1, 2])):
            values |= CHANGES[name]
        if "allowed_token_ids" in values and "bad_words_token_ids" in values:
            del values["bad_words_token_ids"]
        for name, value in (("top_k", 9), ("top_p", 0.8), ("min_p", 0.05)):
            if rng.random() < 0.3:
                values[name] = value
        prompt = PROMPTS[rng.randrange(8)] + [
            rng.randrange(FIRST_CHARACTER, VOCAB_SIZE) for _ in range(rng.randrange(1, 20))
        ]
        params = sampling(
            **{
                "n": rng.choice([1, 1, 1, 2, 3]),
                "seed": rng.randrange(-(2**63), 2**63),
                "logprobs": rng.choice([None, 0, 3, VOCAB_SIZE]),
                "prompt_logprobs": rng.choice([None, None, 0, 4]),
                **values,
                "max_tokens": rng.randrange(8, 16),
            }
        )
        requests.append((prompt, params))
    return requests


def assert_same(found: list[list[Choice]], expected: list[list[Choice]]) -> None:
    """Tokens and ends equal, log-probabilities up to rounding."""
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.tokens, a.end) == (b.tokens, b.end)
            for one, other in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
                assert len(one) == len(other)
                np.testing.assert_allclose(
                    [x.logprob for x in one], [x.logprob for x in other], atol=1e-4, rtol=1e-5
                )
                for x, y in zip(one, other, strict=True):
                    assert len(x.top_ids) == len(y.top_ids)
                    np.testing.assert_allclose(x.top_logprobs, y.top_logprobs, atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def alone(processed: ModelRunner) -> list[list[Choice]]:
    """Each of the mixed requests on its own, in an engine that remembers nothing."""
    return [generate(processed, [request], enable_prefix_caching=False)[0] for request in mixed_requests(64)]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 5},
        {"max_num_batched_tokens": 17},
        {"enable_prefix_caching": False},
        {"max_model_len": 96, "num_blocks": 14},
        {"max_model_len": 96, "num_blocks": 14, "max_num_batched_tokens": 7, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_everything_in_one_batch_equals_each_alone(
    processed: ModelRunner, alone: list[list[Choice]], limits: dict[str, Any]
) -> None:
    engine = make_engine(processed, **limits)
    assert_same(generate(engine, mixed_requests(64)), alone)
    if "num_blocks" in limits:
        assert engine.scheduler.num_preemptions > 0


def test_a_second_time_with_everything_cached_equals_the_first(
    processed: ModelRunner, alone: list[list[Choice]]
) -> None:
    engine = make_engine(processed)
    for _ in range(2):
        assert_same(generate(engine, mixed_requests(64)), alone)
    assert engine.block_manager.num_hit_tokens > 0


def test_thirty_two_of_one_seed_draw_the_same(raw: ModelRunner) -> None:
    params = sampling(temperature=1.5, repetition_penalty=1.2, frequency_penalty=0.3, seed=99)
    expected = run_one(raw, PROMPTS[3], params).tokens
    together = generate(raw, [(PROMPTS[3], params)] * 32)
    assert [c.tokens for (c,) in together] == [expected] * 32


def test_a_choice_is_the_same_whatever_n_is(raw: ModelRunner) -> None:
    def choices(n: int) -> list[list[int]]:
        params = sampling(n=n, temperature=1.3, repetition_penalty=1.3, presence_penalty=0.4, min_tokens=3)
        return [c.tokens for c in generate(raw, [(PROMPTS[4], params)])[0]]

    five = choices(5)
    assert choices(3) == five[:3]
    assert len({tuple(tokens) for tokens in five}) == 5


def test_prompts_of_one_seed_use_the_same_streams_and_seeds_differ(raw: ModelRunner) -> None:
    flat = sampling(temperature=2.0, allowed_token_ids=(4,), seed=3)
    assert run_one(raw, PROMPTS[0], flat).tokens == [4] * 12
    draws = {
        tuple(run_one(raw, PROMPTS[3], sampling(seed=seed)).tokens)
        for seed in (0, 1, -2, 2**63 - 1, -(2**63))
    }
    assert len(draws) == 5


# --- prompt logprobs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["raw", "processed"])
@pytest.mark.parametrize("k", [0, 1, 5, VOCAB_SIZE])
def test_prompt_logprobs_are_the_models_own(request: pytest.FixtureRequest, mode: str, k: int) -> None:
    runner: ModelRunner = request.getfixturevalue(mode)
    params = sampling(
        prompt_logprobs=k, temperature=0.5, repetition_penalty=2.0, logit_bias=((4, 5.0),), max_tokens=2
    )
    for prompt in PROMPTS:
        assert_prompt_logprobs(runner, prompt, run_one(runner, prompt, params).prompt_logprobs, k)


def assert_prompt_logprobs(
    runner: ModelRunner, prompt: list[int], entries: list[TopLogprobs], k: int
) -> None:
    assert len(entries) == len(prompt) - 1
    for row, token, entry in zip(
        log_softmax(runner.prompt_logits(prompt)), prompt[1:], entries, strict=False
    ):
        order = np.argsort(-row, kind="stable")[:k]
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        assert entry.rank == 1 + int((row > row[token]).sum())
        assert entry.top_ids == order.tolist()
        np.testing.assert_allclose(entry.top_logprobs, row[order], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 3, 8, 32])
def test_prompt_logprobs_do_not_depend_on_chunks_cache_or_batch(raw: ModelRunner, budget: int) -> None:
    requests = [(p, sampling(prompt_logprobs=3, max_tokens=3, n=1 + i % 2)) for i, p in enumerate(PROMPTS)]
    engine = make_engine(raw, max_num_batched_tokens=budget)
    rounds = [generate(engine, requests) for _ in range(2)]  # the second one finds its prompts in the cache
    for results in rounds:
        for (prompt, _), choices in zip(requests, results, strict=True):
            assert_prompt_logprobs(raw, prompt, choices[0].prompt_logprobs, 3)
            assert all(not c.prompt_logprobs for c in choices[1:])
    assert_same(rounds[1], rounds[0])


def test_prompt_logprobs_survive_preemption(raw: ModelRunner) -> None:
    requests = [(p, sampling(prompt_logprobs=2, max_tokens=30, n=2)) for p in PROMPTS]
    engine = make_engine(raw, max_model_len=96, num_blocks=14)
    for (prompt, _), choices in zip(requests, generate(engine, requests), strict=True):
        assert_prompt_logprobs(raw, prompt, choices[0].prompt_logprobs, 2)
        assert [len(c.tokens) for c in choices] == [30, 30]
    assert engine.scheduler.num_preemptions > 0


def test_no_tokens_but_the_prompts_logprobs(raw: ModelRunner) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=4)
    for (choice,), prompt in zip(generate(raw, [(p, params) for p in PROMPTS]), PROMPTS, strict=True):
        assert choice.tokens == []
        assert choice.end == ("length", None)
        assert_prompt_logprobs(raw, prompt, choice.prompt_logprobs, 4)


# --- draws and candidates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1.0},
        {"temperature": 1.7, "repetition_penalty": 1.4, "logit_bias": BIAS},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 2.0, "bad_words_token_ids": ((5,), (7,)), "min_tokens": 1, "ignore_eos": False},
    ],
    ids=str,
)
def test_draws_have_the_computed_frequencies(raw: ModelRunner, values: dict[str, Any]) -> None:
    """2,000 first tokens, of as many (seed, choice); the chi-square test would reject one true run in 10,000."""
    prompt = PROMPTS[2]
    params = [sampling(n=125, max_tokens=1, logprobs=None, seed=seed, **values) for seed in range(16)]
    results = generate(raw, [(prompt, one) for one in params])
    counts = np.bincount([c.tokens[0] for choices in results for c in choices], minlength=VOCAB_SIZE)
    assert counts.sum() == 2000
    scores = penalized(raw.prompt_logits(prompt)[-1], prompt, [], params[0])
    expected = 2000 * np.exp(filtered(scores, params[0])[0])
    assert not counts[expected == 0].any()
    often = expected >= 5
    observed, expected = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
    used = expected > 0
    assert chisquare(observed[used], expected[used]).pvalue > 1e-4


def test_the_likeliest_of_several_candidates_come_best_first(llm: LLM) -> None:
    for prompt in PROMPTS[:4]:
        common: dict[str, Any] = {"seed": 5, "max_tokens": 10, "temperature": 1.4}
        (everything,) = llm.generate([prompt], SamplingParams(n=6, logprobs=0, **common))
        total = {tuple(o.token_ids): sum(e.logprob for e in o.logprobs) for o in everything.outputs}
        (best,) = llm.generate([prompt], SamplingParams(n=2, best_of=6, **common))
        assert [o.index for o in best.outputs] == [0, 1]
        ranked = sorted(total, key=lambda ids: -total[ids])
        assert [tuple(o.token_ids) for o in best.outputs] == ranked[:2]
        assert all(not o.logprobs for o in best.outputs)

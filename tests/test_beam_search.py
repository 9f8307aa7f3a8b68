"""Beam search against Hugging Face transformers, in float32; scripts/make_beam_reference.py made the values."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from jaxserve.engine import Engine
from jaxserve.errors import RequestError
from jaxserve.llm import LLM, CompletionOutput
from jaxserve.messages import AbortRequest, AddRequest, SequenceOutput
from jaxserve.sampling_params import SamplingParams
from tests.tiny_beams import CHARACTERS, EOS, FIRST_CHARACTER, write_beam_model

DATA = Path(__file__).parent / "data"
Case = dict[str, Any]
BEAMS: list[Case] = json.loads((DATA / "tiny_beams.json").read_text("utf-8"))["beams"]
DECIDED = [case for case in BEAMS if "tie" not in case]
CHANGE_SCORES = {"logit_bias", "repetition_penalty", "presence_penalty", "frequency_penalty"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(
        str(write_beam_model(tmp_path_factory.mktemp("tiny") / "model")),
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=32,
        block_size=8,
        kv_cache_memory_bytes=4 << 20,
    )


@pytest.fixture
def llm(loaded: LLM) -> LLM:
    """With an engine of its own: engines of one model runner overwrite what the other has cached."""
    loaded._engine = Engine(loaded.engine.model_runner, tokenizer=loaded.tokenizer)
    return loaded


def params_of(case: Case, **changes: Any) -> SamplingParams:
    """The case's parameters; it returns all that it searched for unless `n` says otherwise."""
    return msgspec.convert({"n": case["params"]["best_of"]} | case["params"] | changes, SamplingParams)


def check(case: Case, outputs: list[CompletionOutput], *, text: bool = True) -> None:
    """Ids, order, reasons, text and scores of the best `len(outputs)` hypotheses."""
    n = len(outputs)
    assert [o.token_ids for o in outputs] == case["sequences"][:n], case["params"]
    assert [o.index for o in outputs] == list(range(n))
    assert [[o.finish_reason, o.stop_reason] for o in outputs] == case["ends"][:n]
    if text:
        assert [o.text for o in outputs] == [text_of(o) for o in outputs]
    if outputs[0].logprobs and not CHANGE_SCORES & set(case["params"]):
        power = case["params"].get("length_penalty", 1.0)
        sums = [sum(entry.logprob for entry in o.logprobs) for o in outputs]
        scores = [total / len(o.token_ids) ** power for total, o in zip(sums, outputs, strict=True)]
        assert scores == pytest.approx(case["scores"][:n], rel=1e-4, abs=1e-4)


def text_of(output: CompletionOutput) -> str:
    """The tiny model's text: no special tokens, nothing of a stop token, cut before a stop string."""
    stopped_by_id = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
    ids = output.token_ids[:-1] if stopped_by_id else output.token_ids
    text = "".join(CHARACTERS[i - FIRST_CHARACTER] for i in ids if i >= FIRST_CHARACTER)
    return text.removesuffix(output.stop_reason) if isinstance(output.stop_reason, str) else text


def test_the_reference_covers_what_it_should() -> None:
    assert len(DECIDED) > 0.85 * len(BEAMS) > 200
    reasons = [tuple(end) for case in DECIDED for end in case["ends"]]
    assert min(reasons.count(("stop", None)), reasons.count(("length", None))) > 200
    assert {type(reason) for _, reason in reasons} == {type(None), int, str}
    found = [[case["sequences"] for case in BEAMS[i : i + 3]] for i in range(0, 120, 3)]
    assert sum(at_best != at_once for at_best, at_once, _ in found) > 5  # early_stopping False, True, "never"
    assert sum(at_best != never for at_best, _, never in found) > 3


def test_the_tiny_models_hypotheses_are_those_of_transformers_all_in_one_batch(llm: LLM) -> None:
    num_compiled = llm.engine.stats().xla_compilations
    params = [params_of(case, logprobs=0) for case in DECIDED]
    results = llm.generate([case["prompt"] for case in DECIDED], params)
    wrong = []
    for case, result in zip(DECIDED, results, strict=True):
        try:
            check(case, result.outputs)
        except AssertionError as error:
            wrong.append((case["params"], str(error)))
    assert not wrong, f"{len(wrong)} of {len(DECIDED)}, the first: {wrong[0]}"
    assert llm.engine.stats().xla_compilations == num_compiled
    assert llm.engine.block_manager.usage == 0.0


@pytest.mark.parametrize("case", DECIDED[::20], ids=lambda case: str(case["params"]))
@pytest.mark.parametrize("n", [1, 2])
def test_the_n_best_of_a_search_alone(llm: LLM, case: Case, n: int) -> None:
    (result,) = llm.generate([case["prompt"]], params_of(case, n=n))
    assert len(result.outputs) == n
    assert all(not o.logprobs for o in result.outputs)
    check(case, result.outputs)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_batched_tokens": 8},
        {"max_num_batched_tokens": 3},
        {"max_num_seqs": 8},
        {"enable_prefix_caching": False},
        {"num_blocks": 30},  # of 8 tokens: the widest search fits, but not two of them
    ],
    ids=str,
)
def test_small_budgets_and_preemption_change_nothing(llm: LLM, limits: dict[str, Any]) -> None:
    cases = [case for case in DECIDED if "stop" not in case["params"]][::6]
    engine = Engine(llm.engine.model_runner, replace(llm.engine.limits, max_model_len=96, **limits))
    for i, case in enumerate(cases):
        engine.add_request(request_of(case, str(i)))
    results = run_all(engine)
    for i, case in enumerate(cases):
        assert_results(case, results[str(i)])
    if "num_blocks" in limits:
        assert engine.scheduler.num_preemptions > 0


def test_sampling_beside_a_search_changes_neither(llm: LLM) -> None:
    cases = DECIDED[3::9]
    sampled = [
        SamplingParams(seed=i, max_tokens=14, temperature=1.2, repetition_penalty=1.2, ignore_eos=True, n=2)
        for i in range(len(cases))
    ]
    prompts = [case["prompt"] for case in cases]
    alone = [llm.generate([p], one)[0].outputs for p, one in zip(prompts, sampled, strict=True)]
    mixed_params = [one for pair in zip(map(params_of, cases), sampled, strict=True) for one in pair]
    results = llm.generate([p for p in prompts for _ in range(2)], mixed_params)
    for case, result in zip(cases, results[::2], strict=True):
        check(case, result.outputs)
    assert [[o.token_ids for o in r.outputs] for r in results[1::2]] == [
        [o.token_ids for o in outputs] for outputs in alone
    ]


def test_results_come_whole_best_first_and_every_step_is_consistent(llm: LLM) -> None:
    engine = Engine(llm.engine.model_runner, tokenizer=llm.tokenizer)
    cases = DECIDED[::30]
    for i, case in enumerate(cases):
        engine.add_request(request_of(case, str(i)))
    results = run_all(engine, check_integrity=True)
    for i, case in enumerate(cases):
        assert_results(case, results[str(i)])
        assert [o.index for o in results[str(i)]] == list(range(len(case["sequences"])))
    assert engine.block_manager.usage == 0.0


def test_top_logprobs_are_those_of_greedy_steps_through_the_same_tokens(llm: LLM) -> None:
    """Logprobs of a hypothesis equal the prompt's logprobs when it is fed back as a prompt."""
    case = next(c for c in DECIDED if c["params"]["best_of"] == 4 and len(c["sequences"][0]) == 16)
    (result,) = llm.generate([case["prompt"]], params_of(case, logprobs=5))
    for output in result.outputs:
        tokens = case["prompt"] + output.token_ids
        logits = llm.engine.model_runner.prompt_logits(tokens)
        for position, entry in enumerate(output.logprobs, start=len(case["prompt"])):
            row = logits[position - 1].astype(float)
            order = (-row).argsort()[:5]
            normalizer = float(np.logaddexp.reduce(row))
            assert entry.top_ids == order.tolist()
            assert entry.top_logprobs == pytest.approx((row[order] - normalizer).tolist(), abs=1e-4)
            token = output.token_ids[position - len(case["prompt"])]
            rank = 1 + int((row > row[token]).sum())
            assert entry.rank == (rank if token in entry.top_ids else None)
            assert entry.logprob == pytest.approx(row[tokens[position]] - normalizer, abs=1e-4)


def test_the_whole_vocabulary_may_be_narrower_than_the_search(llm: LLM) -> None:
    """Three tokens allowed and eight beams: what exists is returned, and nothing twice."""
    allowed = tuple(range(FIRST_CHARACTER, FIRST_CHARACTER + 3))
    params = SamplingParams(
        n=8, best_of=8, use_beam_search=True, temperature=0.0, max_tokens=4, allowed_token_ids=allowed
    )
    (result,) = llm.generate([[5, 6]], params)
    outputs = [tuple(o.token_ids) for o in result.outputs]
    assert len(set(outputs)) == 8
    assert all(set(ids) <= set(allowed) and len(ids) == 4 for ids in outputs)


def test_aborting_a_search_frees_everything(llm: LLM) -> None:
    engine = Engine(llm.engine.model_runner)
    case = next(c for c in DECIDED if c["params"]["best_of"] == 8 and len(c["sequences"][0]) == 16)
    for num_steps in (0, 1, 2, 5):
        engine.add_request(request_of(case, "r"))
        for _ in range(num_steps):
            engine.step()
        engine.abort_request(AbortRequest(request_id="r"))
        engine.scheduler.check_integrity()
        assert not engine.has_work
        assert engine.block_manager.usage == 0.0


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"best_of": 1, "n": 1}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"temperature": 0.5}, "temperature"),
        ({"use_beam_search": False, "length_penalty": 0.5}, "length_penalty"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping"),
        ({"use_beam_search": False, "early_stopping": "never"}, "early_stopping"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(changes: dict[str, Any], param: str) -> None:
    fields: dict[str, Any] = {"n": 2, "best_of": 2, "use_beam_search": True, "temperature": 0.0}
    with pytest.raises(RequestError) as refusal:
        SamplingParams(**(fields | changes))
    assert refusal.value.param == param


def request_of(case: Case, request_id: str) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        prompt_token_ids=case["prompt"],
        params=params_of(case),
        eos_token_ids=(EOS,),
    )


def run_all(engine: Engine, *, check_integrity: bool = False) -> dict[str, list[SequenceOutput]]:
    """Outputs with tokens, by request."""
    results: dict[str, list[SequenceOutput]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            if output.token_ids:
                results.setdefault(output.request_id, []).append(output)
        if check_integrity:
            engine.scheduler.check_integrity()
    return results


def assert_results(case: Case, outputs: list[SequenceOutput]) -> None:
    assert [o.token_ids for o in outputs] == case["sequences"], case["params"]
    assert [[o.finish_reason, o.stop_reason] for o in outputs] == case["ends"]


# --- demo model -----------------------------------------------------------------------------------------------


EVERY = 6  # of the demo model's cases one in so many, for time; all of them have been compared


@pytest.mark.sweep
@pytest.mark.model
def test_the_demo_models_hypotheses_are_those_of_transformers(demo_model_path: Path) -> None:
    """Ten prompts, widths of 2, 4 and 8, three length penalties, and some with something more: a cross-section."""
    rows: list[dict[str, Any]] = json.loads((DATA / "demo_beams.json").read_text("utf-8"))
    cases = [case | {"prompt": row["prompt"]} for row in rows for case in row["cases"]]
    decided = [case for case in cases if "tie" not in case]
    assert len(rows) == 10
    assert len(decided) > 0.85 * len(cases) > 80
    section = sorted(decided, key=lambda case: str(case["params"]))[::EVERY]
    widths_and_penalties = {
        (case["params"]["best_of"], case["params"].get("length_penalty", 1.0)) for case in section
    }
    assert len(widths_and_penalties & set(itertools.product((2, 4, 8), (0.6, 1.0, 1.5)))) == 9
    llm = LLM(
        str(demo_model_path),
        dtype="float32",
        max_model_len=128,
        max_num_seqs=64,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=512 << 20,
    )
    params = [params_of(case, logprobs=0) for case in section]
    results = llm.generate([case["prompt"] for case in section], params)
    for case, result in zip(section, results, strict=True):
        check(case, result.outputs, text=False)

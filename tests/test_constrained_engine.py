"""Constraints in the engine: the text is valid whatever else is asked for, and nobody else notices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from outlines import types
from pydantic import BaseModel, Field, TypeAdapter

from jaxserve import LLM, SamplingParams
from jaxserve.constraints.constraint import CompiledConstraint, Constraint
from jaxserve.engine import Engine
from jaxserve.errors import RequestError
from jaxserve.messages import AddRequest, SequenceOutput
from tests.conformance import all_cases
from tests.conformance import generate as generate_cases
from tests.tiny_llama import BASE

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
REGEX = r"[a-f]{3,6}-\d{2}"
CHOICES = ["positive", "negative", "neg"]


@pytest.fixture(scope="module")
def llm(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Random weights over the demo model's vocabulary: every token is about as likely as any other."""
    model = tmp_path_factory.mktemp("tiny")
    (model / "config.json").write_text(json.dumps(BASE | {"vocab_size": 49152}))
    options: dict[str, Any] = {"tokenizer": str(demo_model_path), "kv_cache_memory_bytes": 8 << 20}
    options |= {"load_format": "dummy", "compilation_cache": False}
    return LLM(str(model), max_num_seqs=16, max_num_batched_tokens=64, **options)


def compiled(llm: LLM, kind: Any, text: str) -> CompiledConstraint:
    return llm.engine.text_constraints.compiler(llm.eos_token_ids).compile(Constraint(kind=kind, text=text))


def generate(
    llm: LLM, engine: Engine, requests: dict[str, tuple[SamplingParams, CompiledConstraint | None]]
) -> dict[str, list[SequenceOutput]]:
    """All at once; every output in order."""
    outputs: dict[str, list[SequenceOutput]] = {name: [] for name in requests}
    for name, (params, constraint) in requests.items():
        engine.add_request(
            AddRequest(
                request_id=name,
                prompt_token_ids=[5, 6, 7, 8],
                params=params,
                eos_token_ids=llm.eos_token_ids,
                constraint=constraint,
            )
        )
    while engine.has_work:
        for output in engine.step().outputs:
            outputs[output.request_id].append(output)
        engine.scheduler.check_integrity()
    assert engine.block_manager.usage == 0.0
    return outputs


def texts(llm: LLM, outputs: list[SequenceOutput]) -> dict[int, str]:
    ids: dict[int, list[int]] = {}
    for output in outputs:
        ids.setdefault(output.index, []).extend(output.token_ids)
    return {index: llm.tokenizer.decode(tokens, skip_special_tokens=True) for index, tokens in ids.items()}


def is_valid(kind: str, text: str) -> bool:
    if kind == "regex":
        return re.fullmatch(REGEX, text) is not None
    if kind == "choice":
        return text in CHOICES
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


CONSTRAINTS = {"json_schema": json.dumps(SCHEMA), "regex": REGEX, "choice": json.dumps(CHOICES)}
FEATURES: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 1.0},
    "hot": {"temperature": 2.0, "repetition_penalty": 1.3, "frequency_penalty": 1.0},
    "greedy": {"temperature": 0.0},
    "narrow": {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
    "n": {"temperature": 1.0, "n": 3},
    "best of": {"temperature": 1.0, "n": 1, "best_of": 4},
    "beams": {"temperature": 0.0, "use_beam_search": True, "n": 3, "best_of": 3},
    "logprobs": {"temperature": 1.0, "logprobs": 5, "prompt_logprobs": 2},
    "min_tokens": {"temperature": 1.0, "min_tokens": 30},
    "biased": {"temperature": 1.0, "logit_bias": ((11, 100.0), (12, -100.0))},
}


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_the_text_is_valid_whatever_else_is_asked_for_all_in_one_batch(llm: LLM, kind: str) -> None:
    constraint = compiled(llm, kind, CONSTRAINTS[kind])
    requests = {
        f"{name}/{seed}": (SamplingParams(max_tokens=200, seed=seed, **features), constraint)
        for name, features in FEATURES.items()
        for seed in range(3)
    }
    for name, outputs in generate(llm, llm.engine, requests).items():
        params = requests[name][0]
        found = texts(llm, outputs)
        assert len(found) == (params.n if params.use_beam_search else params.num_sequences)
        ends = [o.finish_reason for o in outputs if o.finish_reason is not None]
        assert set(ends) == {"stop"}, name
        for text in found.values():
            assert is_valid(kind, text), (name, text)


def test_texts_of_every_tenth_conformance_case_satisfy_their_constraint(llm: LLM) -> None:
    """scripts/check_structured_output takes all of them."""
    cases = all_cases()[::10]
    outcomes = generate_cases(llm, cases, [[5, 6, 7, 8]] * len(cases), seeds=1, max_tokens=120)
    assert [
        (outcome.case.name, outcome.text, outcome.violation) for outcome in outcomes if outcome.violation
    ] == []
    assert sum(outcome.cut for outcome in outcomes) < len(cases) / 5


def test_the_unconstrained_get_the_same_beside_constrained_ones(llm: LLM) -> None:
    # a cool distribution: over 49,152 tokens that are about equally likely, the rounding of other batch sizes shows
    cool: Any = {"temperature": 0.05, "top_k": 20, "max_tokens": 40}
    free: Any = {f"free/{i}": (SamplingParams(seed=i, **cool), None) for i in range(6)}
    constraint = compiled(llm, "regex", REGEX)
    bound: Any = {f"bound/{i}": (SamplingParams(max_tokens=40, seed=i), constraint) for i in range(6)}
    alone = generate(llm, llm.engine, free)
    mixed = generate(llm, llm.engine, {**free, **bound})
    for name in free:
        assert texts(llm, mixed[name]) == texts(llm, alone[name])


def test_a_cut_text_is_a_prefix_of_a_valid_one(llm: LLM) -> None:
    constraint = compiled(llm, "choice", json.dumps(["aaaa bbbb cccc dddd eeee ffff gggg"]))
    (outputs,) = generate(
        llm, llm.engine, {"cut": (SamplingParams(max_tokens=3, seed=1), constraint)}
    ).values()
    assert outputs[-1].finish_reason == "length"
    assert "aaaa bbbb cccc dddd eeee ffff gggg".startswith(texts(llm, outputs)[0])


def test_preemption_and_small_budgets_change_nothing(llm: LLM) -> None:
    constraint = compiled(llm, "regex", r"(?:[a-z]\d){30,40}")
    requests: Any = {str(i): (SamplingParams(max_tokens=100, seed=i), constraint) for i in range(8)}
    wide = generate(llm, llm.engine, requests)
    runner = llm.engine.model_runner
    limits = replace(llm.engine.limits, num_blocks=9, max_model_len=128, max_num_batched_tokens=5)
    small = Engine(runner, limits, tokenizer=llm.tokenizer)
    narrow = generate(llm, small, requests)
    assert small.scheduler.num_preemptions > 0
    llm._engine = Engine(runner, tokenizer=llm.tokenizer)  # what the other wrote is not this one's cache
    for name in requests:
        assert texts(llm, narrow[name]) == texts(llm, wide[name])


def test_a_constraint_comes_before_min_tokens(llm: LLM) -> None:
    """The only token that fits would stop the sequence too early."""
    constraint = compiled(llm, "choice", json.dumps(["a"]))
    (a,) = llm.tokenizer.encode("a", add_special_tokens=False)
    params = SamplingParams(max_tokens=5, min_tokens=3, stop_token_ids=(a,), seed=1)
    (outputs,) = generate(llm, llm.engine, {"short": (params, constraint)}).values()
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", a)


def test_masks_that_leave_no_token_end_that_request_alone(llm: LLM) -> None:
    words = ((5,), (6,))
    banned = SamplingParams(max_tokens=5, allowed_token_ids=(5, 6), bad_words_token_ids=words, seed=1)
    free = SamplingParams(max_tokens=5, seed=1)
    outputs = generate(llm, llm.engine, {"bad": (banned, None), "good": (free, None)})
    assert outputs["bad"][-1].finish_reason == "error"
    assert outputs["good"][-1].finish_reason in ("length", "stop")


# --- constraints in Python ----------------------------------------------------------------------------------


class Person(BaseModel):
    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=99)


class Animal(BaseModel):
    kind: Literal["cat", "dog"]
    friend: Person | None


class Mood(Enum):
    GOOD = "good"
    BAD = "not good"


def is_person(text: str) -> bool:
    return set(Person.model_validate_json(text).model_dump()) == {"name", "age"}


ASKED: dict[str, tuple[Any, Callable[[str], object]]] = {
    "a choice": (types.Choice(["yes", "no"]), lambda text: text in ("yes", "no")),
    "a choice of numbers": (types.Choice([1, 2.5]), lambda text: text in ("1", "2.5")),
    "a literal": (Literal["a.c", "é😀"], lambda text: text in ("a.c", "é😀")),
    "an enum": (Mood, lambda text: Mood(text)),
    "a regex": (types.Regex("[a-c]{2}x"), re.compile("[a-c]{2}x").fullmatch),
    "terms": ("n=" + types.integer + (types.digit | "!"), re.compile(r"n=[+-]?(0|[1-9]\d*)(\d|!)").fullmatch),
    "a schema": (types.JsonSchema(SCHEMA), lambda text: is_valid("json_schema", text)),
    "a model": (Person, is_person),
    "models": (Person | Animal, lambda text: TypeAdapter(Person | Animal).validate_json(text)),
    "a grammar": (types.CFG('start: "(" start ")" | "x"'), re.compile(r"\(*x\)*").fullmatch),
    "a type": (bool, lambda text: text in ("True", "False")),
    "a list": (list[int], re.compile(r"\[[-+]?\d+(, [-+]?\d+)*\]").fullmatch),
    "any object": (dict, lambda text: isinstance(json.loads(text), dict)),
    "our own": (Constraint(kind="regex", text="z{3}"), lambda text: text == "zzz"),
}


def test_what_outlines_takes_for_a_constraint_is_one(llm: LLM) -> None:
    params = SamplingParams(max_tokens=120, seed=3)
    prompts = [[5, 6, 7]] * (len(ASKED) + 1)
    results = llm.generate(prompts, params, [constraint for constraint, _ in ASKED.values()] + [None])
    for (name, (_, check)), result in zip(ASKED.items(), results, strict=False):
        (output,) = result.outputs
        assert output.finish_reason == "length" or check(output.text), (name, output.text)
    assert [result.outputs[0].finish_reason for result in results].count("stop") >= len(ASKED) - 2
    (free,) = llm.generate([[5, 6, 7]], params)
    assert results[-1].outputs[0].text == free.outputs[0].text


def test_one_constraint_is_for_all_prompts_and_all_choices(llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, n=3, seed=1)
    for result in llm.generate([[5, 6], [7, 8]], params, Literal["positive", "negative"]):
        assert {output.text for output in result.outputs} <= {"positive", "negative"}


def test_a_message_can_be_constrained(demo_model_path: Path, llm: LLM) -> None:
    (result,) = llm.chat(
        [{"role": "user", "content": "?"}], SamplingParams(max_tokens=5, seed=1), constraint=Mood
    )
    assert Mood(result.outputs[0].text)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (types.Regex("(a"), "not closed"),
        (types.JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Person | None, "A JSON schema cannot be part of another constraint"),
        (types.Choice(["a", Person]), "A JSON schema cannot be part of another constraint"),
        (types.optional(types.CFG('start: "a"')), "A grammar cannot be part of another constraint"),
        ("a|b", "not a text"),
        (object(), "Outlines makes no constraint of <object"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_enforced_is_refused_before_anything_runs(
    llm: LLM, constraint: object, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5), constraint)
    assert (caught.value.param, caught.value.code) == ("constraint", "invalid_constraint")
    assert not llm.engine.has_work


def test_a_list_of_constraints_has_one_for_each_prompt(llm: LLM) -> None:
    with pytest.raises(ValueError, match="1 prompts, but 2 constraints"):
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=5), [None, Mood])

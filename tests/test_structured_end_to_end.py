"""Structured output and tools with the real server and the real model, driven by the OpenAI SDK."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.hostile_constraints import HOSTILE
from tests.hostile_streams import observe
from tests.server_process import ServerProcess, running_server

pytestmark = [pytest.mark.model, pytest.mark.timing]
MODEL = "smollm2"
MESSAGES: list[Any] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Classify this sentiment: vLLM is wonderful!"},
]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Forecast.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "get_time"}},
]
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Rome?"}]


@pytest.fixture(scope="module")
def server(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--model", str(demo_model_path), "--served-model-name", MODEL, "--max-model-len", "512"]
    flags += ["--max-num-seqs", "16", "--max-num-batched-tokens", "128"]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with running_server(log, *flags) as server:
        yield server
        assert server.metric("xla_compilations_total") == 0, "something was compiled under load"
        assert "Traceback" not in log.read_text()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="token-abc123", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, messages: list[Any] = MESSAGES, **options: Any) -> Any:
    extra = {
        key: options.pop(key) for key in list(options) if key not in ("n", "stream", "max_tokens", "tools")
    }
    return client.chat.completions.create(model=MODEL, messages=messages, extra_body=extra, **options)


def content(completion: Any) -> str:
    (choice,) = completion.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.content, str)
    return choice.message.content


def test_the_choice_of_a_sentiment(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, extra_body={"guided_choice": ["positive", "negative"]}
    )
    assert completion.choices[0].message.content in ("positive", "negative")
    assert completion.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "body",
    [
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
    ],
    ids=["object", "text", "structured_outputs", "response_format"],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_json_is_valid_under_its_schema(client: openai.OpenAI, body: dict[str, Any], seed: int) -> None:
    jsonschema.validate(json.loads(content(create(client, seed=seed, max_tokens=200, **body))), SCHEMA)


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    completion = create(client, response_format={"type": "json_object"}, seed=1, max_tokens=60)
    text = completion.choices[0].message.content
    assert text.startswith("{")
    if completion.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_regex_is_matched_whole(client: openai.OpenAI, seed: int) -> None:
    pattern = r"[A-Z]{2}-\d{3,5}(🙂|é)"
    assert re.fullmatch(pattern, content(create(client, guided_regex=pattern, seed=seed)))


def test_a_grammar_is_obeyed(client: openai.OpenAI) -> None:
    grammar = 'start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]?/\n'
    completion = create(client, guided_grammar=grammar, seed=3, max_tokens=40)
    text = completion.choices[0].message.content
    assert re.fullmatch(r"[0-9+()]+", text)
    if completion.choices[0].finish_reason == "stop":
        assert text.count("(") == text.count(")")


def test_constraints_work_in_completions(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model=MODEL, prompt=["2 + 2 =", "3 + 3 ="], n=2, extra_body={"guided_regex": r" \d"}
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert all(re.fullmatch(r" \d", choice.text) for choice in completion.choices)
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}


class Weather(pydantic.BaseModel):
    mood: Literal["sunny", "rainy"]
    temperatures: list[int] = pydantic.Field(max_length=3)


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=Weather, seed=1, max_tokens=300
    )
    assert isinstance(completion.choices[0].message.parsed, Weather)


def test_several_choices_are_each_valid(client: openai.OpenAI) -> None:
    completion = create(client, guided_choice=["one", "two", "three"], n=3, temperature=2, seed=1)
    assert {choice.message.content for choice in completion.choices} <= {"one", "two", "three"}
    assert len(completion.choices) == 3


def test_a_stream_joined_is_the_answer(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"guided_json": SCHEMA, "seed": 4, "n": 2, "max_tokens": 120}
    texts = ["", ""]
    for chunk in create(client, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in create(client, **options).choices]


def test_beams_obey_the_constraint(client: openai.OpenAI) -> None:
    completion = create(
        client, guided_regex="(yes|no|maybe)!", use_beam_search=True, best_of=4, n=3, return_token_ids=True
    )
    # the same text in other tokens is another beam
    assert {choice.message.content for choice in completion.choices} <= {"yes!", "no!", "maybe!"}
    assert len({tuple(choice.token_ids) for choice in completion.choices}) == 3


def test_logprobs_are_the_models_own_and_cover_the_text(client: openai.OpenAI) -> None:
    completion = create(client, guided_choice=["positive", "negative"], logprobs=True, top_logprobs=2, seed=1)
    (choice,) = completion.choices
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in entries)
    assert completion.usage.completion_tokens == len(entries)


def test_a_constraint_ends_where_it_is_complete_whatever_else_is_asked_for(client: openai.OpenAI) -> None:
    completion = create(client, guided_regex="ab", min_tokens=10, ignore_eos=True, max_tokens=20)
    assert content(completion) == "ab"
    cut = create(client, guided_regex="[a-z ]{100,}", max_tokens=5)
    assert cut.choices[0].finish_reason == "length"


def test_a_refusal_names_field_and_keyword(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, guided_json={"type": "array", "uniqueItems": True})
    assert (caught.value.code, caught.value.param) == ("invalid_constraint", "guided_json")
    assert "uniqueItems" in caught.value.message


# --- tools ----------------------------------------------------------------------------------------------------


def test_a_named_tool_is_called_and_its_result_answered(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    completion = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=TOOLS, tool_choice=choice, seed=1
    )
    (answer,) = completion.choices
    assert answer.finish_reason == "stop"
    assert answer.message.content is None
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, WEATHER)
    messages = [
        *QUESTION,
        answer.message.model_dump(),  # as clients send it back
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny."},
    ]
    final = client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=8, seed=1
    )
    assert final.choices[0].message.content
    assert final.choices[0].message.tool_calls is None


@pytest.mark.parametrize("seed", [1, 2])
def test_a_required_call_is_made_and_streams_the_same(client: openai.OpenAI, seed: int) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": seed,
        "max_tokens": 200,
    }
    (answer,) = client.chat.completions.create(**options).choices
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        jsonschema.validate(arguments, WEATHER)
    else:
        assert (call.function.name, arguments) == ("get_time", {})
    with client.chat.completions.stream(**options) as stream:
        (streamed,) = stream.get_final_completion().choices
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls is not None
    (same,) = streamed.message.tool_calls
    assert (same.function.name, same.function.arguments) == (call.function.name, call.function.arguments)


class GetWeather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = pydantic.Field(ge=1, le=7)


def test_a_pydantic_tool_is_parsed(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=MODEL,
        messages=QUESTION,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        parallel_tool_calls=False,
        seed=1,
        max_tokens=200,
    )
    calls = completion.choices[0].message.tool_calls
    assert calls
    assert isinstance(calls[0].function.parsed_arguments, GetWeather)


def test_the_model_may_decide_not_to_call(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=TOOLS, max_tokens=16, temperature=0
    )
    (choice,) = completion.choices
    assert choice.message.content or choice.message.tool_calls


async def test_constrained_and_free_requests_at_once_all_end(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def one(i: int) -> tuple[int, Any]:
            body: dict[str, Any] = [{}, {"guided_json": SCHEMA}, {"guided_regex": r"\d{8}"}][i % 3]
            completion = await client.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=100, seed=i, extra_body=body
            )
            return i % 3, completion.choices[0]

        for kind, choice in await asyncio.gather(*(one(i) for i in range(24))):
            if kind == 1 and choice.finish_reason == "stop":
                jsonschema.validate(json.loads(choice.message.content), SCHEMA)
            if kind == 2:
                assert re.fullmatch(r"\d{8}", choice.message.content)
    server.wait_until_idle()


async def test_hostile_constraints_are_refused_soon_while_streams_go_on(server: ServerProcess) -> None:
    """scripts/bench_hostile_constraints.py measures what the streams notice."""
    seen = await observe(server.url, MODEL, HOSTILE, num_streams=8, max_tokens=490)
    assert [refusal.name for refusal in seen.refusals] == list(HOSTILE)
    assert {refusal.status for refusal in seen.refusals} == {400}
    assert {refusal.code for refusal in seen.refusals} <= {"invalid_constraint", "constraint_too_complex"}
    assert max(refusal.seconds for refusal in seen.refusals) < 3
    assert min(seen.tokens) > 30

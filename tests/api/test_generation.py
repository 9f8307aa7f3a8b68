"""The generation routes against a scripted engine: text, shapes, streams, stops, aborts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from quart import Quart

from jaxserve.api.generation import RequestTimings, TokenClock
from jaxserve.api.metrics import Metrics
from jaxserve.errors import EngineDeadError, EngineStartingError
from jaxserve.messages import AddRequest, SequenceOutput
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, Script, fake_info, generate
from tests.api.small_model import (
    CREATED,
    END,
    FINGERPRINT,
    HELLO,
    MODEL,
    USER,
    VOCAB_SIZE,
    WORLD,
    falling_logprobs,
    ids,
    make_app,
    make_tokenizer,
)

Json = dict[str, Any]
MESSAGES = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def says(*texts: str | list[int], **options: Any) -> Script:
    """A script: sequence i of every request generates texts[i] (bytes, or ids), then END unless told."""
    ends = options.pop("ends", [END])
    options.setdefault("logprobs", falling_logprobs)

    def script(request: AddRequest) -> list[list[SequenceOutput]]:
        sequences = [
            (ids(text) if isinstance(text, str) else text) + ends
            for text in (texts * 200)[: request.params.num_sequences]
        ]
        return generate(request, sequences, **options)

    return script


class Server:
    """An app with a fake engine behind it."""

    def __init__(self, tokenizer: Tokenizer, engine: FakeEngineClient, **config: Any) -> None:
        self.engine = engine
        self.app: Quart = make_app(tokenizer, engine, **config)

    async def post(self, path: str, body: Json) -> tuple[int, Json]:
        response = await self.app.test_client().post(path, json=full(path, body))
        return response.status_code, await response.get_json()

    async def ok(self, path: str, body: Json) -> Json:
        status, answer = await self.post(path, body)
        assert status == 200, answer
        return answer

    async def stream(self, path: str, body: Json) -> list[Json]:
        """The events of a stream; it must end with [DONE]."""
        response = await self.app.test_client().post(path, json=full(path, body) | {"stream": True})
        text = (await response.get_data()).decode()
        assert response.status_code == 200, text
        assert response.headers["Content-Type"].startswith("text/event-stream")
        *events, done, rest = text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        assert all(event.startswith("data: ") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]


def full(path: str, body: Json) -> Json:
    prompt = {"prompt": "hi"} if path == COMPLETIONS else {"messages": MESSAGES}
    return {"model": MODEL} | prompt | body


@pytest.fixture
def server(tokenizer: Tokenizer) -> Callable[..., Server]:
    def make(
        *texts: str | list[int], config: Json | None = None, info: Json | None = None, **options: Any
    ) -> Server:
        engine_info = fake_info(**({"vocab_size": VOCAB_SIZE} | (info or {})))
        script = says(*texts, **options) if texts else None
        return Server(tokenizer, FakeEngineClient(script=script, info=engine_info), **(config or {}))

    return make


MakeServer = Callable[..., Server]

# --- whole responses -------------------------------------------------------------------------------------


async def test_a_completion_has_exactly_the_promised_keys(server: MakeServer) -> None:
    answer = await server("there").ok(COMPLETIONS, {"prompt": "hello", "request_id": "r1", "max_tokens": 20})
    assert answer.pop("created") > CREATED - 10**9
    assert answer == {
        "id": "cmpl-r1",
        "object": "text_completion",
        "model": MODEL,
        "system_fingerprint": FINGERPRINT,
        "choices": [
            {
                "index": 0,
                "text": "there",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "prompt_logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 6,
            "total_tokens": 11,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_chat_completion_has_exactly_the_promised_keys(server: MakeServer) -> None:
    answer = await server("there", num_cached_tokens=7).ok(CHAT, {"request_id": "r1"})
    assert answer.pop("created") > CREATED - 10**9
    num_prompt_tokens = len("[user]hi;[assistant]")
    assert answer == {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "model": MODEL,
        "system_fingerprint": FINGERPRINT,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "there", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": 6,
            "total_tokens": num_prompt_tokens + 6,
            "prompt_tokens_details": {"cached_tokens": 7},
        },
        "prompt_logprobs": None,
    }


async def test_responses_name_the_first_served_model_also_for_an_alias(server: MakeServer) -> None:
    assert (await server("a").ok(COMPLETIONS, {"model": "alias"}))["model"] == MODEL


async def test_the_id_is_the_request_id_header_when_the_body_has_none(server: MakeServer) -> None:
    app = server("a").app
    response = await app.test_client().post(
        COMPLETIONS, json=full(COMPLETIONS, {}), headers={"X-Request-Id": "abc"}
    )
    assert (await response.get_json())["id"] == "cmpl-abc"


@pytest.mark.parametrize(
    ("options", "body", "finish_reason", "stop_reason", "text"),
    [
        ({}, {}, "stop", None, "abc"),
        ({"ends": [], "finish_reason": "length"}, {}, "length", None, "abc"),
        ({"ends": [ids("d")[0]], "stop_reason": 100}, {"stop_token_ids": [100]}, "stop", 100, "abc"),
        (
            {"ends": [ids("d")[0]], "stop_reason": 100},
            {"stop_token_ids": [100], "include_stop_str_in_output": True},
            "stop",
            100,
            "abcd",
        ),
        ({}, {"stop": "b"}, "stop", "b", "a"),
        ({}, {"stop": ["x", "bc", "b"]}, "stop", "b", "a"),
        ({}, {"stop": ["bc", "c"]}, "stop", "bc", "a"),
        ({}, {"stop": "b", "include_stop_str_in_output": True}, "stop", "b", "ab"),
        ({}, {"include_stop_str_in_output": True}, "stop", None, "abc"),
        (
            {},
            {"include_stop_str_in_output": True, "skip_special_tokens": False},
            "stop",
            None,
            "abc<|end|>",
        ),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_every_way_to_finish_has_its_reason(
    server: MakeServer, path: str, options: Json, body: Json, finish_reason: str, stop_reason: Any, text: str
) -> None:
    answer = await server("abc", **options).ok(path, body)
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == (finish_reason, stop_reason)
    assert (choice["text"] if path == COMPLETIONS else choice["message"]["content"]) == text


async def test_choices_of_several_prompts_are_numbered_by_prompt_then_by_n(server: MakeServer) -> None:
    answer = await server("x", "yy").ok(COMPLETIONS, {"prompt": ["one", "three"], "n": 2})
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "x"), (1, "yy"), (2, "x"), (3, "yy")]
    assert answer["usage"]["prompt_tokens"] == 8  # each prompt once
    assert answer["usage"]["completion_tokens"] == 2 * (2 + 3)


async def test_all_prompts_of_a_request_share_their_seed(server: MakeServer) -> None:
    served = server("x")
    await served.ok(COMPLETIONS, {"prompt": ["a", "b"], "seed": 7})
    assert [request.params.seed for request in served.engine.submitted] == [7, 7]


async def test_the_engine_is_asked_for_exactly_what_the_request_asks_for(server: MakeServer) -> None:
    served = server("x")
    await served.ok(COMPLETIONS, {"prompt": [1, 2, 3], "max_tokens": 9, "cache_salt": "s", "stop": "q"})
    (request,) = served.engine.submitted
    assert request.prompt_token_ids == [1, 2, 3]
    assert (request.params.max_tokens, request.params.stop) == (9, ("q",))
    assert (request.eos_token_ids, request.cache_salt) == ((END,), "s")


async def test_priorities_reach_the_engine_where_the_server_has_them(server: MakeServer) -> None:
    served = server("x", config={"scheduling_policy": "priority"})
    for path in (COMPLETIONS, CHAT):
        await served.ok(path, {"priority": -3})
    assert [request.priority for request in served.engine.submitted] == [-3, -3]
    status, answer = await server("x").post(COMPLETIONS, {"priority": -3})
    assert (status, answer["error"]["param"]) == (400, "priority")
    assert "--scheduling-policy priority" in answer["error"]["message"]


async def test_text_of_special_tokens_is_shown_on_request(server: MakeServer) -> None:
    served = server([HELLO, USER, WORLD])
    assert (await served.ok(COMPLETIONS, {}))["choices"][0]["text"] == "hello world"
    shown = await served.ok(COMPLETIONS, {"skip_special_tokens": False})
    assert shown["choices"][0]["text"] == "hello<|user|> world"


async def test_tokens_after_a_stop_string_in_the_same_step_do_not_count(server: MakeServer) -> None:
    served = server("abcdef", tokens_per_step=6)
    answer = await served.ok(COMPLETIONS, {"stop": "c", "logprobs": 0})
    assert answer["choices"][0]["text"] == "ab"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 3


async def test_token_ids_are_returned_on_request(server: MakeServer) -> None:
    completion = await server("ab").ok(COMPLETIONS, {"prompt": "p", "return_token_ids": True})
    assert completion["choices"][0]["token_ids"] == [*ids("ab"), END]
    assert completion["choices"][0]["prompt_token_ids"] == ids("p")
    chat = await server("ab").ok(CHAT, {"return_token_ids": True})
    assert chat["choices"][0]["token_ids"] == [*ids("ab"), END]
    assert chat["prompt_token_ids"] == ids("[user]hi;[assistant]")


# --- prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "rendered"),
    [
        ({}, "[user]hi;[assistant]"),
        ({"add_generation_prompt": False}, "[user]hi;"),
        ({"documents": [{"a": "b"}]}, "[user]hi;1 documents;[assistant]"),
        ({"reasoning_effort": "low"}, "[user]hi;effort low;[assistant]"),
        ({"messages": [{"role": "developer", "content": "x"}]}, "[system]x;[assistant]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]},
            "[user]a\nb;[assistant]",
        ),
    ],
)
async def test_conversations_are_rendered_by_the_template(
    server: MakeServer, body: Json, rendered: str
) -> None:
    served = server("x")
    await served.ok(CHAT, body)
    assert served.engine.submitted[0].prompt_token_ids == ids(rendered)


async def test_without_generation_prompt_the_role_is_that_of_the_last_message(server: MakeServer) -> None:
    served = server("x", config={"response_role": "bot"})
    assert (await served.ok(CHAT, {}))["choices"][0]["message"]["role"] == "bot"
    answer = await served.ok(CHAT, {"add_generation_prompt": False})
    assert answer["choices"][0]["message"]["role"] == "user"
    chunks = await served.stream(CHAT, {"add_generation_prompt": False})
    assert chunks[0]["choices"][0]["delta"] == {"role": "user", "content": ""}


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, "hij"),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, "abc"),
        ({"truncate_prompt_tokens": 64, "max_tokens": 1}, "abcdefghij"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 60}, "ghij"),
        ({"truncate_prompt_tokens": -1, "max_tokens": None}, "abcdefghij"),
    ],
)
async def test_prompts_are_truncated_as_asked(server: MakeServer, body: Json, kept: str) -> None:
    served = server("x")
    answer = await served.ok(COMPLETIONS, {"prompt": "abcdefghij"} | body)
    assert served.engine.submitted[0].prompt_token_ids == ids(kept)
    assert answer["usage"]["prompt_tokens"] == len(kept)


@pytest.mark.parametrize(
    ("path", "body", "max_tokens"),
    [
        (COMPLETIONS, {"prompt": "abcd"}, 16),
        (COMPLETIONS, {"prompt": "abcd", "max_tokens": None}, 60),
        (COMPLETIONS, {"prompt": "x" * 60}, 4),
        (COMPLETIONS, {"prompt": "x" * 60, "max_tokens": 4}, 4),
        (CHAT, {}, 64 - 20),
        (CHAT, {"max_tokens": 3}, 3),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 5}, 5),
    ],
)
async def test_max_tokens_is_settled_by_the_prompt(
    server: MakeServer, path: str, body: Json, max_tokens: int
) -> None:
    served = server("x")
    await served.ok(path, body)
    assert served.engine.submitted[0].params.max_tokens == max_tokens


@pytest.mark.parametrize(
    ("path", "body", "param", "numbers"),
    [
        (COMPLETIONS, {"prompt": "x" * 64}, "prompt", [64, 64, 16, 80]),
        (COMPLETIONS, {"prompt": "x" * 70, "max_tokens": None}, "prompt", [64, 70, 1, 71]),
        (COMPLETIONS, {"prompt": "x" * 60, "max_tokens": 5}, "max_tokens", [64, 60, 5, 65]),
        (COMPLETIONS, {"prompt": ["x", "x" * 64]}, "prompt", [64, 64, 16, 80]),
        (COMPLETIONS, {"prompt": "x" * 65, "max_tokens": 0, "echo": True}, "prompt", [64, 65, 0, 65]),
        (COMPLETIONS, {"max_tokens": 10**18}, "max_tokens", [64, 2, 10**18, 10**18 + 2]),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 60}]}, "messages", [64, 78, 1, 79]),
        (CHAT, {"max_tokens": 45}, "max_tokens", [64, 20, 45, 65]),
        (CHAT, {"max_completion_tokens": 45, "max_tokens": 1}, "max_completion_tokens", [64, 20, 45, 65]),
    ],
)
async def test_what_does_not_fit_is_refused_with_all_numbers(
    server: MakeServer, path: str, body: Json, param: str, numbers: list[int]
) -> None:
    served = server("x")
    status, answer = await served.post(path, body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (
        400,
        "context_length_exceeded",
        param,
    )
    assert all(str(number) in answer["error"]["message"] for number in numbers)
    assert served.engine.submitted == []


@pytest.mark.parametrize(
    ("text", "at_least"),
    [("1" * 2_000_000, 2_000_000), ("ab " * 600_000, 600_000), ("é" * 500_000, 1_000_000)],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_megabytes_that_cannot_fit_are_not_tokenized(
    server: MakeServer, monkeypatch: pytest.MonkeyPatch, path: str, text: str, at_least: int
) -> None:
    served = server("x")
    monkeypatch.setattr(Tokenizer, "encode", lambda *_, **__: pytest.fail("tokenized"))
    body = {"prompt": text} if path == COMPLETIONS else {"messages": [{"role": "user", "content": text}]}
    status, answer = await served.post(path, body)
    error = answer["error"]
    param = "prompt" if path == COMPLETIONS else "messages"
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    asked = 16 if path == COMPLETIONS else 1
    assert f"has at least {at_least} and the output asks for {asked}" in error["message"]
    assert f"at least {at_least + asked} in all" in error["message"]


async def test_a_long_prompt_that_is_truncated_is_served(server: MakeServer) -> None:
    served = server("x")
    answer = await served.ok(COMPLETIONS, {"prompt": "1" * 100_000, "truncate_prompt_tokens": 7})
    assert answer["usage"]["prompt_tokens"] == 7


async def test_no_prompt_is_submitted_if_one_of_them_is_refused(server: MakeServer) -> None:
    served = server("x")
    status, _ = await served.post(COMPLETIONS, {"prompt": ["fine", "x" * 100]})
    assert status == 400
    assert served.engine.submitted == []


# --- echo ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "say: "}, "say: abc"),
        ({"prompt": ids("ids ")}, "ids abc"),
        ({"prompt": [HELLO, USER]}, "hello<|user|>abc"),
        ({"prompt": "long text", "truncate_prompt_tokens": 4}, "textabc"),
        ({"prompt": ["1", "2"]}, "1abc"),
        ({"prompt": "only", "max_tokens": 0}, "only"),
    ],
)
async def test_echo_puts_the_prompt_before_the_completion(server: MakeServer, body: Json, text: str) -> None:
    served = server("abc")
    answer = await served.ok(COMPLETIONS, body | {"echo": True})
    assert answer["choices"][0]["text"] == text
    chunks = await served.stream(COMPLETIONS, body | {"echo": True})
    assert joined(COMPLETIONS, chunks)[0]["text"] == text


async def test_echo_alone_generates_nothing(server: MakeServer) -> None:
    served = server("abc")
    answer = await served.ok(COMPLETIONS, {"prompt": "only", "echo": True, "max_tokens": 0, "n": 2})
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (4, 0)
    assert served.engine.submitted == []


async def test_chat_echo_repeats_a_last_message_of_the_same_role(server: MakeServer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "I say "}]
    body = {"messages": messages, "echo": True, "add_generation_prompt": False}
    assert (await server("abc").ok(CHAT, body))["choices"][0]["message"]["content"] == "I say abc"
    chunks = await server("abc").stream(CHAT, body)
    assert [c["choices"][0]["delta"].get("content") for c in chunks][:3] == ["", "I say ", "a"]
    answer = await server("abc").ok(CHAT, {"echo": True})  # the last message is the user's
    assert answer["choices"][0]["message"]["content"] == "abc"


# --- logprobs of the prompt --------------------------------------------------------------------------------


def described(logprob: float, rank: int, decoded_token: str) -> Json:
    return {"logprob": logprob, "rank": rank, "decoded_token": decoded_token}


I_OF_HI = described(-26.5, 106, "i")  # byte 105, as falling_logprobs has it


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (0, [None, {"105": I_OF_HI}]),
        (2, [None, {"105": I_OF_HI, "0": described(-0.25, 1, "\0"), "1": described(-0.5, 2, "\1")}]),
    ],
)
async def test_prompt_logprobs_have_the_actual_token_and_then_the_likeliest(
    server: MakeServer, k: int, expected: list[Any]
) -> None:
    served = server("a")
    answer = await served.ok(COMPLETIONS, {"prompt_logprobs": k, "n": 2})
    for choice in answer["choices"]:
        assert choice["prompt_logprobs"] == expected
        assert choice["logprobs"] is None
        assert list(choice["prompt_logprobs"][1]) == list(expected[1])  # also the order
    assert served.engine.submitted[0].params.prompt_logprobs == k


async def test_a_likely_actual_token_is_not_repeated_among_the_likeliest(server: MakeServer) -> None:
    answer = await server("a").ok(COMPLETIONS, {"prompt": [7, 1, 0], "prompt_logprobs": 2})
    assert [list(entry or []) for entry in answer["choices"][0]["prompt_logprobs"]] == [
        [],
        ["1", "0"],
        ["0", "1"],
    ]


async def test_each_prompt_has_its_own_logprobs(server: MakeServer) -> None:
    body = {"prompt": ["h", "hello", "x"], "prompt_logprobs": 0, "n": 2}
    answer = await server("a").ok(COMPLETIONS, body)
    assert [len(choice["prompt_logprobs"]) for choice in answer["choices"]] == [1, 1, 5, 5, 1, 1]


async def test_prompt_logprobs_of_a_truncated_prompt_are_those_of_what_is_left(server: MakeServer) -> None:
    body = {"prompt": "abcdefghi", "truncate_prompt_tokens": 2, "prompt_logprobs": 0}
    (choice,) = (await server("a").ok(COMPLETIONS, body))["choices"]
    assert choice["prompt_logprobs"] == [None, {"105": I_OF_HI}]


async def test_minus_infinity_is_a_number_in_prompt_logprobs(server: MakeServer) -> None:
    answer = await server("a").ok(COMPLETIONS, {"prompt": [1, 200], "prompt_logprobs": 0})
    assert answer["choices"][0]["prompt_logprobs"][1]["200"] == described(-9999.0, 201, "\ufffd")


async def test_prompt_logprobs_of_a_chat_stand_beside_its_choices(server: MakeServer) -> None:
    answer = await server("a").ok(CHAT, {"prompt_logprobs": 1, "n": 2, "echo": True})
    prompt = "[user]hi;[assistant]"
    assert len(answer["prompt_logprobs"]) == len(prompt)
    assert answer["prompt_logprobs"][0] is None
    expected = {"117": described(-29.5, 118, "u"), "0": described(-0.25, 1, "\0")}
    assert answer["prompt_logprobs"][1] == expected
    assert all("prompt_logprobs" not in choice for choice in answer["choices"])
    assert all(choice["logprobs"] is None for choice in answer["choices"])


ECHO: Json = {"echo": True, "logprobs": 1, "max_tokens": 4}
TOP = {"\0": -0.25}
ECHO_LOGPROBS: Json = {
    "text_offset": [0, 1, 2, 3, 4],
    "token_logprobs": [None, -26.5, -24.5, -24.75, -64.25],
    "tokens": ["h", "i", "a", "b", "<|end|>"],
    "top_logprobs": [
        None,
        TOP | {"i": -26.5},
        TOP | {"a": -24.5},
        TOP | {"b": -24.75},
        TOP | {"<|end|>": -64.25},
    ],
}


@pytest.mark.parametrize("n", [1, 3])
async def test_an_echo_has_the_logprobs_of_the_prompt_first(server: MakeServer, n: int) -> None:
    answer = await server("ab").ok(COMPLETIONS, ECHO | {"n": n, "prompt_logprobs": 3})
    for choice in answer["choices"]:
        assert choice["text"] == "hiab"
        assert choice["logprobs"] == ECHO_LOGPROBS
        assert list(choice["prompt_logprobs"][1]) == [
            "105",
            "0",
            "1",
            "2",
        ]  # as many as are asked for, not fewer
    quiet = await server("ab").ok(COMPLETIONS, ECHO)
    assert quiet["choices"][0]["prompt_logprobs"] is None  # not asked for


async def test_a_streamed_echo_sends_the_whole_prompt_before_the_completion_of_each_choice(
    server: MakeServer,
) -> None:
    chunks = await server("ab").stream(COMPLETIONS, ECHO | {"n": 2})
    for index in (0, 1):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [choice["text"] for choice in choices] == ["hi", "a", "b", ""]
        assert choices[0]["logprobs"] == {name: members[:2] for name, members in ECHO_LOGPROBS.items()}
        assert choices[1]["logprobs"] == {name: members[2:3] for name, members in ECHO_LOGPROBS.items()}


@pytest.mark.parametrize(
    "options", [{"logprobs": 1}, {"logprobs": 1, "prompt_logprobs": 0}, {"prompt_logprobs": 0}]
)
async def test_an_echo_alone_with_logprobs_asks_the_engine_for_no_tokens(
    server: MakeServer, options: Json
) -> None:
    served = server("ab")
    answer = await served.ok(COMPLETIONS, {"echo": True, "max_tokens": 0, "n": 2} | options)
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hi", "length", None)
        with_logprobs = {name: members[:2] for name, members in ECHO_LOGPROBS.items()}
        assert choice["logprobs"] == (with_logprobs if "logprobs" in options else None)
        with_prompt = [None, {"105": I_OF_HI}]
        assert choice["prompt_logprobs"] == (with_prompt if "prompt_logprobs" in options else None)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2, 0)
    (request,) = served.engine.submitted
    assert (request.params.max_tokens, request.params.prompt_logprobs) == (0, max(options.values()))


async def test_an_echo_alone_with_logprobs_can_be_streamed(server: MakeServer) -> None:
    body = {"echo": True, "max_tokens": 0, "logprobs": 1, "stream_options": {"include_usage": True}}
    first, last, usage = await server("ab").stream(COMPLETIONS, body)
    assert first["choices"][0]["logprobs"]["tokens"] == ["h", "i"]
    assert (first["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("hi", "length")
    assert usage["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_logprobs_that_the_engine_leaves_out_are_its_failure(
    server: MakeServer, stream: bool
) -> None:
    served = server("a", logprobs=None)
    status, answer = await served.post(COMPLETIONS, ECHO | {"stream": stream})
    assert (status, answer["error"]["code"]) == (500, "internal_error")


# --- the best of several -----------------------------------------------------------------------------------


def results(path: str, answer: Json) -> list[Any]:
    """(text, stop reason) of the choices, in order; their indices must be 0, 1, 2, …"""
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [(choice["text"], choice["stop_reason"]) for choice in whole(path, answer)]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_likeliest_candidates_are_returned_best_first(server: MakeServer, path: str) -> None:
    served = server("zz", "aa", "mm", "a")
    answer = await served.ok(path, {"n": 3, "best_of": 4})
    assert results(path, answer) == [("a", None), ("aa", None), ("mm", None)]
    assert answer["usage"]["completion_tokens"] == 2 + 3 + 3  # of what is returned
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    (request,) = served.engine.submitted
    assert (request.params.n, request.params.best_of, request.params.logprobs) == (3, 4, 0)


async def test_candidates_are_compared_as_far_as_they_count(server: MakeServer) -> None:
    served = server("acxxx", "b", tokens_per_step=6)  # a, c are likelier than b and the end token
    answer = await served.ok(COMPLETIONS, {"best_of": 2, "stop": "c", "logprobs": 0})
    assert results(COMPLETIONS, answer) == [("a", "c")]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-24.5, -25.0]
    assert results(COMPLETIONS, await served.ok(COMPLETIONS, {"best_of": 2})) == [("b", None)]


async def test_equal_candidates_stay_in_order_and_minus_infinity_counts_as_reported(
    server: MakeServer,
) -> None:
    served = server([200], [200, 200], "ab", "ba", "zzz")
    answer = await served.ok(COMPLETIONS, {"n": 4, "best_of": 5, "return_token_ids": True})
    assert [choice["token_ids"] for choice in answer["choices"]] == [
        [*ids("ab"), END],
        [*ids("ba"), END],
        [*ids("zzz"), END],
        [200, END],
    ]


async def test_every_prompt_has_its_own_best(server: MakeServer) -> None:
    served = server("z", "aaa", "b")
    answer = await served.ok(COMPLETIONS, {"prompt": ["p", "q"], "best_of": 3, "n": 2, "echo": True})
    assert [text for text, _ in results(COMPLETIONS, answer)] == ["pb", "pz", "qb", "qz"]
    assert answer["usage"]["completion_tokens"] == 4 * 2


async def test_prompt_logprobs_go_with_the_best(server: MakeServer) -> None:
    answer = await server("z", "a").ok(
        COMPLETIONS, {"best_of": 2, "echo": True, "logprobs": 1, "prompt_logprobs": 0}
    )
    (choice,) = answer["choices"]
    assert choice["logprobs"]["tokens"] == ["h", "i", "a", "<|end|>"]
    assert choice["prompt_logprobs"] == [None, {"105": I_OF_HI}]


async def test_a_client_that_goes_away_aborts_all_candidates(server: MakeServer) -> None:
    served = server(config={"request_timeout_s": 0.02})
    status, _ = await served.post(COMPLETIONS, {"n": 1, "best_of": 3})
    assert status == 408
    assert served.engine.live == {}


BEAMS: Json = {"use_beam_search": True, "best_of": 3, "n": 2}


@pytest.mark.parametrize(
    ("texts", "options", "body", "expected"),
    [
        (["ab", "abc"], {}, {}, [("ab", None), ("abc", None)]),
        (["ab", "c"], {"ends": [], "finish_reason": "length"}, {}, [("ab", None), ("c", None)]),
        (
            ["say STO", "xSTO"],
            {"ends": ids("P"), "stop_reason": "STOP"},
            {"stop": "STOP"},
            [("say ", "STOP"), ("x", "STOP")],
        ),
        (
            ["say STO", "xSTO"],
            {"ends": ids("P"), "stop_reason": "STOP"},
            {"stop": "STOP", "include_stop_str_in_output": True},
            [("say STOP", "STOP"), ("xSTOP", "STOP")],
        ),
        (
            ["ab", "c"],
            {"ends": [100], "stop_reason": 100},
            {"stop_token_ids": [100]},
            [("ab", 100), ("c", 100)],
        ),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_beams_come_whole_and_end_as_the_engine_says(
    server: MakeServer, path: str, texts: list[str], options: Json, body: Json, expected: list[Any]
) -> None:
    served = server(*texts, tokens_per_step=100, **options)
    answer = await served.ok(path, BEAMS | body)
    assert results(path, answer) == expected
    num_tokens = sum(len(text) for text in texts) + 2 * len(options.get("ends", [END]))
    assert answer["usage"]["completion_tokens"] == num_tokens
    (request,) = served.engine.submitted
    assert (request.params.use_beam_search, request.params.n, request.params.num_sequences) == (True, 2, 3)
    assert served.engine.aborted == []


async def test_beams_have_logprobs_and_an_echo(server: MakeServer) -> None:
    answer = await server("ab", "ba", tokens_per_step=100).ok(COMPLETIONS, BEAMS | ECHO)
    assert answer["choices"][0]["text"] == "hiab"
    assert answer["choices"][0]["logprobs"] == ECHO_LOGPROBS
    assert answer["choices"][1]["logprobs"]["tokens"] == ["h", "i", "b", "a", "<|end|>"]


# --- other limits of what is generated ---------------------------------------------------------------------


@pytest.mark.parametrize("tokens_per_step", [1, 9])
async def test_stop_strings_do_not_count_before_min_tokens(server: MakeServer, tokens_per_step: int) -> None:
    served = server("abcbd", tokens_per_step=tokens_per_step)
    answer = await served.ok(COMPLETIONS, {"stop": "b", "min_tokens": 3})
    assert results(COMPLETIONS, answer) == [("abc", "b")]
    assert served.engine.submitted[0].params.min_tokens == 3


@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [
        ({"prompt": "x" * 60, "min_tokens": 5}, "(4), got 5"),
        ({"prompt": "x" * 60, "min_tokens": 5, "max_tokens": None}, "(4), got 5"),
        ({"prompt": ["x", "x" * 60], "min_tokens": 5}, "(4), got 5"),
    ],
)
async def test_min_tokens_must_fit_beside_the_prompt(server: MakeServer, body: Json, max_tokens: str) -> None:
    served = server("x")
    status, answer = await served.post(COMPLETIONS, body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_value", "min_tokens")
    assert f"max_tokens {max_tokens}" in answer["error"]["message"]
    assert served.engine.submitted == []


async def test_the_text_of_a_last_token_that_is_no_end_token_is_shown(server: MakeServer) -> None:
    answer = await server("ab", ends=[]).ok(COMPLETIONS, {})  # as a complete constraint ends
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("ab", "stop")


async def test_bad_words_reach_the_engine_as_tokens(server: MakeServer) -> None:
    served = server("x")
    await served.ok(COMPLETIONS, {"bad_words": ["no", "hello"]})
    await served.ok(CHAT, {"bad_words": ["no"]})
    first, second = served.engine.submitted
    assert first.params.bad_words_token_ids == (tuple(ids("no")), tuple(ids("hello")))
    assert second.params.bad_words_token_ids == (tuple(ids("no")),)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"bad_words": [f"{i:03}" + "x" * 20 for i in range(60)]}, "bad_words"),
        ({"allowed_token_ids": [65, 66], "bad_words": ["A", "B"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [END], "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": [END, 9], "min_tokens": 1, "stop_token_ids": [9]}, "allowed_token_ids"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_too_many_bad_words_and_nothing_to_generate_are_refused(
    server: MakeServer, path: str, body: Json, param: str
) -> None:
    served = server("x")
    status, answer = await served.post(path, body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_value", param)
    assert served.engine.submitted == []


async def test_something_that_can_be_generated_is_served(server: MakeServer) -> None:
    served = server("x")
    for body in ({"allowed_token_ids": [65, 66], "bad_words": ["A", "BB"]}, {"allowed_token_ids": [END]}):
        await served.ok(COMPLETIONS, body)
    await served.ok(COMPLETIONS, {"allowed_token_ids": [END], "min_tokens": 1, "ignore_eos": True})


# --- streams ---------------------------------------------------------------------------------------------


def joined(path: str, chunks: list[Json]) -> list[Json]:
    """The choices of a stream, put together as a client does it."""
    choices: dict[int, Json] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(
                part["index"], {"text": "", "role": None, "logprobs": None, "token_ids": []}
            )
            assert "finish_reason" not in choice, "a chunk after the last one of its choice"
            delta = part.get("delta", {"content": part.get("text")})
            choice["text"] += delta.get("content") or ""
            choice["role"] = delta.get("role", choice["role"])
            choice["token_ids"] += part.get("token_ids", [])
            for name, members in (part["logprobs"] or {}).items():
                choice["logprobs"] = choice["logprobs"] or {}
                choice["logprobs"].setdefault(name, []).extend(members)
            if part["finish_reason"] is not None:
                choice |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    return [choices[index] for index in sorted(choices)]


def whole(path: str, answer: Json) -> list[Json]:
    """The choices of a whole response in the same form."""
    return [
        {
            "text": choice["text"] if path == COMPLETIONS else choice["message"]["content"],
            "role": None if path == COMPLETIONS else choice["message"]["role"],
            "logprobs": choice["logprobs"],
            "token_ids": choice.get("token_ids", []),
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
        }
        for choice in answer["choices"]
    ]


BODIES: list[Json] = [
    {},
    {"n": 3},
    {"stop": "lo w"},
    {"stop": ["ld", "wor"], "n": 2},
    {"stop": "zzz"},
    {"stop": "hello world, "},
    {"stop": "or", "include_stop_str_in_output": True},
    {"skip_special_tokens": False, "include_stop_str_in_output": True},
    {"return_token_ids": True, "stop": "wo"},
    {"logprobs": 2, "stop": "wor"},
    {"logprobs": 3, "n": 2},
    {"logprobs": 0, "return_tokens_as_token_ids": True},
    {"prompt": ["a", "b", "c"], "n": 2, "logprobs": 1},
    {"echo": True, "n": 2},
    {"echo": True, "logprobs": 2, "n": 2, "return_token_ids": True},
    {"echo": True, "logprobs": 0, "prompt": [[65], [HELLO, END, 200]], "return_tokens_as_token_ids": True},
    {"echo": True, "logprobs": 3, "prompt": "long text", "truncate_prompt_tokens": 3},
    {"stop": "o", "min_tokens": 7, "logprobs": 1},
]
TEXTS: list[Any] = [
    "hello world",
    [HELLO, USER, WORLD],
    "grüße 👋🏽 world",
    [*ids("hello w"), 0xF0, 0x9F, 200, 0xC3],
]


@pytest.mark.parametrize("body", BODIES, ids=repr)
@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stream_joins_to_the_whole_response(
    server: MakeServer, path: str, tokens_per_step: int, body: Json
) -> None:
    if path == CHAT:
        top = {"logprobs": True, "top_logprobs": body["logprobs"]} if "logprobs" in body else {}
        body = {name: value for name, value in body.items() if name != "prompt"} | top
    for text in TEXTS:
        served = server(text, "hello wonder", tokens_per_step=tokens_per_step)
        answer = await served.ok(path, body | {"max_tokens": 30})
        options = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        chunks = await served.stream(path, body | options | {"max_tokens": 30})
        assert joined(path, chunks) == whole(path, answer)
        totals = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert totals == sorted(totals)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == answer["usage"]
        assert served.engine.live == {}


async def test_completion_chunks_have_exactly_the_promised_keys(server: MakeServer) -> None:
    chunks = await server("ab").stream(COMPLETIONS, {"request_id": "r"})
    envelope = {"id", "object", "created", "model", "system_fingerprint", "choices"}
    assert all(chunk.keys() == envelope for chunk in chunks)
    assert {(c["id"], c["object"], c["model"]) for c in chunks} == {("cmpl-r", "text_completion", MODEL)}
    assert len({chunk["created"] for chunk in chunks}) == 1
    blank = {"index": 0, "logprobs": None, "finish_reason": None, "stop_reason": None}
    assert [chunk["choices"] for chunk in chunks] == [
        [blank | {"text": "a"}],
        [blank | {"text": "b"}],
        [blank | {"text": "", "finish_reason": "stop"}],
    ]


async def test_chat_chunks_have_exactly_the_promised_keys(server: MakeServer) -> None:
    chunks = await server("ab").stream(CHAT, {"request_id": "r"})
    assert {(c["id"], c["object"]) for c in chunks} == {("chatcmpl-r", "chat.completion.chunk")}
    blank = {"index": 0, "logprobs": None, "finish_reason": None}
    assert [chunk["choices"] for chunk in chunks] == [
        [blank | {"delta": {"role": "assistant", "content": ""}}],
        [blank | {"delta": {"content": "a"}}],
        [blank | {"delta": {"content": "b"}}],
        [blank | {"delta": {}, "finish_reason": "stop", "stop_reason": None}],
    ]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_usage_appears_only_where_it_is_asked_for(server: MakeServer, path: str) -> None:
    served = server("ab")
    assert all("usage" not in chunk for chunk in await served.stream(path, {}))
    *chunks, last = await served.stream(path, {"stream_options": {"include_usage": True}})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    forced = server("ab", config={"enable_force_include_usage": True})
    assert (await forced.stream(path, {}))[-1]["usage"]["completion_tokens"] == 3


async def test_no_part_of_a_stop_string_is_ever_sent(server: MakeServer) -> None:
    chunks = await server("stay here STOP now").stream(COMPLETIONS, {"stop": "STOP", "max_tokens": 40})
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "stay here "
    assert all("S" not in text for text in texts)


async def test_logprobs_travel_with_or_after_their_text(server: MakeServer) -> None:
    chunks = await server("aXXXb XXY c").stream(COMPLETIONS, {"stop": "XXY", "logprobs": 0, "max_tokens": 40})
    text, tokens = "", ""
    for chunk in chunks:
        choice = chunk["choices"][0]
        text += choice["text"]
        tokens += "".join(choice["logprobs"]["tokens"]) if choice["logprobs"] else ""
        if choice["finish_reason"] is None:
            assert text.startswith(tokens)
    assert (text, tokens) == ("aXXXb ", "aXXXb XXY")


async def test_streams_and_responses_parse_as_the_sdk_types(server: MakeServer) -> None:
    served = server("hello", "world")
    body = {"n": 2, "logprobs": True, "top_logprobs": 2}
    chat = ChatCompletion.model_validate(await served.ok(CHAT, body))
    assert [choice.message.content for choice in chat.choices] == ["hello", "world"]
    assert chat.choices[0].logprobs is not None
    assert chat.usage is not None
    for chunk in await served.stream(CHAT, body | {"stream_options": {"include_usage": True}}):
        assert ChatCompletionChunk.model_validate(chunk).id == chunk["id"]
    completion = Completion.model_validate(await served.ok(COMPLETIONS, {"logprobs": 2}))
    assert completion.choices[0].text == "hello"
    for chunk in await served.stream(COMPLETIONS, {"logprobs": 2}):
        finished = {**chunk["choices"][0], "finish_reason": "stop"}  # the SDK's type lacks null
        assert Completion.model_validate(chunk | {"choices": [finished]}).choices[0].index == 0


# --- failures and aborts ---------------------------------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


def output(request: AddRequest, token_ids: list[int], **more: Any) -> SequenceOutput:
    return SequenceOutput(request.request_id, more.pop("index", 0), token_ids, **more)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_dead_engine_is_a_503_before_the_first_token(
    server: MakeServer, path: str, stream: bool
) -> None:
    served = server()
    pending = asyncio.create_task(served.post(path, {"stream": stream}))
    await until(lambda: bool(served.engine.submitted))
    served.engine.fail(EngineDeadError("gone"))
    status, answer = await pending
    assert (status, answer["error"]["code"]) == (503, "engine_dead")


async def test_while_the_engine_starts_requests_are_a_503(server: MakeServer) -> None:
    served = server()
    served.engine.error = EngineStartingError("loading")
    status, answer = await served.post(COMPLETIONS, {})
    assert (status, answer["error"]["code"]) == (503, "starting")


@pytest.mark.parametrize("num_prompts", [1, 2])
async def test_an_engine_failure_in_a_stream_is_one_event_then_done(
    server: MakeServer, num_prompts: int
) -> None:
    served = server()
    pending = asyncio.create_task(served.stream(COMPLETIONS, {"prompt": ["p"] * num_prompts}))
    await until(lambda: len(served.engine.submitted) == num_prompts)
    served.engine.emit(output(served.engine.submitted[0], ids("a")))
    await asyncio.sleep(0)
    served.engine.fail(EngineDeadError("gone"))
    *chunks, last = await pending
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None]
    assert last["error"]["code"] == "engine_dead"
    assert last.keys() == {"error"}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_fails_is_a_500_and_its_other_choices_end(
    server: MakeServer, stream: bool
) -> None:
    served = server()
    pending = asyncio.create_task(served.post(COMPLETIONS, {"n": 2, "stream": stream}))
    await until(lambda: bool(served.engine.submitted))
    (request,) = served.engine.submitted
    served.engine.emit(output(request, [], finish_reason="error", error="secret detail", index=1))
    status, answer = await pending
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(answer)
    assert served.engine.live == {}


async def test_a_stop_string_ends_the_sequence_in_the_engine_at_once(server: MakeServer) -> None:
    served = server()
    pending = asyncio.create_task(served.post(COMPLETIONS, {"n": 2, "stop": "b"}))
    await until(lambda: bool(served.engine.submitted))
    (request,) = served.engine.submitted
    served.engine.emit(output(request, ids("ab"), index=1), output(request, ids("a")))
    await until(lambda: bool(served.engine.aborted))
    assert served.engine.aborted == [(request.request_id, [1])]
    served.engine.emit(output(request, [END], finish_reason="stop"))
    status, answer = await pending
    assert status == 200
    assert [choice["stop_reason"] for choice in answer["choices"]] == [None, "b"]
    assert served.engine.aborted == [(request.request_id, [1])]


@pytest.mark.parametrize("tokens_before", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_aborts_every_prompt_exactly_once(
    server: MakeServer, stream: bool, tokens_before: int
) -> None:
    served = server()
    body = full(COMPLETIONS, {"prompt": ["p", "q"], "stream": stream})
    client = served.app.test_client()
    headers = {"Content-Type": "application/json"}
    async with client.request(COMPLETIONS, method="POST", headers=headers) as connection:
        await connection.send(json.dumps(body).encode())
        await connection.send_complete()
        await until(lambda: len(served.engine.submitted) == 2)
        if tokens_before:
            served.engine.emit(*(output(request, ids("a")) for request in served.engine.submitted))
            if stream:
                assert b'"text":"a"' in await connection.receive()
        await connection.disconnect()
        await until(lambda: not served.engine.live)
    assert sorted(served.engine.aborted) == sorted((r.request_id, None) for r in served.engine.submitted)


async def test_a_finished_request_aborts_nothing(server: MakeServer) -> None:
    served = server("abc")
    await served.ok(COMPLETIONS, {"n": 2})
    await served.stream(COMPLETIONS, {"n": 2})
    assert served.engine.aborted == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_out_of_time_is_a_408_before_the_first_token(
    server: MakeServer, stream: bool
) -> None:
    served = server(config={"request_timeout_s": 0.02})
    status, answer = await served.post(COMPLETIONS, {"stream": stream})
    assert (status, answer["error"]["code"]) == (408, "request_timeout")
    assert served.engine.live == {}
    assert len(served.engine.aborted) == 1


async def test_a_stream_out_of_time_ends_with_an_error_event(server: MakeServer) -> None:
    served = server(config={"request_timeout_s": 0.1})
    pending = asyncio.create_task(served.stream(COMPLETIONS, {}))
    await until(lambda: bool(served.engine.submitted))
    served.engine.emit(output(served.engine.submitted[0], ids("a")))
    chunk, last = await pending
    assert chunk["choices"][0]["text"] == "a"
    assert last["error"]["code"] == "request_timeout"
    assert served.engine.live == {}


async def test_with_keep_alives_a_stream_begins_before_its_first_token(server: MakeServer) -> None:
    served = server(config={"sse_keep_alive_interval_s": 0.02})
    async with served.app.test_client().request(
        COMPLETIONS, method="POST", headers={"Content-Type": "application/json"}
    ) as connection:
        await connection.send(json.dumps(full(COMPLETIONS, {"stream": True})).encode())
        await connection.send_complete()
        await until(lambda: bool(served.engine.submitted))
        assert (await connection.receive()).startswith(b":")
        served.engine.emit(output(served.engine.submitted[0], [*ids("a"), END], finish_reason="stop"))
        assert b'"text":"a"' in await connection.receive()


async def test_requests_with_the_same_id_do_not_meet_in_the_engine(server: MakeServer) -> None:
    served = server("abc")
    bodies: list[Awaitable[Json]] = [served.ok(COMPLETIONS, {"request_id": "same"}) for _ in range(3)]
    answers = await asyncio.gather(*bodies)
    assert {answer["id"] for answer in answers} == {"cmpl-same"}
    assert len({request.request_id for request in served.engine.submitted}) == 3


async def test_ignored_fields_are_listed_in_a_header(server: MakeServer) -> None:
    app = server("abc", config={"unknown_fields": "ignore"}).app
    body = full(COMPLETIONS, {"xyzzy": 1, "a,b\r\nSet-Cookie: x": 2})
    response = await app.test_client().post(COMPLETIONS, json=body)
    assert response.headers["X-Ignored-Fields"] == "xyzzy,a?b??Set-Cookie:?x"
    plain = await app.test_client().post(COMPLETIONS, json=full(COMPLETIONS, {}))
    assert "X-Ignored-Fields" not in plain.headers


# --- what metrics are told -------------------------------------------------------------------------------


class Recorder(Metrics):
    """Stands in for the metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.timings: list[RequestTimings] = []

    def observe_request(self, timings: RequestTimings) -> None:
        self.timings.append(timings)


def recorded(served: Server) -> list[RequestTimings]:
    recorder = Recorder()
    served.app.extensions["jaxserve"].metrics = recorder
    return recorder.timings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 2])
async def test_a_request_is_observed_once_with_all_its_tokens(
    server: MakeServer, tokens_per_step: int, stream: bool
) -> None:
    served = server("abcd", tokens_per_step=tokens_per_step, num_cached_tokens=1)
    timings = recorded(served)
    await served.app.test_client().post(
        COMPLETIONS,
        json=full(COMPLETIONS, {"prompt": ["p", "qq"], "n": 2, "stream": stream, "max_tokens": 9}),
    )
    (seen,) = timings
    assert (seen.finish_reason, seen.n, seen.max_tokens) == ("stop", 2, 9)
    assert (seen.prompt_tokens, seen.cached_tokens, seen.generation_tokens) == (3, 2, 4 * 5)
    assert len(seen.inter_token_s) == 4 * (5 - 1)
    assert seen.scheduled_at is not None
    assert seen.first_token_at is not None
    assert seen.arrived_at <= seen.scheduled_at <= seen.first_token_at <= seen.finished_at
    assert sum(seen.inter_token_s) / 4 <= seen.finished_at - seen.first_token_at


async def test_an_aborted_and_a_failed_request_are_observed_as_such(server: MakeServer) -> None:
    impatient, patient = server(config={"request_timeout_s": 0.02}), server()
    aborted, failed = recorded(impatient), recorded(patient)
    await impatient.post(COMPLETIONS, {})
    pending = asyncio.create_task(patient.post(COMPLETIONS, {}))
    await until(lambda: len(patient.engine.submitted) == 1)
    patient.engine.fail(EngineDeadError("gone"))
    await pending
    assert [(seen.finish_reason, seen.first_token_at) for seen in aborted] == [("abort", None)]
    assert [(seen.finish_reason, seen.first_token_at) for seen in failed] == [("error", None)]


def test_tokens_that_come_at_once_share_the_time_since_the_one_before() -> None:
    clock = TokenClock(2)
    clock.count(0, 1, 10.0)
    clock.count(1, 2, 11.0)
    clock.count(0, 2, 12.0)
    clock.count(0, 0, 20.0)
    assert clock.first_token_at == 10.0
    assert clock.inter_token_s == [0.0, 1.0, 1.0]

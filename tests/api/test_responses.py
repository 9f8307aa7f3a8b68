"""Response objects and chunks, key by key; logprobs in both APIs' shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from jaxserve.api.generation import ChoiceDelta, Usage
from jaxserve.api.prompts import TokenizedPrompt
from jaxserve.api.protocol import OutputOptions
from jaxserve.api.responses import (
    ChatRenderer,
    CompletionRenderer,
    Renderer,
    ResponseHead,
    TokenStrings,
    chat_logprobs,
    completion_logprobs,
    event,
    prompt_logprobs_json,
)
from jaxserve.messages import TopLogprobs
from jaxserve.tokenizer import Tokenizer
from tests.api.small_model import END, HELLO, WORLD, falling_logprobs, make_tokenizer

HEAD = ResponseHead(id="x-1", created=5, model="m", system_fingerprint="f")
PROMPT = TokenizedPrompt(token_ids=[1, 2, 3], max_tokens=8)
USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
USAGE_JSON = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def completion_renderer(tokenizer: Tokenizer, **options: Any) -> Renderer:
    return CompletionRenderer(HEAD, tokenizer, [PROMPT], 1, OutputOptions(**options))


def chat_renderer(tokenizer: Tokenizer, **options: Any) -> Renderer:
    return ChatRenderer(HEAD, tokenizer, [PROMPT], 1, OutputOptions(**options), role="assistant")


def events(data: bytes) -> list[Any]:
    parts = data.decode().removesuffix("\n\n").split("\n\n")
    return [part if part == "data: [DONE]" else json.loads(part.removeprefix("data: ")) for part in parts]


# --- logprobs --------------------------------------------------------------------------------------------


def top(sampled: int, k: int) -> TopLogprobs:
    return falling_logprobs(sampled, k)


def test_completion_logprobs_are_four_parallel_arrays(tokenizer: Tokenizer) -> None:
    arrays, offset = completion_logprobs(
        [HELLO, WORLD, END], [top(HELLO, 0), top(WORLD, 0), top(END, 0)], 0, 0, TokenStrings(tokenizer)
    )
    assert arrays == {
        "text_offset": [0, 5, 11],
        "token_logprobs": [-64.75, -65.0, -64.25],
        "tokens": ["hello", " world", "<|end|>"],
        "top_logprobs": [{"hello": -64.75}, {" world": -65.0}, {"<|end|>": -64.25}],
    }
    assert offset == 11 + len("<|end|>")


def test_completion_offsets_go_on_from_chunk_to_chunk(tokenizer: Tokenizer) -> None:
    arrays, _ = completion_logprobs([WORLD], [top(WORLD, 0)], 0, 5, TokenStrings(tokenizer))
    assert arrays["text_offset"] == [5]


@pytest.mark.parametrize(
    ("sampled", "expected"),
    [
        (ord("B"), {"A": -0.5, "B": -1.0}),  # among the two most likely
        (ord("C"), {"A": -0.5, "B": -1.0, "C": -2.0}),  # one more
    ],
)
def test_completion_top_logprobs_have_the_sampled_token_once(
    tokenizer: Tokenizer, sampled: int, expected: dict[str, float]
) -> None:
    entry = TopLogprobs(-1.0 if sampled == ord("B") else -2.0, 2, [ord("A"), ord("B")], [-0.5, -1.0])
    arrays, _ = completion_logprobs([sampled], [entry], 2, 0, TokenStrings(tokenizer))
    assert arrays["top_logprobs"] == [expected]


def test_of_two_tokens_with_the_same_string_the_likelier_is_shown(tokenizer: Tokenizer) -> None:
    entry = TopLogprobs(-3.0, 3, [0xC3, 0xC4], [-0.5, -1.0])  # bytes that are no character alone
    arrays, _ = completion_logprobs([0xC5], [entry], 2, 0, TokenStrings(tokenizer))
    assert arrays["tokens"] == ["\ufffd"]
    assert arrays["top_logprobs"] == [{"\ufffd": -0.5}]


def test_minus_infinity_is_written_as_a_number(tokenizer: Tokenizer) -> None:
    entry = TopLogprobs(-math.inf, 9, [65], [-20000.0])
    arrays, _ = completion_logprobs([66], [entry], 1, 0, TokenStrings(tokenizer))
    assert arrays["token_logprobs"] == [-9999.0]
    assert arrays["top_logprobs"] == [{"A": -9999.0, "B": -9999.0}]
    (chat,) = chat_logprobs([66], [entry], TokenStrings(tokenizer))
    assert (chat["logprob"], chat["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


def test_chat_logprobs_are_the_true_top_k_in_order(tokenizer: Tokenizer) -> None:
    entry = TopLogprobs(-4.0, 7, [ord("A"), ord("B")], [-0.5, -1.0])
    assert chat_logprobs([HELLO], [entry], TokenStrings(tokenizer)) == [
        {
            "token": "hello",
            "logprob": -4.0,
            "bytes": list(b"hello"),
            "top_logprobs": [
                {"token": "A", "logprob": -0.5, "bytes": [65]},
                {"token": "B", "logprob": -1.0, "bytes": [66]},
            ],
        }
    ]


def test_chat_bytes_of_partial_characters_are_the_tokens_own(tokenizer: Tokenizer) -> None:
    emoji = "👋".encode()
    entries = chat_logprobs(list(emoji), [top(byte, 0) for byte in emoji], TokenStrings(tokenizer))
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "👋"
    assert entries[0]["token"] == "\ufffd"


def test_tokens_are_written_as_ids_on_request(tokenizer: Tokenizer) -> None:
    strings = TokenStrings(tokenizer, as_token_ids=True)
    arrays, offset = completion_logprobs([HELLO], [top(HELLO, 1)], 1, 0, strings)
    assert (arrays["tokens"], offset) == ([f"token_id:{HELLO}"], len(f"token_id:{HELLO}"))
    assert arrays["top_logprobs"][0].keys() == {"token_id:0", f"token_id:{HELLO}"}
    (chat,) = chat_logprobs([HELLO], [top(HELLO, 1)], strings)
    assert (chat["token"], chat["bytes"]) == (f"token_id:{HELLO}", list(b"hello"))


def test_tokens_as_likely_as_each_other_share_their_rank(tokenizer: Tokenizer) -> None:
    entry = TopLogprobs(-0.5, 2, [10, 65, 66, 67], [-0.25, -0.5, -0.5, -1.0])
    (first, second) = prompt_logprobs_json([1, 66], [entry], 4, tokenizer)
    assert first is None
    assert second is not None
    assert {key: value["rank"] for key, value in second.items()} == {"66": 2, "10": 1, "65": 2, "67": 4}
    assert list(second) == ["66", "10", "65", "67"]


@pytest.mark.parametrize(("k", "members"), [(0, ["66"]), (1, ["66", "10"]), (3, ["66", "10", "65"])])
def test_no_more_likely_tokens_are_shown_than_asked_for(
    tokenizer: Tokenizer, k: int, members: list[str]
) -> None:
    entry = TopLogprobs(-0.5, 2, [10, 65, 66, 67], [-0.25, -0.5, -0.5, -1.0])
    (_, second) = prompt_logprobs_json([1, 66], [entry], k, tokenizer)
    assert list(second or ()) == members


# --- streams ---------------------------------------------------------------------------------------------


def test_the_events_of_a_step_are_one_write(tokenizer: Tokenizer) -> None:
    renderer = CompletionRenderer(HEAD, tokenizer, [PROMPT, PROMPT], 2, OutputOptions())
    written = events(renderer.chunks([ChoiceDelta(3, "c"), ChoiceDelta(0, "a")], USAGE))
    assert [[c["index"] for c in chunk["choices"]] for chunk in written] == [[3], [0]]


def test_a_stream_without_usage_just_ends(tokenizer: Tokenizer) -> None:
    assert events(chat_renderer(tokenizer).last_chunks(USAGE)) == ["data: [DONE]"]


def test_the_usage_chunk_has_no_choices(tokenizer: Tokenizer) -> None:
    chunk, done = events(chat_renderer(tokenizer, include_usage=True).last_chunks(USAGE))
    assert done == "data: [DONE]"
    assert chunk == {
        "id": "x-1",
        "object": "chat.completion.chunk",
        "created": 5,
        "model": "m",
        "system_fingerprint": "f",
        "choices": [],
        "usage": USAGE_JSON,
    }


@pytest.mark.parametrize(("continuous", "expected"), [(False, None), (True, USAGE_JSON)])
def test_chunks_carry_null_or_the_usage_so_far(tokenizer: Tokenizer, continuous: bool, expected: Any) -> None:
    renderer = completion_renderer(tokenizer, include_usage=True, continuous_usage_stats=continuous)
    (chunk,) = events(renderer.chunks([ChoiceDelta(0, "a")], USAGE))
    assert chunk["usage"] == expected


def test_the_role_is_sent_once_for_each_choice(tokenizer: Tokenizer) -> None:
    renderer = ChatRenderer(HEAD, tokenizer, [PROMPT], 2, OutputOptions(), role="bot")
    written = events(renderer.chunks([ChoiceDelta(0, "a"), ChoiceDelta(1, "b")], USAGE))
    written += events(renderer.chunks([ChoiceDelta(0, "c"), ChoiceDelta(1, "d")], USAGE))
    deltas = [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in written]
    assert deltas == [
        (0, {"role": "bot", "content": ""}),
        (0, {"content": "a"}),
        (1, {"role": "bot", "content": ""}),
        (1, {"content": "b"}),
        (0, {"content": "c"}),
        (1, {"content": "d"}),
    ]


def test_the_last_chunk_may_carry_text(tokenizer: Tokenizer) -> None:
    renderer = chat_renderer(tokenizer)
    delta = ChoiceDelta(0, "end", finish_reason="stop", stop_reason="STOP")
    choice = events(renderer.chunks([delta], USAGE))[-1]["choices"][0]
    assert choice == {
        "index": 0,
        "delta": {"content": "end"},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": "STOP",
    }


def test_token_ids_travel_in_every_chunk_and_prompt_ids_in_the_first(tokenizer: Tokenizer) -> None:
    chat = chat_renderer(tokenizer, return_token_ids=True)
    written = events(
        chat.chunks([ChoiceDelta(0, "a", [65])], USAGE) + chat.chunks([ChoiceDelta(0, "b", [66])], USAGE)
    )
    assert [chunk.get("prompt_token_ids") for chunk in written] == [[1, 2, 3], None, None]
    assert [chunk["choices"][0]["token_ids"] for chunk in written] == [[], [65], [66]]
    completion = completion_renderer(tokenizer, return_token_ids=True)
    (first,) = events(completion.chunks([ChoiceDelta(0, "a", [65])], USAGE))
    assert (first["choices"][0]["token_ids"], first["choices"][0]["prompt_token_ids"]) == ([65], [1, 2, 3])
    (second,) = events(completion.chunks([ChoiceDelta(0, "b", [66])], USAGE))
    assert "prompt_token_ids" not in second["choices"][0]


@pytest.mark.parametrize("make", [chat_renderer, completion_renderer])
@pytest.mark.parametrize("include_usage", [True, False])
def test_chunks_with_nothing_but_text_are_rendered_like_all_others(
    tokenizer: Tokenizer, make: Callable[..., Renderer], include_usage: bool
) -> None:
    renderer, other = (make(tokenizer, include_usage=include_usage) for _ in range(2))
    other._parses_text = True  # it takes no short cut
    for text in ("a", "b", '"\\\n\u2028\x00😀', "", "%s{}"):
        deltas = [ChoiceDelta(0, text, [65])]
        assert renderer.chunks(deltas, None) == other.chunks(deltas, USAGE)
    ended = [ChoiceDelta(0, "z", [66], finish_reason="stop")]
    assert renderer.chunks(ended, None) == other.chunks(ended, USAGE)


def test_text_is_valid_json_whatever_is_in_it(tokenizer: Tokenizer) -> None:
    text = '"\\\n\u2028\x00😀'
    (chunk,) = events(completion_renderer(tokenizer).chunks([ChoiceDelta(0, text)], USAGE))
    assert chunk["choices"][0]["text"] == text


def test_an_event_is_one_line() -> None:
    assert event({"a": "x\ny"}) == b'data: {"a":"x\\ny"}\n\n'


# --- whole responses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [completion_renderer, chat_renderer])
def test_a_whole_response_joins_its_deltas(tokenizer: Tokenizer, make: Any) -> None:
    renderer = make(tokenizer, logprobs=0)
    renderer.collect([ChoiceDelta(0, "hello", [HELLO], [top(HELLO, 0)])])
    renderer.collect([ChoiceDelta(0, " world", [WORLD], [top(WORLD, 0)], "length")])
    answer = json.loads(renderer.response(USAGE))
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"] == USAGE_JSON
    if make is chat_renderer:
        assert choice["message"]["content"] == "hello world"
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["hello", " world"]
    else:
        assert choice["text"] == "hello world"
        assert choice["logprobs"]["text_offset"] == [0, 5]

"""Text with calls in it → content and calls, however it is cut."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.api.tool_calls import (
    Arguments,
    CallArrayParser,
    CallStart,
    FirstCallOnly,
    HermesParser,
    JsonScanner,
    Llama3JsonParser,
    NamedCallParser,
    Piece,
    PythonicParser,
    Text,
    ToolCallParser,
)

NAMES = ("f", "get_weather")
MakeParser = Callable[[], ToolCallParser]
Result = tuple[str, list[tuple[str, str]]]  # content, and of each call name and arguments


def hermes() -> ToolCallParser:
    return HermesParser(NAMES)


def llama() -> ToolCallParser:
    return Llama3JsonParser(NAMES)


def pythonic() -> ToolCallParser:
    return PythonicParser(NAMES)


def array() -> ToolCallParser:
    return CallArrayParser(NAMES)


def joined(pieces: Sequence[Piece]) -> Result:
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        match piece:
            case Text(text):
                assert text, "no empty pieces"
                content += text
            case CallStart(name):
                calls.append((name, ""))
            case Arguments(text):
                assert text, "no empty pieces"
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return content, calls


def parse(make: MakeParser, *parts: str) -> Result:
    parser = make()
    pieces = [piece for part in parts for piece in parser.push(part)]
    return joined([*pieces, *parser.finish()])


CASES: list[tuple[MakeParser, str, str, list[tuple[str, str]]]] = [
    (hermes, "Hello!", "Hello!", []),
    (hermes, "", "", []),
    (hermes, "1 < 2 <tool> <tool_call", "1 < 2 <tool> <tool_call", []),
    (hermes, "Trailing. \n", "Trailing. \n", []),
    (hermes, '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
    (hermes, '<tool_call>\n{"name":"f","arguments":{}}\n</tool_call>\n', "", [("f", "{}")]),
    (
        hermes,
        'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln }\\" {"}}\n</tool_call>\n'
        '<tool_call>{"name": "f", "arguments": {"x": [1, {"y": null}]}}</tool_call> Done.',
        "Let me see.Done.",
        [("get_weather", '{"city": "Köln }\\" {"}'), ("f", '{"x": [1, {"y": null}]}')],
    ),
    (hermes, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    (hermes, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (hermes, '<tool_call>{"name": "f", "arguments": {}, "id": 3}</tool_call>', "", [("f", "{}")]),
    (hermes, '<tool_call>{"name": "f", "arguments": {}} and more', "and more", [("f", "{}")]),
    # not calls: content as it is
    (hermes, "a <tool_call> b", "a <tool_call> b", []),
    (
        hermes,
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        [],
    ),
    (hermes, 'a\n<tool_call>{"name": f}</tool_call>', 'a\n<tool_call>{"name": f}</tool_call>', []),
    (hermes, '<tool_call>{"name": ["f"]}', '<tool_call>{"name": ["f"]}', []),
    (hermes, '<tool_call>{"name": "f", "arguments": "x"}', '<tool_call>{"name": "f", "arguments": "x"}', []),
    # cut by length
    (hermes, '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    (hermes, '<tool_call>{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),
    (hermes, '<tool_call>{"name": "f", "arguments": {}}</tool', "", [("f", "{}")]),
    (llama, "Hello, {name}!", "Hello, {name}!", []),
    (llama, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (llama, '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    (llama, ' {"type": "function", "name": "f", "parameters": {"a": "ü"}}', "", [("f", '{"a": "ü"}')]),
    (
        llama,
        '{"name": "f", "parameters": {}}; {"name": "get_weather", "arguments": {"a": "}"}} ;',
        "",
        [("f", "{}"), ("get_weather", '{"a": "}"}')],
    ),
    (llama, '{"answer": 42}', '{"answer": 42}', []),
    (llama, ' {"answer": 42} yes', ' {"answer": 42} yes', []),
    (llama, '{"name": "f", "parameters": {"a": ', "", [("f", '{"a": ')]),
    (llama, '{"name": "f", "param', '{"name": "f", "param', []),
    (llama, "<|python", "<|python", []),
    (pythonic, "[1, 2]", "[1, 2]", []),
    (pythonic, "See [f(a=1)]", "See [f(a=1)]", []),
    (
        pythonic,
        "[f(a=1, b='x)', c=[True, None, -2.5]), get_weather(city=\"A\\\"]\", o={'k': (1, false)})]",
        "",
        [
            ("f", '{"a": 1, "b": "x)", "c": [true, null, -2.5]}'),
            ("get_weather", '{"city": "A\\"]", "o": {"k": [1, false]}}'),
        ],
    ),
    (pythonic, " [ f() , f() ] \n Done.", "Done.", [("f", "{}"), ("f", "{}")]),
    (pythonic, "[f(1)]", "[f(1)]", []),
    (pythonic, "[f(**x)]", "[f(**x)]", []),
    (pythonic, "[f(a=open('x'))]", "[f(a=open('x'))]", []),
    (pythonic, "[nobody(a=1)]", "[nobody(a=1)]", []),
    (pythonic, "[f(a=1", "[f(a=1", []),
    (pythonic, "[f(a=1e999)]", "[f(a=1e999)]", []),
    (array, '[{"name": "f", "parameters": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    (
        array,
        '[ {"name": "f", "parameters": {"a": "}]"}}, {"name": "get_weather", "parameters": {}} ]',
        "",
        [("f", '{"a": "}]"}'), ("get_weather", "{}")],
    ),
    (array, '[{"name": "f", "parameters": {"a"', "", [("f", '{"a"')]),
    (array, '[{"na', "", []),
    (lambda: NamedCallParser("f"), '{"a": 1}', "", [("f", '{"a": 1}')]),
    (lambda: NamedCallParser("f"), "", "", [("f", "")]),
    (
        lambda: FirstCallOnly(llama()),
        '{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 2}}',
        "",
        [("f", '{"a": 1}')],
    ),
]  # fmt: skip
IDS = [f"{i}-{text[:40]}" for i, (_, text, _, _) in enumerate(CASES)]


@pytest.mark.parametrize(("make", "text", "content", "calls"), CASES, ids=IDS)
def test_calls_are_found_and_the_rest_is_content(
    make: MakeParser, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert parse(make, text) == (content, calls)


@pytest.mark.parametrize(("make", "text", "content", "calls"), CASES, ids=IDS)
def test_where_the_text_is_cut_makes_no_difference(
    make: MakeParser, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert parse(make, *text) == (content, calls)
    for first in range(len(text) + 1):
        assert parse(make, text[:first], text[first:]) == (content, calls), first


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<tool_", '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "parameters": {}}',
    '{"name":', '"', "\\", "{", "}", "[", "]", "f(", "a='", "'", ")", "[f(a=1)", ", ", "; ", " ", "\n", "x",
    "<|python_tag|>",
]  # fmt: skip
PARSERS: list[MakeParser] = [hermes, llama, pythonic, array]


@given(
    st.sampled_from(PARSERS),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.data(),
)
def test_any_text_is_parsed_the_same_in_any_pieces(make: MakeParser, text: str, data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(make, *parts) == parse(make, text)


@given(
    st.sampled_from([hermes, llama, pythonic]), st.text(st.characters(exclude_characters="<{["), max_size=40)
)
def test_text_without_calls_arrives_unchanged(make: MakeParser, text: str) -> None:
    assert parse(make, text) == (text, [])


@pytest.mark.parametrize("make", [hermes, llama, pythonic])
def test_only_what_may_begin_a_call_is_held_back(make: MakeParser) -> None:
    parser = make()
    assert parser.push("Hello") == [Text("Hello")]
    assert not parser.is_holding_back


def test_arguments_are_shown_as_they_arrive() -> None:
    parser = hermes()
    assert parser.push('<tool_call>{"name": "f", "arguments": ') == []
    assert parser.is_holding_back
    assert parser.push('{"a') == [CallStart("f"), Arguments('{"a')]
    assert not parser.is_holding_back
    assert parser.push('": "}') == [Arguments('": "}')]
    assert parser.push('"}}</tool_call>') == [Arguments('"}')]
    assert parser.push("x") == [Text("x")]


@pytest.mark.parametrize("make", [hermes, llama, pythonic, array])
@pytest.mark.parametrize(
    "text", [" " * 300_000 + "x", '<tool_call>{"name"' + " " * 300_000, "[f(" + "'\\" * 300_000]
)
def test_odd_text_costs_no_more_than_its_length(make: MakeParser, text: str) -> None:
    started = time.monotonic()
    parse(make, text)
    assert time.monotonic() - started < 2


def test_deep_nesting_is_no_call() -> None:
    depth = 100_000
    for make, text in (
        (hermes, '<tool_call>{"x":' + "[" * depth + "]" * depth + "}"),
        (pythonic, "[f(a=" + "[" * depth + "]" * depth + ")]"),
    ):
        assert parse(make, text) == (text, [])


@given(
    st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_the_end_of_a_json_object_is_found(value: Any) -> None:
    text = json.dumps({"value": value})
    assert JsonScanner().until(0, text + "}]") == len(text)
    scanner = JsonScanner()
    assert [scanner.until(0, character) for character in text] == [None] * (len(text) - 1) + [1]

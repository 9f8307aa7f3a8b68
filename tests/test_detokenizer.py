"""Incremental detokenization equals the decoding of everything at once, and stop strings cut it exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.detokenizer import Detokenizer
from jaxserve.tokenizer import Decoding, Tokenizer
from tests.tiny_tokenizers import FAMILIES, SPECIAL, backend_of, tokenizer_of

USUAL = ["byte level", "SentencePiece", "Unigram", "WordPiece"]
PADDING = 3  # ids beyond the vocabulary, as padded models have them

families = st.sampled_from(sorted(FAMILIES))
seeds = st.lists(st.integers(0, 10**6), max_size=24)
cuts = st.lists(st.integers(1, 4), min_size=1, max_size=8)


def ids_from(tokenizer: Tokenizer, numbers: Sequence[int]) -> list[int]:
    """Ids of all kinds; every second number prefers bytes and special tokens, where decoding is difficult."""
    odd = sorted(tokenizer.byte_token_ids)[0xC0:0xF5:5] + sorted(tokenizer.byte_token_ids)[0x80:0xC0:9]
    odd += sorted(tokenizer.special_token_ids)
    every = tokenizer.vocab_size + PADDING
    return [odd[n // 2 % len(odd)] if n % 2 else n // 2 % every for n in numbers]


def chunks_of(ids: list[int], sizes: Sequence[int]) -> list[list[int]]:
    chunks, start = [], 0
    while start < len(ids):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(ids[start : start + size])
        start += size
    return chunks


class Answer(NamedTuple):
    text: str
    stopped: str | None
    num_tokens: int


def run(detokenizer: Detokenizer, chunks: list[list[int]]) -> tuple[list[str], Answer]:
    """(what was shown, piece by piece; all of it)."""
    shown, num_tokens = [], 0
    for chunk in chunks:
        delta = detokenizer.push(chunk)
        shown.append(delta.text)
        num_tokens += delta.num_tokens_used
        if delta.stopped is not None:
            return shown, Answer("".join(shown), delta.stopped, num_tokens)
    delta = detokenizer.finish()
    shown.append(delta.text)
    return shown, Answer("".join(shown), delta.stopped, num_tokens)


# --- Text ---------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(family=families, numbers=seeds, sizes=cuts, skip=st.booleans())
def test_joined_pieces_equal_the_librarys_decoding_of_everything(
    family: str, numbers: list[int], sizes: list[int], skip: bool
) -> None:
    tokenizer = tokenizer_of(family)
    ids = ids_from(tokenizer, numbers)
    whole = backend_of(family).decode(ids, skip_special_tokens=skip)
    shown, answer = run(Detokenizer(tokenizer, skip_special_tokens=skip), chunks_of(ids, sizes))
    assert answer == Answer(whole, None, len(ids))
    for end in range(len(shown)):  # nothing is ever shown that is taken back, and so no half character
        assert whole.startswith("".join(shown[:end]))


@settings(max_examples=150, deadline=None)
@given(family=families, numbers=seeds)
def test_joined_pieces_equal_decode_without_spaces_between_special_tokens(
    family: str, numbers: list[int]
) -> None:
    tokenizer = tokenizer_of(family)
    ids = ids_from(tokenizer, numbers)
    flags = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    _, answer = run(Detokenizer(tokenizer, **flags), chunks_of(ids, [1]))
    assert answer.text == tokenizer.decode(ids, **flags)


@pytest.mark.parametrize("family", USUAL)
def test_ordinary_text_is_shown_without_delay(family: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode("the dog isn't lazy", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    for end in range(1, len(ids) + 1):
        detokenizer.push([ids[end - 1]])
        assert not detokenizer.is_holding_back
    assert detokenizer.finish().text == ""


def test_a_character_of_several_tokens_is_shown_with_its_last_byte() -> None:
    detokenizer = Detokenizer(tokenizer_of("byte level"))
    shown = [detokenizer.push(token).text for token in letters("aÿ🦊")]
    assert shown == ["a", "", "ÿ", "", "", "", "🦊"]


def test_an_incomplete_character_at_the_end_becomes_one_replacement_character() -> None:
    detokenizer = Detokenizer(tokenizer_of("byte level"))
    *pieces, _ = letters("a🦊")
    assert [detokenizer.push(piece).text for piece in pieces] == ["a", "", "", ""]
    assert detokenizer.is_holding_back
    assert detokenizer.finish().text == "\ufffd"


def test_a_run_of_byte_tokens_is_text_when_it_ends_as_for_the_librarys_decoder() -> None:
    tokenizer = tokenizer_of("SentencePiece")
    fox = [tokenizer_id(tokenizer, f"<0x{byte:02X}>") for byte in "🦊".encode()]
    the = tokenizer.encode("the", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]).text for i in fox] == ["", "", "", ""]
    assert detokenizer.push(the).text == "🦊 the"
    broken = Detokenizer(tokenizer)
    assert broken.push(fox[:3]).text == ""
    assert broken.push(the).text == backend_of("SentencePiece").decode(fox[:3] + the) == "\ufffd" * 3 + " the"


@pytest.mark.parametrize("silent", ["special", "unknown"])
def test_a_token_without_text_does_not_end_a_run_of_byte_tokens(silent: str) -> None:
    tokenizer = tokenizer_of("SentencePiece")
    first, second = (tokenizer_id(tokenizer, name) for name in ("<0xC3>", "<0xA9>"))
    between = tokenizer_id(tokenizer, "</s>") if silent == "special" else tokenizer.vocab_size + 1
    ids = [first, between, second]
    assert run(Detokenizer(tokenizer), chunks_of(ids, [1]))[1].text == "é"
    assert backend_of("SentencePiece").decode(ids, skip_special_tokens=True) == "é"


def tokenizer_id(tokenizer: Tokenizer, token: str) -> int:
    (found,) = [i for i in range(tokenizer.vocab_size) if tokenizer._backend.id_to_token(i) == token]
    return found


def test_the_families_are_decoded_by_the_rule_that_is_exact_for_them() -> None:
    assert {family: tokenizer_of(family).decoding for family in FAMILIES} == {
        "byte level": Decoding.BYTES,
        "SentencePiece": Decoding.PIECES,
        "Unigram": Decoding.PIECES,
        "WordPiece": Decoding.PIECES,
        "suffixed": Decoding.WHOLE,
        "replaced": Decoding.WHOLE,
    }


# --- Stop strings -------------------------------------------------------------------------------------------


def expected(
    tokenizer: Tokenizer, ids: list[int], stop: list[str], include: bool, min_tokens: int, skip: bool
) -> Answer:
    """The rules, written down plainly: after each token look at the whole text, character by character."""

    def text_of(end: int) -> str:
        return backend_of_tokenizer(tokenizer).decode(ids[:end], skip_special_tokens=skip)

    def settled(end: int) -> str:
        """The text after `end` tokens, as far as no token to come can change it or its end here would make it so."""
        if tokenizer.decoding is Decoding.BYTES:
            special = tokenizer.special_token_ids if skip else frozenset()
            data = b"".join(tokenizer.token_bytes(i) for i in ids[:end] if i not in special)
            for length in range(1, 4):  # cut an incomplete character off
                tail = data[-length:]
                if tail and tail[0] >= 0xC0 and is_prefix_of_a_character(tail):
                    return data[:-length].decode("utf-8", "replace")
            return text_of(end)
        run = end  # where the byte tokens at the end begin
        for i in range(end - 1, -1, -1):
            if ids[i] in tokenizer.byte_token_ids:
                run = i
            elif not (skip and ids[i] in tokenizer.special_token_ids) and tokenizer.knows(ids[i]):
                break
        data = b"".join(tokenizer.token_bytes(i) for i in ids[run:end] if i in tokenizer.byte_token_ids)
        return text_of(run) if is_broken(data) else text_of(end)

    if len(ids) < min_tokens:
        return Answer(text_of(len(ids)), None, len(ids))
    searched_from = len(settled(max(min_tokens - 1, 0)))
    for end in range(max(min_tokens, 1), len(ids) + 2):
        text = settled(end) if end <= len(ids) else text_of(len(ids))
        for length in range(searched_from + 1, len(text) + 1):
            for string in stop:
                begin = length - len(string)
                if begin >= searched_from and text[begin:length] == string:
                    return Answer(text[: length if include else begin], string, min(end, len(ids)))
    return Answer(text_of(len(ids)), None, len(ids))


def backend_of_tokenizer(tokenizer: Tokenizer) -> object:
    return next(backend_of(f) for f in FAMILIES if tokenizer_of(f) is tokenizer)


def is_broken(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return True
    return False


def is_prefix_of_a_character(tail: bytes) -> bool:
    """Whether some continuation bytes make a character of it (or a surrogate: Python waits for its end, too)."""
    for filler in (b"\x80", b"\x90", b"\xa0", b"\xbf"):
        for more in range(1, 4):
            try:
                if len((tail + filler * more).decode("utf-8", "surrogatepass")) == 1:
                    return True
            except UnicodeDecodeError:
                continue
    return False


@st.composite
def stop_lists(draw: st.DrawFn, text: str) -> list[str]:
    """Stop strings that occur, nearly occur, overlap and repeat."""
    strings = []
    for _ in range(draw(st.integers(1, 4))):
        if text and draw(st.booleans()):
            begin = draw(st.integers(0, len(text) - 1))
            string = text[begin : begin + draw(st.integers(1, 5))]
            strings.append(string + draw(st.sampled_from(["", "", "x", " "])))
        else:
            strings.append(draw(st.text("ab \ufffd", min_size=1, max_size=3)))
    return strings


@settings(max_examples=300, deadline=None)
@given(data=st.data(), family=st.sampled_from(USUAL), numbers=seeds, sizes=cuts, include=st.booleans())
def test_stop_strings_cut_as_the_plain_rules_say(
    data: st.DataObject, family: str, numbers: list[int], sizes: list[int], include: bool
) -> None:
    tokenizer = tokenizer_of(family)
    ids = ids_from(tokenizer, numbers)
    skip = data.draw(st.booleans())
    stop = data.draw(stop_lists(backend_of(family).decode(ids, skip_special_tokens=skip)))
    min_tokens = data.draw(st.integers(0, 6))
    detokenizer = Detokenizer(
        tokenizer,
        skip_special_tokens=skip,
        stop=stop,
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )
    shown, answer = run(detokenizer, chunks_of(ids, sizes))
    want = expected(tokenizer, ids, stop, include, min_tokens, skip)
    assert answer == want
    for end in range(len(shown)):  # no part of a stop string, and no half character, is ever shown
        assert want.text.startswith("".join(shown[:end]))


def letters(text: str) -> list[list[int]]:
    """The text as tokens of one byte, for rules that are about characters."""
    tokenizer = tokenizer_of("byte level")
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [[ids[bytes([byte])]] for byte in text.encode()]


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "stopped"),
    [
        ("abXYcd", ["XY"], ["a", "b", "", ""], "XY"),
        ("abXZcd", ["XY"], ["a", "b", "", "XZ", "c", "d", ""], None),
        ("abX", ["XY"], ["a", "b", "", "X"], None),  # released at the end
        ("aaab", ["aab"], ["", "", "a", ""], "aab"),
        ("xabcd", ["abcde", "bc"], ["x", "", "", "a"], "bc"),  # completed first, though begun later
        ("xabc", ["bc", "abc"], ["x", "", "", "a"], "bc"),  # completed together: the first in the list
        ("xabc", ["abc", "bc"], ["x", "", "", ""], "abc"),
        ("ab", ["b", "b"], ["a", ""], "b"),
        ("é\n\n", ["\n\n"], ["", "é", "", ""], "\n\n"),
    ],
)
def test_what_may_become_a_stop_string_is_held_back(
    text: str, stop: list[str], pieces: list[str], stopped: str | None
) -> None:
    detokenizer = Detokenizer(tokenizer_of("byte level"), stop=stop)
    shown, answer = run(detokenizer, letters(text))
    assert shown == pieces
    assert answer.stopped == stopped


def test_with_the_stop_string_included_nothing_is_held_back() -> None:
    detokenizer = Detokenizer(tokenizer_of("byte level"), stop=["XYZ"], include_stop_str_in_output=True)
    shown, answer = run(detokenizer, letters("aXYaXYZb"))
    assert shown == ["a", "X", "Y", "a", "X", "Y", "Z"]
    assert answer == Answer("aXYaXYZ", "XYZ", 7)


@pytest.mark.parametrize(("include", "text"), [(False, "the "), (True, "the qu")])
def test_text_behind_the_stop_string_is_never_shown_even_of_the_same_token(include: bool, text: str) -> None:
    tokenizer = tokenizer_of("byte level")
    ids = tokenizer.encode("the quick dog", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, stop=["qu"], include_stop_str_in_output=include)
    delta = detokenizer.push(ids)
    assert (delta.text, delta.stopped) == (text, "qu")
    used = backend_of("byte level").decode(ids[: delta.num_tokens_used])
    before = backend_of("byte level").decode(ids[: delta.num_tokens_used - 1])
    assert "qu" in used
    assert "qu" not in before
    assert detokenizer.finish().text == ""


def test_a_stop_string_of_byte_tokens_stops_with_its_last_byte() -> None:
    tokenizer = tokenizer_of("SentencePiece")
    fox = [tokenizer_id(tokenizer, f"<0x{byte:02X}>") for byte in "🦊".encode()]
    detokenizer = Detokenizer(tokenizer, stop=["🦊"])
    assert [detokenizer.push([i]).stopped for i in fox] == [None, None, None, "🦊"]


def test_stop_strings_are_looked_for_in_the_text_as_shown() -> None:
    tokenizer = tokenizer_of("byte level")
    end = tokenizer_id(tokenizer, "</s>")
    (a,), (b,) = letters("ab")
    assert Detokenizer(tokenizer, stop=["ab"]).push([a, end, b]).stopped == "ab"
    kept = Detokenizer(tokenizer, stop=["ab", "/s"], skip_special_tokens=False)
    assert kept.push([a, end, b]) == ("a<", "/s", 2)


@pytest.mark.parametrize(
    ("min_tokens", "want"),
    [
        (0, Answer("a", "XY", 3)),
        (3, Answer("aXYb", "XY", 6)),  # the first occurrence begins before the third token
        (5, Answer("aXYb", "XY", 6)),
        (6, Answer("aXYbXY", None, 6)),
    ],
)
def test_stop_strings_are_not_looked_for_in_text_from_before_min_tokens(
    min_tokens: int, want: Answer
) -> None:
    detokenizer = Detokenizer(tokenizer_of("byte level"), stop=["XY"], min_tokens=min_tokens)
    assert run(detokenizer, letters("aXYbXY"))[1] == want


@pytest.mark.parametrize("family", USUAL)
def test_a_token_costs_microseconds(family: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.byte_token_ids] * 40
    for _ in range(2):  # the first round fills the tables
        detokenizer = Detokenizer(tokenizer, stop=["never said", "</never>"])
        begin = time.perf_counter()
        detokenizer.push(ids)
        took = time.perf_counter() - begin
    assert took / len(ids) < 50e-6  # about 2 µs; the margin is for busy machines


def test_the_special_tokens_of_these_tests_are_special() -> None:
    for family in FAMILIES:
        tokenizer = tokenizer_of(family)
        assert {tokenizer._backend.id_to_token(i) for i in tokenizer.special_token_ids} == set(SPECIAL)

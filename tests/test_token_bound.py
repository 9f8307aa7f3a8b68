"""The bound on a text's tokens: never above the real number, and near it where it matters."""

from __future__ import annotations

import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from jaxserve.token_bound import TokenBound
from jaxserve.tokenizer import BYTES_OF_CHARACTERS, Tokenizer
from tests.tiny_tokenizers import FAMILIES, SPECIAL, backend_of, tokenizer_of

pytestmark = pytest.mark.timing

BOUNDED = ("byte level", "SentencePiece")


def byte_level(*merges: tuple[str, str]) -> tokenizers.Tokenizer:
    """Every byte, and what is merged of them."""
    vocab = dict(BYTES_OF_CHARACTERS)
    for first, second in merges:
        vocab[first + second] = len(vocab)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


def growing(word: str) -> list[tuple[str, str]]:
    """The merges that make one token of a word of different characters."""
    return [(word[:end], word[end]) for end in range(1, len(word))]


def bound_of(backend: tokenizers.Tokenizer) -> TokenBound:
    return TokenBound(backend, BYTES_OF_CHARACTERS)


texts = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*SPECIAL, "the ", "12", " ", "▁", "é", "世", "isn't", "\n    "]), max_size=20
    ).map("".join),
)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_no_text_has_fewer_tokens_than_its_bound(family: str, text: str) -> None:
    tokenizer = tokenizer_of(family)
    assert tokenizer.min_num_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_tokenizers_that_keep_all_text_have_a_bound(family: str) -> None:
    assert bound_of(backend_of(family)).exists == (family in (*BOUNDED, "replaced"))


def test_each_kind_of_bytes_has_a_bound_of_its_own() -> None:
    dashes = [("-", "-"), ("--", "--"), ("----", "----")]
    bound = bound_of(byte_level(*dashes, *growing("abcdef"), ("1", "2")))
    assert bound("-" * 1000) == 125
    assert bound("abcdef" * 100) == 100
    assert bound("7" * 1000) == 500
    assert bound("7" * 100 + "-" * 40) == 50
    assert bound("é" * 100) == 200
    assert bound("") == 0


def test_the_text_of_an_added_token_is_one_token() -> None:
    backend = byte_level()
    backend.add_special_tokens(["<1234567890>"])
    assert bound_of(backend)("<1234567890>" * 10) == len(backend.encode("<1234567890>" * 10).ids) == 10


def test_a_text_of_meta_spaces_is_bounded_by_what_they_are_for_the_tokenizer() -> None:
    characters = {byte: character for character, byte in BYTES_OF_CHARACTERS.items()}
    a, b, c = (characters[byte] for byte in "▁".encode())
    backend = byte_level((a, b), (a + b, c), (a + b + c, a + b + c))
    assert len(backend.encode("▁▁").ids) == 1
    assert bound_of(backend)("▁▁") == 1


def test_there_is_no_bound_where_text_may_be_lost() -> None:
    swallowing = byte_level()
    swallowing.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    stripping = byte_level()
    stripping.normalizer = normalizers.Strip()
    dropping = byte_level()
    dropping.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    for backend in (swallowing, stripping, dropping):
        assert not bound_of(backend).exists
        assert bound_of(backend)("1" * 1000) == 0


def test_bytes_that_no_token_has_are_not_counted() -> None:
    vocab = {character: byte for character, byte in BYTES_OF_CHARACTERS.items() if byte != ord("A")}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert bound_of(backend)("A" * 1000 + "BB") == len(backend.encode("A" * 1000 + "BB").ids) == 2


def test_composed_characters_are_bounded_only_in_ascii_texts() -> None:
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    assert bound_of(backend)("1" * 1000) == 1000
    assert bound_of(backend)("1" * 1000 + "e\u0301") == 0


@pytest.mark.parametrize("text", ["1" * 4_000_000, "a" * 4_000_000, " " * 4_000_000, "世" * 1_300_000])
def test_megabytes_are_bounded_at_once(text: str) -> None:
    tokenizer: Tokenizer = tokenizer_of("byte level")
    began = time.process_time()
    assert tokenizer.min_num_tokens(text) > 100_000
    assert time.process_time() - began < 0.5

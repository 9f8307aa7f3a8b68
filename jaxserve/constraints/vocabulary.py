"""The model's vocabulary as bytes: what each token adds to the text of the output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxserve.tokenizer import Decoding, Tokenizer

WORD_BITS = 32


@dataclass(frozen=True)
class Vocabulary:
    """Bytes of the V tokens.

    Attributes:
        tokens: by id; empty for special tokens and ids without a text, which constrained text never holds.
        first_tokens: the bytes of those that differ as the first of an output (SentencePiece drops a space there).
        eos_token_ids: ids that end a sequence; each below V.
    """

    tokens: tuple[bytes, ...]
    first_tokens: dict[int, bytes]
    eos_token_ids: tuple[int, ...]

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokens)

    @property
    def mask_words(self) -> int:
        """Length of a packed mask in int32 words: bit i % 32 of word i // 32 is token i."""
        return -(-self.size // WORD_BITS)

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> Vocabulary:
        """The vocabulary of a tokenizer for a model of `vocab_size` logits.

        Raises:
            ValueError: a token's text depends on its neighbours, so that it has no bytes of its own.
        """
        if tokenizer.decoding is Decoding.WHOLE:
            raise ValueError(
                "the tokenizer's decoder looks at whole texts, so tokens have no bytes of their own"
            )
        eos = tuple(token_id for token_id in dict.fromkeys(eos_token_ids) if token_id < vocab_size)
        silent = tokenizer.special_token_ids | set(eos)
        tokens = [
            b"" if token_id in silent or not tokenizer.knows(token_id) else tokenizer.token_bytes(token_id)
            for token_id in range(vocab_size)
        ]
        first = {}
        if tokenizer.decoding is Decoding.PIECES:
            for token_id, own in enumerate(tokens):
                if own and token_id not in tokenizer.byte_token_ids:
                    text = tokenizer.decode([token_id], skip_special_tokens=False).encode()
                    if text != own:
                        first[token_id] = text
        return cls(tuple(tokens), first, eos)


def pack(token_ids: Iterable[int], num_words: int) -> NDArray[np.int32]:
    """A mask with the bits of `token_ids`."""
    row = np.zeros(num_words, np.uint32)
    for token_id in token_ids:
        row[token_id // WORD_BITS] |= np.uint32(1 << (token_id % WORD_BITS))
    return row.view(np.int32)


def unpack(row: NDArray[np.int32], size: int) -> NDArray[np.bool_]:
    """The first `size` bits of a packed mask, one value each."""
    return np.unpackbits(row.view(np.uint8), count=size, bitorder="little").view(np.bool_)


def pack_bits(bits: NDArray[np.bool_], num_words: int) -> NDArray[np.int32]:
    """The packed form of one value per token."""
    row = np.zeros(num_words * 4, np.uint8)
    packed = np.packbits(bits, bitorder="little")
    row[: len(packed)] = packed
    return row.view(np.int32)

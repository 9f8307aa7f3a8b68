"""How many tokens a text has at least, without tokenizing it.

Megabytes of text take seconds to tokenize. Where they cannot fit into the model's context anyway, counting bytes
shows it in milliseconds, because a token has only so many digits, letters or other bytes.

A text never has fewer tokens than its bound. So there is no bound for tokenizers that may drop text, or make one
token of any amount of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import models

META_SPACE = "▁"  # how SentencePiece writes a space
UNICODE_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
# One token may have many bytes of one set (a line of dashes) and few of another (digits).
BYTE_SETS = tuple(
    bytes(values)
    for values in (
        b"0123456789",
        b"abcdefghijklmnopqrstuvwxyz",
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        b" \t\r\n",
        range(0x80, 0x100),
        range(0x100),
    )
)


class TokenBound:
    """A lower bound of the number of tokens of a text.

    Args:
        bytes_of_characters: the byte that each character of a byte-level vocabulary stands for.

    Attributes:
        exists: False if this tokenizer has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bytes_of_characters: Mapping[str, int]) -> None:
        normalizers = _steps(backend.normalizer, "normalizers")
        pre_tokenizers = _steps(backend.pre_tokenizer, "pretokenizers")
        added = backend.get_added_tokens_decoder().values()
        vocabulary = backend.get_vocab(with_added_tokens=False)
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in pre_tokenizers)
        self._only_ascii = any(step["type"] in UNICODE_FORMS for step in normalizers)
        self.exists = (
            _is_plain_bpe(backend.model)
            and all(map(_keeps_text, normalizers))
            and all(map(_only_splits, pre_tokenizers))
            and not any(
                token.lstrip or token.rstrip for token in added
            )  # these take any amount of space along
            and (self._is_byte_level or _has_byte_tokens(backend.model, vocabulary))
        )
        # (bytes that are not counted, the most others in one token)
        self._limits: list[tuple[bytes, int]] = []
        if self.exists:
            pieces = [token.content.encode() for token in added]
            pieces += self._pieces(vocabulary, bytes_of_characters)
            lost = self._lost_bytes(vocabulary, bytes_of_characters)
            for counted in BYTE_SETS:
                others = bytes(value for value in range(0x100) if value not in counted or value in lost)
                self._limits.append((others, _most(pieces, others)))

    def __call__(self, text: str) -> int:
        """Tokens that `text` has at least, special ones that are added to it not counted."""
        if not self.exists or (self._only_ascii and not text.isascii()):
            return 0
        raw = (text if self._is_byte_level else text.replace(META_SPACE, " ")).encode()
        return max(-(-len(raw.translate(None, others)) // most) for others, most in self._limits)

    def _lost_bytes(
        self, vocabulary: Mapping[str, int], bytes_of_characters: Mapping[str, int]
    ) -> frozenset[int]:
        """Bytes that no token has: the tokenizer leaves them out."""
        if not self._is_byte_level:
            return frozenset()
        return frozenset(
            byte for character, byte in bytes_of_characters.items() if character not in vocabulary
        )

    def _pieces(
        self, vocabulary: Mapping[str, int], bytes_of_characters: Mapping[str, int]
    ) -> Iterable[bytes]:
        if not self._is_byte_level:
            return (token.replace(META_SPACE, " ").encode() for token in vocabulary)
        table = {ord(character): chr(byte) for character, byte in bytes_of_characters.items()}
        named = (token.translate(table) for token in vocabulary)
        return (
            token.encode("latin-1") for token in named if all(character < "\u0100" for character in token)
        )


def _has_byte_tokens(model: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether what is not in the vocabulary becomes one token a byte."""
    return bool(model.byte_fallback) and all(f"<0x{value:02X}>" in vocabulary for value in range(0x100))


def _most(pieces: Iterable[bytes], others: bytes) -> int:
    """The most bytes in one piece, not counting `others`; at least 1, for bytes that are tokens themselves."""
    most = 1
    for piece in pieces:
        if len(piece) > most:
            most = max(most, len(piece.translate(None, others)))
    return most


def _steps(component: Any, members: str) -> list[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's description, sequences laid flat."""
    return [] if component is None else _flat(json.loads(component.__getstate__()), members)


def _flat(step: dict[str, Any], members: str) -> list[dict[str, Any]]:
    if step["type"] == "Sequence":
        return [inner for member in step[members] for inner in _flat(member, members)]
    return [step]


def _is_plain_bpe(model: Any) -> bool:
    return (
        isinstance(model, models.BPE) and not model.continuing_subword_prefix and not model.end_of_word_suffix
    )


def _keeps_text(normalizer: dict[str, Any]) -> bool:
    """Only adds to a text, puts "▁" for spaces, or composes characters that are not ASCII."""
    if normalizer["type"] == "Replace":
        return bool(normalizer["pattern"] == {"String": " "} and normalizer["content"] == META_SPACE)
    return normalizer["type"] in UNICODE_FORMS | {"Prepend"}


def _only_splits(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] == "Split":
        return bool(pre_tokenizer["behavior"] != "Removed")
    return pre_tokenizer["type"] in ("ByteLevel", "Digits", "Metaspace")

"""Token ids → text, piece by piece and exactly, with stop strings.

Joined pieces equal `tokenizer.decode` of all generated ids. (So, like the whole decode, the text of a SentencePiece
model begins without the space that its first token may carry.) A character is sent once it is complete, and
no character that may still become part of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from jaxserve.tokenizer import Family, Tokenizer


class TextDelta(NamedTuple):
    """Text that may be shown now.

    Attributes:
        stopped: the stop string that ended the text, or None.
        num_tokens_used: how many of the pushed tokens count: up to and including the one that stopped.
    """

    text: str
    stopped: str | None = None
    num_tokens_used: int = 0


class Detokenizer:
    """The text of one growing sequence.

    Args:
        stop: strings that end the text. The occurrence that is completed first wins; of several that end with
            the same character, the first in the list.
        include_stop_str_in_output: cut behind the stop string instead of before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
    ) -> None:
        decoder: _Decoder
        if tokenizer.family is Family.BYTE_LEVEL:
            decoder = _ByteDecoder(tokenizer, skip_special_tokens)
        else:
            decoder = _WindowDecoder(tokenizer, skip_special_tokens, spaces_between_special_tokens)
        self._decoder = decoder
        self._stops = StopStrings(stop, include_stop_str_in_output)

    @property
    def is_holding_back(self) -> bool:
        """Whether text of tokens already pushed is withheld."""
        return self._decoder.incomplete or bool(self._stops.held)

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens."""
        shown = ""
        for count, token_id in enumerate(token_ids, start=1):
            text, stopped = self._stops.push(self._decoder.push(token_id))
            shown += text
            if stopped is not None:
                return TextDelta(shown, stopped, count)
        return TextDelta(shown, None, len(token_ids))

    def finish(self) -> TextDelta:
        """The sequence has ended: release what was withheld. An incomplete character becomes U+FFFD."""
        shown, stopped = self._stops.push(self._decoder.finish())
        return TextDelta(shown if stopped is not None else shown + self._stops.release(), stopped)


class StopStrings:
    """Finds the first completed stop string in a text that arrives in pieces.

    Attributes:
        held: the end of the text so far that may become part of a stop string.
    """

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._stop = tuple(stop)
        self._include = include
        self._longest = max((len(s) for s in self._stop), default=0)
        self._context = ""  # the last characters already shown, where a stop string may have begun
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(what may be shown, the stop string found or None)."""
        if not self._stop or not text:
            return text, None
        before = self._context if self._include else self.held
        window = before + text
        found = self._first_completed(window, len(before))
        if found is not None:
            stop, end = found
            self.held = self._context = ""
            cut = end if self._include else end - len(stop)
            return window[len(before) : cut] if self._include else window[:cut], stop
        if self._include:
            self._context = window[-(self._longest - 1) :] if self._longest > 1 else ""
            return text, None
        shown = len(window) - self._num_held(window)
        self.held = window[shown:]
        return window[:shown], None

    def release(self) -> str:
        """What was held back, once it is sure that nothing follows."""
        held, self.held = self.held, ""
        return held

    def _first_completed(self, window: str, num_old: int) -> tuple[str, int] | None:
        """(stop string, end) of the occurrence that ends first, beyond the `num_old` characters searched before."""
        best: tuple[str, int] | None = None
        for stop in self._stop:
            start = window.find(stop, max(num_old - len(stop) + 1, 0))
            if start >= 0 and (best is None or start + len(stop) < best[1]):
                best = stop, start + len(stop)
        return best

    def _num_held(self, window: str) -> int:
        """Length of the longest suffix that is a proper prefix of a stop string."""
        for length in range(min(self._longest - 1, len(window)), 0, -1):
            suffix = window[-length:]
            if any(len(stop) > length and stop.startswith(suffix) for stop in self._stop):
                return length
        return 0


class _Decoder(Protocol):
    @property
    def incomplete(self) -> bool:
        """Whether a pushed token's text is not decided yet."""
        ...

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteDecoder:
    """Byte-level vocabularies: the text is the UTF-8 decoding of the tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def incomplete(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Other vocabularies: decode the last tokens with and without the new one; the difference is its text.

    A run of byte tokens is one piece, as it is for the tokenizers' own decoder: whether any of it is text is
    known only when it ends.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, spaces: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces
        self._context: list[int] = []  # tokens whose text has been given: what the new ones are decoded behind
        self._new: list[int] = []
        self._holding_bytes = False

    @property
    def incomplete(self) -> bool:
        return bool(self._new)

    def push(self, token_id: int) -> str:
        if self._skip and token_id in self._tokenizer.special_token_ids:
            return ""
        is_byte = self._tokenizer.is_byte_token(token_id)
        text = ""
        if self._new and not is_byte:
            text = self._flush()
        self._new.append(token_id)
        return text if is_byte else text + self._flush()

    def finish(self) -> str:
        return self._flush() if self._new else ""

    def _flush(self) -> str:
        before, after = self._decode(self._context), self._decode(self._context + self._new)
        # a token without text leaves the context as it is: the next one still needs something to stand behind
        text = after[len(before) :]
        if text or not self._context:
            self._context = self._context + self._new if not before else self._context[-1:] + self._new
            if before:
                self._context = self._trim(self._context)
        self._new = []
        return text

    def _trim(self, context: list[int]) -> list[int]:
        """The shortest tail that has text of its own, so that the context does not grow."""
        for start in range(len(context) - 1, 0, -1):
            if self._decode(context[start:]):
                return context[start:]
        return context

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=self._skip, spaces_between_special_tokens=self._spaces
        )

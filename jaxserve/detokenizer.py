"""Token ids → text, piece by piece and exactly, with stop strings.

Joined pieces equal `tokenizer.decode` of all generated ids, whatever the chunking. (So, like that decode, the text of
a SentencePiece model begins without the space that its first token may carry.) A character is sent once it is
complete, and no character that may still become part of a stop string.
"""

from __future__ import annotations

import codecs
import copy
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from jaxserve.tokenizer import Decoding, Tokenizer

REPLACEMENT = "\ufffd"


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
        min_tokens: stop strings are looked for in the text of this token (counted from 1) and those after it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = _make_decoder(tokenizer, skip_special_tokens, spaces_between_special_tokens)
        self._stops = StopStrings(stop, include_stop_str_in_output) if stop else None
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_exempt = 0  # characters of the decoder's undecided text that are from before min_tokens
        self._stopped = False

    @property
    def is_holding_back(self) -> bool:
        """Whether text of tokens already pushed is withheld."""
        return self._decoder.incomplete or (self._stops is not None and bool(self._stops.held))

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Take the next tokens; none may follow once the text has stopped."""
        texts = []
        for count, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            text, stopped = self._search(self._decoder.push(token_id))
            if stopped is None and self._completes_stop_string():
                rest, stopped = self._search(self._decoder.finish())
                text += rest
            texts.append(text)
            if stopped is not None:
                self._stopped = True
                return TextDelta("".join(texts), stopped, count)
        return TextDelta("".join(texts), None, len(token_ids))

    def finish(self) -> TextDelta:
        """The sequence has ended: release what was withheld. An incomplete character becomes U+FFFD."""
        if self._stopped:
            return TextDelta("")
        text, stopped = self._search(self._decoder.finish())
        if stopped is None and self._stops is not None:
            text += self._stops.release()
        self._stopped = True
        return TextDelta(text, stopped)

    def fork(self) -> Detokenizer:
        """Another detokenizer that has seen the same tokens."""
        other = copy.copy(self)
        other._decoder = self._decoder.fork()
        other._stops = copy.copy(self._stops)
        return other

    def _search(self, text: str) -> tuple[str, str | None]:
        if self._stops is None or not text:
            return text, None
        if self._num_tokens < self._min_tokens:
            self._num_exempt = 0
            return text, None
        exempt, text = text[: self._num_exempt], text[self._num_exempt :]
        self._num_exempt = 0
        shown, stopped = self._stops.push(text)
        return exempt + shown, stopped

    def _completes_stop_string(self) -> bool:
        """Whether the text ends with a stop string if the sequence ends here.

        Only for bytes whose text is known when their run ends: here it would end."""
        if self._stops is None or not self._decoder.incomplete:
            return False
        if self._num_tokens < self._min_tokens:
            self._num_exempt = len(self._decoder.pending)
            return False
        return self._stops.would_stop(self._decoder.pending[self._num_exempt :])


# --- Stop strings -------------------------------------------------------------------------------------------


class StopStrings:
    """Finds the first completed stop string in a text that arrives in pieces.

    Attributes:
        held: the end of the text so far that may become part of a stop string; always empty if the stop string
            is to be shown.
    """

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._automaton = _automaton(tuple(stop))
        self._include = include
        self._state = 0
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(what may be shown, the stop string found or None)."""
        self._state, found, end = self._automaton.run(self._state, text)
        window, end = self.held + text, len(self.held) + end
        if found is not None:
            self.held = ""
            return window[: end if self._include else end - len(found)], found
        shown = len(window) if self._include else len(window) - self._automaton.depth[self._state]
        self.held = window[shown:]
        return window[:shown], None

    def would_stop(self, text: str) -> bool:
        """Whether a stop string would be found in `text` if it came next."""
        return self._automaton.run(self._state, text)[1] is not None

    def release(self) -> str:
        """What was held back, once it is sure that nothing follows."""
        held, self.held = self.held, ""
        return held


class _Automaton:
    """Aho and Corasick's: every state is a prefix of some stop string, the longest one that the text ends with.

    Attributes:
        depth: length of each state's prefix, that is, of what may become a stop string.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.depth = [0]
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the longest other state that this one ends with
        self._found: list[int | None] = [None]  # index of the stop string that is complete here
        self._stop = stop
        for index, string in enumerate(stop):
            self._insert(string, index)
        self._link()

    def run(self, state: int, text: str) -> tuple[int, str | None, int]:
        """(the state behind `text`, the stop string found or None, where it ends)."""
        for end, character in enumerate(text, start=1):
            state = self._step(state, character)
            found = self._found[state]
            if found is not None:
                return state, self._stop[found], end
        return state, None, len(text)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _insert(self, string: str, index: int) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self.depth)
                self.depth.append(self.depth[state] + 1)
                self._next.append({})
                self._fallback.append(0)
                self._found.append(None)
            state = self._next[state][character]
        if self._found[state] is None:
            self._found[state] = index

    def _link(self) -> None:
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, child in self._next[state].items():
                fallback = self._step(self._fallback[state], character)
                self._fallback[child] = fallback
                ends = [i for i in (self._found[child], self._found[fallback]) if i is not None]
                self._found[child] = min(ends, default=None)
                waiting.append(child)


@lru_cache(maxsize=16)  # the choices of one request share it
def _automaton(stop: tuple[str, ...]) -> _Automaton:
    return _Automaton(stop)


# --- Decoders -----------------------------------------------------------------------------------------------


class _Decoder(Protocol):
    @property
    def incomplete(self) -> bool:
        """Whether a pushed token's text is not decided yet."""
        ...

    @property
    def pending(self) -> str:
        """The undecided text, as it is if the sequence ends here with whole characters; else empty."""
        ...

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...

    def fork(self) -> _Decoder: ...


def _make_decoder(tokenizer: Tokenizer, skip_special_tokens: bool, spaces: bool) -> _Decoder:
    match tokenizer.decoding:
        case Decoding.BYTES:
            return _ByteDecoder(tokenizer, skip_special_tokens)
        case Decoding.PIECES:
            return _PieceDecoder(tokenizer, skip_special_tokens, spaces)
        case Decoding.WHOLE:
            return _WholeDecoder(tokenizer, skip_special_tokens, spaces)


class _ByteDecoder:
    """The text is the UTF-8 decoding of the tokens' bytes."""

    pending = ""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def incomplete(self) -> bool:
        return bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def fork(self) -> _ByteDecoder:
        other = copy.copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        other._utf8.setstate(self._utf8.getstate())
        return other


class _PieceDecoder:
    """Every token has its text; only at the beginning it may be another.

    A run of byte tokens is one piece, as it is for the tokenizers' own decoder, which makes of an invalid run one
    U+FFFD a byte: so whether any of it is text is known only when it ends.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, spaces: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._apart = frozenset() if skip_special_tokens or spaces else tokenizer.special_token_ids
        self._last: int | None = None
        self._started = False
        self._run: list[int] = []

    @property
    def incomplete(self) -> bool:
        return bool(self._run)

    @property
    def pending(self) -> str:
        try:
            b"".join(map(self._tokenizer.token_bytes, self._run)).decode()
        except UnicodeDecodeError:
            return ""
        return self._text(self._run)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        last, self._last = self._last, token_id
        if token_id in self._tokenizer.byte_token_ids:
            self._run.append(token_id)
            return ""
        if not self._tokenizer.text_behind(token_id) and not self._tokenizer.knows(token_id):
            return ""
        text = self.finish()
        if last in self._apart and token_id in self._apart:
            return text + self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text + (self._tokenizer.text_behind(token_id) if self._started else self._take([token_id]))

    def finish(self) -> str:
        if not self._run:
            return ""
        run, self._run = self._run, []
        return self._take(run)

    def fork(self) -> _PieceDecoder:
        other = copy.copy(self)
        other._run = list(self._run)
        return other

    def _take(self, ids: list[int]) -> str:
        text = self._text(ids)
        self._started = True
        return text

    def _text(self, ids: list[int]) -> str:
        if self._started:
            return self._tokenizer.run_behind(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _WholeDecoder:
    """For decoders that look at neighbours: everything is decoded anew with every token, so a text of n tokens costs
    n² (no model of the Llama family has such a decoder)."""

    pending = ""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, spaces: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces
        self._ids: list[int] = []
        self._sent = ""
        self._text = ""

    @property
    def incomplete(self) -> bool:
        return self._text != self._sent

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        self._text = self._tokenizer.decode(
            self._ids, skip_special_tokens=self._skip, spaces_between_special_tokens=self._spaces
        )
        return self._send(self._text.rstrip(REPLACEMENT))

    def finish(self) -> str:
        return self._send(self._text)

    def fork(self) -> _WholeDecoder:
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new

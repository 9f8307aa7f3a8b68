"""Text ↔ token ids, on the `tokenizers` library alone: importing transformers would cost a second at every start."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

# every call has one text, so there is nothing to divide; and threads of the library's own would make it warn
# whenever a process is forked
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers

from jaxserve.errors import ModelLoadError
from jaxserve.token_bound import TokenBound

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Decoding(Enum):
    """How a tokenizer's decoder makes text of tokens."""

    BYTES = "bytes"  # a token is bytes, the text is the UTF-8 of all of them (GPT-2's byte level)
    PIECES = (
        "pieces"  # a token is a text, whatever surrounds it; only the first one's may differ; bytes may run
    )
    WHOLE = "whole"  # a token's text depends on others


class Tokenizer:
    """A loaded tokenizer; safe to use from several threads.

    Args:
        special_tokens: their strings by role ("bos_token", "eos_token", …), as chat templates want them.
        chat_template: the model's own Jinja source, if it has one.
        other_eos_token_ids: ids that end a sequence besides that of "eos_token".

    Attributes:
        eos_token_ids: all ids that end a sequence.
        special_token_ids: ids that `skip_special_tokens` leaves out.
        byte_token_ids: single raw bytes ("<0xE2>") of a vocabulary with byte fallback.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: dict[str, str],
        chat_template: str | None,
        other_eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self._special = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.special_token_ids = frozenset(self._special)
        self.bos_token_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_token_ids = tuple(dict.fromkeys([*([] if eos is None else [eos]), *other_eos_token_ids]))
        steps = _decoder_steps(backend)
        self.decoding = _decoding(steps)
        self._byte_values = _byte_values(backend) if _has_byte_fallback(steps) else {}
        self.byte_token_ids = frozenset(self._byte_values)
        self._anchor, self._anchor_text = self._find_anchor()
        self._texts: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included; the model's own V may be larger."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def knows(self, token_id: int) -> bool:
        """False for an id that only the model has (a padded vocabulary); it has no text."""
        return self._backend.id_to_token(token_id) is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; takes about half a microsecond a token and does not hold the interpreter."""
        # the batch form leaves out character offsets, which takes half the time
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def min_num_tokens(self, text: str) -> int:
        """Tokens that `text` has at least, special ones that are added not counted; found without tokenizing it.
        0 if nothing can be said."""
        return self._token_bound(text)

    @cached_property
    def _token_bound(self) -> TokenBound:
        return TokenBound(self._backend, BYTES_OF_CHARACTERS)

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of `ids`; unknown ids have none.

        Args:
            spaces_between_special_tokens: False leaves out a space of the decoder's own making between
                neighbouring special tokens.
        """
        if skip_special_tokens or spaces_between_special_tokens:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        parts: list[list[int]] = [[]]
        for before, token_id in zip([None, *ids], ids, strict=False):
            if before in self.special_token_ids and token_id in self.special_token_ids:
                parts.append([])
            parts[-1].append(token_id)
        return "".join(str(self._backend.decode(part, skip_special_tokens=False)) for part in parts)

    def token_str(self, token_id: int) -> str:
        """The token decoded alone, special tokens included; incomplete UTF-8 is U+FFFD.

        A space that the token begins with is kept, also where a decoder drops it from the beginning of a text.
        """
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, which may be a part of a character. Those of many tokens, special ones
        left out, are together the UTF-8 of their text."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(token_id)
        return known

    def text_behind(self, token_id: int) -> str:
        """The text that the token adds behind other ones; only for `Decoding.PIECES`."""
        known = self._texts.get(token_id)
        if known is None:
            known = self._texts[token_id] = self.run_behind([token_id])
        return known

    def run_behind(self, ids: Sequence[int]) -> str:
        """The text that a run of tokens adds behind other ones; only for `Decoding.PIECES`."""
        text = self._backend.decode([*self._anchor, *ids], skip_special_tokens=False)
        return str(text)[len(self._anchor_text) :]

    def _make_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.decoding is Decoding.BYTES:
            # as the decoder does it: a token with any other character in it stands for itself
            values = [BYTES_OF_CHARACTERS.get(character) for character in token]
            named = [value for value in values if value is not None]
            return bytes(named) if len(named) == len(values) else token.encode()
        if token_id in self._byte_values:
            return bytes([self._byte_values[token_id]])
        if token_id in self._special:
            return self._special[token_id].encode()
        if self.decoding is Decoding.PIECES:
            return self.text_behind(token_id).encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def _find_anchor(self) -> tuple[list[int], str]:
        """A token with a text, to look at others behind it."""
        if self.decoding is Decoding.PIECES:
            for token_id in range(self.vocab_size):
                if token_id not in self._byte_values and token_id not in self._special:
                    text = self.decode([token_id], skip_special_tokens=False)
                    if text.strip():
                        return [token_id], text
        return [], ""

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)


def load_tokenizer(path: Path) -> Tokenizer:
    """From a directory in Hugging Face form or a GGUF file's metadata.

    Raises:
        ModelLoadError: there is none, or it cannot be read; the message names the file.
    """
    if path.suffix == ".gguf":
        from jaxserve.gguf_tokenizer import read_gguf_tokenizer

        found = read_gguf_tokenizer(path)
        template = _default_template(found.chat_template)
        return Tokenizer(found.backend, found.special_tokens, template, found.other_eos_token_ids)
    if (path / "tokenizer.json").exists():
        return _from_directory(path)
    if (path / "tokenizer.model").exists():
        return _converted(path)
    raise ModelLoadError(f"{path} has no tokenizer.json.")


def _from_directory(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the base class itself
        raise ModelLoadError(f"{file} cannot be read: {str(error)[:100]}.") from error
    config = _read_json(directory / "tokenizer_config.json")
    named = _read_json(directory / "special_tokens_map.json") | config
    special = {role: text for role in NAMED_TOKENS if (text := _token_text(named.get(role))) is not None}
    # roles that only the config knows become special here as they do in transformers
    others = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
    texts = [*special.values(), *(_token_text(token) for token in others if isinstance(others, list))]
    backend.add_special_tokens([t for t in texts if t is not None and backend.token_to_id(t) is not None])
    template_file = directory / "chat_template.jinja"
    template = _read_text(template_file) if template_file.exists() else config.get("chat_template")
    return Tokenizer(backend, special, _default_template(template))


def _converted(directory: Path) -> Tokenizer:
    """A SentencePiece model without tokenizer.json: transformers converts it."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelLoadError(
            f"{directory / 'tokenizer.model'} cannot be converted: {str(error)[:200]}."
        ) from error
    special = {role: str(text) for role, text in loaded.special_tokens_map.items() if isinstance(text, str)}
    return Tokenizer(loaded.backend_tokenizer, special, _default_template(loaded.chat_template))


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _default_template(template: Any) -> str | None:
    """A template, or the one named "default" of several."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {str(error)[:100]}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read: {str(error)[:100]}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is no JSON object.")
    return value


# --- What a decoder does ------------------------------------------------------------------------------------


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's description, sequences laid flat."""
    if backend.decoder is None:
        return []
    return _flat(json.loads(backend.decoder.__getstate__()))


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flat(inner)]
    return [decoder]


def _decoding(steps: list[dict[str, Any]]) -> Decoding:
    kinds = [step["type"] for step in steps]
    if kinds and kinds[0] == "ByteLevel" and set(kinds[1:]) <= {"Fuse"}:
        return Decoding.BYTES
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    token_by_token = set(kinds[:fused]) <= {"Metaspace", "WordPiece", "Replace", "ByteFallback", "Strip"}
    # what acts on the whole text may only act on its beginning, and there within the first token
    behind = [step for step in steps[fused + 1 :] if step["type"] != "Fuse"]
    at_the_start = all(s["type"] == "Strip" and s["start"] <= 1 and not s["stop"] for s in behind)
    return Decoding.PIECES if token_by_token and at_the_start and len(behind) <= 1 else Decoding.WHOLE


def _has_byte_fallback(steps: list[dict[str, Any]]) -> bool:
    return any(step["type"] == "ByteFallback" for step in steps)


def _byte_values(backend: tokenizers.Tokenizer) -> dict[int, int]:
    """The byte that each byte token stands for, by id."""
    ids = {value: backend.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    return {token_id: value for value, token_id in ids.items() if token_id is not None}


def _characters_of_bytes() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself where it is printable, else one from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES_OF_CHARACTERS = {character: byte for byte, character in _characters_of_bytes().items()}

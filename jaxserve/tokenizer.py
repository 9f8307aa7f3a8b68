"""Text ↔ token ids, on the `tokenizers` library alone: importing transformers would cost a second at every start."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.errors import ModelLoadError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
METASPACE = "▁"


class Family(Enum):
    """How a vocabulary spells text."""

    BYTE_LEVEL = "byte level"  # every token is bytes, written in 256 printable characters (GPT-2)
    SENTENCEPIECE = "SentencePiece"  # "▁" is a space, <0xNN> a byte
    WORDPIECE = "WordPiece"  # "##x" continues a word, everything else begins one
    PLAIN = "plain"


class Tokenizer:
    """A loaded tokenizer; safe to use from several threads.

    Attributes:
        special_tokens: their strings by role ("bos_token", "eos_token", …), as chat templates want them.
        chat_template: the model's own Jinja source, if it has one.
        eos_token_ids: ids that end a sequence.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str], chat_template: str | None
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = special_tokens
        self.chat_template = chat_template
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self.bos_token_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_token_ids: tuple[int, ...] = () if eos is None else (eos,)

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added tokens included; the model's own V may be larger."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def family(self) -> Family:
        """Read off the decoder's description."""
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        kinds = {step["type"] for step in [decoder, *decoder.get("decoders", [])] if "type" in step}
        if "ByteLevel" in kinds:
            return Family.BYTE_LEVEL
        if kinds & {"Metaspace", "ByteFallback"}:
            return Family.SENTENCEPIECE
        return Family.WORDPIECE if "WordPiece" in kinds else Family.PLAIN

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; takes about a microsecond a token and does not hold the interpreter."""
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of `ids`; unknown ids have none. `spaces_between_special_tokens=False`: no space of the decoder's
        own making between neighbouring special tokens."""
        if skip_special_tokens or spaces_between_special_tokens:
            return self._decode(ids, skip_special_tokens)
        parts: list[list[int]] = [[]]
        for before, token_id in zip([None, *ids], ids, strict=False):
            if before in self.special_token_ids and token_id in self.special_token_ids:
                parts.append([])
            parts[-1].append(token_id)
        return "".join(self._decode(part, skip_special_tokens) for part in parts)

    def token_str(self, token_id: int) -> str:
        """The token decoded alone, special tokens included; incomplete UTF-8 is U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, which may be a part of a character."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        match self.family:
            case Family.BYTE_LEVEL:
                return b"".join(BYTES_OF_CHARACTERS.get(c, c.encode()) for c in token)
            case Family.SENTENCEPIECE if byte := BYTE_TOKEN.fullmatch(token):
                return bytes([int(byte[1], 16)])
            case Family.SENTENCEPIECE:
                return token.replace(METASPACE, " ").encode()
            case Family.WORDPIECE:
                return (token[2:] if token.startswith("##") else f" {token}").encode()
        return token.encode()

    def is_byte_token(self, token_id: int) -> bool:
        """Whether it is a single raw byte of a vocabulary with byte fallback."""
        token = self._backend.id_to_token(token_id)
        return token is not None and BYTE_TOKEN.fullmatch(token) is not None

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)


def load_tokenizer(path: Path) -> Tokenizer:
    """From a directory in Hugging Face form or a GGUF file's metadata.

    Raises:
        ModelLoadError: there is none, or it cannot be read; the message names the file.
    """
    return _from_gguf(path) if path.suffix == ".gguf" else _from_directory(path)


def _from_directory(directory: Path) -> Tokenizer:
    file = directory / "tokenizer.json"
    if not file.exists():
        if (directory / "tokenizer.model").exists():
            return _converted(directory)
        raise ModelLoadError(f"{directory} has no tokenizer.json.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises the base class itself
        raise ModelLoadError(f"{file} cannot be read: {str(error)[:100]}.") from error
    config = _read_json(directory / "tokenizer_config.json")
    named = _read_json(directory / "special_tokens_map.json") | config
    special = {role: text for role in NAMED_TOKENS if (text := _token_text(named.get(role))) is not None}
    # roles that only the config knows become special here as they do in transformers
    backend.add_special_tokens([t for t in special.values() if backend.token_to_id(t) is not None])
    template_file = directory / "chat_template.jinja"
    template = template_file.read_text("utf-8") if template_file.exists() else config.get("chat_template")
    return Tokenizer(backend, special, _default_template(template))


def _converted(directory: Path) -> Tokenizer:
    """A SentencePiece model without tokenizer.json: transformers converts it."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ModelLoadError(f"{directory / 'tokenizer.model'} cannot be converted: {str(error)[:200]}.") from error
    special = {role: str(text) for role, text in loaded.special_tokens_map.items() if isinstance(text, str)}
    return Tokenizer(loaded.backend_tokenizer, special, _default_template(loaded.chat_template))


def _token_text(token: Any) -> str | None:  # noqa: ANN401 - a string or an object, from a file
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _default_template(template: Any) -> str | None:  # noqa: ANN401 - from a file
    """A template, or the one named "default" of several."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read: {str(error)[:100]}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is no JSON object.")
    return value


def _characters_of_bytes() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES_OF_CHARACTERS = {character: bytes([byte]) for byte, character in _characters_of_bytes().items()}


# --- GGUF ---------------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _from_gguf(path: Path) -> Tokenizer:
    from jaxserve.models.loader.gguf import read_gguf_metadata

    metadata = read_gguf_metadata(path)
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise ModelLoadError(f"{path} has no tokenizer.ggml.tokens.")
    if kind == "gpt2":
        backend = _gguf_byte_level(path, metadata, tokens)
    elif kind == "llama":
        backend = _gguf_sentencepiece(path, metadata, tokens)
    else:
        raise ModelLoadError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; gpt2 and llama are.")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    typed = list(zip(tokens, types, strict=False))
    backend.add_special_tokens([_added(token) for token, t in typed if t == CONTROL])
    backend.add_tokens([_added(token) for token, t in typed if t == USER_DEFINED])
    special = {}
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special[role] = tokens[token_id]
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    if adds_bos and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return Tokenizer(backend, special, _default_template(metadata.get("tokenizer.chat_template")))


def _added(token: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False, special=True)


def _merges(path: Path, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    if not all(len(merge) == 2 for merge in merges):
        raise ModelLoadError(f"{path}: tokenizer.ggml.merges has members that are no pairs.")
    return [(left, right) for left, right in merges]


def _gguf_byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    pre = metadata.get("tokenizer.ggml.pre", "default")
    ignore_merges = pre == "llama-bpe"
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(path, metadata), ignore_merges=ignore_merges)
    )
    match pre:
        case "llama-bpe":
            split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
            steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            steps = [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        case "default" | "gpt-2":
            steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        case _:
            raise ModelLoadError(
                f"{path}: tokenizer.ggml.pre {pre!r} is not supported; give --tokenizer a directory with tokenizer.json."
            )
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gguf_sentencepiece(path: Path, metadata: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    """BPE with byte fallback. Without merges in the file, they follow from the scores: a pair merges into the
    token that it spells, better scores first."""
    from tokenizers import decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(path, metadata)
    if not merges:
        scores = metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise ModelLoadError(f"{path} has neither tokenizer.ggml.merges nor tokenizer.ggml.scores.")
        ranked: list[tuple[float, int, int, tuple[str, str]]] = []
        for token, i in vocab.items():
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in vocab and right in vocab:
                    ranked.append((-float(scores[i]), vocab[left], vocab[right], (left, right)))
        merges = [pair for *_, pair in sorted(ranked)]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    unk_token = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    spaced = normalizers.Replace(" ", METASPACE)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), spaced]) if prefix else spaced
    steps: Iterable[Any] = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([*steps, *strip])
    return backend

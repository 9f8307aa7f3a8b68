"""The tokenizer that a GGUF file's metadata describes, rebuilt with the `tokenizers` library.

The file names its pre-tokenizer by a keyword of llama.cpp's; the expressions behind the keywords are those of the
models they come from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from jaxserve.errors import ModelLoadError
from jaxserve.models.loader.gguf import read_gguf_metadata

METASPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # members of tokenizer.ggml.token_type

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
# None: GPT-2's own expression, which the library has built in
SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "falcon3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "dbrx": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
}
SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
# these take a word that is in the vocabulary as it is, and put the beginning-of-sequence token before a text
LLAMA3_LIKE = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})


class GGUFTokenizer(NamedTuple):
    """What `Tokenizer` is made of; see there."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    chat_template: Any
    other_eos_token_ids: list[int]


def read_gguf_tokenizer(path: Path) -> GGUFTokenizer:
    """Rebuild a byte-level ("gpt2") or SentencePiece ("llama") tokenizer.

    Raises:
        ModelLoadError: the file has no tokenizer, a broken one, or one of another kind.
    """
    metadata = read_gguf_metadata(path)
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise ModelLoadError(f"{path} has no tokenizer.ggml.tokens.")
    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2":
        backend = _byte_level(path, metadata, tokens, pre)
    elif kind == "llama":
        backend = _sentencepiece(path, metadata, tokens)
    else:
        raise ModelLoadError(f"{path}: tokenizer.ggml.model {kind!r} is not supported; gpt2 and llama are.")
    _add_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type"))
    special = {}
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for role, key in roles.items():
        token_id = _token_id(metadata, key, len(tokens))
        if token_id is not None:
            special[role] = tokens[token_id]
    bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in LLAMA3_LIKE)
    eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    backend.post_processor = _surround(
        backend, special.get("bos_token") if bos else None, special.get("eos_token") if eos else None
    )
    # the ends of a turn and of a tool call, which a Hugging Face model names in generation_config.json
    ends = [_token_id(metadata, key, len(tokens)) for key in ("eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    return GGUFTokenizer(backend, special, template, [end for end in ends if end is not None])


def _surround(
    backend: tokenizers.Tokenizer, bos: str | None, eos: str | None
) -> tokenizers.processors.TemplateProcessing:
    """What puts `bos` before a text and `eos` behind it where special tokens are asked for."""
    known = [token for token in (bos, eos) if token is not None and backend.token_to_id(token) is not None]
    before = [token for token in known if token == bos][:1]
    behind = [token for token in known if token == eos][:1]
    return tokenizers.processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *before, "$B", *behind],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(known)],
    )


def _token_id(metadata: dict[str, Any], key: str, num_tokens: int) -> int | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return token_id if isinstance(token_id, int) and 0 <= token_id < num_tokens else None


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], types: Any) -> None:
    """Tokens that are found in a text before it is split; control tokens are special."""
    if not isinstance(types, list):
        return
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    added = [
        tokenizers.AddedToken(token, normalized=False, special=kinds[kind])
        for token, kind in zip(tokens, types, strict=False)
        if kind in kinds
    ]
    backend.add_tokens(added)


def _merges(path: Path, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    merges = [merge.split(" ", 1) for merge in metadata.get("tokenizer.ggml.merges") or []]
    if not all(len(merge) == 2 for merge in merges):
        raise ModelLoadError(f"{path}: tokenizer.ggml.merges has members that are no pairs.")
    return [(left, right) for left, right in merges]


def _bpe(path: Path, **arguments: Any) -> models.BPE:
    try:
        return models.BPE(**arguments)
    except Exception as error:  # the library raises the base class itself
        raise ModelLoadError(f"{path}: the merges do not fit the vocabulary: {str(error)[:100]}.") from error


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str], pre: str) -> tokenizers.Tokenizer:
    if pre not in SPLITS and pre not in SINGLE_DIGITS:
        raise ModelLoadError(
            f"{path}: tokenizer.ggml.pre {pre!r} is not supported; "
            "give --tokenizer a directory with tokenizer.json."
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    model = _bpe(path, vocab=vocab, merges=_merges(path, metadata), ignore_merges=pre in LLAMA3_LIKE)
    backend = tokenizers.Tokenizer(model)
    split = SPLITS.get(pre)
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pre in SINGLE_DIGITS:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split is not None:
        steps.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(path: Path, metadata: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    """BPE with byte fallback."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(path, metadata) or _merges_from_scores(path, metadata, vocab, len(tokens))
    unknown = _token_id(metadata, "unknown", len(tokens))
    unk_token = None if unknown is None else tokens[unknown]
    backend = tokenizers.Tokenizer(
        _bpe(path, vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    )
    spaced = normalizers.Replace(" ", METASPACE)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(METASPACE), spaced]) if prefix else spaced
    steps: list[decoders.Decoder] = [
        decoders.Replace(METASPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(
    path: Path, metadata: dict[str, Any], vocab: dict[str, int], num_tokens: int
) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose joint token has the best score: so a token's merges are all
    ways of cutting it into two tokens, ranked by its score."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != num_tokens:
        raise ModelLoadError(f"{path} has neither tokenizer.ggml.merges nor tokenizer.ggml.scores.")
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, i in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-float(scores[i]), vocab[left], vocab[right], (left, right)))
    return [pair for *_, pair in sorted(ranked)]

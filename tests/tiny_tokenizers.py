"""Tokenizers of four families, small enough to train while a test waits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxserve.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "the quick brown fox doesn't jump over the lazy dog . it is what it is , isn't it ?",
    "a cat and a dog and a naïve café ; 1 2 3 12 123 END STOP stop",
    "print('hello')\n    return x\n\n 你好 世界 😀 👩‍👩‍👧 ▁ héllo",
] * 4
SPECIAL = ["<s>", "</s>", "<unk>", "[é]"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def _byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's."""
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.train_from_iterator(
        [line[:80] for line in CORPUS[:2]],
        trainers.BpeTrainer(vocab_size=380, special_tokens=SPECIAL + BYTES, show_progress=False),
    )
    # byte tokens are part of the vocabulary and not special
    vocab = backend.get_vocab(with_added_tokens=True)
    rebuilt = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(a, b) for a in vocab for b in vocab if a + b in vocab and a + b not in SPECIAL + BYTES],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    rebuilt.normalizer, rebuilt.decoder = backend.normalizer, backend.decoder
    rebuilt.add_special_tokens(SPECIAL)
    return rebuilt


def _unigram() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _wordpiece() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _suffixed() -> tokenizers.Tokenizer:
    """A word's last token says so ("dog</w>"): its space shows only when another token follows."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _replaced() -> tokenizers.Tokenizer:
    """Byte level, with something done to the text afterwards."""
    backend = _byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("q", "Q")])
    return backend


FAMILIES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": _byte_level,
    "SentencePiece": _sentencepiece,
    "Unigram": _unigram,
    "WordPiece": _wordpiece,
    "suffixed": _suffixed,
    "replaced": _replaced,
}


@cache
def backend_of(family: str) -> tokenizers.Tokenizer:
    """The library's own object: what decoding is compared with."""
    return FAMILIES[family]()


@cache
def tokenizer_of(family: str) -> Tokenizer:
    with TemporaryDirectory() as directory:
        backend_of(family).save(f"{directory}/tokenizer.json")
        return load_tokenizer(Path(directory))

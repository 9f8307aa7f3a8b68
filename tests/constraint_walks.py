"""Random texts under a constraint: what a model without any sense would write."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from jaxserve.constraints.backends.base import Matcher
from jaxserve.constraints.compiler import Compiler
from jaxserve.constraints.constraint import Constraint
from jaxserve.constraints.vocabulary import Vocabulary, unpack

BYTE_EOS = 256
BYTES = Vocabulary((*(bytes([value]) for value in range(256)), b""), {}, (BYTE_EOS,))
CLOSERS = frozenset({b'"', b"}", b"]", b'"}', b'"]', b"]}", b"}}", b"0", b"1", b"a"})


def allowed_tokens(matcher: Matcher, vocabulary: Vocabulary) -> list[int]:
    """The ids in the matcher's mask, which must be a mask over the whole vocabulary and nothing else."""
    row = np.full(vocabulary.mask_words, -1, np.int32)
    matcher.fill_mask(row)
    assert not unpack(row, vocabulary.mask_words * 32)[vocabulary.size :].any()
    return [int(i) for i in np.flatnonzero(unpack(row, vocabulary.size))]


def walk(
    matcher: Matcher, vocabulary: Vocabulary, seed: int, *, max_tokens: int = 120
) -> tuple[list[int], bool]:
    """Random tokens under the mask, and whether the text came to an end.

    Tokens that close something are preferred, so that it does.
    """
    chooser = random.Random(seed)
    tokens: list[int] = []
    eos = set(vocabulary.eos_token_ids)
    while len(tokens) < max_tokens:
        allowed = allowed_tokens(matcher, vocabulary)
        assert matcher.can_end == bool(eos & set(allowed))
        texts = [token_id for token_id in allowed if token_id not in eos]
        assert matcher.is_complete == (not texts)
        if not texts or (matcher.can_end and chooser.random() < 0.3):
            assert matcher.can_end
            return tokens, True
        closers = [token_id for token_id in texts if vocabulary.tokens[token_id] in CLOSERS]
        token_id = chooser.choice(closers if closers and chooser.random() < 0.5 else texts)
        assert matcher.accept(token_id)
        tokens.append(token_id)
    return tokens, False


def texts_of(
    constraint: Constraint, seeds: Sequence[int], *, compiler: Compiler | None = None, max_tokens: int = 120
) -> list[str]:
    """Whole texts over the vocabulary of bytes, those that came to an end."""
    compiler = compiler or BYTE_COMPILER
    compiled = compiler.compile(constraint)
    texts = []
    for seed in seeds:
        tokens, ended = walk(compiler.matcher(compiled), BYTES, seed, max_tokens=max_tokens)
        if ended:
            texts.append(bytes(tokens).decode())
    return texts


BYTE_COMPILER = Compiler(BYTES)

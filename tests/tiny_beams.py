"""A tiny random Llama of few tokens, so that sequences end often and a whole distribution fits among the reported
log-probabilities. Token i is a character, so that texts, and stop strings in them, are easy to read."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from tests.tiny_llama import tiny_config, tiny_weights

SPECIAL = ["<unk>", "<s>", "</s>"]
EOS = 2
FIRST_CHARACTER = len(SPECIAL)
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHI.,"
VOCAB_SIZE = FIRST_CHARACTER + len(CHARACTERS)


def write_beam_model(directory: Path, seed: int = 2) -> Path:
    """A checkpoint in Hugging Face form, with its tokenizer."""
    config = tiny_config("untied") | {"vocab_size": VOCAB_SIZE}
    weights = tiny_weights(config, seed)
    weights["lm_head.weight"] *= 0.5  # flat enough for beams to compete
    weights["lm_head.weight"][EOS] *= 2.0  # likely enough to end half of them
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, str(directory / "model.safetensors"))
    backend = tokenizers.Tokenizer(
        models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    return directory

"""What a model's generation_config.json, a folder's, and the command line give to requests that say nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ConfigError, ModelLoadError
from jaxserve.generation_config import GenerationDefaults, load_generation_defaults
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizers import backend_of

EOS = 1  # "</s>"
STORED = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "do_sample": True,
    "eos_token_id": [7, 1, 9],
    "max_length": 4096,
}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(backend_of("byte level"), {"eos_token": "</s>"}, None)


def write(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def test_auto_takes_the_models_own_values(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert load_generation_defaults(write(tmp_path, STORED), "auto", {}, tokenizer) == GenerationDefaults(
        temperature=0.6,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        eos_token_ids=(EOS, 7, 9),
    )


def test_none_drops_the_sampling_values_and_keeps_the_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = load_generation_defaults(write(tmp_path, STORED), "none", {}, tokenizer)
    assert found == GenerationDefaults(eos_token_ids=(EOS, 7, 9))


def test_a_folder_stands_in_for_the_model(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = write(tmp_path / "model", STORED)
    folder = write(tmp_path / "other", {"top_k": 0, "eos_token_id": 5})
    found = load_generation_defaults(model, str(folder), {}, tokenizer)
    assert found == GenerationDefaults(top_k=0, eos_token_ids=(EOS, 5))


def test_overrides_win_over_the_file_also_with_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = write(tmp_path, STORED)
    override = {"temperature": 1, "top_k": -1}
    found = load_generation_defaults(model, "auto", override, tokenizer)
    assert (found.temperature, found.top_k, found.top_p) == (1.0, -1, 0.9)
    found = load_generation_defaults(model, "none", override, tokenizer)
    assert (found.temperature, found.top_k, found.top_p) == (1.0, -1, None)


def test_an_override_of_null_takes_the_models_value_away(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = load_generation_defaults(write(tmp_path, STORED), "auto", {"top_p": None}, tokenizer)
    assert (found.top_p, found.top_k) == (None, 40)


def test_values_hold_whatever_do_sample_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = write(tmp_path, {"temperature": 0.3, "do_sample": False})
    assert load_generation_defaults(model, "auto", {}, tokenizer).temperature == 0.3


@pytest.mark.parametrize("is_gguf", [False, True])
def test_a_model_without_a_file_has_the_tokenizers_end_only(
    tmp_path: Path, tokenizer: Tokenizer, is_gguf: bool
) -> None:
    path = tmp_path / "model.gguf" if is_gguf else tmp_path
    if is_gguf:
        path.write_bytes(b"GGUF")
    assert load_generation_defaults(path, "auto", {}, tokenizer) == GenerationDefaults(eos_token_ids=(EOS,))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("temperature", -0.1, "temperature must be between 0 and 2, got '-0.1'"),
        ("temperature", 2.5, "temperature must be between 0 and 2"),
        ("temperature", "0.5", "temperature must be between 0 and 2"),
        ("temperature", True, "temperature must be between 0 and 2"),
        ("temperature", float("nan"), "temperature must be between 0 and 2"),
        ("top_p", 0, "top_p must be greater than 0 and at most 1"),
        ("top_p", 1.01, "top_p must be greater than 0 and at most 1"),
        ("top_k", -2, "top_k must be a whole number"),
        ("top_k", 0.5, "top_k must be a whole number"),
        ("top_k", 10**400, "top_k must be a whole number"),
        ("min_p", 1.5, "min_p must be between 0 and 1"),
        ("repetition_penalty", 0, "repetition_penalty must be greater than 0"),
        ("repetition_penalty", float("inf"), "repetition_penalty must be greater than 0"),
        ("repetition_penalty", [1], "repetition_penalty must be greater than 0"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_source(
    tmp_path: Path, tokenizer: Tokenizer, key: str, value: object, words: str
) -> None:
    model = write(tmp_path, {key: value})
    with pytest.raises(ConfigError, match=re.escape(f"generation_config.json: {words}")):
        load_generation_defaults(model, "auto", {}, tokenizer)
    with pytest.raises(ConfigError, match=re.escape(f"--override-generation-config: {words}")):
        load_generation_defaults(tmp_path / "absent", "auto", {key: value}, tokenizer)
    assert load_generation_defaults(model, "none", {}, tokenizer) == GenerationDefaults(eos_token_ids=(EOS,))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 1),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 50.0),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 0.01),
    ],
)
def test_values_at_the_borders_are_taken(
    tmp_path: Path, tokenizer: Tokenizer, key: str, value: float
) -> None:
    found = load_generation_defaults(write(tmp_path, {key: value}), "auto", {}, tokenizer)
    assert getattr(found, key) == value


@pytest.mark.parametrize(("stored", "ends"), [(5, (EOS, 5)), (None, (EOS,)), ([], (EOS,)), ([EOS], (EOS,))])
def test_the_ends_are_one_id_or_several_or_none(
    tmp_path: Path, tokenizer: Tokenizer, stored: object, ends: tuple[int, ...]
) -> None:
    model = write(tmp_path, {"eos_token_id": stored})
    assert load_generation_defaults(model, "auto", {}, tokenizer).eos_token_ids == ends


@pytest.mark.parametrize("value", [-1, "2", True, [1, None], 1.5, 2**31, {}])
def test_an_end_that_is_no_token_id_is_refused(tmp_path: Path, tokenizer: Tokenizer, value: object) -> None:
    model = write(tmp_path, {"eos_token_id": value})
    with pytest.raises(ConfigError, match="eos_token_id must be a token id"):
        load_generation_defaults(model, "auto", {}, tokenizer)


def test_an_unknown_override_is_named_with_those_that_are_known(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="'max_new_tokens' is not known; these are: temperature, top_p"):
        load_generation_defaults(tmp_path, "auto", {"max_new_tokens": 5}, tokenizer)


def test_a_folder_without_the_file_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"--generation-config: .*generation_config.json is missing"):
        load_generation_defaults(tmp_path, str(tmp_path / "absent"), {}, tokenizer)


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff{}", '"x"'])
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, tokenizer: Tokenizer, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelLoadError, match=r"generation_config.json (cannot be read|is no JSON object)"):
        load_generation_defaults(tmp_path, "auto", {}, tokenizer)


def test_a_file_that_is_no_text_is_one_line_that_names_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json cannot be read"):
        load_generation_defaults(tmp_path, "auto", {}, tokenizer)


@pytest.mark.model
def test_the_demo_model_ends_with_im_end(demo_model_path: Path) -> None:
    tokenizer = load_tokenizer(demo_model_path)
    found = load_generation_defaults(demo_model_path, "auto", {}, tokenizer)
    assert [tokenizer.token_str(i) for i in found.eos_token_ids] == ["<|im_end|>"]

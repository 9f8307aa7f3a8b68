"""Defaults that a model brings for requests: `generation_config.json` and `--override-generation-config`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve.errors import ConfigError, ModelLoadError
from jaxserve.tokenizer import Tokenizer

FILE = "generation_config.json"
MAX_INT = (1 << 31) - 1


class Allowed(NamedTuple):
    """Numbers that a key can have. Hugging Face's own neutral values (top_k 50 …) are values like any other."""

    words: str
    test: Callable[[float], bool]


ALLOWED: dict[str, Allowed] = {
    "temperature": Allowed("between 0 and 2", lambda x: 0 <= x <= 2),
    "top_p": Allowed("greater than 0 and at most 1", lambda x: 0 < x <= 1),
    "top_k": Allowed(
        "a whole number, -1 or 0 (off) or positive", lambda x: -1 <= x <= MAX_INT and x == int(x)
    ),
    "min_p": Allowed("between 0 and 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": Allowed("greater than 0", lambda x: x > 0),
}


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a request that says nothing gets; None: the API's own default.

    Attributes:
        eos_token_ids: ids that end a sequence: the tokenizer's and the generation config's.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


def load_generation_defaults(
    path: Path, generation_config: str, override: Mapping[str, Any], tokenizer: Tokenizer
) -> GenerationDefaults:
    """Read the model's defaults.

    Args:
        path: the model.
        generation_config: "auto" (the model's own file), "none" (no sampling defaults), or a folder.
        override: sampling values that win over the file's.

    Raises:
        ConfigError: a value or key that cannot be; it is named.
        ModelLoadError: the file cannot be read.
    """
    is_folder = generation_config not in ("auto", "none")
    file = (Path(generation_config) if is_folder else path) / FILE
    if is_folder and not file.is_file():
        raise ConfigError(f"--generation-config: {file} is missing.")
    stored = _read(file)
    unknown = sorted(set(override) - set(ALLOWED))
    if unknown:
        known = ", ".join(ALLOWED)
        raise ConfigError(f"--override-generation-config: {unknown[0]!r} is not known; these are: {known}.")
    values: dict[str, float | None] = {}
    if generation_config != "none":
        values = {key: _checked(str(file), key, stored.get(key)) for key in ALLOWED}
    values |= {key: _checked("--override-generation-config", key, value) for key, value in override.items()}
    top_k = values.pop("top_k", None)
    ends = dict.fromkeys([*tokenizer.eos_token_ids, *_end_ids(file, stored.get("eos_token_id"))])
    return GenerationDefaults(
        **values, top_k=None if top_k is None else int(top_k), eos_token_ids=tuple(ends)
    )


def _checked(source: str, key: str, value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if not is_number or not ALLOWED[key].test(value):
        raise ConfigError(f"{source}: {key} must be {ALLOWED[key].words}, got {str(value)[:100]!r}.")
    return float(value)


def _end_ids(file: Path, value: Any) -> list[int]:
    """`eos_token_id`: a token id, several, or none."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id <= MAX_INT:
            raise ConfigError(
                f"{file}: eos_token_id must be a token id or a list of them, got {str(value)[:100]!r}."
            )
    return ids


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} cannot be read: {str(error)[:100]}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} is no JSON object.")
    return value

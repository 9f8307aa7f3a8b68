"""Defaults that a model brings for requests: `generation_config.json` and `--override-generation-config`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import ConfigError, ModelLoadError
from jaxserve.tokenizer import Tokenizer

FILE = "generation_config.json"
# inclusive bounds; Hugging Face's own neutral values (top_k 50, temperature 1 …) are values like any other
BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (-1, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-9, 1e9),
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
    folder = path if generation_config in ("auto", "none") else Path(generation_config)
    if generation_config not in ("auto", "none") and not (folder / FILE).exists():
        raise ConfigError(f"--generation-config: {folder / FILE} is missing.")
    stored = _read(folder / FILE)
    unknown = set(override) - set(BOUNDS)
    if unknown:
        raise ConfigError(
            f"--override-generation-config: {min(unknown)!r} is not known; these are: {', '.join(BOUNDS)}."
        )
    sampled = {} if generation_config == "none" else {k: v for k, v in stored.items() if k in BOUNDS}
    if stored.get("do_sample") is False:
        sampled = {}  # the author's values are for greedy decoding, where they mean nothing
    values = {k: _checked(k, v) for k, v in {**sampled, **override}.items() if v is not None}
    top_k = values.pop("top_k", None)
    ends = stored.get("eos_token_id", [])
    ends = [ends] if isinstance(ends, int) else ends
    eos = dict.fromkeys([*tokenizer.eos_token_ids, *(i for i in ends or [] if isinstance(i, int))])
    return GenerationDefaults(**values, top_k=None if top_k is None else int(top_k), eos_token_ids=tuple(eos))


def _checked(key: str, value: Any) -> float:
    low, high = BOUNDS[key]
    ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not ok or (key == "top_k" and value != int(value)):
        raise ConfigError(f"{FILE}: {key} must be a number from {low:g} to {high:g}, got {value!r:.100}.")
    return float(value)


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

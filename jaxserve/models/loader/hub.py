"""`--model` → a path: a local one, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from jaxserve.errors import ModelLoadError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# weights, configuration and tokenizer: no code, no pickles
PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.tiktoken", "*.jinja"]
# the same weights once more, in the trainers' own layout
SECOND_COPIES = ["consolidated*", "original/*"]


def resolve_model(model: str) -> Path:
    """The directory or .gguf file that `model` names. A hub id that is no local path is downloaded, with progress.

    Raises:
        ModelLoadError: there is no such thing.
    """
    path = Path(model).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path.resolve()
    if path.exists():
        raise ModelLoadError(f"{model} is neither a directory nor a .gguf file.")
    if not HUB_ID.fullmatch(model):
        raise ModelLoadError(
            f"There is no model at {model}: give a directory, a .gguf file or a hub id (org/name)."
        )
    from huggingface_hub import snapshot_download  # imports half a second's worth: only where it is needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # its bases are OSError and the HTTP client's own error, of whichever client this version of the hub has
    failures = cast(tuple[type[Exception], ...], (*HfHubHTTPError.__bases__, HFValidationError))
    try:
        return Path(snapshot_download(model, allow_patterns=PATTERNS, ignore_patterns=SECOND_COPIES))
    except failures as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ModelLoadError(f"{model} could not be downloaded from the hub: {reason}") from error

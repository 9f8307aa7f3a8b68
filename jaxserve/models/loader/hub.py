"""`--model` → a path: a local one, or a download from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from jaxserve.errors import ModelLoadError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# weights, configuration and tokenizer; no code, no pickles, no second copy in another format
PATTERNS = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja"]


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelLoadError(f"{model} could not be downloaded from the hub: {reason}") from error

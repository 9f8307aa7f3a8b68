"""What quantization costs in quality: python scripts/perplexity.py MODEL [--tokens 20480] [--variants NAME ...].

Perplexity on text that every Python brings along (docstrings of the standard library, in a fixed order), in windows of
1,024 tokens, through the serving step; and how often the most likely token is that of the first variant.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxserve.config import EngineConfig
from jaxserve.model_runner import ModelRunner
from jaxserve.tokenizer import load_tokenizer

MODULES = (
    "argparse", "ast", "asyncio", "bisect", "calendar", "collections", "concurrent.futures", "configparser",
    "contextlib", "csv", "datetime", "decimal", "difflib", "email.message", "fractions", "functools", "heapq",
    "http.client", "inspect", "itertools", "json", "logging", "mailbox", "multiprocessing", "optparse", "os",
    "pathlib", "pickle", "random", "re", "shutil", "socket", "sqlite3", "ssl", "statistics", "string", "subprocess",
    "tarfile", "tempfile", "textwrap", "threading", "turtle", "typing", "unittest", "unittest.mock",
    "urllib.request", "uuid", "zipfile",
)  # fmt: skip
WINDOW = 1024  # tokens
VARIANTS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantization": "int8"},
    "int8 KV": {"kv_cache_dtype": "int8"},
    "fp8 KV": {"kv_cache_dtype": "fp8"},
    "int8, int8 KV": {"quantization": "int8", "kv_cache_dtype": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=20 * WINDOW)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    ids = load_tokenizer(Path(args.model)).encode(docstrings(), add_special_tokens=False)[: args.tokens]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    print(f"{len(ids):,} tokens in {len(windows)} windows")
    first: tuple[float, npt.NDArray[np.int64]] | None = None
    for name in args.variants:
        started = time.monotonic()
        loss, best = measure(args.model, windows, VARIANTS[name])
        first = first or (loss, best)
        print(
            f"{name:16s} perplexity {np.exp(loss):.4f} ({np.exp(loss - first[0]):.4f} x), most likely token the "
            f"same in {np.mean(best == first[1]):.2%}, {time.monotonic() - started:.0f} s",
            flush=True,
        )


def docstrings() -> str:
    """Of the modules, their public classes and functions, in order of name."""
    texts: list[str] = []
    for name in MODULES:
        module = importlib.import_module(name)
        members = [module] + [
            value
            for _, value in sorted(vars(module).items())
            if inspect.isclass(value) or inspect.isfunction(value)
        ]
        texts += [text for text in map(inspect.getdoc, members) if text]
    return "\n\n".join(dict.fromkeys(texts))


def measure(
    model: str, windows: list[list[int]], changes: dict[str, Any]
) -> tuple[float, npt.NDArray[np.int64]]:
    """Mean negative log-likelihood of a token, and the most likely token at every position."""
    config = EngineConfig(
        model=model,
        dtype="bfloat16",
        max_model_len=WINDOW,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
        **changes,
    )
    runner = ModelRunner(config)
    losses, best = [], []
    for ids in windows:
        logits = runner.prompt_logits(ids)
        peak = logits.max(axis=1, keepdims=True)
        logsumexp = peak[:, 0] + np.log(np.exp(logits - peak).sum(axis=1))
        losses.append((logsumexp - logits[np.arange(len(ids)), np.append(ids[1:], 0)])[:-1])
        best.append(logits.argmax(axis=1))
    return float(np.concatenate(losses).mean()), np.concatenate(best)


if __name__ == "__main__":
    main()

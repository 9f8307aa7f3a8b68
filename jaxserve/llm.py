"""The engine in-process: `LLM(model=…).generate(prompts, params)`, for scripts, tests and benchmarks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.config import EngineConfig
from jaxserve.detokenizer import Detokenizer
from jaxserve.engine import Engine
from jaxserve.errors import ContextLengthError, RequestFailedError
from jaxserve.generation_config import GenerationDefaults, load_generation_defaults
from jaxserve.messages import AbortRequest, AddRequest, FinishReason, SequenceOutput, TopLogprobs
from jaxserve.models.loader import resolve_model
from jaxserve.sampling_params import SamplingParams
from jaxserve.tokenizer import Tokenizer, load_tokenizer

Prompt = str | list[int]


@dataclass
class CompletionOutput:
    """One generated sequence. `logprobs` has one entry a token, if they were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass
class RequestOutput:
    """All sequences of one prompt, by index."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0

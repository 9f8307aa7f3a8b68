"""What one request may ask of sampling."""

from __future__ import annotations

import msgspec

from jaxserve.errors import RequestError

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request; immutable and valid by construction.

    Attributes:
        n: sequences to generate for the prompt, 1…128.
        temperature: [0, 2]; below 1e-5 is greedy (argmax, the lowest id on a tie).
        top_p: (0, 1]; the smallest set of most likely tokens with mass ≥ top_p.
        top_k: ≥ −1; 0 and −1 mean off.
        min_p: [0, 1]; keep tokens with p ≥ min_p · p_max.
        seed: int64 or None (the engine draws one). Sequence i draws from a stream that is a function of
            (seed, i) and the token's position alone.
        max_tokens: tokens to generate at most, ≥ 1.
        stop: strings that end the text when they appear in it (looked for by the detokenizing side).
        stop_token_ids: ids that end the sequence like an end-of-sequence id.
        include_stop_str_in_output: keep the stop string, or the stop token's text, in the output.
        ignore_eos: end-of-sequence ids do not end the sequence.
        skip_special_tokens: special tokens contribute no text.
        spaces_between_special_tokens: keep the space that a tokenizer's decoder puts between special tokens.
        logprobs: None, or the number of most likely tokens to report beside each sampled one.

    Raises:
        RequestError: a value is out of range; `param` is the attribute's name.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("n", self.n, 1 <= self.n <= MAX_CHOICES, f"an integer between 1 and {MAX_CHOICES}")
        _check("temperature", self.temperature, 0.0 <= self.temperature <= 2.0, "between 0 and 2")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "greater than 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= -1, "-1 or 0 (off) or a positive integer")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        if self.seed is not None:
            _check("seed", self.seed, INT64_MIN <= self.seed <= INT64_MAX, "a 64-bit integer")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check(
            "stop", len(self.stop), len(self.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} strings"
        )
        for string in self.stop:
            ok = 1 <= len(string) <= MAX_STOP_STRING_CHARS
            _check("stop", string, ok, f"strings of 1 to {MAX_STOP_STRING_CHARS} characters")
        ok = len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS
        _check("stop_token_ids", len(self.stop_token_ids), ok, f"at most {MAX_STOP_TOKEN_IDS} ids")
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, self.logprobs >= 0, "at least 0")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON


def _check(param: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{param} must be {allowed}, got {str(value)[:100]!r}.", param=param)

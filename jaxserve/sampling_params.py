"""What one request may ask of sampling."""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from jaxserve.errors import RequestError

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORD_TOKENS = 1024  # of all bad words of a request together
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MAX = 2**31 - 1

# what a draw takes, in the order of `SamplingParams.pack`
DRAW_INPUTS = "temperature", "top_p", "min_p", "top_k", "seed_low", "seed_high", "choice", "num_logprobs"
DRAW = struct.Struct("=fffiIIii")
NO_LOGPROBS = -1
NO_DRAW = DRAW.pack(0.0, 1.0, 0.0, 0, 0, 0, 0, NO_LOGPROBS)


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request; immutable and valid by construction.

    Attributes:
        n: sequences to return for the prompt, 1…128.
        best_of: sequences to sample (candidates of beam search: its width); the best n are returned. None: n.
        use_beam_search: find likely sequences instead of sampling.
        length_penalty: beam search divides a hypothesis' log-probability by its length to this power.
        early_stopping: when beam search is over; true: as soon as `best_of` hypotheses are finished, false: when no
            live beam scores better at its present length, "never": when none can at any length.
        temperature: [0, 2]; below 1e-5 is greedy (argmax, the lowest id on a tie).
        top_p: (0, 1]; the smallest set of most likely tokens with mass ≥ top_p.
        top_k: ≥ −1; 0 and −1 mean off.
        min_p: [0, 1]; keep tokens with p ≥ min_p · p_max.
        presence_penalty, frequency_penalty: [−2, 2]; subtracted from the logits of generated tokens, once and for
            each time they were generated.
        repetition_penalty: > 0; positive logits of tokens in prompt or output are divided by it, others multiplied.
        logit_bias: (token id, number in [−100, 100]) pairs, added to the logits.
        allowed_token_ids: None, or the only ids that can be generated.
        bad_words_token_ids: token sequences that are never completed.
        seed: int64 or None (the engine draws one). Sequence i draws from a stream that is a function of
            (seed, i) and the token's position alone.
        max_tokens: tokens to generate at most; 0 only with `prompt_logprobs`: the prompt is computed and that is all.
        min_tokens: until this many tokens are generated nothing but max_tokens ends the sequence.
        stop: strings that end the text when they appear in it (looked for by the detokenizing side).
        stop_token_ids: ids that end the sequence like an end-of-sequence id.
        include_stop_str_in_output: keep the stop string, or the stop token's text, in the output.
        ignore_eos: end-of-sequence ids do not end the sequence.
        skip_special_tokens: special tokens contribute no text.
        spaces_between_special_tokens: keep the space that a tokenizer's decoder puts between special tokens.
        logprobs: None, or the number of most likely tokens to report beside each sampled one.
        prompt_logprobs: None, or the number of most likely tokens to report beside each token of the prompt.

    Raises:
        RequestError: a value is out of range; `param` is the attribute's name.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_distribution()
        self._check_masks()
        self._check_end()
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(name, count, count is None or count >= 0, "at least 0")

    def _check_choices(self) -> None:
        _check("n", self.n, 1 <= self.n <= MAX_CHOICES, f"an integer between 1 and {MAX_CHOICES}")
        best_of = self.num_sequences
        _check(
            "best_of", best_of, self.n <= best_of <= MAX_CHOICES, f"between n ({self.n}) and {MAX_CHOICES}"
        )
        if self.use_beam_search:
            _check("best_of", best_of, best_of >= 2, "at least 2 when using beam search (it is the width)")
            greedy = self.temperature == 0.0
            _check("temperature", self.temperature, greedy, "0 when using beam search")
        elif self.length_penalty != 1.0 or self.early_stopping is not False:
            param = "length_penalty" if self.length_penalty != 1.0 else "early_stopping"
            raise RequestError(f"{param} is only for use_beam_search.", param=param)

    def _check_distribution(self) -> None:
        _check("temperature", self.temperature, 0.0 <= self.temperature <= 2.0, "between 0 and 2")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "greater than 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= -1, "-1 or 0 (off) or a positive integer")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2.0 <= getattr(self, name) <= 2.0, "between -2 and 2")
        positive = 0.0 < self.repetition_penalty < float("inf")
        _check("repetition_penalty", self.repetition_penalty, positive, "greater than 0")
        if self.seed is not None:
            _check("seed", self.seed, INT64_MIN <= self.seed <= INT64_MAX, "a 64-bit integer")

    def _check_masks(self) -> None:
        num_biases = len(self.logit_bias)
        _check(
            "logit_bias", num_biases, num_biases <= MAX_LOGIT_BIASES, f"at most {MAX_LOGIT_BIASES} entries"
        )
        for token_id, bias in self.logit_bias:
            _check("logit_bias", f"{token_id}: {bias}", -100 <= bias <= 100, "numbers between -100 and 100")
        if self.allowed_token_ids is not None:
            _check("allowed_token_ids", [], bool(self.allowed_token_ids), "a list with at least one id")
        total = sum(map(len, self.bad_words_token_ids))
        _check(
            "bad_words", total, total <= MAX_BAD_WORD_TOKENS, f"at most {MAX_BAD_WORD_TOKENS} tokens in all"
        )

    def _check_end(self) -> None:
        least = 0 if self.prompt_logprobs is not None else 1
        _check("max_tokens", self.max_tokens, self.max_tokens >= least, f"at least {least}")
        ok = 0 <= self.min_tokens <= self.max_tokens
        _check("min_tokens", self.min_tokens, ok, f"between 0 and max_tokens ({self.max_tokens})")
        _check(
            "stop", len(self.stop), len(self.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} strings"
        )
        for string in self.stop:
            ok = 1 <= len(string) <= MAX_STOP_STRING_CHARS
            _check("stop", string, ok, f"strings of 1 to {MAX_STOP_STRING_CHARS} characters")
        ok = len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS
        _check("stop_token_ids", len(self.stop_token_ids), ok, f"at most {MAX_STOP_TOKEN_IDS} ids")

    @property
    def num_sequences(self) -> int:
        """Sequences that are generated, or the width of the beam search."""
        return self.n if self.best_of is None else self.best_of

    @property
    def reports_logprobs(self) -> bool:
        """Whether each token comes with its log-probability; to choose among candidates takes them, too."""
        return self.logprobs is not None or (self.num_sequences > self.n and not self.use_beam_search)

    @property
    def has_penalties(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def changes_logits(self) -> bool:
        """Whether tokens are drawn from other logits than the model's (`logits_processors`), or for beams."""
        fixed = (
            self.logit_bias
            or self.allowed_token_ids is not None
            or self.bad_words_token_ids
            or self.min_tokens
        )
        return bool(fixed) or self.has_penalties or self.use_beam_search

    @property
    def needs_values(self) -> bool:
        """Whether what may come next depends on which tokens have been sampled, in a way that the host decides."""
        return self.use_beam_search or any(len(word) > 1 for word in self.bad_words_token_ids)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_EPSILON

    def pack(self, seed: int, choice: int) -> bytes:
        """DRAW_INPUTS of a sequence, 4 bytes each."""
        num_logprobs = (self.logprobs or 0) if self.reports_logprobs else NO_LOGPROBS
        if self.greedy:
            return DRAW.pack(0.0, 1.0, 0.0, 0, 0, 0, 0, num_logprobs)
        low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        top_k = min(max(self.top_k, 0), INT32_MAX)
        return DRAW.pack(self.temperature, self.top_p, self.min_p, top_k, low, high, choice, num_logprobs)


def _check(param: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise RequestError(f"{param} must be {allowed}, got {str(value)[:100]!r}.", param=param)

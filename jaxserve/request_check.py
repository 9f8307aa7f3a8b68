"""What the engine refuses. The front checks all of this before; a request that slips through must not harm others."""

from __future__ import annotations

from jaxserve.config import SchedulingPolicy
from jaxserve.errors import RequestError
from jaxserve.messages import AddRequest
from jaxserve.slot_tables import MAX_EOS_TOKEN_IDS


def check_request(
    request: AddRequest,
    *,
    max_model_len: int,
    vocab_size: int,
    max_logprobs: int,
    has_tokenizer: bool,
    scheduling_policy: SchedulingPolicy = "fcfs",
) -> None:
    """Whether this engine can serve the request.

    Raises:
        RequestError: it cannot.
    """
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise RequestError("The prompt cannot be empty.", param="prompt")
    if len(prompt) + min(params.max_tokens, 1) > max_model_len:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens, the model takes {max_model_len} with the output.",
            param="prompt",
            code="context_length_exceeded",
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RequestError(f"Token ids must be in [0, {vocab_size}).", param="prompt")
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > max_logprobs:
            raise RequestError(f"{name} must be at most {max_logprobs}.", param=name)
    named = [i for i, _ in params.logit_bias] + [i for word in params.bad_words_token_ids for i in word]
    named += [*(params.allowed_token_ids or ()), *params.stop_token_ids]
    if named and not 0 <= min(named) <= max(named) < vocab_size:
        raise RequestError(f"Token ids must be in [0, {vocab_size}).", param="logit_bias")
    if params.use_beam_search and params.stop and not has_tokenizer:
        raise RequestError("Stop strings of beam search need a tokenizer in the engine.", param="stop")
    if request.priority != 0 and scheduling_policy != "priority":
        raise RequestError("A priority other than 0 needs --scheduling-policy priority.", param="priority")
    if len(request.eos_token_ids) > MAX_EOS_TOKEN_IDS:
        raise RequestError(f"At most {MAX_EOS_TOKEN_IDS} end-of-sequence ids are possible.")

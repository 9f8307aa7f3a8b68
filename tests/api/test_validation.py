"""Every request field: what is accepted, what is refused, with which code, at which path, in which words."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from jaxserve.api.errors import HttpError, error_body
from jaxserve.api.protocol import ChatRequest, CompletionRequest, Protocol
from jaxserve.api.request_tables import ProtocolConfig, chat_table, completion_table
from jaxserve.errors import RequestError

V, L = 100, 64
CONFIG = ProtocolConfig(model_names=("org/model", "alias"), vocab_size=V, max_model_len=L)
PROTOCOL = Protocol(CONFIG)
HELLO = [{"role": "user", "content": "hi"}]

Row = tuple[dict[str, Any], str, str | None, str]  # changes to the body, code, param, part of the message


def completion(changes: dict[str, Any], protocol: Protocol = PROTOCOL) -> CompletionRequest:
    return protocol.completion({"model": "org/model", "prompt": "hi"} | changes)


def chat(changes: dict[str, Any], protocol: Protocol = PROTOCOL) -> ChatRequest:
    return protocol.chat({"model": "org/model", "messages": HELLO} | changes)


def message(**members: Any) -> dict[str, Any]:
    return {"messages": [*HELLO, members]}


def part(value: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, value]}]}


TYPE, VALUE = "invalid_type", "invalid_value"
UNSUPPORTED, UNSUPPORTED_VALUE = "unsupported_parameter", "unsupported_value"
MISSING, UNKNOWN = "missing_required_parameter", "unknown_parameter"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
BEAMS: dict[str, Any] = {"use_beam_search": True, "best_of": 4}

BOTH: list[Row] = [
    ({"model": None}, MISSING, "model", "model is required"),
    ({"model": 5}, TYPE, "model", "must be a string, got an integer (5)"),
    ({"model": ["org/model"]}, TYPE, "model", "got an array"),
    ({"temperatur": 1}, UNKNOWN, "temperatur", "Did you mean 'temperature'?"),
    ({"xyzzy": None}, UNKNOWN, "xyzzy", "Unknown field 'xyzzy'"),
    ({"": 1}, UNKNOWN, None, "Unknown field ''"),
    # sampling
    ({"temperature": -0.1}, VALUE, "temperature", "between 0 and 2, got -0.1"),
    ({"temperature": 2.1}, VALUE, "temperature", "between 0 and 2, got 2.1"),
    ({"temperature": "1"}, TYPE, "temperature", "must be a number, got a string ('1')"),
    ({"temperature": True}, TYPE, "temperature", "got a boolean (true)"),
    ({"temperature": []}, TYPE, "temperature", "got an array"),
    ({"temperature": 10**400}, VALUE, "temperature", "between 0 and 2"),
    ({"top_p": 0}, VALUE, "top_p", "greater than 0 and at most 1, got 0"),
    ({"top_p": 1.01}, VALUE, "top_p", "at most 1"),
    ({"top_p": "0.5"}, TYPE, "top_p", "must be a number"),
    ({"top_k": -2}, VALUE, "top_k", "at least -1, got -2"),
    ({"top_k": 5.5}, TYPE, "top_k", "must be an integer, got a number (5.5)"),
    ({"top_k": "5"}, TYPE, "top_k", "must be an integer"),
    ({"min_p": -0.1}, VALUE, "min_p", "between 0 and 1"),
    ({"min_p": 1.5}, VALUE, "min_p", "between 0 and 1, got 1.5"),
    ({"min_p": False}, TYPE, "min_p", "must be a number"),
    ({"presence_penalty": 2.5}, VALUE, "presence_penalty", "between -2 and 2"),
    ({"presence_penalty": "x"}, TYPE, "presence_penalty", "must be a number"),
    ({"frequency_penalty": -3}, VALUE, "frequency_penalty", "between -2 and 2, got -3"),
    ({"repetition_penalty": 0}, VALUE, "repetition_penalty", "greater than 0"),
    ({"repetition_penalty": -1.0}, VALUE, "repetition_penalty", "greater than 0"),
    ({"repetition_penalty": "1.1"}, TYPE, "repetition_penalty", "must be a number"),
    ({"repetition_penalty": 2**64}, "invalid_json", "repetition_penalty", "more than 64 bits"),
    ({"logit_bias": []}, TYPE, "logit_bias", "an object from token ids to numbers"),
    ({"logit_bias": {"1": "2"}}, TYPE, "logit_bias", "logit_bias.1 must be a number"),
    ({"logit_bias": {"a": 1, "2": 1, "b": 1, "-1": 1}}, VALUE, "logit_bias", "no integers: a, b;"),
    ({"logit_bias": {"a": 1, "2": 1, "-1": 1}}, VALUE, "logit_bias", "vocabulary of 100: -1."),
    (
        {"logit_bias": {"a": 1, "100": 1, "2": 101}},
        VALUE,
        "logit_bias",
        "a; has token ids outside the vocabulary of 100: 100; must have values between -100 and 100; at fault: 2.",
    ),
    ({"logit_bias": {"1.0": 1}}, VALUE, "logit_bias", "no integers: 1.0"),
    ({"logit_bias": {"": 1}}, VALUE, "logit_bias", "no integers"),
    ({"logit_bias": {"9" * 5000: 1}}, VALUE, "logit_bias", "vocabulary of 100: 99"),
    ({"logit_bias": {"1": 10**400}}, VALUE, "logit_bias", "at fault: 1"),
    ({"logit_bias": {"1": None}}, TYPE, "logit_bias", "got null"),
    ({"logit_bias": {"1": True}}, TYPE, "logit_bias", "got a boolean"),
    ({"logit_bias": {"100": 1, "7": 1, "101": 2}}, VALUE, "logit_bias", "vocabulary of 100: 100, 101"),
    ({"logit_bias": {"1": 101, "2": -100.5, "3": 1}}, VALUE, "logit_bias", "at fault: 1, 2"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, VALUE, "logit_bias", "at most 1,024"),
    ({"allowed_token_ids": []}, VALUE, "allowed_token_ids", "at least 1"),
    ({"allowed_token_ids": [V]}, VALUE, "allowed_token_ids", "token id 100"),
    ({"allowed_token_ids": ["1"]}, TYPE, "allowed_token_ids", "allowed_token_ids[0] must be an integer"),
    ({"allowed_token_ids": [-1]}, VALUE, "allowed_token_ids", "token id -1"),
    ({"allowed_token_ids": [1] * (V + 1)}, VALUE, "allowed_token_ids", "at most 100"),
    ({"allowed_token_ids": 1}, TYPE, "allowed_token_ids", "an array of token ids"),
    ({"allowed_token_ids": [1.5]}, TYPE, "allowed_token_ids", "must be an integer"),
    ({"bad_words": "x"}, TYPE, "bad_words", "an array of strings"),
    ({"bad_words": [""]}, VALUE, "bad_words", "1 to 256 characters"),
    ({"bad_words": ["x"] * 129}, VALUE, "bad_words", "at most 128"),
    ({"bad_words": ["x" * 257]}, VALUE, "bad_words", "got 257"),
    ({"bad_words": [1]}, TYPE, "bad_words", "bad_words[0] must be a string"),
    ({"bad_words": [["x"]]}, TYPE, "bad_words", "bad_words[0] must be a string, got an array"),
    ({"seed": 2**63}, VALUE, "seed", "64-bit"),
    ({"seed": -(2**63) - 1}, VALUE, "seed", "64-bit"),
    ({"seed": 1.5}, TYPE, "seed", "must be an integer"),
    ({"seed": "1"}, TYPE, "seed", "must be an integer"),
    ({"n": 0}, VALUE, "n", "between 1 and 128, got 0"),
    ({"n": -1}, VALUE, "n", "between 1 and 128"),
    ({"n": 129}, VALUE, "n", "between 1 and 128"),
    ({"n": 10**9}, VALUE, "n", "between 1 and 128"),
    ({"n": 1.5}, TYPE, "n", "must be an integer"),
    ({"n": True}, TYPE, "n", "must be an integer, got a boolean"),
    ({"n": "2"}, TYPE, "n", "must be an integer"),
    ({"n": 3, "best_of": 2}, VALUE, "best_of", "at least n (3), got 2"),
    ({"best_of": 0}, VALUE, "best_of", "between 1 and 128"),
    ({"best_of": 129}, VALUE, "best_of", "between 1 and 128"),
    ({"best_of": "2"}, TYPE, "best_of", "must be an integer"),
    ({"best_of": 2, "stream": True}, UNSUPPORTED, "best_of", "cannot be streamed"),
    ({"n": 2, "best_of": 3, "stream": True}, UNSUPPORTED, "best_of", "cannot be streamed"),
    ({"use_beam_search": 1}, TYPE, "use_beam_search", "must be a boolean, got an integer (1)"),
    ({"length_penalty": 2.0}, VALUE, "length_penalty", "only with use_beam_search"),
    ({"length_penalty": 0}, VALUE, "length_penalty", "only with use_beam_search"),
    ({"length_penalty": "x"}, TYPE, "length_penalty", "must be a number"),
    ({"length_penalty": -(10**400)}, VALUE, "length_penalty", "a finite number"),
    ({"length_penalty": 10**30}, "invalid_json", "length_penalty", "more than 64 bits"),
    ({"early_stopping": True}, VALUE, "early_stopping", "only with use_beam_search"),
    ({"early_stopping": "never"}, VALUE, "early_stopping", "only with use_beam_search"),
    # beam search
    (BEAMS | {"n": 1, "best_of": 1}, VALUE, "best_of", "at least 2, got 1"),
    ({"use_beam_search": True}, VALUE, "best_of", "at least 2, got 1"),
    (BEAMS | {"n": 5}, VALUE, "best_of", "at least n (5), got 4"),
    (BEAMS | {"temperature": 0.5}, VALUE, "temperature", "temperature must be 0 when using beam search"),
    (BEAMS | {"temperature": 1}, VALUE, "temperature", "must be 0 when using beam search, got 1"),
    (BEAMS | {"temperature": 1e-6}, VALUE, "temperature", "must be 0"),
    (BEAMS | {"top_p": 0.9}, VALUE, "top_p", "must be 1 when using beam search"),
    (BEAMS | {"top_k": 5}, VALUE, "top_k", "must be -1 or 0 when using beam search"),
    (BEAMS | {"top_k": V}, VALUE, "top_k", "must be -1 or 0 when using beam search"),
    (BEAMS | {"min_p": 0.1}, VALUE, "min_p", "must be 0 when using beam search"),
    (BEAMS | {"stream": True}, UNSUPPORTED, "stream", "must be false when using beam search"),
    (BEAMS | {"best_of": 129}, VALUE, "best_of", "between 1 and 128"),
    ({"early_stopping": "soon"}, VALUE, "early_stopping", "'never'"),
    (BEAMS | {"early_stopping": "soon"}, VALUE, "early_stopping", "'never'"),
    (BEAMS | {"length_penalty": True}, TYPE, "length_penalty", "must be a number"),
    ({"early_stopping": 1}, TYPE, "early_stopping", "a boolean or a string"),
    # stopping
    ({"max_tokens": -1}, VALUE, "max_tokens", "at least"),
    ({"max_tokens": 0}, VALUE, "max_tokens", "at least 1"),
    ({"max_tokens": "5"}, TYPE, "max_tokens", "must be an integer"),
    ({"max_tokens": 1.5}, TYPE, "max_tokens", "must be an integer"),
    ({"min_tokens": -1}, VALUE, "min_tokens", "at least 0"),
    ({"min_tokens": 1.5}, TYPE, "min_tokens", "must be an integer"),
    (
        {"min_tokens": 6, "max_tokens": 5},
        VALUE,
        "min_tokens",
        "min_tokens must be at most max_tokens (5), got 6",
    ),
    ({"min_tokens": L + 1, "max_tokens": None}, VALUE, "min_tokens", "at most max_tokens (64), got 65"),
    ({"min_tokens": 10**4000}, VALUE, "min_tokens", "min_tokens"),
    ({"stop": ""}, VALUE, "stop", "1 to 256 characters, got 0"),
    ({"stop": ["a", ""]}, VALUE, "stop", "stop[1]"),
    ({"stop": "x" * 257}, VALUE, "stop", "got 257 characters"),
    ({"stop": ["x"] * 17}, VALUE, "stop", "at most 16"),
    ({"stop": 5}, TYPE, "stop", "a string or an array of strings"),
    ({"stop": ["a", 5]}, TYPE, "stop", "stop[1] must be a string, got an integer (5)"),
    ({"stop": [None]}, TYPE, "stop", "stop[0] must be a string, got null"),
    ({"stop": {"a": 1}}, TYPE, "stop", "got an object"),
    ({"stop_token_ids": [V]}, VALUE, "stop_token_ids", "token id 100, which is not in the vocabulary"),
    ({"stop_token_ids": [-1]}, VALUE, "stop_token_ids", "token id -1"),
    ({"stop_token_ids": [1] * 1025}, VALUE, "stop_token_ids", "at most 1,024"),
    ({"stop_token_ids": ["1"]}, TYPE, "stop_token_ids", "stop_token_ids[0]"),
    ({"stop_token_ids": 1}, TYPE, "stop_token_ids", "an array of token ids"),
    ({"include_stop_str_in_output": "yes"}, TYPE, "include_stop_str_in_output", "must be a boolean"),
    ({"ignore_eos": 0}, TYPE, "ignore_eos", "must be a boolean, got an integer (0)"),
    ({"skip_special_tokens": "true"}, TYPE, "skip_special_tokens", "must be a boolean"),
    ({"spaces_between_special_tokens": 1}, TYPE, "spaces_between_special_tokens", "must be a boolean"),
    # prompt handling
    ({"add_special_tokens": 1}, TYPE, "add_special_tokens", "must be a boolean"),
    ({"truncate_prompt_tokens": 0}, VALUE, "truncate_prompt_tokens", "between 1 and 64, or -1, got 0"),
    ({"truncate_prompt_tokens": -2}, VALUE, "truncate_prompt_tokens", "or -1"),
    ({"truncate_prompt_tokens": L + 1}, VALUE, "truncate_prompt_tokens", "got 65"),
    ({"truncate_prompt_tokens": "8"}, TYPE, "truncate_prompt_tokens", "must be an integer"),
    ({"truncation_side": "middle"}, VALUE, "truncation_side", "one of 'left', 'right', got 'middle'"),
    ({"cache_salt": ""}, VALUE, "cache_salt", "1 to 128 characters"),
    ({"cache_salt": "x" * 129}, VALUE, "cache_salt", "got 129"),
    ({"cache_salt": 1}, TYPE, "cache_salt", "must be a string"),
    ({"request_id": "a b"}, VALUE, "request_id", "1 to 128 of"),
    ({"request_id": ""}, VALUE, "request_id", "1 to 128 of"),
    ({"request_id": "x" * 129}, VALUE, "request_id", "1 to 128 of"),
    ({"request_id": "a\n"}, VALUE, "request_id", "1 to 128 of"),
    # output
    ({"prompt_logprobs": 21}, VALUE, "prompt_logprobs", "between 0 and 20"),
    ({"prompt_logprobs": "1"}, TYPE, "prompt_logprobs", "must be an integer"),
    ({"prompt_logprobs": -1}, VALUE, "prompt_logprobs", "between 0 and 20, got -1"),
    ({"prompt_logprobs": True}, TYPE, "prompt_logprobs", "must be an integer"),
    ({"prompt_logprobs": 0, "stream": True}, UNSUPPORTED, "prompt_logprobs", "not served in streams"),
    ({"return_tokens_as_token_ids": 1}, TYPE, "return_tokens_as_token_ids", "must be a boolean"),
    ({"return_token_ids": "x"}, TYPE, "return_token_ids", "must be a boolean"),
    ({"echo": "x"}, TYPE, "echo", "must be a boolean"),
    ({"stream": "true"}, TYPE, "stream", "must be a boolean, got a string ('true')"),
    ({"stream_options": {}}, VALUE, "stream_options", "needs stream to be true"),
    ({"stream_options": {"include_usage": True}, "stream": False}, VALUE, "stream_options", "needs stream"),
    ({"stream_options": [], "stream": True}, TYPE, "stream_options", "must be an object"),
    ({"stream_options": {"x": 1}, "stream": True}, UNKNOWN, "stream_options.x", "in stream_options"),
    (
        {"stream_options": {"include_usage": 1}, "stream": True},
        TYPE,
        "stream_options.include_usage",
        "must be a boolean",
    ),
    (
        {"stream_options": {"continuous_usage_stats": True}, "stream": True},
        VALUE,
        "stream_options.continuous_usage_stats",
        "needs stream_options.include_usage",
    ),
    (
        {"stream_options": {"include_obfuscation": True}, "stream": True},
        UNSUPPORTED_VALUE,
        "stream_options.include_obfuscation",
        "must be false",
    ),
    # structured output
    ({"response_format": "json"}, TYPE, "response_format", "must be an object"),
    ({"response_format": {}}, MISSING, "response_format.type", "is required"),
    ({"response_format": {"type": 1}}, TYPE, "response_format.type", "must be a string"),
    ({"response_format": {"type": "yaml"}}, VALUE, "response_format.type", "'json_schema', got 'yaml'"),
    ({"response_format": {"type": "text", "x": 1}}, UNKNOWN, "response_format.x", "Unknown field 'x'"),
    ({"response_format": {"type": "json_schema"}}, MISSING, "response_format.json_schema", "required"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        MISSING,
        "response_format.json_schema.name",
        "required",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        MISSING,
        "response_format.json_schema.schema",
        "required",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"maximum": 2**70}},
            }
        },
        "invalid_json",
        "response_format.json_schema.schema",
        "more than 64 bits",
    ),
    ({"structured_outputs": {"regexp": "a"}}, UNKNOWN, "structured_outputs.regexp", "Did you mean 'regex'?"),
    ({"structured_outputs": {"regex": 1}}, TYPE, "structured_outputs.regex", "must be a string"),
    ({"guided_json": 5}, TYPE, "guided_json", "an object or a string"),
    ({"guided_regex": 5}, TYPE, "guided_regex", "must be a string"),
    ({"guided_choice": []}, VALUE, "guided_choice", "at least 1"),
    ({"guided_choice": ["a", "a"]}, VALUE, "guided_choice", "distinct"),
    ({"guided_choice": ["a", ""]}, VALUE, "guided_choice", "guided_choice[1]"),
    ({"guided_decoding_backend": "xgrammar"}, VALUE, "guided_decoding_backend", "'lm-format-enforcer'"),
    # OpenAI's fields without a meaning here
    ({"user": 5}, TYPE, "user", "must be a string"),
    ({"user": "x" * 1025}, VALUE, "user", "got 1025 characters"),
    ({"safety_identifier": "x" * 1025}, VALUE, "safety_identifier", "0 to 1024"),
    ({"prompt_cache_key": []}, TYPE, "prompt_cache_key", "must be a string"),
    ({"metadata": {"a": 1}}, TYPE, "metadata.a", "must be a string"),
    ({"metadata": {str(i): "x" for i in range(17)}}, VALUE, "metadata", "at most 16"),
    ({"metadata": "x"}, TYPE, "metadata", "an object with string values"),
    ({"store": True}, UNSUPPORTED_VALUE, "store", "nothing is stored"),
    ({"service_tier": "flex"}, UNSUPPORTED_VALUE, "service_tier", "one of 'auto', 'default'"),
    ({"modalities": ["text", "audio"]}, UNSUPPORTED_VALUE, "modalities", '["text"]'),
    ({"modalities": []}, UNSUPPORTED_VALUE, "modalities", '["text"]'),
    ({"modalities": "text"}, TYPE, "modalities", "an array of strings"),
    ({"prediction": {"type": "content"}}, MISSING, "prediction.content", "required"),
    ({"prediction": {"type": "other", "content": "x"}}, VALUE, "prediction.type", "'content'"),
    ({"verbosity": "extreme"}, UNSUPPORTED_VALUE, "verbosity", "'high', got 'extreme'"),
    ({"reasoning_effort": "maximal"}, UNSUPPORTED_VALUE, "reasoning_effort", "'xhigh'"),
    ({"prompt_cache_retention": "1h"}, VALUE, "prompt_cache_retention", "'24h'"),
    ({"prompt_cache_options": 1}, TYPE, "prompt_cache_options", "must be an object"),
    ({"audio": {"voice": "x"}}, UNSUPPORTED, "audio", "not supported"),
    ({"web_search_options": {}}, UNSUPPORTED, "web_search_options", "not supported"),
    ({"moderation": {}}, UNSUPPORTED, "moderation", "not supported"),
    ({"functions": []}, UNSUPPORTED, "functions", "not supported"),
    ({"function_call": "auto"}, UNSUPPORTED, "function_call", "not supported"),
    # vLLM's fields that are not served
    ({"prompt_embeds": "x"}, UNSUPPORTED, "prompt_embeds", "not supported"),
    ({"logprob_token_ids": [1]}, UNSUPPORTED, "logprob_token_ids", "not supported"),
    ({"priority": 1}, UNSUPPORTED, "priority", "other values need --scheduling-policy priority"),
    ({"priority": "0"}, TYPE, "priority", "must be an integer"),
    ({"kv_transfer_params": {}}, UNSUPPORTED, "kv_transfer_params", "not supported"),
    ({"ec_transfer_params": {}}, UNSUPPORTED, "ec_transfer_params", "not supported"),
    ({"mm_processor_kwargs": {}}, UNSUPPORTED, "mm_processor_kwargs", "not supported"),
    ({"media_io_kwargs": {}}, UNSUPPORTED, "media_io_kwargs", "not supported"),
    ({"vllm_xargs": {}}, UNSUPPORTED, "vllm_xargs", "not supported"),
    ({"repetition_detection": {}}, UNSUPPORTED, "repetition_detection", "not supported"),
    ({"thinking_token_budget": 1}, UNSUPPORTED, "thinking_token_budget", "not supported"),
    ({"include_reasoning": False}, UNSUPPORTED, "include_reasoning", "must be true"),
    ({"stream_interval": 2}, UNSUPPORTED, "stream_interval", "not supported"),
    ({"watermarking": {}}, UNSUPPORTED, "watermarking", "not supported"),
    ({"session_id": "x"}, UNSUPPORTED, "session_id", "not supported"),
]

COMPLETION: list[Row] = [
    ({"prompt": None}, MISSING, "prompt", "prompt is required"),
    ({"prompt": ""}, VALUE, "prompt", "prompt cannot be empty"),
    ({"prompt": []}, VALUE, "prompt", "prompt cannot be empty"),
    ({"prompt": [[]]}, VALUE, "prompt", "prompt cannot be empty"),
    ({"prompt": ["a", ""]}, VALUE, "prompt", "prompt cannot be empty"),
    ({"prompt": [[1], []]}, VALUE, "prompt", "prompt cannot be empty"),
    ({"prompt": 5}, TYPE, "prompt", "a string, an array of strings"),
    ({"prompt": {"a": 1}}, TYPE, "prompt", "got an object"),
    ({"prompt": ["a", 1]}, TYPE, "prompt", "an array with a string, an integer"),
    ({"prompt": [1, "a"]}, TYPE, "prompt", "prompt[1] must be an integer"),
    ({"prompt": [[1], "a"]}, TYPE, "prompt", "got an array with"),
    ({"prompt": [True]}, TYPE, "prompt", "got an array with a boolean"),
    ({"prompt": [[1.5]]}, TYPE, "prompt", "must be an integer"),
    ({"prompt": [None]}, TYPE, "prompt", "null"),
    ({"prompt": [V]}, VALUE, "prompt", "token id 100, which is not in the vocabulary"),
    ({"prompt": [1, -1]}, VALUE, "prompt", "token id -1"),
    ({"prompt": [[1], [2, V]]}, VALUE, "prompt", "prompt[1] holds the token id 100"),
    ({"prompt": [10**30]}, VALUE, "prompt", "(vocabulary size 100)"),
    ({"prompt": ["a"] * 1025}, VALUE, "prompt", "at most 1,024"),
    ({"prompt": ["a"] * 513, "n": 2}, VALUE, "n", "1026 sequences"),
    ({"logprobs": 21}, VALUE, "logprobs", "between 0 and 20"),
    ({"logprobs": -1}, VALUE, "logprobs", "between 0 and 20"),
    ({"logprobs": True}, TYPE, "logprobs", "must be an integer"),
    ({"suffix": "x"}, UNSUPPORTED, "suffix", "not supported"),
    ({"suffix": 5}, UNSUPPORTED, "suffix", "not supported"),
    ({"prompt": ["a"] * 513, "best_of": 2}, VALUE, "best_of", "1026 sequences"),
    ({"prompt": ["a"] * 9} | BEAMS | {"best_of": 128}, VALUE, "best_of", "1152 sequences"),
    ({"min_tokens": 17}, VALUE, "min_tokens", "at most max_tokens (16), got 17"),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, VALUE, "min_tokens", "at most max_tokens (0), got 1"),
    ({"max_tokens": 0, "logprobs": 1}, VALUE, "max_tokens", "for echo alone"),
    ({"max_tokens": 0, "prompt_logprobs": 1}, VALUE, "max_tokens", "for echo alone"),
    ({"messages": HELLO}, UNKNOWN, "messages", "Unknown field 'messages'"),
    ({"max_completion_tokens": 5}, UNKNOWN, "max_completion_tokens", "Unknown field"),
    ({"top_logprobs": 5}, UNKNOWN, "top_logprobs", "Unknown field"),
]

CHAT: list[Row] = [
    ({"messages": None}, MISSING, "messages", "messages is required"),
    ({"messages": []}, VALUE, "messages", "at least 1"),
    ({"messages": "hi"}, TYPE, "messages", "must be an array"),
    ({"messages": {"role": "user"}}, TYPE, "messages", "must be an array"),
    ({"messages": ["hi"]}, TYPE, "messages[0]", "must be an object"),
    ({"messages": [None]}, TYPE, "messages[0]", "got null"),
    ({"messages": [{}]}, MISSING, "messages[0].role", "required"),
    (message(role=5, content="x"), TYPE, "messages[1].role", "must be a string"),
    (message(role="", content="x"), VALUE, "messages[1].role", "1 to 64"),
    (message(role="x" * 65, content="x"), VALUE, "messages[1].role", "got 65"),
    (message(role="user"), MISSING, "messages[1].content", "required"),
    (message(role="user", content=None), MISSING, "messages[1].content", "required"),
    (message(role="assistant"), MISSING, "messages[1].content", "required"),
    (message(role="assistant", tool_calls=[]), MISSING, "messages[1].content", "required"),
    (message(role="user", content=5), TYPE, "messages[1].content", "a string or an array"),
    (message(role="user", content=[]), VALUE, "messages[1].content", "at least 1"),
    (message(role="user", content="x", weight=1), UNKNOWN, "messages[1].weight", "in messages[1]"),
    (message(role="user", content="x", name=1), TYPE, "messages[1].name", "must be a string"),
    (message(role="tool", content="x", tool_call_id=1), TYPE, "messages[1].tool_call_id", "must be a string"),
    (message(role="assistant", content="x", refusal=1), TYPE, "messages[1].refusal", "must be a string"),
    (
        message(role="assistant", content="x", audio={"id": "x"}),
        UNSUPPORTED,
        "messages[1].audio",
        "null or empty",
    ),
    (message(role="assistant", content="x", annotations=[1]), UNSUPPORTED, "messages[1].annotations", "null"),
    (
        message(role="assistant", content="x", function_call={"name": "f"}),
        UNSUPPORTED,
        "messages[1].function_call",
        "null or empty",
    ),
    (message(role="assistant", tool_calls=[{}]), MISSING, "messages[1].tool_calls[0].id", "required"),
    (
        message(role="assistant", tool_calls=[{"id": "1", "type": "function", "function": {"name": "f"}}]),
        MISSING,
        "messages[1].tool_calls[0].function.arguments",
        "required",
    ),
    (
        message(
            role="assistant",
            tool_calls=[{"id": "1", "type": "custom", "function": {"name": "f", "arguments": "{}"}}],
        ),
        VALUE,
        "messages[1].tool_calls[0].type",
        "'function'",
    ),
    (part("x"), TYPE, "messages[0].content[1]", "must be an object"),
    (part({}), MISSING, "messages[0].content[1].type", "required"),
    (part({"type": 1}), TYPE, "messages[0].content[1].type", "must be a string"),
    (part({"type": "text"}), MISSING, "messages[0].content[1].text", "required"),
    (part({"type": "text", "text": 1}), TYPE, "messages[0].content[1].text", "must be a string"),
    (part({"type": "text", "text": "x", "y": 1}), UNKNOWN, "messages[0].content[1].y", "Unknown field"),
    (
        part({"type": "image_url", "image_url": {"url": "http://x"}}),
        UNSUPPORTED_VALUE,
        "messages[0].content[1].type",
        "got 'image_url'",
    ),
    (part({"type": "input_audio"}), UNSUPPORTED_VALUE, "messages[0].content[1].type", "'text'"),
    (part({"type": "file"}), UNSUPPORTED_VALUE, "messages[0].content[1].type", "got 'file'"),
    ({"max_completion_tokens": 0}, VALUE, "max_completion_tokens", "at least 1"),
    (
        {"max_completion_tokens": 5, "max_tokens": 50, "min_tokens": 6},
        VALUE,
        "min_tokens",
        "at most max_completion_tokens (5), got 6",
    ),
    ({"max_completion_tokens": "5"}, TYPE, "max_completion_tokens", "must be an integer"),
    ({"max_tokens": 0, "echo": True}, VALUE, "max_tokens", "at least 1"),
    ({"logprobs": 1}, TYPE, "logprobs", "must be a boolean"),
    ({"logprobs": True, "top_logprobs": 21}, VALUE, "top_logprobs", "between 0 and 20"),
    ({"logprobs": True, "top_logprobs": -1}, VALUE, "top_logprobs", "between 0 and 20"),
    ({"top_logprobs": 1}, VALUE, "top_logprobs", "needs logprobs"),
    ({"top_logprobs": 1, "logprobs": False}, VALUE, "top_logprobs", "needs logprobs"),
    ({"add_generation_prompt": "x"}, TYPE, "add_generation_prompt", "must be a boolean"),
    ({"continue_final_message": True}, VALUE, "continue_final_message", "add_generation_prompt"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        VALUE,
        "continue_final_message",
        "needs add_generation_prompt to be false",
    ),
    ({"documents": [{"a": 1}]}, TYPE, "documents[0].a", "must be a string"),
    ({"documents": ["x"]}, TYPE, "documents[0]", "must be an object"),
    ({"chat_template": 1}, TYPE, "chat_template", "must be a string"),
    ({"chat_template_kwargs": {"messages": 1}}, VALUE, "chat_template_kwargs.messages", "reserved"),
    ({"chat_template_kwargs": {"_x": 1}}, VALUE, "chat_template_kwargs._x", "reserved"),
    ({"chat_template_kwargs": {"a": [2**80]}}, "invalid_json", "chat_template_kwargs", "64 bits"),
    ({"tools": []}, VALUE, "tools", "at least 1"),
    ({"tools": {}}, TYPE, "tools", "must be an array"),
    ({"tools": [{"type": "retrieval"}]}, VALUE, "tools[0].type", "'function'"),
    ({"tools": [{"type": "function"}]}, MISSING, "tools[0].function", "required"),
    (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        VALUE,
        "tools[0].function.name",
        "1 to 64 of",
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]},
        UNKNOWN,
        "tools[0].function.x",
        "x",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, VALUE, "tools", "at most 128"),
    ({"tool_choice": "sometimes"}, VALUE, "tool_choice", "'none', 'auto', 'required'"),
    ({"tool_choice": 5}, TYPE, "tool_choice", "a string or an object"),
    ({"tool_choice": {"type": "function"}}, MISSING, "tool_choice.function", "required"),
    ({"parallel_tool_calls": "x"}, TYPE, "parallel_tool_calls", "must be a boolean"),
    ({"prompt": "x"}, UNKNOWN, "prompt", "Unknown field 'prompt'"),
    ({"suffix": "x"}, UNKNOWN, "suffix", "Unknown field 'suffix'"),
]


def assert_refused(row: Row, parse: Any) -> None:
    changes, code, param, fragment = row
    with pytest.raises(RequestError) as refusal:
        parse(changes)
    error = refusal.value
    assert (error.code, error.param or None) == (code, param)
    assert fragment in str(error)
    body = error_body(error, "id")
    assert body.status == 400
    assert len(body.to_json()) < 4096


def row_id(row: Row) -> str:
    return f"{repr(row[0])[:50]}-{row[1]}"


@pytest.mark.parametrize("row", BOTH + COMPLETION, ids=row_id)
def test_a_faulty_completion_request_is_refused_where_the_fault_is(row: Row) -> None:
    assert_refused(row, completion)


@pytest.mark.parametrize("row", BOTH + CHAT, ids=row_id)
def test_a_faulty_chat_request_is_refused_where_the_fault_is(row: Row) -> None:
    assert_refused(row, chat)


def test_priorities_are_any_integers_where_the_server_has_them() -> None:
    protocol = Protocol(replace(CONFIG, scheduling_policy="priority"))
    for priority in (-(2**63), -1, 0, 7, 2**63 - 1):
        assert completion({"priority": priority}, protocol).priority == priority
        assert chat({"priority": priority}, protocol).priority == priority
    assert chat({"priority": None}, protocol).priority == 0
    with pytest.raises(RequestError, match="must be an integer"):
        completion({"priority": 0.5}, protocol)


NEUTRAL: list[dict[str, Any]] = [
    {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1},
    {"logit_bias": {}, "bad_words": [], "allowed_token_ids": None, "min_tokens": 0},
    {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "best_of": 1},
    {"n": 3, "best_of": 3},
    {"response_format": {"type": "text"}, "guided_decoding_backend": "outlines"},
    {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}, "store": False},
    {"service_tier": "auto", "modalities": ["text"], "verbosity": "low", "reasoning_effort": "none"},
    {"prediction": {"type": "content", "content": [{"type": "text", "text": "x"}]}},
    {"prompt_cache_retention": "24h", "prompt_cache_options": {"x": 1}},
    {
        "audio": None,
        "functions": None,
        "function_call": "none",
        "web_search_options": None,
        "moderation": None,
    },
    {"priority": 0, "include_reasoning": True, "session_id": None, "prompt_embeds": None},
    {"stream": True, "stream_options": None},
    {"stream": True, "stream_options": {}},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"model": "alias"},
]


@pytest.mark.parametrize("changes", NEUTRAL, ids=lambda changes: repr(changes)[:50])
def test_values_that_ask_for_nothing_change_nothing(changes: dict[str, Any]) -> None:
    assert completion(changes).sampling == completion({"n": changes.get("n", 1)}).sampling
    assert chat(changes).sampling == chat({"n": changes.get("n", 1)}).sampling


def test_tool_fields_without_tools_change_nothing() -> None:
    changes = {"tools": None, "tool_choice": "none", "parallel_tool_calls": True}
    assert chat(changes) == chat({})


@pytest.mark.parametrize(
    "name", sorted(completion_table(CONFIG).by_name.keys() - {"model", "prompt", "max_tokens"})
)
def test_null_means_absent_in_completions(name: str) -> None:
    assert completion({name: None}) == completion({})


@pytest.mark.parametrize("name", sorted(chat_table(CONFIG).by_name.keys() - {"model", "messages"}))
def test_null_means_absent_in_chat(name: str) -> None:
    assert chat({name: None}) == chat({})


def test_every_sampling_field_arrives_in_the_sampling_params() -> None:
    request = completion(
        {
            "temperature": 0.5,
            "top_p": 0.25,
            "top_k": 7,
            "min_p": 0.125,
            "presence_penalty": 0.5,
            "frequency_penalty": -1,
            "repetition_penalty": 1.5,
            "logit_bias": {"7": -100, "007": 3, "8": 0.5},
            "allowed_token_ids": [9, 7, 9],
            "min_tokens": 3,
            "prompt_logprobs": 2,
            "seed": 42,
            "n": 2,
            "stop": ["a", "b"],
            "stop_token_ids": [3, 4],
            "include_stop_str_in_output": True,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "logprobs": 5,
        }
    )
    params = request.sampling
    penalties = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    assert penalties == (0.5, -1.0, 1.5)
    assert params.logit_bias == ((7, 3.0), (8, 0.5))
    assert params.allowed_token_ids == (9, 7)
    assert (params.min_tokens, params.prompt_logprobs, request.output.prompt_logprobs) == (3, 2, 2)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 7, 0.125)
    assert (params.seed, params.n, params.stop, params.stop_token_ids) == (42, 2, ("a", "b"), (3, 4))
    assert (params.include_stop_str_in_output, params.ignore_eos) == (True, True)
    assert (params.skip_special_tokens, params.spaces_between_special_tokens) == (False, False)
    assert params.logprobs == request.output.logprobs == 5


def test_absent_sampling_fields_take_the_model_defaults_in_both_apis() -> None:
    config = ProtocolConfig(
        model_names=("org/model",),
        vocab_size=V,
        max_model_len=L,
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        repetition_penalty=1.3,
    )
    for request in (completion({}, Protocol(config)), chat({}, Protocol(config))):
        params = request.sampling
        assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.6, 0.9, 20, 0.05)
        assert params.repetition_penalty == 1.3
    beams = chat(
        BEAMS, Protocol(config)
    ).sampling  # the model's defaults are treated as off, but for the penalty
    assert (beams.temperature, beams.top_p, beams.top_k, beams.min_p) == (0.0, 1.0, -1, 0.0)
    assert beams.repetition_penalty == 1.3
    assert chat({"repetition_penalty": 1}, Protocol(config)).sampling.repetition_penalty == 1.0
    assert chat({"temperature": 1}, Protocol(config)).sampling.temperature == 1.0


@pytest.mark.parametrize(("sent", "meant"), [(-1, -1), (0, -1), (1, 1), (V - 1, V - 1), (V, -1), (10**6, -1)])
def test_top_k_is_off_at_minus_one_zero_and_the_vocabulary_size(sent: int, meant: int) -> None:
    assert completion({"top_k": sent}).sampling.top_k == meant


def test_seed_minus_one_means_none() -> None:
    assert completion({"seed": -1}).sampling.seed is None
    assert completion({"seed": -(2**63)}).sampling.seed == -(2**63)


def test_an_integral_number_is_an_integer() -> None:
    params = completion({"top_k": 5.0, "n": 2.0}).sampling
    assert (params.top_k, params.n) == (5, 2)
    assert type(params.top_k) is int


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2.0], ([1, 2],)),
        ([[1], [2, 3]], ([1], [2, 3])),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, meant: tuple[Any, ...]) -> None:
    assert completion({"prompt": prompt}).prompts == meant


@pytest.mark.parametrize(
    ("changes", "max_tokens", "field"),
    [({}, 16, None), ({"max_tokens": None}, None, None), ({"max_tokens": 5}, 5, "max_tokens")],
)
def test_completions_generate_sixteen_tokens_unless_told(changes: Any, max_tokens: Any, field: Any) -> None:
    length = completion(changes).length
    assert (length.max_tokens, length.max_tokens_field) == (max_tokens, field)


@pytest.mark.parametrize(
    ("changes", "max_tokens", "field"),
    [
        ({}, None, None),
        ({"max_tokens": None}, None, None),
        ({"max_tokens": 5}, 5, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 7}, 7, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5, "max_tokens"),
    ],
)
def test_max_completion_tokens_wins_over_max_tokens(changes: Any, max_tokens: Any, field: Any) -> None:
    length = chat(changes).length
    assert (length.max_tokens, length.max_tokens_field) == (max_tokens, field)


def test_chat_logprobs_are_the_top_logprobs() -> None:
    assert chat({"logprobs": True}).sampling.logprobs == 0
    assert chat({"logprobs": True, "top_logprobs": 3}).sampling.logprobs == 3
    assert chat({"top_logprobs": 0}).sampling.logprobs is None


def test_echo_alone_may_generate_nothing() -> None:
    assert completion({"echo": True, "max_tokens": 0}).length.max_tokens == 0
    params = completion({"echo": True, "max_tokens": 0, "n": 2, "logprobs": 1} | BEAMS).sampling
    assert (params.n, params.num_sequences, params.use_beam_search) == (2, 2, False)  # nothing to choose from


@pytest.mark.parametrize("parse", [completion, chat])
def test_beam_search_takes_its_options_and_neutral_sampling_values(parse: Any) -> None:
    neutral = {"temperature": 0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    for early_stopping in (True, False, "never"):
        changes = {"n": 3, "length_penalty": -0.5, "early_stopping": early_stopping}
        params = parse(BEAMS | neutral | changes).sampling
        assert (params.use_beam_search, params.n, params.best_of) == (True, 3, 4)
        assert (params.length_penalty, params.early_stopping) == (-0.5, early_stopping)
        assert (params.temperature, params.logprobs) == (0.0, None)
    assert parse({"use_beam_search": True, "n": 2}).sampling.num_sequences == 2  # n is the width


@pytest.mark.parametrize("parse", [completion, chat])
def test_candidates_are_ranked_by_logprobs_that_nobody_asked_for(parse: Any) -> None:
    request = parse({"n": 2, "best_of": 5})
    assert (request.sampling.best_of, request.sampling.logprobs, request.output.logprobs) == (5, 0, None)
    assert parse({"n": 2, "best_of": 2}).sampling == parse({"n": 2}).sampling
    assert parse({"n": 2, "best_of": 2, "stream": True}).output.stream


@pytest.mark.parametrize(
    ("changes", "of_the_engine", "shown"),
    [
        ({}, None, None),
        ({"logprobs": 3}, None, None),
        ({"echo": True}, None, None),
        ({"echo": True, "logprobs": 0}, 0, None),
        ({"echo": True, "logprobs": 3, "prompt_logprobs": 1}, 3, 1),
        ({"echo": True, "logprobs": 1, "prompt_logprobs": 3}, 3, 3),
        ({"prompt_logprobs": 0}, 0, 0),
    ],
)
def test_an_echo_with_logprobs_needs_those_of_the_prompt(
    changes: Any, of_the_engine: Any, shown: Any
) -> None:
    request = completion(changes)
    assert (request.sampling.prompt_logprobs, request.output.prompt_logprobs) == (of_the_engine, shown)


def test_a_chat_echo_needs_no_prompt_logprobs() -> None:
    assert chat({"echo": True, "logprobs": True}).sampling.prompt_logprobs is None


def test_min_tokens_may_be_as_many_as_max_tokens() -> None:
    assert completion({"min_tokens": 16}).sampling.min_tokens == 16
    assert completion({"min_tokens": L, "max_tokens": None}).length.min_tokens == L
    assert chat({"min_tokens": 5, "max_tokens": 5}).length.min_tokens == 5


def test_bad_words_wait_for_the_tokenizer() -> None:
    for request in (completion({"bad_words": ["a", "b c"]}), chat({"bad_words": ["a", "b c"]})):
        assert request.bad_words == ("a", "b c")


def test_continuing_the_final_message_needs_no_generation_prompt() -> None:
    assert chat(
        {"continue_final_message": True, "add_generation_prompt": False}
    ).prompt.continue_final_message


def test_messages_reach_the_template_as_they_were_sent() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "name": "bot"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
            ],
        },
        {"role": "tool", "content": "ok", "tool_call_id": "1"},
    ]
    sent = [{name: value for name, value in entry.items() if value is not None} for entry in messages]
    assert chat({"messages": messages}).prompt.messages == sent


def test_an_unknown_model_is_not_found_unless_the_schema_is_violated_first() -> None:
    with pytest.raises(HttpError) as refusal:
        completion({"model": "other", "temperature": 99, "suffix": "x"})
    assert (refusal.value.body.status, refusal.value.body.code) == (404, "model_not_found")
    assert refusal.value.body.message == "The model `other` does not exist."
    assert refusal.value.body.param == "model"
    with pytest.raises(RequestError):
        completion({"model": "other", "temperature": "hot"})


def test_all_types_are_checked_before_any_value() -> None:
    with pytest.raises(RequestError) as refusal:
        completion({"temperature": 99, "n": "x"})
    assert refusal.value.param == "n"


def test_ignored_unknown_fields_are_listed_at_every_level() -> None:
    config = ProtocolConfig(
        model_names=("org/model",), vocab_size=V, max_model_len=L, ignore_unknown_fields=True
    )
    changes = {
        "xyzzy": 1,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}], "weight": 2}],
        "stream": True,
        "stream_options": {"interval": 1},
    }
    request = chat(changes, Protocol(config))
    expected = {"xyzzy", "messages[0].weight", "messages[0].content[0].cache", "stream_options.interval"}
    assert set(request.ignored_fields) == expected
    assert request.prompt.messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    with pytest.raises(RequestError, match="not supported"):
        chat({"session_id": "x"}, Protocol(config))


def test_flags_set_defaults_of_output() -> None:
    config = ProtocolConfig(
        model_names=("org/model",),
        vocab_size=V,
        max_model_len=L,
        max_logprobs=3,
        return_tokens_as_token_ids=True,
        force_include_usage=True,
    )
    protocol = Protocol(config)
    assert completion({"stream": True}, protocol).output.include_usage
    assert not completion({}, protocol).output.include_usage
    assert completion({}, protocol).output.return_tokens_as_token_ids
    assert not completion({"return_tokens_as_token_ids": False}, protocol).output.return_tokens_as_token_ids
    with pytest.raises(RequestError, match="between 0 and 3"):
        completion({"logprobs": 4}, protocol)


HOSTILE: list[dict[str, Any]] = [
    {"stop": ["x"] * 1_000_000},
    {"stop": "x" * 4_000_000},
    {"n": 10**4999},
    {"seed": -(10**4999)},
    {"max_tokens": 10**4999},
    {"temperature": 10**4999},
    {"logit_bias": {str(i): 200 for i in range(300_000)}},
    {"stop_token_ids": [0] * 1_500_000},
    {"x" * 1_000_000: 1},
    {f"field{i}": 1 for i in range(200_000)},
    {"bad_words": ["\0" * 1000] * 4000},
    {"model": "m" * 1_000_000, "n": "x" * 1_000_000},
    {"truncation_side": "\0" * 100_000},
    {"metadata": {f"k{i}": "v" for i in range(200_000)}},
]


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: repr(list(changes)[:1])[:40])
@pytest.mark.parametrize("parse", [completion, chat])
def test_hostile_values_are_refused_quickly_and_briefly(changes: dict[str, Any], parse: Any) -> None:
    started = time.process_time()
    with pytest.raises(RequestError) as refusal:
        parse(changes)
    assert time.process_time() - started < 2.0
    assert len(error_body(refusal.value, "id").to_json()) < 4096


def test_a_message_repeats_at_most_a_hundred_characters_of_a_value() -> None:
    secret = "s" * 100 + "TAIL" * 10
    with pytest.raises(RequestError) as refusal:
        completion({"truncation_side": secret})
    assert "TAIL" not in str(refusal.value)


# /tokenize and /detokenize

TOKENIZE: list[Row] = [
    ({}, MISSING, "prompt", "One of prompt and messages"),
    ({"prompt": None, "messages": None}, MISSING, "prompt", "One of prompt and messages"),
    ({"prompt": "a", "messages": HELLO}, VALUE, "messages", "not both"),
    ({"prompt": 5}, TYPE, "prompt", "must be a string"),
    ({"prompt": ["a"]}, TYPE, "prompt", "must be a string"),
    ({"prompt": "a", "add_generation_prompt": True}, UNKNOWN, "add_generation_prompt", "Unknown field"),
    ({"prompt": "a", "temperature": 1}, UNKNOWN, "temperature", "Unknown field"),
    ({"prompt": "a", "return_token_strs": 1}, TYPE, "return_token_strs", "must be a boolean"),
    ({"messages": []}, VALUE, "messages", "at least 1"),
    ({"messages": HELLO, "continue_final_message": True}, VALUE, "continue_final_message", "false"),
    ({"messages": HELLO, "tools": []}, VALUE, "tools", "at least 1"),
    ({"messages": HELLO, "tools": [TOOL, TOOL]}, VALUE, "tools[1].function.name", "distinct"),
    ({"messages": HELLO, "tools": [TOOL], "tool_choice": "none"}, UNKNOWN, "tool_choice", "Unknown field"),
]
DETOKENIZE: list[Row] = [
    ({}, MISSING, "tokens", "required"),
    ({"tokens": "a"}, TYPE, "tokens", "an array of token ids"),
    ({"tokens": ["a"]}, TYPE, "tokens", "tokens[0]"),
    ({"tokens": [V]}, VALUE, "tokens", "token id 100"),
    ({"tokens": [-1]}, VALUE, "tokens", "token id -1"),
    ({"tokens": [], "x": 1}, UNKNOWN, "x", "Unknown field"),
]


@pytest.mark.parametrize("row", TOKENIZE, ids=row_id)
def test_a_faulty_tokenize_request_is_refused_where_the_fault_is(row: Row) -> None:
    assert_refused(row, PROTOCOL.tokenize)


@pytest.mark.parametrize("row", DETOKENIZE, ids=row_id)
def test_a_faulty_detokenize_request_is_refused_where_the_fault_is(row: Row) -> None:
    assert_refused(row, PROTOCOL.detokenize)


def test_special_tokens_are_added_to_text_but_not_to_conversations() -> None:
    assert PROTOCOL.tokenize({"prompt": "a"}).add_special_tokens
    assert not PROTOCOL.tokenize({"messages": HELLO}).add_special_tokens
    assert completion({}).add_special_tokens
    assert not chat({}).add_special_tokens

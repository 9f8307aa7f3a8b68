"""The command line: every flag reaches its setting, every fault is one line, and docs/flags.md says the same."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxserve.api.cli import make_parser, parse_args
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "flags.md"

# flag and values → field → value; the field is the engine's where EngineConfig has it
ADDRESS, TWO = ["--coordinator-address", "10.0.0.1:99"], ["--num-processes", "2"]
SPLIT, SECOND = ["--tensor-parallel-size", "2"], ["--process-id", "1"]
NGRAM = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SETTINGS: list[tuple[list[str], str, Any]] = [
    (["--tokenizer", "t"], "tokenizer", "t"),
    (["--served-model-name", "a"], "served_model_names", ("a",)),
    (["--dtype", "float32"], "dtype", "float32"),
    (["--quantization", "int8"], "quantization", "int8"),
    (["--kv-cache-dtype", "int8"], "kv_cache_dtype", "int8"),
    (["--kv-cache-dtype", "fp8_e4m3"], "kv_cache_dtype", "fp8"),
    (["--load-format", "dummy"], "load_format", "dummy"),
    (["--max-model-len", "2048"], "max_model_len", 2048),
    (["--seed", "7"], "seed", 7),
    (["--generation-config", "none"], "generation_config", "none"),
    (["--override-generation-config", '{"top_k": 3}'], "override_generation_config", {"top_k": 3}),
    (["--host", "::1"], "host", "::1"),
    (["--port", "0"], "port", 0),
    (["--uds", "/run/s"], "uds", "/run/s"),
    (["--api-key", "k"], "api_keys", ("k",)),
    (["--allowed-origins", "https://a.example"], "allowed_origins", ("https://a.example",)),
    (["--allowed-methods", "GET"], "allowed_methods", ("GET",)),
    (["--allowed-headers", "X-A"], "allowed_headers", ("X-A",)),
    (["--allow-credentials"], "allow_credentials", True),
    (["--ssl-keyfile", "k.pem", "--ssl-certfile", "c.pem"], "ssl_keyfile", "k.pem"),
    (["--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem"], "ssl_certfile", "c.pem"),
    (["--ssl-ca-certs", "ca.pem"], "ssl_ca_certs", "ca.pem"),
    (["--root-path", "/llm"], "root_path", "/llm"),
    (["--unknown-fields", "ignore"], "unknown_fields", "ignore"),
    (["--max-body-bytes", "1000"], "max_body_bytes", 1000),
    (["--max-connections", "5"], "max_connections", 5),
    (["--max-num-queued-reqs", "6"], "max_num_queued_reqs", 6),
    (["--max-num-queued-tokens", "7"], "max_num_queued_tokens", 7),
    (["--request-timeout", "0"], "request_timeout_s", 0.0),
    (["--stall-timeout", "1.5"], "stall_timeout_s", 1.5),
    (["--stall-limit", "2"], "stall_limit_s", 2.0),
    (["--shutdown-timeout", "3"], "shutdown_timeout_s", 3.0),
    (["--sse-keep-alive-interval", "4"], "sse_keep_alive_interval_s", 4.0),
    (["--enable-log-requests"], "enable_log_requests", True),
    (["--disable-docs"], "disable_docs", True),
    (["--log-level", "debug"], "log_level", "debug"),
    (["--chat-template", "x.jinja"], "chat_template", "x.jinja"),
    (["--response-role", "bot"], "response_role", "bot"),
    (["--default-chat-template-kwargs", '{"a": [1]}'], "default_chat_template_kwargs", {"a": [1]}),
    (["--no-request-chat-template"], "request_chat_template", False),
    (["--max-logprobs", "5"], "max_logprobs", 5),
    (["--logprobs-mode", "processed"], "logprobs_mode", "processed"),
    (["--logprobs-mode", "processed_logprobs"], "logprobs_mode", "processed"),
    (["--return-tokens-as-token-ids"], "return_tokens_as_token_ids", True),
    (["--enable-force-include-usage"], "enable_force_include_usage", True),
    (["--guided-decoding-backend", "outlines"], "guided_decoding_backend", "outlines"),
    (
        ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
        "enable_auto_tool_choice",
        True,
    ),
    (["--tool-call-parser", "pythonic", "--enable-auto-tool-choice"], "tool_call_parser", "pythonic"),
    (["--max-num-seqs", "3"], "max_num_seqs", 3),
    (["--max-num-batched-tokens", "99"], "max_num_batched_tokens", 99),
    (["--block-size", "32"], "block_size", 32),
    (["--attention-backend", "reference"], "attention_backend", "reference"),
    (["--gpu-memory-utilization", "0.5"], "memory_utilization", 0.5),
    (["--memory-utilization", "0.25"], "memory_utilization", 0.25),
    (["--kv-cache-memory-bytes", "12345"], "kv_cache_memory_bytes", 12345),
    (["--tensor-parallel-size", "4"], "tensor_parallel_size", 4),
    ([*ADDRESS, *TWO, *SPLIT], "coordinator_address", "10.0.0.1:99"),
    ([*TWO, *ADDRESS, *SPLIT], "num_processes", 2),
    ([*SECOND, *ADDRESS, *TWO, *SPLIT], "process_id", 1),
    (["--no-enable-prefix-caching"], "enable_prefix_caching", False),
    (["--enable-prefix-caching"], "enable_prefix_caching", True),
    (["--no-enable-chunked-prefill"], "enable_chunked_prefill", False),
    (["--enable-chunked-prefill"], "enable_chunked_prefill", True),
    (["--long-prefill-token-threshold", "9"], "long_prefill_token_threshold", 9),
    (["--scheduling-policy", "priority"], "scheduling_policy", "priority"),
    (["--profile-dir", "traces"], "profile_dir", "traces"),
    (["--async-scheduling"], "async_scheduling", True),
    (["--no-async-scheduling"], "async_scheduling", False),
    (["--speculative-config", json.dumps(NGRAM)], "speculative_config", NGRAM),
]


GO_TOGETHER = [
    {"ssl_keyfile", "ssl_certfile"},
    {"enable_auto_tool_choice", "tool_call_parser"},
    {"tensor_parallel_size", "coordinator_address", "num_processes", "process_id"},
]


@pytest.fixture(autouse=True)
def no_keys_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXSERVE_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("flags", "field", "value"), SETTINGS, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_a_flag_sets_its_field_and_no_other(flags: list[str], field: str, value: Any) -> None:
    expected, actual = _fields(ServerConfig(engine=EngineConfig(model="m"))), _fields(_parse(*flags))
    changed = {name for name in actual if actual[name] != expected[name]} | {field}
    assert actual[field] == value
    together = next((fields for fields in GO_TOGETHER if field in fields), {field})
    assert changed <= together


def test_every_field_of_the_configuration_has_a_flag() -> None:
    """But for the model, which every line has, and the compilation cache, which only tests turn off."""
    fields = set(_fields(_parse()))
    assert fields - {field for _, field, _ in SETTINGS} == {"model", "compilation_cache"}


def test_without_flags_the_defaults_are_the_configurations_own() -> None:
    assert _parse() == ServerConfig(engine=EngineConfig(model="m"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "m", "--port", "1"],
        ["--model=m", "--port=1"],
        ["serve", "m", "--port", "1"],
        ["serve", "--model", "m", "--port", "1"],
    ],
    ids=" ".join,
)
def test_the_model_may_follow_serve(arguments: list[str]) -> None:
    config = parse_args(arguments)
    assert (config.engine.model, config.port) == ("m", 1)


@pytest.mark.parametrize(
    ("flags", "origins"),
    [
        (["--allowed-origins", "https://a", "https://b"], ("https://a", "https://b")),
        (["--allowed-origins", "https://a", "--allowed-origins", "https://b"], ("https://a", "https://b")),
        (["--allowed-origins", '["https://a", "https://b"]'], ("https://a", "https://b")),
    ],
)
def test_a_list_takes_several_values_repetitions_or_a_json_array(flags: list[str], origins: Any) -> None:
    assert _parse(*flags).allowed_origins == origins


def test_names_in_their_order_and_the_model_where_there_are_none() -> None:
    assert _parse("--served-model-name", "a", "b", "--served-model-name", "c").model_names == ("a", "b", "c")
    assert _parse().model_names == ("m",)


def test_keys_of_flags_and_variable_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "third, fourth,")
    assert _parse("--api-key", "first", "--api-key", "second").api_keys == (
        "first", "second", "third", "fourth",
    )  # fmt: skip


def test_the_variable_is_gone_afterwards_so_that_no_child_process_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret")
    config = _parse()
    assert "JAXSERVE_API_KEY" not in os.environ
    assert "secret" not in repr(config)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--por", "1"], "--por"),  # abbreviations would change their meaning with every new flag
        (["stray"], "stray"),
        (["--port"], "--port"),
        (["--port", "many"], "--port: must be an integer, got 'many'"),
        (["--port", "65536"], "--port must be between 0 and 65535"),
        (["--port", "-1"], "--port must be between 0 and 65535"),
        (["--dtype", "int3"], "--dtype must be one of auto, bfloat16, float16, float32"),
        (["--load-format", "pt"], "--load-format must be one of auto, safetensors, gguf, dummy"),
        (["--scheduling-policy", "sjf"], "--scheduling-policy must be one of fcfs, priority"),
        (["--logprobs-mode", "some"], "--logprobs-mode must be one of raw, processed"),
        (["--log-level", "loud"], "--log-level must be one of"),
        (["--unknown-fields", "maybe"], "--unknown-fields must be one of reject, ignore"),
        (["--max-model-len", "0"], "--max-model-len must be an integer of at least 1"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens must be"),
        (["--max-num-queued-reqs", "0"], "--max-num-queued-reqs must be"),
        (["--max-num-queued-tokens", "0"], "--max-num-queued-tokens must be"),
        (["--max-connections", "0"], "--max-connections must be"),
        (["--max-body-bytes", "0"], "--max-body-bytes must be"),
        (["--kv-cache-memory-bytes", "0"], "--kv-cache-memory-bytes must be"),
        (["--block-size", "24"], "--block-size must be a power of two"),
        (["--attention-backend", "fast"], "--attention-backend must be one of auto, pallas_tpu, pallas_triton"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization must be greater than 0"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization must be"),
        (["--max-logprobs", "101"], "--max-logprobs must be between 0 and 100"),
        (["--request-timeout", "-1"], "--request-timeout must be a number of seconds"),
        (["--stall-timeout", "inf"], "--stall-timeout must be a number of seconds"),
        (["--stall-limit", "nan"], "--stall-limit must be a number of seconds"),
        (["--shutdown-timeout", "soon"], "--shutdown-timeout: must be a number, got 'soon'"),
        (["--root-path", "llm"], "--root-path must be a path that starts with"),
        (["--ssl-keyfile", "k"], "--ssl-keyfile must be given together with --ssl-certfile"),
        (["--ssl-certfile", "c"], "together with --ssl-certfile"),
        (["--default-chat-template-kwargs", "[]"], "--default-chat-template-kwargs: must be a JSON object"),
        (["--default-chat-template-kwargs", '{"a": 1, "documents": 1}'], "must not have 'documents'"),
        (["--default-chat-template-kwargs", '{"_x": 1}'], "must not have '_x'"),
        (["--override-generation-config", "{"], "--override-generation-config: must be a JSON object"),
        (["--allowed-origins", "[1]"], "JSON array of strings"),
        (["--api-key", ""], "--api-key must not be empty"),
        (["--api-key", "two words"], "API key must be printable and without spaces"),
        (["--quantization", "fp8"], "--quantization must be one of none, int8"),
        (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype must be one of auto, bfloat16,"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size must be an integer of at least 1"),
        (["--guided-decoding-backend", "xgrammar"], "--guided-decoding-backend must be one of auto, llguidance"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice and --tool-call-parser must be given together"),
        (["--tool-call-parser", "hermes"], "--enable-auto-tool-choice and --tool-call-parser must be given"),
        (["--tool-call-parser", "x"], "--tool-call-parser must be one of hermes, llama3_json, pythonic"),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else "",
)  # fmt: skip
def test_a_fault_is_one_line_that_names_the_flag(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _parse(*flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_is_required() -> None:
    with pytest.raises(ConfigError, match="--model"):
        parse_args([])
    with pytest.raises(ConfigError, match="--model"):
        parse_args(["--model", ""])


def test_a_refused_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        _parse("--api-key", "hush hush")
    assert "hush" not in str(caught.value)


def test_a_wrong_flag_ends_the_program_with_status_2_and_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "jaxserve.api", "--model", "m", "--port", "many"],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "jaxserve: argument --port: must be an integer, got 'many'\n"


# --- the page -------------------------------------------------------------------------------------------------


def _documented() -> dict[str, str]:
    """Flag → its default as the page says it."""
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.*?) \| .+ \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    flags = [flag for flag, _ in rows]
    assert len(flags) == len(set(flags)), "a flag stands on the page twice"
    return dict(rows)


def _actions() -> list[argparse.Action]:
    return make_parser()._actions


def test_the_page_has_every_flag_and_no_other() -> None:
    in_parser = {option for action in _actions() for option in action.option_strings} - {"-h"}
    assert set(_documented()) == in_parser


def test_the_page_gives_the_defaults_of_the_configuration() -> None:
    defaults = _fields(ServerConfig(engine=EngineConfig(model="m")))
    fields = {flags[0]: field for flags, field, _ in SETTINGS if not flags[0].startswith("--no-")}
    documented = _documented()
    for flag, field in fields.items():
        said, default = documented[flag], defaults[field]
        if default in (None, (), ""):  # decided later: by the model, the device or another flag
            assert not said.startswith("`"), flag
        else:
            assert said == _as_documented(default), flag


def test_the_readme_links_to_the_page() -> None:
    assert "docs/flags.md" in (ROOT / "README.md").read_text("utf-8")


def _as_documented(value: Any) -> str:
    match value:
        case bool():
            return "on" if value else "off"
        case float():
            return f"`{value:g}`"
        case tuple():
            return f"`{' '.join(value)}`"
    return f"`{value}`"


def _parse(*flags: str) -> ServerConfig:
    return parse_args(["--model", "m", *flags])


def _fields(config: ServerConfig) -> dict[str, Any]:
    """Of the server's and the engine's configuration together."""
    server = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "engine"}
    return server | {f.name: getattr(config.engine, f.name) for f in dataclasses.fields(config.engine)}

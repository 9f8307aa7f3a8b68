"""The command line → configuration. Names are vLLM's where one exists; docs/flags.md explains each."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import msgspec

import jaxserve
from jaxserve.api.request_tables import RESERVED_TEMPLATE_KWARGS
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.errors import ConfigError

KEY_VARIABLE = "JAXSERVE_API_KEY"
MAX_MESSAGE_CHARS = 500


class _Parser(argparse.ArgumentParser):
    """Faults are one line and exit status 2, whoever finds them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message[:MAX_MESSAGE_CHARS])


def make_parser() -> argparse.ArgumentParser:
    """Every flag; those left out are None, so that the defaults are the configuration's own."""
    parser = _Parser(
        prog="python -m jaxserve.api",
        description="Serve a large language model over OpenAI's API.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"jaxserve {jaxserve.__version__}")
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="directory, .gguf file or hub id")
    model.add_argument("--tokenizer", help="directory, .gguf file or hub id; the model's own")
    model.add_argument("--served-model-name", nargs="+", action="extend", help="names that requests may use")
    model.add_argument("--dtype", help="auto, bfloat16, float16 or float32")
    model.add_argument("--load-format", help="auto, safetensors, gguf or dummy")
    model.add_argument("--max-model-len", type=_int, help="tokens of prompt and output together")
    model.add_argument("--seed", type=_int, help="seeds requests without a seed")
    model.add_argument("--generation-config", help="auto, none, or a folder")
    model.add_argument(
        "--override-generation-config", type=_json_object, help="JSON object of sampling defaults"
    )
    server = parser.add_argument_group("server")
    server.add_argument("--host")
    server.add_argument("--port", type=_int)
    server.add_argument("--uds", help="serve on a UNIX socket instead")
    server.add_argument(
        "--api-key", nargs="+", action="extend", help=f"or, safer, {KEY_VARIABLE} (comma-separated)"
    )
    server.add_argument("--allowed-origins", nargs="+", action="extend", help="CORS is off without it")
    server.add_argument("--allowed-methods", nargs="+", action="extend")
    server.add_argument("--allowed-headers", nargs="+", action="extend")
    server.add_argument("--allow-credentials", action="store_true")
    server.add_argument("--ssl-keyfile")
    server.add_argument("--ssl-certfile")
    server.add_argument("--ssl-ca-certs")
    server.add_argument("--root-path", help="path under which a proxy shows this server")
    server.add_argument("--unknown-fields", help="reject or ignore")
    server.add_argument("--max-body-bytes", type=_int)
    server.add_argument("--max-connections", type=_int)
    server.add_argument("--max-num-queued-reqs", type=_int)
    server.add_argument("--max-num-queued-tokens", type=_int)
    server.add_argument("--request-timeout", type=_float, help="seconds; 0: none")
    server.add_argument("--stall-timeout", type=_float, help="seconds that a client may read nothing")
    server.add_argument("--stall-limit", type=_float, help="seconds that the engine may finish no step")
    server.add_argument("--shutdown-timeout", type=_float, help="seconds to drain at SIGTERM")
    server.add_argument("--sse-keep-alive-interval", type=_float, help="seconds; 0: none")
    server.add_argument("--enable-log-requests", action="store_true")
    server.add_argument("--disable-docs", action="store_true", help="serve neither /openapi.json nor /docs")
    server.add_argument("--log-level", help="debug, info, warning or error")
    text = parser.add_argument_group("prompts and outputs")
    text.add_argument("--chat-template", help="a file, or the template's text")
    text.add_argument("--response-role")
    text.add_argument(
        "--default-chat-template-kwargs", type=_template_kwargs, help="JSON object of template variables"
    )
    text.add_argument(
        "--no-request-chat-template",
        action="store_false",
        dest="request_chat_template",
        help="refuse chat_template and chat_template_kwargs in requests",
    )
    text.add_argument("--max-logprobs", type=_int)
    text.add_argument("--logprobs-mode", type=lambda s: s.removesuffix("_logprobs"), help="raw or processed")
    text.add_argument("--return-tokens-as-token-ids", action="store_true")
    text.add_argument("--enable-force-include-usage", action="store_true")
    text.add_argument("--guided-decoding-backend", help="auto, llguidance, outlines or lm-format-enforcer")
    text.add_argument(
        "--enable-auto-tool-choice", action="store_true", help="let the model decide whether to call tools"
    )
    text.add_argument("--tool-call-parser", help="hermes, llama3_json or pythonic")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-num-seqs", type=_int, help="sequences that run at once")
    engine.add_argument("--max-num-batched-tokens", type=_int, help="tokens of one step")
    engine.add_argument("--block-size", type=_int, help="tokens of a KV block")
    engine.add_argument(
        "--attention-backend", help="auto, or the name of one: docs/kernels.md lists what each can do"
    )
    engine.add_argument(
        "--gpu-memory-utilization",
        "--memory-utilization",
        type=_float,
        help="share of the device's memory to use",
    )
    engine.add_argument("--kv-cache-memory-bytes", type=_int)
    engine.add_argument("--tensor-parallel-size", type=_int, help="devices that share the model")
    engine.add_argument("--coordinator-address", help="host:port of process 0, where several processes meet")
    engine.add_argument("--num-processes", type=_int, help="processes of the engine, on one or several hosts")
    engine.add_argument("--process-id", type=_int, help="which one this is; 0 serves, the others follow it")
    engine.add_argument("--quantization", help="none, or int8: weights become int8 while they are loaded")
    engine.add_argument(
        "--kv-cache-dtype",
        type=lambda s: s.removesuffix("_e4m3"),
        help="auto, bfloat16, float16, float32, int8 or fp8 (fp8_e4m3)",
    )
    engine.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction)
    engine.add_argument("--enable-chunked-prefill", action=argparse.BooleanOptionalAction)
    engine.add_argument(
        "--long-prefill-token-threshold", type=_int, help="tokens a step of long prompts while others decode"
    )
    engine.add_argument("--scheduling-policy", help="fcfs, or priority: requests of a lower priority first")
    engine.add_argument("--profile-dir", help="where POST /start_profile and /stop_profile leave traces")
    engine.add_argument("--async-scheduling", action=argparse.BooleanOptionalAction)
    engine.add_argument(
        "--speculative-config",
        type=_json_object,
        help='JSON object, e.g. {"method": "ngram"}',
    )
    return parser


LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")
RENAMED = {
    "gpu_memory_utilization": "memory_utilization",
    "request_timeout": "request_timeout_s",
    "stall_timeout": "stall_timeout_s",
    "stall_limit": "stall_limit_s",
    "shutdown_timeout": "shutdown_timeout_s",
    "sse_keep_alive_interval": "sse_keep_alive_interval_s",
    "served_model_name": "served_model_names",
    "api_key": "api_keys",
}


def parse_args(arguments: Sequence[str]) -> ServerConfig:
    """Flags and JAXSERVE_API_KEY → configuration. The variable is removed from the environment, so that no
    child process inherits it.

    Raises:
        ConfigError: a flag is wrong; one line that names it.
    """
    arguments = list(arguments)
    if arguments[:1] == ["serve"]:
        arguments = arguments[1:]
        if arguments and not arguments[0].startswith("-"):
            arguments = ["--model", *arguments]
    from_variable = os.environ.pop(KEY_VARIABLE, "")
    given = {RENAMED.get(k, k): v for k, v in vars(make_parser().parse_args(arguments)).items()}
    for name in LISTS:
        if name in given:
            given[name] = _flattened(given[name])
    given["api_keys"] = _api_keys(given.get("api_keys", []), from_variable)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    engine_fields = EngineConfig.__dataclass_fields__
    engine = EngineConfig(**{k: v for k, v in given.items() if k in engine_fields})
    return ServerConfig(engine=engine, **{k: v for k, v in given.items() if k not in engine_fields})


def _api_keys(from_flags: list[str], from_variable: str) -> list[str]:
    """All keys. An empty flag is a mistake (an unset shell variable) that would leave the server open."""
    if not all(key.strip() for key in from_flags):
        raise ConfigError("--api-key must not be empty.")
    keys = [key.strip() for key in (*from_flags, *from_variable.split(",")) if key.strip()]
    if any(len(key.split()) > 1 or not key.isprintable() for key in keys):
        raise ConfigError("An API key must be printable and without spaces: it travels in a header.")
    return keys


def _flattened(values: list[str]) -> list[str]:
    """A list's values may also come as one JSON array, as vLLM takes them."""
    result: list[str] = []
    for value in values:
        if not value.startswith("["):
            result.append(value)
            continue
        try:
            result += msgspec.json.decode(value, type=list[str])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{value[:100]!r} must be text or a JSON array of strings: {error}.") from error
    return result


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer, got {text[:100]!r}") from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text[:100]!r}") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text[:100]!r}")
    return value


def _template_kwargs(text: str) -> dict[str, Any]:
    value = _json_object(text)
    taken = [name for name in value if name in RESERVED_TEMPLATE_KWARGS or name.startswith("_")]
    if taken:
        raise argparse.ArgumentTypeError(f"must not have {taken[0][:100]!r}: the name is reserved")
    return value

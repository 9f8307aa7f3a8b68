"""The bytes of a request → a JSON object, or a refusal (contract §1, "Request bodies")."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from quart import request
from werkzeug.exceptions import RequestEntityTooLarge

from jaxserve.api.context import server_context
from jaxserve.api.errors import invalid_json, request_timeout, request_too_large, unsupported_media_type
from jaxserve.errors import RequestError

MAX_DEPTH = 128
LARGE_BODY_BYTES = 256 << 10  # parsing more than this would hold up every stream for milliseconds
JSON_NAMES = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
LONG_NUMBER = re.compile(rb"\d{19}")


async def read_json_object() -> dict[str, Any]:
    """The current request's body.

    Raises:
        HttpError: 400, 408, 413 or 415.
        RequestError: valid JSON, but no object.
    """
    _check_media_type()
    limit = server_context().config.max_body_bytes
    if request.content_length is not None and request.content_length > limit:
        raise request_too_large(limit)
    try:
        # get_data() waits with wait_for(), which on Python 3.11 loses a cancellation that comes together with the
        # result: a client that closes right behind its body would be served to the end
        async with asyncio.timeout(request.body_timeout):
            raw = bytes(await request.body)
    except RequestEntityTooLarge as error:
        raise request_too_large(limit) from error
    except TimeoutError as error:
        raise request_timeout("The request body did not arrive in time.") from error
    request.body.clear()
    if len(raw) < LARGE_BODY_BYTES:
        return parse_json_object(raw)
    executor = server_context().executor
    return await asyncio.get_running_loop().run_in_executor(executor, parse_json_object, raw)


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Strict JSON: no NaN, no lone surrogates, nothing deeper than MAX_DEPTH. Integers beyond 64 bits stay
    integers, so that whoever knows the field can say what is wrong with them.

    Raises:
        HttpError: no such JSON.
        RequestError: valid JSON, but no object.
    """
    try:
        with _no_garbage_collection():
            value = orjson.loads(raw)
            too_deep = _depth_exceeds(value, MAX_DEPTH)
    except orjson.JSONDecodeError as error:
        raise invalid_json(f"The request body is no valid JSON: {str(error)[:200]}.") from error
    if too_deep:
        raise invalid_json(f"The request body is nested deeper than {MAX_DEPTH} levels.")
    if not isinstance(value, dict):
        kind = "null" if value is None else JSON_NAMES[type(value)]
        raise RequestError(f"The request body must be a JSON object, got: {kind}.", code="invalid_type")
    if LONG_NUMBER.search(raw):  # orjson makes floats of integers beyond 64 bits
        return _parse_with_long_integers(raw)
    return value


def _parse_with_long_integers(raw: bytes) -> dict[str, Any]:
    """For what orjson has found valid."""
    try:
        parsed: dict[str, Any] = json.loads(raw)
    except ValueError as error:  # Python converts no more than 4,300 digits
        raise invalid_json("The request body has an integer of too many digits.") from error
    return parsed


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """JSON has no cycles, but a million lists set off a collection of everything dozens of times: four fifths of
    what parsing them took, and with the interpreter's lock held. Threads may overlap: who found it on puts it on."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_media_type() -> None:
    if (request.content_encoding or "identity").strip().lower() != "identity":
        raise unsupported_media_type("Content-Encoding must be identity: compressed bodies are not read.")
    if not request.content_type:
        return
    if request.mimetype != "application/json":
        raise unsupported_media_type(
            f"Content-Type must be application/json, got {request.mimetype[:100]!r}."
        )
    charset = request.mimetype_params.get("charset", "utf-8")
    if charset.lower() not in ("utf-8", "utf8"):
        raise unsupported_media_type(f"The charset must be utf-8, got {charset[:50]!r}.")


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Level by level, so that no recursion limit is in the way."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True

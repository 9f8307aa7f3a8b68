"""The bytes of a request → a JSON object, or a refusal (contract §1, "Request bodies")."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson
from quart import request
from werkzeug.exceptions import RequestEntityTooLarge, RequestTimeout

from jaxserve.api.context import server_context
from jaxserve.api.errors import invalid_json, request_timeout, request_too_large, unsupported_media_type
from jaxserve.errors import RequestError

MAX_DEPTH = 128
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
        raw = bytes(await request.get_data(cache=False, as_text=False))  # type: ignore[arg-type]
    except RequestEntityTooLarge as error:
        raise request_too_large(limit) from error
    except RequestTimeout as error:
        raise request_timeout("The request body did not arrive in time.") from error
    return parse_json_object(raw)


def parse_json_object(raw: bytes) -> dict[str, Any]:
    """Strict JSON: no NaN, no lone surrogates, nothing deeper than MAX_DEPTH. Integers of any length stay
    integers, so that whoever knows the field can say what is wrong with them."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid_json(f"The request body is no valid JSON: {str(error)[:200]}.") from error
    if not isinstance(value, dict):
        kind = "array" if isinstance(value, list) else type(value).__name__
        raise RequestError(f"The request body must be a JSON object, got: {kind}.", code="invalid_type")
    if _depth_exceeds(value, MAX_DEPTH):
        raise invalid_json(f"The request body is nested deeper than {MAX_DEPTH} levels.")
    if LONG_NUMBER.search(raw):  # orjson makes floats of integers beyond 64 bits
        parsed: dict[str, Any] = json.loads(raw)
        return parsed
    return value


def _check_media_type() -> None:
    if request.content_encoding not in (None, "", "identity"):
        raise unsupported_media_type("Content-Encoding must be identity: compressed bodies are not read.")
    if not request.content_type:
        return
    if request.mimetype != "application/json":
        raise unsupported_media_type(
            f"Content-Type must be application/json, got {request.mimetype[:100]!r}."
        )
    charset = request.mimetype_params.get("charset", "utf-8")
    if charset.lower().replace("_", "-") not in ("utf-8", "utf8", "us-ascii", "ascii"):
        raise unsupported_media_type(f"The charset must be utf-8, got {charset[:50]!r}.")


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Level by level, so that no recursion limit is in the way."""
    level = [value]
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

"""Cross-origin requests from browsers: off unless `--allowed-origins` names somebody."""

from __future__ import annotations

from quart import Response, request

from jaxserve.config import ServerConfig

PREFLIGHT_MAX_AGE_S = 600
EXPOSED_HEADERS = "X-Request-Id, X-Ignored-Fields, Retry-After"


def allowed_origin(config: ServerConfig) -> str | None:
    """The value of Access-Control-Allow-Origin for the current request; None: it gets no such header."""
    origin = request.headers.get("Origin")
    if origin is None:
        return None
    if "*" in config.allowed_origins:
        return origin if config.allow_credentials else "*"  # browsers refuse "*" with credentials
    return origin if origin in config.allowed_origins else None


def is_preflight(config: ServerConfig) -> bool:
    """Whether the current request is a browser's question that is answered without a key."""
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    return asks and allowed_origin(config) is not None


def add_cors_headers(response: Response, config: ServerConfig) -> None:
    """Tell the browser what the current request's origin may do."""
    if not config.allowed_origins:
        return
    origin = allowed_origin(config)
    if "*" not in config.allowed_origins or config.allow_credentials:
        response.headers.add(
            "Vary", "Origin"
        )  # also where this origin gets nothing: caches must not mix them
    if origin is None:
        return
    response.headers["Access-Control-Allow-Origin"] = origin
    if config.allow_credentials:
        response.headers["Access-Control-Allow-Credentials"] = "true"
    if not is_preflight(config):
        response.headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
        return
    asked_method = request.headers["Access-Control-Request-Method"]
    asked_headers = request.headers.get("Access-Control-Request-Headers", "")
    methods, headers = config.allowed_methods, config.allowed_headers
    response.headers["Access-Control-Allow-Methods"] = asked_method if "*" in methods else ", ".join(methods)
    response.headers["Access-Control-Allow-Headers"] = asked_headers if "*" in headers else ", ".join(headers)
    response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_MAX_AGE_S)

"""The Quart app: routes, and what holds for all of them: request ids, keys, CORS, errors, metrics, access log."""

from __future__ import annotations

import logging
import re
import secrets
import time

from quart import Quart, Response, g, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge, RequestTimeout

from jaxserve.api import chat, completions, health, models, tokenization
from jaxserve.api.auth import OPEN_ROUTES, Authenticator
from jaxserve.api.context import EXTENSION, ServerContext
from jaxserve.api.errors import (
    ErrorBody,
    HttpError,
    error_body,
    internal_error,
    method_not_allowed,
    not_found,
    request_timeout,
    request_too_large,
    unauthorized,
    unavailable,
)
from jaxserve.config import ServerConfig
from jaxserve.errors import JaxserveError

logger = logging.getLogger("jaxserve.access")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
WITHOUT_MODEL = OPEN_ROUTES | {"/load", "/metrics"}
BODY_TIMEOUT_S = 60


def create_app(context: ServerContext) -> Quart:
    """The server's routes around one context."""
    config = context.config
    app = Quart("jaxserve", static_folder=None)
    app.config.update(
        MAX_CONTENT_LENGTH=config.max_body_bytes, BODY_TIMEOUT=BODY_TIMEOUT_S, PROVIDE_AUTOMATIC_OPTIONS=False
    )
    app.url_map.strict_slashes = True
    app.extensions[EXTENSION] = context
    for module in (chat, completions, models, tokenization, health):
        app.register_blueprint(module.blueprint)
    authenticator = Authenticator(config.api_keys)
    in_flight = 0

    @app.before_request
    async def admit() -> Response | None:
        nonlocal in_flight
        own = request.headers.get("X-Request-Id", "")
        g.request_id = own if REQUEST_ID.fullmatch(own) else secrets.token_hex(16)
        g.started = time.monotonic()
        g.counted = True
        in_flight += 1
        if _is_preflight(config):
            return Response(status=204)
        route = request.url_rule.rule if request.url_rule is not None else None
        if not authenticator.allows(route, request.headers.get("Authorization")):
            raise unauthorized()
        if in_flight > config.max_connections:
            raise unavailable("too_many_connections", "The server has too many connections open.")
        if route is not None and route not in WITHOUT_MODEL:
            context.check_serving()
        return None

    @app.after_request
    async def finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        _add_cors_headers(response, config)
        seconds = time.monotonic() - g.started
        route = request.url_rule.rule if request.url_rule is not None else "unmatched"
        method = request.method if request.method in KNOWN_METHODS else "other"
        context.metrics.observe_http(method, route, response.status_code, seconds)
        logger.info("%s %s %s %d %.3f s", g.request_id, method, route, response.status_code, seconds)
        return response

    @app.teardown_request
    async def leave(_: BaseException | None) -> None:
        nonlocal in_flight
        if g.pop("counted", False):
            in_flight -= 1

    @app.errorhandler(Exception)
    async def on_error(error: Exception) -> Response:
        body = (
            _http_error_body(error) if isinstance(error, HTTPException) else error_body(error, g.request_id)
        )
        if not isinstance(error, HTTPException | HttpError | JaxserveError):
            logger.error("%s failed", g.request_id, exc_info=error)
        elif body.status >= 500 and not isinstance(error, HttpError):
            logger.warning("%s %s", g.request_id, error)
        return Response(
            body.to_json(), status=body.status, content_type="application/json", headers=dict(body.headers)
        )

    return app


KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _http_error_body(error: HTTPException) -> ErrorBody:
    """Errors of the framework, in the envelope of all others."""
    match error:
        case MethodNotAllowed():
            return method_not_allowed(request.method, sorted(error.valid_methods or [])).body
        case RequestEntityTooLarge():
            return request_too_large(request.max_content_length or 0).body
        case RequestTimeout():
            return request_timeout("The request body did not arrive in time.").body
    if error.code == 404:
        return not_found(request.path).body
    if error.code is not None and 400 <= error.code < 500:
        return ErrorBody(
            status=error.code, type="invalid_request_error", code="invalid_value", message=f"{error.name}."
        )
    return internal_error(g.request_id)


# --- CORS ---------------------------------------------------------------------------------------------------


def _allowed_origin(config: ServerConfig) -> str | None:
    """The value of Access-Control-Allow-Origin for this request, or None."""
    origin = request.headers.get("Origin")
    if origin is None or not config.allowed_origins:
        return None
    if "*" in config.allowed_origins:
        return origin if config.allow_credentials else "*"
    return origin if origin in config.allowed_origins else None


def _is_preflight(config: ServerConfig) -> bool:
    asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    return asks and _allowed_origin(config) is not None


def _add_cors_headers(response: Response, config: ServerConfig) -> None:
    origin = _allowed_origin(config)
    if origin is None:
        return
    response.headers["Access-Control-Allow-Origin"] = origin
    if origin != "*":
        response.headers.add("Vary", "Origin")
    if config.allow_credentials:
        response.headers["Access-Control-Allow-Credentials"] = "true"
    if _is_preflight(config):
        asked_method = request.headers["Access-Control-Request-Method"]
        asked_headers = request.headers.get("Access-Control-Request-Headers", "")
        methods, headers = config.allowed_methods, config.allowed_headers
        response.headers["Access-Control-Allow-Methods"] = (
            asked_method if "*" in methods else ", ".join(methods)
        )
        response.headers["Access-Control-Allow-Headers"] = (
            asked_headers if "*" in headers else ", ".join(headers)
        )
        response.headers["Access-Control-Max-Age"] = "600"
    else:
        response.headers["Access-Control-Expose-Headers"] = "X-Request-Id"

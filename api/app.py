"""The Quart app: routes, and what holds for all of them: request ids, keys, CORS, errors, metrics, access log."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from quart import Quart, Response, g, request, websocket
from quart.typing import ResponseTypes
from quart.wrappers import BaseRequestWebsocket
from werkzeug.exceptions import HTTPException, MethodNotAllowed, RequestEntityTooLarge, RequestTimeout
from werkzeug.routing import MapAdapter

from jaxserve.api import chat, completions, docs, health, models, profiling, tokenization
from jaxserve.api.auth import OPEN_ROUTES, Authenticator
from jaxserve.api.context import EXTENSION, ServerContext
from jaxserve.api.cors import add_cors_headers, is_preflight
from jaxserve.api.errors import (
    ErrorBody,
    HttpError,
    error_body,
    headers_too_large,
    internal_error,
    method_not_allowed,
    not_found,
    request_timeout,
    request_too_large,
    unauthorized,
    unavailable,
)
from jaxserve.errors import JaxserveError, RequestFailedError

logger = logging.getLogger("jaxserve.access")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
WITHOUT_MODEL = OPEN_ROUTES | {"/load", "/metrics"}
PROBES = OPEN_ROUTES | {"/metrics"}
BODY_TIMEOUT_S = 60
MAX_HEADER_BYTES = 16 << 10
CLIENT_GONE = 499  # in logs and metrics: no response was sent, for there was nobody left to send it to


class App(Quart):
    """Quart, for request targets as they come from the wire."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = {**scope, "path": _routed_path(scope["path"], scope.get("root_path", ""))}
        if scope["type"] == "http" and scope["http_version"].startswith("1") and _has_body(scope["headers"]):
            receive, send = _announcing_close(receive, send)
        await super().__call__(scope, receive, send)

    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Routes depend on scheme, method and path alone; Quart would fail on a Host that is no host's name."""
        if request is None:
            return super().create_url_adapter(None)
        return self.url_map.bind(
            "localhost",
            script_name=request.root_path,
            url_scheme=request.scheme,
            default_method=request.method,
            path_info=request.path,
        )


def _has_body(headers: Any) -> bool:
    sizes = dict(headers)
    return b"transfer-encoding" in sizes or sizes.get(b"content-length", b"0") != b"0"


def _announcing_close(receive: Any, send: Any) -> tuple[Any, Any]:
    """A response that does not wait for the request's whole body (a wrong key's) ends the connection: say so in
    it, or the client sends its next request into a closing connection and gets no answer."""
    received = False

    async def receive_and_note() -> Any:
        nonlocal received
        message = await receive()
        received = received or (message["type"] == "http.request" and not message.get("more_body", False))
        return message

    async def send_announcing(message: Any) -> None:
        if message["type"] == "http.response.start" and not received:
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return receive_and_note, send_announcing


def _routed_path(path: str, root_path: str) -> str:
    """The path under which Quart looks for a route.

    A target may be absolute ("http://host/path") or no path at all ("*", "?query"). A proxy that shows this
    server under `root_path` may cut that off or leave it; Quart wants it there.
    """
    if not path.startswith("/"):
        path = urlsplit(path).path if "://" in path else f"/{path}"
    if root_path and not path.startswith(f"{root_path}/"):
        path = root_path + path
    return path or "/"


@dataclass
class _Exchange:
    """A request and its response, for metrics and the log."""

    request_id: str
    method: str
    route: str
    started: float
    status: int = CLIENT_GONE
    error_code: str | None = None


def create_app(context: ServerContext) -> Quart:
    """The server's routes around one context."""
    config = context.config
    app = App("jaxserve", static_folder=None)
    app.config.update(
        MAX_CONTENT_LENGTH=config.max_body_bytes, BODY_TIMEOUT=BODY_TIMEOUT_S, PROVIDE_AUTOMATIC_OPTIONS=False
    )
    app.url_map.strict_slashes = True
    app.extensions[EXTENSION] = context
    for module in (chat, completions, models, tokenization, health):
        app.register_blueprint(module.blueprint)
    if not config.disable_docs:
        app.register_blueprint(docs.blueprint)
    if config.engine.profile_dir is not None:
        app.register_blueprint(profiling.blueprint)
    authenticator = Authenticator(config.api_keys)

    def ended(exchange: _Exchange) -> None:
        context.num_open_requests -= 1
        seconds = time.monotonic() - exchange.started
        context.metrics.observe_http(exchange.method, exchange.route, exchange.status, seconds)
        status = "client gone" if exchange.status == CLIENT_GONE else str(exchange.status)
        # probes come every few seconds for as long as the server lives, and while it loads
        is_routine = exchange.status < 400 or exchange.error_code == "starting"
        level = logging.DEBUG if exchange.route in PROBES and is_routine else logging.INFO
        logger.log(
            level, "%s %s %s %s %.3f s", exchange.request_id, exchange.method, exchange.route, status, seconds
        )

    @app.before_request
    async def admit() -> Response | None:
        g.request_id = _request_id(request.headers.get("X-Request-Id", ""))
        # werkzeug takes "//health" for "/health"; here each route has one spelling
        path = request.scope["path"].removeprefix(config.root_path)
        url_rule = None if path.startswith("//") else request.url_rule
        rule = None if url_rule is None else url_rule.rule
        method = request.method if request.method in KNOWN_METHODS else "other"
        g.exchange = exchange = _Exchange(g.request_id, method, rule or "unmatched", time.monotonic())
        context.num_open_requests += 1
        task = asyncio.current_task()
        assert task is not None, "requests are handled in tasks"
        task.add_done_callback(lambda _: ended(exchange))  # a stream ends long after its handler
        if is_preflight(config):
            return Response(status=204)
        if not authenticator.allows(rule, request.headers.get("Authorization")):
            raise unauthorized()
        if _header_bytes() > MAX_HEADER_BYTES:
            raise headers_too_large(MAX_HEADER_BYTES)
        if rule is None:
            raise request.routing_exception or not_found(request.path)
        if rule not in OPEN_ROUTES and context.is_crowded():
            raise unavailable("too_many_connections", "The server has too many open connections.")
        if rule not in WITHOUT_MODEL:
            context.check_serving()
        return None

    @app.after_request
    async def finish(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        add_cors_headers(response, config)
        g.exchange.status = response.status_code
        return response

    @app.before_websocket
    async def refuse_websocket() -> None:
        g.request_id = _request_id(websocket.headers.get("X-Request-Id", ""))
        if not authenticator.allows(None, websocket.headers.get("Authorization")):
            raise unauthorized()
        raise not_found(websocket.path)  # there are no WebSocket routes

    @app.after_websocket
    async def finish_websocket(response: ResponseTypes | None) -> ResponseTypes | None:
        if response is not None:
            response.headers["X-Request-Id"] = g.request_id
        return response

    @app.errorhandler(Exception)
    async def on_error(error: Exception) -> Response:
        body = (
            _http_error_body(error) if isinstance(error, HTTPException) else error_body(error, g.request_id)
        )
        if "exchange" in g:
            g.exchange.error_code = body.code
        if not isinstance(error, HTTPException | HttpError | JaxserveError):
            logger.error("%s failed", g.request_id, exc_info=error)
        elif isinstance(error, RequestFailedError):
            logger.warning("%s %s", g.request_id, error)
        return Response(
            body.to_json(), status=body.status, content_type="application/json", headers=dict(body.headers)
        )

    return app


def _header_bytes() -> int:
    """Of the header block as it came (HTTP/1.1); the HTTP parser itself bounds what it has not read whole."""
    scope = request.scope
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return len(scope["raw_path"]) + len(scope["query_string"]) + fields


def _request_id(own: str) -> str:
    """The client's, if it is fit for a header and a log."""
    return own if REQUEST_ID.fullmatch(own) else secrets.token_hex(16)


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

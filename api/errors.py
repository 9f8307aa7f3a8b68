"""Exception → HTTP status and body, one table: every error of every route leaves through here."""

from __future__ import annotations

from dataclasses import dataclass, field

import orjson

from jaxserve.errors import (
    EngineDeadError,
    EngineStalledError,
    EngineStartingError,
    QueueFullError,
    RequestError,
    RequestFailedError,
)

MAX_MESSAGE_CHARS = 1000
MAX_PARAM_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class ErrorBody:
    """One error as a client sees it."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, str | None]]:
        """`{"error": {…}}`, bounded in size."""
        message = (
            self.message
            if len(self.message) <= MAX_MESSAGE_CHARS
            else self.message[: MAX_MESSAGE_CHARS - 1] + "…"
        )
        param = self.param[:MAX_PARAM_CHARS] if self.param else self.param
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}

    def to_json(self) -> bytes:
        return orjson.dumps(self.to_dict())


class HttpError(Exception):
    """An error that belongs to HTTP itself (key, path, method, media type, size, time); carries its body."""

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self.body = body


def unauthorized() -> HttpError:
    return HttpError(
        ErrorBody(
            status=401,
            type="authentication_error",
            code="invalid_api_key",
            message="Missing or wrong API key. Send it as `Authorization: Bearer <key>`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    )


def not_found(path: str) -> HttpError:
    message = f"There is no resource at {path[:100]!r}."
    return HttpError(ErrorBody(status=404, type="not_found_error", code="not_found", message=message))


def model_not_found(model: str) -> HttpError:
    message = f"The model `{model[:100]}` does not exist."
    return HttpError(
        ErrorBody(status=404, type="not_found_error", code="model_not_found", message=message, param="model")
    )


def method_not_allowed(method: str, allowed: list[str]) -> HttpError:
    allow = ", ".join(sorted(allowed))
    message = f"The method {method[:20]} is not allowed here; allowed: {allow}."
    return HttpError(
        ErrorBody(
            status=405,
            type="invalid_request_error",
            code="method_not_allowed",
            message=message,
            headers={"Allow": allow},
        )
    )


def request_timeout(message: str) -> HttpError:
    return HttpError(ErrorBody(status=408, type="timeout_error", code="request_timeout", message=message))


def request_too_large(limit: int) -> HttpError:
    message = f"The request body is larger than {limit:,} bytes, the limit of this server."
    return HttpError(
        ErrorBody(status=413, type="invalid_request_error", code="request_too_large", message=message)
    )


def headers_too_large(limit: int) -> HttpError:
    message = f"The request's headers are larger than {limit:,} bytes, the limit of this server."
    return HttpError(
        ErrorBody(status=431, type="invalid_request_error", code="request_too_large", message=message)
    )


def malformed_request(status: int) -> HttpError:
    """What HTTP itself does not allow; `status` is the HTTP parser's choice."""
    message = "The request is no valid HTTP request; see the rules for its first line, headers and framing."
    return HttpError(
        ErrorBody(status=status, type="invalid_request_error", code="invalid_value", message=message)
    )


def invalid_handshake() -> HttpError:
    message = "This is no valid WebSocket handshake, and no WebSockets are served here."
    return HttpError(
        ErrorBody(status=400, type="invalid_request_error", code="invalid_value", message=message)
    )


def unsupported_media_type(message: str) -> HttpError:
    return HttpError(
        ErrorBody(status=415, type="invalid_request_error", code="unsupported_media_type", message=message)
    )


def invalid_json(message: str) -> HttpError:
    return HttpError(
        ErrorBody(status=400, type="invalid_request_error", code="invalid_json", message=message)
    )


def unavailable(code: str, message: str, *, retry_after_s: int = 1) -> HttpError:
    """503 with code `starting`, `draining`, `engine_dead` or `engine_stalled`."""
    headers = {"Retry-After": str(max(1, retry_after_s))}
    return HttpError(
        ErrorBody(status=503, type="service_unavailable_error", code=code, message=message, headers=headers)
    )


def internal_error(request_id: str) -> ErrorBody:
    """The body for a defect: it says nothing about the cause; the log has it under the request id."""
    message = f"The server failed on this request (request id {request_id})."
    return ErrorBody(status=500, type="server_error", code="internal_error", message=message)


def error_body(error: BaseException, request_id: str) -> ErrorBody:
    """The one mapping from an exception to what the client is told."""
    match error:
        case HttpError():
            return error.body
        case QueueFullError():
            return ErrorBody(
                status=429,
                type="rate_limit_error",
                code=error.code,
                message=str(error),
                headers={"Retry-After": str(max(1, error.retry_after_s))},
            )
        case RequestError():
            return ErrorBody(
                status=400,
                type="invalid_request_error",
                code=error.code,
                message=str(error),
                param=error.param,
            )
        case EngineStartingError():
            return unavailable("starting", "The model is still loading; try again shortly.").body
        case EngineDeadError():
            return unavailable("engine_dead", f"The engine has ended (request id {request_id}).").body
        case EngineStalledError():
            return unavailable(
                "engine_stalled", f"The engine makes no progress (request id {request_id})."
            ).body
        case RequestFailedError():
            return internal_error(request_id)
        case _:
            return internal_error(request_id)

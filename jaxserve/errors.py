"""Every exception that jaxserve raises on purpose.

JaxserveError
├── ConfigError             a flag or a combination of flags that cannot work     (exit status 2)
├── ModelLoadError          a checkpoint, tokenizer or config that is wrong       (exit status 2)
├── RequestError            a request that is refused: the client's fault         (HTTP 4xx)
│   ├── ContextLengthError  prompt, or prompt + max_tokens, does not fit
│   └── QueueFullError      admission refused: too many requests are waiting      (HTTP 429)
├── JobError                a job in a killable worker hit a limit or crashed     (the caller says what it means)
└── EngineError             the engine cannot serve                               (HTTP 5xx)
    ├── RequestFailedError  the engine failed this one request                    (HTTP 500)
    ├── EngineStartingError the model is still loading                            (HTTP 503)
    ├── EngineDeadError     the engine process has ended                          (HTTP 503)
    └── EngineStalledError  work is pending and no step has finished for too long (HTTP 503)
"""

from __future__ import annotations

from typing import Literal


class JaxserveError(Exception):
    """Base of all of them; `str(error)` is one clear line for a person."""


class ConfigError(JaxserveError):
    """A configuration value is wrong; the message names the flag."""


class ModelLoadError(JaxserveError):
    """A checkpoint cannot be served; the message names the file, tensor or config key."""


class RequestError(JaxserveError):
    """A request is refused.

    Args:
        message: what is wrong, which value, what is allowed.
        param: path of the field at fault in the request body (`messages[0].content`), or None.
        code: machine-readable reason, one of the codes in docs/api.md.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """Prompt, or prompt + max_tokens, is longer than `max_model_len`."""

    def __init__(self, message: str, *, param: str | None) -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class QueueFullError(RequestError):
    """Admission refused: the waiting queue is at its limit.

    Args:
        retry_after_s: whole seconds, at least 1, after which a retry is sensible.
    """

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, param=None, code="queue_full")
        self.retry_after_s = retry_after_s


class JobError(JaxserveError):
    """A job in a killable worker failed.

    Attributes:
        reason: "time", "memory" or "output": the limit that it hit; "crash": its process died of something else.
    """

    def __init__(self, reason: Literal["time", "memory", "output", "crash"]) -> None:
        super().__init__(f"The job failed: {reason}.")
        self.reason = reason


class EngineError(JaxserveError):
    """The engine cannot serve; nothing is wrong with the request."""


class RequestFailedError(EngineError):
    """The engine failed this request; others go on."""


class EngineStartingError(EngineError):
    """The engine is not ready yet."""


class EngineDeadError(EngineError):
    """The engine process has ended."""


class EngineStalledError(EngineError):
    """Work is pending and no step has finished within the stall limit."""

"""Templates and variables that requests bring, rendered where they can do no harm.

A template is a program: the sandbox keeps it from Python's internals, and the killable worker from everything else.
The worker: `python -m jaxserve.template_worker FD`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import msgspec

from jaxserve.chat_template import (
    TEMPLATE_FAULTS,
    ChatTemplate,
    Message,
    TemplateRefusal,
    normalize_messages,
    template_error,
)
from jaxserve.errors import JobError, RequestError
from jaxserve.killable_worker import JobLimits, KillableWorker, control_socket, serve_jobs

MAX_TEMPLATE_BYTES = 64 << 10
MAX_KWARGS_BYTES = 64 << 10
MAX_TEXT_BYTES = 4 << 20
LIMITS = JobLimits(seconds=2.0, memory_bytes=512_000_000, output_bytes=MAX_TEXT_BYTES + 1024)

Param = Literal["chat_template", "chat_template_kwargs", "messages"]


class _Job(msgspec.Struct, kw_only=True):
    """`trusted`: the template is the model's own, and only variables are the request's."""

    source: str
    trusted: bool
    special_tokens: dict[str, str]
    messages: list[dict[str, Any]]
    variables: dict[str, Any]
    options: dict[str, Any]


class _Rendered(msgspec.Struct, tag="text"):
    text: str


class _Refused(msgspec.Struct, tag="refused"):
    """`messages_at_fault`: and not the template or its variables."""

    message: str
    messages_at_fault: bool


@dataclass(frozen=True, kw_only=True)
class RenderJob:
    """A conversation on its way to the worker.

    Attributes:
        param: the field of the request that is at fault if rendering fails.
    """

    body: bytes
    param: Param


def make_render_job(
    messages: Sequence[Message],
    *,
    source: str | None,
    kwargs: Mapping[str, Any],
    model_template: ChatTemplate | None,
    special_tokens: Mapping[str, str],
    variables: Mapping[str, Any],
    **options: Any,
) -> RenderJob:
    """The job of rendering a request's own template (`source`; None: the model's) with the request's `kwargs`.

    Args:
        variables: of the server's; those in `kwargs` go before them.
        options: further arguments of `ChatTemplate.render`.

    Raises:
        RequestError: template or kwargs are too large, or there is no template (code `invalid_template`).
    """
    if source is not None:
        _check_size("chat_template", len(source.encode()), MAX_TEMPLATE_BYTES)
    elif model_template is None:
        message = "This model has no chat template: chat_template_kwargs need one in chat_template, too."
        raise RequestError(message, param="chat_template", code="invalid_template")
    _check_size("chat_template_kwargs", len(msgspec.json.encode(kwargs)), MAX_KWARGS_BYTES)
    job = _Job(
        source=model_template.source if source is None and model_template is not None else source or "",
        trusted=source is None,
        special_tokens=dict(special_tokens),
        messages=[dict(message) for message in messages],
        variables={**variables, **kwargs},
        options=options,
    )
    return RenderJob(
        body=msgspec.msgpack.encode(job), param="chat_template_kwargs" if source is None else "chat_template"
    )


def _check_size(param: Param, size: int, limit: int) -> None:
    if size > limit:
        message = f"{param} must have at most {limit:,} bytes, got {size:,}."
        raise RequestError(message, param=param, code="invalid_template")


class TemplateWorker:
    """Renders what requests bring in a killable worker.

    Attributes:
        process: the worker; it starts with the first job, or earlier if it is told to.
    """

    def __init__(self) -> None:
        self.process = KillableWorker("jaxserve.template_worker", LIMITS)

    async def render(self, job: RenderJob) -> str:
        """The conversation as the model reads it.

        Raises:
            RequestError: the template fails or needs too much (code `invalid_template`).
            QueueFullError: too many others are being rendered.
        """
        try:
            answer = await self.process.run(job.body)
        except JobError as error:
            raise template_error(_why(error), param=job.param) from None
        result = msgspec.msgpack.decode(answer, type=_Rendered | _Refused)
        if isinstance(result, _Rendered):
            return result.text
        param = "messages" if result.messages_at_fault else job.param
        raise RequestError(result.message, param=param, code="invalid_template")


def _why(error: JobError) -> str:
    match error.reason:
        case "time":
            return f"it takes longer than {LIMITS.seconds:g} s"
        case "memory":
            return f"it needs more than {LIMITS.memory_bytes // 1_000_000} MB of memory"
        case "output":
            return f"it makes more than {MAX_TEXT_BYTES >> 20} MiB of text"
    return "it cannot be rendered"


WARM_UP = _Job(
    source="{% for m in messages %}{{ m | tojson }}{% endfor %}",
    trusted=False,
    special_tokens={},
    messages=[],
    variables={},
    options={},
)


# --- in the worker ------------------------------------------------------------------------------------------


def _handle(body: bytes) -> bytes:
    job = msgspec.msgpack.decode(body, type=_Job)
    try:
        return msgspec.msgpack.encode(_Rendered(_render(job)))
    except RequestError as error:
        # a template of the request's own is at fault for whatever it raises
        at_fault = error.__cause__ is None or (job.trusted and isinstance(error.__cause__, TemplateRefusal))
        return msgspec.msgpack.encode(_Refused(str(error), at_fault))


def _render(job: _Job) -> str:
    try:
        template = ChatTemplate(job.source, job.special_tokens, trusted=job.trusted)
    except jinja2.TemplateSyntaxError as error:
        raise template_error(f"line {error.lineno}: {error.message}") from error
    except SyntaxError as error:  # of Python's compiler, which states its limits so
        raise template_error(error.msg) from error
    except TEMPLATE_FAULTS as error:
        raise template_error(str(error) or type(error).__name__) from error
    messages = normalize_messages(job.messages, template)
    return template.render(messages, job.variables, max_bytes=MAX_TEXT_BYTES, **job.options)


def main() -> None:
    """The worker process; its only argument is the control socket's descriptor."""
    _handle(msgspec.msgpack.encode(WARM_UP))  # the first job pays for what is made only once
    serve_jobs(_handle, LIMITS, control_socket(sys.argv[1]))


if __name__ == "__main__":
    main()

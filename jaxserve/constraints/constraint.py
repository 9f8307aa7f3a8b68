"""What a request may ask of its text, and what becomes of it: types that travel between processes."""

from __future__ import annotations

from typing import Literal

import msgspec

from jaxserve.errors import RequestError

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
BackendName = Literal["llguidance", "outlines", "lm-format-enforcer"]
BACKENDS: tuple[BackendName, ...] = ("llguidance", "outlines", "lm-format-enforcer")
Code = Literal["invalid_constraint", "constraint_too_complex"]

MAX_CONSTRAINT_BYTES = 64 << 10
MAX_REGEX_BYTES = 4 << 10
DEFAULT_WHITESPACE = "[ ]?"


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """One constraint, as the client stated it.

    Attributes:
        text: the schema as JSON text, the regex, the choices as a JSON array of strings, or the grammar; empty
            for json_object.
        whitespace_pattern: what may stand between the tokens of JSON.
        backend: "auto", or the one to use.
        fallback: whether another backend may serve what that one cannot honour exactly.
        additional_properties: False: objects whose schema does not speak of additional properties have none.
    """

    kind: Kind
    text: str = ""
    whitespace_pattern: str = DEFAULT_WHITESPACE
    backend: Literal["auto"] | BackendName = "auto"
    fallback: bool = True
    additional_properties: bool = True


class CompiledConstraint(msgspec.Struct, frozen=True, kw_only=True):
    """A constraint that has been checked and compiled once: a backend makes matchers of it without surprises.

    Attributes:
        source: what the backend's own compiler takes.
        artifact: what that compiler made, where it can be kept.
    """

    backend: BackendName
    source: str
    artifact: bytes = b""


class ConstraintError(Exception):
    """A constraint cannot be honoured exactly: malformed, contradictory, or with something that is not enforced."""

    code: Code = "invalid_constraint"

    def to_request_error(self, param: str | None) -> RequestError:
        return RequestError(str(self), param=param, code=self.code)


class TooComplexError(ConstraintError):
    """A constraint hits a limit."""

    code: Code = "constraint_too_complex"


def check_size(constraint: Constraint) -> None:
    """The limits that need no look inside.

    Raises:
        TooComplexError: the text is too long.
    """
    limit = MAX_REGEX_BYTES if constraint.kind == "regex" else MAX_CONSTRAINT_BYTES
    size = len(constraint.text.encode())
    if size > limit:
        raise TooComplexError(f"The {NAMES[constraint.kind]} may have at most {limit:,} bytes, got {size:,}.")


NAMES: dict[Kind, str] = {
    "json_schema": "schema",
    "json_object": "schema",
    "regex": "regex",
    "choice": "choice list",
    "grammar": "grammar",
}

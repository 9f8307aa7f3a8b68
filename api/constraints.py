"""What a request's fields ask of its text: one constraint, or none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from jaxserve.api.fields import Values
from jaxserve.constraints.constraint import DEFAULT_WHITESPACE, Constraint, Kind
from jaxserve.errors import RequestError

JSON_KINDS: tuple[Kind, ...] = ("json_schema", "json_object")
STRUCTURED = "structured_outputs"
STRUCTURED_KINDS: dict[str, Kind] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "json_object": "json_object",
}
GUIDED_KINDS: dict[str, Kind] = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


@dataclass(frozen=True, kw_only=True)
class RequestConstraint:
    """A constraint on its way to the compiler.

    Attributes:
        param: the field that is at fault if it is refused.
        parts: parts of it as constraints of their own, by their fields: if one is refused alone, that field is at
            fault.
    """

    constraint: Constraint
    param: str
    parts: tuple[tuple[str, Constraint], ...] = ()


class Asked(NamedTuple):
    """One constraint that a request asks for.

    Attributes:
        field: how messages call it.
        param: the field that is at fault if it is refused.
        text: as in `Constraint`.
    """

    field: str
    param: str
    kind: Kind
    text: str = ""


def requested_constraint(values: Values, tools: Asked | None = None) -> RequestConstraint | None:
    """The one constraint of a request.

    Args:
        values: the body.
        tools: what its tool_choice asks for.

    Raises:
        RequestError: there are several, options that do not fit it, or masks beside it.
    """
    asked = [*_asked(values), *([tools] if tools else [])]
    if len(asked) > 1:
        one, other = asked[0].field, asked[1].field
        raise RequestError(f"{one} and {other} are two constraints: give one of them.", param=other)
    one_asked = asked[0] if asked else None
    whitespace = _whitespace(values, one_asked)
    _check_closed_objects(values, one_asked)
    if one_asked is None:
        return None
    for name in ("allowed_token_ids", "bad_words"):
        if values[name]:
            message = f"{name} and {one_asked.field} cannot be combined: the constraint decides about tokens."
            raise RequestError(message, param=name)
    structured = values[STRUCTURED] or {}
    constraint = Constraint(
        kind=one_asked.kind,
        text=one_asked.text,
        whitespace_pattern=DEFAULT_WHITESPACE if whitespace is None else whitespace[1],
        backend=values["guided_decoding_backend"],
        fallback=not structured.get("disable_fallback"),
        additional_properties=not structured.get("disable_additional_properties"),
    )
    parts: tuple[tuple[str, Constraint], ...] = ()
    if whitespace is not None:
        parts = ((whitespace[0], msgspec.structs.replace(constraint, kind="json_object", text="")),)
    return RequestConstraint(constraint=constraint, param=one_asked.param, parts=parts)


def _asked(values: Values) -> Iterator[Asked]:
    response_format = values["response_format"]
    if response_format is not None and response_format["type"] == "json_object":
        yield Asked("response_format", "response_format", "json_object")
    elif response_format is not None and response_format["type"] == "json_schema":
        schema = response_format["json_schema"]["schema"]
        yield Asked(
            "response_format", "response_format.json_schema.schema", "json_schema", schema_text(schema)
        )
    if values[STRUCTURED] is not None:
        yield from _structured(values[STRUCTURED])
    for name, kind in GUIDED_KINDS.items():
        if values[name] is not None:
            yield Asked(name, name, kind, _text(kind, values[name]))


def _structured(values: Values) -> Iterator[Asked]:
    # json_object: false asks for nothing
    given = [name for name in STRUCTURED_KINDS if values[name] is not None and values[name] is not False]
    if not given:
        kinds = ", ".join(STRUCTURED_KINDS)
        raise RequestError(f"{STRUCTURED} must have exactly one of {kinds}.", param=STRUCTURED)
    for name in given:
        path, kind = f"{STRUCTURED}.{name}", STRUCTURED_KINDS[name]
        yield Asked(path, path, kind, "" if kind == "json_object" else _text(kind, values[name]))


def _text(kind: Kind, value: Any) -> str:
    if kind == "choice":
        return msgspec.json.encode(value).decode()
    return schema_text(value) if kind == "json_schema" else str(value)


def schema_text(schema: dict[str, Any] | str) -> str:
    """A schema as JSON text; text is left as it is."""
    return schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()


def _whitespace(values: Values, asked: Asked | None) -> tuple[str, str] | None:
    """The whitespace pattern that was asked for, behind its field."""
    structured = values[STRUCTURED] or {}
    patterns = {
        "guided_whitespace_pattern": values["guided_whitespace_pattern"],
        f"{STRUCTURED}.whitespace_pattern": structured.get("whitespace_pattern"),
        f"{STRUCTURED}.disable_any_whitespace": "" if structured.get("disable_any_whitespace") else None,
    }
    given = [(field, pattern) for field, pattern in patterns.items() if pattern is not None]
    if len(given) > 1:
        message = f"{given[0][0]} and {given[1][0]} both say what whitespace there may be: give one of them."
        raise RequestError(message, param=given[1][0])
    if given:
        _check_json(given[0][0], asked)
    return given[0] if given else None


def _check_closed_objects(values: Values, asked: Asked | None) -> None:
    structured = values[STRUCTURED] or {}
    if structured.get("disable_additional_properties"):
        field = f"{STRUCTURED}.disable_additional_properties"
        _check_json(field, asked)
        if asked is not None and asked.kind == "json_object":
            message = f"{field} needs a schema: the object would have no properties at all."
            raise RequestError(message, param=field)


def _check_json(field: str, asked: Asked | None) -> None:
    if asked is None or asked.kind not in JSON_KINDS:
        raise RequestError(f"{field} works only with a JSON constraint.", param=field)

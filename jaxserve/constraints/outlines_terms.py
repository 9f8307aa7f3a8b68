"""Outlines' output types as constraints: its terms, and the Python types that it takes for them.

Outlines says what is meant; it is enforced here like anything else. Its terms become one of our kinds where there is
one, and a regex otherwise. Its own way from a JSON schema to a regex leaves keywords out, so a schema inside a regex
(`Model | None`) is refused. This is the only module that imports outlines, and only when it is called: its import
takes a second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from jaxserve.constraints.constraint import DEFAULT_WHITESPACE, Constraint, ConstraintError


def to_constraint(value: Any) -> Constraint:
    """What a caller in Python asks of a text.

    Args:
        value: a `Constraint`; a term of `outlines.types`; or a type as outlines takes them: a pydantic model, a
            dataclass, a TypedDict, a union of these, an Enum, `Literal[…]`, `int`, `list[…]`, a function whose
            arguments are meant. `dict` is any JSON object.

    Raises:
        ConstraintError: outlines does not know it, or it cannot be enforced exactly.
    """
    if isinstance(value, Constraint):
        return value
    if isinstance(value, str):  # outlines would take it for a text that is given
        raise ConstraintError(
            "A constraint is a term or a type, not a text: Regex(…), CFG(…) or JsonSchema(…) of outlines.types."
        )
    if value is dict:
        return Constraint(kind="json_object")
    from outlines.types.dsl import JsonSchema, python_types_to_terms
    from pydantic import TypeAdapter

    if get_origin(value) in (Union, UnionType) and all(map(JsonSchema.is_json_schema, get_args(value))):
        return Constraint(kind="json_schema", text=json.dumps(TypeAdapter(value).json_schema()))
    try:
        term = python_types_to_terms(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"Outlines makes no constraint of {repr(value)[:100]}.") from error
    return _of_term(term)


def _of_term(term: Any) -> Constraint:
    from outlines.types.dsl import CFG, JsonSchema, Regex, to_regex

    if isinstance(term, JsonSchema):
        pattern = DEFAULT_WHITESPACE if term.whitespace_pattern is None else term.whitespace_pattern
        return Constraint(kind="json_schema", text=term.schema, whitespace_pattern=pattern)
    if isinstance(term, CFG):
        return Constraint(kind="grammar", text=term.definition)
    if isinstance(term, Regex):
        return Constraint(kind="regex", text=term.pattern)
    choices = _choices(term)
    if choices is not None:
        return Constraint(kind="choice", text=json.dumps(choices))
    for part in _parts(term):
        if isinstance(part, JsonSchema | CFG):
            what = "JSON schema" if isinstance(part, JsonSchema) else "grammar"
            raise ConstraintError(f"A {what} cannot be part of another constraint: it must be the whole one.")
    return Constraint(kind="regex", text=to_regex(term))


def _choices(term: Any) -> list[str] | None:
    """The texts among which the term chooses, if that is all that it does."""
    from outlines.types.dsl import Alternatives, Choice, String

    if isinstance(term, Choice):
        items = term.items
    elif isinstance(term, Alternatives):
        items = [part.value if isinstance(part, String) else None for part in term.terms]
    else:
        items = [term.value] if isinstance(term, String) else [None]
    return list(items) if all(isinstance(item, str) for item in items) else None


def _parts(term: Any) -> Iterator[Any]:
    """The term and all that it is made of."""
    from outlines.types.dsl import Choice, Term, python_types_to_terms

    yield term
    inner = [getattr(term, "term", None), *getattr(term, "terms", ())]
    if isinstance(term, Choice):
        inner += [python_types_to_terms(item) for item in term.items]
    for part in inner:
        if isinstance(part, Term):
            yield from _parts(part)

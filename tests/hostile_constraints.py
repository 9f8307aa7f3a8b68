"""Constraints that are sent to bring a server down: each is to be refused, soon, at nobody's cost."""

from __future__ import annotations

import json
from typing import Any

from jaxserve.constraints.constraint import Constraint, Kind

# it takes the library minutes
SLOW = Constraint(kind="grammar", text="start: " + '("a"|"b"?)*' * 4000)


def schema(value: Any) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(value))


FIELDS: dict[Kind, str] = {
    "json_schema": "guided_json",
    "regex": "guided_regex",
    "choice": "guided_choice",
    "grammar": "guided_grammar",
}


def request_fields(constraint: Constraint) -> dict[str, Any]:
    """The constraint as a field of a request."""
    choice = constraint.kind == "choice"
    return {FIELDS[constraint.kind]: json.loads(constraint.text) if choice else constraint.text}


HOSTILE = {
    "a chain of 5,000 rules": Constraint(
        kind="grammar", text="\n".join(f"a{i}:a{i + 1}" for i in range(5000)) + '\na5000:"z"\nstart:a0'
    ),
    "a grammar without end": Constraint(kind="grammar", text='start: "a" start'),
    "a slow grammar": SLOW,
    "1,000 optional properties": schema({"properties": {f"p{i}": {} for i in range(1000)}}),
    "minItems": schema({"type": "array", "minItems": 10**6}),
    "multipleOf": schema({"type": "number", "multipleOf": 1e8}),
    "several multipleOf": schema(
        {"allOf": [{"type": "integer", "multipleOf": n} for n in (9973, 9967, 9949)]}
    ),
    "maxLength": schema({"type": "string", "maxLength": 10**5}),
    "$ref to itself": schema({"$ref": "#"}),
    "a cycle of $ref": schema(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "allOf of anyOf": schema(
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": False}} for j in range(8)]} for i in range(12)]}
    ),
    "oneOf of oneOf": schema(
        {
            "oneOf": [
                {"oneOf": [{"properties": {f"{i}{j}": {}}, "required": [f"{i}{j}"]} for j in range(40)]}
                for i in range(40)
            ]
        }
    ),
    "counted optional properties": schema(
        {
            "allOf": [
                {
                    "properties": {f"{part}{i}": {} for i in range(30)},
                    "additionalProperties": False,
                    "minProperties": 2,
                }
                for part in range(20)
            ]
        }
    ),
    "1,000 patterns": schema({"patternProperties": {f"^{i}_": {} for i in range(1000)}}),
    "nesting": Constraint(kind="json_schema", text='{"items":' * 6000 + "{}" + "}" * 6000),
    "a regex of nested bounds": Constraint(kind="regex", text="((((a{99}){99}){99}){99}){99}"),
    "NUL": Constraint(kind="regex", text="a\0b"),
    "NUL in a choice": Constraint(kind="choice", text='["a\\u0000b"]'),
    "NUL in a grammar": Constraint(kind="grammar", text='start: "a\0b"'),
    "too long": Constraint(kind="regex", text="x" * 4097),
}

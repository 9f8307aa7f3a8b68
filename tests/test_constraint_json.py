"""JSON under a schema: every text is valid as `jsonschema` sees it, and what cannot be enforced is refused."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import jsonschema
import pytest

from jaxserve.constraints.constraint import CompiledConstraint, Constraint, ConstraintError, TooComplexError
from jaxserve.constraints.json_schema import FORMATS, normalize_schema
from tests.constraint_walks import BYTE_COMPILER, texts_of

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
NODE = {
    "type": "object",
    "properties": {"v": INTEGER, "next": {"anyOf": [{"$ref": "#/definitions/n"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": ["integer", "null"]},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "integer", "minimum": 2, "maximum": 7},
    {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    {"type": "integer", "multipleOf": 7, "minimum": 100},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 3},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "number", "multipleOf": 0.5, "minimum": 0.7},
    {"type": "number", "minimum": -1.5, "maximum": 2.25},
    {"minimum": 1, "exclusiveMinimum": 0},
    {"type": "string", "minLength": 2, "maxLength": 3},
    {"type": "string", "pattern": "b"},
    {"type": "string", "pattern": "^a+$"},
    {"type": "string", "pattern": "a|b$"},
    {"type": "string", "pattern": "^a", "maxLength": 4},
    {"type": "string", "pattern": r"^\d{3}-\w+$", "maxLength": 9},
    {"type": "string", "pattern": r"^[^\n]+$", "maxLength": 5},
    *({"type": "string", "format": name} for name in FORMATS),
    {"type": "string", "format": "date", "pattern": "^2"},
    {"enum": [1, "a", None, [1, 2], {"a": 1}, "é😀", "\u0000\u2028"]},
    {"enum": [1, 2, 3], "minimum": 2},
    {"type": ["string", "null"], "enum": ["a", None, 3]},
    {"const": {"a": 1, "b": [True]}},
    {"type": "array", "items": INTEGER},
    {"type": "array", "minItems": 1, "maxItems": 2, "items": {"enum": [1, 2]}},
    {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 2, "items": False},
    {"type": "array", "prefixItems": [INTEGER, False]},
    {"type": "array", "items": False},
    {"type": "object", "properties": {"a": INTEGER}},
    {
        "type": "object",
        "properties": {"a": INTEGER, "b": STRING},
        "required": ["b"],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "required": ["c"]},
    {"type": "object", "patternProperties": {"^a": INTEGER}},
    {"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": False},
    {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "additionalProperties": INTEGER},
    {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": INTEGER},
    {
        "type": "object",
        "propertyNames": {"$ref": "#/$defs/e"},
        "additionalProperties": INTEGER,
        "$defs": {"e": {"enum": ["p", "q"], "type": "string", "title": "E"}},
    },
    {"type": "object", "maxProperties": 1, "additionalProperties": INTEGER},
    {"type": "object", "minProperties": 1, "additionalProperties": INTEGER},
    {"type": "object", "minProperties": 2, "required": ["a"], "properties": {"a": INTEGER}},
    {"type": "object", "properties": {'é"\\/\n😀': {"const": 'é"\\/\n😀'}}, "required": ['é"\\/\n😀']},
    {"anyOf": [INTEGER, STRING], "minimum": 2, "maxLength": 3},
    {"type": "integer", "anyOf": [{"minimum": 5}, {"maximum": 1}]},
    {"oneOf": [INTEGER, {"type": "null"}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": k}, k: INTEGER}, "required": ["k", k]}
            for k in ("x", "y")
        ]
    },
    {"allOf": [{"properties": {"a": INTEGER}}, {"properties": {"b": STRING}, "required": ["b"]}]},
    {"$defs": {"x": INTEGER}, "$ref": "#/$defs/x", "minimum": 2},
    {"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": {"type": "boolean"}}},
    {"definitions": {"n": NODE}, "$ref": "#/definitions/n"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False},
    # nothing finite is valid below a: there must be no a
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/endless"}, "b": INTEGER},
        "additionalProperties": False,
        "$defs": {"endless": {"type": "array", "items": {"$ref": "#/$defs/endless"}, "minItems": 1}},
    },
    {
        "title": "Person",
        "description": "as pydantic writes it",
        "type": "object",
        "properties": {
            "name": {"title": "Name", "type": "string", "maxLength": 8, "examples": ["x"]},
            "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
            "kind": {"$ref": "#/$defs/Kind"},
        },
        "required": ["name", "kind"],
        "$defs": {"Kind": {"enum": ["a", "b"], "type": "string", "title": "Kind"}},
        "x-unknown": {"anything": ["goes"]},
        "$schema": "https://json-schema.org/draft/2020-12/schema",
    },
]


def schema_constraint(schema: object, **options: Any) -> Constraint:
    return Constraint(kind="json_schema", text=json.dumps(schema), **options)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_every_text_is_valid_under_the_schema(schema: dict[str, Any]) -> None:
    kind = jsonschema.Draft202012Validator
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    texts = texts_of(schema_constraint(schema), range(15), max_tokens=300)
    assert texts
    for text in texts:
        validator.validate(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"type": "array", "items": [INTEGER], "additionalItems": False}, ["[]", "[1]"], ["[1, 2]", '["a"]']),
        ({"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 3}, ["2", "3"], ["1", "4"]),
        ({"type": "array", "items": INTEGER, "uniqueItems": False}, ["[1, 1]"], ['["a"]']),
        ({"type": "number", "multipleOf": 0.01, "minimum": 0}, ["19.99", "0.3"], ["0.001"]),
        (
            {"type": "string", "format": "time"},
            ['"23:59:59Z"', '"00:00:00.25+01:30"'],
            ['"24:00:00Z"', '"10:00:60Z"'],
        ),
        (
            {"type": "string", "format": "date"},
            ['"2024-02-29"', '"2000-02-29"'],
            ['"2023-02-29"', '"1900-02-29"'],
        ),
        (
            {
                "type": "object",
                "properties": {"a": INTEGER, "ab": INTEGER},
                "propertyNames": {"minLength": 2, "maxLength": 3},
            },
            ["{}", '{"ab": 1}', '{"é\\n😀": 1}', '{"ab": 1, "cd": 2}'],
            ['{"a": 1}', '{"": 1}', '{"abcd": 1}'],
        ),
        (
            {"type": "string", "format": "hostname"},
            ['"a.b-c.d"', f'"{".".join(["a" * 62] * 4)}.b"'],
            ['"a..b"', '"-a"', f'"{"a" * 64}"', f'"{".".join(["a" * 62] * 4)}.bb"'],
        ),
        ({"type": "string"}, ['"é😀\\n\\u0001"', '""'], ['"\n"', "x"]),
        ({"type": "string", "minLength": 2, "maxLength": 2}, ['"é😀"', '"\\n\\""'], ['"é"']),
    ],
)
def test_texts_that_are_allowed_and_texts_that_are_not(
    schema: dict[str, Any], valid: list[str], invalid: list[str]
) -> None:
    compiled = BYTE_COMPILER.compile(schema_constraint(schema))
    for text in valid + invalid:
        matcher = BYTE_COMPILER.matcher(compiled)
        allowed = all(matcher.accept(byte) for byte in text.encode()) and matcher.can_end
        assert allowed is (text in valid), text


def test_an_object_is_an_object() -> None:
    for text in texts_of(Constraint(kind="json_object"), range(8), max_tokens=400):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("pattern", "whitespace"),
    [("", ""), ("[ ]?", " ?"), (r"\n?", "\n?"), (r"\s{0,2}", r"\s{0,2}"), (r"( |\t)*", "[ \t]*")],
)
def test_whitespace_between_tokens_is_what_the_pattern_says(pattern: str, whitespace: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"enum": [1]}, "minItems": 1}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tokens = ["{", '"a"', ":", r"\[", f"1(?:{whitespace},{whitespace}1)*", r"\]", "}"]
    shape = re.compile(whitespace.join(tokens))
    seen = set()
    for text in texts_of(schema_constraint(schema, whitespace_pattern=pattern), range(20)):
        assert shape.fullmatch(text), text
        seen.update(set(text) & set(" \t\n"))
    assert bool(seen) is bool(pattern)


def test_whitespace_that_must_be_there_is_refused() -> None:
    with pytest.raises(ConstraintError, match="must match the empty text"):
        BYTE_COMPILER.compile(schema_constraint({}, whitespace_pattern=" "))


def test_additional_properties_can_be_turned_off_where_a_schema_does_not_speak_of_them() -> None:
    schema = {
        "type": "object",
        "properties": {"a": INTEGER, "b": {"type": "object", "additionalProperties": INTEGER}},
    }
    normal = normalize_schema(schema, additional_properties=False)
    assert normal["additionalProperties"] is False
    assert normal["properties"]["b"]["additionalProperties"] == {"type": ["integer"]}


REFUSALS = [
    ({"not": {}}, "keyword not .*at #/not"),
    ({"properties": {"a/b": {"if": {}, "then": {}}}}, "keyword if .*at #/properties/a~1b/if"),
    ({"type": "array", "items": {"type": "array", "uniqueItems": True}}, "uniqueItems .*#/items/uniqueItems"),
    ({"contains": {}}, "keyword contains"),
    ({"anyOf": [{"unevaluatedProperties": False}]}, "#/anyOf/0/unevaluatedProperties"),
    ({"unevaluatedItems": False}, "unevaluatedItems"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"dependentSchemas": {"a": {}}}, "dependentSchemas"),
    ({"dependencies": {"a": ["b"]}}, "dependencies"),
    ({"$dynamicRef": "#x"}, "dynamicRef"),
    ({"$ref": "https://example.com/schema"}, r"\$ref must point into the schema itself"),
    ({"$ref": "#anchor"}, r"\$ref must point into the schema itself"),
    ({"$ref": "#/$defs/nope"}, "which is not there"),
    ({"properties": {"a": {"$id": "x"}}}, r"\$id .*#/properties/a/\$id"),
    ({"type": "string", "format": "regex"}, "format 'regex' is not supported, only date"),
    ({"type": "string", "format": "duration"}, "format 'duration'"),
    ({"type": "object", "minProperties": 2}, "minProperties is only supported"),
    ({"propertyNames": {"format": "uuid"}}, "propertyNames is only supported"),
    ({"propertyNames": {"minLength": 3, "maxLength": 2}}, "wrong way round"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf"),
    ({"oneOf": [{"minimum": 0, "maximum": 5}, {"minimum": 5}], "type": "integer"}, "oneOf"),
    ({"oneOf": [{"enum": [1, 2]}, {"const": 2.0}]}, "oneOf"),
    ({"oneOf": [{"properties": {"a": {"const": i}}} for i in range(2)], "type": "object"}, "oneOf"),
    ({"type": "object", "minProperties": 3, "maxProperties": 2}, "contradictory"),
    (
        {"type": "object", "properties": {"a": {}}, "minProperties": 2, "additionalProperties": False},
        "contradictory",
    ),
    ({"patternProperties": {"a": INTEGER, "b": STRING}}, "not disjoint"),
    (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5},
        "exclusiveMinimum 0 cannot be enforced",
    ),
    ({"type": "integer", "maximum": 2**53 + 1}, "beyond what is exact"),
    ({"type": "string", "pattern": r"\bx"}, "word boundaries .*#/pattern"),
    ({"type": "string", "pattern": "(?=x)"}, "look-around"),
    ({"patternProperties": {"(": {}}}, "not closed .*#/patternProperties"),
    # malformed
    ({"type": "strin"}, "malformed.*#/type"),
    ({"type": []}, "malformed"),
    ({"minLength": "5"}, "malformed.*#/minLength"),
    ({"minLength": -1}, "malformed"),
    ({"maxItems": 1.5}, "malformed"),
    ({"minimum": "1"}, "malformed"),
    ({"multipleOf": 0}, "greater than 0"),
    ({"enum": 1}, "malformed"),
    ({"properties": []}, "malformed"),
    ({"required": "a"}, "malformed"),
    ({"anyOf": []}, "malformed"),
    ({"items": 1}, "malformed"),
    ({"pattern": 1}, "malformed"),
    ({"format": 1}, "malformed"),
    ({"exclusiveMinimum": True}, "true needs minimum"),
    ({"$ref": 1}, "malformed"),
    # contradictory
    ({"enum": []}, "contradictory"),
    ({"type": "string", "enum": [1]}, "[Uu]nsatisfiable"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "[Uu]nsatisfiable"),
    ({"type": "string", "minLength": 3, "maxLength": 1}, "[Uu]nsatisfiable"),
    ({"type": "array", "items": False, "minItems": 1}, "contradictory"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "contradictory"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "contradictory"),
    ({"allOf": [INTEGER, STRING]}, "[Uu]nsatisfiable"),
    ({"$ref": "#"}, "no finite value"),
    (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "no finite value",
    ),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no finite value"),
    ({"type": "array", "prefixItems": [{"$ref": "#"}], "minItems": 1}, "no finite value"),
]


@pytest.mark.parametrize(("schema", "words"), REFUSALS, ids=lambda value: json.dumps(value)[:50])
def test_what_cannot_be_enforced_is_refused_by_name_and_path(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(ConstraintError, match=words) as caught:
        BYTE_COMPILER.compile(schema_constraint(schema))
    assert caught.value.code == "invalid_constraint"
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("text", ["", "{", "nul", "[]", "1", '"a"', "[" * 10**5])
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(ConstraintError):
        BYTE_COMPILER.compile(Constraint(kind="json_schema", text=text))


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = INTEGER
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def properties(number: int, *, required: bool) -> dict[str, Any]:
    names = [f"p{i}" for i in range(number)]
    return {
        "type": "object",
        "properties": {name: {} for name in names},
        "required": names if required else [],
    }


@pytest.mark.parametrize(
    "schema",
    [
        nested(65),
        properties(1000, required=False),
        properties(401, required=False),
        properties(4097, required=True),
        {"type": "array", "minItems": 10**6},
        {"type": "number", "multipleOf": 1e8},
        {"type": "string", "maxLength": 10**5},
        {**properties(20, required=False), "additionalProperties": False, "minProperties": 10},
        {**properties(10, required=False), "maxProperties": 9},
        {"type": "string", "pattern": "a{10001}"},
        {"enum": list(range(10001))},
        {"enum": [[list(range(100))] * 101]},
        {"anyOf": [INTEGER] * 10001},
        {"description": "x" * 65536},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_what_is_too_large_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(TooComplexError) as caught:
        BYTE_COMPILER.compile(schema_constraint(schema))
    assert caught.value.code == "constraint_too_complex"


@pytest.mark.parametrize(
    "schema",
    [
        nested(64),
        properties(400, required=False),
        properties(1000, required=True),
        {"type": "string", "minLength": 65_536},
        {"type": "array", "maxItems": 65_536},
        {"enum": list(range(9_999))},
        {"type": "integer", "multipleOf": 9973, "minimum": 1, "maximum": 10**15},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_what_is_large_is_taken(schema: dict[str, Any]) -> None:
    BYTE_COMPILER.compile(schema_constraint(schema))


# --- what is rewritten: every object or value, and whether it is allowed, as jsonschema has it ----------------


def is_allowed(compiled: CompiledConstraint, value: object) -> bool:
    matcher = BYTE_COMPILER.matcher(compiled)
    text = json.dumps(value, separators=(",", ":"))
    return all(matcher.accept(byte) for byte in text.encode()) and matcher.can_end


@pytest.mark.parametrize("others", [False, True, {"type": "integer"}], ids=str)
@pytest.mark.parametrize("required", [[], ["c"]], ids=str)
@pytest.mark.parametrize("low", range(4))
@pytest.mark.parametrize("high", [1, 2, 3, 4, None])
def test_properties_are_counted_whichever_of_them_are_optional(
    others: Any, required: list[str], low: int, high: int | None
) -> None:
    bounds = {"minProperties": low} | ({} if high is None else {"maxProperties": high})
    names = ["a", "b", "c", "d"]
    schema = {
        "type": "object",
        "properties": {name: {"const": 0} for name in names},
        "required": required,
        "additionalProperties": others,
        **bounds,
    }
    if high is not None and high < low:
        return
    if others is not False and low > len(required) + 1:  # additional names could be repetitions
        with pytest.raises(ConstraintError, match="minProperties is only supported"):
            BYTE_COMPILER.compile(schema_constraint(schema))
        return
    compiled = BYTE_COMPILER.compile(schema_constraint(schema))
    validator = jsonschema.Draft202012Validator(schema)
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            for extra in ([], ["x"], ["x", "y"]):
                value = dict.fromkeys([*chosen, *extra], 0)
                assert is_allowed(compiled, value) is validator.is_valid(value), value


VALUES: list[Any] = [
    None,
    False,
    True,
    -1,
    0,
    1,
    4,
    5,
    6,
    9,
    "",
    "a",
    "ab",
    "abc",
    [],
    [1],
    [1, 2],
    {},
    {"k": "x"},
]
VALUES += [{"k": "y", "v": 1}, {"k": "x", "v": 1}, {"k": "x", "w": 1}, {"k": 1, "w": 1}, {"v": 1}, {"w": 1}]
TAGGED = [
    {"type": "object", "properties": {"k": {"const": key}, "v": INTEGER}, "required": ["k"]} for key in "xy"
]
ONE_OF: list[dict[str, Any]] = [
    {"oneOf": [{"const": i, "title": f"level {i}"} for i in range(6)]},
    {"oneOf": [{"enum": [1, "a", None]}, {"enum": [True, 4]}]},
    {"oneOf": [{"type": "integer", "maximum": 4}, {"type": "integer", "minimum": 5}, {"type": "null"}]},
    {"type": "integer", "oneOf": [{"exclusiveMaximum": 5}, {"minimum": 5, "maximum": 6}]},
    {"type": "string", "oneOf": [{"maxLength": 1}, {"minLength": 3}]},
    {"oneOf": [{"type": "array", "maxItems": 1}, {"type": "array", "minItems": 2}], "items": INTEGER},
    {"oneOf": TAGGED},
    {"$defs": {"x": TAGGED[0], "y": TAGGED[1]}, "oneOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}]},
    {"type": "object", "required": ["k"], "oneOf": [{"properties": {"k": {"const": key}}} for key in "xy"]},
    {
        "oneOf": [
            {
                **TAGGED[0],
                "required": ["k", key],
                "properties": {"k": STRING, key: INTEGER},
                "additionalProperties": False,
            }
            for key in "vw"
        ]
    },
    {"oneOf": [{"anyOf": [{"const": 1}, {"type": "null"}]}, {"allOf": [STRING, {"minLength": 2}]}]},
    {"oneOf": [{"type": ["integer", "null"]}, {"type": ["string", "boolean"]}], "anyOf": [{"maxLength": 1}]},
]


@pytest.mark.parametrize("schema", ONE_OF, ids=lambda schema: json.dumps(schema)[:60])
def test_one_of_branches_that_exclude_one_another_is_any_of_them(schema: dict[str, Any]) -> None:
    assert "oneOf" not in json.dumps(normalize_schema(schema))
    compiled = BYTE_COMPILER.compile(schema_constraint(schema))
    validator = jsonschema.Draft202012Validator(schema)
    allowed = [is_allowed(compiled, value) for value in VALUES]
    assert allowed == [validator.is_valid(value) for value in VALUES]
    assert any(allowed)

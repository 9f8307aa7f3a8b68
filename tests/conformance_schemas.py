"""Over 300 JSON schemas for conformance runs, in the style of those that clients send: families of one keyword with its
parameters, and handwritten ones that look like tools' arguments, configurations and extraction models.

`SCHEMAS` maps a name to a schema; the family is the part before the slash. Most texts are bounded,
so that a model without any sense comes to an end, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

Schema = dict[str, Any]
Named = Iterator[tuple[str, Schema]]

INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}


def text(max_length: int = 8, **more: Any) -> Schema:
    return {"type": "string", "maxLength": max_length, **more}


def array(items: Any, low: int = 0, high: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def closed(properties: Schema, optional: str = "", **more: Any) -> Schema:
    """An object without other properties; all are required but those named, separated by spaces."""
    required = [name for name in properties if name not in optional.split()]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **more,
    }


def choice(*values: Any) -> Schema:
    return {"enum": list(values)}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


# --- one keyword ------------------------------------------------------------------------------------------------


def types() -> Named:
    for schema in (INTEGER, NUMBER, BOOLEAN, NULL):
        yield schema["type"], schema
    for names in itertools.combinations(("boolean", "integer", "null"), 2):
        yield "+".join(names), {"type": list(names)}
    yield "all scalars", {"type": ["null", "boolean", "integer", "number", "string"], "maxLength": 5}
    yield "string or numbers", {"type": ["string", "array"], "maxLength": 4, "items": DIGIT, "maxItems": 3}


def enums() -> Named:
    yield "one", choice("only")
    yield "prefixes", choice("a", "ab", "abc", "abcd", "b", "ba")
    yield "numbers", choice(0, 1, -1, 2.5, 1e10, 100)
    yield "mixed", choice(None, True, False, 0, "", "null", [], {}, [1, "a"], {"k": [None]})
    yield "escapes", choice('"', "\\", "/", "\b\f\n\r\t", "\u0001", "\u007f", "\u2028")
    yield "unicode", choice("é", "e\u0301", "ß", "日本語", "한국어", "עברית", "🦜", "👩‍👩‍👧", "\U0010ffff")
    yield "objects", choice({"a": 1, "b": [2, 3]}, {"a": 2}, {"ü": {"ö": "ä"}})
    yield "typed", {"type": "string", "enum": ["low", "medium", "high"]}
    yield "typed, some left out", {"type": ["string", "null"], "enum": ["x", 1, None, [2]]}
    yield "with a minimum", {"enum": [1, 2, 3, 4, 5], "minimum": 3}
    yield "with a pattern", {"enum": ["aa", "ab", "ba"], "pattern": "^a"}
    for count in (50, 300, 1000):
        yield f"{count} words", {"enum": [f"item-{i}-{i * i % 97}" for i in range(count)]}
    for value in (None, True, 7, -0.5, "text", "é\n", [1, [2, [3]]], {"a": {"b": {"c": None}}}):
        yield f"const {value!r}", {"const": value}


def integers() -> Named:
    bounds = [(0, 9), (1, 100), (-5, 5), (-100, -10), (17, 17), (0, 255), (1000, 99999), (-1, 0), (7, 7001)]
    for low, high in bounds:
        yield f"{low} to {high}", {"type": "integer", "minimum": low, "maximum": high}
    for low, high in ((0, 3), (-3, 3), (99, 102), (-1000, 1000)):
        limits = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        yield f"between {low} and {high}", {"type": "integer", **limits}
    for low in (0, 1, 18, -40, 1900):
        yield f"from {low}", {"type": "integer", "minimum": low}
    for high in (0, 99, -7):
        yield f"up to {high}", {"type": "integer", "maximum": high}
    for divisor, high in ((2, 20), (5, 100), (7, 700), (10, 5000), (100, 100000)):
        values = {"multipleOf": divisor, "minimum": 0, "maximum": high}
        yield f"multiple of {divisor}", {"type": "integer", **values}
    yield "fractional bounds", {"type": "integer", "minimum": 0.5, "maximum": 3.7}
    yield "a port", {"type": "integer", "minimum": 1024, "maximum": 65535}
    yield "a year", {"type": "integer", "minimum": 1970, "exclusiveMaximum": 2100}
    yield "32 bits", {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}


def numbers() -> Named:
    for low, high in ((0, 1), (-1, 1), (0.5, 2.25), (-273.15, 1000), (-90, 90), (-180, 180), (0, 0.001)):
        yield f"{low} to {high}", {"type": "number", "minimum": low, "maximum": high}
    for low, high in ((1, 2), (-3.5, -1.25), (0, 100)):
        limits = {"exclusiveMinimum": low, "exclusiveMaximum": high}
        yield f"between {low} and {high}", {"type": "number", **limits}
    for limit in (0, 1.5, -20):
        yield f"from {limit}", {"type": "number", "minimum": limit}
        yield f"below {limit}", {"type": "number", "exclusiveMaximum": limit}
    for divisor in (0.5, 0.25, 0.01, 3):
        limits = {"multipleOf": divisor, "minimum": 0, "maximum": 30}
        yield f"multiple of {divisor}", {"type": "number", **limits}
    yield "several kinds", {"type": ["number", "null"], "minimum": 2, "maximum": 3}
    yield "any or text", {"type": ["number", "string"], "minimum": 0, "maximum": 9, "maxLength": 3}


def lengths() -> Named:
    for low, high in ((0, 0), (0, 1), (1, 1), (3, 3), (2, 5), (1, 12), (10, 20), (64, 64), (100, 130)):
        yield f"{low} to {high}", {"type": "string", "minLength": low, "maxLength": high}
    yield "from 3", {"type": "string", "minLength": 3}
    yield "in an array", array(text(3, minLength=1), 2, 4)
    yield "keys and values", closed({"a": text(2), "b": text(5, minLength=5)})


PATTERNS = {
    "id": "^[a-z][a-z0-9_]{2,10}$",
    "upper": "^[A-Z]{3}$",
    "slug": "^[a-z0-9]+(-[a-z0-9]+){0,3}$",
    "version": r"^\d{1,2}\.\d{1,2}\.\d{1,2}(-(alpha|beta|rc)\.\d)?$",
    "phone": r"^\+[1-9]\d{6,14}$",
    "US phone": r"^(\([0-9]{3}\) )?[0-9]{3}-[0-9]{4}$",
    "colour": "^#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})$",
    "postcode": r"^[0-9]{5}(-[0-9]{4})?$",
    "currency": r"^[A-Z]{3} \d{1,6}\.\d{2}$",
    "time": "^([01][0-9]|2[0-3]):[0-5][0-9]$",
    "IBAN": "^[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}$",
    "path": "^(/[a-z0-9._-]{1,8}){1,4}$",
    "image": r"^[a-z0-9]{1,10}(/[a-z0-9]{1,10})?:[a-z0-9.]{1,8}$",
    "duration": r"^P(\d{1,2}D)?(T\d{1,2}H(\d{1,2}M)?)?$",
    "hash": "^[0-9a-f]{40}$",
    "semantic words": "^(red|green|blue)( (light|dark))?$",
    "search for a digit": "[0-9]",
    "begins with a": "^a",
    "ends with z": "z$",
    "no spaces": r"^\S{1,12}$",
    "words": r"^\w+( \w+){0,4}$",
    "anything but quotes": '^[^"]{1,10}$',
    "dots and escapes": r"^a\.b\*c\\d/e\?$",
    "unicode": "^[äöüß]{1,3}[α-ω]{2}$",
    "Chinese": r"^[\u4e00-\u9fff]{1,4}$",
    "emoji": "^[😀-😏]{2}$",
    "controls": r"^a\tb\nc$",
    "alternatives": "^(cat|dog)$|^bird[0-9]$",
    "optional groups": "^(ab)?(cd)?(ef)?g$",
    "lazy": "^a+?b*?c$",
}


def patterns() -> Named:
    for name, pattern in PATTERNS.items():
        yield name, {"type": "string", "pattern": pattern}
    yield "and a length", {"type": "string", "pattern": "^[ab]+$", "minLength": 3, "maxLength": 5}
    yield "two of them", {"type": "string", "allOf": [{"pattern": "^a"}, {"pattern": "b$"}], "maxLength": 6}
    yield "for numbers, too", {"pattern": "^x$", "type": ["string", "integer"], "maximum": 5, "minimum": 0}


def formats() -> Named:
    for name in ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "uri"):
        yield name, {"type": "string", "format": name}
    yield "a period", closed({key: {"type": "string", "format": "date"} for key in ("from", "to")})
    yield "a date in May", {"type": "string", "format": "date", "pattern": "^20..-05-"}
    yield "or null", {"type": ["string", "null"], "format": "uuid"}


def arrays() -> Named:
    for low, high in ((0, 0), (1, 1), (0, 3), (2, 5), (4, 4), (10, 12)):
        yield f"{low} to {high} digits", array(DIGIT, low, high)
    for name, items in {
        "booleans": BOOLEAN,
        "texts": text(4),
        "enums": choice("x", "y", 1, None),
        "pairs": array(DIGIT, 2, 2),
        "objects": closed({"k": DIGIT}),
        "nullables": nullable(DIGIT),
        "two types": {"type": ["boolean", "null"]},
    }.items():
        yield f"of {name}", array(items, 1, 3)
    yield "unbounded", {"type": "array", "items": choice(1, 2)}
    yield "no items schema", {"type": "array", "maxItems": 0}
    point = {"type": "array", "prefixItems": [NUMBER, NUMBER], "minItems": 2, "items": False}
    yield "a point", point
    yield "a polygon", array(array(DIGIT, 2, 2), 3, 5)
    yield "a row", {"type": "array", "prefixItems": [text(5), DIGIT, BOOLEAN], "minItems": 3, "maxItems": 3}
    yield "a prefix and more", {"type": "array", "prefixItems": [BOOLEAN], "items": DIGIT, "maxItems": 4}
    yield "a prefix that may be cut", {"type": "array", "prefixItems": [DIGIT, BOOLEAN], "items": False}
    yield "a matrix", array(array(choice(0, 1), 3, 3), 3, 3)
    yield "only the items speak of objects", {"type": "array", "items": closed({"a": NULL}), "maxItems": 2}


def objects() -> Named:
    properties = {"a": DIGIT, "b": text(3), "c": BOOLEAN}
    for count in range(4):
        for optional in itertools.combinations(properties, count):
            yield f"optional: {''.join(optional) or 'none'}", closed(properties, " ".join(optional))
    yield "nothing", closed({})
    yield (
        "nothing but what is required",
        {"type": "object", "required": ["x"], "additionalProperties": BOOLEAN},
    )
    yield "other integers", {"type": "object", "properties": {"a": NULL}, "additionalProperties": DIGIT}
    yield "only others", {"type": "object", "additionalProperties": choice(1, 2), "maxProperties": 2}
    yield (
        "one to two others",
        {
            "type": "object",
            "additionalProperties": BOOLEAN,
            "minProperties": 1,
            "maxProperties": 2,
        },
    )
    yield "one of three", closed(properties, "a b c", maxProperties=1)
    yield "at least one of three", closed(properties, "a b c", minProperties=1)
    yield "two or three of three", closed(properties, "a b c", minProperties=2)
    yield (
        "exactly two of four",
        closed({**properties, "d": NULL}, "a b c d", minProperties=2, maxProperties=2),
    )
    yield "required and one more", closed(properties, "b c", minProperties=2, maxProperties=2)
    yield (
        "patterns",
        {
            "type": "object",
            "patternProperties": {"^n_[a-z]$": DIGIT, "^b_[a-z]$": BOOLEAN},
            "additionalProperties": False,
            "maxProperties": 3,
        },
    )
    yield (
        "a property and patterns",
        {
            "type": "object",
            "properties": {"name": text(4)},
            "patternProperties": {"^x-[a-z]{1,3}$": text(3)},
            "required": ["name"],
            "additionalProperties": False,
        },
    )
    yield (
        "names by pattern",
        {
            "type": "object",
            "propertyNames": {"pattern": "^[a-c]{1,2}$"},
            "additionalProperties": DIGIT,
            "maxProperties": 3,
        },
    )
    yield (
        "names by enum",
        {
            "type": "object",
            "propertyNames": {"enum": ["en", "de", "fr"]},
            "additionalProperties": text(5),
        },
    )
    yield (
        "required but not described",
        {
            "type": "object",
            "properties": {"a": DIGIT},
            "required": ["a", "z"],
            "additionalProperties": BOOLEAN,
        },
    )
    yield (
        "forbidden property",
        {
            "type": "object",
            "properties": {"a": False, "b": DIGIT},
            "required": ["b"],
            "additionalProperties": False,
        },
    )
    for count in (8, 20, 60):
        yield f"{count} required", closed({f"field_{i}": DIGIT for i in range(count)})
    for count in (5, 30, 100):
        names = [f"option_{i}" for i in range(count)]
        yield f"{count} optional", closed(dict.fromkeys(names, BOOLEAN), " ".join(names))
    yield "required amid optional", closed({f"p{i}": DIGIT for i in range(12)}, "p0 p1 p3 p4 p6 p8 p9 p11")


def keys() -> Named:
    for key in (
        "é",
        "naïve café",
        "日本",
        "ключ",
        "😀",
        "e\u0301",
        "a b",
        "",
        "\n",
        '"',
        "\\",
        "$ref",
        "/",
        "~",
        "#",
        "\u2028",
    ):
        yield repr(key), closed({key: DIGIT})
    yield "many scripts", closed(dict.fromkeys(("αβγ", "עברית", "العربية", "हिन्दी", "ไทย", "한글"), BOOLEAN))
    yield "optional emoji", closed(dict.fromkeys("🍏🍌🍇", DIGIT), "🍏 🍇")
    yield "prefixes of one another", closed({"a": DIGIT, "aa": DIGIT, "aaa": DIGIT}, "a aa aaa")
    yield (
        "beside others",
        {
            "type": "object",
            "properties": {"ab": NULL, "abc": NULL},
            "required": ["ab"],
            "additionalProperties": DIGIT,
            "maxProperties": 3,
        },
    )


# --- combinations -----------------------------------------------------------------------------------------------


def any_of() -> Named:
    yield "types", {"anyOf": [DIGIT, BOOLEAN, NULL]}
    yield "texts or numbers", {"anyOf": [text(3), {"type": "integer", "minimum": 100}]}
    yield (
        "overlapping ranges",
        {"type": "integer", "anyOf": [{"minimum": 0, "maximum": 20}, {"minimum": 10, "maximum": 30}]},
    )
    yield (
        "objects",
        {"anyOf": [closed({"a": DIGIT}), closed({"b": BOOLEAN}), closed({"a": DIGIT, "b": NULL})]},
    )
    yield "arrays or one", {"anyOf": [DIGIT, array(DIGIT, 1)]}
    yield "with siblings", {"type": "string", "maxLength": 5, "anyOf": [{"minLength": 4}, {"pattern": "^x"}]}
    yield (
        "required alternatives",
        {
            "type": "object",
            "properties": {"mail": text(5), "phone": text(5)},
            "additionalProperties": False,
            "anyOf": [{"required": ["mail"]}, {"required": ["phone"]}],
        },
    )
    yield "nested", {"anyOf": [{"anyOf": [NULL, BOOLEAN]}, {"anyOf": [DIGIT, choice("x")]}]}
    yield "with an impossible one", {"anyOf": [False, DIGIT]}
    yield "with true", {"type": "boolean", "anyOf": [True, NULL]}
    for name in ("integer", "string", "object"):
        inner = {"integer": DIGIT, "string": text(4), "object": closed({"x": DIGIT})}[name]
        yield f"nullable {name}", closed({"value": nullable(inner)})


def one_of() -> Named:
    yield "types", {"oneOf": [DIGIT, NULL, text(3)]}
    yield (
        "ranges apart",
        {
            "oneOf": [
                {"type": "integer", "minimum": 0, "maximum": 4},
                {"type": "integer", "minimum": 10, "maximum": 14},
            ]
        },
    )
    yield "enums apart", {"oneOf": [choice("a", "b"), choice("c"), choice(1)]}
    shapes = {"circle": ["r"], "square": ["side"], "box": ["w", "h"]}
    yield (
        "discriminated",
        {
            "oneOf": [
                closed({"kind": {"const": kind}, **dict.fromkeys(sides, DIGIT)})
                for kind, sides in shapes.items()
            ]
        },
    )
    yield (
        "discriminated in an array",
        array({"oneOf": [closed({"op": {"const": op}, "value": DIGIT}) for op in ("add", "sub")]}, 1, 3),
    )
    yield "consts with titles", {"oneOf": [{"const": i, "title": f"level {i}"} for i in range(5)]}


def all_of() -> Named:
    yield "ranges", {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 12}]}
    yield (
        "objects",
        {
            "allOf": [
                {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
                {"properties": {"b": BOOLEAN}, "required": ["b"]},
            ],
            "maxProperties": 2,
        },
    )
    base = {"type": "object", "properties": {"id": DIGIT}, "required": ["id"]}
    yield (
        "a base",
        {
            "$defs": {"base": base},
            "allOf": [{"$ref": "#/$defs/base"}],
            "properties": {"name": text(4)},
            "required": ["name"],
            "maxProperties": 2,
        },
    )
    yield "enums", {"allOf": [choice(1, 2, 3, 4), choice(3, 4, 5)]}
    yield "lengths", {"type": "string", "allOf": [{"minLength": 2}, {"maxLength": 4}]}
    yield "an enum and a type", {"allOf": [choice("a", 1, 2, None), {"type": "integer"}]}
    yield "one member", {"allOf": [DIGIT], "description": "as pydantic wrote references once"}
    yield "of anyOf", {"allOf": [{"anyOf": [DIGIT, NULL]}, {"anyOf": [NULL, BOOLEAN]}]}
    yield "items", {"type": "array", "maxItems": 3, "allOf": [{"items": {"minimum": 0}}, {"items": DIGIT}]}


def combinations() -> Named:
    """Keywords that have to be seen together."""
    x = {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]}
    yield (
        "a pattern for a property that is described",
        {
            "type": "object",
            "properties": {"x-a": {"minimum": 5}},
            "patternProperties": {"^x-": DIGIT},
            "required": ["x-a"],
            "additionalProperties": False,
        },
    )
    yield (
        "a pattern that forbids a property",
        {
            "type": "object",
            "properties": {"x-a": DIGIT, "b": DIGIT},
            "patternProperties": {"^x-": False},
            "additionalProperties": False,
        },
    )
    yield (
        "required by a pattern",
        {
            "type": "object",
            "patternProperties": {"^n": DIGIT},
            "required": ["no"],
            "additionalProperties": BOOLEAN,
            "maxProperties": 2,
        },
    )
    yield (
        "closed beside another's properties",
        {"allOf": [x, {"properties": {"a": {}, "b": NULL}, "additionalProperties": False}]},
    )
    yield (
        "closed against another's properties",
        {
            "allOf": [
                {"properties": {"b": DIGIT}},
                {"properties": {"a": DIGIT}, "additionalProperties": False},
            ],
            "type": "object",
        },
    )
    yield (
        "a closed reference and a sibling",
        {
            "$defs": {"x": {**x, "additionalProperties": False}},
            "$ref": "#/$defs/x",
            "properties": {"a": {"maximum": 3}},
        },
    )
    yield (
        "additional properties of two",
        {
            "type": "object",
            "allOf": [
                {"additionalProperties": {"minimum": 3}},
                {"additionalProperties": {"type": "integer", "maximum": 5}},
            ],
            "maxProperties": 2,
        },
    )
    yield "a type and another's enum", {"type": ["integer", "string"], "allOf": [choice(1, "a", None, 2.5)]}
    yield (
        "integers among numbers",
        {"type": "number", "allOf": [{"type": ["integer", "string"]}], "minimum": 0, "maximum": 20},
    )
    yield "an enum and a multiple", {"enum": [1, 2, 3, 4, 6, 9, 12], "multipleOf": 3}
    yield (
        "two multiples",
        {"type": "integer", "allOf": [{"multipleOf": 4}, {"multipleOf": 6}], "minimum": 1, "maximum": 100},
    )
    yield (
        "two patterns",
        {"type": "string", "pattern": "^[abc]+$", "allOf": [{"pattern": "^.b"}], "maxLength": 5},
    )
    yield "a format and a length", {"type": "string", "format": "email", "maxLength": 12}
    yield (
        "two formats",
        {"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]},
    )
    yield (
        "more items than the prefix",
        {"type": "array", "prefixItems": [NULL, BOOLEAN], "items": DIGIT, "minItems": 3, "maxItems": 4},
    )
    yield (
        "prefixes of two",
        {
            "type": "array",
            "allOf": [
                {"prefixItems": [DIGIT, {"minimum": 5}]},
                {"prefixItems": [{"minimum": 3}, DIGIT, BOOLEAN]},
            ],
            "maxItems": 3,
            "minItems": 2,
        },
    )
    yield (
        "anyOf of lengths and items",
        {
            "type": "array",
            "items": DIGIT,
            "anyOf": [{"maxItems": 1}, {"minItems": 3, "maxItems": 4, "items": {"minimum": 7}}],
        },
    )
    yield (
        "alternatives inside a closed object",
        {
            "type": "object",
            "properties": {"kind": choice("a", "b"), "x": DIGIT, "y": BOOLEAN},
            "required": ["kind"],
            "additionalProperties": False,
            "anyOf": [
                {"properties": {"kind": {"const": "a"}}, "required": ["x"]},
                {"properties": {"kind": {"const": "b"}, "x": False}, "required": ["y"]},
            ],
        },
    )
    yield (
        "a number or its text",
        {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"enum": ["0", "1"]}]},
    )
    yield "const within anyOf within const", {"const": 2, "anyOf": [{"minimum": 1}, {"type": "string"}]}
    yield (
        "required twice",
        {"allOf": [{"required": ["a"]}, {"required": ["b"]}], **closed({"a": DIGIT, "b": DIGIT}, "a b")},
    )
    yield (
        "null properties",
        closed({"a": {"const": None}, "b": {"type": "null"}, "c": {"enum": [None, 1]}}, "c"),
    )
    yield (
        "keywords of other types",
        {"type": "integer", "minimum": 3, "maximum": 4, "minLength": 5, "required": ["x"], "items": False},
    )
    yield (
        "no type but keywords",
        {
            "enum": ["ab", 5, [1], {"k": 1}, None],
            "minLength": 2,
            "minimum": 5,
            "minItems": 1,
            "required": ["k"],
        },
    )
    yield (
        "one of tagged references",
        {
            "$defs": {
                name: closed({"tag": {"const": name}, name: DIGIT}) for name in ("one", "two", "three")
            },
            "oneOf": [{"$ref": f"#/$defs/{name}"} for name in ("one", "two", "three")],
        },
    )
    yield (
        "one of, tagged from outside",
        {
            "type": "object",
            "properties": {"tag": {"type": "string"}, "v": DIGIT},
            "required": ["tag", "v"],
            "additionalProperties": False,
            "oneOf": [
                {"properties": {"tag": {"const": "low"}, "v": {"maximum": 4}}},
                {"properties": {"tag": {"const": "high"}, "v": {"minimum": 5}}},
            ],
        },
    )
    yield (
        "recursion through anyOf and arrays",
        {
            "$defs": {
                "v": {
                    "anyOf": [NULL, array({"$ref": "#/$defs/v"}, 0, 1), closed({"v": {"$ref": "#/$defs/v"}})]
                }
            },
            "$ref": "#/$defs/v",
        },
    )


def references() -> Named:
    yield "plain", {"$defs": {"d": DIGIT}, "$ref": "#/$defs/d"}
    yield (
        "twice",
        closed({"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}})
        | {"$defs": {"p": array(DIGIT, 2, 2)}},
    )
    yield (
        "a chain",
        {
            "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(8)} | {"d8": BOOLEAN},
            "$ref": "#/$defs/d0",
        },
    )
    yield "with siblings", {"$defs": {"n": INTEGER}, "$ref": "#/$defs/n", "minimum": 5, "maximum": 8}
    yield (
        "escaped",
        {
            "$defs": {"a/b": DIGIT, "c~d": BOOLEAN, "e f": NULL},
            **closed(
                {"x": {"$ref": "#/$defs/a~1b"}, "y": {"$ref": "#/$defs/c~0d"}, "z": {"$ref": "#/$defs/e%20f"}}
            ),
        },
    )
    yield "to a property", closed({"a": DIGIT, "b": {"$ref": "#/properties/a"}})
    yield "into an array", {"anyOf": [DIGIT, array({"$ref": "#/anyOf/0"}, 1, 2)]}
    yield "with $id", {"$id": "https://example.com/s", "$defs": {"d": DIGIT}, "$ref": "#/$defs/d"}
    node = closed({"value": DIGIT, "next": nullable({"$ref": "#/$defs/node"})})
    yield "a linked list", {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    tree = closed({"v": DIGIT, "kids": array({"$ref": "#"}, 0, 2)})
    yield "a tree", tree
    binary = closed({"v": DIGIT, "left": {"$ref": "#/$defs/b"}, "right": {"$ref": "#/$defs/b"}}, "left right")
    yield "a binary tree", {"$defs": {"b": binary}, "$ref": "#/$defs/b"}
    operands = {side: {"$ref": "#/$defs/e"} for side in ("left", "right")}
    yield (
        "expressions",
        {
            "$defs": {"e": {"anyOf": [DIGIT, closed({"op": choice("+", "*"), **operands})]}},
            "$ref": "#/$defs/e",
        },
    )
    yield (
        "nested lists",
        {"$defs": {"l": {"anyOf": [DIGIT, array({"$ref": "#/$defs/l"}, 0, 2)]}}, "$ref": "#/$defs/l"},
    )
    yield (
        "mutual",
        {
            "$defs": {
                "even": closed({"odd": nullable({"$ref": "#/$defs/odd"})}),
                "odd": closed({"even": nullable({"$ref": "#/$defs/even"})}),
            },
            "$ref": "#/$defs/even",
        },
    )
    yield "a directory", closed({"name": text(4), "entries": array({"$ref": "#"}, 0, 2)}, "entries")
    yield (
        "a comment thread",
        {
            "$defs": {
                "c": closed({"by": text(4), "text": text(9), "replies": array({"$ref": "#/$defs/c"}, 0, 2)})
            },
            "$ref": "#/$defs/c",
        },
    )
    yield "unused definitions", {"$defs": {"x": INTEGER, "y": {"$ref": "#/$defs/x"}}, **closed({"a": DIGIT})}


def nesting() -> Named:
    for depth in (2, 4, 8, 16):
        schema: Schema = DIGIT
        for level in range(depth):
            schema = closed({f"level_{level}": schema})
        yield f"objects, {depth}", schema
    for depth in (2, 5, 10):
        schema = BOOLEAN
        for _ in range(depth):
            schema = array(schema, 1, 1)
        yield f"arrays, {depth}", schema


def old_drafts() -> Named:
    yield (
        "definitions",
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"d": DIGIT},
            **closed({"a": {"$ref": "#/definitions/d"}}),
        },
    )
    yield (
        "exclusive booleans",
        {"type": "integer", "minimum": 1, "exclusiveMinimum": True, "maximum": 5, "exclusiveMaximum": False},
    )
    yield (
        "items as a list",
        {"type": "array", "items": [DIGIT, BOOLEAN], "additionalItems": False, "minItems": 2},
    )
    yield "additional items", {"type": "array", "items": [NULL], "additionalItems": DIGIT, "maxItems": 3}
    yield "id", {"id": "http://example.com/old", **closed({"a": NULL})}
    yield (
        "annotations",
        {
            "title": "Annotated",
            "description": "d",
            "$comment": "c",
            "examples": [1],
            "default": {},
            "readOnly": True,
            **closed({"a": {**DIGIT, "title": "A", "default": 1, "deprecated": True, "x-order": 1}}),
        },
    )


# --- handwritten: arguments of tools ------------------------------------------------------------------------------

CITY = text(12, description="City and country, such as Bogotá, Colombia")
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
DATE = {"type": "string", "format": "date"}
TIME = {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}
EMAIL = {"type": "string", "format": "email"}

TOOLS: dict[str, Schema] = {
    "get_weather": closed({"location": CITY, "unit": UNIT}, "unit"),
    "get_forecast": closed(
        {"location": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 14}, "hourly": BOOLEAN},
        "hourly",
    ),
    "search": closed(
        {
            "query": text(20, minLength=1),
            "limit": {"type": "integer", "minimum": 1, "maximum": 50},
            "safe": BOOLEAN,
        },
        "limit safe",
    ),
    "send_email": closed(
        {"to": array(text(12), 1, 2), "subject": text(16), "body": text(30), "cc": array(text(12), 0, 1)},
        "cc",
    ),
    "create_event": closed(
        {"title": text(12), "date": DATE, "start": TIME, "end": TIME, "guests": array(text(8), 0, 2)},
        "guests",
    ),
    "book_flight": closed(
        {
            "from": {"type": "string", "pattern": "^[A-Z]{3}$"},
            "to": {"type": "string", "pattern": "^[A-Z]{3}$"},
            "date": DATE,
            "class": choice("economy", "premium", "business", "first"),
            "passengers": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "class",
    ),
    "run_sql": closed(
        {
            "statement": text(40),
            "parameters": array(
                {"type": ["string", "number", "null"], "maxLength": 6, "minimum": 0, "maximum": 99}, 0, 2
            ),
            "read_only": {"const": True},
        }
    ),
    "read_file": closed(
        {
            "path": {"type": "string", "pattern": "^(/[a-z0-9._-]{1,10}){1,5}$"},
            "encoding": choice("utf-8", "latin-1"),
            "lines": array({"type": "integer", "minimum": 1, "maximum": 9999}, 2, 2),
        },
        "encoding lines",
    ),
    "edit_file": closed(
        {
            "path": text(12),
            "edits": array(closed({"find": text(8), "replace": text(8), "all": BOOLEAN}, "all"), 1, 2),
        }
    ),
    "http_request": closed(
        {
            "method": choice("GET", "POST", "PUT", "DELETE"),
            "url": {"type": "string", "pattern": "^https://[a-z]{1,10}\\.(com|org)(/[a-z]{0,6}){0,3}$"},
            "headers": {
                "type": "object",
                "propertyNames": {"pattern": "^[A-Z][a-z]{1,8}$"},
                "additionalProperties": text(6),
                "maxProperties": 2,
            },
            "timeout_s": {"type": "number", "minimum": 0.1, "maximum": 60},
        },
        "headers timeout_s",
    ),
    "calculator": closed({"expression": {"type": "string", "pattern": "^[0-9+*/() .-]{1,20}$"}}),
    "convert_currency": closed(
        {
            "amount": {"type": "number", "minimum": 0, "maximum": 1000000},
            "from": choice("EUR", "USD", "JPY"),
            "to": choice("EUR", "USD", "JPY"),
        }
    ),
    "translate": closed(
        {"text": text(30), "target": choice("de", "fr", "日本語", "한국어"), "formal": nullable(BOOLEAN)},
        "formal",
    ),
    "set_thermostat": closed(
        {"room": text(8), "temperature": {"type": "number", "minimum": 5, "maximum": 30, "multipleOf": 0.5}}
    ),
    "control_lights": closed(
        {
            "rooms": array(choice("kitchen", "hall", "bath"), 1, 3),
            "on": BOOLEAN,
            "brightness": {"type": "integer", "minimum": 0, "maximum": 100},
            "colour": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
        },
        "brightness colour",
    ),
    "play_music": closed(
        {"what": {"anyOf": [closed({"artist": text(8)}), closed({"playlist": text(8)})]}, "shuffle": BOOLEAN}
    ),
    "order_pizza": closed(
        {
            "size": choice("S", "M", "L"),
            "toppings": array(choice("ham", "olives", "extra cheese"), 0, 3),
            "notes": nullable(text(10)),
        }
    ),
    "transfer_money": closed(
        {
            "iban": {"type": "string", "pattern": "^DE[0-9]{20}$"},
            "cents": {"type": "integer", "exclusiveMinimum": 0, "maximum": 100000000},
            "reference": text(12),
        },
        "reference",
    ),
    "find_route": closed(
        {
            "stops": array(
                closed(
                    {
                        "lat": {"type": "number", "minimum": -90, "maximum": 90},
                        "lon": {"type": "number", "minimum": -180, "maximum": 180},
                    }
                ),
                2,
                3,
            ),
            "by": choice("car", "bike", "foot"),
        }
    ),
    "create_ticket": closed(
        {
            "title": text(20),
            "priority": {"type": "integer", "enum": [1, 2, 3]},
            "labels": array({"type": "string", "pattern": "^[a-z-]{1,8}$"}, 0, 3),
            "assignee": nullable(text(8)),
        },
        "assignee",
    ),
    "no arguments": closed({}),
    "free arguments": {"type": "object", "additionalProperties": text(4), "maxProperties": 2},
    "plot": closed(
        {
            "kind": choice("line", "bar"),
            "series": array(closed({"name": text(6), "y": array(DIGIT, 1, 4)}), 1, 2),
            "log": BOOLEAN,
        },
        "log",
    ),
    "several calls": array(
        {
            "anyOf": [
                closed({"name": {"const": name}, "parameters": closed({key: DIGIT})})
                for name, key in (("add", "x"), ("remove", "y"))
            ]
        },
        1,
        2,
    ),
    "vote": closed(
        {"choice": {"$ref": "#/$defs/choice"}, "second": nullable({"$ref": "#/$defs/choice"})},
        **{"$defs": {"choice": choice("yes", "no", "abstain")}},
    ),
}

# --- handwritten: configurations -----------------------------------------------------------------------------------

NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?$"}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
LABELS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^[a-z]{1,6}$"},
    "additionalProperties": text(5),
    "maxProperties": 2,
}

CONFIGURATIONS: dict[str, Schema] = {
    "deployment": closed(
        {
            "apiVersion": {"const": "apps/v1"},
            "kind": {"const": "Deployment"},
            "metadata": closed({"name": NAME, "labels": LABELS}, "labels"),
            "spec": closed(
                {
                    "replicas": {"type": "integer", "minimum": 0, "maximum": 99},
                    "containers": array(
                        closed({"name": NAME, "image": text(12), "ports": array(PORT, 0, 2)}, "ports"), 1, 2
                    ),
                }
            ),
        }
    ),
    "service": closed(
        {
            "services": {
                "type": "object",
                "patternProperties": {
                    "^[a-z]{1,6}$": closed({"image": text(8), "restart": choice("no", "always")}, "restart")
                },
                "additionalProperties": False,
                "maxProperties": 2,
                "minProperties": 1,
            }
        }
    ),
    "pipeline": closed(
        {
            "stages": array(choice("build", "test", "deploy"), 1, 3),
            "jobs": array(
                closed(
                    {
                        "name": NAME,
                        "stage": choice("build", "test"),
                        "script": array(text(10), 1, 2),
                        "allow_failure": BOOLEAN,
                    },
                    "allow_failure",
                ),
                1,
                2,
            ),
        }
    ),
    "package": closed(
        {
            "name": NAME,
            "version": {"type": "string", "pattern": r"^\d{1,2}\.\d{1,2}\.\d{1,2}$"},
            "private": BOOLEAN,
            "scripts": LABELS,
            "license": choice("MIT", "Apache-2.0", "UNLICENSED"),
        },
        "private scripts",
    ),
    "logging": closed(
        {
            "level": choice("debug", "info", "warning", "error"),
            "handlers": array(
                {
                    "oneOf": [
                        closed({"type": {"const": "file"}, "path": text(8)}),
                        closed({"type": {"const": "console"}, "colour": BOOLEAN}),
                    ]
                },
                1,
                2,
            ),
        }
    ),
    "feature flags": {
        "type": "object",
        "propertyNames": {"pattern": "^ff_[a-z]{1,5}$"},
        "additionalProperties": {
            "anyOf": [BOOLEAN, closed({"percent": {"type": "integer", "minimum": 0, "maximum": 100}})]
        },
        "maxProperties": 3,
    },
    "webhook": closed(
        {
            "url": {"type": "string", "format": "uri"},
            "events": array(choice("push", "tag", "merge"), 1, 3),
            "secret": nullable(text(16, minLength=8)),
            "active": {"type": "boolean", "default": True},
        },
        "active",
    ),
    "database": closed(
        {
            "host": {"type": "string", "format": "hostname"},
            "port": PORT,
            "pool": closed({"min": DIGIT, "max": {"type": "integer", "minimum": 10, "maximum": 99}}),
            "tls": BOOLEAN,
        },
        "tls",
    ),
    "cache": closed(
        {
            "backend": choice("memory", "redis"),
            "ttl_s": {"type": "integer", "minimum": 1, "maximum": 86400},
            "max_bytes": {"anyOf": [{"type": "integer", "minimum": 1}, {"const": "unlimited"}]},
        }
    ),
    "cron": closed(
        {
            "schedule": {"type": "string", "pattern": r"^([0-9*]{1,2} ){4}[0-9*]{1,2}$"},
            "command": text(12),
            "enabled": BOOLEAN,
        }
    ),
    "proxy": closed(
        {
            "listen": array(PORT, 1, 2),
            "upstreams": array(
                closed(
                    {
                        "address": {"type": "string", "format": "ipv4"},
                        "weight": {"type": "integer", "minimum": 1, "maximum": 100},
                    },
                    "weight",
                ),
                1,
                3,
            ),
            "headers": LABELS,
        },
        "headers",
    ),
    "editor": {
        "type": "object",
        "properties": {
            "editor.tabSize": DIGIT,
            "editor.rulers": array(DIGIT, 0, 2),
            "files.eol": choice("\n", "\r\n", "auto"),
            "[python]": closed({"editor.tabSize": {"const": 4}}),
        },
        "additionalProperties": False,
    },
    "lint": closed(
        {
            "rules": {
                "type": "object",
                "patternProperties": {
                    "^[a-z-]{1,8}$": {
                        "anyOf": [
                            choice("off", "warn", "error"),
                            {
                                "type": "array",
                                "prefixItems": [choice("warn", "error"), DIGIT],
                                "minItems": 1,
                                "items": False,
                            },
                        ]
                    }
                },
                "additionalProperties": False,
                "maxProperties": 2,
            },
            "root": BOOLEAN,
        },
        "root",
    ),
    "bucket": closed(
        {
            "bucket": NAME,
            "versioning": BOOLEAN,
            "rules": array(
                closed({"prefix": text(5), "days": {"type": "integer", "minimum": 1, "maximum": 3650}}), 0, 2
            ),
            "tags": LABELS,
        },
        "tags rules",
    ),
    "policy": closed(
        {
            "Version": {"const": "2012-10-17"},
            "Statement": array(
                closed(
                    {
                        "Effect": choice("Allow", "Deny"),
                        "Action": {"anyOf": [text(8), array(text(8), 1, 2)]},
                        "Resource": text(8),
                    }
                ),
                1,
                2,
            ),
        }
    ),
    "dashboard": closed(
        {
            "title": text(10),
            "refresh": {"type": "string", "pattern": "^[1-9][0-9]?[smh]$"},
            "panels": array(
                closed(
                    {
                        "id": DIGIT,
                        "type": choice("graph", "table"),
                        "grid": closed(dict.fromkeys("xywh", DIGIT)),
                    }
                ),
                1,
                2,
            ),
        }
    ),
    "model": closed(
        {
            "model": text(8),
            "temperature": {"type": "number", "minimum": 0, "maximum": 2},
            "top_p": {"type": "number", "minimum": 0.01, "maximum": 1},
            "stop": {"anyOf": [text(4), array(text(4), 1, 2), NULL]},
        },
        "top_p stop",
    ),
    "theme": closed(
        {
            "colours": {
                "type": "object",
                "properties": {
                    name: {"type": "string", "pattern": "^#[0-9a-f]{6}$"} for name in ("text", "link", "back")
                },
                "required": ["text"],
                "additionalProperties": False,
            },
            "dark": BOOLEAN,
            "font": closed({"family": text(8), "size_px": {"type": "number", "minimum": 6, "maximum": 72}}),
        }
    ),
    "alert": closed(
        {
            "when": closed(
                {"metric": text(8), "operator": choice("<", "<=", ">", ">="), "threshold": NUMBER}
            ),
            "for": {"type": "string", "pattern": "^[0-9]{1,3}[smh]$"},
            "notify": array(EMAIL, 1, 1),
        }
    ),
    "route": closed(
        {
            "match": {
                "oneOf": [
                    closed({"path": text(6)}),
                    closed({"prefix": text(6)}),
                    closed({"header": closed({"name": text(5), "value": text(5)})}),
                ]
            },
            "to": NAME,
            "retries": DIGIT,
        },
        "retries",
    ),
    "matrix": closed(
        {
            "os": array(choice("linux", "mac", "windows"), 1, 3),
            "python": array({"type": "string", "pattern": r"^3\.1[0-4]$"}, 1, 4),
            "exclude": array({"type": "object", "additionalProperties": text(5), "maxProperties": 2}, 0, 1),
        },
        "exclude",
    ),
    "translation": {
        "type": "object",
        "properties": {"de": text(6), "fr": text(6)},
        "required": ["de"],
        "patternProperties": {"^[a-z]{2}-[A-Z]{2}$": text(6)},
        "additionalProperties": False,
    },
    "migration": closed(
        {
            "id": {"type": "integer", "minimum": 20200101, "maximum": 20301231},
            "up": array(
                {
                    "anyOf": [
                        closed({"add": text(5)}),
                        closed({"drop": text(5)}),
                        closed({"rename": closed({"from": text(5), "to": text(5)})}),
                    ]
                },
                1,
                3,
            ),
        }
    ),
    "schedule": closed(
        {day: array(closed({"from": TIME, "to": TIME}), 0, 1) for day in ("mon", "tue", "wed", "thu", "fri")},
        "wed thu fri",
    ),
    "schema": {
        "$defs": {
            "s": {
                "anyOf": [
                    BOOLEAN,
                    closed(
                        {
                            "type": choice("integer", "string", "object"),
                            "properties": {
                                "type": "object",
                                "additionalProperties": {"$ref": "#/$defs/s"},
                                "maxProperties": 1,
                            },
                        },
                        "properties",
                    ),
                ]
            }
        },
        "$ref": "#/$defs/s",
    },
}

# --- handwritten: what is read from a text, as pydantic writes it ---------------------------------------------------

EXTRACTIONS: dict[str, Schema] = {
    "person": {
        "title": "Person",
        "type": "object",
        "properties": {
            "name": {"title": "Name", "type": "string", "maxLength": 12},
            "age": {
                "anyOf": [{"type": "integer", "minimum": 0, "maximum": 130}, {"type": "null"}],
                "default": None,
                "title": "Age",
            },
        },
        "required": ["name"],
        "additionalProperties": False,
    },
    "order": {
        "$defs": {
            "Line": closed(
                {
                    "sku": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                    "count": {"type": "integer", "exclusiveMinimum": 0, "maximum": 99},
                }
            )
        },
        **closed({"lines": array({"$ref": "#/$defs/Line"}, 1, 2), "paid": BOOLEAN}),
    },
    "invoice": closed(
        {
            "number": {"type": "string", "pattern": "^RE-[0-9]{4}-[0-9]{1,5}$"},
            "date": DATE,
            "total": {"type": "number", "minimum": 0, "maximum": 99999, "multipleOf": 0.01},
            "currency": choice("EUR", "CHF"),
            "items": array(
                closed({"text": text(10), "net": {"type": "number", "minimum": 0, "maximum": 999}}), 1, 2
            ),
        }
    ),
    "sentiment": closed(
        {
            "sentiment": choice("positive", "neutral", "negative"),
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
            "quote": nullable(text(15)),
        }
    ),
    "chain of thought": closed(
        {
            "steps": array(closed({"explanation": text(20), "output": text(10)}), 1, 3),
            "final_answer": text(10),
        }
    ),
    "entities": closed(
        {
            "entities": array(
                closed(
                    {
                        "text": text(8),
                        "label": choice("PER", "ORG", "LOC", "MISC"),
                        "start": {"type": "integer", "minimum": 0, "maximum": 999},
                        "end": {"type": "integer", "minimum": 0, "maximum": 999},
                    }
                ),
                0,
                3,
            )
        }
    ),
    "recipe": closed(
        {
            "title": text(12),
            "minutes": {"type": "integer", "minimum": 1, "maximum": 600},
            "ingredients": array(
                closed(
                    {
                        "name": text(8),
                        "amount": {"type": "number", "minimum": 0, "maximum": 5000},
                        "unit": choice("g", "ml", "½ tsp", "pc"),
                    }
                ),
                1,
                3,
            ),
            "vegan": BOOLEAN,
        }
    ),
    "address": closed(
        {
            "street": text(12),
            "number": {"type": "string", "pattern": "^[0-9]{1,4}[a-z]?$"},
            "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            "city": text(10),
            "country": {"type": "string", "enum": ["DE", "AT", "CH"]},
        }
    ),
    "quiz": closed(
        {
            "question": text(25),
            "options": array(text(8), 4, 4),
            "answer": {"type": "integer", "minimum": 0, "maximum": 3},
        }
    ),
    "résumé": closed(
        {
            "naïve_name": text(8),
            "compétences": array(choice("Python", "C++", "日本語"), 1, 3),
            "expérience": array(closed({"société": text(6), "années": DIGIT}), 0, 2),
        }
    ),
    "animals": {
        "$defs": {
            "Cat": closed({"kind": {"const": "cat"}, "lives": DIGIT}),
            "Dog": closed({"kind": {"const": "dog"}, "good": {"const": True}}),
        },
        **closed(
            {
                "pets": array(
                    {
                        "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                        "discriminator": {"propertyName": "kind"},
                    },
                    1,
                    3,
                )
            }
        ),
    },
    "game state": closed(
        {
            "board": array(array(choice("", "X", "O"), 3, 3), 3, 3),
            "turn": choice("X", "O"),
            "winner": nullable(choice("X", "O", "draw")),
        }
    ),
    "graph": closed(
        {
            "nodes": array(closed({"id": DIGIT}), 1, 3),
            "edges": array(
                {
                    "type": "array",
                    "prefixItems": [DIGIT, DIGIT, nullable(text(3))],
                    "minItems": 2,
                    "maxItems": 3,
                },
                0,
                3,
            ),
        }
    ),
    "code review": closed(
        {
            "verdict": choice("approve", "request_changes"),
            "comments": array(
                closed(
                    {
                        "file": text(8),
                        "line": {"type": "integer", "minimum": 1, "maximum": 9999},
                        "severity": {"type": "integer", "enum": [1, 2, 3]},
                        "text": text(15),
                    }
                ),
                0,
                2,
            ),
        }
    ),
    "weather report": closed(
        {
            "at": {"type": "string", "format": "date-time"},
            "celsius": {"type": "number", "minimum": -90, "maximum": 60},
            "wind": closed(
                {
                    "degrees": {"type": "integer", "minimum": 0, "exclusiveMaximum": 360},
                    "m/s": {"type": "number", "minimum": 0, "maximum": 120},
                }
            ),
            "😀": BOOLEAN,
        },
        "😀",
    ),
    "bibliography": array(
        closed(
            {
                "title": text(14),
                "authors": array(text(8), 1, 2),
                "year": {"type": "integer", "minimum": 1450, "maximum": 2100},
                "doi": nullable({"type": "string", "pattern": r"^10\.[0-9]{4}/[a-z0-9.]{1,8}$"}),
            }
        ),
        1,
        2,
    ),
    "settings with defaults": {
        "type": "object",
        "properties": {
            "retries": {"type": "integer", "default": 3, "minimum": 0, "maximum": 9},
            "mode": {"default": "fast", "enum": ["fast", "safe"]},
            "ratio": {"default": 0.5, "type": "number", "minimum": 0, "maximum": 1},
        },
        "additionalProperties": False,
    },
    "a tuple of models": {
        "type": "array",
        "prefixItems": [closed({"a": DIGIT}), closed({"b": text(3)})],
        "minItems": 2,
        "maxItems": 2,
    },
    "a mapping of models": {
        "type": "object",
        "additionalProperties": closed({"x": DIGIT, "y": DIGIT}),
        "propertyNames": {"pattern": "^p[0-9]$"},
        "maxProperties": 2,
    },
    "literal unions": closed(
        {
            "size": {
                "anyOf": [
                    {"const": "auto"},
                    {"type": "integer", "minimum": 1, "maximum": 100},
                    closed({"w": DIGIT, "h": DIGIT}),
                ]
            }
        }
    ),
}


def open_ended() -> Named:
    """Nothing bounds these: a model must find their end itself."""
    yield "any value", {}
    yield "any object", {"type": "object"}
    yield "a text", {"type": "string"}
    yield "an array of numbers", {"type": "array", "items": NUMBER}
    yield (
        "open properties",
        {"type": "object", "properties": {"name": {"type": "string"}, "age": INTEGER}, "required": ["name"]},
    )
    yield (
        "a person as pydantic has it",
        {
            "properties": {
                "name": {"title": "Name", "type": "string"},
                "age": {"title": "Age", "type": "integer"},
            },
            "required": ["name", "age"],
            "title": "Person",
            "type": "object",
        },
    )


FAMILIES: dict[str, Callable[[], Named]] = {
    "type": types,
    "enum": enums,
    "integer": integers,
    "number": numbers,
    "length": lengths,
    "pattern": patterns,
    "format": formats,
    "array": arrays,
    "object": objects,
    "key": keys,
    "anyOf": any_of,
    "oneOf": one_of,
    "allOf": all_of,
    "combination": combinations,
    "$ref": references,
    "nesting": nesting,
    "old draft": old_drafts,
    "tool": lambda: iter(TOOLS.items()),
    "configuration": lambda: iter(CONFIGURATIONS.items()),
    "extraction": lambda: iter(EXTRACTIONS.items()),
    "open": open_ended,
}
SCHEMAS: dict[str, Schema] = {
    f"{family}/{name}": schema for family, generate in FAMILIES.items() for name, schema in generate()
}

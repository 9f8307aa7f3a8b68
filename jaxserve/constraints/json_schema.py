"""JSON schemas: which keywords are enforced, which are refused, and one normal form for all backends.

What is enforced here is enforced exactly; a keyword that changes what is valid and is not enforced is refused with its
name and path. Everything else (titles, descriptions, keywords nobody knows) says nothing about validity, by
definition, and is left out. The normal form is 2020-12 without identifiers: every `$ref` points into the root's
`$defs`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from jaxserve.constraints.constraint import ConstraintError, TooComplexError
from jaxserve.constraints.disjoint import Schema, one_of_to_any_of
from jaxserve.constraints.property_counts import count_properties
from jaxserve.constraints.regex import translate_regex

MAX_DEPTH = 64
MAX_MEMBERS = 10_000  # of all enums, and what is in them
MAX_PROPERTIES = 4_096
MAX_OPTIONAL_PROPERTIES = 400  # of one object: each may be the next one at every point
MAX_COUNT = 65_536  # minItems, maxLength and the like: libraries count them, so that they cost nothing
MAX_DIVISOR = 10_000

LARGEST_INTEGERS = (2**63 - 1, 2**64 - 1)  # as maximum they mean that there is none
JSON_OBJECT: dict[str, Any] = {"type": "object"}
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
# formats that libraries know less well than a calendar does, as whole-string patterns
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = f"(?:{_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
PATTERN_OF_FORMAT = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
MAX_HOSTNAME_LENGTH = 253  # RFC 1123 counts the dots; libraries know only how long a label may be
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "uri")
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems")
# keywords that change what is valid and are not enforced, with the values that change nothing
REFUSED: dict[str, tuple[object, ...]] = {
    "not": (),
    "if": (),
    "then": (),
    "else": (),
    "uniqueItems": (False,),
    "contains": (),
    "minContains": (),
    "maxContains": (),
    "unevaluatedItems": (True,),
    "unevaluatedProperties": (True,),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "$dynamicRef": (),
    "$recursiveRef": (),
}


def parse_schema(text: str) -> Schema:
    """A schema from its JSON text.

    Raises:
        ConstraintError: it is no JSON, or neither an object nor a boolean.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise ConstraintError("The schema is no valid JSON.") from None
    if not isinstance(schema, bool | dict):
        raise ConstraintError("The schema must be a JSON object.")
    return schema


def normalize_schema(schema: Schema, *, additional_properties: bool = True) -> dict[str, Any]:
    """The schema in its normal form.

    Args:
        additional_properties: False: objects whose schema does not speak of additional properties have none.

    Raises:
        ConstraintError: malformed, contradictory, or with a keyword that is not enforced; the message has its path.
        TooComplexError: it hits a limit.
    """
    return _Normalizer(schema, additional_properties).run()


class _Normalizer:
    """Reads one schema."""

    def __init__(self, root: Schema, additional_properties: bool) -> None:
        self._root = root
        self._additional_properties = additional_properties
        self._names: dict[str, str] = {}  # JSON pointer → name in $defs
        self._definitions: dict[str, Schema] = {}
        self._num_members = 0
        self._num_properties = 0

    def run(self) -> dict[str, Any]:
        root = self._schema(self._root, "", 0)
        waiting = list(self._names)
        done: set[str] = set()
        while waiting:
            pointer = waiting.pop()
            done.add(pointer)
            self._definitions[self._names[pointer]] = self._schema(self._resolve(pointer), pointer, 0)
            waiting += [other for other in self._names if other not in done and other not in waiting]
        definitions = {n: one_of_to_any_of(s, self._definitions) for n, s in self._definitions.items()}
        return _finite(one_of_to_any_of(root, self._definitions), definitions)

    # --- one schema -----------------------------------------------------------------------------------------

    def _schema(self, schema: object, path: str, depth: int) -> Schema:
        if depth > MAX_DEPTH:
            raise TooComplexError(f"The schema is nested deeper than {MAX_DEPTH}.")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise _malformed(path, "a schema is an object or a boolean")
        self._check_refused(schema, path)
        result: dict[str, Any] = {}
        for keyword, value in schema.items():
            at = f"{path}/{_escaped(keyword)}"
            if keyword == "$ref":
                result["$ref"] = self._reference(value, at)
            elif keyword == "type":
                result["type"] = _types(value, at)
            elif keyword in ("enum", "const"):
                result[keyword] = self._values(keyword, value, at)
            elif keyword in LISTS_OF_SCHEMAS:
                result[keyword] = self._schemas(value, at, depth) + result.get(keyword, [])
            elif keyword in NUMBERS and not isinstance(value, bool):
                result[keyword] = _number(keyword, value, at)
            elif keyword in COUNTS:
                result[keyword] = _count(value, at)
            elif keyword == "pattern":
                result["pattern"] = _pattern(value, at)
            elif keyword == "format":
                self._format(result, value, at)
        self._exclusive_limits(schema, result, path)
        self._array(schema, result, path, depth)
        self._object(schema, result, path, depth)
        if result.get("enum") == []:
            raise _contradiction(f"{path}/enum", "it is empty")
        return result

    def _check_refused(self, schema: dict[str, Any], path: str) -> None:
        for keyword, neutral in REFUSED.items():
            if keyword in schema and not any(_same(schema[keyword], value) for value in neutral):
                raise ConstraintError(f"The keyword {keyword} is not supported (at #{path}/{keyword}).")
        if path and "$id" in schema:
            raise ConstraintError(f"The keyword $id is only supported at the root (at #{path}/$id).")

    def _reference(self, value: object, at: str) -> str:
        if not isinstance(value, str):
            raise _malformed(at, "must be a string")
        pointer = value[1:]
        if not value.startswith("#") or (pointer and not pointer.startswith("/")):
            raise ConstraintError(
                f"$ref must point into the schema itself (#/…), got {value[:100]!r} (at #{at})."
            )
        if pointer not in self._names:
            self._resolve(pointer)
            self._names[pointer] = f"d{len(self._names)}"
        return f"#/$defs/{self._names[pointer]}"

    def _resolve(self, pointer: str) -> Any:
        target: Any = self._root
        for part in pointer.split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and part in target:
                target = target[part]
            elif isinstance(target, list) and part.isdecimal() and int(part[:9]) < len(target):
                target = target[int(part[:9])]
            else:
                raise ConstraintError(f"$ref points to #{pointer[:100]}, which is not there.")
        return target

    def _values(self, keyword: str, value: object, at: str) -> Any:
        if keyword == "enum" and not isinstance(value, list):
            raise _malformed(at, "must be an array")
        self._num_members += sum(1 for _ in _all_values(value))
        if self._num_members > MAX_MEMBERS:
            raise TooComplexError(f"The schema's enum and const hold more than {MAX_MEMBERS:,} values.")
        return value

    def _schemas(self, value: object, at: str, depth: int) -> list[Schema]:
        if not isinstance(value, list) or not value:
            raise _malformed(at, "must be a non-empty array")
        if len(value) > MAX_MEMBERS:
            raise TooComplexError(f"An array of schemas has more than {MAX_MEMBERS:,} members (at #{at}).")
        return [self._schema(member, f"{at}/{i}", depth + 1) for i, member in enumerate(value)]

    @staticmethod
    def _format(result: dict[str, Any], value: object, at: str) -> None:
        if not isinstance(value, str):
            raise _malformed(at, "must be a string")
        if value not in FORMATS:
            known = ", ".join(FORMATS)
            raise ConstraintError(
                f"The format {value[:50]!r} is not supported, only {known} are (at #{at[-200:]})."
            )
        if value in PATTERN_OF_FORMAT:
            result.setdefault("allOf", []).append({"pattern": PATTERN_OF_FORMAT[value]})
        else:
            result["format"] = value
        if value == "hostname":
            result.setdefault("allOf", []).append({"maxLength": MAX_HOSTNAME_LENGTH})

    @staticmethod
    def _exclusive_limits(schema: dict[str, Any], result: dict[str, Any], path: str) -> None:
        """Draft 4 has `exclusiveMinimum: true` beside `minimum`."""
        for keyword, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            value = schema.get(keyword)
            if value is True:
                if limit not in result:
                    raise _malformed(f"{path}/{keyword}", f"true needs {limit}")
                result[keyword] = result.pop(limit)

    def _array(self, schema: dict[str, Any], result: dict[str, Any], path: str, depth: int) -> None:
        items = schema.get("items")
        if isinstance(items, list):  # as draft 7 spells prefixItems
            if items:
                result["prefixItems"] = self._schemas(items, f"{path}/items", depth)
            if "additionalItems" in schema:
                result["items"] = self._schema(
                    schema["additionalItems"], f"{path}/additionalItems", depth + 1
                )
        elif "items" in schema:
            result["items"] = self._schema(items, f"{path}/items", depth + 1)

    # --- objects --------------------------------------------------------------------------------------------

    def _object(self, schema: dict[str, Any], result: dict[str, Any], path: str, depth: int) -> None:
        for keyword in ("properties", "patternProperties"):
            if keyword in schema:
                result[keyword] = self._members(keyword, schema[keyword], f"{path}/{keyword}", depth)
        if "required" in schema:
            result["required"] = _required(schema["required"], f"{path}/required")
        if "additionalProperties" in schema:
            at = f"{path}/additionalProperties"
            result["additionalProperties"] = self._schema(schema["additionalProperties"], at, depth + 1)
        elif not self._additional_properties and _speaks_of_objects(result):
            result["additionalProperties"] = False
        if "propertyNames" in schema:
            self._property_names(schema["propertyNames"], result, f"{path}/propertyNames")
        optional = result.get("properties", {}).keys() - set(result.get("required", ()))
        if len(optional) > MAX_OPTIONAL_PROPERTIES:
            limit = f"{len(optional):,} optional properties, at most {MAX_OPTIONAL_PROPERTIES} are supported"
            raise TooComplexError(f"An object has {limit} (at #{path}/properties).")
        count_properties(result, path)
        _check_bounds(result, path)

    def _members(self, keyword: str, value: object, at: str, depth: int) -> dict[str, Schema]:
        if not isinstance(value, dict):
            raise _malformed(at, "must be an object")
        self._num_properties += len(value)
        if self._num_properties > MAX_PROPERTIES:
            raise TooComplexError(f"The schema has more than {MAX_PROPERTIES:,} properties.")
        patterns = keyword == "patternProperties"
        return {
            _pattern(name, at) if patterns else name: self._schema(
                member, f"{at}/{_escaped(name)}", depth + 1
            )
            for name, member in value.items()
        }

    def _property_names(self, names: object, result: dict[str, Any], at: str) -> None:
        """Turn `propertyNames` into properties or a pattern, where that is the same."""
        while isinstance(names, dict) and names.keys() - ANNOTATIONS == {"$ref"}:
            self._reference(names["$ref"], f"{at}/$ref")
            seen = names["$ref"]
            names = self._resolve(str(seen)[1:])
            if isinstance(names, dict) and names.get("$ref") == seen:
                break
        keywords = {} if names is True else names
        if not isinstance(keywords, dict):
            raise ConstraintError(
                f"The keyword propertyNames is only supported with enum or pattern (at #{at})."
            )
        rules = {k: v for k, v in keywords.items() if k in ENFORCED and not (k == "type" and v == "string")}
        if not rules:
            return
        additional = result.get("additionalProperties", True)
        if rules.keys() <= {"minLength", "maxLength"}:
            low = _count(rules.get("minLength", 0), f"{at}/minLength")
            high = _count(rules["maxLength"], f"{at}/maxLength") if "maxLength" in rules else ""
            rules = {"pattern": f"^(?s:.){{{low},{high}}}$"}
        if (
            "patternProperties" in result
            or len(rules) > 1
            or not rules.keys() <= {"enum", "const", "pattern"}
        ):
            what = "enum, const, pattern and a length"
            raise ConstraintError(
                f"The keyword propertyNames is only supported with one of {what} (at #{at})."
            )
        properties = result.get("properties", {})
        if "pattern" in rules:
            pattern = _pattern(rules["pattern"], f"{at}/pattern")
            allowed = {name for name in properties if re.search(rules["pattern"], name)}
            result["patternProperties"] = {pattern: additional}
        else:
            allowed = {str(name) for name in rules.get("enum", [rules.get("const")]) if isinstance(name, str)}
            properties = properties | {n: additional for n in sorted(allowed) if n not in properties}
        result["properties"] = {n: s if n in allowed else False for n, s in properties.items()}
        result["additionalProperties"] = False


# --- values of keywords -------------------------------------------------------------------------------------

ENFORCED = frozenset(
    {
        *("$ref", "type", "enum", "const", "pattern", "format", "items", "additionalItems", "properties"),
        *("patternProperties", "required", "additionalProperties", "propertyNames"),
        *NUMBERS,
        *COUNTS,
        *LISTS_OF_SCHEMAS,
    }
)
ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$comment", "deprecated"})


def _malformed(path: str, what: str) -> ConstraintError:
    return ConstraintError(f"The schema is malformed: {what} (at #{path[-200:]}).")


def _contradiction(path: str, what: str) -> ConstraintError:
    return ConstraintError(f"The schema is contradictory: {what} (at #{path[-200:]}).")


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")[:64]


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other


def _all_values(value: object) -> Iterator[object]:
    stack = [value]
    while stack:
        item = stack.pop()
        yield item
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _types(value: object, at: str) -> list[str]:
    types = value if isinstance(value, list) else [value]
    if not types or not all(isinstance(name, str) and name in TYPES for name in types):
        raise _malformed(at, f"must be one or several of {', '.join(TYPES)}")
    return list(dict.fromkeys(types))


def _number(keyword: str, value: object, at: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _malformed(at, "must be a number")
    if keyword == "multipleOf":
        if value <= 0:
            raise _malformed(at, "must be greater than 0")
        if value > MAX_DIVISOR:
            raise TooComplexError(f"multipleOf may be at most {MAX_DIVISOR:,}, got {value:g} (at #{at}).")
    return value


def _count(value: object, at: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _malformed(at, "must be an integer of at least 0")
    if value > MAX_COUNT:
        raise TooComplexError(f"It may be at most {MAX_COUNT:,}, got {str(value)[:20]} (at #{at}).")
    return value


def _pattern(value: object, at: str) -> str:
    if not isinstance(value, str):
        raise _malformed(at, "must be a string")
    try:
        return translate_regex(value, searched=True)
    except ConstraintError as error:
        raise type(error)(f"{str(error).rstrip('.')} (at #{at[-200:]}).") from None


def _required(value: object, at: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _malformed(at, "must be an array of strings")
    if len(value) > MAX_PROPERTIES:
        raise TooComplexError(f"required may have at most {MAX_PROPERTIES:,} members (at #{at}).")
    return list(dict.fromkeys(value))


def _speaks_of_objects(schema: dict[str, Any]) -> bool:
    return "properties" in schema or "patternProperties" in schema or schema.get("type") == ["object"]


def _check_bounds(schema: dict[str, Any], path: str) -> None:
    """Bounds are kept as doubles: those that would become others are refused."""
    for keyword in NUMBERS:
        value = schema.get(keyword, 0)
        if isinstance(value, int) and value not in LARGEST_INTEGERS and int(float(value)) != value:
            what = f"{keyword} is beyond what is exact, {value} would become {int(float(value))}"
            raise ConstraintError(f"The bound cannot be enforced: {what} (at #{path}/{keyword}).")


# --- what is finite -----------------------------------------------------------------------------------------


def _finite(root: Schema, definitions: dict[str, Schema]) -> dict[str, Any]:
    """The schema without the branches that no finite value can satisfy: nothing can lead into endless nesting.

    Raises:
        ConstraintError: nothing at all satisfies the schema.
    """
    finite: set[str] = set()
    while found := {n for n, s in definitions.items() if n not in finite and _has_value(s, finite)}:
        finite |= found
    if not _has_value(root, finite):
        raise _contradiction("", "no finite value is valid")
    pruned = _pruned(root, finite)
    kept = {name: _pruned(schema, finite) for name, schema in definitions.items() if name in finite}
    result: dict[str, Any] = (
        {} if pruned is True else dict(pruned) if isinstance(pruned, dict) else {"enum": []}
    )
    return {**result, "$defs": kept} if kept else result


def _has_value(schema: Schema, finite: set[str]) -> bool:
    """Whether some finite value may satisfy the schema, if just these definitions have one."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in finite:
        return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and not any(_has_value(member, finite) for member in schema[keyword]):
            return False
    if not all(_has_value(member, finite) for member in schema.get("allOf", ())):
        return False
    types = set(schema.get("type", TYPES))
    if "enum" in schema or "const" in schema or types - {"array", "object"}:
        return True
    return ("array" in types and _has_array(schema, finite)) or (
        "object" in types and _has_object(schema, finite)
    )


def _has_array(schema: dict[str, Any], finite: set[str]) -> bool:
    needed = schema.get("minItems", 0)
    first = schema.get("prefixItems", [])
    rest = needed <= len(first) or _has_value(schema.get("items", True), finite)
    return rest and all(_has_value(member, finite) for member in first[:needed])


def _has_object(schema: dict[str, Any], finite: set[str]) -> bool:
    properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    additional = schema.get("additionalProperties", True)
    return all(
        _has_value(properties[name], finite)
        if name in properties
        else bool(patterns) or _has_value(additional, finite)
        for name in schema.get("required", ())
    )


def _pruned(schema: Schema, finite: set[str]) -> Schema:
    """With `false` for every schema inside that nothing finite satisfies."""
    if isinstance(schema, bool):
        return schema
    if not _has_value(schema, finite):
        return False
    result: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in ("anyOf", "oneOf"):
            result[keyword] = [s for s in (_pruned(member, finite) for member in value) if s is not False]
        elif keyword in LISTS_OF_SCHEMAS:
            result[keyword] = [_pruned(member, finite) for member in value]
        elif keyword in ("properties", "patternProperties"):
            result[keyword] = {name: _pruned(member, finite) for name, member in value.items()}
        elif keyword in ("items", "additionalProperties"):
            result[keyword] = _pruned(value, finite)
        else:
            result[keyword] = value
    return result

"""`oneOf` whose branches exclude one another is `anyOf`, which libraries can enforce: a proof, where there is one.

Branches exclude one another by their types, their values (`const`, `enum`), their bounds and lengths, or by a property
that both have to have: the usual tag of a union. Where nothing is found, nothing is said; the branches may be disjoint
all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

Schema = bool | dict[str, Any]

MAX_BRANCHES = 200  # unless all of them list their values
MAX_COMPARISONS = 20_000  # in one schema, those of properties included
MAX_DEPTH = 8
KINDS = frozenset({"null", "boolean", "number", "string", "array", "object"})
LOWER = {"minLength": "string", "minItems": "array", "minProperties": "object"}
UPPER = {"maxLength": "string", "maxItems": "array", "maxProperties": "object"}


def one_of_to_any_of(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The schema, in normal form, with `anyOf` for every `oneOf` whose branches exclude one another.

    Args:
        definitions: what `#/$defs/…` points to.
    """
    rewritten: Schema = _Rewriter(definitions).rewrite(schema)
    return rewritten


@dataclass
class _Facts:
    """What is known of the values that satisfy several schemas at once.

    Attributes:
        values: JSON values as hashable keys; None: not listed.
        low, high: by kind, bounds of the number or of the length.
        open_low, open_high: whether the number's bound itself is excluded.
        properties: what each property has to satisfy.
        only: names of the only properties that there may be; None: any.
        alternatives: groups of schemas of which one, too, has to be satisfied.
    """

    kinds: frozenset[str] = KINDS
    values: frozenset[object] | None = None
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    open_low: bool = False
    open_high: bool = False
    required: set[str] = field(default_factory=set)
    properties: dict[str, list[Schema]] = field(default_factory=dict)
    only: set[str] | None = None
    alternatives: list[list[Schema]] = field(default_factory=list)


class _Rewriter:
    """Goes through one schema; the comparisons it may make are counted."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self._definitions = definitions
        self._num_comparisons = 0

    def rewrite(self, schema: Any) -> Any:
        """Any part of a schema in normal form."""
        if isinstance(schema, list):
            return [self.rewrite(member) for member in schema]
        if not isinstance(schema, dict):
            return schema
        result: dict[str, Any] = {}
        for keyword, value in schema.items():
            if keyword in ("properties", "patternProperties", "$defs"):
                result[keyword] = {name: self.rewrite(member) for name, member in value.items()}
            else:
                result[keyword] = value if keyword in ("enum", "const") else self.rewrite(value)
        if "oneOf" in result and self._exclude_one_another(result):
            branches = result.pop("oneOf")
            if "anyOf" in result:
                result["allOf"] = [*result.get("allOf", []), {"anyOf": branches}]
            else:
                result["anyOf"] = branches
        return result

    def _exclude_one_another(self, schema: dict[str, Any]) -> bool:
        siblings = {keyword: value for keyword, value in schema.items() if keyword != "oneOf"}
        branches = schema["oneOf"]
        listed = [self._facts([branch]).values for branch in branches]
        known = [values for values in listed if values is not None]
        if len(known) == len(branches):
            return len(frozenset().union(*known)) == sum(map(len, known))
        return len(branches) <= MAX_BRANCHES and all(
            self._disjoint([siblings, one], [siblings, other], 0) for one, other in combinations(branches, 2)
        )

    def _disjoint(self, one: list[Schema], other: list[Schema], depth: int) -> bool:
        """Whether no value satisfies all schemas of both lists."""
        self._num_comparisons += 1
        if self._num_comparisons > MAX_COMPARISONS or depth > MAX_DEPTH:
            return False
        ours, theirs = self._facts(one), self._facts(other)
        if ours.values is not None and theirs.values is not None and not ours.values & theirs.values:
            return True
        if all(self._disjoint_in(kind, ours, theirs, depth) for kind in ours.kinds & theirs.kinds):
            return True
        return any(
            all(
                self._disjoint([_without_choices(s) for s in mine] + [member], yours, depth + 1)
                for member in group
            )
            for mine, yours, facts in ((one, other, ours), (other, one, theirs))
            for group in facts.alternatives
        )

    def _disjoint_in(self, kind: str, one: _Facts, other: _Facts, depth: int) -> bool:
        """Whether no value of this kind satisfies both."""
        if _apart(kind, one, other) or _apart(kind, other, one):
            return True
        if kind != "object":
            return False
        if any(a.only is not None and b.required - a.only for a, b in ((one, other), (other, one))):
            return True
        names = one.required & other.required & one.properties.keys() & other.properties.keys()
        return any(self._disjoint(one.properties[n], other.properties[n], depth + 1) for n in sorted(names))

    def _facts(self, schemas: list[Schema]) -> _Facts:
        facts, waiting, seen = _Facts(), list(schemas), set()
        while waiting:
            schema = waiting.pop()
            if schema is False:
                facts.kinds = frozenset()
            if isinstance(schema, bool):
                continue
            _add_facts(schema, facts)
            waiting += schema.get("allOf", ())
            reference = str(schema.get("$ref", "")).removeprefix("#/$defs/")
            if reference in self._definitions and reference not in seen:
                seen.add(reference)
                waiting.append(self._definitions[reference])
        return facts


def _add_facts(schema: dict[str, Any], facts: _Facts) -> None:
    if "type" in schema:
        facts.kinds &= {"number" if name == "integer" else name for name in schema["type"]}
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if listed is not None:
        values = frozenset(map(_key, listed))
        facts.values = values if facts.values is None else facts.values & values
        facts.kinds &= {_kind(value) for value in listed}
    _add_limits(schema, facts)
    facts.required |= set(schema.get("required", ()))
    for name, member in schema.get("properties", {}).items():
        facts.properties.setdefault(name, []).append(member)
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        names = {name for name, member in schema.get("properties", {}).items() if member is not False}
        facts.only = names if facts.only is None else facts.only & names
    facts.alternatives += [schema[keyword] for keyword in ("anyOf", "oneOf") if keyword in schema]


def _add_limits(schema: dict[str, Any], facts: _Facts) -> None:
    for keyword, kind in LOWER.items():
        facts.low[kind] = max(facts.low.get(kind, -math.inf), schema.get(keyword, -math.inf))
    for keyword, kind in UPPER.items():
        facts.high[kind] = min(facts.high.get(kind, math.inf), schema.get(keyword, math.inf))
    for keyword in ("minimum", "exclusiveMinimum"):
        value, known = schema.get(keyword, -math.inf), facts.low.get("number", -math.inf)
        if keyword in schema and value >= known:
            facts.open_low = keyword != "minimum" or (facts.open_low and value == known)
            facts.low["number"] = value
    for keyword in ("maximum", "exclusiveMaximum"):
        value, known = schema.get(keyword, math.inf), facts.high.get("number", math.inf)
        if keyword in schema and value <= known:
            facts.open_high = keyword != "maximum" or (facts.open_high and value == known)
            facts.high["number"] = value


def _apart(kind: str, below: _Facts, above: _Facts) -> bool:
    """Whether everything of the one is smaller or shorter than everything of the other."""
    high, low = below.high.get(kind, math.inf), above.low.get(kind, -math.inf)
    is_open = kind == "number" and (below.open_high or above.open_low)
    return high < low or (high == low and is_open)


def _without_choices(schema: Schema) -> Schema:
    if isinstance(schema, bool):
        return schema
    return {keyword: value for keyword, value in schema.items() if keyword not in ("anyOf", "oneOf")}


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    kinds: dict[type, str] = {int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def _key(value: object) -> object:
    """Hashable, and equal for values that JSON schema calls equal: 1 and 1.0, but not 1 and true."""
    if isinstance(value, list):
        return ("array", *map(_key, value))
    if isinstance(value, dict):
        return ("object", frozenset((name, _key(member)) for name, member in value.items()))
    return (_kind(value), value)

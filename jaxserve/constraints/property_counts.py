"""`minProperties` and `maxProperties` beside optional properties, as alternatives that say which of them are there.

Libraries count properties only where all that are named are required. What the alternatives say is exact, and they are
few where bounds are what they mostly are: at least one, at most one, all but one.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from jaxserve.constraints.constraint import ConstraintError, TooComplexError

MAX_ALTERNATIVES = 500
BOUNDS = ("minProperties", "maxProperties")


def count_properties(schema: dict[str, Any], path: str) -> None:
    """Replace the bounds of a schema in normal form by alternatives, where that is needed.

    Args:
        path: JSON pointer, for messages.

    Raises:
        ConstraintError: the bounds contradict each other, or additional properties would have to be counted.
        TooComplexError: there would be too many alternatives.
    """
    if not any(key in schema for key in BOUNDS):
        return
    required = schema.get("required", [])
    optional = [n for n, s in schema.get("properties", {}).items() if n not in required and s is not False]
    low = max(0, schema.get("minProperties", 0) - len(required))
    high = schema.get("maxProperties", math.inf) - len(required)
    is_open = schema.get("additionalProperties", True) is not False or bool(schema.get("patternProperties"))
    if high < low or (not is_open and low > len(optional)):
        raise ConstraintError(
            f"The schema is contradictory: no object has that many properties (at #{path[-200:]})."
        )
    if is_open and low > 1:  # a grammar cannot tell whether an additional name is a repetition
        what = "minProperties is only supported up to the number of required properties and one more"
        raise ConstraintError(f"{what}, or without additional properties (at #{path[-200:]}/minProperties).")
    if not optional:
        return
    alternatives = _open(schema, optional, low, high) if is_open else _closed(optional, low, high)
    if alternatives is None:
        limit = f"more than {MAX_ALTERNATIVES} combinations of {len(optional)} optional properties"
        raise TooComplexError(f"minProperties and maxProperties allow {limit} (at #{path[-200:]}).")
    schema.pop("minProperties", None)
    schema.pop("maxProperties", None)
    if alternatives == [{}]:
        return
    if "anyOf" in schema:
        schema["allOf"] = [*schema.get("allOf", []), {"anyOf": alternatives}]
    else:
        schema["anyOf"] = alternatives


def _closed(optional: list[str], low: int, high: float) -> list[dict[str, Any]] | None:
    """Nothing else can be there."""
    count = len(optional)
    if high >= count:  # the first `low` that are there decide
        if math.comb(count, low) > MAX_ALTERNATIVES:
            return None
        return [_first(optional, chosen) for chosen in combinations(optional, low)]
    if low == 0:  # all others are not there
        if math.comb(count, int(high)) > MAX_ALTERNATIVES:
            return None
        return [_exactly(optional, chosen, ()) for chosen in combinations(optional, int(high))]
    return _subsets(optional, low, int(high))


def _open(schema: dict[str, Any], optional: list[str], low: int, high: float) -> list[dict[str, Any]] | None:
    """Additional properties count, too, and the library counts those once the others are decided."""
    bounds: dict[str, Any] = {key: schema[key] for key in BOUNDS if key in schema}
    if high >= math.inf:
        if low == 0:
            return [{}]
        some = [_first(optional, (name,)) for name in optional]
        return [*some, {**_exactly(optional, (), ()), **bounds}]
    subsets = _subsets(optional, 0, int(min(high, len(optional))))
    return subsets and [{**subset, **bounds} for subset in subsets]


def _subsets(optional: list[str], low: int, high: int) -> list[dict[str, Any]] | None:
    """Each choice of `low` to `high` of them by itself."""
    counts = range(low, high + 1)
    if sum(math.comb(len(optional), count) for count in counts) > MAX_ALTERNATIVES:
        return None
    return [
        _exactly(optional, chosen, chosen) for count in counts for chosen in combinations(optional, count)
    ]


def _exactly(optional: list[str], allowed: tuple[str, ...], required: tuple[str, ...]) -> dict[str, Any]:
    """Those that are not allowed are not there."""
    return _alternative([name for name in optional if name not in allowed], required)


def _first(optional: list[str], chosen: tuple[str, ...]) -> dict[str, Any]:
    """These are there, and no other before the last of them."""
    before = optional[: optional.index(chosen[-1])] if chosen else []
    return _alternative([name for name in before if name not in chosen], chosen)


def _alternative(absent: list[str], required: tuple[str, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if required:
        result["required"] = list(required)
    if absent:
        result["properties"] = dict.fromkeys(absent, False)
    return result

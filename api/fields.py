"""Field tables: what a JSON body may hold, declared once.

A `Table` lists the `Field`s of one JSON object; a field has a `Kind`, which knows its JSON type and range.
A body is read in two passes, in the order in which the API reports faults:

1. `Table.convert`: unknown and missing fields, JSON types. The result is a `Values`, defaults filled in.
2. `Table.check`: ranges, lengths, and what this server does not serve.

Both raise `RequestError` with the field's path. Nothing here is slow on hostile input: sizes are checked
before members, and no message copies more than a hundred characters of a value.
"""

# ruff: noqa: ARG002  (every kind's `convert` takes the same arguments)

from __future__ import annotations

import difflib
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxserve.errors import RequestError

MAX_SHOWN_CHARS = 100
MAX_IGNORED_FIELDS = 64
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_DOUBLE = sys.float_info.max
JsonSchema = dict[str, Any]
LIST = "an array"
SAME = object()  # null means the same as absence


class Values(dict[str, Any]):
    """A converted JSON object: every field of its table, defaults filled in.

    Attributes:
        given: names that the body holds with a value other than null, in the table's order.
    """

    def __init__(self, values: Mapping[str, Any], given: tuple[str, ...] = ()) -> None:
        super().__init__(values)
        self.given = given

    def as_sent(self) -> dict[str, Any]:
        """Only what the client gave, nested objects likewise."""
        return {name: _as_sent(self[name]) for name in self.given}


def _as_sent(value: object) -> Any:
    if isinstance(value, Values):
        return value.as_sent()
    if isinstance(value, list):
        return [_as_sent(member) for member in value]
    return value


@dataclass
class UnknownFields:
    """What to do with fields that no table knows: refuse the request, or drop them and note their paths."""

    ignore: bool = False
    ignored: list[str] = field(default_factory=list)

    def handle(self, name: str, at: str, known: Iterable[str]) -> None:
        path = join(at, name)
        if self.ignore:
            if len(self.ignored) < MAX_IGNORED_FIELDS:
                self.ignored.append(path)
            return
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75) if len(name) <= 64 else []
        hint = f" Did you mean {close[0]!r}?" if close else ""
        where = f" in {at}" if at else ""
        raise RequestError(f"Unknown field {shown(name)}{where}.{hint}", param=path, code="unknown_parameter")


def join(at: str, name: str) -> str:
    """Path of the member `name` of the object at `at`; long names are cut."""
    name = name if len(name) <= MAX_SHOWN_CHARS else name[:MAX_SHOWN_CHARS]
    return f"{at}.{name}" if at else name


def shown(value: object) -> str:
    """A value as an error message shows it: strings quoted, all bounded to about a hundred characters."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            text = repr(value[:MAX_SHOWN_CHARS])
            return text if len(text) <= MAX_SHOWN_CHARS + 2 else f"{text[:MAX_SHOWN_CHARS]}…{text[0]}"
        case int() if value.bit_length() > 256:
            return f"an integer of {value.bit_length()} bits"
        case int() | float():
            return str(value)
        case list() | tuple():
            return f"an array of {len(value)}"
        case _:
            return "an object"


def json_type(value: object) -> str:
    """The JSON type of a parsed value, in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list() | tuple():
            return LIST
        case _:
            return "an object"


def wrong_type(at: str, expected: str, value: object) -> RequestError:
    scalar = isinstance(value, bool | int | float | str)
    got = f"{json_type(value)} ({shown(value)})" if scalar else json_type(value)
    return RequestError(
        f"{at or 'The body'} must be {expected}, got {got}.", param=at or None, code="invalid_type"
    )


def wrong_value(at: str, allowed: str, value: object, *, code: str = "invalid_value") -> RequestError:
    return RequestError(f"{at} must be {allowed}, got {shown(value)}.", param=at, code=code)


def missing(at: str) -> RequestError:
    return RequestError(f"{at} is required.", param=at, code="missing_required_parameter")


class Kind(ABC):
    """What JSON value a field takes. Null never arrives here: it means absent."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """The JSON type in words: "an integer", "a string or an array of strings"."""

    @abstractmethod
    def convert(self, value: Any, at: str, unknown: UnknownFields) -> Any:
        """The value in Python's terms.

        Raises:
            RequestError: wrong type (`invalid_type`), or an unknown or missing member of an object.
        """

    def check(self, value: Any, at: str) -> None:  # noqa: B027  (a kind without a range checks nothing)
        """Raise `RequestError` if the converted value is out of range."""

    @abstractmethod
    def json_schema(self) -> JsonSchema:
        """What `convert` and `check` let pass, as JSON Schema 2020-12."""


@dataclass(frozen=True)
class Boolean(Kind):
    expected = "a boolean"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> bool:
        if value is True or value is False:
            return bool(value)
        raise wrong_type(at, self.expected, value)

    def json_schema(self) -> JsonSchema:
        return {"type": "boolean"}


def as_integer(value: Any) -> int | None:
    """The value as an int, also when it is written `5.0`; None if it is no integer."""
    if type(value) is int:
        return value
    if type(value) is float and value.is_integer():
        return int(value)
    return None


@dataclass(frozen=True, kw_only=True)
class Integer(Kind):
    minimum: int = INT64_MIN
    maximum: int = INT64_MAX
    also: tuple[int, ...] = ()  # values outside the range that mean something special
    expected = "an integer"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> int:
        number = as_integer(value)
        if number is None:
            raise wrong_type(at, self.expected, value)
        return number

    def check(self, value: int, at: str) -> None:
        if not self.minimum <= value <= self.maximum and value not in self.also:
            raise wrong_value(at, self.range, value)

    @property
    def range(self) -> str:
        if self.maximum >= INT64_MAX:
            text = (
                "a 64-bit integer" if self.minimum <= INT64_MIN else f"an integer of at least {self.minimum}"
            )
        else:
            text = f"an integer between {self.minimum} and {self.maximum}"
        return text + "".join(f", or {special}" for special in self.also)

    def json_schema(self) -> JsonSchema:
        within: JsonSchema = {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}
        return {"anyOf": [within, {"enum": list(self.also)}]} if self.also else within


@dataclass(frozen=True, kw_only=True)
class Number(Kind):
    minimum: float
    maximum: float = float("inf")
    above_minimum: bool = False  # the minimum itself is refused
    expected = "a number"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> int | float:
        if type(value) is not int and type(value) is not float:
            raise wrong_type(at, self.expected, value)
        return value

    def check(self, value: int | float, at: str) -> None:
        above = value > self.minimum if self.above_minimum else value >= self.minimum
        if not (above and value <= self.maximum and abs(value) <= MAX_DOUBLE):
            raise wrong_value(at, self.range, value)
        refuse_huge_integers(value, at)

    @property
    def range(self) -> str:
        unbounded = self.maximum == float("inf")
        if self.minimum == float("-inf"):
            return "a finite number"
        if self.above_minimum:
            return f"greater than {self.minimum:g}" + ("" if unbounded else f" and at most {self.maximum:g}")
        return f"at least {self.minimum:g}" if unbounded else f"between {self.minimum:g} and {self.maximum:g}"

    def json_schema(self) -> JsonSchema:
        lower = "exclusiveMinimum" if self.above_minimum else "minimum"
        bounds = {lower: max(self.minimum, -MAX_DOUBLE), "maximum": min(self.maximum, MAX_DOUBLE)}
        return {"type": "number"} | bounds


@dataclass(frozen=True, kw_only=True)
class String(Kind):
    min_length: int = 0
    max_length: int | None = None
    pattern: re.Pattern[str] | None = None
    pattern_hint: str = ""
    expected = "a string"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> str:
        if not isinstance(value, str):
            raise wrong_type(at, self.expected, value)
        return value

    def check(self, value: str, at: str) -> None:
        if len(value) < self.min_length or (self.max_length is not None and len(value) > self.max_length):
            raise RequestError(f"{at} must be {self.range}, got {len(value)} characters.", param=field_of(at))
        if self.pattern is not None and not self.pattern.fullmatch(value):
            raise wrong_value(at, self.pattern_hint, value)

    @property
    def range(self) -> str:
        if self.max_length is None:
            return f"a string of at least {self.min_length} characters" if self.min_length else "a string"
        return f"a string of {self.min_length} to {self.max_length} characters"

    def json_schema(self) -> JsonSchema:
        schema: JsonSchema = {"type": "string"} | _bounds("Length", self.min_length, self.max_length)
        return schema if self.pattern is None else schema | {"pattern": f"^(?:{self.pattern.pattern})$"}


@dataclass(frozen=True)
class Enum(Kind):
    """One of a few strings."""

    choices: tuple[str, ...]
    code: Literal["invalid_value", "unsupported_value"] = "invalid_value"
    expected = "a string"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> str:
        if not isinstance(value, str):
            raise wrong_type(at, self.expected, value)
        return value

    def check(self, value: str, at: str) -> None:
        if value not in self.choices:
            raise wrong_value(at, one_of(self.choices), value, code=self.code)

    def json_schema(self) -> JsonSchema:
        return {"type": "string", "enum": list(self.choices)}


def one_of(choices: Sequence[str]) -> str:
    quoted = [f"'{choice}'" for choice in choices]
    return quoted[0] if len(quoted) == 1 else f"one of {', '.join(quoted)}"


def field_of(at: str) -> str:
    """The field that a path to a member of a plain list belongs to: `stop[3]` → `stop`."""
    return at[: at.rindex("[")] if at.endswith("]") else at


@dataclass(frozen=True, kw_only=True)
class Strings(Kind):
    """A list of strings. A fault in a member is a fault of the field; the message says which member."""

    min_items: int = 0
    max_items: int | None = None
    member: String = String()
    distinct: bool = False
    expected = "an array of strings"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> list[str]:
        if not isinstance(value, list):
            raise wrong_type(at, self.expected, value)
        for i, member in enumerate(value):
            if not isinstance(member, str):
                raise wrong_member(at, i, "a string", member)
        return value

    def check(self, value: list[str], at: str) -> None:
        check_length(at, len(value), self.min_items, self.max_items, "strings")
        for i, member in enumerate(value):
            self.member.check(member, f"{at}[{i}]")
        if self.distinct and len(set(value)) < len(value):
            raise RequestError(f"{at} must hold distinct strings.", param=at)

    def json_schema(self) -> JsonSchema:
        schema = array_schema(self.member.json_schema(), self.min_items, self.max_items)
        return schema | {"uniqueItems": True} if self.distinct else schema


@dataclass(frozen=True, kw_only=True)
class TokenIds(Kind):
    """A list of token ids in [0, V)."""

    vocab_size: int
    min_items: int = 0
    max_items: int | None = None
    expected = "an array of token ids (integers)"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> list[int]:
        if not isinstance(value, list):
            raise wrong_type(at, self.expected, value)
        return to_integers(value, at)

    def check(self, value: list[int], at: str) -> None:
        check_length(at, len(value), self.min_items, self.max_items, "token ids")
        check_token_ids(value, at, self.vocab_size)

    def json_schema(self) -> JsonSchema:
        return array_schema(token_id_schema(self.vocab_size), self.min_items, self.max_items)


def to_integers(values: list[Any], at: str) -> list[int]:
    if all(type(value) is int for value in values):
        return values
    integers = []
    for i, value in enumerate(values):
        integer = as_integer(value)
        if integer is None:
            raise wrong_member(at, i, "an integer", value)
        integers.append(integer)
    return integers


def check_token_ids(values: list[int], at: str, vocab_size: int) -> None:
    """Raise unless all are ids of the vocabulary; the message names the id and V."""
    if not values or (min(values) >= 0 and max(values) < vocab_size):
        return
    outside = next(value for value in values if not 0 <= value < vocab_size)
    message = (
        f"{at} holds the token id {shown(outside)}, which is not in the vocabulary: "
        f"ids are 0 to {vocab_size - 1} (vocabulary size {vocab_size})."
    )
    raise RequestError(message, param=field_of(at))


def wrong_member(at: str, index: int, expected: str, value: object) -> RequestError:
    error = wrong_type(f"{at}[{index}]", expected, value)
    error.param = field_of(at)
    return error


def token_id_schema(vocab_size: int) -> JsonSchema:
    return {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}


def array_schema(members: JsonSchema, minimum: int = 0, maximum: int | None = None) -> JsonSchema:
    """Of an array of `minimum` to `maximum` members."""
    return {"type": "array", "items": members} | _bounds("Items", minimum, maximum)


def _bounds(of: str, minimum: int, maximum: int | None) -> JsonSchema:
    """`minItems`, `maxLength` and the like, as far as they say anything."""
    bounds = {f"min{of}": minimum or None, f"max{of}": maximum}
    return {name: bound for name, bound in bounds.items() if bound is not None}


def check_length(at: str, length: int, minimum: int, maximum: int | None, members: str) -> None:
    if maximum is not None and length > maximum:
        raise RequestError(f"{at} may hold at most {maximum:,} {members}, got {length:,}.", param=at)
    if length < minimum:
        raise RequestError(f"{at} must hold at least {minimum:,} {members}, got {length:,}.", param=at)


@dataclass(frozen=True, kw_only=True)
class Array(Kind):
    """A list whose members are objects or of other kinds with paths of their own (`messages[0]`)."""

    member: Kind
    min_items: int = 0
    max_items: int | None = None
    members: str = "members"

    @property
    def expected(self) -> str:
        return LIST

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> list[Any]:
        if not isinstance(value, list):
            raise wrong_type(at, self.expected, value)
        return [self.member.convert(member, f"{at}[{i}]", unknown) for i, member in enumerate(value)]

    def check(self, value: list[Any], at: str) -> None:
        check_length(at, len(value), self.min_items, self.max_items, self.members)
        for i, member in enumerate(value):
            self.member.check(member, f"{at}[{i}]")

    def json_schema(self) -> JsonSchema:
        return array_schema(self.member.json_schema(), self.min_items, self.max_items)


@dataclass(frozen=True, kw_only=True)
class StringMap(Kind):
    """An object with free keys and string values."""

    max_items: int | None = None
    expected = "an object with string values"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> dict[str, str]:
        if not isinstance(value, dict):
            raise wrong_type(at, self.expected, value)
        for key, member in value.items():
            if not isinstance(member, str):
                raise wrong_type(join(at, key), "a string", member)
        return value

    def check(self, value: dict[str, str], at: str) -> None:
        check_length(at, len(value), 0, self.max_items, "pairs")

    def json_schema(self) -> JsonSchema:
        strings = {"type": "object", "additionalProperties": {"type": "string"}}
        return strings | _bounds("Properties", 0, self.max_items)


@dataclass(frozen=True, kw_only=True)
class FreeObject(Kind):
    """An object of any content, such as a JSON schema. Integers of more than 64 bits are refused in it."""

    reserved: frozenset[str] = frozenset()  # keys that are taken; so is every key that begins with "_"
    expected = "an object"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(at, self.expected, value)
        refuse_huge_integers(value, at)
        return value

    def check(self, value: dict[str, Any], at: str) -> None:
        for key in value if self.reserved else ():
            if key in self.reserved or key.startswith("_"):
                path = join(at, key)
                raise RequestError(f"{path} is reserved and cannot be set.", param=path)

    def json_schema(self) -> JsonSchema:
        if not self.reserved:
            return {"type": "object"}
        taken = [{"enum": sorted(self.reserved)}, {"pattern": "^_"}]
        return {"type": "object", "propertyNames": {"not": {"anyOf": taken}}}


@dataclass(frozen=True)
class Anything(Kind):
    """Any JSON value: of fields that are refused whatever their value."""

    expected = "any value"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> Any:
        return value

    def json_schema(self) -> JsonSchema:
        return {}


def refuse_huge_integers(value: Any, at: str) -> None:
    """JSON integers of more than 64 bits are refused where no range does it."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif type(item) is int and not INT64_MIN <= item <= 2 * INT64_MAX + 1:
            message = f"{at} holds {shown(item)}, an integer of more than 64 bits."
            raise RequestError(message, param=at, code="invalid_json")


@dataclass(frozen=True)
class ByType(Kind):
    """Different kinds for different JSON types: a string or a list of strings."""

    kinds: Mapping[type, Kind]

    @property
    def expected(self) -> str:
        return " or ".join(kind.expected for kind in self.kinds.values())

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> Any:
        kind = self.kinds.get(type(value))
        if kind is None:
            raise wrong_type(at, self.expected, value)
        return kind.convert(value, at, unknown)

    def check(self, value: Any, at: str) -> None:
        json_class = dict if isinstance(value, Values) else type(value)
        self.kinds[json_class].check(value, at)

    def json_schema(self) -> JsonSchema:
        return {"anyOf": [kind.json_schema() for kind in self.kinds.values()]}


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a known field is not served, and the values that are fine all the same: they ask for nothing."""

    because: str
    neutral: tuple[object, ...] = ()
    code: Literal["unsupported_parameter", "unsupported_value"] = "unsupported_parameter"

    def check(self, value: object, at: str) -> None:
        if not any(type(value) is type(fine) and value == fine for fine in self.neutral):
            raise RequestError(f"{at} {self.because}", param=at, code=self.code)


def never(reason: str, *neutral: object) -> Refusal:
    return Refusal(because=reason, neutral=neutral)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One member of a JSON object.

    Attributes:
        default: what absence means (and null).
        null: what null means, where that is not what absence means.
        required: absence (and null) is an error.
        refusal: set if the field is known but not served.
    """

    name: str
    kind: Kind
    default: Any = None
    null: Any = SAME
    required: bool = False
    refusal: Refusal | None = None

    @property
    def is_served(self) -> bool:
        """Whether some value other than null is accepted."""
        return self.refusal is None or bool(self.refusal.neutral)

    def json_schema(self) -> JsonSchema:
        """Of the member's value, null included."""
        accepted = self.kind.json_schema()
        if self.refusal is not None:
            values = self.refusal.neutral
            accepted = {"enum": [value for i, value in enumerate(values) if value not in values[:i]]}
        schema = accepted if self.required else {"anyOf": [accepted, {"type": "null"}]}
        if self.default is not None:
            schema["default"] = list(self.default) if isinstance(self.default, tuple) else self.default
        return schema


@dataclass(frozen=True)
class Table(Kind):
    """A JSON object with the given fields and no others; `texts` explain them to people, by name."""

    fields: tuple[Field, ...]
    texts: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    by_name: Mapping[str, Field] = field(init=False, repr=False, compare=False)
    _places: Mapping[str, int] = field(init=False, repr=False, compare=False)
    _defaults: Mapping[str, Any] = field(init=False, repr=False, compare=False)
    _required: frozenset[str] = field(init=False, repr=False, compare=False)
    expected = "an object"

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {entry.name: entry for entry in self.fields})
        object.__setattr__(self, "_places", {entry.name: i for i, entry in enumerate(self.fields)})
        object.__setattr__(self, "_defaults", {entry.name: entry.default for entry in self.fields})
        object.__setattr__(self, "_required", frozenset(e.name for e in self.fields if e.required))

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> Values:
        if not isinstance(value, dict):
            raise wrong_type(at, self.expected, value)
        for name in value:
            if name not in self.by_name:
                unknown.handle(name, at, self.by_name)
        values = Values(self._defaults)
        given = []
        for entry in self._in_order(self._required.union(value)):
            sent = value.get(entry.name)
            if sent is not None:
                values[entry.name] = entry.kind.convert(sent, join(at, entry.name), unknown)
                given.append(entry.name)
            elif entry.required:
                raise missing(join(at, entry.name))
            elif entry.null is not SAME:
                values[entry.name] = entry.null
        values.given = tuple(given)
        return values

    def _in_order(self, names: Iterable[str]) -> list[Field]:
        """The fields of these names in the table's order, which decides what fault is reported first."""
        places = self._places
        return [self.fields[place] for place in sorted([places[name] for name in names if name in places])]

    def check(self, value: Values, at: str) -> None:
        for name in value.given:
            entry = self.by_name[name]
            path = join(at, entry.name)
            entry.kind.check(value[entry.name], path)
            if entry.refusal is not None:
                entry.refusal.check(value[entry.name], path)

    def json_schema(self) -> JsonSchema:
        """Without the fields that are known but not served."""
        served = [entry for entry in self.fields if entry.is_served]
        return {
            "type": "object",
            "properties": {
                entry.name: entry.json_schema() | {"description": self.texts[entry.name]} for entry in served
            },
            "required": [entry.name for entry in served if entry.required],
            "additionalProperties": False,
        }


@dataclass(frozen=True)
class Tagged(Kind):
    """Objects told apart by their `type`; types that no table knows are refused without looking further."""

    tables: Mapping[str, Table]
    code: Literal["invalid_value", "unsupported_value"] = "invalid_value"
    expected = "an object"

    def convert(self, value: Any, at: str, unknown: UnknownFields) -> Values:
        if not isinstance(value, dict):
            raise wrong_type(at, self.expected, value)
        tag = value.get("type")
        if tag is None:
            raise missing(join(at, "type"))
        if not isinstance(tag, str):
            raise wrong_type(join(at, "type"), "a string", tag)
        table = self.tables.get(tag)
        return Values({"type": tag}, ("type",)) if table is None else table.convert(value, at, unknown)

    def check(self, value: Values, at: str) -> None:
        table = self.tables.get(value["type"])
        if table is None:
            raise wrong_value(join(at, "type"), one_of(tuple(self.tables)), value["type"], code=self.code)
        table.check(value, at)

    def json_schema(self) -> JsonSchema:
        return {"oneOf": [self._member_schema(tag, table) for tag, table in self.tables.items()]}

    @staticmethod
    def _member_schema(tag: str, table: Table) -> JsonSchema:
        schema = table.json_schema()
        schema["properties"]["type"] |= {"const": tag}
        return schema

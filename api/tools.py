"""Which functions a conversation's answer may or must call, and what that asks of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxserve.api.constraints import Asked, RequestConstraint, schema_text
from jaxserve.api.fields import Values
from jaxserve.api.tool_calls import (
    CallArrayParser,
    FirstCallOnly,
    NamedCallParser,
    ToolCallParser,
    auto_parser,
)
from jaxserve.config import ToolCallParserName
from jaxserve.constraints.constraint import Constraint
from jaxserve.errors import RequestError

Mode = Literal["none", "auto", "required", "named"]
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "additionalProperties": False}
# keywords that may say of themselves what type a value has
SPEAK_OF_TYPES = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
# keywords whose values are no schemas, and those whose members are
VALUES = ("const", "enum", "default", "examples", "required")
MAPS = ("properties", "patternProperties", "$defs", "definitions")


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What a request says about functions.

    Attributes:
        names: of the functions that may be called.
        parallel: whether an answer may hold several calls.
        schemas: all functions' parameters as one constraint, which is enforced on nothing: what it refuses, and what
            no arguments could satisfy, is refused whatever is called.
        asked: what is enforced on the text; None: nothing is.
        parser: finds calls in free text; None: there are none.
    """

    mode: Mode
    names: tuple[str, ...]
    parallel: bool
    schemas: RequestConstraint
    asked: Asked | None = None
    parser: ToolCallParserName | None = None

    def new_parser(self) -> ToolCallParser | None:
        """What turns one choice's text into content and calls; None: all of it is content."""
        match self.mode:
            case "none":
                return None
            case "named":
                return NamedCallParser(self.names[0])
            case "required":
                return CallArrayParser(self.names)
        if self.parser is None:
            return None
        parser = auto_parser(self.parser, self.names)
        return parser if self.parallel else FirstCallOnly(parser)


def tool_use(values: Values, auto: ToolCallParserName | None) -> ToolUse | None:
    """What the body says about functions; None if it has none.

    Args:
        auto: the parser for free text; None: the server finds no calls in free text.

    Raises:
        RequestError: a choice without tools, of tools that are not there, or that the server does not offer.
    """
    tools, choice = values["tools"], values["tool_choice"]
    if tools is None:
        if choice not in (None, "none"):
            raise RequestError("tool_choice needs tools.", param="tool_choice")
        return None
    all_names = [tool["function"]["name"] for tool in tools]
    mode, names = _chosen(choice, all_names)
    if mode == "auto" and auto is None:
        message = 'tool_choice "auto" (the default with tools) needs a server that was started with '
        message += (
            '--enable-auto-tool-choice and --tool-call-parser: choose "none", "required" or a function.'
        )
        raise RequestError(message, param="tool_choice")
    schemas = [_parameters(tool["function"]["parameters"], i) for i, tool in enumerate(tools)]
    parallel = bool(values["parallel_tool_calls"])
    chosen = [i for i, name in enumerate(all_names) if name in names]
    asked: Asked | None = None
    if mode == "required":
        asked = _calls(tools, schemas, chosen, parallel=parallel)
    elif mode == "named":
        (index,) = chosen
        asked = Asked("tool_choice", parameters_path(index), "json_schema", schema_text(schemas[index]))
    return ToolUse(
        mode=mode,
        names=tuple(all_names[i] for i in chosen),
        parallel=parallel,
        schemas=_all_of(schemas),
        asked=asked,
        parser=auto if mode == "auto" else None,
    )


def check_distinct_names(tools: Sequence[Values]) -> None:
    """Raise `RequestError` if two functions have the same name."""
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool["function"]["name"]
        if name in seen:
            param = f"tools[{i}].function.name"
            raise RequestError(f"{param} must be distinct, got {name!r} twice.", param=param)
        seen.add(name)


def parameters_path(index: int) -> str:
    return f"tools[{index}].function.parameters"


def _chosen(choice: str | Values | None, names: Sequence[str]) -> tuple[Mode, set[str]]:
    """The mode, and the functions that may be called."""
    if choice is None or choice == "auto":
        return "auto", set(names)
    if isinstance(choice, str):
        return ("none", set()) if choice == "none" else ("required", set(names))
    if choice["type"] == "function":
        name = choice["function"]["name"]
        _check_known(name, "tool_choice.function.name", names)
        return "named", {name}
    allowed = choice["allowed_tools"]
    members = [tool["function"]["name"] for tool in allowed["tools"]]
    for i, name in enumerate(members):
        _check_known(name, f"tool_choice.allowed_tools.tools[{i}].function.name", names)
    return ("auto" if allowed["mode"] == "auto" else "required"), set(members)


def _check_known(name: str, param: str, names: Sequence[str]) -> None:
    if name not in names:
        known = ", ".join(names)
        known = known if len(known) <= 200 else f"{known[:200]}…"
        raise RequestError(f"{param} must be one of tools ({known}), got {name[:100]!r}.", param=param)


def _parameters(schema: dict[str, Any] | None, index: int) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object."""
    if schema is None:
        return NO_ARGUMENTS
    types = schema.get("type")
    if types is None:
        return schema if any(key in schema for key in SPEAK_OF_TYPES) else {**schema, "type": "object"}
    if types == "object" or (isinstance(types, list) and "object" in types):
        return {**schema, "type": "object"}
    param = parameters_path(index)
    message = f'{param}.type must be "object": arguments are an object.'
    raise RequestError(message, param=param, code="invalid_constraint")


def _calls(
    tools: Sequence[Values], schemas: Sequence[dict[str, Any]], chosen: Sequence[int], *, parallel: bool
) -> Asked:
    """One or more calls as a JSON array."""
    members = []
    for place, i in enumerate(chosen):
        at = f"#/items/anyOf/{place}/properties/parameters"
        call = {"name": {"const": tools[i]["function"]["name"]}, "parameters": moved(schemas[i], at)}
        members.append(
            {
                "type": "object",
                "properties": call,
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    array: dict[str, Any] = {"type": "array", "items": {"anyOf": members}, "minItems": 1}
    if not parallel:
        array["maxItems"] = 1
    return Asked("tool_choice", "tools", "json_schema", schema_text(array))


def _all_of(schemas: Sequence[dict[str, Any]]) -> RequestConstraint:
    """An object with a value of each."""
    members = {str(i): moved(schema, f"#/properties/{i}") for i, schema in enumerate(schemas)}
    every = {"type": "object", "properties": members, "required": list(members)}
    parts = tuple(
        (parameters_path(i), Constraint(kind="json_schema", text=schema_text(schema)))
        for i, schema in enumerate(schemas)
    )
    constraint = Constraint(kind="json_schema", text=schema_text(every))
    return RequestConstraint(constraint=constraint, param="tools", parts=parts)


def moved(schema: Mapping[str, Any], at: str) -> dict[str, Any]:
    """A schema as it reads inside another one, at the pointer `at`: its references point to the same as before."""
    result = _moved(schema, at)
    assert isinstance(result, dict)
    result.pop("$id", None)  # it has no remote references, so nothing is relative to it
    return result


def _moved(schema: object, at: str) -> object:
    if isinstance(schema, list):
        return [_moved(member, at) for member in schema]
    if not isinstance(schema, Mapping):
        return schema
    result: dict[str, object] = {}
    for keyword, value in schema.items():
        if keyword == "$ref" and isinstance(value, str) and value.startswith("#"):
            result[keyword] = at + value[1:]
        elif keyword in MAPS and isinstance(value, Mapping):
            result[keyword] = {name: _moved(member, at) for name, member in value.items()}
        else:
            result[keyword] = value if keyword in VALUES else _moved(value, at)
    return result

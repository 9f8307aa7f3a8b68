"""Constraints with what their texts must be, checked by others: jsonschema, `re`, Lark."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jsonschema
import lark

from jaxserve import LLM, SamplingParams
from jaxserve.constraints.constraint import Constraint
from jaxserve.errors import RequestFailedError
from tests.conformance_schemas import SCHEMAS
from tests.conformance_texts import CHOICES, GRAMMARS, REGEXES

LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
FORMATS = jsonschema.FormatChecker(("uuid", "ipv4", "ipv6", "email", "date"))


@dataclass(frozen=True)
class Case:
    """A constraint.

    Attributes:
        check: whether a text satisfies it; raises what its library raises for texts that it cannot read.
    """

    name: str
    constraint: Constraint
    check: Callable[[str], bool]

    def error(self, text: str) -> str | None:
        """Why the text violates the constraint."""
        try:
            return None if self.check(text) else "it is none"
        except (ValueError, lark.exceptions.LarkError) as error:
            return str(error)[:200]


class Outcome(NamedTuple):
    """One generated text. `violation`: what is wrong with it; `cut`: max_tokens came before its end."""

    case: Case
    seed: int
    text: str
    token_ids: list[int]
    cut: bool
    violation: str | None


def all_cases() -> list[Case]:
    """Every schema, regex, grammar and list of choices."""
    cases = [
        Case(f"schema/{name}", Constraint(kind="json_schema", text=json.dumps(schema)), _valid(name, schema))
        for name, schema in SCHEMAS.items()
    ]
    cases.append(Case("schema/json_object", Constraint(kind="json_object"), _is_object))
    cases += [
        Case(f"regex/{regex}", Constraint(kind="regex", text=regex), _matches(regex)) for regex in REGEXES
    ]
    cases += [
        Case(f"grammar/{name}", Constraint(kind="grammar", text=grammar), _parses(grammar))
        for name, grammar in GRAMMARS.items()
    ]
    cases += [
        Case(
            f"choice/{name}",
            Constraint(kind="choice", text=json.dumps(choices)),
            frozenset(choices).__contains__,
        )
        for name, choices in CHOICES.items()
    ]
    return cases


def generate(
    llm: LLM, cases: list[Case], prompts: list[list[int]], seeds: int, max_tokens: int
) -> list[Outcome]:
    """A text for each case and seed, at temperature 1, all in one batch.

    Args:
        prompts: token ids, one prompt a case.
    """
    runs = [
        (case, prompt, seed) for case, prompt in zip(cases, prompts, strict=True) for seed in range(seeds)
    ]
    params = [SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed) for _, _, seed in runs]
    try:
        results = llm.generate(
            [prompt for _, prompt, _ in runs], params, [case.constraint for case, _, _ in runs]
        )
    except RequestFailedError as error:
        if len(cases) > 1:  # which of them?
            parts = zip(cases, prompts, strict=True)
            return [o for case, prompt in parts for o in generate(llm, [case], [prompt], seeds, max_tokens)]
        return [Outcome(cases[0], 0, "", [], False, f"the engine ended the request: {error}")]
    outcomes = []
    for (case, _, seed), result in zip(runs, results, strict=True):
        (output,) = result.outputs
        cut = output.finish_reason == "length"
        violation = None if cut else case.error(output.text)
        outcomes.append(Outcome(case, seed, output.text, output.token_ids, cut, violation))
    return outcomes


# --- checks -------------------------------------------------------------------------------------------------------


def _valid(name: str, schema: dict[str, Any]) -> Callable[[str], bool]:
    old = jsonschema.Draft7Validator if "$schema" in schema else jsonschema.Draft4Validator
    kind = old if name.startswith("old draft/") else jsonschema.Draft202012Validator
    # 0.07 is a multiple of 0.01, but not so in binary floating point
    number = Decimal if '"multipleOf": 0.' in json.dumps(schema) else float
    exact = json.loads(json.dumps(schema), parse_float=number)
    validator = kind(exact, format_checker=FORMATS)

    def check(text: str) -> bool:
        errors = [error.message for error in validator.iter_errors(json.loads(text, parse_float=number))]
        if errors:
            raise ValueError(errors[0])
        return True

    return check


def _is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def _matches(regex: str) -> Callable[[str], bool]:
    pattern = re.compile(regex)
    return lambda text: pattern.fullmatch(text) is not None


def _parses(grammar: str) -> Callable[[str], bool]:
    parser = lark.Lark(grammar, parser="earley")
    return lambda text: bool(parser.parse(text))


# jsonschema checks these only with further packages
@FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    return not isinstance(value, str) or datetime.datetime.fromisoformat(value).tzinfo is not None


@FORMATS.checks("time", raises=ValueError)
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or datetime.time.fromisoformat(value).tzinfo is not None


@FORMATS.checks("hostname")
def _is_hostname(value: object) -> bool:
    return not isinstance(value, str) or (
        len(value) <= 253 and all(LABEL.fullmatch(label) for label in value.split("."))
    )


@FORMATS.checks("uri", raises=ValueError)
def _is_uri(value: object) -> bool:
    if not isinstance(value, str):
        return True
    return bool(urlsplit(value).scheme) and value.isascii() and not re.search(r'[\s<>"{}|\\^`]', value)

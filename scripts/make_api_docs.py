"""Write the tables of docs/api.md: every request parameter as the server's own tables have it, and its test.

    python scripts/make_api_docs.py

The texts around the tables stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxserve.api.fields import Field, Table
from jaxserve.api.request_tables import (
    TOKENIZE_TEXT,
    ProtocolConfig,
    chat_table,
    completion_table,
    detokenize_table,
    tokenize_messages_table,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
# numbers that stand for what depends on the model; no range has them of itself
V, L = 1_000_003, 700_001
SYMBOLS = {V: "V", V - 1: "V − 1", L: "L"}
CONFIG = ProtocolConfig(model_names=("model",), vocab_size=V, max_model_len=L, scheduling_policy="priority")
OF_ANOTHER_MODEL = replace(CONFIG, temperature=0.3, top_p=0.3, top_k=3, min_p=0.3, repetition_penalty=1.3)
WITH_FLAGS = replace(CONFIG, return_tokens_as_token_ids=True, guided_decoding_backend="outlines")
HUGE = 2**53  # bounds from here on are those of a type

GENERATION = "tests/api/test_generation.py::"
VALIDATION = "tests/api/test_validation.py::"
RESPONSES = "tests/api/test_responses.py::"
SEMANTICS = "tests/test_sampling_semantics.py::"
BEAMS = "tests/test_beam_search.py::"
DETOKENIZER = "tests/test_detokenizer.py::"
STRUCTURED = "tests/api/test_structured_output.py::"
TOKENIZATION = "tests/api/test_tokenization.py::"
TEMPLATES = "tests/api/test_request_templates.py::"
NEUTRAL = VALIDATION + "test_values_that_ask_for_nothing_change_nothing"
TRUNCATION = GENERATION + "test_prompts_are_truncated_as_asked"
USAGE = GENERATION + "test_usage_appears_only_where_it_is_asked_for"
CONVERSATION = TOKENIZATION + "test_a_conversation_is_tokenized_as_the_chat_route_does_it"
FILTERS = SEMANTICS + "test_filters_keep_exactly_the_set_of_their_definition"
PENALTIES = SEMANTICS + "test_scores_change_by_the_formula"
BEAM_OPTIONS = BEAMS + "test_the_tiny_models_hypotheses_are_those_of_transformers_all_in_one_batch"

# One test that fails if the parameter stops working; "C." and "H." where the APIs differ.
TESTS: Mapping[str, str] = {
    "model": GENERATION + "test_responses_name_the_first_served_model_also_for_an_alias",
    "prompt": GENERATION + "test_choices_of_several_prompts_are_numbered_by_prompt_then_by_n",
    "messages": GENERATION + "test_conversations_are_rendered_by_the_template",
    "C.max_tokens": VALIDATION + "test_completions_generate_sixteen_tokens_unless_told",
    "H.max_tokens": GENERATION + "test_max_tokens_is_settled_by_the_prompt",
    "max_completion_tokens": VALIDATION + "test_max_completion_tokens_wins_over_max_tokens",
    "C.logprobs": RESPONSES + "test_completion_logprobs_are_four_parallel_arrays",
    "H.logprobs": RESPONSES + "test_chat_logprobs_are_the_true_top_k_in_order",
    "top_logprobs": VALIDATION + "test_chat_logprobs_are_the_top_logprobs",
    "add_special_tokens": VALIDATION + "test_special_tokens_are_added_to_text_but_not_to_conversations",
    "truncate_prompt_tokens": TRUNCATION,
    "truncation_side": TRUNCATION,
    "cache_salt": GENERATION + "test_the_engine_is_asked_for_exactly_what_the_request_asks_for",
    "priority": GENERATION + "test_priorities_reach_the_engine_where_the_server_has_them",
    "request_id": GENERATION + "test_the_id_is_the_request_id_header_when_the_body_has_none",
    "temperature": SEMANTICS + "test_a_tiny_temperature_is_greedy_and_its_filters_are_idle",
    "top_p": FILTERS,
    "top_k": FILTERS,
    "min_p": FILTERS,
    "presence_penalty": PENALTIES,
    "frequency_penalty": PENALTIES,
    "repetition_penalty": SEMANTICS + "test_the_repetition_formula_is_that_of_transformers",
    "logit_bias": SEMANTICS + "test_a_bias_of_100_decides_and_one_of_minus_100_forbids",
    "allowed_token_ids": SEMANTICS + "test_the_definition_is_that_of_transformers_processors",
    "bad_words": SEMANTICS + "test_bad_words_are_never_completed_but_their_beginnings_are_fine",
    "seed": SEMANTICS + "test_thirty_two_of_one_seed_draw_the_same",
    "n": SEMANTICS + "test_a_choice_is_the_same_whatever_n_is",
    "best_of": SEMANTICS + "test_the_likeliest_of_several_candidates_come_best_first",
    "use_beam_search": BEAMS + "test_the_demo_models_hypotheses_are_those_of_transformers",
    "length_penalty": BEAM_OPTIONS,
    "early_stopping": BEAM_OPTIONS,
    "min_tokens": SEMANTICS + "test_nothing_ends_before_min_tokens",
    "stop": DETOKENIZER + "test_stop_strings_cut_as_the_plain_rules_say",
    "stop_token_ids": SEMANTICS + "test_which_end_it_is",
    "include_stop_str_in_output": DETOKENIZER + "test_with_the_stop_string_included_nothing_is_held_back",
    "ignore_eos": SEMANTICS + "test_ignore_eos_neither_stops_nor_masks",
    "skip_special_tokens": GENERATION + "test_text_of_special_tokens_is_shown_on_request",
    "spaces_between_special_tokens": (
        DETOKENIZER + "test_joined_pieces_equal_decode_without_spaces_between_special_tokens"
    ),
    "prompt_logprobs": SEMANTICS + "test_prompt_logprobs_are_the_models_own",
    "return_tokens_as_token_ids": RESPONSES + "test_tokens_are_written_as_ids_on_request",
    "return_token_ids": GENERATION + "test_token_ids_are_returned_on_request",
    "C.echo": GENERATION + "test_an_echo_has_the_logprobs_of_the_prompt_first",
    "H.echo": GENERATION + "test_chat_echo_repeats_a_last_message_of_the_same_role",
    "stream": GENERATION + "test_a_stream_joins_to_the_whole_response",
    "stream_options": USAGE,
    "add_generation_prompt": GENERATION
    + "test_without_generation_prompt_the_role_is_that_of_the_last_message",
    "continue_final_message": "tests/test_chat_template.py::test_a_last_message_is_left_open_as_transformers_does_it",
    "documents": GENERATION + "test_conversations_are_rendered_by_the_template",
    "chat_template": TEMPLATES + "test_a_requests_template_is_used_instead_of_the_models",
    "chat_template_kwargs": TEMPLATES + "test_variables_reach_the_models_template",
    "reasoning_effort": TEMPLATES + "test_reasoning_effort_is_a_variable_that_the_requests_own_go_before",
    "tools": STRUCTURED + "test_tools_reach_the_template",
    "tool_choice": STRUCTURED + "test_what_a_tool_choice_enforces",
    "parallel_tool_calls": STRUCTURED + "test_what_a_tool_choice_enforces",
    **dict.fromkeys(
        (
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_whitespace_pattern",
            "guided_decoding_backend",
        ),
        STRUCTURED + "test_fields_become_one_constraint",
    ),
    **dict.fromkeys(
        (
            "user",
            "safety_identifier",
            "prompt_cache_key",
            "metadata",
            "store",
            "service_tier",
            "modalities",
            "prediction",
            "verbosity",
            "prompt_cache_retention",
            "prompt_cache_options",
            "function_call",
            "include_reasoning",
        ),
        NEUTRAL,
    ),
}
TOKENIZER_TESTS: Mapping[str, str] = {
    "model": TOKENIZATION + "test_the_model_may_be_absent_but_not_unknown",
    "prompt": TOKENIZATION + "test_a_prompt_longer_than_the_context_is_tokenized",
    "messages": CONVERSATION,
    "tokens": TOKENIZATION + "test_detokenize_undoes_tokenize",
    "return_token_strs": TOKENIZATION + "test_token_strings_come_on_request",
    "add_special_tokens": TESTS["add_special_tokens"],
    "tools": TESTS["tools"],
    **dict.fromkeys(
        (
            "add_generation_prompt",
            "continue_final_message",
            "documents",
            "chat_template",
            "chat_template_kwargs",
        ),
        CONVERSATION,
    ),
}


class Row(NamedTuple):
    """One parameter as docs/api.md shows it."""

    name: str
    api: str
    value: str
    default: str
    text: str
    test: str


def rows(
    tables: Mapping[str, Table], others: Mapping[str, list[Table]], tests: Mapping[str, str]
) -> Iterator[Row]:
    """The served parameters of several APIs by their letters, each once where it is the same in all.

    Args:
        others: the same tables for other models or flags, whose defaults may differ.
        tests: by parameter, or "API.parameter".
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for api, table in tables.items():
        for field in table.fields:
            if field.is_served:
                default = _default(field, [other.by_name[field.name] for other in others.get(api, [])])
                found.setdefault(
                    (field.name, _words(field.json_schema()), default, table.texts[field.name]), []
                ).append(api)
    for (name, value, default, text), apis in found.items():
        test = tests.get(f"{apis[0]}.{name}") or tests[name]
        yield Row(f"`{name}`", ", ".join(apis), value, default, text, f"`{test}`")


def _default(field: Field, others: list[Field]) -> str:
    if field.required:
        return "required"
    value = "none" if field.default is None else f"`{_json(field.default)}`"
    depends = any(other.default != field.default for other in others)
    return f"the model's or flag's, else {value}" if depends else value


def _json(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _words(schema: dict[str, Any]) -> str:
    """A schema in a few words; null, which is absence everywhere, is left out."""
    branches = [
        branch for branch in schema.get("anyOf", schema.get("oneOf", [])) if branch != {"type": "null"}
    ]
    if schema.get("type") is None and branches:
        return " or ".join(dict.fromkeys(_words(branch) for branch in branches))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{_json(value)}`" for value in schema.get("enum", [schema.get("const")]))
    match schema.get("type"):
        case "integer" if schema.get("maximum") == V - 1:
            return "token id"
        case "integer" | "number" as kind:
            return f"{kind}{_range(schema)}"
        case "string":
            pattern = (
                f" `{schema['pattern'].removeprefix('^(?:').removesuffix(')$')}`"
                if "pattern" in schema
                else ""
            )
            return f"string{_count(schema, 'Length', 'characters')}{pattern}"
        case "array":
            return f"array{_count(schema, 'Items', 'members')} of ({_words(schema['items'])})"
        case "object":
            inner = schema.get("additionalProperties")
            members = ", ".join(f"`{name}`" for name in schema.get("properties", ()))
            of = f" with {members}" if members else f" of ({_words(inner)})" if inner else ""
            return f"object{_count(schema, 'Properties', 'pairs')}{of}"
    return str(schema.get("type", "any value"))


def _range(schema: dict[str, Any]) -> str:
    lower, upper = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    opening = "(" if "exclusiveMinimum" in schema else "["
    if upper is not None and upper < HUGE:
        return f" {opening}{_number(lower)}, {_number(upper)}]"
    if lower is None or lower <= -HUGE:
        return ", 64 bits" if schema["type"] == "integer" else ""
    return f" {'>' if opening == '(' else '≥'} {_number(lower)}"


def _number(value: float) -> str:
    return SYMBOLS.get(int(value), f"{value:,g}".replace("-", "−"))


def _count(schema: dict[str, Any], of: str, what: str) -> str:
    few, many = schema.get(f"min{of}"), schema.get(f"max{of}")
    if few is None and many is None:
        return ""
    if many is None:
        return f" of {few} or more {what}"
    return f" of {f'{few} to' if few else 'at most'} {SYMBOLS.get(many, f'{many:,}')} {what}"


def _refused(tables: Mapping[str, Table]) -> Iterator[tuple[str, str, str]]:
    """Names, APIs and reason of the parameters that are known and refused."""
    apis: dict[tuple[str, str], list[str]] = {}
    for api, table in tables.items():
        for field in table.fields:
            if field.refusal is not None and not field.is_served:
                apis.setdefault((field.name, field.refusal.because), []).append(api)
    names: dict[tuple[str, str], list[str]] = {}
    for (name, reason), letters in apis.items():
        names.setdefault((", ".join(letters), reason), []).append(f"`{name}`")
    for (letters, reason), those in names.items():
        yield ", ".join(those), letters, f"… {reason}"


def _table(head: tuple[str, ...], lines: Iterator[tuple[str, ...]]) -> str:
    escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(
        [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {line} |" for line in escaped)]
    )


def sections() -> dict[str, str]:
    """The generated parts of the page, by name."""

    def generation(config: ProtocolConfig) -> dict[str, Table]:
        return {"C": completion_table(config), "H": chat_table(config)}

    tables = generation(CONFIG)
    others = {api: [generation(config)[api] for config in (OF_ANOTHER_MODEL, WITH_FLAGS)] for api in tables}
    tokenizer = {
        "tokenize a text": TOKENIZE_TEXT,
        "tokenize messages": tokenize_messages_table(CONFIG),
        "detokenize": detokenize_table(CONFIG),
    }
    head = ("Parameter", "API", "Value", "Default", "What it does", "Test")
    return {
        "parameters": _table(head, rows(tables, others, TESTS)),
        "tokenizer": _table(head, rows(tokenizer, {}, TOKENIZER_TESTS)),
        "refused": _table(("Parameters", "API", "Why"), _refused(tables)),
    }


def updated(page: str) -> str:
    """The page with its generated parts made anew."""
    for name, text in sections().items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        page, count = marked.subn(lambda match, text=text: match[1] + text + match[2], page)
        assert count == 1, f"{PAGE} must have one part <!-- {name} --> … <!-- end -->"
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text("utf-8")), "utf-8")

"""Chat templates render as transformers renders them, and fail as refusals with the template's own words."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from jaxserve.chat_template import ChatTemplate, load_chat_template, normalize_messages
from jaxserve.errors import ConfigError, RequestError
from jaxserve.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizers import backend_of

DATA = Path(__file__).parent / "data"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """\
{{- bos_token }}
{%- if tools is not none %}
    {{- "Tools: " }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\n" }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if loop.index0 > 5 %}{%- break %}{%- endif %}
    {%- if message.role == 'skip' %}{%- continue %}{%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if 'tool_calls' in message %}
        {{- message.tool_calls[0].function | tojson }}
    {%- else %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{{- ns.count }}
{%- if documents %}{{- documents[0].title }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
BLOCKS = """\
    {% set inside = 'outer' %}
  {% for message in messages %}
    {% generation %}
      {% set inside = message.content %}
{{ inside }}
    {% endgeneration %}
    {# a comment #}
  {% endfor %}
{% generation %}{% set inside = 'inner' %}{{ inside }}{% endgeneration %}
{{ inside }} {{ unknown_variable }}|{{ [1, 2] }}|{{ {"a": "<é&>"} | tojson }}|{{ extra }}
"""
USER = {"role": "user", "content": " Hi <b>&'\"</b> é\n"}
ASSISTANT = {"role": "assistant", "content": "Hello there  "}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": "<&>"}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
}


def transformers_render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=source, **{**SPECIAL, **options})
    return str(rendered[0])


@pytest.mark.parametrize("source", [CHATML, LLAMA, BLOCKS], ids=["chatml", "llama", "blocks"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [TOOL]},
        {"documents": [{"title": "T", "text": "x"}]},
        {"extra": "E", "bos_token": "[BOS]"},
    ],
    ids=["plain", "tools", "documents", "extra"],
)
def test_a_conversation_renders_as_transformers_renders_it(
    source: str, add_generation_prompt: bool, options: dict[str, Any]
) -> None:
    messages = [
        {"role": "system", "content": "S"},
        USER,
        ASSISTANT,
        CALL,
        {"role": "skip", "content": ""},
        USER,
    ]
    options = {"add_generation_prompt": add_generation_prompt, **options}
    variables = {name: options[name] for name in options.keys() & {"extra", "bos_token"}}
    own = {name: options[name] for name in options.keys() - variables.keys()}
    ours = ChatTemplate(source, SPECIAL).render(messages, variables, **own)
    assert ours == transformers_render(source, messages, **options)


@pytest.mark.parametrize(
    ("source", "content"),
    [
        (CHATML, "The answer is"),
        (CHATML, "trailing  "),
        (CHATML, "  leading and trailing \n"),
        (CHATML, ""),
        (CHATML, "<|im_end|>\n"),
        (LLAMA, "The answer is"),
        (LLAMA, "  trimmed by the template  "),
        ("{{ messages[-1].content }} and again {{ messages[-1].content }}!", "x"),
        ("{{ messages[-1].content }}.", "Hi. CONTINUE_FINAL_MESSAGE_TAG was said"),
    ],
)
def test_a_last_message_is_left_open_as_transformers_does_it(source: str, content: str) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ours = ChatTemplate(source, SPECIAL).render(messages, **options)
    assert ours == transformers_render(source, messages, **options)
    assert ours.rstrip().endswith(content.strip())
    assert messages[-1]["content"] == content


@pytest.mark.parametrize(
    ("source", "content", "words"),
    [
        ("nothing of the messages", "Hi", "shows the last message as it is"),
        ("{{ messages[-1].content | upper }}", "Hi", "shows the last message as it is"),
        (CHATML, None, "a last message with text"),
    ],
)
def test_a_last_message_that_cannot_be_left_open_is_refused(
    source: str, content: str | None, words: str
) -> None:
    messages = [USER, {"role": "assistant", "content": content}]
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate(source, SPECIAL).render(
            messages, add_generation_prompt=False, continue_final_message=True
        )
    assert caught.value.code == "invalid_template"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages.nothing.deeper }}", "has no attribute 'nothing'"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages[0].content.__class__ }}{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "begins with an underscore"),
        ("{{ namespace(__init__=1) }}", "begins with an underscore"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages | tojson(indent=[]) }}", "The chat template failed"),
        ("{{ '%d' | format('x') }}", "The chat template failed"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange too big"),
        ("{% include 'x' %}", "The chat template failed"),
    ],
)
def test_a_template_that_fails_refuses_the_request_in_its_own_words(source: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        ChatTemplate(source, SPECIAL).render([USER])
    assert caught.value.code == "invalid_template"
    assert caught.value.param == "messages"


def test_a_templates_words_are_shortened_and_hold_no_addresses() -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ raise_exception('x' * 9999) }}", {}).render([USER])
    assert len(str(caught.value)) < 400
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ raise_exception(raise_exception | string) }}", {}).render([USER])
    assert not re.search("0x[0-9a-f]", str(caught.value))


def test_the_date_is_todays() -> None:
    before = datetime.now().strftime("%Y-%m-%d")  # noqa: DTZ005 - as templates see it
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render([USER])
    assert text in (before, datetime.now().strftime("%Y-%m-%d"))  # noqa: DTZ005


# --- OpenAI's messages --------------------------------------------------------------------------------------


def normalized(message: dict[str, Any], source: str = CHATML) -> dict[str, Any]:
    (result,) = normalize_messages([message], ChatTemplate(source, SPECIAL))
    return result


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "refusal", "refusal": "no"},
        {"type": "text", "text": ""},
    ]
    assert normalized({"role": "user", "content": parts}) == {"role": "user", "content": "a\nno\n"}


def test_keys_that_are_null_or_empty_are_left_out_as_templates_ask_whether_they_are_there() -> None:
    message = {"role": "assistant", "content": None, "name": None, "tool_calls": [], "refusal": None}
    assert normalized(message) == {"role": "assistant", "content": ""}


def test_the_messages_themselves_stay_as_they_are() -> None:
    message = {"role": "developer", "content": [{"type": "text", "text": "a"}], "tool_calls": []}
    before = json.dumps(message)
    normalized(message)
    assert json.dumps(message) == before


@pytest.mark.parametrize(
    ("source", "role"),
    [
        (CHATML, "system"),
        ("{% if messages[0].role == 'developer' %}D{% endif %}", "developer"),
        ("{% if messages[0].role in ('system', \"developer\") %}D{% endif %}", "developer"),
        ("You are a developer. {{ messages[0].content }}", "system"),  # only a word in a text
        ("{# 'developer' #}{{ 'Dear developer' }}", "system"),
    ],
)
def test_developer_is_rendered_as_system_unless_the_template_names_it(source: str, role: str) -> None:
    assert normalized({"role": "developer", "content": "x"}, source)["role"] == role


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ('{"a": [1, "é"]}', {"a": [1, "é"]}),
        ("{}", {}),
        ("{broken", "{broken"),
        ("", ""),
        ("[1]", "[1]"),
        ("1", "1"),
        ("[" * 10**5, "[" * 10**5),
    ],
)
def test_arguments_of_tool_calls_are_objects_where_they_are_json(arguments: str, seen: object) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = normalized({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": seen}}
    ]
    assert call["function"] == {"name": "f", "arguments": arguments}


# --- Where the template comes from --------------------------------------------------------------------------


def tokenizer_with(template: str | None) -> Tokenizer:
    return Tokenizer(backend_of("byte level"), SPECIAL, template)


def render(template: ChatTemplate | None) -> str:
    assert template is not None
    return template.render([USER])


def test_the_models_template_is_used_where_no_other_is_given() -> None:
    assert render(load_chat_template(None, tokenizer_with("model's {{ eos_token }}"))) == "model's </s>"
    assert load_chat_template(None, tokenizer_with(None)) is None


def test_the_flag_names_a_file_or_is_the_template(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("file's {{ bos_token }}")
    tokenizer = tokenizer_with("model's")
    assert render(load_chat_template(str(file), tokenizer)) == "file's <s>"
    assert render(load_chat_template("inline {{ bos_token }}", tokenizer)) == "inline <s>"
    long = "{{ bos_token }}" * 1000  # longer than any file's name
    assert render(load_chat_template(long, tokenizer)) == "<s>" * 1000


@pytest.mark.parametrize(
    ("argument", "model", "words"),
    [
        ("missing.jinja", None, "--chat-template: 'missing.jinja' is no file"),
        ("a\x00b", None, "--chat-template"),
        ("", None, "--chat-template"),
        ("{% for %}", None, "--chat-template is no Jinja template: line 1"),
        ("{{ x | no_such_filter }}", None, "No filter named 'no_such_filter'"),
        (None, "{% if %}", "The model's chat template is no Jinja template: line 1"),
    ],
)
def test_a_template_that_cannot_be_used_is_found_at_the_start(
    argument: str | None, model: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_chat_template(argument, tokenizer_with(model))
    assert "\n" not in str(caught.value)


def test_a_template_file_that_is_no_text_is_found_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_bytes(b"\xff\xfe{{")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_chat_template(str(file), tokenizer_with(None))


# --- The demo model -----------------------------------------------------------------------------------------


@pytest.mark.model
def test_conversations_of_the_demo_model_are_text_and_ids_as_transformers_makes_them(
    demo_model_path: Path,
) -> None:
    tokenizer = load_tokenizer(demo_model_path)
    template = load_chat_template(None, tokenizer)
    assert template is not None
    rows = json.loads((DATA / "demo_chats.json").read_text())
    assert len(rows) == 20
    for row in rows:
        text = template.render(normalize_messages(row["messages"], template))
        assert text == row["text"]
        assert tokenizer.encode(text, add_special_tokens=False) == row["ids"]

"""`chat_template` and `chat_template_kwargs`: what requests bring is rendered, or refused without harm to anybody."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
from quart import Quart

from jaxserve.api.app import create_app
from jaxserve.api.context import ServerContext
from jaxserve.chat_template import ChatTemplate
from jaxserve.tokenizer import Tokenizer
from tests.api.fake_engine import FakeEngineClient, fake_info, generate
from tests.api.small_model import END, MODEL, VOCAB_SIZE, make_context, make_tokenizer

pytestmark = pytest.mark.timing

MESSAGES = [{"role": "user", "content": "hi"}]
SLOW = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
# what each bomb is stopped by
BOMBS = {
    "nested ranges": (SLOW, "longer than 2 s"),
    "a string of 200 MB": ("{{ 'x' * 200000000 }}", "memory|MiB of text"),
    "a huge power": ("{{ 9 ** (9 ** 9) }}", "longer than 2 s|memory"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "an unsafe attribute": ("{{ ''.__class__ }}", "'__class__' is unsafe"),
    "globals of Python's": ("{{ cycler.__init__.__globals__ }}", "'__init__' is unsafe"),
    "giant output": ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", "4 MiB of text"),
    "a list that doubles": (
        "{% set ns = namespace(l=[0]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
        "512 MB of memory",
    ),
    "a wide number": ("{{ '%1000000000d' % 1 }}", "512 MB of memory"),
    "a long range": ("{% for i in range(100001) %}{% endfor %}", "[Rr]ange too big"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine() -> FakeEngineClient:
    info = fake_info(vocab_size=VOCAB_SIZE, max_model_len=1024)
    return FakeEngineClient(script=lambda request: generate(request, [[END]]), info=info)


@pytest.fixture
async def context(tokenizer: Tokenizer, engine: FakeEngineClient) -> AsyncIterator[ServerContext]:
    context = make_context(tokenizer, engine, default_chat_template_kwargs={"style": "plain", "tone": "dry"})
    yield context
    context.templates.process.close()


@pytest.fixture
def app(context: ServerContext) -> Quart:
    return create_app(context)


async def post(app: Quart, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    response = await app.test_client().post(path, json=body)
    return response.status_code, await response.get_json()


async def chat(app: Quart, **fields: Any) -> tuple[int, Any]:
    return await post(app, "/v1/chat/completions", {"model": MODEL, "messages": MESSAGES, **fields})


async def prompt_of(app: Quart, **fields: Any) -> str:
    """The text that the model would be fed, by way of `/tokenize`."""
    status, answer = await post(app, "/tokenize", {"messages": MESSAGES, **fields})
    assert status == 200, answer
    return bytes(token for token in answer["tokens"] if token < 256).decode()


# --- what is rendered ---------------------------------------------------------------------------------------


async def test_a_requests_template_is_used_instead_of_the_models(
    app: Quart, engine: FakeEngineClient
) -> None:
    template = "{{ messages[0].content }}!{% if add_generation_prompt %}go{% endif %}"
    assert await prompt_of(app, chat_template=template) == "hi!go"
    assert await prompt_of(app, chat_template=template, add_generation_prompt=False) == "hi!"
    status, _ = await chat(app, chat_template=template)
    assert status == 200
    assert bytes(engine.submitted[0].prompt_token_ids) == b"hi!go"


async def test_variables_reach_the_models_template(app: Quart) -> None:
    assert await prompt_of(app) == "[user]hi;[assistant]"
    assert await prompt_of(app, chat_template_kwargs={}) == "[user]hi;[assistant]"
    kwargs = {"reasoning_effort": "enormous", "unused": {"a": [1, None, 2.5, True]}}
    assert await prompt_of(app, chat_template_kwargs=kwargs) == "[user]hi;effort enormous;[assistant]"


async def test_the_servers_variables_come_first_and_the_requests_prevail(app: Quart) -> None:
    template = "{{ style }} {{ tone }} {{ eos_token }}"
    kwargs = {"tone": "warm"}
    assert await prompt_of(app, chat_template=template) == "plain dry "
    assert await prompt_of(app, chat_template=template, chat_template_kwargs=kwargs) == "plain warm "
    kwargs = {"eos_token": "own", "self": 1, "max_bytes": 2, "messages_": 3, "variables": 4}
    assert await prompt_of(app, chat_template=template, chat_template_kwargs=kwargs) == "plain dry own"


async def test_reasoning_effort_is_a_variable_that_the_requests_own_go_before(
    app: Quart, engine: FakeEngineClient
) -> None:
    template = "{{ reasoning_effort }}"
    await chat(app, chat_template=template, reasoning_effort="high")
    kwargs = {"reasoning_effort": "own"}
    await chat(app, chat_template=template, reasoning_effort="high", chat_template_kwargs=kwargs)
    assert [bytes(request.prompt_token_ids) for request in engine.submitted] == [b"high", b"own"]


async def test_messages_are_prepared_as_for_the_models_template(app: Quart) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [call]},
    ]
    template = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    want = (
        '{"role": "system", "content": "a\\nb"}{"role": "assistant", "content": "", "tool_calls": '
        '[{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}'
    )
    assert await prompt_of(app, messages=messages, chat_template=template) == want
    named = "{{ messages[0].role }}{% if 0 %}{{ 'developer' }}{% endif %}"
    assert await prompt_of(app, messages=messages, chat_template=named) == "developer"


async def test_the_last_message_may_be_left_open_and_documents_are_there(app: Quart) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    text = await prompt_of(
        app,
        messages=messages,
        documents=[{"title": "T"}],
        chat_template="{{ documents[0].title }}{% for m in messages %}<{{ m.content }}>{% endfor %}",
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert text == "T<hi><Well, "


# --- what is refused ----------------------------------------------------------------------------------------


def assert_refused(answer: tuple[int, Any], param: str, words: str) -> None:
    status, body = answer
    error = body["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert (error["code"], error["param"]) == ("invalid_template", param)
    assert re.search(words, error["message"]), error["message"]
    assert len(error["message"]) < 500
    assert not re.search(r"0x[0-9a-f]{4}|\.py\b|Traceback|jinja2\.|jaxserve\.", error["message"])


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb_is_refused_and_the_server_keeps_its_size(app: Quart, name: str) -> None:
    template, words = BOMBS[name]
    await prompt_of(app, chat_template="warm")
    server = psutil.Process()
    before, started = server.memory_info().rss, time.monotonic()
    assert_refused(await chat(app, chat_template=template), "chat_template", words)
    assert time.monotonic() - started < 3
    assert server.memory_info().rss - before < 8 << 20
    assert await prompt_of(app, chat_template="still {{ messages[0].content }}") == "still hi"


async def test_ten_bombs_at_once_hold_nobody_up(app: Quart, context: ServerContext) -> None:
    await prompt_of(app, chat_template="warm")
    server = psutil.Process()
    before, started = server.memory_info().rss, time.monotonic()
    bombs = [asyncio.ensure_future(chat(app, chat_template=SLOW)) for _ in range(10)]
    await asyncio.sleep(0)
    for _ in range(5):
        assert await prompt_of(app) == "[user]hi;[assistant]"
        assert await prompt_of(app, chat_template="own {{ messages[0].content }}") == "own hi"
    assert not any(bomb.done() for bomb in bombs)  # the others did not wait for them
    for bomb in bombs:
        assert_refused(await bomb, "chat_template", "longer than 2 s")
    assert time.monotonic() - started < 3
    assert server.memory_info().rss - before < 8 << 20
    worker = psutil.Process(context.templates.process.pid)
    async with asyncio.timeout(5):
        while worker.children():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"chat_template": "{% for %}"}, "chat_template", "line 1"),
        ({"chat_template": "a\n\n{{ x | no_such }}"}, "chat_template", "line 3: No filter named 'no_such'"),
        ({"chat_template": "{{ messages.nothing.deeper }}"}, "chat_template", "no attribute 'nothing'"),
        ({"chat_template": "{{ raise_exception('Say please.') }}"}, "chat_template", "failed: Say please.$"),
        ({"chat_template": "{{ raise_exception('x' * 9999) }}"}, "chat_template", "x…$"),
        (
            {"chat_template": "{{ raise_exception(cycler ~ raise_exception) }}"},
            "chat_template",
            "_raise_exception",
        ),
        ({"chat_template": "{{ raise_exception('\\ud800') }}"}, "chat_template", r"\?"),
        ({"chat_template": "{{ '\\ud800' }}"}, "chat_template", "surrogates"),
        ({"chat_template": "{{ messages.append(1) }}"}, "chat_template", "'append' is unsafe"),
        ({"chat_template": "{{ messages | attr('__class__') }}"}, "chat_template", "'__class__' is unsafe"),
        ({"chat_template": "{% include 'x' %}"}, "chat_template", "no loader"),
        (
            {"chat_template": "{% if 1 %}" * 200 + "{% endif %}" * 200},
            "chat_template",
            "failed: too many (levels of indentation|statically nested blocks)$",
        ),
        ({"chat_template": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}"}, "chat_template", "recursion"),
        ({"chat_template": "x" * (64 * 1024 + 1)}, "chat_template", "at most 65,536 bytes, got 65,537"),
        ({"chat_template": "é" * (32 * 1024 + 1)}, "chat_template", "at most 65,536 bytes, got 65,538"),
        ({"chat_template_kwargs": {"a": "x" * 65536}}, "chat_template_kwargs", "at most 65,536 bytes"),
        ({"chat_template_kwargs": {"documents_": [0] * 40000}}, "chat_template_kwargs", "at most 65,536"),
    ],
)
async def test_a_template_that_fails_is_refused_in_its_own_words(
    app: Quart, fields: dict[str, Any], param: str, words: str
) -> None:
    assert_refused(await chat(app, **fields), param, words)
    assert_refused(await post(app, "/tokenize", {"messages": MESSAGES, **fields}), param, words)


async def test_a_template_of_64_kib_is_taken(app: Quart) -> None:
    assert await prompt_of(app, chat_template="x" * 65536) == "x" * 65536


@pytest.mark.parametrize(
    ("kwargs", "param", "words"),
    [
        ({"refuse": True}, "messages", "Roles must alternate"),
        ({"number": "text"}, "chat_template_kwargs", "can only concatenate|unsupported operand"),
        ({"number": {}}, "chat_template_kwargs", "unsupported operand"),
    ],
)
async def test_who_is_at_fault_in_the_models_own_template(
    app: Quart, context: ServerContext, kwargs: dict[str, Any], param: str, words: str
) -> None:
    source = "{% if refuse %}{{ raise_exception('Roles must alternate') }}{% endif %}{{ number + 1 }}"
    set_template(context, source)
    assert await prompt_of(app, chat_template_kwargs={"number": 1}) == "2"
    assert_refused(await chat(app, chat_template_kwargs=kwargs), param, words)


async def test_without_any_template_a_request_must_bring_one(app: Quart, context: ServerContext) -> None:
    set_template(context, None)
    assert_refused(await chat(app), "messages", "no chat template.*--chat-template.*chat_template")
    assert_refused(await chat(app, chat_template_kwargs={"a": 1}), "chat_template", "no chat template")
    assert await prompt_of(app, chat_template="{{ messages[0].content }}") == "hi"


async def test_requests_templates_can_be_turned_off(tokenizer: Tokenizer, engine: FakeEngineClient) -> None:
    app = create_app(make_context(tokenizer, engine, request_chat_template=False))
    for path in ("/v1/chat/completions", "/tokenize"):
        for name, value in (
            ("chat_template", "x"),
            ("chat_template", ""),
            ("chat_template_kwargs", {"a": 1}),
        ):
            status, answer = await post(app, path, {"model": MODEL, "messages": MESSAGES, name: value})
            error = answer["error"]
            assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", name)
            assert "--no-request-chat-template" in error["message"]
        neutral = {"chat_template": None, "chat_template_kwargs": {}}
        status, _ = await post(app, path, {"model": MODEL, "messages": MESSAGES, **neutral})
        assert status == 200


def set_template(context: ServerContext, source: str | None) -> None:
    template = None if source is None else ChatTemplate(source, context.tokenizer.special_tokens)
    context.set_model(context.tokenizer, template, context.generation_defaults)

"""The real server with the real model, driven by the OpenAI SDK."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server_process import ServerProcess, running_server
from tests.tiny_llama import write_tiny_model

pytestmark = pytest.mark.model
MODEL = "smollm2"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ["--model", str(demo_model_path), "--served-model-name", MODEL, "--max-model-len", "1024"]
    flags += ["--max-num-seqs", "16", "--max-num-batched-tokens", "128", "--max-num-queued-reqs", "200"]
    with running_server(log, *flags) as server:
        yield server
        assert server.metric("xla_compilations_total") == 0, "something was compiled under load"
        assert "Traceback" not in log.read_text()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="token-abc123", max_retries=0) as client:
        yield client


def test_the_capital_of_france_is_paris(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert completion.choices[0].message.content == "The capital of France is Paris."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (37, 8)


def test_the_examples_that_people_paste_work_as_written(server: ServerProcess) -> None:
    """Those of vLLM's documentation, but for the address and the model's name."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="token-abc123")
    completion = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello!"}], max_tokens=20
    )
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content
    classified = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Classify this sentiment: vLLM is wonderful!"}],
        extra_body={"guided_choice": ["positive", "negative"]},
    )
    assert classified.choices[0].message.content in ("positive", "negative")
    body = {
        "model": MODEL,
        "prompt": "San Francisco is a",
        "max_tokens": 7,
        "temperature": 0,
        "top_k": 10,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "stop_token_ids": [0],
        "logit_bias": {"28": -100},
        "skip_special_tokens": False,
    }
    curl = ["curl", "-sS", f"{server.url}/v1/completions", "-H", "Content-Type: application/json"]
    answer = subprocess.run(
        [*curl, "-d", json.dumps(body)], check=True, capture_output=True, text=True, timeout=60
    )
    choice = json.loads(answer.stdout)["choices"][0]
    assert choice["finish_reason"] in ("length", "stop")
    assert "," not in choice["text"]  # token 28, which the bias forbids


def test_the_readmes_first_example_runs_as_written(
    server: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    assert "127.0.0.1:8000" in example
    exec(example.replace("http://127.0.0.1:8000", server.url), {})  # noqa: S102  (our own words)
    assert capsys.readouterr().out == "The capital of France is Paris.\n"


async def test_the_asynchronous_client_gets_the_same(server: ServerProcess) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        completion = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert completion.choices[0].message.content == "The capital of France is Paris."


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joined_is_the_response(client: openai.OpenAI, n: int) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "messages": QUESTION,
        "seed": 5,
        "n": n,
        "max_tokens": 24,
        "stop": ["ance is"],
    }
    whole = client.chat.completions.create(**options)
    texts, reasons, usage = [""] * n, [""] * n, None
    for chunk in client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_completions_take_prompts_of_every_kind_and_report_logprobs(client: openai.OpenAI) -> None:
    ids = [6403, 1980, 253, 655]  # "Once upon a time"
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 6, "temperature": 0, "logprobs": 3}
    texts = []
    for prompt in ("Once upon a time", ids, ["Once upon a time"], [ids]):
        completion = client.completions.create(prompt=prompt, **options)
        (choice,) = completion.choices
        texts.append(choice.text)
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert "".join(logprobs.tokens) == choice.text
        assert logprobs.top_logprobs is not None
        assert [max(top, key=top.__getitem__) for top in logprobs.top_logprobs] == logprobs.tokens
    assert len(set(texts)) == 1
    both = client.completions.create(prompt=["Once upon a time", "2 + 2 ="], **options)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == texts[0]


def test_a_repeated_prompt_is_found_in_the_prefix_cache(client: openai.OpenAI) -> None:
    text = "A sentence that no other test of this file uses. " * 16
    cached = []
    for _ in range(2):
        completion = client.completions.create(model=MODEL, prompt=text, max_tokens=1)
        assert completion.usage is not None
        assert completion.usage.prompt_tokens_details is not None
        cached.append(completion.usage.prompt_tokens_details.cached_tokens)
        assert completion.usage.prompt_tokens > 128
    assert cached[0] == 0
    assert cached[1] == (completion.usage.prompt_tokens - 1) // 64 * 64  # whole blocks


def test_errors_arrive_as_the_sdks_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nope", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=3)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 2000)
    assert long.value.code == "context_length_exceeded"


async def test_sixty_four_mixed_requests_at_once_all_end(server: ServerProcess) -> None:
    rng = random.Random(0)

    async def one(client: openai.AsyncOpenAI, i: int) -> str | None:
        options: dict[str, Any] = {
            "model": MODEL,
            "max_tokens": rng.randrange(1, 24),
            "temperature": rng.choice([0, 1]),
        }
        if i % 4 == 0:
            completion = await client.completions.create(prompt="word " * rng.randrange(1, 300), **options)
            return completion.choices[0].finish_reason
        if i % 4 == 1:
            chat = await client.chat.completions.create(messages=QUESTION, n=2, **options)
            return chat.choices[1].finish_reason
        reason = None
        async for chunk in await client.chat.completions.create(messages=QUESTION, stream=True, **options):
            reason = chunk.choices[0].finish_reason or reason
        return reason

    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        reasons = await asyncio.gather(*(one(client, i) for i in range(64)))
    assert set(reasons) <= {"stop", "length"}
    server.wait_until_idle()


@pytest.mark.heavy
def test_the_same_seed_gives_the_same_text_alone_in_a_crowd_and_after_a_restart(
    demo_model_path: Path, tmp_path: Path
) -> None:
    """With a float32 model: batches of other sizes round a bfloat16 one differently."""
    model = write_tiny_model(tmp_path / "model")
    flags = ["--model", str(model), "--tokenizer", str(demo_model_path), "--served-model-name", MODEL]
    flags += ["--max-num-seqs", "16", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "4000000"]
    body = {
        "model": MODEL,
        "prompt": [7, 8, 9],
        "max_tokens": 40,
        "seed": 11,
        "n": 2,
        "return_token_ids": True,
    }

    async def crowd(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60) as client:
            others = [client.post(url, json=body | {"seed": i}) for i in range(16)]
            mine = [client.post(url, json=body) for _ in range(16)]
            return (await asyncio.gather(*others, *mine))[16:]

    def tokens(response: httpx.Response) -> list[list[int]]:
        assert response.status_code == 200, response.text
        return [choice["token_ids"] for choice in response.json()["choices"]]

    with running_server(tmp_path / "first.log", *flags) as server:
        alone = tokens(server.post("/v1/completions", body))
        crowded = asyncio.run(crowd(f"{server.url}/v1/completions"))
    with running_server(tmp_path / "second.log", *flags) as server:
        after_restart = tokens(server.post("/v1/completions", body))
    assert alone[0] != alone[1]
    assert [tokens(response) for response in crowded] == [alone] * 16
    assert after_restart == alone


def test_a_hundred_disconnects_leave_nothing_behind(server: ServerProcess) -> None:
    """Closed, reset or half-closed; queued, in prefill or decoding; streaming or not."""
    rng = random.Random(1)
    sockets = []
    for i in range(100):
        body = {
            "model": MODEL,
            "prompt": "word " * rng.randrange(1, 200),
            "max_tokens": 300,
            "stream": bool(i % 2),
        }
        payload = json.dumps({**body, "ignore_eos": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(payload)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head.encode() + payload)
        sockets.append(connection)
        if len(sockets) == 10:
            for j, one in enumerate(sockets):
                if j % 3 == 0:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
                elif j % 3 == 1:
                    one.shutdown(socket.SHUT_WR)
                    one.settimeout(20)
                    while one.recv(1 << 16):
                        pass
                one.close()
            sockets = []
    server.wait_until_idle()
    assert (
        server.post("/v1/completions", {"model": MODEL, "prompt": "Hi", "max_tokens": 1}).status_code == 200
    )


def test_metrics_count_requests_and_tokens_exactly(server: ServerProcess) -> None:
    names = (
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "generation_tokens_total",
    )
    before = [server.metric(name) for name in names]
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 10, "ignore_eos": True}
    for _ in range(10):
        assert server.post("/v1/completions", body).status_code == 200
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [10, 90, 100]

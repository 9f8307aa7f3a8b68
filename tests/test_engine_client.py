"""The engine client against scripted engine processes, which speak the frames and nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from jaxserve import engine_client
from jaxserve.config import EngineConfig
from jaxserve.engine_client import EngineLoad, RequestStream, SocketEngineClient
from jaxserve.errors import (
    EngineDeadError,
    EngineError,
    EngineStalledError,
    EngineStartingError,
    ModelLoadError,
    RequestError,
    RequestFailedError,
)
from jaxserve.messages import AddRequest, EngineStats, SequenceOutput
from jaxserve.sampling_params import SamplingParams

CONFIG = EngineConfig(model="/models/m", max_model_len=99)

PRELUDE = """
import os, socket, struct, sys, time
import msgspec
from jaxserve.messages import *

path = sys.argv[-1]
mode = os.stat(os.path.dirname(path)).st_mode & 0o777
sock = socket.socket(socket.AF_UNIX)
sock.connect(path)

def receive_raw():
    data = b""
    size = 4
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            sys.exit(0)
        data += chunk
        if len(data) == 4 and size == 4:
            size += struct.unpack("<I", data)[0]
    return data[4:]

def receive():
    return msgspec.msgpack.decode(receive_raw(), type=ToEngine)

def send(message):
    sock.sendall(encode_frame(message))

def ready(*summary):
    send(EngineInfo(max_model_len=99, vocab_size=10, max_num_seqs=4, max_num_batched_tokens=8, block_size=4,
                    num_blocks=5, kv_cache_dtype="float32", platform="cpu", summary=list(summary)))

def step(*outputs, **stats):
    send(StepOutputs(outputs=[SequenceOutput(*o[:3], **(o[3] if o[3:] else {})) for o in outputs],
                     stats=EngineStats(**stats)))

config = msgspec.msgpack.decode(receive_raw())
"""

LIMIT_S = 5.0  # for what takes milliseconds: a defect must fail, not hang
WAIT_FOR_THE_END = "\nwhile True: receive()\n"

Connect = Callable[..., Awaitable[SocketEngineClient]]


@pytest.fixture
async def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connect]:
    """Start a client whose engine runs the given program after PRELUDE, and wait until it is connected."""
    clients: list[SocketEngineClient] = []

    async def connect(program: str, *, prelude: str = PRELUDE, **options: object) -> SocketEngineClient:
        script = tmp_path / f"engine_{len(clients)}.py"
        script.write_text(prelude + program + WAIT_FOR_THE_END)
        client = SocketEngineClient(CONFIG, command=(sys.executable, str(script)), **options)  # type: ignore[arg-type]
        clients.append(client)
        await client.spawn()
        await client.connect()
        return client

    monkeypatch.setattr(engine_client, "WATCH_INTERVAL_S", 0.01)
    yield connect
    for client in clients:
        await asyncio.wait_for(client.stop(), 2 * LIMIT_S)


def add(request_id: str = "a", *, prompt: int = 3, n: int = 1) -> AddRequest:
    return AddRequest(request_id=request_id, prompt_token_ids=[1] * prompt, params=SamplingParams(n=n))


async def collect(stream: RequestStream) -> list[list[tuple[int, list[int]]]]:
    """Of every list that arrives, the sequences and their tokens."""
    async with asyncio.timeout(LIMIT_S):
        return [[(output.index, output.token_ids) for output in step] async for step in stream]


async def following(stream: RequestStream) -> list[SequenceOutput]:
    return await asyncio.wait_for(anext(stream), LIMIT_S)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.002)


# --- start ----------------------------------------------------------------------------------------------------


async def test_a_kill_that_waits_says_whether_the_engine_is_gone(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await connect("ready()")
    engine = psutil.Process(client._process.pid)  # type: ignore[union-attr]
    with monkeypatch.context() as patch:
        patch.setattr(client, "kill", lambda: None)
        assert not client.kill_and_wait(0.0)
    assert client.kill_and_wait(LIMIT_S)
    assert not engine.is_running()
    assert client.kill_and_wait(0.0)


async def test_a_trace_begins_and_ends_once_and_not_after_the_engines_end(connect: Connect) -> None:
    client = await connect("""
ready()
send(Profiled()) if receive() == Profile(running=True) else None
send(Profiled(error="disk full")) if receive() == Profile(running=False) else None
receive()
sys.exit(0)
""")
    await client.wait_ready()
    with pytest.raises(RequestError, match="A trace is not running"):
        await client.profile(running=False)
    await client.profile(running=True)
    with pytest.raises(RequestError, match="A trace is running already"):
        await client.profile(running=True)
    with pytest.raises(RequestError, match="disk full"):
        await client.profile(running=False)
    with pytest.raises(EngineDeadError):
        await client.profile(running=False)


async def test_the_engine_gets_its_configuration_and_says_when_it_is_ready(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = await connect(
        """
send(StartupPhase(text="weights loaded in 1.0 s"))
ready(config["model"], str(config["max_model_len"]), str(config["dtype"]))
"""
    )
    info = await client.wait_ready()
    assert info.summary == ["/models/m", "99", "auto"]
    assert client.info is info
    assert "weights loaded in 1.0 s" in caplog.text
    client.check_serving()


async def test_nothing_is_served_before_the_engine_is_ready(connect: Connect) -> None:
    client = await connect("")
    for call in (client.check_serving, lambda: client.info, lambda: client.submit(add())):
        with pytest.raises(EngineStartingError):
            call()


@pytest.mark.parametrize(("user_error", "kind"), [("True", ModelLoadError), ("False", EngineDeadError)])
async def test_a_failed_start_is_told_in_the_engines_words(
    connect: Connect, user_error: str, kind: type[Exception]
) -> None:
    client = await connect(f'send(EngineFailed(message="no tensor x", user_error={user_error})); sys.exit(2)')
    with pytest.raises(kind, match=r"^no tensor x$"):
        await client.wait_ready()
    with pytest.raises(EngineDeadError):
        client.check_serving()


@pytest.mark.parametrize(
    ("prelude", "program", "words"),
    [
        ("import sys\n", "sys.exit(3)", "ended with status 3 before it connected"),
        (PRELUDE, "sys.exit(4)", "ended with status 4"),
        (PRELUDE, "os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
        (PRELUDE, "os.kill(os.getpid(), 9)", r"was killed by SIGKILL \(out of memory\?\)"),
        (PRELUDE, "sock.close(); time.sleep(60)", "closed its connection"),
    ],
)
async def test_an_engine_that_ends_during_the_start_is_told_with_its_status(
    connect: Connect, prelude: str, program: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "EXIT_STATUS_LIMIT_S", 0.2 if "closed" in words else 5.0)
    client = await connect(program, prelude=prelude)
    with pytest.raises(EngineDeadError, match=words):
        await client.wait_ready()


async def test_the_engine_process_is_kept_apart(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret")
    client = await connect(
        """
ready(str("JAXSERVE_API_KEY" in os.environ), str(os.getsid(0) == os.getpid()), oct(mode))
"""
    )
    has_key, own_session, mode = (await client.wait_ready()).summary
    assert has_key == "False"
    assert own_session == "True"  # Ctrl-C in the terminal does not reach it
    assert mode == oct(0o700)  # nobody else can connect first


async def test_jaxserve_is_importable_for_the_engine_from_any_directory(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    client = await connect("import jaxserve; ready(os.path.realpath(jaxserve.__path__[0]))")
    (path,) = (await client.wait_ready()).summary
    assert path == os.path.realpath(Path(engine_client.__file__).parent)


# --- requests -------------------------------------------------------------------------------------------------


async def test_a_request_gets_its_outputs_a_list_a_step(connect: Connect) -> None:
    client = await connect(
        """
ready()
first, second = receive(), receive()
step((first.request_id, 0, [1]), (second.request_id, 0, [7]), (first.request_id, 1, [2]))
step((second.request_id, 0, [8], {"finish_reason": "stop"}))
step((first.request_id, 1, [3], {"finish_reason": "length"}), (first.request_id, 0, [4, 5]))
step((first.request_id, 0, [6], {"finish_reason": "stop"}))
"""
    )
    await client.wait_ready()
    streams = client.submit(add("a", n=2)), client.submit(add("b"))
    assert await collect(streams[0]) == [[(0, [1]), (1, [2])], [(1, [3]), (0, [4, 5])], [(0, [6])]]
    assert await collect(streams[1]) == [[(0, [7])], [(0, [8])]]
    assert client.load == EngineLoad(0, 0, 0)


async def test_the_engine_gets_the_request_as_it_is(connect: Connect) -> None:
    client = await connect(
        """
ready()
r = receive()
got = [*r.prompt_token_ids, r.params.n, r.params.max_tokens, *r.eos_token_ids]
step((r.request_id, 0, got, {"finish_reason": "stop"}))
"""
    )
    await client.wait_ready()
    request = AddRequest(
        request_id="x", prompt_token_ids=[5, 6], params=SamplingParams(max_tokens=9), eos_token_ids=(2,)
    )
    assert await collect(client.submit(request)) == [[(0, [5, 6, 1, 9, 2])]]


async def test_load_counts_requests_until_they_are_scheduled(connect: Connect) -> None:
    client = await connect(
        """
ready()
receive(), receive()
step(("a", 0, [], {"scheduled_at": 1.0}))
receive()
end = {"finish_reason": "stop"}
step(("b", 0, [], end), ("a", 0, [1], end), ("a", 1, [1], end))
"""
    )
    await client.wait_ready()
    first, second = client.submit(add("a", prompt=3, n=2)), client.submit(add("b", prompt=5))
    assert client.load == EngineLoad(num_waiting_requests=2, num_waiting_tokens=8, num_sequences=3)
    await following(first)
    assert client.load == EngineLoad(num_waiting_requests=1, num_waiting_tokens=5, num_sequences=3)
    client.submit(add("c"))  # lets the script go on
    await collect(second)
    assert client.load == EngineLoad(num_waiting_requests=1, num_waiting_tokens=3, num_sequences=1)


async def test_every_steps_statistics_are_seen(connect: Connect) -> None:
    seen: list[EngineStats] = []
    client = await connect(
        "ready(); receive(); step(num_running=1, num_tokens=7); step(num_waiting=2, kv_cache_usage=0.5)",
        on_step=seen.append,
    )
    await client.wait_ready()
    client.submit(add())
    await until(lambda: len(seen) == 2)
    assert seen[0] == EngineStats(num_running=1, num_tokens=7)
    assert client.stats == seen[1] == EngineStats(num_waiting=2, kv_cache_usage=0.5)


# --- aborts ---------------------------------------------------------------------------------------------------

TELLS_ABORTS = """
ready()
while True:
    message = receive()
    if isinstance(message, AbortRequest):
        step((message.request_id, 0, [1]), num_tokens=len(message.indices or []) or 99)
"""


async def test_an_aborted_request_ends_here_and_in_the_engine_and_late_outputs_are_dropped(
    connect: Connect,
) -> None:
    seen: list[EngineStats] = []
    client = await connect(TELLS_ABORTS, on_step=seen.append)
    await client.wait_ready()
    stream = client.submit(add("a", n=2))
    client.abort("a")
    assert await collect(stream) == []
    assert client.load == EngineLoad()
    await until(lambda: bool(seen))  # with an output for it
    assert seen[0].num_tokens == 99
    assert client.load == EngineLoad()
    client.check_serving()


async def test_one_sequence_of_a_request_can_be_aborted(connect: Connect) -> None:
    seen: list[EngineStats] = []
    client = await connect(TELLS_ABORTS, on_step=seen.append)
    await client.wait_ready()
    stream = client.submit(add("a", n=3))
    client.abort("a", [0, 2])
    await until(lambda: bool(seen))
    assert seen[0].num_tokens == 2
    assert client.load.num_sequences == 1
    client.abort("a", [1])
    assert await collect(stream) == []  # the output that came was of sequence 0


async def test_the_abort_of_what_has_ended_is_not_sent(connect: Connect) -> None:
    seen: list[EngineStats] = []
    client = await connect(TELLS_ABORTS, on_step=seen.append)
    await client.wait_ready()
    client.abort("unknown")
    client.submit(add("a"))
    client.abort("a")
    client.abort("a")
    client.submit(add("b"))
    client.abort("b")
    await until(lambda: len(seen) == 2)  # frames keep their order: a third abort would have come between
    assert [stats.num_tokens for stats in seen] == [99, 99]


async def test_an_abort_wakes_whoever_waits(connect: Connect) -> None:
    client = await connect("ready()")
    await client.wait_ready()
    waiting = asyncio.create_task(collect(client.submit(add("a"))))
    await asyncio.sleep(0)
    client.abort("a")
    assert await asyncio.wait_for(waiting, 1) == []


async def test_all_streams_can_be_ended_with_an_error(connect: Connect) -> None:
    seen: list[EngineStats] = []
    client = await connect(TELLS_ABORTS, on_step=seen.append)
    await client.wait_ready()
    streams = [client.submit(add(name)) for name in "ab"]
    client.fail_all(RequestFailedError("time to go"))
    for stream in streams:
        with pytest.raises(RequestFailedError, match="time to go"):
            await following(stream)
    await until(lambda: len(seen) == 2)
    client.check_serving()


async def test_outputs_that_came_before_an_error_are_delivered_first(connect: Connect) -> None:
    client = await connect('ready(); receive(); step(("a", 0, [1])); sys.exit(1)')
    await client.wait_ready()
    stream = client.submit(add())
    assert [output.token_ids for output in await following(stream)] == [[1]]
    with pytest.raises(EngineDeadError):
        await following(stream)


# --- an engine that ends or hangs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("sys.exit(5)", "ended with status 5"),
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
        (
            'send(EngineFailed(message="XlaError: the engine failed", user_error=False)); sys.exit(1)',
            "XlaError",
        ),
        ('sock.sendall(struct.pack("<I", 3) + b"abc"); time.sleep(60)', "sent what cannot be read"),
        ('sock.sendall(struct.pack("<I", 2**31)); time.sleep(60)', "a frame of 2,147,483,648 bytes"),
        ("sock.close(); time.sleep(60)", "closed its connection"),
    ],
    ids=lambda text: text[:20],
)
async def test_an_engine_that_ends_fails_open_streams_and_takes_no_more(
    connect: Connect,
    program: str,
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_client, "EXIT_STATUS_LIMIT_S", 0.2 if "closed" in words else 5.0)
    client = await connect(
        f"ready(); receive(); step(num_running=1, num_waiting=2, kv_cache_usage=0.5)\n{program}"
    )
    await client.wait_ready()
    stream = client.submit(add())
    with pytest.raises(EngineDeadError):
        await following(stream)
    for call in (client.check_serving, lambda: client.submit(add("b"))):
        with pytest.raises(EngineDeadError):
            call()
    assert client.load == EngineLoad()
    await until(lambda: words in caplog.text)
    stats = client.stats  # nothing runs any more, whatever the last frame said
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    process = client._process
    assert process is not None
    await asyncio.wait_for(process.wait(), 2)  # also one that did not end by itself


async def test_a_silent_engine_with_work_has_stalled_until_it_speaks_again(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    client = await connect(
        """
ready()
receive()          # and says nothing, until the abort of the failed request
receive()
step()
receive()
step(("b", 0, [1], {"finish_reason": "stop"}))
""",
        stall_limit_s=0.1,
    )
    await client.wait_ready()
    stream = client.submit(add())
    with pytest.raises(EngineStalledError):
        await following(stream)
    assert "finished no step" in caplog.text
    await until(lambda: _serves(client))
    assert await collect(client.submit(add("b"))) == [[(0, [1])]]


async def test_a_stalled_engine_takes_no_requests(connect: Connect) -> None:
    client = await connect("ready(); receive()", stall_limit_s=0.05)
    await client.wait_ready()
    with pytest.raises(EngineStalledError):
        await following(client.submit(add()))
    for call in (client.check_serving, lambda: client.submit(add("b"))):
        with pytest.raises(EngineStalledError):
            call()


async def test_an_idle_engine_may_be_silent(connect: Connect) -> None:
    client = await connect(
        """
ready()
receive()
time.sleep(10 * 0.01)  # watched ten times
step(("a", 0, [1], {"finish_reason": "stop"}))
""",
        stall_limit_s=60.0,
    )
    await client.wait_ready()
    client._last_word -= 3600  # an hour has passed
    await asyncio.sleep(5 * engine_client.WATCH_INTERVAL_S)
    client.check_serving()
    assert await collect(client.submit(add())) == [[(0, [1])]]  # its time begins with its work


async def test_a_defect_in_the_callback_does_not_look_like_silence(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: EngineStats) -> None:
        raise RuntimeError("a defect")

    client = await connect("ready(); receive(); step()", on_step=broken)
    await client.wait_ready()
    with pytest.raises(EngineError):
        await following(client.submit(add()))
    assert "a defect" in caplog.text


# --- the end ----------------------------------------------------------------------------------------------------


async def test_stop_ends_the_process_and_reaps_it(connect: Connect) -> None:
    client = await connect(
        """
ready()
while not isinstance(receive(), Shutdown): pass
sys.exit(7)
"""
    )
    await client.wait_ready()
    process = client._process
    assert process is not None
    await client.stop()
    assert process.returncode == 7  # it was asked, not killed
    assert not psutil.pid_exists(process.pid)
    with pytest.raises(EngineDeadError):
        client.check_serving()
    await client.stop()  # twice does no harm


async def test_an_engine_that_does_not_listen_is_killed_with_its_children(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_client, "EXIT_GRACE_S", 0.1)
    client = await connect(
        """
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
ready(str(child.pid))
time.sleep(60)
"""
    )
    (child,) = (await client.wait_ready()).summary
    process = client._process
    assert process is not None
    await client.stop()
    assert process.returncode == -signal.SIGKILL
    await until(lambda: not _runs(int(child)))


async def test_stop_during_the_start_leaves_no_process(connect: Connect) -> None:
    client = await connect("time.sleep(60)")
    client.kill()
    await client.stop()
    process = client._process
    assert process is not None
    assert not psutil.pid_exists(process.pid)


async def test_the_sockets_folder_is_gone_once_the_engine_is_connected(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    client = await connect("ready()")
    await client.wait_ready()
    assert list(tmp_path.glob("jaxserve-*")) == []


def _serves(client: SocketEngineClient) -> bool:
    try:
        client.check_serving()
    except EngineStalledError:
        return False
    return True


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

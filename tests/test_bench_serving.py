"""`bench serving`: the driver that all engines share, its rows and bars, and the children that are stopped."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
import pytest
from aside import install_aside

from labutils.course.bench import serving
from labutils.course.bench.child import Child
from labutils.course.bench.serving import Bench, Settings, bench_serving, environment
from labutils.course.bench.serving_engines import ENGINES, Ours, drive
from labutils.course.bench.serving_profile import profile
from labutils.course.bench.serving_rows import ServingRow, as_markdown, as_table, judge, same_twice
from labutils.course.cli.main import main
from labutils.lab.models.gguf import export_gguf
from labutils.lab.models.load import load_model
from labutils.lab.models.tokenizer import chat_ids
from labutils.lab.paths import DATA, ROOT
from labutils.measurement.timing import paired_ratio

PROMPTS = [[1, 5 + i, 9, 40 + i, 7] for i in range(6)]


class Fake:
    """An engine that ends one request at a time, after 10 ms each, and remembers the most it held."""

    def __init__(self):
        self.there, self.most, self.sent = [], 0, []

    def submit(self, number, prompt, count):
        self.there.append((number, prompt[:count]))
        self.sent.append(time.perf_counter())
        self.most = max(self.most, len(self.there))

    def advance(self, timeout_s):
        time.sleep(0.01)
        number, text = self.there.pop(0)
        now = time.perf_counter()
        return [(number, now, now, text)]


@pytest.mark.parametrize("at_once", [1, 4])
def test_drive_keeps_so_many_clients_and_each_sends_when_it_is_answered(at_once):
    engine = Fake()
    found = drive(engine, {"prompts": PROMPTS, "new_tokens": 2, "at_once": at_once})
    assert engine.most == at_once and [r["text"] for r in found] == [prompt[:2] for prompt in PROMPTS]
    assert [r["arrived"] for r in found[:at_once]] == pytest.approx([0.0] * at_once, abs=0.005)
    assert found[at_once]["arrived"] >= found[0]["last"]  # not before a client was free


def test_drive_sends_at_the_given_times_whatever_the_engine_does():
    engine, arrivals = Fake(), [0.0, 0.0, 0.0, 0.05, 0.2, 0.2]
    began = time.perf_counter()
    found = drive(engine, {"prompts": PROMPTS, "new_tokens": 2, "arrivals": arrivals})
    assert [r["arrived"] for r in found] == arrivals and engine.most == 3
    sent = [at - began for at in engine.sent]
    assert all(due <= at for due, at in zip(arrivals, sent, strict=True)) and sent[3] < 0.2
    assert found[2]["first"] - found[2]["arrived"] >= 0.03  # the wait behind two others counts


@pytest.fixture(scope="module")
def ours():
    return Ours(str(DATA / "lablm-small"), 1)


def test_ours_writes_each_request_s_text_and_shares_no_prefix(ours):
    long = [[*PROMPTS[0]] * 8] * 3
    together = drive(ours, {"prompts": PROMPTS + long, "new_tokens": 6, "at_once": 9})
    alone = drive(ours, {"prompts": PROMPTS + long, "new_tokens": 6, "at_once": 1})
    assert [r["text"] for r in together] == [r["text"] for r in alone]
    assert all(0 <= r["arrived"] < r["first"] < r["last"] for r in together) and not ours.numbers
    pool = ours.engine.scheduler.pool
    names = set(pool.block_of)
    drive(ours, {"prompts": long, "new_tokens": 6, "at_once": 3})
    assert len(set(pool.block_of) - names) >= 3 * (len(long[0]) // pool.block_size)  # all computed anew


def test_profile_says_where_the_time_goes_and_leaves_the_engine_as_it_was(ours):
    shares = profile(ours, {"prompts": PROMPTS, "new_tokens": 6, "at_once": 4})
    assert set(shares) == {"matrices", "attention, norms, cache", "head", "sampling", "scheduler"}
    assert 0.7 < sum(shares.values()) < 1.01 and min(shares.values()) >= 0
    assert min(shares[part] for part in ("matrices", "head", "sampling", "scheduler")) > 0
    assert "read" not in vars(ours.engine.model) and "schedule" not in vars(ours.engine.scheduler)


def row(engine, speed, *, bits=8, at_once=8, rate=None, model="lablm", slow=0.0):
    seconds = 2 * 11 / speed
    times = ((0.0, 0.5, seconds), (0.1, 0.7 + slow, seconds - 0.1))
    return ServingRow(
        engine=engine, model=model, bits=bits, threads=1, new_tokens=11, rounds=(times,) * 5, at_once=at_once, rate=rate
    )


def test_a_row_s_speed_and_times_by_hand():
    one = row("ours int8", 11.0)  # 22 tokens until second 2
    assert one.samples == pytest.approx((11.0,) * 5)
    assert one.ttft_s[:2] == pytest.approx([0.5, 0.6]) and one.tpot_s[:2] == pytest.approx([0.15, 0.12])
    assert one.good_share == 0
    objectives = ServingRow(**{**vars(one), "ttft_slo_s": 0.55, "tpot_slo_s": 0.2})
    assert objectives.good_share == 0.5
    told = one.to_json()
    assert told["tokens_per_s"] == pytest.approx(11) and told["rounds"][0][0] == [0.0, 0.5, 2.0]
    assert told["ttft_s"]["p50"] == pytest.approx(0.55) and told["host"]
    json.dumps(told)


def test_judge_compares_equal_bits_and_explains_a_miss():
    rows = [row("ours int8", 22.0), row("ours int8, again", 20.0), row("ours float32", 9.0, bits=32)]
    rows += [row("llama.cpp Q8_0", 20.0), row("llama.cpp F32", 10.0, bits=32), row("vLLM float32", 5.0, bits=32)]
    rows += [row("llama.cpp Q8_0", 1.0, at_once=1), row("ours int8", 1.0, at_once=1)]
    shares = {"ours float32": {"matrices": 0.75, "head": 0.25}}
    bars = {bar.claim: bar for bar in judge(rows, shares, large=False)}
    assert len(bars) == 3
    assert bars["lablm, 8 at once: ours int8 at least 1.0 times llama.cpp Q8_0"].holds
    missed = bars["lablm, 8 at once: ours float32 at least 1.0 times llama.cpp F32"]
    assert not missed.holds and missed.measured.endswith("time: 75% matrices, 25% head")
    assert not bars["lablm, 8 at once: ours int8 at least 5.0 times vLLM float32"].holds  # 22 against 5
    large = judge(rows, shares, large=True)
    assert [bar.holds for bar in large] == [False, False] and "1.2 times llama.cpp" in large[0].claim
    assert judge([], {}, large=True) == []


def test_the_pair_of_one_engine_and_the_table():
    rows = [row("ours int8", 22.0), row("ours int8, again", 20.0), row("vLLM", 1.0, at_once=None, rate=2.5)]
    assert same_twice(rows) == ["A/A, lablm, 8 at once: 1.10x [1.10, 1.10]"]
    lines = as_table(rows[::-1]).splitlines()
    assert [line.split()[0] for line in lines] == ["load", "8", "8", "2.5"]
    assert "20.0" in lines[1] + lines[2] and "requests/s" in lines[3]


ECHO = "import sys\nprint('ready', flush=True)\nfor line in sys.stdin: print(line.strip(), flush=True)"


def test_a_child_answers_and_is_stopped_otherwise():
    child = Child([sys.executable, "-c", ECHO])
    try:
        assert child.ask({"a": [1]}) == {"a": [1]} and child.ask(2) == 2
        assert psutil.Process(child.process.pid).status() == psutil.STATUS_STOPPED
    finally:
        child.close()
    assert child.process.poll() is not None
    child.close()  # once more does nothing


def test_a_stopped_child_does_not_outlive_a_parent_that_is_killed():
    program = f"""import os, signal
from labutils.course.bench.child import Child
child = Child([{sys.executable!r}, "-c", {ECHO!r}])
print(child.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | environment(1)
    )
    pid, until = int(result.stdout), time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.05)


@pytest.mark.parametrize(
    "code", ["raise ValueError('no weights')", "print('ready', flush=True); raise ValueError('no weights')"]
)
def test_a_child_that_ends_says_why(code):
    with pytest.raises(RuntimeError, match="ended with code 1: ValueError: no weights"):
        Child([sys.executable, "-c", code]).ask(1)


def test_an_engine_that_cannot_start_is_left_out_with_a_sentence(tmp_path):
    bench, said = Bench.__new__(Bench), []
    bench.settings, bench.folder, bench.say, bench.ways = Settings(), tmp_path, said.append, {}
    assert bench._add("vLLM", "vllm", 32, {}, python=str(tmp_path / "python")) is None
    assert bench.ways == {} and "vLLM is left out" in said[0]


def test_bad_settings_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match="new_tokens of at least 2; got 1"):
        bench_serving(Settings(new_tokens=1))
    with pytest.raises(ValueError, match="at least 5 repeats; got 2"):
        bench_serving(Settings(rounds=2))


@pytest.mark.slow
def test_llama_cpp_writes_as_many_tokens_of_the_same_text(tmp_path):
    """Up to the end of an answer: told to go on, llama.cpp never chooses that token (2026.10.11549)."""
    install_aside(tmp_path / "aside", ["xllamacpp==2026.10.11549"])
    model, tokenizer = load_model("lablm-small")
    export_gguf(model, tokenizer, tmp_path / "m.gguf", format="F32")
    code = [tokenizer(text).input_ids for text in ("def add(a, b):", "import os\n", "class Stack:")]
    chat = chat_ids(tokenizer, [{"role": "user", "content": "Where is my order A12345?"}], add_generation_prompt=True)
    told = json.dumps(["llama.cpp", {"folder": str(tmp_path / "m.gguf"), "threads": 1}])
    paths = environment(1) | {"PYTHONPATH": os.pathsep.join([environment(1)["PYTHONPATH"], str(tmp_path / "aside")])}
    child = Child([sys.executable, "-m", "labutils.course.bench.serving_engines", told], environment=paths)
    bench = Bench.__new__(Bench)
    bench.tokenizer = tokenizer
    try:
        for prompts, count in ((code, 8), ([chat], 40)):
            job = {"prompts": prompts, "new_tokens": count, "at_once": 3}
            found, expected = child.ask(job), drive(Ours(str(DATA / "lablm-small"), 1), job)
            assert all(bench._same(ll["text"], ours["text"]) for ll, ours in zip(found, expected, strict=True))
            assert not bench._same(found[0]["text"], [*expected[0]["text"][:3], 9])
            assert all(0 <= r["arrived"] < r["first"] < r["last"] for r in found)
    finally:
        child.close()
    assert tokenizer.eos_token_id in expected[0]["text"][:-1]


class InProcess:
    """A child without a process of its own: a test has no peers to stop."""

    def __init__(self, command, *, environment):
        name, settings = json.loads(command[-1])
        self.engine, self.settings = ENGINES[name](**settings), settings

    def ask(self, job):
        return (profile if job.get("profile") else drive)(self.engine, json.loads(json.dumps(job)))

    def close(self):
        self.engine = None


@pytest.mark.slow
def test_the_command_measures_ours_and_stores_raw_times(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serving, "Child", InProcess)
    assert main(["bench", "serving", "--quick", "--no-speed-model", "--json", str(tmp_path / "rows.jsonl")]) == 0
    said = capsys.readouterr().out
    assert said.count("float32 texts equal those of each request alone; measured 8/8") == 1
    assert said.count("A/A, lablm") == 2 and "time of ours int4: " in said and "left out" not in said
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2 and all(len(r["rounds"]) == 5 and len(r["rounds"][0]) >= 4 for r in rows)
    arrivals = [[[t[0] for t in times] for times in r["rounds"]] for r in rows if r["rate"]]
    assert len(arrivals) == 4 and all(times == arrivals[0] for times in arrivals)  # the same for every engine
    assert len({tuple(times) for times in arrivals[0]}) == 1  # and in every round


def test_a_wrong_text_is_a_bar_that_fails(monkeypatch):
    """An engine that takes a neighbour's token is found before anything is timed."""
    monkeypatch.setattr(serving, "Child", InProcess)
    with ExitStack() as stack:
        bench, said = Bench.__new__(Bench), []
        bench.settings, bench.say, bench.bars, bench.name = Settings(new_tokens=3), said.append, [], "small"
        bench.model, bench.tokenizer = load_model("lablm-small")
        bench.folder, bench.stack, bench.ways, bench.prompts = DATA / "lablm-small", stack, {}, PROMPTS
        engine = bench._add("ours float32", "ours", 32, {"bits": 32}).child.engine
        bench._compare()
        plain = engine.engine.model
        engine.engine.model = lambda step: plain(step).roll(1, 0)  # each gets its neighbour's logits
        bench._compare()
    assert [bar.holds for bar in bench.bars] == [True, False]
    assert bench.bars[0].measured == "6/6" and "ours float32: 6/6 texts the same" in said[0]


def test_the_readme_shows_the_stored_run():
    """Its table, and how far an engine of ours is from itself."""
    rows = [json.loads(line) for line in (DATA / "results" / "serving.jsonl").read_text().splitlines()]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert as_markdown(rows, at_once=8) in readme
    for model in {row["model"] for row in rows}:
        here = {row["engine"]: row for row in rows if row["model"] == model and row["at_once"] == 8}
        samples = [
            [row["new_tokens"] * len(times) / max(last for *_, last in times) for times in row["rounds"]]
            for row in (here["ours int8"], here["ours int8, again"])
        ]
        ratio = paired_ratio(*samples)
        assert f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" in readme.replace("\n", " ")
    assert all(row["same_text"].split()[0] in ("32/32", "16/16") for row in rows if row["bits"] == 32)

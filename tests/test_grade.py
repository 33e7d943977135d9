"""`grade`: a class of hand-ins of every kind; none spoils another's grade."""

import csv
import os
import sys
import time
import uuid
from argparse import ArgumentParser

import psutil
import pytest
from hand_ins import (
    CHAPTER_00,
    RIGHT,
    ROOT,
    RRR,
    SPEED,
    as_saved_by_colab,
    demo_course,
    kinds,
    learner,
    mixed_chapter_00,
    of_chapter_00,
    save,
    small_chapter_00,
    unusable,
    vandal,
)

from labutils.course import grade as module
from labutils.course.cli import grade as command
from labutils.course.contained import Limits, folder_bytes, run_contained
from labutils.course.grade import COLUMNS, Options, find_hand_ins, grade, rows, summary, write_csv
from labutils.course.hand_in import UnusableError, read_hand_in

LIMITS = Limits(time_s=1200, memory_bytes=1 << 30, processes=20, disk_bytes=100_000_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return demo_course(tmp_path_factory.mktemp("grade"))


def read_csv(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def make_class(root, folder, names):
    """Hand-ins of the named kinds, all unusable ones and a link; the verdicts that they deserve."""
    every, expected = kinds(root), {}
    for number, name in enumerate(names):
        path = save(every[name][0], folder / f"learner_{number:02d}_{name}" / "90_demo.ipynb")
        expected[path.relative_to(folder).as_posix()] = every[name][1]
    for path in unusable(folder / "odd"):
        expected[path.relative_to(folder).as_posix()] = ("unusable",)
    if hasattr(os, "symlink") and sys.platform != "win32":
        (folder.parent / "secret.txt").write_text("not a hand-in", encoding="utf-8")
        (folder / "odd" / "link.ipynb").symlink_to(folder.parent / "secret.txt")
        expected["odd/link.ipynb"] = ("unusable",)
    return expected


def assert_table(table, expected):
    found: dict[str, tuple] = {}
    for row in table:
        found[row["hand_in"]] = (*found.get(row["hand_in"], ()), row["verdict"])
    assert found == expected
    assert all((row["verdict"] == "right") == (int(row["points"]) == 1) for row in table)


def test_grade_a_small_class(root, tmp_path):
    """Eight hand-ins: two run, six are unusable; then again, which runs nothing."""
    folder, out = tmp_path / "class", tmp_path / "out"
    expected = make_class(root, folder, ["cheated", "partly"])
    options = Options(root, timeout_s=300, limits=LIMITS, jobs=2)
    assert_table(grade(folder, out, options, say=lambda _: None), expected)
    table = read_csv(out / "grades.csv")
    assert_table(table, expected)
    assert tuple(table[0]) == COLUMNS
    cheats = [row for row in table if "cheated" in row["hand_in"]]
    assert "upside down" in cheats[0]["hint"]
    assert ["deleted or changed" in row["note"] for row in cheats] == [True, True, False]
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert "| learner_00_cheated/90_demo.ipynb | 90_demo | 1 | 3 | 90.1 wrong, 90.2 wrong | check deleted" in text
    assert "1 × 90.1 tokens_per_second: upside down" in text


@pytest.mark.slow
def test_grade_a_class_of_thirty(root, tmp_path, capsys):
    folder, out = tmp_path / "class", tmp_path / "out"
    expected = make_class(root, folder, [*kinds(root), "partly"])
    save(vandal(root, folder), folder / "learner_00_a_vandal" / "90_demo.ipynb")
    expected["learner_00_a_vandal/90_demo.ipynb"] = RRR
    assert len(expected) == 30
    said, begin = [], time.monotonic()
    options = Options(root, timeout_s=40, limits=LIMITS, jobs=4)  # two wait for their time
    table = grade(folder, out, options, say=lambda line: (said.append(line), print(line)))
    with capsys.disabled():
        print(f"\nthirty hand-ins graded in {time.monotonic() - begin:.0f} s")
    assert_table(table, expected)
    assert sum("was changed while grading" in line for line in said) == 29  # all but the link, which is not followed


@pytest.mark.slow
def test_grade_the_real_chapter_00(tmp_path, capsys, monkeypatch):
    """All right as Colab saves it; one verdict of each kind; an answer that kills the kernel."""
    names = ("tokens_per_second", "bits_per_byte", "best_tokens_per_s", "predict_all", "refuted", "clock_cycles")
    names += ("lying_settings",)
    exits = "def predict_all(model, batches):\n    import os\n    os._exit(0)"
    right, mixed = dict.fromkeys(names, "right"), mixed_chapter_00(ROOT)
    hand_ins = {
        "a.ipynb": (as_saved_by_colab(of_chapter_00(ROOT, **right)), ("right",) * 7),
        "b.ipynb": mixed,
        "c.ipynb": (
            of_chapter_00(ROOT, **right | {"predict_all": exits}),
            ("right",) * 3 + ("killed kernel",) + ("right",) * 3,
        ),
    }
    for name, (notebook, _) in hand_ins.items():
        save(notebook, tmp_path / "class" / name)
    begin = time.monotonic()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the course's code; its folder holds one notebook
    options = Options(small_chapter_00(tmp_path / "course"), timeout_s=300, jobs=2)
    table = grade(tmp_path / "class", tmp_path / "out", options, say=print)
    with capsys.disabled():
        print(f"\nthree hand-ins of {CHAPTER_00} graded in {time.monotonic() - begin:.0f} s")
    assert_table(table, {name: verdicts for name, (_, verdicts) in hand_ins.items()})
    mixed_rows = {row["exercise"].split(" ")[0]: row for row in table if row["hand_in"] == "b.ipynb"}
    assert "nats per byte" in mixed_rows["0.2"]["hint"] and "deleted or changed" in mixed_rows["0.2"]["note"]


@pytest.fixture(autouse=True)
def left_behind(monkeypatch):
    """The processes that this test has started and that still live: asserted to be none at its end.

    All that a test starts sleeps for minutes: what is gone a moment after its end was killed, not finished.
    """
    monkeypatch.setenv("LABUTILS_TEST", uuid.uuid4().hex)
    yield
    end = time.monotonic() + 60
    while (mine := [process for process in psutil.process_iter() if is_mine(process)]) and time.monotonic() < end:
        time.sleep(0.2)
    assert mine == []


def is_mine(process):
    try:
        mine = process.environ().get("LABUTILS_TEST") == os.environ["LABUTILS_TEST"]
        return mine and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def fake_result(*_):
    return {"chapter": "90_demo", "verdicts": [verdict("right")], "notes": [], "seconds": 1.0}


def verdict(word, hint="", note=""):
    return {"exercise": "90.1 a", "verdict": word, "hint": hint, "details": "", "note": note}


def test_grade_goes_on_where_it_was_stopped(root, tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        save(learner(root, tokens_per_second=SPEED + f"    return '{name}'"), tmp_path / "class" / f"{name}.ipynb")
    ran = []

    def stops(name, content, options):
        ran.append(name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return fake_result()

    monkeypatch.setattr(module, "check_contained", stops)
    options = Options(root)
    with pytest.raises(KeyboardInterrupt):
        grade(tmp_path / "class", tmp_path / "out", options, say=lambda _: None)
    done = list(ran)
    table = grade(tmp_path / "class", tmp_path / "out", options, say=lambda _: None)
    assert len(table) == 3 and done[:2] == ["a.ipynb", "b.ipynb"]
    assert "a.ipynb" not in ran[len(done) :] and "b.ipynb" in ran[len(done) :]
    ran.clear()
    grade(tmp_path / "class", tmp_path / "out", options, say=lambda _: None)
    assert ran == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are text")
def test_names_that_are_no_utf_8_are_graded_and_told(root, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "class"
    for name in (b"jos\xe9.ipynb", b"ren\xe9e/a.ipynb", "好.ipynb".encode()):
        save(learner(root), folder / os.fsdecode(name))
    monkeypatch.setattr(module, "check_contained", fake_result)
    names = {row["hand_in"] for row in grade(folder, tmp_path / "out", Options(root))}
    assert names == {r"jos\xe9.ipynb", r"ren\xe9e/a.ipynb", "好.ipynb"}
    assert {row["hand_in"] for row in read_csv(tmp_path / "out" / "grades.csv")} == names
    assert r"jos\xe9.ipynb: 1 of 1 right" in capsys.readouterr().out
    broken = folder / os.fsdecode(b"\xff.ipynb")
    broken.write_bytes(b"{")
    with pytest.raises(UnusableError, match=r"^\\xff\.ipynb: not a notebook"):
        read_hand_in(broken)


def test_grade_runs_again_what_changed(root, tmp_path, monkeypatch):
    path = save(learner(root), tmp_path / "class" / "a.ipynb")
    ran = []
    monkeypatch.setattr(module, "check_contained", lambda name, *_: ran.append(name) or fake_result())

    def go(**changes):
        grade(tmp_path / "class", tmp_path / "out", Options(root, **changes), say=lambda _: None)
        return len(ran)

    assert (go(), go()) == (1, 1)
    save(learner(root, **RIGHT), path)
    assert go() == 2
    assert go(timeout_s=7) == 3
    next((tmp_path / "out" / "results").iterdir()).write_text("{", encoding="utf-8")
    for file in (tmp_path / "out" / "results").iterdir():
        file.write_text("half a fi", encoding="utf-8")
    assert go() == 4


def test_grade_is_of_what_was_handed_in_though_another_hand_in_overwrites_it(root, tmp_path, monkeypatch):
    first, second = (save(learner(root), tmp_path / "class" / f"{name}.ipynb") for name in ("a", "b"))
    before, graded, said = second.read_bytes(), {}, []

    def overwrite(name, content, options):
        graded[name] = content
        second.write_text("gone", encoding="utf-8")
        return fake_result()

    monkeypatch.setattr(module, "check_contained", overwrite)
    grade(tmp_path / "class", tmp_path / "out", Options(root), say=said.append)
    assert graded == {"a.ipynb": first.read_bytes(), "b.ipynb": before}
    assert [line for line in said if "was changed while grading" in line][0].startswith("warning: b.ipynb")


def test_grade_stops_when_the_course_itself_was_changed(tmp_path, monkeypatch):
    root = demo_course(tmp_path)
    save(learner(root), tmp_path / "class" / "a.ipynb")

    def poison(*_):
        (root / "demo_checks.py").write_text("tokens_per_second = quantize = print", encoding="utf-8")
        return fake_result()

    monkeypatch.setattr(module, "check_contained", poison)
    with pytest.raises(RuntimeError, match="fresh copy"):
        grade(tmp_path / "class", tmp_path / "out", Options(root), say=lambda _: None)
    assert not list((tmp_path / "out" / "results").iterdir()) and not (tmp_path / "out" / "grades.csv").exists()


def test_find_hand_ins_leaves_out_checkpoints_links_and_its_own_folder(tmp_path):
    for name in ("a/x.ipynb", "b/.ipynb_checkpoints/x.ipynb", "out/x.ipynb", "a/notes.txt", "B.IPYNB"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}", encoding="utf-8")
    if sys.platform != "win32":
        (tmp_path / "loop").symlink_to(tmp_path)
    found = [path.relative_to(tmp_path).as_posix() for path in find_hand_ins(tmp_path, tmp_path / "out")]
    assert found == ["B.IPYNB", "a/x.ipynb"]


def test_csv_holds_no_formula_and_no_control_characters(tmp_path):
    result = {"chapter": "90_demo", "verdicts": [verdict("wrong", "=HYPERLINK(1)\n\x1b[31mred", "@x")]}
    write_csv(tmp_path / "grades.csv", rows("-evil.ipynb", result))
    row = read_csv(tmp_path / "grades.csv")[0]
    assert (row["hand_in"], row["hint"], row["note"]) == ("'-evil.ipynb", "'=HYPERLINK(1) | red", "'@x")


def test_summary_of_a_name_with_a_bar_stays_a_table():
    text = summary(rows("a|b.ipynb", {"chapter": "90_demo", "verdicts": [verdict("right")]}))
    assert "a\\|b.ipynb" in text


def test_command_without_hand_ins(tmp_path, capsys):
    parser = ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(tmp_path)])) == 2
    assert "holds .ipynb files" in capsys.readouterr().err
    assert "RUNS AS CODE" in command.HELP


def contained(tmp_path, code, **limits):
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return run_contained([sys.executable, "-S", "-c", code], folder=tmp_path, env=env, limits=Limits(**limits))


def test_contained_gives_status_and_output(tmp_path):
    ended = contained(tmp_path, "print('hello'); raise SystemExit(3)")
    assert (ended.status, ended.reason) == (3, "")
    assert (tmp_path / "output.txt").read_text(encoding="utf-8").strip() == "hello"


@pytest.mark.parametrize(
    ("code", "limits", "reason"),
    [
        ("while True: pass", {"time_s": 1.0}, "time"),
        ("x = bytearray(300_000_000); import time; time.sleep(600)", {"memory_bytes": 200 << 20}, "memory"),
        ("while True: print('x' * 100_000)", {"disk_bytes": 1_000_000}, "disk"),
        (
            "import subprocess, sys, time\n"
            "all = [subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']) for _ in range(9)]\n"
            "time.sleep(600)",
            {"processes": 5},
            "processes",
        ),
    ],
)
def test_contained_ends_what_goes_beyond_a_limit(tmp_path, code, limits, reason):
    assert contained(tmp_path, code, **{"time_s": 300.0, **limits}).reason == reason


def test_contained_gives_an_inner_limit_the_time_to_act_first(tmp_path):
    """Over the limit for a moment is no end with a grace; over it for longer is."""
    pile = "x = bytearray(300_000_000); import time; time.sleep({}); x = None; time.sleep(2)"
    limits = {"memory_bytes": 200 << 20, "grace_s": 120.0}
    assert contained(tmp_path, pile.format(1.5), **limits).reason == ""
    assert contained(tmp_path, pile.format(600), **limits | {"grace_s": 1.0}).reason == "memory"


@pytest.mark.skipif(sys.platform == "win32", reason="sessions are POSIX")
def test_contained_ends_a_detached_grandchild(tmp_path):
    child = "import time; time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {child!r}], start_new_session=True)"
    contained(tmp_path, code)


def test_folder_bytes_follows_no_link(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    if sys.platform != "win32":
        (tmp_path / "link").symlink_to("/usr")
    assert 5 <= folder_bytes(tmp_path) < 200

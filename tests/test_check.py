"""`check`: a verdict for each kind of answer, and never a change to the learner's file."""

import hashlib
import json
import subprocess
import sys
from argparse import ArgumentParser

import pytest
from hand_ins import (
    EATS,
    EXIT,
    FORKS,
    INTRUSIONS,
    LIES,
    LOOP,
    NAMES,
    PRINTS,
    RIGHT,
    STUBBORN_LOOP,
    TEXTS,
    WRONG_QUANTIZE,
    WRONG_SPEED,
    as_saved_by_colab,
    cell_of,
    cheated,
    demo_course,
    learner,
    save,
    unusable,
)

from labutils.course import verdicts
from labutils.course.check import (
    CELL_TIMEOUT_S,
    SANITIZER,
    Report,
    _command,
    _environment,
    as_text,
    cell_timeout_s,
    check_notebook,
    prepared,
)
from labutils.course.cli import check as command
from labutils.course.cli import grade as grade_command
from labutils.course.contained import Limits
from labutils.course.grade import Options
from labutils.course.hand_in import UnusableError, find_reference, read_hand_in
from labutils.course.verdicts import Verdict, judge

TITLES = [f"90.{number} {name}" for number, name in enumerate(NAMES, start=1)]
TIMEOUT_S = 15.0  # a cell of the demonstration imports no torch: hundredths of a second, on an overloaded machine some


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return demo_course(tmp_path_factory.mktemp("check"))


def checked(notebook, root, tmp_path, **options):
    path = save(notebook, tmp_path / "my_answers.ipynb")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    report = check_notebook(path, root, timeout_s=options.pop("timeout_s", 120.0), **options)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    return report


def words(report):
    return tuple(verdict.verdict for verdict in report.verdicts)


def test_check_wrong_syntax_blank(root, tmp_path):
    answers = {"tokens_per_second": WRONG_SPEED, "quantize": "def quantize(values"}
    notebook = learner(root, **answers)
    for name, title in zip(NAMES, TITLES, strict=True):  # saved with the outputs of a pass, as after a lucky run
        printed = {"output_type": "stream", "name": "stdout", "text": [f"✓ {title}\n"]}
        cell_of(notebook, "CHECK", name).update(outputs=[printed], execution_count=3)
    report = checked(notebook, root, tmp_path)
    assert words(report) == ("wrong", "syntax error", "blank")
    wrong = report.verdicts[0]
    assert "upside down" in wrong.hint
    assert "tokens=10, seconds=4.0" in wrong.details
    assert "incomplete input (line 2)" in report.verdicts[1].hint
    assert not report.is_right


def test_check_right_as_saved_by_colab(root, tmp_path):
    report = checked(as_saved_by_colab(learner(root, **RIGHT)), root, tmp_path)
    assert (words(report), report.notes) == (("right", "right", "right"), [])
    assert report.is_right


def test_check_cheated_missing_doubled(root, tmp_path):
    notebook = cheated(root)
    notebook["cells"].append(cell_of(notebook, "EXERCISE", "quantize"))
    notebook["cells"].remove(cell_of(notebook, "EXERCISE", "weight_bytes"))
    report = checked(notebook, root, tmp_path)
    assert words(report) == ("wrong", "doubled", "missing")
    assert [bool(verdict.note) for verdict in report.verdicts] == [True, True, False]


@pytest.mark.slow
def test_check_text_and_names_of_one_answer_spoil_no_other(root, tmp_path):
    odd = {"tokens_per_second": "\n".join(INTRUSIONS.values()), "quantize": "\n".join(TEXTS.values())}
    notebook = learner(root, **{name: "\n".join([RIGHT[name], odd.get(name, "")]) for name in NAMES})
    report = checked(notebook, root, tmp_path)
    assert (words(report), report.notes) == (("right", "right", "right"), [])


@pytest.mark.slow
def test_check_an_error_with_half_an_emoji_is_a_verdict_like_any_other(root, tmp_path):
    raises = "raise ValueError('cut off: \\ud83d')"
    report = checked(learner(root, **RIGHT | {"tokens_per_second": raises, "quantize": WRONG_QUANTIZE}), root, tmp_path)
    assert words(report) == ("wrong", "wrong", "right")
    assert "cut off: ?" in report.verdicts[0].hint and "divide" in report.verdicts[1].hint


@pytest.mark.slow
def test_check_loop_and_killed_kernel_leave_the_rest_its_verdict(root, tmp_path):
    report = checked(
        learner(root, **RIGHT | {"tokens_per_second": LOOP, "quantize": EXIT}), root, tmp_path, timeout_s=TIMEOUT_S
    )
    assert words(report) == ("endless loop", "killed kernel", "right")


@pytest.mark.slow
def test_check_stubborn_loop_is_ended(root, tmp_path):
    report = checked(learner(root, **RIGHT | {"tokens_per_second": STUBBORN_LOOP}), root, tmp_path, timeout_s=TIMEOUT_S)
    assert words(report) == ("endless loop", "right", "right")


@pytest.mark.slow
def test_check_endless_output_and_lies(root, tmp_path):
    report = checked(learner(root, **RIGHT | {"tokens_per_second": LIES, "quantize": PRINTS}), root, tmp_path)
    assert words(report) == ("wrong", "wrong", "right")
    assert "prints more" in report.verdicts[1].hint


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "hint"), [(FORKS, "too many processes"), (EATS, "more memory")])
def test_check_ends_what_takes_too_much(answer, hint, root, tmp_path):
    limits = Limits(memory_bytes=1 << 30, processes=20)
    report = checked(learner(root, **RIGHT | {"quantize": answer}), root, tmp_path, limits=limits)
    assert words(report) == ("right", "killed kernel", "right")
    assert hint in report.verdicts[1].hint


def test_prepared_compares_only_the_checks_and_drops_tags_and_outputs(root):
    cells = read_hand_in(root / "notebooks" / "solutions" / "90_demo.ipynb")
    reference = find_reference(root, cells, "90_demo.ipynb")
    notebook = prepared(cells, reference.exercises)
    for index, cell in enumerate(notebook.cells):
        is_check = index in {exercise.check for exercise in reference.exercises}
        if cell.cell_type == "code":
            assert ("# NBVAL_CHECK_OUTPUT" in cell.source) == is_check == bool(cell.outputs)
            assert (cell.execution_count == 1) == is_check
            assert "tags" not in cell.metadata


def test_prepared_disarms_nbval_comments_of_the_learner(root):
    cells = read_hand_in(root / "notebooks" / "solutions" / "90_demo.ipynb")
    exercises = find_reference(root, cells, "90_demo.ipynb").exercises
    cells[exercises[0].cell]["source"] += "\n# NBVAL_SKIP\n  # NBVAL_RAISES_EXCEPTION"
    source = prepared(cells, exercises).cells[exercises[0].cell].source
    assert "# NBVAL" not in source


def test_run_has_a_cell_timeout_an_ascii_sanitizer_and_no_plugin_of_the_user(monkeypatch, tmp_path):
    """A dead kernel waits out the timeout; nbval reads the sanitizer as the locale has it; xdist splits a run."""
    parser = ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args(["x.ipynb"]).timeout is Options(tmp_path).timeout_s is None  # the chapter's own
    parser = ArgumentParser()
    grade_command.add_arguments(parser)
    assert parser.parse_args(["folder"]).timeout is None  # what was right at home is right in class
    assert (cell_timeout_s("00_start_here"), cell_timeout_s("09_distributed_inference")) == (CELL_TIMEOUT_S, 300)
    assert "--nbval-cell-timeout=120" in _command(CELL_TIMEOUT_S) and SANITIZER.isascii()
    monkeypatch.setenv("PYTEST_ADDOPTS", "-n 2 --dist load")
    environment = _environment(tmp_path, tmp_path)
    assert "PYTEST_ADDOPTS" not in environment and environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "1"


def test_judge_takes_no_silence_for_a_pass():
    done = {"passed": True}
    silent = {"passed": False, "ename": "", "evalue": "", "message": "Cell outputs differ", "stdout": ""}
    assert judge("90.1 speed", done, silent).verdict == "wrong"
    other = silent | {"stdout": "a word more\n✓ 90.1 speed\n"}
    assert judge("90.1 speed", done, other).verdict == "right"
    assert judge("90.1 speed", done, other | {"ename": "ValueError"}).verdict == "wrong"


def test_find_reference_by_exercises_whatever_the_file_is_called(root):
    cells = read_hand_in(root / "notebooks" / "90_demo.ipynb")
    assert find_reference(root, cells, "Kopie von meine Lösung.ipynb").stem == "90_demo"


def test_read_hand_in_refuses_what_is_no_notebook(tmp_path, root):
    for path in unusable(tmp_path):
        with pytest.raises(UnusableError, match=path.stem):
            find_reference(root, read_hand_in(path), path.name)
    with pytest.raises(UnusableError, match="no such file"):
        read_hand_in(tmp_path / "absent.ipynb")


def test_read_hand_in_survives_odd_cells(tmp_path):
    path = tmp_path / "odd.ipynb"
    path.write_text(json.dumps({"cells": [1, {}, {"cell_type": "code", "source": [2, "a"]}]}), encoding="utf-8")
    empty = {"cell_type": "", "source": "", "tags": []}
    assert read_hand_in(path) == [empty, {"cell_type": "code", "source": "a", "tags": []}]


def read_source(tmp_path, source):
    path = tmp_path / "source.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": source}]}), encoding="utf-8")
    return read_hand_in(path)[0]["source"]


def test_read_hand_in_joins_lines_that_lack_their_ends(tmp_path):
    text = "# EXERCISE quantize\ndef quantize(values):\n\n    return 'a\u2028b'"
    assert read_source(tmp_path, text.split("\n")) == text
    assert read_source(tmp_path, text.splitlines(keepends=True)) == text  # cut at the U+2028 too, as nbformat does
    assert read_source(tmp_path, ["a\n", "b", "c"]) == "a\nb\nc"
    assert read_source(tmp_path, ["a\r\n", "b"]) == "a\r\nb" and read_source(tmp_path, []) == ""


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("# cut off \ud83d", "# cut off \ufffd"),
        ("\udc00\ud83d\ude00", "\ufffd\U0001f600"),
        (["# one pair, two lines \ud83d", "\ude00"], "# one pair, two lines \ufffd\n\ufffd"),
    ],
)
def test_read_hand_in_gives_text_that_utf_8_can_hold(tmp_path, source, right):
    assert read_source(tmp_path, source) == right


def test_read_hand_in_minds_no_byte_control_character_or_long_number(tmp_path):
    path = tmp_path / "odd.ipynb"
    cell = b'{"cell_type": "code", "execution_count": 1' + b"0" * 5000 + b', "source": "# \xe9\xed\xa0\xbd\x0c\x00"}'
    path.write_bytes(b'{"cells": [' + cell + b"]}")
    assert read_hand_in(path)[0]["source"] == "# " + "\ufffd" * 4 + "\f\0"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_read_hand_in_says_how_to_save_another_encoding(tmp_path, encoding, root):
    path = tmp_path / "wide.ipynb"
    path.write_bytes(json.dumps(learner(root)).encode(encoding))
    words = f"saved as {encoding[:6].upper()}.*; open it in a text editor and save it with the encoding UTF-8$"
    with pytest.raises(UnusableError, match=words):
        read_hand_in(path)


def play(root, monkeypatch, *rounds):
    """Check a right hand-in whose runs end as told: each round names the code cell that ends it, or None."""
    played = []

    def run_cells(notebook, *_):
        ending, kind = rounds[len(played)]
        played.append([cell.source for cell in notebook.cells])
        count = sum(cell.cell_type == "code" for cell in notebook.cells)
        last = count if ending is None else ending + 1
        ok = {"passed": True, "fatal": "", "ename": "", "evalue": "", "message": "", "stdout": ""}
        records = {number: dict(ok) for number in range(last)}
        if ending is not None:
            records[ending] |= {"passed": False, "fatal": kind}
        return records, None, ""

    monkeypatch.setattr("labutils.course.check.run_cells", run_cells)
    path = save(learner(root, **RIGHT), root.parent / "played.ipynb")
    report = check_notebook(path, root)
    assert len(played) == len(rounds)
    return words(report), report.notes


# code cells of the demonstration: 0 set-up, 1 lesson, 2 3 speed, 4 5 quantize, 6 lesson, 7 8 memory, 9 lesson
def test_an_answer_that_ends_the_run_in_its_own_check_is_guilty(root, monkeypatch):
    found = play(root, monkeypatch, (3, "timeout"), (4, "dead"), (None, ""))
    assert found == (("endless loop", "killed kernel", "right"), [])


def test_an_answer_that_kills_the_run_from_outside_is_guilty(root, monkeypatch):
    """As when it kills pytest: the cell has begun, and nothing says how it ended."""
    begun = []

    def run_cells(notebook, *_):
        ok = {"passed": True, "fatal": "", "ename": "", "evalue": "", "message": "", "stdout": ""}
        count = sum(cell.cell_type == "code" for cell in notebook.cells)
        begun.append(len(begun))
        return {n: dict(ok) for n in range(count if begun[1:] else 5)}, None if begun[1:] else 5, ""

    monkeypatch.setattr("labutils.course.check.run_cells", run_cells)
    report = check_notebook(save(learner(root, **RIGHT), root.parent / "killed.ipynb"), root)
    assert words(report) == ("right", "killed kernel", "right")


def test_a_lesson_that_runs_without_the_answer_before_it_proves_it_guilty(root, monkeypatch):
    assert play(root, monkeypatch, (6, "dead"), (None, "")) == (("right", "killed kernel", "right"), [])


def test_a_lesson_that_hangs_by_itself_accuses_nobody(root, monkeypatch):
    found, notes = play(root, monkeypatch, (6, "timeout"), (6, "timeout"))
    assert found == ("right", "right", "not run")
    assert len(notes) == 1 and "part of the lesson" in notes[0]


def test_a_lesson_after_the_last_exercise_needs_no_second_run(root, monkeypatch):
    assert play(root, monkeypatch, (9, "timeout"))[0] == ("right", "right", "right")


def test_a_kernel_that_does_not_start_is_started_again(root, monkeypatch):
    assert play(root, monkeypatch, (0, "dead"), (None, "")) == (("right", "right", "right"), [])
    found, notes = play(root, monkeypatch, (0, "dead"), (0, "dead"))
    assert found == ("not run", "not run", "not run") and len(notes) == 1


def test_a_lesson_before_all_exercises_accuses_nobody(root, monkeypatch):
    assert play(root, monkeypatch, (1, "dead"))[0] == ("not run", "not run", "not run")


def test_a_lesson_that_shows_an_error_may_raise(root):
    cells = read_hand_in(root / "notebooks" / "solutions" / "90_demo.ipynb")
    exercises = find_reference(root, cells, "90_demo.ipynb").exercises
    lesson = next(i for i, cell in enumerate(cells) if cell["source"].startswith("import os"))
    for cell in cells:
        cell["tags"] = ["raises-exception"]
    notebook = prepared(cells, exercises)
    assert [i for i, cell in enumerate(notebook.cells) if cell.metadata.get("tags")][:2] == [1, lesson]
    assert not any(notebook.cells[e.cell].metadata or notebook.cells[e.check].metadata for e in exercises)


@pytest.mark.parametrize(
    ("result", "status"),
    [(["right", "right"], 0), (["right", "blank"], 1), (UnusableError("x.ipynb: not a notebook"), 2)],
)
def test_command_status(monkeypatch, capsys, result, status):
    def fake(*_args, **_options):
        if isinstance(result, Exception):
            raise result
        return Report("90_demo", [Verdict(f"90.{i} x", verdict) for i, verdict in enumerate(result)])

    monkeypatch.setattr("labutils.course.check.check_notebook", fake)
    parser = ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(["x.ipynb"])) == status
    said = capsys.readouterr()
    assert ("not a notebook" in said.err) == (status == 2)


def test_as_text_shows_each_exercise_with_its_hint():
    text = as_text(
        Report("90_demo", [Verdict("90.1 a", "wrong", "divide", "head\n    given     x\n    hint      divide")]),
        "a.ipynb",
    )
    assert "90.1 a: wrong" in text and "hint: divide" in text and "given     x" in text
    assert text.count("divide") == 1


def test_tidy_drops_colour_codes_and_control_characters():
    assert verdicts.tidy("\x1b[31mred\x1b[0m\x07\nnext") == "red\nnext"
    assert len(verdicts.tidy("x" * 10_000)) == verdicts.LIMIT


def test_names_of_the_demo(root):
    cells = read_hand_in(root / "notebooks" / "90_demo.ipynb")
    assert tuple(e.name for e in find_reference(root, cells, "").exercises) == NAMES


def test_a_notebook_is_read_without_the_grammar_that_takes_seconds():
    code = "import sys, labutils.course.{} as module; print('rfc3987_syntax' in sys.modules, 'nbformat' in sys.modules)"
    for name in ("quick_nbformat", "nbval_report"):
        done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "True"]
    plugins = [word for word in _command(1.0) if word in ("nbval.plugin", "labutils.course.nbval_report")]
    assert plugins == ["labutils.course.nbval_report", "nbval.plugin"]

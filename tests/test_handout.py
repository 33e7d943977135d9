"""`handout`: what a class gets, and that `check` works in it."""

import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser

import pytest
from hand_ins import (
    CHAPTER_00,
    EXIT,
    LOOP,
    RIGHT,
    ROOT,
    STEM,
    WRONG_QUANTIZE,
    WRONG_SPEED,
    asleep,
    cheated,
    demo_course,
    learner,
    mixed_chapter_00,
    save,
    twice,
    without,
)

from labutils.course.check import check_notebook
from labutils.course.cli import handout as command
from labutils.course.handout import handout


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """A kit of the demonstration chapter with the real labutils in it."""
    folder = tmp_path_factory.mktemp("handout")
    root = demo_course(folder)
    shutil.copytree(ROOT / "labutils", root / "labutils", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests").mkdir()
    (root / "labutils" / "__pycache__").mkdir()
    handout(root, folder / "kit")
    shutil.copy2(root / "demo_checks.py", folder / "kit")
    return folder / "kit"


def test_kit_holds_no_solution(kit):
    notebooks = sorted(path.relative_to(kit).as_posix() for path in kit.rglob("*.ipynb"))
    assert notebooks == [f"notebooks/{STEM}.ipynb", f"notebooks/pristine/{STEM}.ipynb"]
    assert not any((kit / name).exists() for name in ("tests", "notebooks/source", "notebooks/solutions"))
    assert not list(kit.rglob("__pycache__")) and not list(kit.rglob("wrong_answers"))
    for path in notebooks:
        text = (kit / path).read_text(encoding="utf-8")
        assert "BEGIN SOLUTION" not in text and "return tokens / seconds" not in text
    assert (kit / "pyproject.toml").is_file() and (kit / "labutils" / "course" / "checks" / "core.py").is_file()


HAND_INS = {
    "wrong syntax blank": (
        lambda kit: learner(kit, tokens_per_second=WRONG_SPEED, quantize="def quantize(values"),
        ("wrong", "syntax error", "blank"),
    ),
    "cheated": (cheated, ("wrong", "wrong", "right")),
    "missing": (lambda kit: without(kit, "quantize"), ("right", "missing", "right")),
    "doubled": (lambda kit: twice(kit, "quantize"), ("right", "doubled", "right")),
}


@pytest.mark.parametrize("name", HAND_INS)
def test_check_in_the_kit_gives_each_verdict_with_a_hint(name, kit, tmp_path):
    make, expected = HAND_INS[name]
    report = check_notebook(save(make(kit), tmp_path / "mine.ipynb"), kit)
    assert tuple(verdict.verdict for verdict in report.verdicts) == expected
    assert [bool(verdict.hint) for verdict in report.verdicts] == [word != "right" for word in expected]
    assert report.notes == []


def test_check_in_the_kit_names_the_mistake(kit, tmp_path):
    answers = {"tokens_per_second": RIGHT["tokens_per_second"], "quantize": WRONG_QUANTIZE}
    report = check_notebook(save(learner(kit, **answers), tmp_path / "mine.ipynb"), kit)
    assert "multiplied by the scale" in report.verdicts[1].hint


@pytest.mark.slow
def test_check_in_the_kit_ends_a_loop_and_survives_a_dead_kernel(kit, tmp_path):
    path = save(learner(kit, **RIGHT | {"tokens_per_second": asleep(LOOP), "quantize": EXIT}), tmp_path / "mine.ipynb")
    report = check_notebook(path, kit, timeout_s=15)
    assert [verdict.verdict for verdict in report.verdicts] == ["endless loop", "killed kernel", "right"]


@pytest.mark.slow
def test_the_kit_of_chapter_00_checks_in_a_fresh_copy_by_itself(tmp_path):
    """As a learner has it: another folder, the kit's own labutils, the course's own folder out of reach."""
    handout(ROOT, tmp_path / "kit", only=CHAPTER_00)
    copy = shutil.copytree(tmp_path / "kit", tmp_path / "a learner's folder")
    shutil.rmtree(tmp_path / "kit")
    notebook, expected = mixed_chapter_00(copy)
    path = save(notebook, copy / "notebooks" / f"{CHAPTER_00}.ipynb")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"LABUTILS_NO_VENV": "1"}
    command = [sys.executable, "-m", "labutils", "check", "--timeout", "300", str(path)]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1, done.stderr
    assert "2 of 7 exercises right" in done.stdout
    found = re.findall(r"[✓✗] 0\.\d \w+: (.+)", done.stdout)
    assert tuple(found) == expected
    assert "those are nats per byte" in done.stdout and "was deleted or changed" in done.stdout
    assert done.stdout.count("hint: ") == 5


def test_handout_ignores_the_teacher_s_own_copy(tmp_path):
    root = demo_course(tmp_path)
    save(learner(root, **RIGHT), root / "notebooks" / f"{STEM}.ipynb")
    handout(root, tmp_path / "kit")
    assert "weight_bytes = 500" not in (tmp_path / "kit" / "notebooks" / f"{STEM}.ipynb").read_text(encoding="utf-8")


def test_handout_refuses_a_folder_in_use_and_a_chapter_that_is_not(tmp_path, capsys):
    root = demo_course(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="new or empty"):
        handout(root, tmp_path / "used")
    with pytest.raises(ValueError, match="'91'"):
        handout(root, tmp_path / "kit", only="91")
    parser = ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(tmp_path / "used"), "--root", str(root)])) == 2
    assert command.run(parser.parse_args([str(tmp_path / "kit"), "--root", str(root), "--only", "90"])) == 0
    assert "1 notebooks, without solutions" in capsys.readouterr().out

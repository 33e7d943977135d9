"""`handout`: what a class gets, and that `check` works in it."""

import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from hand_ins import RIGHT, STEM, WRONG_QUANTIZE, demo_course, learner, save

from labutils.cli import handout as command
from labutils.course.check import check_notebook
from labutils.course.handout import handout

ROOT = Path(__file__).resolve().parents[1]


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
    assert (kit / "pyproject.toml").is_file() and (kit / "labutils" / "checks" / "core.py").is_file()


def test_check_in_the_kit_gives_verdicts_and_hints(kit, tmp_path):
    answers = {"tokens_per_second": RIGHT["tokens_per_second"], "quantize": WRONG_QUANTIZE}
    path = save(learner(kit, **answers), tmp_path / "mine.ipynb")
    report = check_notebook(path, kit)
    assert [verdict.verdict for verdict in report.verdicts] == ["right", "wrong", "blank"]
    assert "multiplied by the scale" in report.verdicts[1].hint
    assert report.notes == []


@pytest.mark.slow
def test_command_in_the_kit_checks_with_the_kit_s_own_labutils(kit, tmp_path):
    path = save(learner(kit, **RIGHT), tmp_path / "mine.ipynb")
    code = "import sys; from labutils.cli import check as c; from argparse import ArgumentParser as P; p = P()\n"
    code += "c.add_arguments(p); sys.exit(c.run(p.parse_args(sys.argv[1:])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=kit, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 3 exercises right" in done.stdout


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

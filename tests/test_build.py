"""From one source two notebooks: deterministic, checked, executed only when needed, clean."""

import copy
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from hand_ins import DEMO, STEM, demo_course
from nbformat import v4

from labutils.course import build as module
from labutils.course import setup_cell
from labutils.course.build import build, learner_notebook, read_notebook, text_of
from labutils.course.execute import ExecutionError, clean, clean_text, execute, unclean
from labutils.course.exercises import ExerciseError
from labutils.course.source import examine, read_chapter, sources

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (DEMO / "notebooks" / "source" / f"{STEM}.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The demonstration course, built and executed once."""
    root = tmp_path_factory.mktemp("build") / "course"
    shutil.copytree(DEMO, root, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "why_busy", lambda: "")
        result = build(root)
    assert (result.errors, result.warnings, result.executed) == ([], [], [STEM])
    return root


def chapter(tmp_path, text=SOURCE, stem=STEM):
    path = tmp_path / f"{stem}.py"
    path.write_text(text, encoding="utf-8")
    return read_chapter(path)


def test_learner_copy_is_blank_without_outputs_and_may_raise(built):
    notebook = read_notebook(built / "notebooks" / f"{STEM}.ipynb")
    nbformat.validate(notebook)
    sources_of_cells = "\n".join(cell.source for cell in notebook.cells)
    assert "SOLUTION" not in sources_of_cells and "return tokens / seconds" not in sources_of_cells
    assert sources_of_cells.count('raise NotImplementedError("Exercise 90.') == 3
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    tagged = [cell for cell in notebook.cells if "raises-exception" in cell.metadata.get("tags", [])]
    assert len(tagged) == 6 and all(cell.source.startswith(("# EXERCISE", "# CHECK")) for cell in tagged)


def test_solution_is_executed_and_clean(built):
    notebook = read_notebook(built / "notebooks" / "solutions" / f"{STEM}.ipynb")
    nbformat.validate(notebook)
    assert unclean(notebook, built) == []
    printed = [cell.outputs[0].text for cell in notebook.cells if cell.source.startswith("# CHECK")]
    assert printed == ["✓ 90.1 tokens_per_second\n", "✓ 90.2 quantize\n", "✓ 90.3 weight_bytes\n"]
    text = (built / "notebooks" / "solutions" / f"{STEM}.ipynb").read_text(encoding="utf-8")
    assert str(built) not in text and socket.gethostname() not in text and "widget-view" not in text
    assert "language_info" in notebook.metadata and "version" not in notebook.metadata.language_info


def test_both_have_badge_and_setup_cell_first(built):
    for folder in ("", "solutions"):
        notebook = read_notebook(built / "notebooks" / folder / f"{STEM}.ipynb")
        path = "/".join(filter(None, ["notebooks", folder, f"{STEM}.ipynb"]))
        assert f"github/demo-owner/demo-course/blob/main/{path})" in notebook.cells[0].source
        assert "![" not in notebook.cells[0].source  # no picture that JupyterLab would fetch
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        assert setup_cell.is_setup(first) and 'ready("90_demo")' in first.source


def test_rebuild_changes_and_executes_nothing(built):
    before = {path: path.read_bytes() for path in (built / "notebooks").rglob("*.ipynb")}
    result = build(built)
    assert (result.changed, result.executed) == ([], [])
    assert {path: path.read_bytes() for path in before} == before


def test_prose_changes_keep_the_outputs(built, monkeypatch, tmp_path):
    root = tmp_path / "course"
    shutil.copytree(built, root)
    monkeypatch.setattr(module, "execute", None)
    path = root / "notebooks" / "source" / f"{STEM}.py"
    path.write_text(SOURCE.replace("That is all", "That was all"), encoding="utf-8")
    result = build(root)
    assert (len(result.changed), result.executed) == (2, [])
    solution = (root / "notebooks" / "solutions" / f"{STEM}.ipynb").read_text(encoding="utf-8")
    assert "That was all" in solution and "✓ 90.2 quantize" in solution


def test_changed_code_executes_again_or_is_an_error(built, monkeypatch, tmp_path):
    root = tmp_path / "course"
    shutil.copytree(built, root)
    path = root / "notebooks" / "source" / f"{STEM}.py"
    path.write_text(SOURCE.replace("1 + 1", "2 + 2"), encoding="utf-8")
    assert "not that of its source" in build(root, execution="never").errors[0]
    ran = []
    monkeypatch.setattr(module, "execute", lambda notebook, root, editions: ran.append(1) or notebook)
    monkeypatch.setattr(module, "why_busy", lambda: "")
    assert build(root, write=False).executed == [STEM] and ran == []
    assert build(root).executed == [STEM] and ran == [1]


def test_a_busy_machine_marks_the_solution_and_the_mark_stays(built, monkeypatch, tmp_path):
    root = tmp_path / "course"
    shutil.copytree(built, root)
    path = root / "notebooks" / "solutions" / f"{STEM}.ipynb"
    assert "busy machine" not in path.read_text(encoding="utf-8")

    def kept(notebook, root, editions):
        return module.with_kept_outputs(notebook, read_notebook(path)) and notebook

    monkeypatch.setattr(module, "execute", kept)
    monkeypatch.setattr(module, "why_busy", lambda: "a function against itself: 1.20x [1.10, 1.30]")
    assert any("busy machine" in warning for warning in build(root, execution="always").warnings)
    notebook = read_notebook(path)
    assert "1.20x [1.10, 1.30]" in notebook.cells[0].source and "noisy" in notebook.cells[0].source
    assert build(root).changed == []  # what was kept keeps its mark
    learner = (root / "notebooks" / f"{STEM}.ipynb").read_text(encoding="utf-8")
    assert "busy machine" not in learner


def test_a_solution_that_never_ran_is_executed(monkeypatch, tmp_path):
    root = demo_course(tmp_path)  # its solution has the right code and no outputs
    monkeypatch.setattr(module, "execute", lambda notebook, root, editions: notebook)
    monkeypatch.setattr(module, "why_busy", lambda: "")
    assert build(root).executed == [STEM]


def test_build_without_write_changes_no_file(tmp_path):
    root = tmp_path / "course"
    shutil.copytree(DEMO, root)
    assert len(build(root, write=False).changed) == 2
    assert not list((root / "notebooks").glob("*.ipynb"))


def test_cell_ids_follow_content_not_place(tmp_path):
    first = learner_notebook(chapter(tmp_path), "a/b")
    again = learner_notebook(chapter(tmp_path), "a/b")
    longer = learner_notebook(
        chapter(tmp_path, SOURCE.replace("# %%\nimport os", "# %%\nx = 1\n\n# %%\nimport os")), "a/b"
    )
    ids = [cell.id for cell in first.cells]
    assert ids == [cell.id for cell in again.cells] and len(set(ids)) == len(ids)
    assert {"setup", "exercise-quantize", "check-quantize"} <= set(ids)
    assert set(ids) < {cell.id for cell in longer.cells}


def test_same_cells_get_different_ids(tmp_path):
    notebook = learner_notebook(chapter(tmp_path, SOURCE + "\n# %%\nprint()\n\n# %%\nprint()\n"), "a/b")
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("## Exercise 90.2", "## Exercise 90.3", "headed 'Exercise 90.2'"),
        ("# <details><summary>Hint 2</summary>`max(-128, min(127, number))` clips.</details>\n", "", "two hints"),
        ("1 line, 3 minutes, difficulty 2 of 3", "1 line, difficulty 2 of 3", "names minutes"),
        ("1 line, 3 minutes, difficulty 2 of 3", "1 line, 3 minutes", "names difficulty"),
        ("1 line, 3 minutes, difficulty 2 of 3", "3 minutes, difficulty 2 of 3", "names lines"),
        ("weight_bytes = 1000 * 4 / 8\n", "", ""),
        ("import os\n", "%matplotlib inline\nimport os\n", "no magics"),
    ],
)
def test_examine_names_cell_and_file(tmp_path, old, new, words):
    assert old in SOURCE
    errors = examine(chapter(tmp_path, SOURCE.replace(old, new))).errors
    if words:
        assert len(errors) == 1 and words in errors[0] and f"{STEM}.py, cell " in errors[0]


def test_examine_warns_of_long_cells(tmp_path):
    long = "\n# %%\n" + "x = 1\n" * 19 + "\n# %% [markdown]\n# " + "word " * 151 + "\n"
    warnings = examine(chapter(tmp_path, SOURCE + long)).warnings
    assert len(warnings) == 2 and "19 lines" in warnings[0] and "151 words" in warnings[1]


def test_build_reports_errors_and_writes_nothing(tmp_path):
    root = tmp_path / "course"
    shutil.copytree(DEMO, root)
    path = root / "notebooks" / "source" / f"{STEM}.py"
    path.write_text(SOURCE.replace("# CHECK quantize", "# CHECK quantise"), encoding="utf-8")
    result = build(root)
    assert result.changed == [] and f"{STEM}.py: " in result.errors[0]
    with pytest.raises(ExerciseError, match=STEM):
        read_chapter(path)


def test_generated_notebooks_pass_ruff(tmp_path):
    root = demo_course(tmp_path)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I", "--ignore", "E402,E501,F821"]
    done = subprocess.run([*command, str(root / "notebooks")], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout


def one_cell(source):
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source)])
    notebook.metadata["labutils"] = {"chapter": "90_demo"}
    return notebook


@pytest.mark.slow
def test_execute_refuses_a_cell_that_raises(tmp_path):
    (tmp_path / "notebooks").mkdir()
    with pytest.raises(ExecutionError, match=r"90_demo(.|\n)*ZeroDivisionError"):
        execute(one_cell("1 / 0"), tmp_path)


def test_clean_drops_what_belongs_to_one_machine(tmp_path):
    notebook = one_cell("x")
    notebook.metadata["widgets"] = {"state": {}}
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "f00"}, "text/plain": "IntSlider()"}
    place = f"{tmp_path}/data on {socket.gethostname()}: <a.B object at 0x7f3a5c001d90>"
    notebook.cells[0].metadata["execution"] = {"iopub.status.busy": "2026"}
    notebook.cells[0].outputs = [
        v4.new_output("stream", name="stdout", text="one "),
        v4.new_output("stream", name="stdout", text=place),
        v4.new_output("stream", name="stderr", text="a warning"),
        v4.new_output("display_data", data=view),
        v4.new_output("display_data", data={"image/png": "aGk=", "text/plain": place}, metadata={"x": 1}),
        v4.new_output("error", ename="E", evalue=place, traceback=[f"File {tmp_path}/x"]),
    ]
    assert len(unclean(copy.deepcopy(notebook), tmp_path)) == 2
    clean(notebook, tmp_path)
    text = json.dumps(notebook)
    assert str(tmp_path) not in text and "0x7f3a5c001d90" not in text and "f00" not in text
    kinds = [output.output_type for output in notebook.cells[0].outputs]
    assert kinds == ["stream", "display_data", "error"]
    assert notebook.cells[0].outputs[0].text.startswith("one ./data on")
    assert notebook.cells[0].outputs[1].data["image/png"] == "aGk="
    assert unclean(notebook, tmp_path) == []


def test_clean_text_keeps_longer_names(tmp_path):
    assert clean_text(f"{tmp_path}-other", tmp_path) == clean_text(f"{tmp_path}-other", tmp_path / "elsewhere")


def test_clean_text_of_one_long_word_takes_no_time(tmp_path):
    begun = time.process_time()
    assert clean_text("A" * 200_000, tmp_path) == "A" * 200_000
    assert time.process_time() - begun < 3
    place = "/tmp/ipykernel_1/2.py"
    assert clean_text(f"File {place}:3, '{place}' ({place})", tmp_path) == "File <cell>:3, '<cell>' (<cell>)"


def test_stored_notebooks_of_the_course_are_clean_and_those_of_their_sources():
    stored = sorted((ROOT / "notebooks").rglob("*.ipynb"))
    stored = [path for path in stored if ".ipynb_checkpoints" not in path.parts]
    for path in stored:
        notebook = read_notebook(path)
        assert notebook is not None and unclean(notebook, ROOT) == [], path
        assert "widgets" not in notebook.metadata
    for source in sources(ROOT):
        assert examine(read_chapter(source)).errors == []
        path = ROOT / "notebooks" / f"{source.stem}.ipynb"
        if path.is_file():
            fresh = learner_notebook(read_chapter(source), module.repository(ROOT))
            assert path.read_text(encoding="utf-8") == text_of(fresh), f"python -m labutils build --only {source.stem}"


def test_is_missing_never_touches_numpy_and_torch():
    assert not setup_cell.is_missing("torch>=99")
    assert not setup_cell.is_missing("numpy>=99")
    assert setup_cell.is_missing("ipywidgets>=99")
    assert not setup_cell.is_missing("ipywidgets>=7.7,<9")


def test_is_missing_asks_only_for_what_is_meant_for_this_system():
    assert setup_cell.is_missing("a-package-that-nobody-has>=1; python_version >= '3'")
    assert not setup_cell.is_missing("a-package-that-nobody-has>=1; sys_platform == 'an-old-computer'")


def test_install_missing_installs_only_that(monkeypatch, tmp_path, capsys):
    pyproject = tmp_path / "pyproject.toml"
    wanted = '["torch>=99", "numpy>=99", "pytest>=1", "a-package-that-nobody-has>=1"]'
    pyproject.write_text(f"[project]\ndependencies = {wanted}\n", encoding="utf-8")
    calls = []
    monkeypatch.setattr(setup_cell.subprocess, "run", lambda command, **_: calls.append(command))
    assert setup_cell.install_missing(pyproject) == ["a-package-that-nobody-has>=1"]
    assert calls[0][-1] == "a-package-that-nobody-has>=1" and "torch>=99" not in calls[0]
    assert "installing" in capsys.readouterr().out


def test_setup_cell_fetches_a_branch_or_commit_where_the_course_is_not(tmp_path):
    """As on Colab: an empty folder, no labutils; here from a local repository."""
    repository, work = tmp_path / "repository", tmp_path / "content"
    (repository / "labutils" / "course").mkdir(parents=True)
    work.mkdir()
    for name in ("labutils/__init__.py", "labutils/course/__init__.py"):
        (repository / name).write_text("", encoding="utf-8")
    stub = "def ready(stem):\n    import labutils\n    print('ready', stem, labutils.__file__)\n"
    (repository / "labutils" / "course" / "setup_cell.py").write_text(stub, encoding="utf-8")
    identity = ["-c", "user.name=n", "-c", "user.email=e@x.org"]
    for step in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "x"], ["branch", "term-2"]):
        subprocess.run(["git", "-C", str(repository), *step], check=True)
    code = setup_cell.setup_source("00_start_here", "nobody/nothing")
    for _ in range(2):  # the second run finds what the first has fetched
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code],
            cwd=work,
            env={"COURSE_REPO": str(repository), "COURSE_REF": "term-2", "PATH": __import__("os").environ["PATH"]},
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        assert f"ready 00_start_here {work}" in done.stdout.replace(str(work.resolve()), str(work))

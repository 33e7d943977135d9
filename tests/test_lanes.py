"""The three lanes of every exercise of every chapter, and that the lanes themselves can fail."""

import gc
import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path

import matplotlib
import pytest
import torch
from hand_ins import DEMO
from lanes import _both, read_wrong_answers, run_lanes
from smaller import SMALLER

from labutils.quantization.packed import return_freed_memory

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks" / "source").glob("[0-9][0-9]_*.py"))
NEEDS = {"06_gpu_acceleration": "triton", "07_tpu_and_xla": "jax", "08_fpga": "amaranth"}  # packages of optional extras
# Thousands of small steps: in a process without this suite's checks of shapes they take a third of the time.
PLAIN = {"11_serving_many", "12_applications", "13_capstone"}
WRONG = (DEMO / "wrong_answers" / "90_demo.py").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    matplotlib.use("agg")
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path / "learner"))
    yield
    gc.collect()  # a chapter's names are a circle: its functions know them
    return_freed_memory()
    torch.set_printoptions(profile="default")  # a chapter may choose its own; doctests of this process come later


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_lanes_of_chapter(source):
    if importlib.util.find_spec(NEEDS.get(source.stem, "pytest")) is None:
        pytest.skip(f"{NEEDS[source.stem]} is not installed: python -m labutils test installs the extra")
    if source.stem in PLAIN:
        done = plain_lanes(source.stem)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    else:
        assert run_lanes(source, ROOT / "tests" / "wrong_answers" / source.name) == []


def plain_lanes(stem):
    """`tests/lanes.py` as a program; what is not installed stays away."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "MPLBACKEND": "agg", "PIP_NO_INDEX": "1"}
    command = [sys.executable, str(ROOT / "tests" / "lanes.py"), stem]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=900, check=False)


def test_plain_lanes_see_a_chapter_that_is_not_there():
    assert plain_lanes("99_nothing").returncode == 1


def lanes(tmp_path, *, source=("", ""), wrong=("", "")):
    """The failures of the demonstration chapter after one replacement in its source or its wrong answers."""
    text = (DEMO / "notebooks" / "source" / "90_demo.py").read_text(encoding="utf-8")
    assert source[0] in text and wrong[0] in WRONG
    chapter, answers = tmp_path / "90_demo.py", tmp_path / "wrong.py"
    chapter.write_text(text.replace(*source) if source[0] else text, encoding="utf-8")
    answers.write_text(WRONG.replace(*wrong) if wrong[0] else WRONG, encoding="utf-8")
    return run_lanes(chapter, answers)


def test_lanes_hold_for_the_demo(tmp_path):
    assert lanes(tmp_path) == []


def test_lanes_see_a_wrong_solution(tmp_path):
    failures = lanes(tmp_path, source=("return tokens / seconds", "return tokens * seconds"))
    assert any("the solution must pass" in failure for failure in failures)


def test_lanes_see_a_check_that_lets_the_blank_pass(tmp_path):
    source = ("ch90.weight_bytes(weight_bytes)", "ch90.weight_bytes(500.0)")
    failures = lanes(tmp_path, source=source)
    assert all("90.3" in failure for failure in failures)
    assert sum("must fail with CheckFailed; got None" in failure for failure in failures) == 3


def test_lanes_see_a_blank_that_is_none(tmp_path):
    answer = "    return tokens / seconds\n"
    marked = f"    ### BEGIN SOLUTION\n{answer}    ### END SOLUTION\n"
    source = (marked, f"{answer}    ### BEGIN SOLUTION\n    ### END SOLUTION\n")
    assert any("the blank must fail" in failure for failure in lanes(tmp_path, source=source))


def test_lanes_see_a_wrong_answer_that_is_right(tmp_path):
    failures = lanes(tmp_path, wrong=("return seconds / tokens", "return tokens / seconds"))
    assert failures == ["90.1 tokens_per_second, wrong answer 'upside down': must fail with CheckFailed; got None"]


def test_lanes_see_a_mistake_without_its_own_hint(tmp_path):
    failures = lanes(tmp_path, wrong=("return seconds / tokens", "return 17.0"))
    assert len(failures) == 1 and "its words must stand in the hint" in failures[0]


def test_lanes_see_two_mistakes_with_one_hint(tmp_path):
    answer = "lambda values, scale: [max(-128, min(127, round(v * scale))) for v in values]"
    again = f"# EXERCISE quantize\nquantize = {answer}\n"
    header = "# %% WRONG quantize | by the scale"
    end = "# %% WRONG weight_bytes | that is in bits"
    failures = lanes(tmp_path, wrong=(end, f"{header}\n{again}\n{end}"))
    assert len(failures) == 1 and "each mistake has a hint of its own" in failures[0]
    assert lanes(tmp_path, wrong=(end, f"{header} | same\n{again}\n{end}")) == []


def test_lanes_ask_for_three_wrong_answers(tmp_path):
    failures = lanes(tmp_path, wrong=("# %% WRONG weight_bytes | divided by 8 twice", "# %% REMARK"))
    assert failures == ["90.3 weight_bytes: at least three wrong answers; got 2"]


def test_lanes_make_lessons_smaller_and_nothing_else(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setitem(SMALLER, "90_demo", {"measure(1)": "measure(2)", "tokens / seconds": "0.0"})
    text = ("import os\n", "import os\n\n# %%\nsaid(measure(1), measure(rounds=9, calls_per_sample=20))\n")
    monkeypatch.setattr("builtins.said", lambda *numbers: printed.extend(numbers), raising=False)
    monkeypatch.setattr("builtins.measure", lambda *count, **few: count or tuple(few.values()), raising=False)
    failures = lanes(tmp_path, source=text)
    assert failures == ["90_demo.py has no 'tokens / seconds', which tests/smaller.py makes smaller"]
    assert printed == [(2,), (5, 1)]


def test_lanes_leave_nothing_of_a_chapter_in_memory(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("builtins.keep", lambda thing: kept.append(weakref.ref(thing)), raising=False)
    cell = "import os\n\n# %%\nimport matplotlib.pyplot\n\nkeep(matplotlib.pyplot.figure())\n"
    answer = "class Large:\n    pass\n\n\nlarge = Large()\nkeep(large)\n\n\ndef f():\n    return large\n"
    gc.disable()  # what goes then goes at once
    try:
        assert _both(answer, "", {}) == (None, "") and kept.pop()() is None
    finally:
        gc.enable()
    assert lanes(tmp_path, source=("import os\n", cell)) == []
    gc.collect()
    assert kept.pop()() is None


def test_lanes_see_a_name_that_no_exercise_has(tmp_path):
    failures = lanes(tmp_path, wrong=("WRONG weight_bytes | that is in bits", "WRONG weight_bites | that is in bits"))
    assert any("no exercise is called 'weight_bites'" in failure for failure in failures)


def test_read_wrong_answers_refuses_a_header_without_words(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("# %% WRONG quantize\nx = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="a header is"):
        read_wrong_answers(path)

"""A failing check names what an earlier cell has taken from the answer."""

import sys
import types

import pytest

from labutils.course.checks import CheckFailed, exercise, expect_function
from labutils.course.checks.shadows import bound_names, find_shadow

LESSON = "import torch\nimport numpy as np\nfrom math import floor\ndef helper(x):\n    return x"
ANSWER = "# EXERCISE speed\ndef speed(x):\n    return torch.tensor(np.abs(min(floor(helper(x)), round(int(x)))))"


@pytest.fixture
def kernel(monkeypatch):
    """Runs cells as a kernel does: in `__main__`, with all of them in `In`."""
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    main.In = [""]

    def run(*cells):
        for cell in cells:
            main.In.append(cell)
            exec(cell, vars(main))
        return main

    return run


def shadow(name="speed"):
    found = find_shadow(name)
    return found and (found.name, found.cell)


@pytest.mark.parametrize("name", ["min", "round", "int", "torch", "np", "floor", "helper"])
@pytest.mark.parametrize(
    "form", ["{} = 3", "def {}(x):\n    return 0", "for {} in [1]:\n    pass", "class {}:\n    pass"]
)
def test_find_shadow_names_what_an_earlier_exercise_redefines(kernel, name, form):
    kernel(LESSON, "# EXERCISE first\n" + form.format(name), "# CHECK first", ANSWER)
    assert shadow() == (name, "# EXERCISE first")


@pytest.mark.parametrize(
    "cells",
    [
        [LESSON],
        [LESSON, "min = 3", "del min"],
        [LESSON, "# EXERCISE first\ntorch = 3", LESSON],  # the lesson's cell was run again
        [LESSON, "# EXERCISE first\nmax = 3"],  # which the answer does not use
        [LESSON, "# EXERCISE first\ndef f():\n    min = 3\n[min for min in (1, 2)]"],  # bound inside only
        [LESSON, "helper = 3"],  # may be the lesson's own
        [LESSON, "from builtins import min"],
        ["%%bash\necho", LESSON],
    ],
)
def test_find_shadow_accuses_nobody_without_need(kernel, cells):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.exec", exec_if_python)
        kernel(*cells, ANSWER)
    assert shadow() is None


def exec_if_python(source, names, run=exec):
    if not source.startswith("%%"):
        run(source, names)


def test_find_shadow_without_a_kernel_or_an_answer(kernel):
    kernel("min = 3")
    assert shadow() is None
    del sys.modules["__main__"].In
    assert shadow() is None


def test_find_shadow_leaves_the_answers_own_names_alone(kernel):
    kernel("# EXERCISE first\nmin = 3", "# EXERCISE speed\nmin = max\nspeed = min(1, 2)")
    assert shadow() is None


def test_bound_names_of_what_python_cannot_read():
    assert bound_names("def f(") == bound_names("a\0b") == bound_names("(" * 5000) == {}


def test_a_failing_check_says_which_cell_redefines_min(kernel, capsys):
    @exercise("9.1")
    def speed(answer):
        mistakes = [(lambda values: 0, "clip to the range")]
        expect_function(answer, lambda values: min(values), cases=[{"values": [1, 2]}], mistakes=mistakes)

    answer = "# EXERCISE speed\ndef speed(values):\n    return min(values)"
    main = kernel("# EXERCISE first\nmin = lambda *a: 0", answer)
    with pytest.raises(CheckFailed) as caught:
        speed(main.speed)
    assert "an earlier cell of yours redefines `min` (the one that begins `# EXERCISE first`)" in caught.value.hint
    assert caught.value.hint.endswith("run the cells again; clip to the range")
    del main.min
    speed(main.speed)
    assert capsys.readouterr().out == "✓ 9.1 speed\n"

"""Exercises in notebooks: found, blanked, moved by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.course.exercises import (
    Exercise,
    ExerciseError,
    blank,
    chapter_number,
    exercises,
    find,
    marker,
    transplant,
)

ANSWER = """# EXERCISE double
def double(x):
    'Twice.'
    ### BEGIN SOLUTION
    y = x + x
    return y
    ### END SOLUTION
"""
DOUBLE = Exercise("2.3", "double", 0, 1)


def code(source):
    return {"cell_type": "code", "source": source}


def text(source):
    return {"cell_type": "markdown", "source": source}


def test_marker_by_first_line():
    assert marker(code("# EXERCISE double\nx = 1")) == ("EXERCISE", "double")
    assert marker(code("\n\n#EXERCISE double  \n")) == ("EXERCISE", "double")
    assert marker(code(["# CHECK double\n", "check(double)"])) == ("CHECK", "double")
    assert marker(code("x = 1\n# EXERCISE double")) is None
    assert marker(code("# EXERCISE two words")) is None
    assert marker(text("# EXERCISE double")) is None
    assert marker(code("")) is None


def test_exercises_are_numbered_by_order():
    sources = ["# EXERCISE a", "# CHECK a", "x", "# EXERCISE b", "# CHECK b"]
    cells = [code(source) for source in sources]
    cells.insert(0, text("title"))
    cells.insert(5, text("between"))
    assert [(e.title, e.cell, e.check) for e in exercises(cells, 2)] == [("2.1 a", 1, 2), ("2.2 b", 4, 6)]


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["# EXERCISE a", "x", "# CHECK a"], "must begin `# CHECK a`"),
        (["# EXERCISE a"], "must begin `# CHECK a`"),
        (["# EXERCISE a", "# CHECK a", "# EXERCISE a", "# CHECK a"], "used once"),
        (["# CHECK a"], "has its EXERCISE"),
        (["# EXERCISE a", "# CHECK b", "# EXERCISE b", "# CHECK a"], "must begin `# CHECK a`"),
    ],
)
def test_exercises_refuses_what_does_not_pair(cells, words):
    with pytest.raises(ExerciseError, match=words):
        exercises([code(source) for source in cells], 2)


def test_blank_replaces_the_solution_only():
    assert blank(ANSWER, DOUBLE) == (
        "# EXERCISE double\ndef double(x):\n    'Twice.'\n    raise NotImplementedError(\"Exercise 2.3: double\")"
    )


def test_blank_runs_and_raises():
    namespace = {}
    exec(blank(ANSWER, DOUBLE), namespace)
    with pytest.raises(NotImplementedError, match=r"Exercise 2\.3: double"):
        namespace["double"](1)


@pytest.mark.parametrize(
    "source",
    [
        "# EXERCISE double\nx = 1",
        "### BEGIN SOLUTION\nx",
        "x\n### END SOLUTION",
        "### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION",
        "### END SOLUTION\n### BEGIN SOLUTION",
    ],
)
def test_blank_refuses_unpaired_markers(source):
    with pytest.raises(ExerciseError, match=r"2\.3 double"):
        blank(source, DOUBLE)


@given(st.lists(st.sampled_from(["y = 1", "", "    return y", "# a remark"]), min_size=1))
def test_blank_leaves_nothing_of_the_solution(lines):
    source = "\n".join(["# EXERCISE double", "### BEGIN SOLUTION", *lines, "### END SOLUTION", "z = 2"])
    assert blank(source, DOUBLE).splitlines() == [
        "# EXERCISE double",
        'raise NotImplementedError("Exercise 2.3: double")',
        "z = 2",
    ]


def reference():
    return [code("# EXERCISE a\n1"), code("# CHECK a\ncheck(a)"), code("# EXERCISE b\n2"), code("# CHECK b\ncheck(b)")]


def test_transplant_moves_by_name_and_leaves_both_unchanged():
    ours, theirs = reference(), [code("x"), code("# EXERCISE b\nnew"), code("# CHECK b\ncheck( b )")]
    moved = transplant(ours, theirs)
    assert [cell["source"] for cell in moved.cells][::2] == ["# EXERCISE a\n1", "# EXERCISE b\nnew"]
    assert (moved.missing, moved.doubled, moved.changed_checks) == (("a",), (), ("a",))
    assert ours == reference() and theirs[1]["source"] == "# EXERCISE b\nnew"


def test_transplant_doubled_and_kept():
    theirs = [code("# EXERCISE a\nnew"), code("# EXERCISE b\n3"), code("# EXERCISE b\n4")]
    moved = transplant(reference(), theirs, keep=frozenset({"a"}))
    assert [cell["source"] for cell in moved.cells][::2] == ["# EXERCISE a\n1", "# EXERCISE b\n2"]
    assert moved.doubled == ("b",)


FAKES = ["# CHECK a\nprint('✓ 1.1 a')", "# CHECK a\n# check(a)", "# CHECK a\ncheck(b)", "# CHECK a"]


@pytest.mark.parametrize("fake", FAKES)
def test_transplant_sees_a_faked_check(fake):
    theirs = [code("# EXERCISE a\n1"), code(fake), code("# EXERCISE b\n2"), code("# CHECK b\ncheck(b)  # mine")]
    assert transplant(reference(), theirs).changed_checks == ("a",)


def test_find_lists_every_place():
    assert find([code("# EXERCISE a"), code("# EXERCISE a")], "EXERCISE") == {"a": [0, 1]}


def test_chapter_number_asks_for_two_digits():
    assert chapter_number("07_tpu") == 7
    with pytest.raises(ExerciseError, match="two digits"):
        chapter_number("notes")

"""The one plot: what is surely beaten, by which axis, and what is written beside the points."""

import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Text

from labutils.lab.plots.one_plot import AXES, draw_techniques, placed, standing, techniques_table
from labutils.lab.widgets.one_plot import techniques_widget
from labutils.measurement.ledger import Record

COMMON = {"model": "lablm", "device": "cpu", "dtype": "int8", "threads": 1, "prompt_tokens": 8, "output_tokens": 8}


def record(technique, speed, right, *, spread=0.01, of=40, **more):
    samples = tuple(speed * (1 + spread * k) for k in range(-2, 3))
    scores = (1.0,) * right + (0.0,) * (of - right)
    score = {"task": "answer", "task_score": right / of, "task_scores": scores}
    return Record(technique=technique, samples=samples, **COMMON, **(score | more))


SLOW, FAST, WRONG = record("slow", 10, 40), record("fast", 100, 40), record("wrong", 50, 4)
SPEED, SCORE = AXES["speed"], AXES["task score"]


def test_beaten_is_sure_on_both_axes_and_a_tie_is_not():
    assert standing(WRONG, [SLOW, FAST, WRONG], SPEED, SCORE) == "beaten"
    assert standing(SLOW, [SLOW, FAST, WRONG], SPEED, SCORE) == "tied"  # as many right answers, and surely slower
    assert standing(FAST, [SLOW, FAST, WRONG], SPEED, SCORE) == "leads"
    noisy = record("noisy", 90, 4, spread=0.2)
    assert standing(noisy, [FAST, noisy], SPEED, SCORE) == "tied"  # intervals of speed overlap
    nearly = record("nearly", 50, 39)
    assert standing(nearly, [FAST, nearly], SPEED, SCORE) == "tied"  # one answer of 40 is chance
    twin = record("twin", 100, 40)
    assert {standing(r, [FAST, twin], SPEED, SCORE) for r in (FAST, twin)} == {"leads"}
    other = record("quick and wrong", 1000, 4)
    assert {standing(r, [FAST, other], SPEED, SCORE) for r in (FAST, other)} == {"leads"}  # each is better in one


def test_lower_is_better_where_it_is():
    small, large = record("small", 10, 40, bytes_resident=1e6), record("large", 10, 4, bytes_resident=2e6)
    assert standing(large, [small, large], AXES["memory"], SCORE) == "beaten"
    assert standing(small, [small, large], AXES["memory"], SCORE) == "leads"
    minutes = AXES["test-time compute"].value(record("x", 1, 40, answer_s=(0.06,) * 5))
    assert minutes == pytest.approx(1.0)  # 1,000 answers of 60 ms


def test_scores_without_items_differ_by_any_amount():
    first, second = record("a", 1, 40), record("b", 1, 20)
    bare = [
        Record(**COMMON, technique=t, samples=(1.0,) * 5, task="answer", task_score=s)
        for t, s in (("a", 1), ("b", 0.9))
    ]
    assert SCORE.sure(*bare) and SCORE.sure(first, second)
    assert not SCORE.sure(bare[0], bare[0])


def test_energy_that_nobody_measured_is_a_sentence():
    with pytest.raises(ValueError, match="needs a record with J a token.* not measured"):
        placed([SLOW], AXES["energy"], SCORE)
    box = techniques_widget([SLOW, FAST, WRONG])
    across, up = box.children[0].children
    assert bytes(box.children[1].value).startswith(b"\x89PNG") and "fast" in box.children[2].value
    across.value = "energy"
    assert not box.children[1].value and "not measured" in box.children[2].value
    across.value, up.value = "speed", "speed"
    assert bytes(box.children[1].value).startswith(b"\x89PNG")


def test_figure_has_a_filled_front_and_a_label_for_every_point():
    records = [SLOW, FAST, WRONG, *(record(f"w{i}", 50 + i, 4, family="quantized") for i in range(6))]
    figure = draw_techniques(records)
    (axes,) = figure.axes
    figure.canvas.draw()
    texts = [text for text in axes.texts if text.get_text()]
    assert {text.get_text() for text in texts} == {r.technique for r in records}
    boxes = [Text.get_window_extent(text) for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert axes.get_title().startswith("1 lead (filled), 1 are tied")
    faces = [tuple(p.get_facecolor()[0]) for p in axes.collections if isinstance(p, PathCollection)]
    assert sum(face == (1.0, 1.0, 1.0, 1.0) for face in faces) == 7
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"other chapters", "quantized"}


def test_table_marks_the_front_and_says_the_interval():
    table = techniques_table([SLOW, FAST, WRONG]).splitlines()
    assert [line.split()[0] for line in table[1:]] == ["leads", "beaten", "tied"] and "fast" in table[1]
    assert "[98, 102]" in table[1]


def test_unknown_axis_and_empty_list():
    with pytest.raises(KeyError):
        draw_techniques([SLOW], x="beauty")
    with pytest.raises(ValueError, match="got 0 without"):
        draw_techniques([])

"""What the figures of chapter 06 claim."""

import matplotlib
import pytest
from matplotlib.figure import Figure

from labutils.lab.plots.acceleration import draw_gpu, draw_ladder
from labutils.measurement.timing import Timing


@pytest.fixture(autouse=True)
def _without_a_screen():
    matplotlib.use("agg")


def drawn(**samples_s):
    axes = Figure().subplots()
    timings = {name: Timing(name, values, 1, "cpu", 1) for name, values in samples_s.items()}
    draw_ladder(timings, {"fp8": "needs a GPU"}, base="fp32", ax=axes)
    return axes


def test_draw_ladder_names_the_fastest_that_is_sure():
    axes = drawn(fp32=(1.0,) * 5, sdpa=(0.8,) * 5, int4=(0.2, 0.5, 0.5, 2.0, 2.0))  # int4: twice as fast, or half
    assert axes.get_title().startswith("Fastest here with its interval above 1: sdpa, 1.25x")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fp32", "sdpa", "int4", "fp8"]
    assert [text.get_text() for text in axes.texts] == ["left out here"]


def test_draw_ladder_claims_nothing_where_nothing_is_sure():
    assert drawn(fp32=(1.0,) * 5, int8=(0.5, 0.9, 0.9, 1.2, 1.2)).get_title() == "No interval here lies above fp32"


def test_draw_gpu_keeps_every_box_inside_and_apart():
    axes = Figure().subplots()
    draw_gpu(axes)
    boxes = [patch.get_bbox() for patch in axes.patches]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert all(left < b.x0 and b.x1 < right and bottom < b.y0 and b.y1 < top for b in boxes)
    inner = [b for b in boxes if b.height < 2]
    assert not any(a.overlaps(b) for i, a in enumerate(inner) for b in inner[:i])

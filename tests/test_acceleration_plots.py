"""What the figures of chapter 06 claim."""

import matplotlib
import pytest
from matplotlib.figure import Figure

from labutils.measurement.timing import Timing
from labutils.plots.acceleration import draw_ladder


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
    assert axes.get_title().startswith("Best that is sure here: sdpa, 1.25x")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["fp32", "sdpa", "int4", "fp8"]
    assert [text.get_text() for text in axes.texts] == ["left out here"]


def test_draw_ladder_claims_nothing_where_nothing_is_sure():
    assert drawn(fp32=(1.0,) * 5, int8=(0.5, 0.9, 0.9, 1.2, 1.2)).get_title() == "Nothing surely beats fp32 here"

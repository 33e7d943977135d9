"""Figures and the widget of the FPGA chapter."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from labutils.fpga.hardware import ArraySpec
from labutils.fpga.simulate import March
from labutils.fpga.synthesis import Placement
from labutils.lab.plots import fpga as plots


@pytest.fixture
def frames():
    """Two rows through a 2×2 array, 2 + 2 + 2 edges and one look."""
    weights, inputs, sums = np.zeros((3, 7, 2, 2), dtype=np.int64)
    weights[:], inputs[3, 1, 0], sums[6, 1, 1] = 4, -5, 42
    return March(2, weights, inputs, sums)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_cycle_shows_weight_row_and_sum(frames):
    ax = Figure().subplots()
    plots.draw_cycle(ax, frames, 3)
    assert texts(ax)[0] == "w = 4\nx1 = 0\nΣ = 0" and texts(ax)[2] == "w = 4\nx0 = -5\nΣ = 0"
    assert texts(ax)[3].split("\n")[1] == "-" and ax.get_title() == "cycle 3: 3 of 4 multiply"
    plots.draw_cycle(ax, frames, 0)
    assert ax.get_title() == "cycle 0: weights move down"


def test_march_has_a_text_twin(frames):
    table = plots.march_table(frames, 3)
    assert table.startswith("cycle 3: 3 of 4 multiply") and "-5 (x0)" in table


def test_area_names_the_ratio():
    ax = Figure().subplots()
    plots.draw_area(ax, {"int8": (100, 20), "binary": (4, 6)})
    assert ax.get_title() == "int8 takes 12 times the area of binary"
    assert ax.get_ylabel() == "LUTs per product" and texts(ax) == ["120", "10"]


def test_floorplan_labels_elements_and_states_the_share():
    cells = [
        ("pe_0_0.a", "TRELLIS_COMB", 3, 4),
        ("pe_0_1.m", "MULT18X18D", 9, 4),
        ("x", "TRELLIS_FF", 5, 5),
    ]
    placed = Placement(123.4, {"TRELLIS_COMB": 2429}, cells, 1, 1, 0.0)
    chip, zoom = Figure().subplots(1, 2)
    plots.draw_floorplan(chip, zoom, placed, ArraySpec(2))
    assert texts(zoom) == ["0,0", "0,1"] and "123 MHz" in zoom.get_title()
    assert chip.get_title().startswith("10.0% of the chip's tables") and len(chip.patches) == len(zoom.patches) == 3
    assert zoom.get_xlim() == (2, 10)


def test_board_says_whether_an_array_waits_for_memory_or_for_itself():
    """By hand: 8 × 8 takes 23 cycles for one row, so bounds of 23 and 46 reach 1 and 2 GMAC/s; memory feeds 1.6."""
    ax = Figure().subplots()
    waits = plots.draw_board(ax, {"slow": (ArraySpec(8), 23.0, 1.0), "fast": (ArraySpec(8), 46.0, 1.0)}, 1.6)
    assert waits == {"slow": "itself", "fast": "memory"}
    assert ax.get_title().startswith("Decoding one sequence, 1 of 2 arrays wait for themselves")
    first, feed = (line.get_ydata() for line in ax.lines[:2])
    assert first[0] == 1.0 and first[-1] == 64 * 23 / 86 and feed[0] == 1.6
    pipelined = plots.draw_board(Figure().subplots(), {"one": (ArraySpec(8, pipelined=True), 36.81, 1.0)}, 1.6)
    assert pipelined == {"one": "itself"}  # one cycle more: 36.81 / 24 < 1.6 < 36.81 / 23


def test_slider_redraws(frames):
    from labutils.lab.widgets.fpga import march_widget, print_march

    slider, picture = march_widget(frames).children
    before = picture.value
    slider.value = 4
    assert picture.value != before and slider.max == 6
    print_march(frames, range(1))

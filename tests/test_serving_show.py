"""The figures of chapter 11, its slider and its plain alternative."""

import matplotlib
import pytest

from labutils.lab.plots.serving import COLOURS, StepTimes, block_states, draw_blocks, draw_timeline, slots_of
from labutils.lab.widgets.serving import blocks_widget, print_blocks
from labutils.serving.blocks import BlockPool, chained_hashes

matplotlib.use("Agg")
STEPS = [StepTimes(0.0, 1.0, {0: 5, 1: 3}), StepTimes(1.0, 1.5, {0: 1, 1: 1}), StepTimes(1.5, 2.0, {1: 1, 2: 4})]


@pytest.fixture
def axes():
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_a_slot_is_taken_again_when_its_request_has_ended():
    assert slots_of(STEPS) == {0: 0, 1: 1, 2: 0}
    assert slots_of([]) == {}


def test_a_slot_is_not_free_before_its_last_step_is_over():
    assert slots_of([StepTimes(0, 1, {0: 1}), StepTimes(1, 2, {0: 1, 1: 3})]) == {0: 0, 1: 1}


def test_a_slot_is_kept_by_a_request_that_skips_a_step():
    steps = [StepTimes(0, 1, {0: 1}), StepTimes(1, 2, {1: 1}), StepTimes(2, 3, {0: 1})]
    assert slots_of(steps) == {0: 0, 1: 1}


def test_timeline_has_a_bar_for_each_part_and_hatches_prompts(axes):
    draw_timeline(axes, STEPS)
    bars = [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2, bar.get_hatch()) for bar in axes.patches]
    assert bars == [
        (0.0, 1.0, 0, "///"),
        (0.0, 1.0, 1, "///"),
        (1.0, 0.5, 0, ""),
        (1.0, 0.5, 1, ""),
        (1.5, 0.5, 1, ""),
        (1.5, 0.5, 0, "///"),
    ]
    assert [text.get_text() for text in axes.texts] == ["0", "1", "2"]


def test_block_states_are_those_of_a_pool(axes):
    pool = BlockPool(5, block_size=2)
    first = pool.allocate([], 3)
    pool.publish(first[0], chained_hashes([1, 2], 2)[0])
    pool.allocate([first[0]], 0)
    pool.publish(first[1], chained_hashes([1, 2, 3, 4], 2)[1])
    pool.release(first)
    states = block_states(pool.references, pool.cached)
    assert states == ["owned", "cached", "free", "free", "free"]
    pool.allocate(first[:1], 0)
    draw_blocks(axes, block_states(pool.references, pool.cached), columns=2)
    assert [text.get_text() for text in axes.texts] == ["2", "c", "", "", ""]
    colours = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axes.patches[:3]]
    assert colours == [COLOURS["shared"], COLOURS["cached"], "#FFFFFF"]


def test_slider_redraws_and_text_says_the_same(capsys):
    frames = [["free", "free"], ["owned", "cached"]]
    slider, picture = blocks_widget(frames).children
    before = bytes(picture.value)
    slider.value = 1
    assert bytes(picture.value) != before and bytes(picture.value).startswith(b"\x89PNG") and slider.max == 1
    print_blocks(frames, [0, 1])
    assert capsys.readouterr().out == "step   0  ..\nstep   1  1c\n"

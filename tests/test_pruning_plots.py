"""Figures and the widget of pruning say what was measured."""

import matplotlib.pyplot as plt
import pytest
import torch
from tiny_models import random_ids, tiny_model

from labutils.lab.layers.calibration import input_statistics
from labutils.lab.layers.linears import linear_layers, weight_of
from labutils.lab.models.compare import PairedQuality
from labutils.lab.plots import pruning as plots
from labutils.lab.widgets.pruning import PrunedSpeaker, print_speech, pruning_widget


def quality(lost):
    return PairedQuality(1.5 + lost, 1.5, (lost * 0.9, lost * 1.2), 9)


@pytest.fixture
def axes():
    figure, axes = plt.subplots(1, 2)
    yield axes
    plt.close(figure)


def test_curves_name_the_best_and_draw_its_intervals(axes):
    curves = {"a": [(0.3, quality(0.1)), (0.7, quality(0.9))], "b": [(0.3, quality(0.2)), (0.7, quality(0.5))]}
    assert plots.draw_curves(axes[0], curves) == "b"
    assert axes[0].get_title() == "b loses least at 70%"
    assert "bits per byte" in axes[0].get_ylabel() and len(axes[0].containers) == 2


def test_published_numbers_stand_beside_ours(axes):
    plots.draw_published(*axes, {name: [quality(0.1 * (i + 1)) for i in range(3)] for name in plots.PUBLISHED})
    magnitude = axes[1].lines[0]
    assert magnitude.get_ydata()[2] == pytest.approx(54.59 - 5.12) and len(axes[0].patches) == 9
    assert not axes[1].patches and magnitude.get_linestyle() == "None"


@pytest.mark.parametrize(
    ("points", "expected"),
    [([(0.5, 0.5), (0.6, 1.5)], 0.55), ([(0.5, 2.0), (0.9, 3.0)], 0.5), ([(0.5, 0.2), (0.9, 0.8)], None), ([], None)],
)
def test_crossing(points, expected):
    assert plots.crossing(points) == (pytest.approx(expected) if expected else None)


def test_break_even_returns_where_each_format_pays(axes):
    found = plots.draw_break_even(axes[0], {"CSR": {0.5: 0.5, 0.7: 1.0, 0.9: 2.0}, "never": {0.5: 0.1, 0.9: 0.2}})
    assert found == {"CSR": pytest.approx(0.7), "never": None}


def test_masks_and_sensitivity_say_what_they_show(axes):
    plots.draw_masks(axes[:1], {"half": torch.arange(64).view(8, 8) % 2 == 0})
    assert "rows keep 50% to 50%" in axes[0].get_title()
    damage = {f"model.layers.{i}.mlp.{k}": [1.0, 1.0 + i + (k == "down")] for i in range(2) for k in ("up", "down")}
    plots.draw_sensitivity(axes[1], damage, 1.0, "50%")
    assert axes[1].get_title() == "Most sensitive at 50%: layers.1.mlp.down"
    assert [t.get_text() for t in axes[1].texts] == ["0.000", "1.000", "1.000", "2.000"]


def test_structure_names_the_cheapest_and_ignores_what_is_larger(axes):
    points = {"a": (80, quality(0.4)), "b": (90, quality(0.1)), "larger": (120, quality(0.001))}
    plots.draw_structure(axes[0], points, dense=100)
    assert axes[0].get_title().endswith("removed: b") and len(axes[0].containers) == 3


def test_groups_are_drawn_with_their_sizes(axes):
    plots.draw_groups(axes[0], {"dense": [1.0, 0.5], "pruned": [0.5, 0.0]}, {"all": 100, "few": 4})
    assert [bar.get_height() for bar in axes[0].patches] == [1.0, 0.5, 0.5, 0.0]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["all\n(100)", "few\n(4)"]


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, **_):
        class Encoded:
            input_ids = torch.tensor([[ord(c) % 97 for c in text]])

        return Encoded

    def decode(self, ids, **_):
        return "".join(chr(97 + int(i) % 26) for i in ids)


@pytest.fixture
def speaker():
    model = tiny_model("llama-gqa-tied")
    return PrunedSpeaker(model, Letters(), input_statistics(model, [random_ids(30)]), "hello")


@pytest.mark.parametrize("criterion", ["magnitude", "Wanda"])
def test_speaker_prunes_while_it_speaks_and_gives_the_weights_back(speaker, criterion):
    before = {name: weight_of(layer).clone() for name, layer in linear_layers(speaker.model)}
    whole, pruned = (speaker.speak(s, criterion=criterion, tokens=5) for s in (0.0, 1.0))
    assert len(whole) == len(pruned) == 5 and speaker.text == "hello" + whole + pruned
    assert all(torch.equal(before[name], weight_of(layer)) for name, layer in linear_layers(speaker.model))
    speaker.pieces.clear()
    assert speaker.speak(0.0, tokens=5) == whole


def test_print_speech_shows_the_sparsities(speaker, capsys):
    print_speech(speaker, [0.0, 0.5])
    assert [line[:12] for line in capsys.readouterr().out.splitlines()] == ["[  0% zeros,", "[ 50% zeros,"]


def test_widget_goes_on_when_the_slider_moves_and_starts_anew(speaker):
    box = pruning_widget(speaker)
    (slider, criterion, anew), page = box.children[0].children, box.children[1]
    slider.value = 0.5
    assert speaker.pieces[0][:2] == (0.5, "magnitude") and "50% zeros" in page.value
    criterion.value = "Wanda"
    assert speaker.pieces[1][:2] == (0.5, "Wanda")
    anew.click()
    assert not speaker.pieces and "zeros" not in page.value

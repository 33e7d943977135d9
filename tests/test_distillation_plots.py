"""Figures, slider and command of distillation say what was measured, and claim no more than the intervals allow."""

import itertools
import json

import matplotlib.pyplot as plt
import pytest
import torch

from labutils.course.cli.main import main
from labutils.lab.models import students
from labutils.lab.models.students import Effect, mean_interval
from labutils.lab.plots import distillation as plots
from labutils.lab.widgets.distillation import opinion_at, temperature_widget


@pytest.fixture
def axes():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def test_opinion_marks_the_right_answer_without_colour_alone(axes):
    plots.draw_opinion(axes, ["a", "b"], [0.7, 0.2], right="a", title="here")
    assert [bar.get_hatch() for bar in axes.patches] == ["//", ""] and axes.patches[0].get_width() == 0.7
    assert axes.get_xlabel() == "probability" and axes.get_title() == "here"


def test_gradients_have_a_line_for_each_loss_on_logarithmic_axes(axes):
    plots.draw_gradients(axes, {"with": {1.0: 2.0, 4.0: 2.0}, "without": {1.0: 2.0, 4.0: 0.1}})
    assert axes.get_xscale() == axes.get_yscale() == "log" and len(axes.lines) == 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4"]


def test_modes_fill_the_teacher_and_draw_each_student(axes):
    plots.draw_modes(axes, torch.tensor([0.5, 0.5]), {"x": torch.tensor([1.0, 0.0]), "y": torch.tensor([0.0, 1.0])})
    assert len(axes.collections) == 1 and [list(line.get_ydata()) for line in axes.lines] == [[1, 0], [0, 1]]


def test_training_draws_the_mean_and_student_s_interval_and_no_band_for_one_seed(axes):
    runs = [[3.0, 2.0], [3.2, 2.4], [3.4, 2.2]]
    plots.draw_training(axes, {"CE": runs, "KD": [[1.0, 1.0]]}, steps=[10, 20], ylabel="bits")
    assert [line.get_ydata() for line in axes.lines] == [pytest.approx((3.2, 2.2))]
    low, high = mean_interval([3.0, 3.2, 3.4])[1]
    ends = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert ends.min() < 2.0 and high in ends and low in ends


def test_effects_count_only_what_lies_wholly_below_zero(axes):
    shown = Effect("tiny", 2.0, 1.8, (-0.3, -0.1), 3)
    unsure = Effect("half", 2.0, 1.9, (-0.3, 0.1), 3)
    plots.draw_effects(axes, [shown, unsure])
    assert axes.get_title() == "KD beats CE at 1 of 2 sizes"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["tiny (3 seeds)", "half (3 seeds)"]


def test_classifiers_stand_at_their_time_and_share(axes):
    plots.draw_classifiers(
        axes, {"LabLM": [(0.05, 0.9, 5_770_496)], "small": [(1e-4, 0.5, 8_127), (2e-4, 0.6, 64_575)]}, items=100
    )
    points = [list(zip(*c.lines[0].get_data(), strict=True)) for c in axes.containers]
    assert points == [[(50.0, 0.9)], [(0.1, 0.5), (0.2, 0.6)]] and axes.get_xscale() == "log"
    assert sorted(text.get_text() for text in axes.texts) == ["5.8M", "65k", "8k"]
    (bars,) = axes.containers[1].lines[2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.45, 0.55])


def test_classifiers_beside_each_other_have_labels_apart(axes):
    near = {f"lesson {n}": [(1.1e-4, 0.72 + n / 100, 516_159), (1.2e-4, 0.7 + n / 100, 64_575)] for n in range(3)}
    plots.draw_classifiers(axes, near | {"LabLM": [(0.1, 0.94, 5_770_496)]}, items=200)
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == 7 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


class Letters:
    def decode(self, ids):
        return "abc"[ids[0]]


class Numbers:
    def decode(self, ids):
        return f"token {ids[0]}"


def test_opinion_flattens_with_temperature_and_names_the_rest():
    text = opinion_at(Letters(), torch.tensor([0.6, 0.3, 0.1]).log(), 1.0, count=2)
    assert text.splitlines()[0] == "T = 1" and "60.0%" in text and "all others" in text and "10.0%" in text
    assert "33.3%" in opinion_at(Letters(), torch.tensor([0.6, 0.3, 0.1]).log(), 1e6, count=2)


def test_widget_follows_its_slider():
    slider, page = temperature_widget(Numbers(), torch.linspace(5, 0, 12)).children
    before = page.value
    slider.value = 8.0
    assert "T = 8" in page.value and page.value != before


def test_command_lists_what_is_left_and_trains_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "runs.jsonl"
    done = {"size": "tiny", "loss": "CE", "seed": 0, "steps": 7, "documents": [[1.0, 1]]}
    path.write_text(json.dumps(done) + "\n", encoding="utf-8")
    read = students.read_runs
    monkeypatch.setattr(students, "read_runs", lambda *_: read(path))
    monkeypatch.setattr(students, "run_point", lambda *a, **k: pytest.fail("it trained"))
    assert main(["distil", "--steps", "7", "--only", "tiny", "--list"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 of 6 runs are done") and "tiny-KD-0-7" in said and "no table yet" in said

"""Progress as text and widget, the figures, the bench's bars, and the link that the kernel shapes."""

import io
import subprocess

import matplotlib
import pytest

from labutils.course.bench.distributed import PolicyTime, bars, paced
from labutils.distributed.dispatch import Report
from labutils.lab.plots.distributed import draw_links, draw_pipeline, draw_policies
from labutils.lab.widgets.dispatch import dispatch_widget, print_progress, progress_line, show_progress

matplotlib.use("Agg")


def reports():
    report = Report()
    for done in range(1, 11):
        report.answers = done
        report.per_node.update({f"node-{done % 2}": 1})
        yield report


def test_progress_is_printed_a_few_times():
    file = io.StringIO()
    show = print_progress(10, steps=2, file=file)
    for report in reports():
        show(report)
    lines = file.getvalue().splitlines()
    assert len(lines) == 2 and lines[-1] == progress_line(report, 10)
    assert "10 of 10 answered" in lines[-1] and "node-1 5" in lines[-1]


def test_progress_widget_has_a_bar_per_node():
    box = dispatch_widget(10)
    show = show_progress(10, box)
    for report in reports():
        show(report)
    label, *bars_shown = box.children
    assert [(bar.description, bar.value) for bar in bars_shown] == [("node-0", 5), ("node-1", 5)]
    assert label.value == progress_line(report, 10)


def test_figures_show_what_they_are_given():
    from matplotlib import pyplot as plt

    figure, (first, second, third) = plt.subplots(3)
    draw_policies(first, {"static": 4.0, "pull": 1.5}, 1.0)
    assert [text.get_text() for text in first.texts] == ["4.00 x", "1.50 x"]
    draw_pipeline(second, [[(0.0, 1.0), (1.0, 2.0)], [(1.0, 2.0), (2.0, 3.0)]])
    assert [text.get_text() for text in second.texts] == ["0", "1", "0", "1"] and second.yaxis_inverted()
    draw_links(third, {"tensor": {"a": 1.0, "b": 9.0}, "pipeline": {"a": 2.0, "b": 3.0}})
    assert [line.get_label() for line in third.lines] == ["tensor", "pipeline"]
    plt.close(figure)


def policy(name, seconds):
    return PolicyTime(name, (seconds,), 1.0, Report())


@pytest.mark.parametrize(
    ("pull", "static", "measured", "expected"),
    [
        (1.2, 4.4, 0.76, [True] * 4),
        (1.4, 4.4, 0.76, [False, True, True, True]),
        (1.2, 3.0, 0.80, [True, True, False, False]),
    ],
)
def test_bars_hold_what_the_issue_asks(pull, static, measured, expected):
    policies = [policy("static", static), policy("weighted", 1.1), policy("pull", pull)]
    assert [bar.holds for bar in bars(policies, {1: (measured, 0.75), 8: (0.9, 0.27)})] == expected


def test_paced_work_needs_a_node():
    with pytest.raises(KeyError):
        paced([1])


@pytest.mark.slow
def test_bench_distributed_quick_ends_with_its_bars(capsys):
    pytest.importorskip("distributed", reason="Dask distributed is not installed")
    from labutils.course.cli.main import main

    assert main(["bench", "distributed", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "overhead per request" in printed and "bubble with 4 micro-batches" in printed
    assert printed.count("holds:") + printed.count("FAILS:") == 4


@pytest.mark.slow
def test_a_shaped_link_carries_what_it_is_allowed_to():
    from labutils.distributed.namespaces import launch_over_link, shaped_link, why_not

    if reason := why_not():
        pytest.skip(reason)
    arguments = {"count": 4, "nbytes": 400_000}
    slow = launch_over_link("rank_models:seconds_of_messages", arguments, bytes_per_s=1e6, timeout_s=300)
    seconds, total = slow[0]
    assert total == 16.0  # four sums over two ranks
    assert seconds > 1.2  # 4 x 400 kB each way at 1 MB/s, less a full bucket: the link cannot be faster
    with pytest.raises(ValueError, match="bytes_per_s must be at least 1000; got 10"), shaped_link(10):
        pass
    with shaped_link(1e6) as mine, shaped_link(1e6) as others:  # two users of one machine
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, encoding="utf-8").stdout
        assert len({*mine, *others}) == 4 and all(name in listed for name in (*mine, *others))
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, encoding="utf-8").stdout
    assert not any(name in listed for name in (*mine, *others))


def test_a_link_that_fails_half_way_deletes_what_it_added_and_nothing_else(monkeypatch):
    from labutils.distributed import namespaces

    added, deleted = [], []

    def run(words, check=False, **_):
        if words[:3] == ["ip", "netns", "delete"]:
            deleted.append(words[3])
        elif words[:3] == ["ip", "netns", "add"] and not added:
            added.append(words[3])
        else:
            raise subprocess.CalledProcessError(1, words, stderr=b"no")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(subprocess.CalledProcessError), namespaces.shaped_link(1e6):
        pass
    assert len(added) == 1 and deleted == added

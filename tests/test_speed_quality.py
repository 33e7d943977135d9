"""The one plot: its Pareto front, its refusals, what stands on the axes, and the widgets around it."""

import io

import ipywidgets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.generation.stream import StreamedToken
from labutils.lab.plots.roofline import RooflinePoint, draw_roofline, limit_of, roofline_finding
from labutils.lab.plots.speed_quality import (
    beaten_by,
    draw_speed_quality,
    drawable_records,
    finding,
    legend_label,
    pareto_front,
    speed_quality_table,
    task_quality,
)
from labutils.lab.plots.style import series_style
from labutils.lab.widgets.speed_quality import available_qualities, select, speed_quality_widget
from labutils.lab.widgets.stream import print_stream, show_stream, stream_widget
from labutils.measurement.ledger import Record, append
from labutils.measurement.roofline import Roofline

points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


def record(technique: str, speed: float, bits: float | None, **changes) -> Record:
    base = {"model": "tiny", "device": "cpu", "dtype": "float32", "threads": 2, "prompt_tokens": 8, "output_tokens": 16}
    base |= {"samples": tuple(speed * f for f in (0.9, 0.95, 1.0, 1.05, 1.1)), "bits_per_byte": bits, "host": {}}
    return Record(technique=technique, **(base | changes))


def three() -> list[Record]:
    return [record("fp32", 10, 1.5), record("int8", 18, 1.52), record("int4, badly", 12, 1.9)]


def test_pareto_front_by_hand():
    assert pareto_front([(1, 3), (2, 2), (1.5, 1), (3, 0)]) == [3, 1, 0]
    assert pareto_front([(1, 1), (1, 1)]) == [0]
    assert pareto_front([(1, 1), (1, 2), (2, 2)]) == [2]
    assert pareto_front([]) == []


@settings(deadline=None, max_examples=30)
@given(points)
def test_pareto_front_is_exactly_what_nothing_beats(some):
    def beats(a, b):
        return a[0] >= b[0] and a[1] >= b[1] and a != b

    front = pareto_front(some)
    unbeaten = {p for p in some if not any(beats(q, p) for q in some)}
    assert {some[i] for i in front} == unbeaten
    assert len(front) == len(unbeaten)
    assert [some[i][0] for i in front] == sorted((some[i][0] for i in front), reverse=True)


def test_plot_has_points_intervals_front_labels_and_a_finding():
    ax = draw_speed_quality(three()).axes[0]
    assert "tokens/s" in ax.get_xlabel() and "bits per byte" in ax.get_ylabel()
    assert ax.yaxis_inverted()
    assert ax.get_title() == "int8 is 1.8x as fast as fp32 and costs 0.02 bits per byte"
    (front,) = [line for line in ax.lines if line.get_label() == "Pareto front of the medians"]
    assert front.get_xydata().tolist() == [[18.0, 1.52], [10.0, 1.5]]
    assert {t.get_text() for t in ax.texts} == {"fp32", "int8", "int4, badly"} and ax.get_legend() is None
    assert ax.get_xlabel().endswith("tiny (cpu, 2 threads)")  # once, for it is the same for all
    assert sum(c.get_label().startswith("int8") for c in ax.collections) == 1


def test_points_of_several_models_get_a_legend_that_says_which():
    ax = draw_speed_quality([*three(), record("int8", 30, 1.4, model="other")]).axes[0]
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert {"int8: tiny (cpu, 2 threads, float32)", "int8: other (cpu, 2 threads, float32)"} <= set(labels)
    assert not ax.texts


def test_error_bars_span_the_bootstrap_interval():
    one = record("fp32", 10, 1.5)
    ax = draw_speed_quality([one]).axes[0]
    low, high = one.interval_tokens_per_s
    (segments,) = [c for c in ax.collections if hasattr(c, "get_segments")]
    assert segments.get_segments()[0].tolist() == [[pytest.approx(low), 1.5], [pytest.approx(high), 1.5]]


def test_rounding_is_not_drawn_as_a_difference():
    ax = draw_speed_quality([record("a", 10, 2.0), record("b", 20, 2.0 + 1e-9)]).axes[0]
    top, bottom = sorted(ax.get_ylim())
    assert bottom - top == pytest.approx(0.01) and ax.yaxis_inverted()


def test_a_tasks_score_is_better_when_higher():
    records = [
        record("a", 10, None, task="intent", task_score=0.9),
        record("b", 20, None, task="intent", task_score=0.7),
    ]
    ax = draw_speed_quality([*records, record("c", 99, 1.0)], quality=task_quality("intent")).axes[0]
    assert not ax.yaxis_inverted()
    assert ax.get_title() == "b is 2x as fast as a and costs 0.2 score"
    assert "intent" in ax.get_ylabel()


def test_finding_across_devices_says_so():
    title = finding([record("a", 10, 1.5), record("b", 20, 1.6, device="cuda")])
    assert title == "b is 2x as fast as a (cuda against cpu) and costs 0.1 bits per byte"


def test_finding_when_the_fastest_is_also_the_best():
    assert finding([record("a", 10, 1.5), record("b", 20, 1.4)]) == "b is fastest, and none is better (20 tokens/s)"
    near = finding([record("a", 1990, 1.5), record("b", 2000, 1.4)])
    assert near == "b is fastest, and none is better (2,000 tokens/s, in speed not told apart from a)"


def test_finding_claims_only_what_its_intervals_show():
    assert finding([record("a", 10, 1.5), record("b", 10.1, 1.6)]) == (
        "b and a are not told apart in speed; the former costs 0.1 bits per byte"
    )
    bits = [(1000.0, 100)] * 10
    noisy = [(1000.0 + (-1) ** i * 50, 100) for i in range(9)] + [(1060.0, 100)]
    pair = [record("a", 10, 1.25, document_bits=bits), record("b", 20, 1.26, document_bits=noisy)]
    assert finding(pair) == "b is 2x as fast as a and differs in quality by no more than chance"


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (lambda: [record("x", 1, None)], "needs a quality"),
        (lambda: [record("x", 1, 1.0, samples=(1.0,))], "raw samples"),
        (list, "at least one record"),
        (lambda: [record("x", 1, None, task="intent", task_score=1.0)], "at least one record with bits_per_byte"),
    ],
)
def test_plot_refuses_what_cannot_be_drawn(bad, rule):
    with pytest.raises(ValueError, match=rule):
        draw_speed_quality(bad())
    with pytest.raises(ValueError, match=rule):
        drawable_records(bad())


def test_table_marks_the_front_and_sorts_by_speed():
    lines = speed_quality_table(three()).splitlines()
    for line, name in zip(lines[1:], ("int8", "int4, badly", "fp32"), strict=True):
        assert f" {name}: tiny" in line
    assert [line.startswith("*") for line in lines[1:]] == [True, False, True]


def bits(*per_document: float) -> tuple[tuple[float, int], ...]:
    return tuple((value, 10) for value in per_document)


def test_a_point_is_beaten_only_where_both_differences_are_sure():
    slow, fast = record("slow", 10, 1.6), record("fast", 20, 1.5)
    assert beaten_by(slow, [slow, fast]) == [fast] and beaten_by(fast, [slow, fast]) == []
    shaky = record("fast", 20, 1.5, samples=(9.0, 12.0, 20.0, 22.0, 25.0))  # its interval overlaps that of `slow`
    assert beaten_by(slow, [slow, shaky]) == []
    noise = {"document_bits": bits(16, 15, 17, 14, 18)}  # 8 bits for 5 documents of 10 bytes: 1.6 bits per byte
    luck = record("fast", 20, 1.58, document_bits=bits(17, 14, 18, 13, 17))  # better on two documents, worse on three
    slow_pairs = record("slow", 10, 1.6, **noise)
    assert beaten_by(slow_pairs, [slow_pairs, luck]) == []
    better = record("fast", 20, 1.5, document_bits=bits(15, 14, 16, 13, 17))  # better on every one
    assert beaten_by(slow_pairs, [slow_pairs, better]) == [better]


def test_table_names_ties():
    even = {"document_bits": bits(16, 15, 17, 14, 18)}
    shaky = (10.0, 14.0, 19.0, 21.0, 25.0)
    tied = [record("a", 20, 1.5), record("b", 19.5, 1.6), record("c", 5, 1.7), record("d", 10, 1.5)]
    a, b, d, c = speed_quality_table(tied).splitlines()[1:]
    assert a.startswith("*") and "told apart" not in a
    assert b.startswith("*") and b.endswith("worse, in speed not told apart")
    assert d.startswith("*") and d.endswith("slower, in quality not told apart")  # equal quality, half the speed
    assert not c.startswith("*") and "told apart" not in c
    luck = record("luck", 20, 1.58, document_bits=bits(17, 14, 18, 13, 17))
    rows = speed_quality_table([luck, record("noise", 19, 1.6, samples=shaky, **even)]).splitlines()
    assert rows[2].endswith("not told apart from the front")


def test_legend_names_the_gpu_and_the_batch():
    on_gpu = record("a", 1, 1.0, device="cuda:0", batch=4, host={"gpu": "NVIDIA T4"})
    assert legend_label(on_gpu) == "a: tiny (NVIDIA T4, float32, batch 4)"


def test_series_differ_in_shape_and_colour():
    assert len({tuple(series_style(i).values()) for i in range(70)}) == 70


def test_widget_redraws_on_choice_and_starts_with_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("LABUTILS_HOME", str(tmp_path))
    for r in (*three(), record("gpu", 90, 1.5, device="cuda")):
        append(r)
    box = speed_quality_widget()
    controls, picture, table = box.children
    assert bytes(picture.value).startswith(b"\x89PNG")
    assert "int8" in table.value and "gpu" in table.value
    controls.children[1].value = "cpu"
    assert "int8" in table.value and "gpu" not in table.value
    assert isinstance(box, ipywidgets.VBox)


def test_widget_without_records_states_the_rule():
    with pytest.raises(ValueError, match="at least one record"):
        speed_quality_widget([])


def test_select_and_qualities():
    records = [*three(), record("t", 1, None, task="intent", task_score=0.5, model="other")]
    assert list(available_qualities(records)) == ["bits per byte", "intent"]
    assert [r.technique for r in select(records, model="other")] == ["t"]
    assert len(select(records)) == 4


def roof() -> Roofline:
    return Roofline(10e9, 100e9, threads=1, device="cpu", dtype="float32", working_set_bytes=2**28, samples={})


def test_roofline_plot_places_points_and_names_their_share():
    decode = RooflinePoint("decode", flop=4e9, moved_bytes=8e9, seconds=1.0)  # 0.5 FLOP/byte, roof 5 GFLOP/s
    prefill = RooflinePoint("prefill", flop=80e9, moved_bytes=1e9, seconds=1.0)
    ax = draw_roofline(roof(), [decode, prefill]).axes[0]
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["measured roof", "decode: 80% of the roof", "prefill: 80% of the roof"]
    assert ax.get_title() == "memory limits decode; arithmetic limits prefill (cpu, float32, 1 thread)"
    assert ax.collections[0].get_offsets().tolist() == [[0.5, 4.0]]


def test_roofline_plot_reports_a_probe_error_and_draws_without_points():
    wrong = RooflinePoint("cached", flop=6e9, moved_bytes=12e9, seconds=1.0)
    assert wrong.share(roof()) == "probe error (120%)"
    assert "Below 10.0 FLOP per byte" in draw_roofline(roof()).axes[0].get_title()
    assert "memory limits cached" in roofline_finding(roof(), [wrong])
    slow = RooflinePoint("eager", flop=1e9, moved_bytes=2e9, seconds=1.0)  # a fifth of the 5 GFLOP/s that memory allows
    assert limit_of(roof(), slow) == "overhead"
    fast = RooflinePoint("tuned", flop=4e9, moved_bytes=8e9, seconds=1.0)
    assert roofline_finding(roof(), [slow, fast, slow]).startswith(
        "overhead limits eager and eager; memory limits tuned"
    )
    with pytest.raises(ValueError, match="must be positive; got 0"):
        RooflinePoint("x", 0, 1, 1)


def tokens() -> list[StreamedToken]:
    return [StreamedToken(1, "<a>", 0.5), StreamedToken(2, " b", 0.1), StreamedToken(3, "", 0.1)]


def test_print_stream_writes_text_then_speed():
    out = io.StringIO()
    times = print_stream(tokens(), file=out)
    assert out.getvalue() == "<a> b\n[3 tokens: the first after 0.500 s, then 10.0 tokens/s]\n"
    assert times.tokens_per_s == 10.0


def test_show_stream_fills_the_widget_and_escapes_the_text():
    box = stream_widget()
    show_stream(tokens(), box)
    assert "&lt;a&gt; b" in box.children[0].value
    assert box.children[1].value == "3 tokens: the first after 0.500 s, then 10.0 tokens/s"


def test_empty_streams_state_the_rule():
    with pytest.raises(ValueError, match="at least one token"):
        print_stream([], file=io.StringIO())
    with pytest.raises(ValueError, match="at least one token"):
        show_stream([], stream_widget())

"""The pictures of quantization: what they say, what they refuse, and the widget that moves them."""

import pytest
import torch
from matplotlib.figure import Figure

from labutils.lab.models.compare import PairedQuality
from labutils.lab.plots.quantization import (
    BitsPoint,
    bits_finding,
    bits_front,
    bits_quality_table,
    draw_bits_quality,
    draw_clipping,
    draw_quantized_layer,
    draw_tokens,
    quantized_layer,
)
from labutils.lab.widgets.quantization import bits_widget, quantization_widget, spell_bits
from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.theory import sqnr_db

WEIGHT = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))


def point(name, bits, loss, spread=0.01, by_document=(0, 0, 0, 0, 0)):
    quality = PairedQuality(1.5 + loss, 1.5, (loss - spread, loss + spread), 9)
    return BitsPoint(name, bits, quality, [(100 * (1.5 + loss) + extra, 100) for extra in by_document])


POINTS = [point("int8", 8.5, 0.0), point("int4", 4.5, 0.03), point("worse", 5.0, 0.04), point("NF4", 4.2, 0.005)]


def test_quantized_layer_measures_what_it_names():
    layer = quantized_layer(WEIGHT, bits=3, granularity="group of 32")
    scheme = Scheme(bits=3, granularity="group", group_size=32, scale_dtype=torch.float16)
    assert layer.bits_per_weight == 3.5 and layer.sqnr_db == sqnr_db(WEIGHT, fake_quantize(WEIGHT, scheme))
    assert str(layer) == f"int3 by group of 32, min-max: SQNR {layer.sqnr_db:.1f} dB at 3.500 bits per weight"


def test_quantized_layer_least_error_is_best():
    ratios = {c: quantized_layer(WEIGHT, bits=3, clipping=c).sqnr_db for c in ("min-max", "least error")}
    assert ratios["least error"] > ratios["min-max"]
    assert (
        quantized_layer(WEIGHT, granularity="tensor", clipping="99th percentile").back.abs().max() < WEIGHT.abs().max()
    )


@pytest.mark.parametrize("choice", [{"granularity": "row"}, {"clipping": "tight"}])
def test_quantized_layer_rejects(choice):
    with pytest.raises(ValueError, match="must be one of .*; got"):
        quantized_layer(WEIGHT, **choice)


def test_draw_quantized_layer_labels_everything():
    figure = draw_quantized_layer(quantized_layer(WEIGHT))
    left, right, bar = figure.axes
    assert (
        "SQNR" in figure.get_suptitle() and left.get_xlabel() and right.get_ylabel() and "|error|" in bar.get_ylabel()
    )
    assert right.images[0].get_array().shape == WEIGHT.shape


def test_bits_front_by_hand():
    assert [p.name for p in bits_front(POINTS)] == ["NF4", "int8"]


def test_bits_finding_trusts_only_intervals():
    assert bits_finding(POINTS) == "NF4 (4.20 bits) is the smallest that costs less than 0.02 bits per byte"
    assert bits_finding([point("NF4", 4.2, 0.005, spread=0.1)]).startswith("None of 1 ways")


def test_draw_bits_quality_shows_every_point():
    axes = draw_bits_quality(POINTS).axes[0]
    assert {p.name for p in POINTS} == {t.get_text() for t in axes.texts} and axes.get_legend() is None
    assert axes.get_title() == bits_finding(POINTS) and "bits per weight" in axes.get_xlabel()


def test_bits_quality_table_marks_what_nothing_surely_beats():
    tied = point("tied", 5.0, 0.006, by_document=(-3, 3, -2, 2, 0))  # worse than NF4 on average, not on each document
    marked = [line.split()[-1] for line in bits_quality_table([*POINTS, tied]).splitlines() if line.startswith("*")]
    assert marked == ["NF4", "tied", "int8"]


def test_draw_tokens_puts_them_in_lines_and_marks_flips():
    axes = Figure().subplots()
    draw_tokens(axes, {"one": [("ab", False), ("cd", True), ("\nef", True)], "two": [("g", False)]}, lines=5, width=3)
    at = {text.get_text(): (*text.get_position(), text.get_color()) for text in axes.texts if text.get_text()}
    assert at["one"][:2] == (0, 1) and at["two"][:2] == (0, 6)
    assert at["ab"] == (0, 2, at["g"][2]) and at["cd"][:2] == (0, 3) and at["ef"][:2] == (0, 4)  # cd does not fit
    assert at["cd"][2] == at["ef"][2] != at["ab"][2]


def test_widget_follows_its_controls():
    box = quantization_widget(WEIGHT)
    (bits, granularity, clipping), line, picture = box.children[0].children, box.children[1], box.children[2]
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG") and line.value.startswith("int4 by group of 64, min-max")
    bits.value, granularity.value, clipping.value = 2, "channel", "99th percentile"
    assert line.value.startswith("int2 by channel, 99th percentile") and bytes(picture.value) != before


def test_draw_clipping_shows_each_level_and_its_share():
    axes = Figure().subplots()
    draw_clipping(axes, WEIGHT, bits=3, share=0.5)
    line = next(line for line in axes.lines if line.get_label() == "their levels")
    levels, shares = (torch.tensor(part) for part in line.get_data())
    peak = WEIGHT.abs().max().item()
    torch.testing.assert_close(levels, torch.arange(-3, 4) * 0.5 * peak / 3, check_dtype=False)
    cut = (WEIGHT.abs() * 3 / (0.5 * peak)).round().clamp(max=3)
    assert shares.sum().item() == pytest.approx(100, abs=1e-3)
    assert shares[3].item() == pytest.approx(100 * (cut == 0).float().mean().item(), abs=1e-3)
    low, high = (
        fake_quantize(WEIGHT, Scheme(bits=3, granularity="tensor"), low=-s * peak, high=s * peak) for s in (0.5, 1)
    )
    assert f"{sqnr_db(WEIGHT, low):.1f} dB" in axes.get_title() and sqnr_db(WEIGHT, low) != sqnr_db(WEIGHT, high)


@pytest.mark.parametrize(
    ("bits", "form", "words"),
    [
        ("10111000", "E4M3", "1 0111 000 means -1"),
        ("01111111", "E4M3", "means nan"),
        ("01111100", "E5M2", "0 11111 00 means inf"),
        ("00000111", "E2M1", "0 11 1 means 6"),
        ("10000000", "int8", "means -128"),
    ],
)
def test_spell_bits_by_hand(bits, form, words):
    assert words in spell_bits(bits, form)


@pytest.mark.parametrize(("bits", "form"), [("00111000", "fp8"), ("0011", "E4M3"), ("0011100x", "E4M3")])
def test_spell_bits_refuses(bits, form):
    with pytest.raises(ValueError, match="must be .*; got"):
        spell_bits(bits, form)


def test_bits_widget_flips_and_reads_anew():
    row, line = bits_widget().children
    *buttons, form = row.children
    assert line.value == "0 0111 000 means 1"
    buttons[0].value = True
    assert line.value == "1 0111 000 means -1" and buttons[0].description == "1"
    form.value = "int8"
    assert line.value == "10111000 means -72"

"""The pictures of quantization: what they say, what they refuse, and the widget that moves them."""

import pytest
import torch

from labutils.models.compare import PairedQuality
from labutils.plots.quantization import (
    BitsPoint,
    bits_finding,
    bits_front,
    bits_quality_table,
    draw_bits_quality,
    draw_quantized_layer,
    quantized_layer,
)
from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.theory import sqnr_db
from labutils.widgets.quantization import quantization_widget

WEIGHT = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))


def point(name, bits, loss, spread=0.01):
    return BitsPoint(name, bits, PairedQuality(1.5 + loss, 1.5, (loss - spread, loss + spread), 9))


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
    assert {"Pareto front", *(p.name for p in POINTS)} == {t.get_text() for t in axes.get_legend().get_texts()}
    assert axes.get_title() == bits_finding(POINTS) and "bits per weight" in axes.get_xlabel()


def test_bits_quality_table_marks_the_front():
    marked = [line.split()[-1] for line in bits_quality_table(POINTS).splitlines() if line.startswith("*")]
    assert marked == ["NF4", "int8"]


def test_widget_follows_its_controls():
    box = quantization_widget(WEIGHT)
    (bits, granularity, clipping), line, picture = box.children[0].children, box.children[1], box.children[2]
    before = bytes(picture.value)
    assert before.startswith(b"\x89PNG") and line.value.startswith("int4 by group of 64, min-max")
    bits.value, granularity.value, clipping.value = 2, "channel", "99th percentile"
    assert line.value.startswith("int2 by channel, 99th percentile") and bytes(picture.value) != before

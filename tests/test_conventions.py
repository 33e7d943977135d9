"""Other libraries' conventions: the stored table is what the packages do, and the page is what the table says."""

from importlib.metadata import version
from pathlib import Path

import formats_of_others
import numpy as np
import pytest
from formats_of_others import PINS, RULES, Stored, facts, nibbles_of

from labutils.course.summary import write_formats
from labutils.quantization import conventions

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_the_table_s():
    assert write_formats(ROOT, write=False) == []


def test_each_row_names_a_library_that_is_observed():
    seen = conventions.observed()
    assert seen.keys() <= PINS.keys()
    for library, found in seen.items():
        assert found["rows"] or found["casts"]
        name = library.translate(formats_of_others.IDENTIFIER)
        assert hasattr(formats_of_others, f"observe_{name}") or not found["rows"]
        assert hasattr(formats_of_others, f"casts_of_{name}") or "casts" not in found
        for cells in found["rows"].values():
            assert cells and set(cells) <= set(conventions.COLUMNS)


def test_what_was_not_tried_is_said():
    assert "| openvino 2026.4.1 | u4 constants |" + " not observed |" * 4 in conventions.formats_page()
    with pytest.raises(ValueError, match="columns must be of scale, .*; got colour"):
        conventions.conventions_table("colour")


def rounded(levels, round_, *, inverse=False, signed=False):
    def quantize(weight):
        peak = weight[np.abs(weight).argmax()]
        scale = peak / -levels if signed else np.abs(peak) / levels
        codes = np.clip(round_(weight / scale), -128, 127)
        return Stored(codes, 1 / scale if inverse else scale)

    return quantize


@pytest.mark.parametrize("rule", ["max|w| / 127", "max|w| / 127.5", "max|w| / 128", "127 / max|w|, the inverse"])
def test_the_observer_tells_rules_and_roundings_apart(rule):
    levels = 127 if "inverse" in rule else float(rule.split()[-1])
    for round_, name in ((np.rint, "ties to even"), (np.trunc, "cut off")):
        cells = facts(rounded(levels, round_, inverse="inverse" in rule), 64)
        assert (cells["scale"], cells["rounding"], cells["zero point"]) == (rule, name, "none")
    assert facts(rounded(8, np.rint, signed=True), 64)["scale"] == "w_peak / −8, signed"
    with pytest.raises(AssertionError):  # no rule of the list
        facts(rounded(100, np.rint), 64)
    assert len(RULES) == len({ends_scale(rule) for rule in RULES})


def ends_scale(rule):
    return tuple(round(RULES[rule][0](low, high), 6) for low, high in formats_of_others.ENDS)


def test_the_observer_tells_byte_orders_apart():
    codes = np.array([1, 2, 3, 4])
    assert nibbles_of(Stored(codes, 1.0, None, np.array([0x21, 0x43]))) == "neighbours, the first low"
    assert nibbles_of(Stored(codes, 1.0, None, np.array([0x12, 0x34]))) == "neighbours, the first high"
    assert nibbles_of(Stored(codes, 1.0, None, np.array([0x31, 0x42]))) == "j and j + n/2, the first low"
    assert (
        nibbles_of(Stored(codes - 8, 1.0, None, np.array([0x21, 0x43]))) == "neighbours, the first low, counted from −8"
    )
    assert nibbles_of(Stored(codes, 1.0, None, np.array([0, 0]))) == "other"


def test_casts_disagree_in_four_ways():
    """Saturation, NaN, NaN as the largest number; int4 that wraps or clamps: what chapter 03 says, by version."""
    casts = {f"{name} {found['version']}": found["casts"] for name, found in seen_with_casts()}
    e4m3 = {name: (cells["1000 to e4m3"], cells["nan to e4m3"]) for name, cells in casts.items()}
    assert e4m3 == {
        "torch 2.13.0": ("448", "nan"),
        "ml_dtypes 0.6.0": ("nan", "nan"),
        "jax 0.10.2": ("nan", "nan"),
        "mlx 0.32.4": ("448", "448"),
        "openvino 2026.4.1": ("nan", "nan"),
    }
    int4 = {name: cells["100 to int4"] for name, cells in casts.items() if "100 to int4" in cells}
    assert int4 == {"ml_dtypes 0.6.0": "4", "jax 0.10.2": "7", "openvino 2026.4.1": "4"}  # 100 = 6 · 16 + 4


@pytest.mark.parametrize("library", ["torch", "ml_dtypes", "jax"])
def test_the_environment_s_casts_are_those_of_the_table(library):
    """Ours refuses what these make numbers of: test_quantization_floats.py."""
    pytest.importorskip(library)
    stored = conventions.observed()[library]
    if (here := version(library).partition("+")[0]) != stored["version"]:
        pytest.skip(f"observed with {library} {stored['version']}; here is {here}")
    assert getattr(formats_of_others, f"casts_of_{library}")() == stored["casts"]


def seen_with_casts():
    return [(name, found) for name, found in conventions.observed().items() if "casts" in found]

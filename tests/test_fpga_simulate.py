"""The array in HDL against numpy, cycle by cycle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils.fpga.hardware import (
    ArraySpec,
    accumulator_bits,
    element_ports,
    processing_element,
    requantizer,
    requantizer_ports,
)
from labutils.fpga.planted import planted_arrays
from labutils.fpga.simulate import build_array, layer_product, march, run_array, simulate, skew, total_cycles, words

pytest.importorskip("amaranth", reason="needs Amaranth: python -m pip install amaranth")

PRECISIONS = [(8, 8, 1), (8, 4, 1), (4, 4, 1), (3, 3, 1), (1, 1, 1), (1, 1, 8)]
CASES = [(n, *precision) for n, precision in zip((2, 3, 4, 1, 3, 2), PRECISIONS, strict=True)]


def spec_of(n, x_bits, w_bits, lanes, pipelined):
    return ArraySpec(n, x_bits, w_bits, accumulator_bits(x_bits, w_bits, 2 * n * lanes), pipelined, lanes)


def extremes(spec, rows, rng):
    """Random codes, and among them rows and columns of the lowest code only."""
    depth = spec.n * spec.lanes
    if spec.is_binary:
        return rng.choice([-1, 1], (rows, depth)), rng.choice([-1, 1], (depth, spec.n))
    low_x, low_w = -(2 ** (spec.x_bits - 1)), -(2 ** (spec.w_bits - 1))
    x, w = rng.integers(low_x, -low_x, (rows, depth)), rng.integers(low_w, -low_w, (depth, spec.n))
    x[0], w[:, 0] = low_x, low_w
    return x, w


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_array_equals_numpy_at_every_precision(case, pipelined):
    spec, rng = spec_of(*case, pipelined), np.random.default_rng(0)
    array = build_array(spec)
    for rows in (1, 5):
        x, w = extremes(spec, rows, rng)
        assert (run_array(array, x, w) == x @ w).all()


def test_array_by_hand():
    x, w = np.array([[1, 2]]), np.array([[3, 0], [0, -4]])
    assert run_array(build_array(ArraySpec(2)), x, w).tolist() == [[3, -8]]
    sums = np.array([[10, -10]])
    for pipelined in (False, True):
        assert run_array(build_array(ArraySpec(2, pipelined=pipelined)), x, w, sums).tolist() == [[13, -18]]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_array_equals_numpy_on_random_shapes(rows, seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 4))
    x, w, sums = rng.integers(-128, 128, (rows, n)), rng.integers(-128, 128, (n, n)), rng.integers(-99, 99, (rows, n))
    array = build_array(ArraySpec(n, acc_bits=accumulator_bits(8, 8, n + 1)))
    assert (run_array(array, x, w, sums) == x @ w + sums).all()


def test_each_sum_stands_below_the_array_in_the_cycle_of_the_formula():
    n, rows = 3, 4
    x, w = np.arange(1, rows + 1)[:, None] * np.ones((1, n), dtype=np.int64), np.ones((n, n), dtype=np.int64)
    frames = march(build_array(ArraySpec(n)), x.astype(np.int64), w)
    last = total_cycles(n, rows)
    assert len(frames.sums) == last + 1
    assert frames.sums[last - rows :, n - 1, n - 1].tolist() == [0, 3, 6, 9, 12]
    assert (frames.weights[n] == w).all() and not (frames.weights[0] == w).any()


def test_march_knows_which_row_is_where():
    x = np.array([[1, 2], [3, 4], [5, 6]])
    frames = march(build_array(ArraySpec(2)), x, np.eye(2, dtype=np.int64))
    for cycle in range(len(frames.inputs)):
        for k in range(2):
            for j in range(2):
                row = frames.row_at(cycle, k, j)
                assert frames.inputs[cycle, k, j] == (0 if row is None else x[row, k])
    assert max(map(frames.busy, range(len(frames.inputs)))) == 4


def test_layer_in_tiles_equals_numpy_and_counts_its_cycles():
    rng = np.random.default_rng(0)
    x, w = rng.integers(-128, 128, (3, 8)), rng.integers(-128, 128, (8, 4))
    y, cycles = layer_product(build_array(ArraySpec(2)), x, w)
    assert (y == x @ w).all()
    assert cycles == 4 * 2 * total_cycles(2, 3) == 56
    bias = np.array([5, -6, 7, 8])
    assert (layer_product(build_array(ArraySpec(4)), x, w, bias)[0] == x @ w + bias).all()
    with pytest.raises(ValueError, match="tiles of 3 x 3 must divide the layer; got 8 x 4"):
        layer_product(build_array(ArraySpec(3)), x, w)


def test_sums_wrap_where_the_accumulator_is_one_bit_short():
    x, w = np.full((1, 2), -128), np.full((2, 2), -128)
    wide, narrow = (build_array(ArraySpec(2, acc_bits=accumulator_bits(8, 8, 2) - short)) for short in (0, 1))
    assert run_array(wide, x, w)[0, 0] == 2**15
    assert run_array(narrow, x, w)[0, 0] == -(2**15)


@pytest.mark.parametrize(("bits", "terms"), [(8, 1), (8, 768), (4, 5), (2, 3), (3, 4)])
def test_accumulator_bits_is_the_smallest_that_holds_the_extremes(bits, terms):
    n, largest = accumulator_bits(bits, bits, terms), terms * 4 ** (bits - 1)
    assert largest <= 2 ** (n - 1) - 1 < 2 * largest


def test_skew_by_hand():
    assert skew(np.array([[1, 2, 3]])).tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]


def test_words_pack_signs_and_refuse_what_does_not_fit():
    assert words(np.array([[1, -1, -1, 1]]), 1, 2, 1).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"codes must lie in -8 … 7; got 0 … 8"):
        words(np.array([0, 8]), 4, 1, 0)
    with pytest.raises(ValueError, match="signs are -1 and 1; got"):
        words(np.array([0, 1]), 1, 1, 0)
    with pytest.raises(ValueError, match="multiple of lanes=2; got 3"):
        words(np.array([1, 1, 1]), 1, 2, 0)


def test_array_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"an array of n=2 takes x \(rows, 2\)"):
        run_array(build_array(ArraySpec(2)), np.ones((1, 3), dtype=np.int64), np.ones((3, 2), dtype=np.int64))


@pytest.mark.parametrize(
    ("settings_", "words_"),
    [
        ({"n": 0}, "n >= 1"),
        ({"n": 2, "x_bits": 17}, "1 to 16 bits"),
        ({"n": 2, "w_bits": 1}, "signs multiply signs only"),
        ({"n": 2, "lanes": 2}, "only one-bit elements"),
        ({"n": 2, "acc_bits": 1}, "at least 2 bits"),
    ],
)
def test_spec_refuses_what_cannot_be_built(settings_, words_):
    with pytest.raises(ValueError, match=words_):
        ArraySpec(**settings_)


def test_spec_names_its_rows():
    assert str(ArraySpec(4, 8, 4, 21, True)) == "4x4 int8 x int4, acc21, pipelined"
    assert str(ArraySpec(2, 1, 1, 11, lanes=8)) == "2x2 binary x 8, acc11"


def test_a_loop_of_wires_is_refused_before_it_runs():
    from amaranth.hdl import Module

    spec = ArraySpec(1)
    p, m = element_ports(spec), Module()
    m.d.comb += p.sum_out.eq(p.sum_out + p.x_in)
    with pytest.raises(ValueError, match="^wires must not form a loop without a register"):
        simulate(m, [(p.x_in, [1, 2])], [p.sum_out])


def test_a_design_without_registers_can_be_simulated():
    from amaranth.hdl import Module

    p, m = element_ports(ArraySpec(1)), Module()
    m.d.comb += p.sum_out.eq(p.x_in * 3)
    assert simulate(m, [(p.x_in, [1, -2])], [p.sum_out]).tolist() == [[3], [-6]]


def test_requantizer_equals_chapter_2_for_random_sums_and_extremes():
    import torch

    from labutils.quantization.integer import fixed_point, requantize

    rng = np.random.default_rng(0)
    ends = [-(2**31), 2**31 - 1, 0, 1, -1]
    sums = np.concatenate([ends, rng.integers(-(2**31), 2**31, 40), rng.integers(-5000, 5000, 40)])
    scales = np.concatenate([[0.5, 2.0**-31, 1.0, 3e4], np.exp(rng.uniform(-18, 2, len(sums) - 4))])
    pairs = np.array([fixed_point(float(s)) for s in scales])
    zero_points = rng.integers(-128, 128, len(sums))
    p = requantizer_ports()
    driven = [(p.sum, sums), (p.multiplier, pairs[:, 0]), (p.shift, pairs[:, 1]), (p.zero_point, zero_points)]
    found = simulate(requantizer(p), driven, [p.code])[:, 0]
    for code, total, (multiplier, shift), zero_point in zip(found, sums, pairs, zero_points, strict=True):
        whole = torch.tensor([total], dtype=torch.int32)
        expected = requantize(whole, torch.tensor(multiplier), torch.tensor(shift), zero_point=int(zero_point))
        assert code == expected.item()


def test_planted_arrays_are_wrong_where_they_should_be_and_only_there():
    arrays = planted_arrays(2)
    assert set(arrays) == {"skew", "sign", "gate", "width"}
    plain = np.array([[1, 2], [3, 4]]), np.array([[5, 6], [7, 8]])
    right = {name: (run_array(array, *plain) == plain[0] @ plain[1]).all() for name, array in arrays.items()}
    assert right == {"skew": False, "sign": True, "gate": True, "width": True}
    telling = {
        "sign": (np.array([[1, 1]]), np.array([[-1, 0], [0, 1]])),
        "gate": (np.array([[1, 1], [0, 0]]), np.ones((2, 2), dtype=np.int64)),
        "width": (np.full((1, 2), -128), np.full((2, 2), -128)),
    }
    for name, (x, w) in telling.items():
        assert not (run_array(arrays[name], x, w) == x @ w).all()


def test_element_keeps_its_weight_and_passes_it_on():
    p = element_ports(ArraySpec(1))
    driven = [(p.load, [1, 0, 0]), (p.w_in, [7, 9, 9]), (p.x_in, [0, 2, 3]), (p.sum_in, [0, 10, 0])]
    shown = simulate(processing_element(p, ArraySpec(1)), driven, [p.w_out, p.x_out, p.sum_out])
    assert shown.tolist() == [[0, 0, 0], [7, 0, 0], [7, 2, 24]]

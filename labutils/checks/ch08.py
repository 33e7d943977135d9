"""Checks of chapter 08, first part: hardware that the learner writes, simulated for a fixed number of cycles."""

from types import SimpleNamespace

import numpy as np
import torch

from labutils.checks import CheckFailed, exercise, expect_equal, expect_function, expect_true
from labutils.fpga import hardware, planted
from labutils.fpga.simulate import build_array, run_array, simulate
from labutils.quantization import integer


def _module(answer, *arguments):
    """What the learner's function returned, which must be a module."""
    from amaranth.hdl import Module

    module = answer(*arguments)
    if not isinstance(module, Module):
        raise TypeError(f"the function must return its Module m; got {type(module).__name__}")
    return module


def _element_run(make, *, pipelined=False):
    """Runs an element on random inputs: rows are cycles, columns w_out, x_out and sum_out."""

    def run(bits, random_inputs):
        spec = hardware.ArraySpec(1, bits, bits, 20, pipelined)
        p, rng, high = hardware.element_ports(spec), np.random.default_rng(random_inputs), 2 ** (bits - 1)
        load = [1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
        columns = {"w_in": rng.integers(-high, high, 12), "x_in": rng.integers(-high, high, 12)}
        columns |= {"load": load, "sum_in": rng.integers(-1000, 1000, 12)}
        stimulus = [(getattr(p, port), values) for port, values in columns.items()]
        return simulate(_module(make, p), stimulus, [p.w_out, p.x_out, p.sum_out])

    return run


def _element(*, w_next="load", x_clocked=True, total=None, clocked=True):
    """An element with some mistakes in it: what its weight becomes, what it adds, and where registers stand."""

    def make(p):
        from amaranth.hdl import Module

        m = Module()
        if w_next == "load":
            with m.If(p.load):
                m.d.sync += p.w_out.eq(p.w_in)
        elif w_next == "always":
            m.d.sync += p.w_out.eq(p.w_in)
        else:
            with m.If(~p.load):
                m.d.sync += p.w_out.eq(p.w_in)
        m.d["sync" if x_clocked else "comb"] += p.x_out.eq(p.x_in)
        value = p.sum_in + p.w_out * p.x_in if total is None else total(p)
        m.d["sync" if clocked else "comb"] += p.sum_out.eq(value)
        return m

    return make


@exercise("8.1")
def processing_element(answer):
    """Weight kept, input handed on, product added."""
    mistakes = [
        (_element(w_next="always"), "the weight changes in every cycle: keep it while load is 0, with m.If(p.load)"),
        (_element(w_next="never"), "the weight moves while load is 0 and stays while it is 1: the other way round"),
        (_element(x_clocked=False), "x_out follows at once: a register, m.d.sync, makes it one cycle later"),
        (_element(clocked=False), "sum_out is no register: with m.d.sync the sum moves one element a cycle"),
        (
            _element(total=lambda p: p.sum_out + p.w_out * p.x_in),
            "that is the element's own last sum: add to sum_in",
        ),
        (
            _element(total=lambda p: p.sum_in + p.w_in * p.x_in),
            "the weight passing by: multiply by the kept one",
        ),
        (_element(total=lambda p: p.sum_in + p.w_out * p.x_out), "x_out is the input of the cycle before: use x_in"),
        (_element(total=lambda p: p.w_out * p.x_in), "the sum from above is lost: add sum_in"),
        (
            _element(total=lambda p: p.sum_out + p.w_out * p.x_in, clocked=False),
            "a loop of wires: sum_out depends on itself in the same cycle, so it never settles; use m.d.sync",
        ),
    ]
    expect_function(
        _element_run(answer),
        _element_run(_element()),
        cases=[{"bits": 8, "random_inputs": 0}, {"bits": 4, "random_inputs": 1}],
        mistakes=[(_element_run(wrong), hint) for wrong, hint in mistakes],
    )


def _array_run(wiring):
    """The product that an array of right elements makes with the learner's wires."""

    def run(x, w):
        array = build_array(hardware.ArraySpec(len(w), acc_bits=20), wiring=lambda a, add: _module(wiring, a, add))
        return run_array(array, x, w)

    return run


def _wiring(**changed):
    """The right wires but for some, each given as a function of the elements, the array's ports, k and j."""
    right = {
        "load": lambda pe, a, k, j: a.load,
        "x_in": lambda pe, a, k, j: pe[k][j - 1].x_out if j else a.x_in[k],
        "w_in": lambda pe, a, k, j: pe[k - 1][j].w_out if k else a.w_in[j],
        "sum_in": lambda pe, a, k, j: pe[k - 1][j].sum_out if k else a.sum_in[j],
        "sum_out": lambda pe, a, k, j: pe[-1][j].sum_out,
    }

    def wire(a, add_element):
        from amaranth.hdl import Module

        m, wires, n = Module(), right | changed, len(a.x_in)
        pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]
        for k in range(n):
            for j in range(n):
                m.d.comb += [
                    getattr(pe[k][j], port).eq(wires[port](pe, a, k, j)) for port in ("load", "x_in", "w_in", "sum_in")
                ]
        m.d.comb += [a.sum_out[j].eq(wires["sum_out"](pe, a, n - 1, j)) for j in range(n)]
        return m

    return wire


@exercise("8.2")
def systolic_array(answer):
    """Inputs to the right, weights and sums down."""
    rng = np.random.default_rng(0)
    cases = [{"x": rng.integers(-128, 128, (4, n)), "w": rng.integers(-128, 128, (n, n))} for n in (2, 3)]
    mistakes = [
        (
            _wiring(x_in=lambda pe, a, k, j: a.x_in[k]),
            "every column gets the input at once: from the second on, x_in comes from x_out of the element to the left",
        ),
        (
            _wiring(w_in=lambda pe, a, k, j: a.w_in[j]),
            "every row loads the same weight: below the first, w_in comes from w_out of the element above",
        ),
        (
            _wiring(sum_in=lambda pe, a, k, j: a.sum_in[j]),
            "no row sees the sum of the row above: sum_in comes from sum_out of the element above",
        ),
        (
            _wiring(sum_in=lambda pe, a, k, j: pe[k][j - 1].sum_out if j else a.sum_in[k]),
            "the sums move to the right: they move down, from the element above",
        ),
        (_wiring(sum_out=lambda pe, a, k, j: pe[0][j].sum_out), "that is the top row: the sums leave at the bottom"),
        (_wiring(sum_out=lambda pe, a, k, j: pe[j][-1].sum_out), "that is the last column: take the last row's sums"),
        (
            _wiring(load=lambda pe, a, k, j: a.load if k == 0 else 0),
            "only the first row is told to load: load goes to every element",
        ),
    ]
    expect_function(
        _array_run(answer),
        _array_run(hardware.wire_array),
        cases=cases,
        mistakes=[(_array_run(wrong), hint) for wrong, hint in mistakes],
    )


SURVIVED = {
    "sign": "the array that reads weights as positive numbers is not caught: put a negative weight in",
    "width": "the array with 16-bit sums is not caught: a sum must pass 32767, so take the largest codes, same signs",
    "gate": "the array that does not hand zeros on is not caught: a 0 must follow another number in a column of x",
    "skew": "the array whose inputs run ahead is not caught: rows of x must differ, and the last column of w count",
}


@exercise("8.6")
def telling_inputs(answer):
    """Inputs on which each of four broken arrays differs from numpy."""
    given = answer()
    expect_true(isinstance(given, tuple) and len(given) == 2, "return x and w", hint="return x, w")
    x, w = (np.asarray(part) for part in given)
    expect_equal((x.ndim, x.shape[-1:], w.shape), (2, (3,), (3, 3)), hint="x is (rows, 3), w is (3, 3)")
    for name, codes in (("x", x), ("w", w)):
        whole = codes.dtype.kind == "i" and codes.min() >= -128 and codes.max() <= 127
        expect_true(whole, f"{name} must hold int8 codes", hint="whole numbers from -128 to 127")
    expect_true(1 <= len(x) <= 16, f"x has {len(x)} rows", hint="1 to 16 rows are enough")
    survivors = [name for name, array in planted.planted_arrays().items() if (run_array(array, x, w) == x @ w).all()]
    if len(survivors) == len(SURVIVED):
        raise CheckFailed("all four give the right product", hint="zeros hide every mistake: put numbers in")
    for name in SURVIVED:
        expect_true(name not in survivors, f"the mistake '{name}' survives your inputs", hint=SURVIVED[name])


def _requantizer_run(make):
    """Codes of edge cases and random sums, through the learner's hardware."""

    def run(sums, scale, zero_point):
        p, (multiplier, shift) = hardware.requantizer_ports(), integer.fixed_point(scale)
        stimulus = [(p.sum, sums), (p.zero_point, [zero_point] * len(sums))]
        return simulate(_module(make, p, multiplier, shift), stimulus, [p.code])[:, 0]

    return run


def _requantize(sums, scale, zero_point):
    """The reference: chapter 02's."""
    multiplier, shift = map(torch.tensor, integer.fixed_point(scale))
    codes = integer.requantize(torch.tensor(sums, dtype=torch.int32), multiplier, shift, zero_point=zero_point)
    return codes.long().numpy()


def _requantizer(*, half=True, clamp=True, keep=63, zero_first=False):
    """A requantizer with some mistakes in it."""

    def make(p, multiplier, shift):
        from amaranth.hdl import Module, Mux, Signal, signed

        m, product = Module(), Signal(signed(keep))
        m.d.comb += product.eq(((p.sum + p.zero_point) if zero_first else p.sum) * multiplier)
        code = (product + (1 << (shift - 1) if half else 0)) >> shift
        code = code if zero_first else code + p.zero_point
        m.d.comb += p.code.eq(Mux(code > 127, 127, Mux(code < -128, -128, code)) if clamp else code)
        return m

    return make


@exercise("8.7")
def requantizer(answer):
    """Int32 sums to int8 codes, in integers."""
    sums = [0, 1, -1, 6, -6, 100, -100, 12345, -12345, 2**31 - 1, -(2**31)]
    mistakes = [
        (_requantizer(half=False), "the shift alone rounds down: add half of what is shifted out, 1 << (shift - 1)"),
        (_requantizer(clamp=False), "large codes wrap around: clamp to -128 … 127 with two Mux"),
        (_requantizer(keep=32), "the product is cut to 32 bits: it needs 63, or leave the width to Amaranth"),
        (_requantizer(zero_first=True), "the zero point is a code: add it after the shift"),
    ]
    expect_function(
        _requantizer_run(answer),
        _requantize,
        cases=[{"sums": sums, "scale": 0.013, "zero_point": 5}, {"sums": sums, "scale": 0.25, "zero_point": -3}],
        mistakes=[(_requantizer_run(wrong), hint) for wrong, hint in mistakes],
    )


def _pipelined(*, product=True, total=True, narrow=False):
    """An element with registers after the product and after the sum, or with a product as narrow as an input."""

    def make(p):
        from amaranth.hdl import Module, Signal

        m = Module()
        with m.If(p.load):
            m.d.sync += p.w_out.eq(p.w_in)
        m.d.sync += p.x_out.eq(p.x_in)
        value = Signal.like(p.x_in if narrow else p.w_out * p.x_in)
        m.d["sync" if product else "comb"] += value.eq(p.w_out * p.x_in)
        m.d["sync" if total else "comb"] += p.sum_out.eq(p.sum_in + value)
        return m

    return make


def _twice(p: SimpleNamespace):
    """Registers the sum a second time."""
    from amaranth.hdl import Module, Signal

    m, first = Module(), Signal.like(p.sum_out)
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += [p.x_out.eq(p.x_in), first.eq(p.sum_in + p.w_out * p.x_in), p.sum_out.eq(first)]
    return m


@exercise("8.9")
def pipelined_element(answer):
    """A register between multiplier and adder."""
    mistakes = [
        (
            _pipelined(product=False),
            "no register more than before: the product waits a cycle in a Signal of its own",
        ),
        (_twice, "the register stands after the adder, so multiplier and adder still share a cycle: put it before"),
        (_pipelined(total=False), "sum_out has lost its register: both the product and the sum are clocked"),
        (_pipelined(narrow=True), "the product's register is too narrow: a product is twice as wide as its factors"),
    ]
    expect_function(
        _element_run(answer, pipelined=True),
        _element_run(_pipelined(), pipelined=True),
        cases=[{"bits": 8, "random_inputs": 2}, {"bits": 4, "random_inputs": 3}],
        mistakes=[(_element_run(wrong, pipelined=True), hint) for wrong, hint in mistakes],
    )

"""Checks of chapter 08, second part: tests, requantization, tables, a register, and a design that synthesis judges."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from labutils.course.checks import CheckFailed, cases_of, exercise, expect_equal, expect_function, expect_true
from labutils.course.checks.ch08 import element_run, module_of, whole_numbers
from labutils.fpga import hardware, netlist, planted, simulate, synthesis
from labutils.quantization import integer

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
    x, w = (np.asarray(whole_numbers(part)) for part in given)
    expect_equal((x.ndim, x.shape[-1:], w.shape), (2, (3,), (3, 3)), hint="x is (rows, 3), w is (3, 3)")
    for name, codes in (("x", x), ("w", w)):
        whole = codes.dtype == np.int64 and codes.min() >= -128 and codes.max() <= 127
        expect_true(whole, f"{name} must hold int8 codes", hint="whole numbers from -128 to 127")
    expect_true(1 <= len(x) <= 16, f"x has {len(x)} rows", hint="1 to 16 rows are enough")
    arrays = planted.planted_arrays()
    survivors = [name for name in arrays if (simulate.run_array(arrays[name], x, w) == x @ w).all()]
    if len(survivors) == len(SURVIVED):
        raise CheckFailed("all four give the right product", hint="zeros hide every mistake: put numbers in")
    for name in SURVIVED:
        expect_true(name not in survivors, f"the mistake '{name}' survives your inputs", hint=SURVIVED[name])


def _requantizer_run(make):
    """Codes of edge cases and random sums, through the learner's hardware."""

    def run(sums, scale, zero_point):
        p, (multiplier, shift) = hardware.requantizer_ports(), integer.fixed_point(scale)
        stimulus = [(p.sum, sums), (p.zero_point, [zero_point] * len(sums))]
        return simulate.simulate(module_of(make, p, multiplier, shift), stimulus, [p.code])[:, 0]

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


@exercise("8.8")
def lut4(answer):
    """Bit a + 2b + 4c + 8d of the table."""
    rng = np.random.default_rng(0)
    bits = dict(zip("abcd", (np.arange(16) >> i & 1 == 1 for i in range(4)), strict=True))

    def reference(table, a, b, c, d):
        return netlist.lut4(table, [a, b, c, d])

    expect_function(
        answer,
        reference,
        cases=[{"table": int(t), **bits} for t in (0xCAFE, *rng.integers(1, 2**16 - 1, 2))],
        mistakes=[
            (lambda table, a, b, c, d: reference(table, d, c, b, a), "the order is turned: a counts 1, d counts 8"),
            (
                lambda table, a, b, c, d: reference(int(f"{table:016b}"[::-1], 2), a, b, c, d),
                "read from the left: bit 0 of the table is its last binary digit",
            ),
            (
                lambda table, a, b, c, d: (table >> (a + 2 * b + 4 * c + 8 * d)) != 0,
                "all higher bits are still there: keep one with & 1",
            ),
            (
                lambda table, a, b, c, d: reference(table, a, b, c, d).astype(np.int64),
                "a wire is True or False: end with == 1",
            ),
        ],
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
        element_run(answer, pipelined=True),
        element_run(_pipelined(), pipelined=True),
        cases=[{"bits": 8, "random_inputs": 2}, {"bits": 4, "random_inputs": 3}],
        mistakes=[(element_run(wrong, pipelined=True), hint) for wrong, hint in mistakes],
    )


def _needed(weight_bytes, clock_mhz, memory_gb_per_s, *, up=math.ceil):
    return up(memory_gb_per_s * 1e3 / weight_bytes / clock_mhz)


@exercise("8.10")
def multipliers_needed(answer):
    """Weights from memory in a cycle, rounded up."""
    expect_function(
        answer,
        _needed,
        cases=cases_of("weight_bytes clock_mhz memory_gb_per_s", (1.0, 116, 1.6), (0.5, 183, 1.6), (2.0, 250, 3.1)),
        mistakes=[
            (lambda **case: _needed(**case, up=float), "there are no parts of multipliers: round up with math.ceil"),
            (lambda **case: _needed(**case, up=math.floor), "rounded down, the engine falls behind: math.ceil"),
            (
                lambda weight_bytes, clock_mhz, memory_gb_per_s: _needed(1 / weight_bytes, clock_mhz, memory_gb_per_s),
                "smaller weights come faster: divide by the bytes of one",
            ),
            (
                lambda weight_bytes, clock_mhz, memory_gb_per_s: _needed(1, clock_mhz, memory_gb_per_s),
                "a weight has weight_bytes bytes: the memory brings fewer or more weights than bytes",
            ),
            (
                lambda **case: math.ceil(_needed(**case, up=float) ** 0.5),
                "that is the side of an array: count them all",
            ),
            (
                lambda **case: math.ceil(1 / _needed(**case, up=float)),
                "upside down: weights a second over cycles a second",
            ),
        ],
    )


@exercise("8.12")
def product_tables(answer):
    """Bit i of x · weight, for sixteen codes x."""

    def read(weight, code=lambda place: place - 16 * (place >= 8), bits=range(8), places=range(16)):
        return [sum((code(p) * weight >> bit & 1) << where for where, p in enumerate(places)) for bit in bits]

    def checked(weight):
        return [int(table) for table in answer(weight)]

    expect_function(
        checked,
        netlist.product_tables,
        cases=[{"weight": weight} for weight in (3, -5, 7, -8)],
        mistakes=[
            (lambda weight: read(weight, code=int), "places 8 to 15 are negative codes: place - 16"),
            (lambda weight: read(weight, bits=range(7, -1, -1)), "the highest bit comes first: begin with bit 0"),
            (
                lambda weight: read(weight, places=range(15, -1, -1)),
                "read from the left: place 0 is a table's lowest bit",
            ),
            (lambda weight: read(weight, bits=range(4)), "a product of two 4-bit codes has eight bits, not four"),
            (lambda weight: read(weight, code=lambda p: p - 8), "the codes are in two's complement: place 0 is x = 0"),
        ],
    )


BUDGET = 1300  # LUTs, and no multiplier
FLOOR = 0.05  # bits per byte that may be lost


@exercise("8.11")
def my_design(answer, losses):
    """The quality floor, then the chip, then the best: judged by synthesis.

    Args:
        answer: a dict with x_bits, w_bits and n.
        losses: bits per byte lost, by (x_bits, w_bits), as the chapter measured them.
    """
    expect_true(isinstance(answer, dict), "the design must be a dict", hint='{"x_bits": 8, "w_bits": 8, "n": 1}')
    expect_equal(sorted(answer), ["n", "w_bits", "x_bits"], hint='name "x_bits", "w_bits" and "n"')
    bits, n = (answer["x_bits"], answer["w_bits"]), answer["n"]
    expect_true(bits in losses, f"nobody measured {bits}", hint="take a pair from the table of losses")
    expect_true(isinstance(n, int) and 1 <= n <= 8, f"n = {n!r}", hint="a whole number from 1 to 8")
    if losses[bits] > FLOOR:
        raise CheckFailed(
            f"int{bits[0]} x int{bits[1]} loses {losses[bits]:.3f} bits per byte",
            expected=f"at most {FLOOR}",
            hint="the quality floor comes first: the answers are too poor, however small the array",
        )
    luts = _luts(*bits, 1) * n**2
    if luts <= 2 * BUDGET:  # what is far too large would take minutes
        luts = _luts(*bits, n)
    if luts > BUDGET:
        raise CheckFailed(
            f"your array needs {luts} LUTs",
            expected=f"at most {BUDGET}",
            hint="synthesis says that it does not fit: fewer elements, or fewer bits where quality allows it",
        )
    larger = luts / n**2 * (n + 1) ** 2
    expect_true(
        larger > BUDGET,
        f"{luts} of {BUDGET} LUTs are used, and n = {n + 1} would take about {larger:.0f}",
        hint="there is room for a larger array",
    )
    allowed = [pair for pair, loss in losses.items() if loss <= FLOOR]
    best = max(allowed, key=lambda pair: _largest(*pair))
    expect_true(
        n >= _largest(*best),
        f"{n * n} products a cycle",
        expected=f"{_largest(*best) ** 2}",
        hint="another precision meets the floor in less area an element: more of them fit",
    )


def _luts(x_bits, w_bits, n):
    width = hardware.accumulator_bits(x_bits, w_bits, 768)
    spec = hardware.ArraySpec(n, x_bits, w_bits, width, True)
    return synthesis.array_area(simulate.build_array(spec)).luts


def _largest(x_bits, w_bits):
    """The largest array of a precision within the budget, from the area of one element."""
    return math.isqrt(BUDGET // _luts(x_bits, w_bits, 1))

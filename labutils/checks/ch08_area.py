"""Checks of chapter 08, second part: schedules, widths, tables, and a design that real synthesis judges."""

import math

import numpy as np

from labutils.checks import CheckFailed, exercise, expect_equal, expect_function, expect_true
from labutils.fpga import hardware, netlist, simulate, synthesis


def _late(x, delays):
    fed = np.zeros((len(x) + x.shape[1] - 1, x.shape[1]), dtype=np.int64)
    for k, delay in enumerate(delays):
        fed[delay : delay + len(x), k] = x[:, k]
    return fed


@exercise("8.3")
def skew(answer):
    """Column k, k cycles late."""
    x = np.arange(1, 13).reshape(4, 3)
    expect_function(
        answer,
        simulate.skew,
        cases=[{"x": x}, {"x": np.array([[5, 6, 7, 8]])}],
        mistakes=[
            (lambda x: _late(x, [0] * x.shape[1]), "no column is late: column k starts k cycles after column 0"),
            (lambda x: _late(x, range(x.shape[1])[::-1]), "the first column is the latest: it enters first"),
            (
                lambda x: np.stack([np.roll(x[:, k], k) for k in range(x.shape[1])], axis=1),
                "what leaves at the end comes back at the start: make the array x.shape[1] - 1 cycles longer",
            ),
            (
                lambda x: _late(x, range(x.shape[1]))[: len(x)],
                "the last numbers are cut off: it takes x.shape[1] - 1 cycles more than there are rows",
            ),
            (lambda x: _late(x, range(x.shape[1])).T, "turned: a row is a cycle, a column enters one row of the array"),
        ],
    )


@exercise("8.4")
def layer_cycles(answer):
    """Loading, rows, and the skew twice, for every tile."""

    def tiles(features, outputs, n):
        return (features // n) * (outputs // n)

    def reference(rows, features, outputs, n):
        return tiles(features, outputs, n) * simulate.total_cycles(n, rows)

    expect_function(
        answer,
        reference,
        cases=[{"rows": r, "features": f, "outputs": o, "n": n} for r, f, o, n in ((8, 256, 128, 8), (1, 16, 8, 4))],
        mistakes=[
            (lambda rows, features, outputs, n: simulate.total_cycles(n, rows), "one tile only: how many are there?"),
            (
                lambda rows, features, outputs, n: tiles(features, outputs, n) * (rows + 2 * n - 2),
                "the weights are loaded for every tile: N cycles more",
            ),
            (
                lambda rows, features, outputs, n: tiles(features, outputs, n) * (n + rows + n - 1),
                "the skew counts twice: N - 1 cycles until the last row starts, N - 1 until the last column ends",
            ),
            (
                lambda rows, features, outputs, n: tiles(features, outputs, n) * (n + rows),
                "the first row of x leaves the array late: N - 1 cycles down and N - 1 to the right",
            ),
            (
                lambda rows, features, outputs, n: rows * features * outputs // n**2,
                "that is an array that multiplies everywhere in every cycle: loading and skew leave it idle",
            ),
        ],
    )


@exercise("8.5")
def accumulator_bits(answer):
    """Product, terms and sign."""
    expect_function(
        answer,
        lambda bits, terms: hardware.accumulator_bits(bits, bits, terms),
        cases=[{"bits": b, "terms": t} for b, t in ((8, 768), (4, 768), (8, 4), (2, 1))],
        mistakes=[
            (
                lambda bits, terms: hardware.accumulator_bits(bits, bits, terms) - 1,
                "one too few, the sign's: n bits reach from -2^(n-1) to 2^(n-1) - 1",
            ),
            (
                lambda bits, terms: 2 * bits - 2 + math.ceil(math.log2(terms)) + 1,
                "(-2^(b-1))² = 2^(2b-2) itself must fit, and n bits end at 2^(n-1) - 1: count one more",
            ),
            (lambda bits, terms: 2 * bits, "that holds one product: the sum of `terms` needs log2(terms) bits more"),
            (lambda bits, terms: 2 * bits * terms, "bits do not add up like that: twice the terms cost one bit"),
            (lambda bits, terms: 32, "32 is what a CPU has: an FPGA pays for each bit, so find the smallest"),
            (lambda bits, terms: bits + terms.bit_length(), "a product of two b-bit codes has 2b bits, not b"),
        ],
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


BUDGET = {"luts": 1300, "dsps": 0}
FLOOR = 0.05  # bits per byte that may be lost


@exercise("8.10")
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
    area = _area(*bits, n)
    if not area.fits(**BUDGET):
        raise CheckFailed(
            f"your array needs {area.luts} tables and {area.dsps} multipliers",
            expected=f"at most {BUDGET}",
            hint="synthesis says that it does not fit: fewer elements, or fewer bits where quality allows it",
        )
    larger = area.luts / n**2 * (n + 1) ** 2
    expect_true(
        larger > BUDGET["luts"],
        f"{area.luts} of {BUDGET['luts']} tables are used, and n = {n + 1} would take about {larger:.0f}",
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


def _area(x_bits, w_bits, n):
    width = hardware.accumulator_bits(x_bits, w_bits, 768)
    spec = hardware.ArraySpec(n, x_bits, w_bits, width, True)
    return synthesis.array_area(simulate.build_array(spec))


def _largest(x_bits, w_bits):
    """The largest array of a precision within the budget, from the area of one element."""
    return math.isqrt(BUDGET["luts"] // _area(x_bits, w_bits, 1).luts)

"""Checks of chapter 08, first part: the learner's hardware runs in simulation for a fixed number of cycles."""

import math

import numpy as np

from labutils.course.checks import exercise, expect_function
from labutils.fpga import hardware, simulate


def module_of(answer, *arguments):
    """What the learner's function returned, which must be a module."""
    from amaranth.hdl import Module

    module = answer(*arguments)
    if not isinstance(module, Module):
        raise TypeError(f"the function must return its Module m; got {type(module).__name__}")
    return module


def element_run(make, *, pipelined=False):
    """Runs an element on random inputs: rows are cycles, columns w_out, x_out and sum_out."""

    def run(bits, random_inputs):
        spec = hardware.ArraySpec(1, bits, bits, 20, pipelined)
        p, rng, high = hardware.element_ports(spec), np.random.default_rng(random_inputs), 2 ** (bits - 1)
        load = [1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
        columns = {"w_in": rng.integers(-high, high, 12), "x_in": rng.integers(-high, high, 12)}
        columns |= {"load": load, "sum_in": rng.integers(-1000, 1000, 12)}
        stimulus = [(getattr(p, port), values) for port, values in columns.items()]
        return simulate.simulate(module_of(make, p), stimulus, [p.w_out, p.x_out, p.sum_out])

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
        element_run(answer),
        element_run(_element()),
        cases=[{"bits": 8, "random_inputs": 0}, {"bits": 4, "random_inputs": 1}],
        mistakes=[(element_run(wrong), hint) for wrong, hint in mistakes],
    )


def _array_run(wiring):
    """The product that an array of right elements makes with the learner's wires."""

    def run(x, w):
        array = simulate.build_array(
            hardware.ArraySpec(len(w), acc_bits=20), wiring=lambda a, add: module_of(wiring, a, add)
        )
        return simulate.run_array(array, x, w)

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


def whole_numbers(array):
    """The same in int64, where an array holds whole numbers: np.zeros makes floats, and int8 would wrap."""
    found = np.asarray(array)
    return found.astype(np.int64) if found.dtype.kind in "iuf" and (found == np.round(found)).all() else array


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
        lambda x: whole_numbers(answer(x)),
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
                lambda bits, terms: 2 * bits - 2 + math.ceil(math.log2(terms)) + 1,
                "(-2^(b-1))² = 2^(2b-2) itself must fit, and n bits end at 2^(n-1) - 1: count one more",
            ),
            (
                lambda bits, terms: hardware.accumulator_bits(bits, bits, terms) - 1,
                "one too few, the sign's: n bits reach from -2^(n-1) to 2^(n-1) - 1",
            ),
            (lambda bits, terms: 2 * bits, "that holds one product: the sum of `terms` needs log2(terms) bits more"),
            (lambda bits, terms: 2 * bits * terms, "bits do not add up like that: twice the terms cost one bit"),
            (lambda bits, terms: 32, "32 is what a CPU has: an FPGA pays for each bit, so find the smallest"),
            (lambda bits, terms: bits + terms.bit_length(), "a product of two b-bit codes has 2b bits, not b"),
        ],
    )

"""Running hardware cycle by cycle: what an array is fed, when its sums come out, and what every element holds.

Row t of a simulation is what stands on the wires during cycle t: that cycle's inputs, and the registers as the clock
edges before it left them.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from labutils.fpga.hardware import ArraySpec, array_ports, element_ports, processing_element, wire_array

if TYPE_CHECKING:
    from amaranth.hdl import Module, Signal

Stimulus = Sequence[tuple["Signal", Sequence[int]]]  # signals, each with its value in every cycle


def simulate(module: "Module", stimulus: Stimulus, watch: Sequence["Signal"]) -> Int[np.ndarray, "cycles signals"]:
    """Drives signals for as many cycles as the stimulus has values, and returns what the watched ones showed.

    Raises:
        ValueError: for wires that form a loop without a register: they would never settle.
    """

    def once() -> Generator:
        result.append((yield stimulus))

    result: list = []
    simulate_blocks(module, once(), watch)
    return result[0]


def simulate_blocks(module: "Module", blocks: Generator, watch: Sequence["Signal"]) -> None:
    """As `simulate`, for a generator that yields one stimulus after another and is sent what each of them showed."""
    from amaranth.back import rtlil
    from amaranth.hdl import CombinationalCycle, Module, Signal
    from amaranth.sim import Simulator

    try:
        rtlil.convert(module, ports=list(watch))
    except CombinationalCycle:  # the simulator would never return
        raise ValueError("wires must not form a loop without a register: they would never settle") from None
    top, beat = Module(), Signal()
    top.submodules.dut = module
    top.d.sync += beat.eq(~beat)  # so that there is a clock even where the design has no register
    simulator = Simulator(top)
    simulator.add_clock(1e-6)

    async def bench(context) -> None:
        try:
            stimulus = next(blocks)
            while True:
                rows = []
                for values in zip(*(column for _, column in stimulus), strict=True):
                    for (signal, _), value in zip(stimulus, values, strict=True):
                        context.set(signal, int(value))
                    rows.append([context.get(signal) for signal in watch])
                    await context.tick()
                stimulus = blocks.send(np.array(rows, dtype=np.int64))
        except StopIteration:
            return

    simulator.add_testbench(bench)
    simulator.run()


@dataclass(frozen=True)
class Array:
    """An array ready to be simulated or synthesised; `elements[k, j]` are the ports of element (k, j)."""

    spec: ArraySpec
    module: "Module"
    ports: SimpleNamespace
    elements: dict[tuple[int, int], SimpleNamespace]

    @property
    def inputs(self) -> list["Signal"]:
        """Every input signal, `load` first."""
        return [self.ports.load, *self.ports.w_in, *self.ports.x_in, *self.ports.sum_in]


def build_array(
    spec: ArraySpec,
    element: Callable[[SimpleNamespace, ArraySpec], "Module"] = processing_element,
    wiring: Callable[[SimpleNamespace, Callable], "Module"] = wire_array,
) -> Array:
    """Builds an array of `element(ports, spec)` wired by `wiring(ports, add_element)`."""
    elements: dict[tuple[int, int], SimpleNamespace] = {}

    def add_element(m: "Module", k: int, j: int) -> SimpleNamespace:
        ports = element_ports(spec)
        m.submodules[f"pe_{k}_{j}"] = element(ports, spec)
        elements[k, j] = ports
        return ports

    ports = array_ports(spec)
    return Array(spec, wiring(ports, add_element), ports, elements)


def total_cycles(n: int, rows: int, *, pipelined: bool = False) -> int:
    """Clock edges until an N×N array has multiplied `rows` rows: N to load, then rows + 2N − 2, one more if pipelined.

    >>> total_cycles(4, 10), total_cycles(4, 10, pipelined=True)
    (20, 21)
    """
    return n + rows + 2 * n - 2 + pipelined


def with_loading(spec: ArraySpec, bound: float, rows: int) -> float:
    """Of an array's bound, Fmax · N² · lanes, what is left where each tile is loaded, used for `rows` rows and drained.

    reached = bound · rows / total_cycles

    >>> with_loading(ArraySpec(8), 24.0, 2)
    2.0
    """
    return bound * rows / total_cycles(spec.n, rows, pipelined=spec.pipelined)


def skew(x: Int[np.ndarray, "rows n"]) -> Int[np.ndarray, "cycles n"]:
    """Column k delayed by k cycles, with zeros before and after: what the rows of the array see at their left edge.

    >>> skew(np.array([[1, 2], [3, 4]])).tolist()
    [[1, 0], [3, 2], [0, 4]]
    """
    rows, n = x.shape
    fed = np.zeros((rows + n - 1, n), dtype=np.int64)
    for k in range(n):
        fed[k : k + rows, k] = x[:, k]
    return fed


def words(codes: Int[np.ndarray, "..."], bits: int, lanes: int, axis: int) -> Int[np.ndarray, "..."]:
    """What goes over the wires: integers as they are; signs packed, `lanes` neighbours along an axis into a word.

    Raises:
        ValueError: for codes that `bits` do not hold, and for a number of signs that is no multiple of the lanes.
    """
    if bits > 1:
        limit = 2 ** (bits - 1)
        if codes.size and (codes.min() < -limit or codes.max() >= limit):
            raise ValueError(f"codes must lie in {-limit} … {limit - 1}; got {codes.min()} … {codes.max()}")
        return codes
    if not np.isin(codes, (-1, 1)).all():
        raise ValueError(f"signs are -1 and 1; got {np.setdiff1d(codes, (-1, 1)).tolist()[:3]}")
    if codes.shape[axis] % lanes:
        raise ValueError(f"the number of signs must be a multiple of lanes={lanes}; got {codes.shape[axis]}")
    split = np.moveaxis(codes > 0, axis, -1)
    packed = (split.reshape(*split.shape[:-1], -1, lanes) << np.arange(lanes)).sum(axis=-1)
    return np.moveaxis(packed, -1, axis)


def stimulus_of(
    array: Array, x: Int[np.ndarray, "rows k"], w: Int[np.ndarray, "k n"], sums: Int[np.ndarray, "rows n"]
) -> Stimulus:
    """What drives the array to compute sums + x · w: N cycles of weights, last row first, then skewed inputs."""
    spec, ports, n = array.spec, array.ports, array.spec.n
    x, w = words(x, spec.x_bits, spec.lanes, 1), words(w, spec.w_bits, spec.lanes, 0)
    if x.shape[1] != n or w.shape != (n, n) or sums.shape != (len(x), n):
        raise ValueError(f"an array of n={n} takes x (rows, {n}) and w ({n}, {n}); got {x.shape} and {w.shape}")
    cycles = total_cycles(n, len(x), pipelined=spec.pipelined) + 1  # and a look after the last edge

    def column(values: Int[np.ndarray, " some"], start: int) -> Int[np.ndarray, " cycles"]:
        whole = np.zeros(cycles, dtype=np.int64)
        whole[start : start + len(values)] = values
        return whole

    fed, above = skew(x), skew(sums)
    stimulus = [(ports.load, column(np.ones(n, dtype=np.int64), 0))]
    for i in range(n):
        stimulus.append((ports.w_in[i], column(w[::-1, i], 0)))
        stimulus.append((ports.x_in[i], column(fed[:, i], n)))
        stimulus.append((ports.sum_in[i], column(above[:, i], n + spec.pipelined)))
    return stimulus


def collect(array: Array, shown: Int[np.ndarray, "cycles n"], rows: int) -> Int[np.ndarray, "rows n"]:
    """Straightens the sums: row m of column j stands below the array 2N + m + j cycles after the start."""
    first = 2 * array.spec.n + array.spec.pipelined
    return np.stack([shown[first + j : first + j + rows, j] for j in range(array.spec.n)], axis=1)


def run_array(
    array: Array,
    x: Int[np.ndarray, "rows k"],
    w: Int[np.ndarray, "k n"],
    sums: Int[np.ndarray, "rows n"] | None = None,
) -> Int[np.ndarray, "rows n"]:
    """Simulates x · w (+ sums) on the array, k = N times the lanes."""
    sums = np.zeros((len(x), array.spec.n), dtype=np.int64) if sums is None else sums
    return collect(array, simulate(array.module, stimulus_of(array, x, w, sums), array.ports.sum_out), len(x))


@dataclass(frozen=True)
class March:
    """What each element of an unpipelined array holds in each cycle: weight, input at its left, sum at its foot."""

    rows: int
    weights: Int[np.ndarray, "cycles n n"]
    inputs: Int[np.ndarray, "cycles n n"]
    sums: Int[np.ndarray, "cycles n n"]

    def row_at(self, cycle: int, k: int, j: int) -> int | None:
        """Which row of x stands at the left of element (k, j); None before the first and after the last."""
        row = cycle - self.weights.shape[1] - k - j
        return row if 0 <= row < self.rows else None

    def busy(self, cycle: int) -> int:
        """How many elements multiply a row of x in that cycle."""
        n = self.weights.shape[1]
        return sum(self.row_at(cycle, k, j) is not None for k in range(n) for j in range(n))


def march(array: Array, x: Int[np.ndarray, "rows k"], w: Int[np.ndarray, "k n"]) -> March:
    """Watches every element while the array multiplies."""
    n, elements = array.spec.n, [array.elements[key] for key in sorted(array.elements)]
    watch = [signal for port in ("w_out", "x_in", "sum_out") for signal in (getattr(p, port) for p in elements)]
    zeros = np.zeros((len(x), n), dtype=np.int64)
    shown = simulate(array.module, stimulus_of(array, x, w, zeros), watch)
    return March(len(x), *(part.reshape(-1, n, n) for part in np.split(shown, 3, axis=1)))


def layer_product(
    array: Array,
    x: Int[np.ndarray, "rows features"],
    w: Int[np.ndarray, "features out"],
    bias: Int[np.ndarray, " out"] | int = 0,
) -> tuple[Int[np.ndarray, "rows out"], int]:
    """A whole layer's x · w + bias, tile by tile: the sums of one tile enter the next at its top. And its cycles.

    Raises:
        ValueError: when the array's tile does not divide the layer.
    """
    n, depth = array.spec.n, array.spec.n * array.spec.lanes
    if x.shape[1] % depth or w.shape[1] % n:
        raise ValueError(f"tiles of {depth} x {n} must divide the layer; got {x.shape[1]} x {w.shape[1]}")
    y, cycles = np.zeros((len(x), w.shape[1]), dtype=np.int64) + bias, 0

    def tiles() -> Generator:
        nonlocal cycles
        for k in range(0, x.shape[1], depth):
            for j in range(0, w.shape[1], n):
                tile = np.s_[:, j : j + n]
                part = stimulus_of(array, x[:, k : k + depth], w[k : k + depth, j : j + n], y[tile])
                shown = yield part
                y[tile] = collect(array, shown, len(x))
                cycles += len(shown) - 1

    simulate_blocks(array.module, tiles(), array.ports.sum_out)
    return y, cycles

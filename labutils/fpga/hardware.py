"""The hardware, in Amaranth HDL: a processing element, a weight-stationary systolic array, a multiplier.

    sum_out = sum_in + weight · x        in every element, every cycle

Element (k, j) keeps weight W[k, j]. Inputs x travel to the right, sums travel down (Kung 1982, "Why systolic
architectures?"; Jouppi et al. 2017, arXiv:1704.04760, figure 4). One bit: 0 stands for −1 and 1 for +1, and a product
is XNOR (Rastegari et al. 2016, arXiv:1603.05279); a one-bit element may have several lanes, whose products it counts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amaranth.hdl import Module, Value


@dataclass(frozen=True)
class ArraySpec:
    """What is to be built.

    Attributes:
        n: elements in a row and in a column.
        x_bits: of a signed input; 1 for signs.
        w_bits: of a signed weight; 1 for signs, then x_bits is 1 too.
        acc_bits: of the signed sums.
        pipelined: whether a register stands between multiplier and adder.
        lanes: products that a one-bit element adds in a cycle.

    >>> ArraySpec(4).multiplications, ArraySpec(4, x_bits=1, w_bits=1, lanes=8).multiplications
    (16, 128)
    """

    n: int
    x_bits: int = 8
    w_bits: int = 8
    acc_bits: int = 32
    pipelined: bool = False
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"an array needs n >= 1 elements a row; got {self.n}")
        if not (1 <= self.x_bits <= 16 and 1 <= self.w_bits <= 16):
            raise ValueError(f"inputs and weights take 1 to 16 bits; got {self.x_bits} and {self.w_bits}")
        if (self.x_bits == 1) != (self.w_bits == 1):
            raise ValueError(f"signs multiply signs only; got {self.x_bits} and {self.w_bits} bits")
        if self.lanes < 1 or (self.lanes > 1 and not self.is_binary):
            raise ValueError(f"only one-bit elements take more than one lane; got lanes={self.lanes}")
        if self.acc_bits < 2:
            raise ValueError(f"a sum takes at least 2 bits; got {self.acc_bits}")

    @property
    def is_binary(self) -> bool:
        """Whether inputs and weights are signs."""
        return self.w_bits == 1

    @property
    def multiplications(self) -> int:
        """Products in a cycle: N² times the lanes."""
        return self.n**2 * self.lanes

    def __str__(self) -> str:
        if self.is_binary:
            kind = "binary" + (f" x {self.lanes}" if self.lanes > 1 else "")
        else:
            kind = f"int{self.w_bits}" if self.x_bits == self.w_bits else f"int{self.x_bits} x int{self.w_bits}"
        return f"{self.n}x{self.n} {kind}, acc{self.acc_bits}" + (", pipelined" if self.pipelined else "")


def accumulator_bits(x_bits: int, w_bits: int, terms: int) -> int:
    """The smallest two's complement word that holds every sum of so many products, −2^(b−1) times −2^(b−1) included.

    >>> accumulator_bits(8, 8, 1), accumulator_bits(8, 8, 768), accumulator_bits(1, 1, 768)
    (16, 25, 11)
    """
    largest = terms if w_bits == 1 else terms * 2 ** (x_bits + w_bits - 2)
    return largest.bit_length() + 1


def element_ports(spec: ArraySpec, name: str = "") -> SimpleNamespace:
    """Signals of one element: load, w_in, x_in, sum_in; w_out, x_out, sum_out. Its sum_in and sum_out are signed.

    Signs come as unsigned words, one bit a lane.
    """
    from amaranth.hdl import Signal, signed, unsigned

    x, w = (unsigned(spec.lanes) if spec.is_binary else signed(bits) for bits in (spec.x_bits, spec.w_bits))
    shapes = {"load": 1, "w_in": w, "x_in": x, "sum_in": signed(spec.acc_bits)}
    shapes |= {"w_out": w, "x_out": x, "sum_out": signed(spec.acc_bits)}
    return SimpleNamespace(**{port: Signal(shape, name=f"{name}{port}") for port, shape in shapes.items()})


def processing_element(p: SimpleNamespace, spec: ArraySpec) -> "Module":
    """One element: keeps its weight while `load` is 0, multiplies, adds, and hands its input on to the right.

    While `load` is 1 the weights of a column move down by one element a cycle.
    """
    from amaranth.hdl import Module

    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += p.x_out.eq(p.x_in)
    product = sign_products(p.x_in, p.w_out, spec.lanes) if spec.is_binary else p.x_in * p.w_out
    if spec.pipelined:
        product, wire = type(p.sum_in)(product.shape(), name="product"), product
        m.d.sync += product.eq(wire)
    m.d.sync += p.sum_out.eq(p.sum_in + product)
    return m


def sign_products(x: "Value", w: "Value", lanes: int) -> "Value":
    """The sum of the lanes' products of signs: equal bits count +1, different bits −1 (XNOR and count)."""
    agree = sum((x ^ ~w)[lane] for lane in range(lanes))
    return (agree << 1) - lanes


def array_ports(spec: ArraySpec) -> SimpleNamespace:
    """Signals of an array: load, and w_in, x_in, sum_in and sum_out as lists, one signal for each column or row."""
    edges = [element_ports(spec, f"{i}_") for i in range(spec.n)]
    for i, edge in enumerate(edges):
        for port, signal in vars(edge).items():
            signal.name = f"{port}_{i}"
    lists = {port: [getattr(edge, port) for edge in edges] for port in ("w_in", "x_in", "sum_in", "sum_out")}
    edges[0].load.name = "load"
    return SimpleNamespace(load=edges[0].load, **lists)


def wire_array(a: SimpleNamespace, add_element: Callable[["Module", int, int], SimpleNamespace]) -> "Module":
    """Wires N×N elements: inputs enter at the left of each row, weights and sums at the top of each column.

    Args:
        a: the array's ports.
        add_element: add_element(m, k, j) puts element (k, j) into module m and returns its ports.
    """
    from amaranth.hdl import Module

    m, n = Module(), len(a.x_in)
    pe = [[add_element(m, k, j) for j in range(n)] for k in range(n)]
    for k in range(n):
        for j in range(n):
            m.d.comb += pe[k][j].load.eq(a.load)
            m.d.comb += pe[k][j].x_in.eq(pe[k][j - 1].x_out if j > 0 else a.x_in[k])
            m.d.comb += pe[k][j].w_in.eq(pe[k - 1][j].w_out if k > 0 else a.w_in[j])
            m.d.comb += pe[k][j].sum_in.eq(pe[k - 1][j].sum_out if k > 0 else a.sum_in[j])
    m.d.comb += [a.sum_out[j].eq(pe[n - 1][j].sum_out) for j in range(n)]
    return m


def requantizer_ports() -> SimpleNamespace:
    """Signals of a requantizer: sum (32 bits), multiplier (31, unsigned), shift (6, unsigned), zero_point; code."""
    from amaranth.hdl import Signal, signed, unsigned

    shapes = {"sum": signed(32), "multiplier": unsigned(31), "shift": unsigned(6)}
    shapes |= {"zero_point": signed(8), "code": signed(8)}
    return SimpleNamespace(**{port: Signal(shape, name=port) for port, shape in shapes.items()})


def requantizer(p: SimpleNamespace) -> "Module":
    """An int32 sum to an int8 code: clamp(Z + ⌊(sum · multiplier + 2^(shift − 1)) / 2^shift⌋), shift from 1.

    Jacob et al. 2017 (arXiv:1712.05877), equation 6, rounded once; the twin in torch is
    `labutils.quantization.integer.requantize`.
    """
    from amaranth.hdl import Const, Module, Mux

    m = Module()
    half = (Const(1) << p.shift) >> 1
    code = ((p.sum * p.multiplier + half) >> p.shift) + p.zero_point
    m.d.comb += p.code.eq(Mux(code > 127, 127, Mux(code < -128, -128, code)))
    return m

"""Four arrays with one mistake each: a test is good when its inputs tell all four from the right one."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

from labutils.fpga.hardware import ArraySpec
from labutils.fpga.simulate import Array, build_array

if TYPE_CHECKING:
    from amaranth.hdl import Module


def _unskewed(p: SimpleNamespace, spec: ArraySpec) -> "Module":
    """Hands its input on in the same cycle: columns to the right see it too early."""
    from amaranth.hdl import Module

    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.comb += p.x_out.eq(p.x_in)
    m.d.sync += p.sum_out.eq(p.sum_in + p.x_in * p.w_out)
    return m


def _unsigned(p: SimpleNamespace, spec: ArraySpec) -> "Module":
    """Multiplies by the weight's bits as if they were a positive number."""
    from amaranth.hdl import Module

    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    m.d.sync += [p.x_out.eq(p.x_in), p.sum_out.eq(p.sum_in + p.x_in * p.w_out.as_unsigned())]
    return m


def _gated(p: SimpleNamespace, spec: ArraySpec) -> "Module":
    """Saves power by not passing zeros on: the element to the right then sees the input before."""
    from amaranth.hdl import Module

    m = Module()
    with m.If(p.load):
        m.d.sync += p.w_out.eq(p.w_in)
    with m.If(p.x_in != 0):
        m.d.sync += p.x_out.eq(p.x_in)
    m.d.sync += p.sum_out.eq(p.sum_in + p.x_in * p.w_out)
    return m


def planted_arrays(n: int = 3) -> dict[str, Array]:
    """Int8 arrays by the name of their mistake: "skew", "sign", "gate", "width" (16-bit sums)."""
    right = ArraySpec(n, acc_bits=20)
    elements: dict[str, Callable] = {"skew": _unskewed, "sign": _unsigned, "gate": _gated}
    arrays = {name: build_array(right, element) for name, element in elements.items()}
    return arrays | {"width": build_array(replace(right, acc_bits=16))}

"""Triton kernels run one program after another on the CPU, by Triton's own interpreter, for this launch only.

`TRITON_INTERPRET=1` switches a whole process over, before Triton is imported. Here a launch switches over and back: the
same process may compile kernels for a GPU before and after. Kernels are plain functions, in which `tl` is
`triton.language`; on a GPU `triton.jit` compiles the same functions.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np

WITHOUT_TRITON = "Triton is not installed: pip install triton (Linux only; 200 MB to download, 700 MB on disk)"


@dataclass(frozen=True)
class Access:
    """What one program reads or writes in one instruction.

    Attributes:
        program: number of the program along the grid's first axis.
        kind: `load` or `store`.
        addresses: byte addresses, without those that the mask hides.
    """

    program: int
    kind: str
    addresses: tuple[int, ...]


def missing_triton() -> str:
    """The sentence that says how to get Triton; empty where it is there."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return WITHOUT_TRITON
    return ""


def interpret(kernel: Callable, grid: tuple[int, ...], *arguments, **constants) -> list[Access]:
    """Runs a kernel for every program of the grid, in order, and returns all its memory accesses.

    Args:
        kernel: a plain function, not yet decorated; `tl` is a global of its module.
        grid: the number of programs along one, two or three axes.
        arguments: tensors and numbers, as a launch on a GPU gets them.
        constants: those annotated `tl.constexpr`.

    Raises:
        ModuleNotFoundError: without Triton, saying how to install it.
        RuntimeError: what went wrong inside the kernel.
    """
    if reason := missing_triton():
        raise ModuleNotFoundError(reason)
    from triton import language as tl
    from triton.runtime import interpreter

    with suppress(ImportError):  # Triton imports it at a first launch, and refuses to while its functions are swapped
        import triton.experimental.gluon  # noqa: F401
    kernel = inspect.unwrap(kernel)
    twin = _twin(kernel, dict(kernel.__globals__) | {"tl": tl})
    interpreted = interpreter.InterpretedFunction(twin)
    constexprs = {n: tl.constexpr for n, a in kernel.__annotations__.items() if a == "tl.constexpr"}
    interpreted.rewrite().__annotations__ |= constexprs  # rewritten from the source where there is one, else the twin
    builder, accesses = interpreter.interpreter_builder, []
    with _restored(tl, tl.core, tl.math, tl.standard, tl.tensor, tl.core.tensor_descriptor_base):
        for name, function in _standard_functions().items():
            for namespace in (tl, tl.standard):
                if hasattr(namespace, name):
                    setattr(namespace, name, function)
        with _recorded(builder, accesses):
            try:
                interpreted[grid](*arguments, **constants)
            except interpreter.InterpreterError as error:
                raise RuntimeError(f"the kernel {kernel.__name__} failed: {error.__cause__ or error}") from error
            finally:
                interpreter.InterpretedFunction.rewritten_fn.pop(twin, None)
    return accesses


def _twin(function: Callable, names: dict) -> Callable:
    """The same function with globals of its own: the interpreter writes into a kernel's globals."""
    twin = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    twin.__kwdefaults__, twin.__annotations__ = function.__kwdefaults__, dict(function.__annotations__)
    return twin


@functools.cache
def _standard_functions() -> dict:
    """Triton's own `sum`, `max`, … are kernels too, and compiled ones where the interpreter was off at import."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names = dict(vars(tl.standard))
    jitted = {name: f for name, f in names.items() if isinstance(f, JITFunction)}
    names |= {name: InterpretedFunction(_twin(f.fn, names)) for name, f in jitted.items()}
    return {name: names[name] for name in jitted}


@contextmanager
def _restored(*namespaces) -> Iterator[None]:
    """Puts modules and classes back as they were: the interpreter leaves its own functions in some."""
    before = [dict(vars(namespace)) for namespace in namespaces]
    try:
        yield
    finally:
        for namespace, old in zip(namespaces, before, strict=True):
            for name, value in list(vars(namespace).items()):
                if name not in old:
                    delattr(namespace, name)
                elif value is not old[name]:
                    setattr(namespace, name, old[name])


def _undefined(shape: tuple[int, ...], kind):
    """NaN: what a GPU leaves in the elements that a mask hides is anything, where the interpreter would put zeros."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.full(shape, np.nan, dtype=f"f{kind.primitive_bitwidth // 8}"), kind)


@contextmanager
def _recorded(builder, accesses: list[Access]) -> Iterator[None]:
    """Notes the addresses of each load and store in `accesses`."""
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(kind: str, pointers, mask) -> None:
        seen = np.broadcast_to(mask.data, pointers.data.shape)
        accesses.append(Access(builder.grid_idx[0], kind, tuple(pointers.data[seen].tolist())))

    def noted_load(pointers, mask, other, *rest):
        note("load", pointers, mask)
        kind = pointers.get_element_ty()
        if other is None and kind.is_floating() and kind.primitive_bitwidth > 8 and not kind.is_bf16():
            other = _undefined(pointers.data.shape, kind)
        return load(pointers, mask, other, *rest)

    def noted_store(pointers, value, mask, *rest):
        note("store", pointers, mask)
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = noted_load, noted_store
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store

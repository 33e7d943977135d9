"""A type checker for shapes alone: jaxtyping calls it on every function of `labutils` while the tests run.

It checks what the signatures say of arrays (dtype, number of axes, axes that share a name), also inside tuples, lists
and unions, and leaves every other annotation to the reader.
"""

import contextlib
import functools
import inspect
import types
import typing

import jaxtyping


def fits(value, hint) -> bool:
    """Whether a value has the shape and dtype that an annotation promises; what is not about arrays always fits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if inspect.isclass(hint) and origin is None and issubclass(hint, jaxtyping.AbstractArray):
        return isinstance(value, hint)
    if hint in (None, types.NoneType):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin is list:
        return value is not None and all(fits(item, arguments[0]) for item in value)
    return True


def checked(function):
    """The function, its arguments and its result held against its annotations."""
    signature = inspect.signature(function)
    hints_of = functools.cache(typing.get_type_hints)  # at the first call: names may be defined further down

    @functools.wraps(function)
    def call(*args, **kwargs):
        hints = hints_of(function)
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name in hints and not is_variadic(signature.parameters[name]) and not fits(value, hints[name]):
                raise TypeError(f"{name} must be {hints[name]}; got {described(value)}")
        result = function(*args, **kwargs)
        if "return" in hints and not inspect.isgeneratorfunction(function) and not fits(result, hints["return"]):
            raise TypeError(f"{function.__qualname__} must return {hints['return']}; got {described(result)}")
        return result

    return call


@contextlib.contextmanager
def unchecked():
    """Within it, nothing is checked: for tests of what a function itself says to a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def is_variadic(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def described(value) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if hasattr(value, "dtype") else type(value).__name__

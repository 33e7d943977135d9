"""A type checker for shapes alone, at work on every function of `labutils` while the tests run.

It checks what the signatures say of arrays (dtype, number of axes, axes that share a name), also inside tuples, lists
and unions, and leaves every other annotation to the reader.
"""

import contextlib
import dataclasses
import functools
import inspect
import types
import typing

import jaxtyping

one_call = functools.partial(jaxtyping.jaxtyped, "context")  # within it an axis has one size


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
    """The function, its arguments and its result held against its annotations; of a dataclass, what makes one.

    Most functions take and return no array: they run as they are, for a checked call takes some ten microseconds more.
    """
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function):
            function.__init__ = checked(function.__init__)
        return function
    signature = inspect.signature(function)

    @functools.cache
    def hints():  # at the first call: names may be defined further down
        found = {}
        for name, text in inspect.unwrap(function).__annotations__.items():
            one = type("One", (), {"__annotations__": {name: text}})
            with contextlib.suppress(NameError):  # imported for type checkers alone: no array of ours
                hint = typing.get_type_hints(one, inspect.unwrap(function).__globals__)[name]
                found |= {name: hint} if names_array(hint) else {}
        if inspect.isgeneratorfunction(function):
            found.pop("return", None)
        return {n: h for n, h in found.items() if n == "return" or not is_variadic(signature.parameters[n])}

    @functools.wraps(function)
    def call(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable or not hints():
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        with one_call():
            for name, value in bound.arguments.items():
                require(name, "be", value, hints().get(name, object))
            result = function(*args, **kwargs)
            require(function.__qualname__, "return", result, hints().get("return", object))
        return result

    return call


def names_array(hint) -> bool:
    """Whether an annotation names an array anywhere."""
    if inspect.isclass(hint) and typing.get_origin(hint) is None:
        return issubclass(hint, jaxtyping.AbstractArray)
    return any(map(names_array, typing.get_args(hint)))


def require(name, verb, value, hint) -> None:
    """Refuses a value that does not fit."""
    if not fits(value, hint):
        raise jaxtyping.TypeCheckError(f"{name} must {verb} {hint}; got {described(value)}")


def check_all() -> None:
    """From now on every function of `labutils` is checked as it is imported, by `checked` alone.

    jaxtyping's own wrapper checks the arguments twice, and functions without arrays too.
    """
    jaxtyping.install_import_hook("labutils", "shapes.checked")
    jaxtyping.jaxtyped = lambda typechecker: typechecker


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

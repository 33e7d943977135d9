"""Compare what a learner computed with what was expected, and describe both in one line.

Works on numbers, strings, containers, NumPy arrays and torch tensors. Imports neither NumPy nor
torch: arrays are recognised by their methods, so a check on plain numbers stays light.
"""

import dataclasses
import math
import numbers
import reprlib
import sys

from labutils.lab.language import marked, translated

RTOL, ATOL = 1e-5, 1e-8
_FACTORS = {
    1000.0: marked("1000 times"),
    1e6: marked("a million times"),
    1e9: marked("a billion times"),
    1024.0: marked("1024 times"),
    8.0: marked("8 times"),
    2.0: marked("2 times"),
    4.0: marked("4 times"),
    100.0: marked("100 times"),
    60.0: marked("60 times"),
    16.0: marked("16 times"),
}


def is_array(value) -> bool:
    """True for torch tensors and NumPy arrays, but not for NumPy's numbers."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return False
    return all(hasattr(value, name) for name in ("shape", "dtype", "tolist", "ndim"))


def is_number(value) -> bool:
    """True for Python and NumPy numbers, but not for booleans."""
    return isinstance(value, numbers.Number) and not isinstance(value, bool)


def _is_whole(value) -> bool:
    return isinstance(value, numbers.Integral)


def unwrapped(value):
    """NumPy's numbers and booleans as Python's own."""
    numpy = sys.modules.get("numpy")
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value


def numbers_of(actual, expected):
    """Both without wrapping: NumPy's numbers as Python's own, and a 0-d array as its number beside a number."""
    actual, expected = unwrapped(actual), unwrapped(expected)
    if is_number(actual) != is_number(expected):
        actual, expected = (v.item() if is_array(v) and v.ndim == 0 else v for v in (actual, expected))
    return actual, expected


def same(actual, expected, *, rtol: float = RTOL, atol: float = ATOL, dtype: bool = False) -> bool:
    """Whether two values agree: numbers within ``|a - e| <= atol + rtol*|e|``, the rest exactly.

    Arrays must agree in shape and in kind (float, integer, boolean); with ``dtype`` in exact
    dtype too, and numbers in being ints. NaN equals NaN. A tensor of shape () equals the number in it, one of
    shape (1,) does not.

    >>> same(0.1 + 0.2, 0.3), same([1, 2.0], [1, 2.1]), same("a", "b")
    (True, False, False)
    """
    actual, expected = numbers_of(actual, expected)
    options = {"rtol": rtol, "atol": atol, "dtype": dtype}
    if is_array(expected) and is_array(actual):
        return _same_arrays(actual, expected, options)
    if is_array(expected) != is_array(actual):
        return False
    if is_number(expected) and is_number(actual):
        return not (dtype and _is_whole(actual) != _is_whole(expected)) and _close(actual, expected, rtol, atol)
    if isinstance(expected, dict) and isinstance(actual, dict):
        return expected.keys() == actual.keys() and all(same(actual[key], expected[key], **options) for key in expected)
    if isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        return len(expected) == len(actual) and all(
            same(a, e, **options) for a, e in zip(actual, expected, strict=True)
        )
    if dataclasses.is_dataclass(expected) and type(actual) is type(expected):
        fields = [field.name for field in dataclasses.fields(expected)]
        return all(same(getattr(actual, f), getattr(expected, f), **options) for f in fields)
    return type(actual) is type(expected) and bool(actual == expected)


def _close(actual, expected, rtol, atol) -> bool:
    if actual == expected:  # also infinities, and exact integers of any size
        return True
    if isinstance(expected, complex) or isinstance(actual, complex):
        return abs(actual - expected) <= atol + rtol * abs(expected)
    if math.isnan(expected) or math.isnan(actual):
        return math.isnan(expected) and math.isnan(actual)
    if math.isinf(expected) or math.isinf(actual):
        return False
    return abs(actual - expected) <= atol + rtol * abs(expected)


def kind(array) -> str:
    """'bool', 'float' or 'integer': the family of an array's dtype."""
    name = str(array.dtype).removeprefix("torch.")
    return "bool" if "bool" in name else "float" if "float" in name else "integer"


def _same_arrays(actual, expected, options) -> bool:
    import numpy as np

    if tuple(actual.shape) != tuple(expected.shape) or kind(actual) != kind(expected):
        return False
    if options["dtype"] and str(actual.dtype) != str(expected.dtype):
        return False
    rtol, atol = options["rtol"], options["atol"]
    left, right = plain(actual), plain(expected)
    if kind(expected) != "float":
        return bool((left == right).all()) if left.size else True
    gap_allowed = atol + rtol * abs(right)
    both_nan = np.isnan(left) & np.isnan(right)
    return bool(((left == right) | both_nan | (abs(left - right) <= gap_allowed)).all())


def plain(array):
    """An array as NumPy, in float64 or int64 or bool, on the CPU."""
    import numpy as np

    types = {"bool": bool, "float": float, "integer": np.int64}
    if hasattr(array, "detach"):
        tensor = array.detach().cpu()
        array = (tensor.double() if kind(array) == "float" else tensor).numpy()
    return np.asarray(array).astype(types[kind(array)])


def describe(value) -> str:
    """One short line that a learner can read; arrays with their shape, dtype and first values.

    >>> describe(1 / 3), describe([1, 2])
    ('0.333333', '[1, 2]')
    """
    if isinstance(value, float):
        text = f"{float(value):.6g}"
        return text if set(text) & set(".einf") else f"{text}.0"
    if is_array(value):
        return _describe_array(value)
    if hasattr(value, "state_dict"):
        return f"a model, {type(value).__name__}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if isinstance(value, (list, tuple)) and value and len(value) <= 8:
        opening, closing = "[]" if isinstance(value, list) else "()"
        body = ", ".join(describe(item) for item in value)
        return shorten(f"{opening}{body}{',' if len(value) == 1 and opening == '(' else ''}{closing}")
    short = reprlib.Repr()
    short.maxstring = short.maxother = 160
    return shorten(short.repr(value))


def _describe_array(value) -> str:
    name = str(value.dtype).removeprefix("torch.")
    flat = plain(value).reshape(-1).tolist()
    shown = ", ".join(f"{item:.6g}" if isinstance(item, float) else str(item) for item in flat[:8])
    dots = ", …" if len(flat) > 8 else ""
    kind_name = "tensor" if hasattr(value, "detach") else "array"
    return f"{kind_name} of shape {tuple(value.shape)}, {name}: [{shown}{dots}]"


def shorten(text: str, limit: int = 300) -> str:
    """The text in at most ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def difference(actual, expected, *, dtype: bool = False) -> str:
    """What differs, in one sentence; empty where the two lines already say it."""
    actual, expected = numbers_of(actual, expected)
    if is_array(expected) and is_array(actual):
        return _array_difference(actual, expected, dtype)
    if isinstance(expected, str) and isinstance(actual, str):
        return _text_difference(actual, expected)
    if isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        if len(actual) != len(expected):
            return translated("expected {expected} items; got {actual}", expected=len(expected), actual=len(actual))
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            if not same(a, e, dtype=dtype):
                said = marked("the first difference is at index {index}: expected {expected}; got {actual}")
                return translated(said, index=index, expected=describe(e), actual=describe(a))
    both_numbers = is_number(actual) and is_number(expected)
    if type(actual) is not type(expected) and not (
        both_numbers and (not dtype or _is_whole(actual) == _is_whole(expected))
    ):
        return translated("expected {expected}; got {actual}", expected=type_name(expected), actual=type_name(actual))
    return ""


def type_name(value) -> str:
    """'a list', 'a Tensor', 'None': the type in words."""
    if value is None:
        return "None"
    name = type(value).__name__
    return translated(marked("an {name}") if name[0] in "aeiouAEIOU" else marked("a {name}"), name=name)


def _array_difference(actual, expected, dtype) -> str:
    if tuple(actual.shape) != tuple(expected.shape):
        shapes = {"expected": tuple(expected.shape), "actual": tuple(actual.shape)}
        return translated("expected shape {expected}; got {actual}", **shapes)
    wrong_kind = kind(actual) != kind(expected)
    if wrong_kind or (dtype and str(actual.dtype) != str(expected.dtype)):
        return translated("expected dtype {expected}; got {actual}", expected=expected.dtype, actual=actual.dtype)
    left, right = plain(actual), plain(expected)
    gaps = abs(left.astype(float) - right.astype(float)).reshape(-1)
    if not gaps.size:
        return ""
    worst = int(gaps.argmax())
    index = [int(i) for i in _unravel(worst, expected.shape)]
    values = right.reshape(-1)[worst], left.reshape(-1)[worst]
    said = marked("the largest difference is at {index}: expected {expected:.6g}; got {actual:.6g}")
    return translated(said, index=index, expected=values[0], actual=values[1])


def _unravel(flat: int, shape) -> list[int]:
    index = []
    for size in reversed(tuple(shape)):
        flat, position = divmod(flat, int(size))
        index.append(position)
    return index[::-1]


def _text_difference(actual: str, expected: str) -> str:
    pairs = zip(actual, expected, strict=False)
    at = next((i for i, (a, e) in enumerate(pairs) if a != e), min(len(actual), len(expected)))
    said = marked("the texts part at character {at}: expected {expected!r}; got {actual!r}")
    return translated(said, at=at, expected=expected[at : at + 20], actual=actual[at : at + 20])


def guess(actual, expected) -> str:
    """A hint for mistakes that occur in every exercise: no return, a swapped axis, a wrong unit."""
    actual, expected = numbers_of(actual, expected)
    if actual is None and expected is not None:
        return translated("your function returned None: is there a `return`?")
    if is_array(expected) and is_array(actual):
        turned = tuple(expected.shape)[::-1]
        if tuple(actual.shape) != tuple(expected.shape) and tuple(actual.shape) == turned:
            return translated("the axes are in reverse order: transpose, or sum over the other axis")
        if kind(expected) == kind(actual) and tuple(actual.shape) == tuple(expected.shape):
            left, right = plain(actual).reshape(-1), plain(expected).reshape(-1)
            return _factor(left.tolist(), right.tolist())
    if is_number(actual) and is_number(expected):
        return _factor([actual], [expected])
    return ""


def _factor(actual: list, expected: list) -> str:
    ratios = [a / e for a, e in zip(actual, expected, strict=True) if e and not isinstance(e, complex)]
    if not ratios or not all(math.isclose(r, ratios[0], rel_tol=1e-4) for r in ratios):
        return ""
    if math.isclose(ratios[0], -1.0, rel_tol=1e-4):
        return translated("the sign is turned round")
    for factor, words in _FACTORS.items():
        if math.isclose(ratios[0], factor, rel_tol=1e-4):
            said = marked("your value is {times} too large: check the units and the counts")
            return translated(said, times=translated(words))
        if math.isclose(ratios[0], 1 / factor, rel_tol=1e-4):
            said = marked("your value is {times} too small: check the units and the counts")
            return translated(said, times=translated(words))
    return ""

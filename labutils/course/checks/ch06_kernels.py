"""Checks of chapter 06, second half: kernels of one's own, run by Triton's interpreter between guarded pages.

Every tensor lies in the middle of a larger one, so that a kernel without a mask reads and writes rubbish of ours and
nobody else's; its addresses tell.
"""

from functools import partial

import torch

from labutils.acceleration.interpreter import interpret, missing_triton
from labutils.acceleration.triton_ops import launch
from labutils.course.checks import exercise, expect_function
from labutils.course.checks.core import CheckFailed

BLOCK, GUARD = 8, 256
OUTSIDE = "a program used memory outside its tensors"


def _launch(kernel, grid, tensors, *numbers):
    """Runs a kernel on guarded copies and returns the last tensor, the output; a GPU's where there is one.

    Raises:
        CheckFailed: without Triton.
        IndexError: when an address lay outside.
    """
    if reason := missing_triton():
        raise CheckFailed("this exercise needs Triton", hint=reason)
    pages = [torch.full((2 * GUARD + t.numel(),), 77, dtype=t.dtype) for t in tensors]
    inner = [page[GUARD : GUARD + t.numel()] for page, t in zip(pages, tensors, strict=True)]
    for view, tensor in zip(inner, tensors, strict=True):
        view.copy_(tensor.flatten())
    try:
        accesses = interpret(kernel, grid, *inner, *numbers, BLOCK=BLOCK)
    except RuntimeError as error:
        if isinstance(cause := error.__cause__.__cause__, NotImplementedError):
            raise cause from None  # the blank
        raise
    allowed = [range(v.data_ptr(), v.data_ptr() + v.nbytes) for v in inner]
    if any(not any(a in room for room in allowed) for access in accesses for a in access.addresses):
        raise IndexError(OUTSIDE)
    if torch.cuda.is_available():
        inner = [t.flatten().cuda() for t in tensors]
        launch(kernel, grid, *inner, *numbers, BLOCK=BLOCK)
    return inner[-1].cpu().view(tensors[-1].shape)


def _outside(**_):
    raise IndexError(OUTSIDE)


def _blocks(n):
    return (-(-n // BLOCK),)


def _saxpy(a, x, y):
    return a * x + y


def _only(reached, a, x, y):
    """What is left when only the first numbers were reached."""
    out = torch.zeros_like(x)
    out[:reached] = _saxpy(a, x[:reached], y[:reached])
    return out


@exercise("6.8")
def saxpy_kernel(answer):
    """Offsets, mask, load, store."""

    def run(a, x, y):
        return _launch(answer, _blocks(len(x)), (x, y, torch.zeros_like(x)), a, len(x))

    make = torch.Generator().manual_seed(0)
    cases = [{"a": 2.5, "x": torch.randn(n, generator=make), "y": torch.randn(n, generator=make)} for n in (24, 19)]
    expect_function(
        run,
        _saxpy,
        cases=cases,
        mistakes=[
            (partial(_only, BLOCK), "every program worked on the first block: add tl.program_id(0) * BLOCK"),
            (partial(_only, BLOCK + 2), "programs overlap: program 1 starts at BLOCK, not at 1"),
            (_outside, "the last block reaches behind the end: give every load and store mask=offsets < n"),
            (lambda a, x, y: x + y, "a is missing: a times x, plus y"),
            (lambda a, x, y: a * (x + y), "only x is multiplied by a"),
            (lambda a, x, y: torch.zeros_like(x), "nothing was stored: tl.store(out + offsets, …)"),
        ],
    )


def _rms(x, gain, eps, *, divisor=None, root=True, keep_eps=True, centre=False, gains=True):
    x = x.double() - (x.double().mean(dim=1, keepdim=True) if centre else 0)
    mean = (x * x).sum(dim=1, keepdim=True) / (divisor or x.shape[1]) + (eps if keep_eps else 0)
    return (x / (mean.sqrt() if root else mean) * (gain.double() if gains else 1)).float()


@exercise("6.9")
def rms_norm_kernel(answer):
    """A program for each row: read once, written once."""

    def run(x, gain, eps):
        return _launch(answer, (len(x),), (x, gain, torch.zeros_like(x)), x.shape[1], eps)

    make = torch.Generator().manual_seed(1)
    cases = [
        {"x": torch.randn(3, n, generator=make), "gain": torch.randn(n, generator=make), "eps": 0.3} for n in (6, 8)
    ]
    expect_function(
        run,
        _rms,
        cases=cases,
        rtol=1e-4,
        mistakes=[
            (partial(_rms, divisor=BLOCK), "you divided by BLOCK: masked elements are zeros, the row has n numbers"),
            (partial(_rms, divisor=1), "that is the sum of squares: divide by n for the mean"),
            (partial(_rms, keep_eps=False), "eps is missing: it is added to the mean, inside the root"),
            (partial(_rms, root=False), "the root is missing: divide by tl.sqrt of the mean square"),
            (partial(_rms, centre=True), "RMSNorm does not subtract the mean: that is LayerNorm"),
            (partial(_rms, gains=False), "the gains are missing: load them and multiply"),
            (
                lambda x, gain, eps: _rms(x, gain, eps) * (torch.nan if x.shape[1] < BLOCK else 1),
                "what a mask hides is undefined, and it went into the sum: other=0.0",
            ),
            (_outside, "a row has n numbers, a block BLOCK: mask=columns < n for loads and the store"),
        ],
    )


def _gemv(codes, scales, x, *, weight=lambda codes: codes.double(), scale=lambda s: s.double(), first=0, last=None):
    part = slice(first, last)
    return (weight(codes)[:, part] @ x.double()[part] * scale(scales)).float()


def _strided_by_one(codes):
    rows, n = codes.shape
    return codes.flatten().double().unfold(0, n, 1)[:rows]


@exercise("6.10")
def int8_gemv_kernel(answer):
    """A program for each row; the codes become floats inside."""

    def run(codes, scales, x):
        out = torch.zeros(len(codes))
        return _launch(answer, (len(codes),), (codes, scales, x, out), codes.shape[1])

    make = torch.Generator().manual_seed(2)
    cases = []
    for n in (24, 19):
        codes = torch.randint(-127, 128, (4, n), generator=make, dtype=torch.int8)
        cases.append({"codes": codes, "scales": torch.rand(4, generator=make), "x": torch.randn(n, generator=make)})
    expect_function(
        run,
        _gemv,
        cases=cases,
        rtol=1e-4,
        mistakes=[
            (partial(_gemv, scale=lambda s: 1.0), "the scale is missing: multiply the finished sum by scales[row]"),
            (partial(_gemv, scale=lambda s: 1 / s.double()), "you divided by the scale: multiply"),
            (partial(_gemv, last=BLOCK), "only the first block was summed: walk along the row with a loop"),
            (partial(_gemv, first=2 * BLOCK), "each block replaced the sum: add it, sums += …"),
            (partial(_gemv, weight=_strided_by_one), "row r begins at r * n, not at r"),
            (_outside, "the row's last block reaches into the next row or behind the end: mask=k < n"),
            (partial(_gemv, weight=lambda c: c.double().abs()), "the codes have signs: tl.load gives int8, keep them"),
            (
                lambda codes, scales, x: _gemv(codes, scales, x) * (torch.nan if len(x) % BLOCK else 1),
                "what a mask hides is undefined, and it went into the sum: other=0 for codes and x",
            ),
        ],
    )


def _online(m, total, output, scores, values, *, shrink_total=True, shrink_output=True, old_maximum=False, reset=False):
    larger = m if old_maximum else torch.maximum(m, scores.max())
    larger = scores.max() if reset else larger
    shrink, powers = torch.exp(m - larger), torch.exp(scores - larger)
    total = total * (shrink if shrink_total else 1) + powers.sum()
    output = output * (shrink if shrink_output else 1) + powers @ values
    return larger, total, output


def _divided(**case):
    larger, total, output = _online(**case)
    return larger, total, output / total


@exercise("6.11")
def online_update(answer):
    """Two blocks after one another give what one softmax over both gives."""
    make = torch.Generator().manual_seed(3)

    def case(old, size):
        scores = torch.randn(size, generator=make) * 3
        state = {"m": torch.tensor(old), "total": torch.tensor(2.0), "output": torch.randn(4, generator=make)}
        return {**state, "scores": scores, "values": torch.randn(size, 4, generator=make)}

    first = {"m": torch.tensor(-torch.inf), "total": torch.tensor(0.0), "output": torch.zeros(4)}  # as a kernel begins
    cases = [case(-4.0, 5), case(9.0, 5), case(0.5, 3), case(0.0, 5) | first]
    neither = partial(_online, shrink_total=False, shrink_output=False)
    mistakes = [
        (partial(_online, shrink_total=False), "the old total was counted with the old maximum: times exp(m − new)"),
        (partial(_online, shrink_output=False), "the old output was weighted with the old maximum: rescale it too"),
        (neither, "nothing old was rescaled: total and output both need exp(m − new)"),
        (partial(_online, old_maximum=True), "the maximum never moved: take the larger of m and the block's own"),
        (partial(_online, reset=True), "the old maximum was forgotten: the new one is the larger of the two"),
        (_divided, "divide by the total once, at the end, not in every block"),
    ]
    expect_function(answer, _online, cases=cases, mistakes=mistakes)

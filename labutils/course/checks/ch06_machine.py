"""Checks of chapter 06 about the machine: threads that fill its memory channels, and a product of NVFP4 codes."""

import math
from functools import partial

import torch

from labutils.acceleration.memory import LINE_BYTES
from labutils.acceleration.memory import threads_to_saturate as right_threads
from labutils.course.checks import cases_of, exercise, expect_function
from labutils.quantization.floats import E2M1, NV_BLOCK, decode


def _threads(channels, transfers_per_s, lines, latency_s, *, width=8, line=LINE_BYTES, whole=math.ceil, turned=False):
    memory, core = channels * transfers_per_s * width, lines * line / latency_s
    return whole(core / memory if turned else memory / core)


@exercise("6.7")
def threads_to_saturate(answer):
    """All channels together over what one thread keeps on its way."""
    names = "channels transfers_per_s lines latency_s"
    values = ((2, 3.2e9, 12, 80e-9), (8, 5.6e9, 16, 110e-9), (1, 2.4e9, 10, 70e-9))
    expect_function(
        answer,
        right_threads,
        cases=cases_of(names, *values),
        mistakes=[
            (partial(_threads, whole=math.floor), "that many threads leave some bandwidth unused: round up"),
            (partial(_threads, whole=float), "a third of a thread is none: round up to a whole number"),
            (partial(_threads, width=64), "64 bits a transfer are 8 bytes"),
            (partial(_threads, width=1), "a channel is 64 bits wide: 8 bytes at each transfer"),
            (partial(_threads, line=1), "lines are not bytes: each has 64"),
            (partial(_threads, turned=True), "upside down: divide what the channels carry by what one thread carries"),
            (lambda **case: _threads(**{**case, "channels": 1}), "that is one channel: multiply by their number"),
        ],
    )


def _nvfp4(codes, scales, tensor_scale, x, *, halves=(0, 4), apart=False, values=None, scaled=True, whole=True):
    table = decode(torch.arange(16, dtype=torch.uint8), E2M1) if values is None else values
    first, second = (codes >> shift & 15 for shift in halves)
    order = torch.cat([first, second], dim=1) if apart else torch.stack([first, second], dim=-1).flatten(1)
    blocks = (table[order.long()] * x).unflatten(1, (-1, NV_BLOCK)).sum(dim=-1)
    return (blocks * scales if scaled else blocks).sum(dim=-1) * (tensor_scale if whole else 1)


@exercise("6.12")
def nvfp4_gemv(answer):
    """Codes are looked up, blocks are summed, then scaled."""
    make = torch.Generator().manual_seed(7)

    def case(rows, n):
        codes = torch.randint(0, 256, (rows, n // 2), generator=make, dtype=torch.uint8)
        scales = torch.randint(1, 9, (rows, n // NV_BLOCK), generator=make) / 4
        return {"codes": codes, "scales": scales, "tensor_scale": 0.3, "x": torch.randn(n, generator=make)}

    tiny = torch.zeros(1, 8, dtype=torch.uint8)
    tiny[0, 0] = 7 | 9 << 4
    hand = {"codes": tiny, "scales": torch.tensor([[3.0]]), "tensor_scale": 2.0, "x": torch.ones(16)}
    integers, exponents = torch.arange(16.0), decode(torch.arange(16, dtype=torch.uint8), E2M1)
    expect_function(
        answer,
        _nvfp4,
        cases=[hand, case(3, 32), case(2, 48)],
        rtol=1e-4,
        atol=1e-5,
        mistakes=[
            (partial(_nvfp4, values=integers - 8), "that is int4: these codes are floats, look their values up"),
            (partial(_nvfp4, values=integers), "a code is no number yet: look its value up in E2M1's table"),
            (partial(_nvfp4, values=exponents.abs()), "the fourth bit is the sign: codes 8 to 15 are negative"),
            (partial(_nvfp4, halves=(4, 0)), "the low half comes first: it is input 2i"),
            (partial(_nvfp4, apart=True), "the two halves of a byte are neighbours: stack them, then flatten"),
            (partial(_nvfp4, whole=False), "the tensor's scale is missing: multiply by tensor_scale at the end"),
            (partial(_nvfp4, scaled=False), "the blocks' scales are missing: each block's sum times its own"),
        ],
    )

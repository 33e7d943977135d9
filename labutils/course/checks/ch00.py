"""Checks of chapter 00: rates, bits per byte, ceilings, what a ceiling refutes, and two repairs of the article."""

import math
import statistics
from functools import partial

import torch

from labutils.course.checks import exercise, expect_close, expect_function, expect_shape, expect_true, expect_type

TIMES_S = [0.80, 0.20, 0.10, 0.25, 0.40, 0.16]  # the first one is the warm-up


@exercise("0.1")
def tokens_per_second(answer):
    """Median rate without the warm-up."""
    expect_function(
        answer,
        lambda new_tokens, seconds: new_tokens / statistics.median(seconds[1:]),
        cases=[
            {"new_tokens": 32, "seconds": TIMES_S},
            {"new_tokens": 10, "seconds": [5.0, 1.0, 2.0, 9.0]},
            {"new_tokens": 10, "seconds": [5.0, 1.0, 2.0, 9.0, 4.0]},
        ],
        mistakes=[
            (
                lambda new_tokens, seconds: statistics.median(seconds[1:]) / new_tokens,
                "upside down: that is seconds per token; divide tokens by seconds",
            ),
            (
                lambda new_tokens, seconds: new_tokens / statistics.median(seconds),
                "the first run warms the caches up: leave seconds[0] out",
            ),
            (
                lambda new_tokens, seconds: new_tokens / statistics.mean(seconds[1:]),
                "you took the mean: one disturbed run drags it along; take the median",
            ),
            (
                lambda new_tokens, seconds: new_tokens / statistics.mean(seconds),
                "you averaged over all runs: leave the warm-up out and take the median",
            ),
            (
                lambda new_tokens, seconds: new_tokens / statistics.median_low(seconds[1:]),
                "of an even number of runs the median is the mean of the middle two: statistics.median",
            ),
            (
                lambda new_tokens, seconds: new_tokens / min(seconds),
                "the fastest run is the luckiest: report the median",
            ),
        ],
    )


@exercise("0.2")
def bits_per_byte(answer):
    """Nats of a text to bits per UTF-8 byte."""
    nats = torch.tensor([2.0, 1.0, 3.0])
    expect_function(
        answer,
        lambda nats, text: float(nats.sum()) / math.log(2) / len(text.encode()),
        cases=[{"nats": nats, "text": "def f():"}, {"nats": nats, "text": "取消订单"}],
        mistakes=[
            (
                lambda nats, text: float(nats.sum()) / len(text.encode()),
                "those are nats per byte: one bit is ln 2 nats, so divide by math.log(2)",
            ),
            (
                lambda nats, text: float(nats.sum()) * math.log(2) / len(text.encode()),
                "you multiplied by ln 2: a nat is more than a bit, so divide",
            ),
            (
                lambda nats, text: float(nats.mean()) / math.log(2),
                "those are bits per token, which depend on the tokenizer: divide the sum by the bytes",
            ),
            (
                lambda nats, text: float(nats.sum()) / math.log(2) / len(text),
                "len(text) counts characters, and a Chinese one has three bytes: use text.encode()",
            ),
        ],
    )


@exercise("0.3")
def best_tokens_per_s(answer):
    """What bandwidth allows one stream."""
    expect_function(
        answer,
        lambda parameters, bytes_per_parameter, bandwidth_bytes_per_s: (
            bandwidth_bytes_per_s / (parameters * bytes_per_parameter)
        ),
        cases=[
            {"parameters": 7e9, "bytes_per_parameter": 2, "bandwidth_bytes_per_s": 2e12},
            {"parameters": 5.8e6, "bytes_per_parameter": 4, "bandwidth_bytes_per_s": 1.5e10},
        ],
        mistakes=[
            (
                lambda parameters, bytes_per_parameter, bandwidth_bytes_per_s: bandwidth_bytes_per_s / parameters,
                "you counted parameters, not bytes: each parameter has bytes_per_parameter of them",
            ),
            (
                lambda parameters, bytes_per_parameter, bandwidth_bytes_per_s: (
                    parameters * bytes_per_parameter / bandwidth_bytes_per_s
                ),
                "upside down: those are the seconds for one token",
            ),
            (
                lambda parameters, bytes_per_parameter, bandwidth_bytes_per_s: (
                    bandwidth_bytes_per_s / (parameters * bytes_per_parameter * 8)
                ),
                "bandwidth is in bytes here, not in bits: leave the 8 out",
            ),
        ],
    )


@exercise("0.4")
def predict_all(answer):
    """Every batch's output, in order, without gradients."""
    model = torch.nn.Linear(3, 2)
    rows = (4, 4, 4, 4, 3)
    batches = [torch.randn(n, 3, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(rows)]
    with torch.no_grad():
        parts = [model(batch) for batch in batches]
    right, given = torch.cat(parts), "4 batches of 4 inputs and one of 3, a model with 2 outputs"
    result = answer(model, batches)
    mistakes = [
        (lambda: tuple(parts[-1].shape), "only the last batch came back: collect every output, then concatenate"),
        (lambda: tuple(parts[0].shape), "only the first batch came back: return after the loop, not in it"),
        (
            lambda: tuple(parts[-1].mean(dim=1).shape),
            "the last batch only, and averaged over dim=1: dim 1 holds features, not GPUs",
        ),
        (
            lambda: tuple(right.mean(dim=1).shape),
            "you averaged over dim=1: dim 1 holds features, not GPUs; leave the mean out",
        ),
    ]
    expect_type(result, torch.Tensor, given=given, hint="join the list's tensors into one: use torch.cat")
    expect_shape(result, tuple(right.shape), given=given, mistakes=[(shape(), hint) for shape, hint in mistakes])
    expect_close(
        result,
        right,
        given=given,
        mistakes=[(lambda: torch.cat(parts[::-1]), "the batches came back in another order")],
    )
    expect_true(
        not result.requires_grad,
        "the outputs still carry gradients",
        given=given,
        hint="inference keeps no graph: run the loop under torch.inference_mode()",
    )


def _claim(name, parameters, active, bits, streams, tokens_per_s):
    sizes = {"parameters": parameters, "active_parameters": active, "bits": bits}
    return {"name": name, **sizes, "streams": streams, "tokens_per_s": tokens_per_s}


CLAIMS = [
    _claim("7B, 4 bits", 7e9, 7e9, 4, 1, 20.0),
    _claim("7B, 16 bits", 7e9, 7e9, 16, 1, 20.0),
    _claim("30B mixture, 4 bits", 30e9, 3.3e9, 4, 1, 40.0),
    _claim("7B, 16 bits, 16 streams", 7e9, 7e9, 16, 16, 80.0),
    _claim("70B, 4 bits", 70e9, 70e9, 4, 1, 3.0),
    _claim("1B, 8 bits", 1e9, 1e9, 8, 1, 12.0),
]


def _refuted(claims, bandwidth_bytes_per_s, *, size="active_parameters", scale=8, shared=True, above=True):
    """The claims above their ceiling, with one thing at a time gone wrong."""
    found = []
    for claim in claims:
        ceiling = bandwidth_bytes_per_s / (claim[size] * claim["bits"] / scale) * (claim["streams"] if shared else 1)
        if (claim["tokens_per_s"] > ceiling) is above:
            found.append(claim["name"])
    return found


@exercise("0.5")
def refuted(answer):
    """The claims that no machine of this bandwidth can keep."""
    expect_function(
        answer,
        _refuted,
        cases=[{"claims": CLAIMS, "bandwidth_bytes_per_s": bandwidth} for bandwidth in (80e9, 20e9, 1e12)],
        mistakes=[
            (partial(_refuted, above=False), "those claims may be true: return the ones that the ceiling rules out"),
            (partial(_refuted, size="parameters"), "a token reads the active parameters only, of a mixture of experts"),
            (
                partial(_refuted, shared=False),
                "all streams share one read of the weights: multiply the ceiling by streams",
            ),
            (partial(_refuted, scale=1), "bits are eight to the byte: divide them by 8"),
        ],
    )


@exercise("0.6")
def clock_cycles(answer):
    """2 · parameters · tokens operations at so many a cycle."""
    expect_function(
        answer,
        lambda parameters, tokens, flops_per_s, clock_hz: 2 * parameters * tokens / (flops_per_s / clock_hz),
        cases=[{"parameters": 85e6, "tokens": 128, "flops_per_s": 312e12, "clock_hz": 1.41e9}],
        mistakes=[
            (
                lambda parameters, tokens, flops_per_s, clock_hz: parameters * tokens / (flops_per_s / clock_hz),
                "a factor of 2 is missing: each parameter multiplies and adds",
            ),
            (
                lambda parameters, tokens, flops_per_s, clock_hz: 2 * parameters / (flops_per_s / clock_hz),
                "that is one token: every one of the 128 passes through the network",
            ),
            (
                lambda parameters, tokens, flops_per_s, clock_hz: 2 * parameters * tokens / flops_per_s,
                "those are seconds: multiply by the clock's rate",
            ),
            (
                lambda parameters, tokens, flops_per_s, clock_hz: 2 * parameters * tokens / clock_hz,
                "a GPU does more than one operation a cycle: it does flops_per_s / clock_hz of them",
            ),
        ],
    )

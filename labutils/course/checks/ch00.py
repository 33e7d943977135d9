"""Checks of chapter 00: rates, bits per byte, ceilings and what they refute, two repairs, and a benchmark to break."""

import math
import statistics
from functools import partial

import torch

from labutils.course.checks import (
    cases_of,
    exercise,
    expect_close,
    expect_function,
    expect_shape,
    expect_true,
    expect_type,
)
from labutils.course.checks.compare import describe

TIMES_S = [0.80, 0.20, 0.10, 0.25, 0.40, 0.16]  # the first one is the warm-up


def _rate(statistic=statistics.median, *, first=1, upside_down=False):
    def tokens_per_second(new_tokens, seconds):
        rate = new_tokens / statistic(seconds[first:])
        return 1 / rate if upside_down else rate

    return tokens_per_second


@exercise("0.1")
def tokens_per_second(answer):
    """Median rate without the warm-up."""
    seconds = [TIMES_S, [5.0, 1.0, 2.0, 9.0], [5.0, 1.0, 2.0, 9.0, 4.0]]
    expect_function(
        answer,
        _rate(),
        cases=cases_of("new_tokens seconds", *zip((32, 10, 10), seconds, strict=True)),
        mistakes=[
            (_rate(upside_down=True), "upside down: that is seconds per token; divide tokens by seconds"),
            (_rate(first=0), "the first run warms the caches up: leave seconds[0] out"),
            (_rate(statistics.mean), "you took the mean: one disturbed run drags it along; take the median"),
            (_rate(statistics.mean, first=0), "you averaged over all runs: leave the warm-up out and take the median"),
            (
                _rate(statistics.median_low),
                "of an even number of runs the median is the mean of the middle two: statistics.median",
            ),
            (_rate(min, first=0), "the fastest run is the luckiest: report the median"),
        ],
    )


LN2 = math.log(2)


def _bits(*, over=LN2, size=lambda nats, text: len(text.encode())):
    return lambda nats, text: float(nats.sum()) / over / size(nats, text)


@exercise("0.2")
def bits_per_byte(answer):
    """Nats of a text to bits per UTF-8 byte."""
    nats = torch.tensor([2.0, 1.0, 3.0])
    expect_function(
        answer,
        _bits(),
        cases=[{"nats": nats, "text": "def f():"}, {"nats": nats, "text": "取消订单"}],
        mistakes=[
            (_bits(over=1), "those are nats per byte: one bit is ln 2 nats, so divide by math.log(2)"),
            (_bits(over=1 / LN2), "you multiplied by ln 2: a nat is more than a bit, so divide"),
            (
                _bits(size=lambda nats, text: len(nats)),
                "those are bits per token, which depend on the tokenizer: divide the sum by the bytes",
            ),
            (
                _bits(size=lambda nats, text: len(text)),
                "len(text) counts characters, and a Chinese one has three bytes: use text.encode()",
            ),
        ],
    )


def _ceiling(*, size=lambda each: each, power=1):
    def best_tokens_per_s(parameters, bytes_per_parameter, bandwidth_bytes_per_s):
        return (bandwidth_bytes_per_s / (parameters * size(bytes_per_parameter))) ** power

    return best_tokens_per_s


@exercise("0.3")
def best_tokens_per_s(answer):
    """What bandwidth allows one stream."""
    names = "parameters bytes_per_parameter bandwidth_bytes_per_s"
    expect_function(
        answer,
        _ceiling(),
        cases=cases_of(names, (7e9, 2, 2e12), (5.8e6, 4, 1.5e10)),
        mistakes=[
            (
                _ceiling(size=lambda each: 1),
                "you counted parameters, not bytes: each parameter has bytes_per_parameter of them",
            ),
            (_ceiling(power=-1), "upside down: those are the seconds for one token"),
            (_ceiling(size=lambda each: 8 * each), "bandwidth is in bytes here, not in bits: leave the 8 out"),
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


def _cycles(*, each=2, whole=True, per_cycle=lambda flops_per_s, clock_hz: flops_per_s / clock_hz):
    def clock_cycles(parameters, tokens, flops_per_s, clock_hz):
        return each * parameters * (tokens if whole else 1) / per_cycle(flops_per_s, clock_hz)

    return clock_cycles


@exercise("0.6")
def clock_cycles(answer):
    """2 · parameters · tokens operations at so many a cycle."""
    expect_function(
        answer,
        _cycles(),
        cases=cases_of("parameters tokens flops_per_s clock_hz", (85e6, 128, 312e12, 1.41e9)),
        mistakes=[
            (_cycles(each=1), "a factor of 2 is missing: each parameter multiplies and adds"),
            (_cycles(whole=False), "that is one token: every one of the 128 passes through the network"),
            (_cycles(per_cycle=lambda flops, clock: flops), "those are seconds: multiply by the clock's rate"),
            (
                _cycles(per_cycle=lambda flops, clock: clock),
                "a GPU does more than one operation a cycle: it does flops_per_s / clock_hz of them",
            ),
        ],
    )


RANGES = {"prompt_tokens": range(16, 513), "warmup": range(4), "runs": range(1, 10)}
ALLOWED = RANGES | {"statistic": (statistics.mean, statistics.median, min)}
MACHINES = {  # seconds of the first call's setup, of a token read, of each third call; then the lie that it calls for
    "a machine that sets itself up for 2 s during its first call": (
        (2.0, 0.01, 0.0),
        "the setup can hide in the warm-up of ours and count in the mean of theirs, unless many runs dilute it",
    ),
    "a machine that reads a token a hundred times as fast as it writes one": (
        (0.0, 0.0001, 0.0),
        "tokens of the prompt count as if they were written: give ours many of them, and theirs few",
    ),
    "a machine that is disturbed for 1.3 s in every third call": (
        (0.0, 0.01, 1.3),
        "a disturbed call moves the mean of few runs and never the fastest run: choose the statistic for each side",
    ),
}


def _looks(careless_rate, settings, setup_s, read_s, disturbed_s):
    """The rate that the benchmark finds where 16 tokens take 10 ms each, on a clock that only the calls move."""
    calls, now = 0, 0.0

    def generate(prompt_tokens):
        nonlocal calls, now
        calls += 1
        now += 0.16 + prompt_tokens * read_s + setup_s * (calls == 1) + disturbed_s * (calls % 3 == 0)

    return careless_rate(generate, **settings, clock=lambda: now)


@exercise("0.7")
def lying_settings(answer, careless_rate):
    """Two settings of one benchmark that make a program look twice as fast as itself."""
    both = answer()
    is_pair = isinstance(both, tuple | list) and len(both) == 2 and all(isinstance(each, dict) for each in both)
    expect_true(is_pair, "the settings are not two dictionaries", hint="return two dictionaries, theirs and ours")
    for settings in both:
        legal = settings.keys() == ALLOWED.keys() and all(settings[key] in ALLOWED[key] for key in ALLOWED)
        hint = "a lie needs settings that nobody objects to: keep to those that the text allows"
        expect_true(legal, "a setting is missing, or not allowed", actual=describe(settings), hint=hint)
    for given, (costs, hint) in MACHINES.items():
        theirs, ours = (_looks(careless_rate, settings, *costs) for settings in both)
        hint = "ours looks the slower one: theirs comes first" if ours < 0.99 * theirs else hint
        expect_true(
            ours >= 2 * theirs,
            "ours does not look twice as fast",
            given=given,
            expected="at least 2.0",
            actual=describe(ours / theirs),
            hint=hint,
        )

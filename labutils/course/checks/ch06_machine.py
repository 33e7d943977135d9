"""Checks of chapter 06 about the machine: threads that fill its memory channels, and what a million tokens cost."""

import math
from functools import partial

from labutils.acceleration.cost import cost_per_million
from labutils.acceleration.memory import LINE_BYTES
from labutils.acceleration.memory import threads_to_saturate as right_threads
from labutils.course.checks import cases_of, exercise, expect_function


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


def _price(tokens_per_s, price_per_hour, watts, price_per_kwh):
    cost = cost_per_million(
        tokens_per_s, price_per_hour=price_per_hour, joules_per_token=watts / tokens_per_s, price_per_kwh=price_per_kwh
    )
    return cost.total


def _priced(tokens_per_s, price_per_hour, watts, price_per_kwh, *, seconds=3600, kilo=1000, energy=True, rent=True):
    hours = 1e6 / tokens_per_s / seconds
    return hours * (price_per_hour * rent + (watts / kilo * price_per_kwh if energy else 0))


@exercise("6.12")
def price_per_million(answer):
    """Hours times (rent plus power times tariff)."""
    names = "tokens_per_s price_per_hour watts price_per_kwh"
    expect_function(
        answer,
        _price,
        cases=cases_of(names, (100.0, 2.0, 300.0, 0.3), (2500.0, 4.0, 700.0, 0.25)),
        mistakes=[
            (partial(_priced, energy=False), "the energy is missing: watts / 1000 kilowatts for those hours"),
            (partial(_priced, rent=False), "the rent is missing: hours times price_per_hour"),
            (partial(_priced, kilo=1), "watts are not kilowatts: divide by 1000"),
            (partial(_priced, seconds=1), "those are seconds: an hour has 3600"),
            (partial(_priced, seconds=60), "those are minutes: an hour has 3600 seconds"),
        ],
    )

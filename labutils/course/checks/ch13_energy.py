"""Check of chapter 13, energy: joules a token from a counter that wraps, idle power left out."""

from labutils.course.checks import cases_of, exercise, expect_function


def _joules(
    readings, wraps_at, idle_w, tokens, *, wrap=True, idle=True, unit=1e6, late=False, per="tokens", ends=False
):
    total = 0.0
    for (_, a), (_, b) in zip(readings, readings[1:], strict=False):
        total += b - a + (wraps_at if wrap and b < a else 0)
    if ends:
        a, b = readings[0][1], readings[-1][1]
        total = b - a + (wraps_at if b < a else 0)
    seconds = readings[-1][0] - (0 if late else readings[0][0])
    joules = total / unit - (idle_w * seconds if idle else 0)
    return joules / {"tokens": tokens, "readings": len(readings), "seconds": seconds}[per]


def _changed(**change):
    return lambda readings, wraps_at, idle_w, tokens: _joules(readings, wraps_at, idle_w, tokens, **change)


def _mean_of_powers(readings, wraps_at, idle_w, tokens):
    powers = []
    for (s, a), (t, b) in zip(readings, readings[1:], strict=False):
        powers.append((b - a + (wraps_at if b < a else 0)) / 1e6 / (t - s))
    seconds = readings[-1][0] - readings[0][0]
    return (sum(powers) / len(powers) - idle_w) * seconds / tokens


def _absolute(readings, wraps_at, idle_w, tokens):
    total = sum(abs(b - a) for (_, a), (_, b) in zip(readings, readings[1:], strict=False)) / 1e6
    return (total - idle_w * (readings[-1][0] - readings[0][0])) / tokens


def _idle_once(readings, wraps_at, idle_w, tokens):
    return _joules(readings, wraps_at, idle_w, tokens, idle=False) - idle_w / tokens


@exercise("13.6")
def joules_per_token(answer):
    """Energy above idle for each token, from readings (second, microjoules) of one counter."""
    expect_function(
        answer,
        _joules,
        cases=cases_of(
            "readings wraps_at idle_w tokens",
            ([(0.0, 2_000_000), (1.0, 12_000_000), (3.0, 32_000_000)], 262_000_000, 4.0, 20),
            ([(5.0, 80_000_000), (6.0, 95_000_000), (8.0, 25_000_000)], 100_000_000, 10.0, 8),
            ([(1.0, 50_000_000), (2.0, 90_000_000), (2.5, 10_000_000), (4.5, 60_000_000)], 100_000_000, 2.0, 16),
            ([(0.0, 0), (2.0, 9_000_000)], 100_000_000, 4.5, 3),
        ),
        mistakes=[
            (_changed(idle=False), "idle power runs whether or not you work: take idle_w times the seconds off"),
            (_changed(ends=True), "between the ends the counter may wrap more than once: add up reading by reading"),
            (_changed(wrap=False), "a reading below the one before it wrapped: add wraps_at there"),
            (_absolute, "a reading below the one before it wrapped: add wraps_at there"),
            (
                lambda readings, wraps_at, idle_w, tokens: 1e6 * _joules(readings, wraps_at, idle_w, tokens),
                "the counter counts microjoules: divide by a million",
            ),
            (
                lambda readings, wraps_at, idle_w, tokens: _joules(readings, wraps_at, 1e6 * idle_w, tokens, unit=1),
                "the counter counts microjoules: divide by a million",
            ),
            (_changed(unit=1), "the counter counts microjoules: divide by a million"),
            (_changed(unit=1e3), "micro is a millionth, not a thousandth: divide by 1e6"),
            (
                _mean_of_powers,
                "readings are not evenly spaced, so a plain mean of powers counts short gaps too much: add energies",
            ),
            (_changed(late=True), "the clock does not begin at 0: seconds are the last time minus the first"),
            (_idle_once, "idle_w is a power: multiply it by the seconds"),
            (_changed(per="seconds"), "that is a power in watts: divide by the tokens, not by the seconds"),
        ],
    )

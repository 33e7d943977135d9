"""Is the machine quiet enough to time on? A function raced against itself must tie, and memory be as fast as ever."""

import torch

from labutils.measurement.roofline import measure_roofline
from labutils.measurement.timing import Ratio, measure_interleaved, paired_ratio

TOLERANCE = 1.05  # an A/A ratio of a quiet machine lies within a few percent of one
ROUNDS = 41


def a_a_ratio(rounds: int = ROUNDS) -> Ratio:
    """Times one function under two names, in turns: the ratio is 1 up to the machine's noise.

    The function multiplies matrices and walks through memory, some milliseconds a call.
    """
    matrix, vector = torch.ones(512, 512), torch.ones(2**22)

    def work():
        return (matrix @ matrix).sum() + vector.sum()

    times = measure_interleaved({"A": work, "A again": work}, repeats=rounds, calls_per_sample=3)
    return paired_ratio(times["A"].samples_s, times["A again"].samples_s)


def why_busy(seconds: float = 1.0) -> str:
    """What says that this machine is busy now, in a few words; empty on a quiet one.

    Two things are asked: whether the interval of an A/A race lies within five percent of one, and whether the
    bandwidth is what it was before and steady (`Roofline.doubt`).
    """
    ratio = a_a_ratio()
    if ratio.low < 1 / TOLERANCE or ratio.high > TOLERANCE:
        return f"a function against itself: {ratio}"
    return measure_roofline(seconds).doubt

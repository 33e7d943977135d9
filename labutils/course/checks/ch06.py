"""Checks of chapter 06, first half: queued work, gaps, batches, bytes of attention, memory, a tape."""

import math
from functools import partial

import torch

from labutils.acceleration.graphs import Tape
from labutils.acceleration.memory import Need, usable
from labutils.acceleration.simulation import SimulatedGpu
from labutils.acceleration.timeline import Event, merged
from labutils.course.checks import cases_of, exercise, expect_close, expect_function, expect_true

KERNEL_S, LAUNCH_S, EARLIER_S = 50e-6, 5e-6, 3e-3


def _ask(answer, *, calls=40):
    """A simulated GPU that still has earlier work in its queue."""
    gpu = SimulatedGpu(launch_s=LAUNCH_S)
    gpu.launch(EARLIER_S)
    return answer(lambda: gpu.launch(KERNEL_S), gpu.wait, gpu.clock, calls)


def _timed(launch, wait, clock, calls, *, first=True, last=True, each=False, mean=True):
    if first:
        wait()
    start = clock()
    for _ in range(calls):
        launch()
        if each:
            wait()
    if last:
        wait()
    return (clock() - start) / (calls if mean else 1)


@exercise("6.1")
def honest_seconds(answer):
    """The device's own time for a call, neither the launch's nor the queue's."""
    wrong = [
        ({"last": False}, "you timed the launches: wait for the device before you read the clock the second time"),
        ({"first": False}, "earlier work was still in the queue: wait before you start the clock, too"),
        ({"first": False, "last": False}, "no wait at all: this is how long queueing takes, not the work"),
        ({"each": True}, "a wait after every call adds each launch to it: queue all calls, then wait once"),
        ({"mean": False}, "that is all calls together: divide by their number"),
    ]
    mistakes = [(lambda s=settings: _ask(partial(_timed, **s)), hint) for settings, hint in wrong]
    given = f"a simulated GPU: {LAUNCH_S * 1e6:.0f} µs to launch, {KERNEL_S * 1e6:.0f} µs a kernel, earlier work queued"
    hint = "wait(); read the clock; queue all calls; wait(); read the clock"
    share = 1.1 * LAUNCH_S / (40 * KERNEL_S)  # one launch in forty calls may count, or not
    expect_close(_ask(answer), KERNEL_S, given=given, rtol=share, mistakes=mistakes, hint=hint)


def _busy(events, *, union=True, whole="span", idle=False):
    spans = merged([Event("", *event) for event in events]) if union else [(s, s + d) for s, d in events]
    busy = sum(end - start for start, end in spans)
    start, end = min(s for s, _ in events), max(s + d for s, d in events)
    share = busy / {"span": end - start, "end": end, "last start": max(s for s, _ in events) - start}[whole]
    return 1 - share if idle else share


@exercise("6.2")
def busy_share(answer):
    """Time with at least one event running, over the time from first to last."""
    one = [(1.0, 2.0), (4.0, 1.0), (4.5, 1.5), (9.0, 1.0)]
    inside = [(2.0, 6.0), (3.0, 1.0), (10.0, 2.0)]
    expect_function(
        answer,
        _busy,
        cases=[{"events": one}, {"events": inside}, {"events": [*inside[::-1], (12.0, 0.5)]}],
        mistakes=[
            (partial(_busy, union=False), "two events at once count once: merge those that overlap"),
            (partial(_busy, whole="end"), "the profile begins with the first event, not at 0"),
            (
                partial(_busy, whole="last start"),
                "the last event takes time too: the end is its start plus its seconds",
            ),
            (partial(_busy, idle=True), "that is the share of waiting: one minus it"),
        ],
    )


def _batch(flops_per_s, bytes_per_s, bytes_per_weight, *, flop=2.0, weight=True, upside_down=False):
    batch = flops_per_s / bytes_per_s * (bytes_per_weight if weight else 1) / flop
    return 1 / batch if upside_down else batch


@exercise("6.3")
def balancing_batch(answer):
    """Where reading a weight and using it for every text take equally long."""
    names = "flops_per_s bytes_per_s bytes_per_weight"
    cases = cases_of(names, (312e12, 2.039e12, 2), (100e9, 10e9, 4), (65e12, 0.3e12, 0.5))
    expect_function(
        answer,
        _batch,
        cases=cases,
        mistakes=[
            (partial(_batch, flop=1.0), "a weight is multiplied and added: 2 operations for each text"),
            (partial(_batch, weight=False), "a weight has bytes_per_weight bytes: a smaller weight is read sooner"),
            (
                partial(_batch, upside_down=True),
                "upside down: more arithmetic means that more texts fit under one reading",
            ),
            (
                lambda **c: c["flops_per_s"] / c["bytes_per_s"],
                "that is the ridge in operations per byte; now count texts",
            ),
            (
                lambda flops_per_s, bytes_per_s, bytes_per_weight: flops_per_s / bytes_per_s / bytes_per_weight / 2,
                "more bytes a weight take longer to read: multiply by bytes_per_weight",
            ),
        ],
    )


def _attention_bytes(positions, head_dim, element_bytes, *, passes=4, matrices=4):
    rows, scores = matrices * positions * head_dim, positions * positions
    return (rows + passes * scores) * element_bytes, rows * element_bytes


@exercise("6.4")
def attention_bytes(answer):
    """Scores written and read, attention weights written and read; fused, only the four matrices."""
    expect_function(
        answer,
        _attention_bytes,
        cases=cases_of("positions head_dim element_bytes", (10, 4, 2), (4096, 128, 2), (100, 64, 4)),
        mistakes=[
            (
                partial(_attention_bytes, passes=2),
                "the attention weights are written and read too: four passes over n × n",
            ),
            (
                partial(_attention_bytes, passes=1),
                "what is written to memory must be read again: four passes over n × n",
            ),
            (partial(_attention_bytes, matrices=3), "the output is written too: query, key, value and output"),
            (lambda **case: _attention_bytes(**case)[::-1], "the order is (plain, fused)"),
            (lambda **c: _attention_bytes(**{**c, "element_bytes": 1}), "those are numbers: multiply by element_bytes"),
        ],
    )


def _need(memory_bytes, parameters, weight_bits, position_bytes, positions):
    return Need(parameters, weight_bits, position_bytes, positions).largest_batch(memory_bytes)


def _raw(
    memory_bytes,
    parameters,
    weight_bits,
    position_bytes,
    positions,
    *,
    weights=1.0,
    share=True,
    least=0,
    bits=8,
    whole=True,
):
    free = (usable(memory_bytes) if share else memory_bytes) - weights * parameters * weight_bits / bits
    texts = free / (positions * position_bytes)
    return max(math.floor(texts) if whole else texts, least)


@exercise("6.5")
def largest_batch(answer):
    """Texts beside the weights, with the reserve taken off."""
    names = "memory_bytes parameters weight_bits position_bytes positions"
    values = ((24e9, 8e9, 16, 131_072, 8192), (80e9, 8e9, 4, 131_072, 4096), (15e9, 8e9, 16, 131_072, 1000))
    expect_function(
        answer,
        _need,
        cases=cases_of(names, *values),
        mistakes=[
            (partial(_raw, share=False), "8% of the memory are not for you: the context, the allocator, activations"),
            (partial(_raw, weights=0.0), "the weights lie there too: take them off first"),
            (partial(_raw, bits=1), "weight_bits are bits: eight of them are a byte"),
            (partial(_raw, least=-(10**9)), "a negative number of texts: where the weights do not fit, the batch is 0"),
            (partial(_raw, least=1), "not even one text fits there: the batch is 0"),
            (partial(_raw, whole=False), "half a text is none: round down to a whole number"),
        ],
    )


WEIGHT = torch.tensor([[2.0, 0.0], [1.0, -1.0]])
INPUTS = ([1.0, 2.0], [10.0, 20.0], [3.0, 1.0])


def _step(x):
    return (x @ WEIGHT.T).relu() + 1


class _CountingTape:
    """A tape, and how often it was replayed."""

    def __init__(self):
        self.replays = 0

    def record(self, function):
        self.tape, output = Tape.record(function)
        return self, output

    def replay(self):
        self.replays += 1
        self.tape.replay()


def _drive(make):
    """All results of a replayed step, kept until the end as a loop keeps logits; and how often it was replayed."""
    tape = _CountingTape()
    replayed = make(_step, torch.zeros(2), tape.record)
    return torch.stack([replayed(torch.tensor(x)) for x in INPUTS]), tape.replays


def _replayed(step, example, record, *, copy=True, replay=True, own=True, clone=True):
    buffer = example.clone() if own else example
    tape, output = record(lambda: step(buffer))

    def call(x):
        if copy:
            buffer.copy_(x)
        if replay:
            tape.replay()
        return output.clone() if clone else output

    return call


@exercise("6.6")
def replayed_step(answer):
    """Copies in, replays, copies out."""
    wrong = [
        ({"copy": False}, "the new input never reached the recorded memory: buffer.copy_(x), not buffer = x"),
        ({"replay": False}, "nothing ran again: call tape.replay() after the copy"),
        (
            {"clone": False},
            "each replay overwrites the output, and all results became the last one: return output.clone()",
        ),
    ]
    mistakes = [(lambda s=settings: _drive(partial(_replayed, **s)), hint) for settings, hint in wrong]
    given = f"the step relu(W x) + 1, recorded on zeros, then called with {', '.join(map(str, INPUTS))}"
    count = []
    call = answer(_step, torch.zeros(2), lambda function: count.append(1) or Tape.record(function))
    call(torch.ones(2)), call(torch.ones(2))
    expect_true(
        len(count) < 2, "the step was recorded anew at every call", hint="recording is the slow part: do it once"
    )
    expected = torch.stack([_step(torch.tensor(x)) for x in INPUTS]), len(INPUTS)
    mistakes.append(((expected[0], 0), "the step itself ran at every call: replay the tape instead"))
    hint = "record once, outside; inside: copy in, replay, copy out; every call replays the tape once"
    expect_close(_drive(answer), expected, given=f"{given}; and the replays", mistakes=mistakes, hint=hint)
    example = torch.zeros(2)
    answer(_step, example, Tape.record)(torch.ones(2))
    hint = "record on a copy: buffer = example.clone()"
    expect_true(
        not example.any(), "your function changed the caller's example", actual=str(example.tolist()), hint=hint
    )

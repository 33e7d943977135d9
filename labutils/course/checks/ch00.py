"""Checks of chapter 00: rates, bits per byte, ceilings and what they refute, two repairs, and a benchmark to break."""

import math
import statistics
from functools import partial
from itertools import pairwise

import torch

from labutils.course.checks import cases_of, exercise, expect_function, expect_true
from labutils.course.checks.compare import describe

# Clock readings of five runs; the first one is the warm-up.
RUNS = [[3.0, 9.0, 9.5, 10.0, 10.8], [20.0, 20.5, 20.6, 20.8, 20.9], [31.0, 31.25, 31.35, 31.55, 32.15, 32.25]]
RUNS += [[40.0, 40.75, 41.0, 41.1], [52.0, 52.2, 52.5, 53.4, 53.5, 53.8]]


def _rates(runs, *, skip=1, over=statistics.median, gap=statistics.median, first=1, tokens=0, since=1, power=1):
    """Rates of a whole call and after the first token, with one thing at a time gone wrong."""
    whole, after = [], []
    for run in runs[skip:]:
        whole.append((len(run) - 1 + tokens) / (run[-1] - since * run[0]))
        after.append(1 / gap([b - a for a, b in pairwise(run[first:])]))
    return over(whole) ** power, over(after) ** power


@exercise("0.1")
def tokens_per_second(answer):
    """Median rates without the warm-up."""
    expect_function(
        answer,
        _rates,
        cases=cases_of("runs", (RUNS[:4],), (RUNS,)),
        mistakes=[
            (partial(_rates, over=statistics.median_low), "an even number of runs: take the mean of the middle two"),
            (partial(_rates, skip=0), "the first run warms the caches up: leave runs[0] out"),
            (partial(_rates, first=0), "the first gap is the time to first token: gaps lie between two new tokens"),
            (partial(_rates, tokens=-1), "n tokens have n - 1 gaps between them, but the whole call made all n"),
            (partial(_rates, tokens=1), "the first reading is the prompt's: one token fewer than readings"),
            (partial(_rates, over=statistics.mean), "you took the mean of the runs: one disturbed run drags it along"),
            (partial(_rates, gap=statistics.mean), "TPOT is the median gap: a mean lets one late token speak for all"),
            (partial(_rates, since=0), "a reading is no duration: subtract the run's first reading"),
            (partial(_rates, power=-1), "upside down: those are seconds per token"),
            (lambda runs: _rates(runs)[::-1], "the whole call comes first, then the rate after the first token"),
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


def _ceiling(tensors, bandwidth_bytes_per_s, *, experts=True, row=True, tied=1, scale=8, power=1):
    """What bandwidth allows, with one thing at a time gone wrong."""
    read_bytes = 0
    for tensor in tensors:
        share = 1
        if experts and "experts" in tensor:
            share = tensor["used"] / tensor["experts"]
        if row and "rows" in tensor:
            share = tied if tensor.get("tied") else 1 / tensor["rows"]
        read_bytes += share * tensor["parameters"] * tensor["bits"] / scale
    return (bandwidth_bytes_per_s / read_bytes) ** power


@exercise("0.3")
def best_tokens_per_s(answer):
    """What bandwidth allows one stream."""
    table, layers = {"parameters": 2_000_000, "bits": 16, "rows": 4000}, {"parameters": 5_000_000, "bits": 4}
    mixture = {"parameters": 48_000_000, "bits": 4, "experts": 8, "used": 2}
    whole_table = table | {"tied": True}
    expect_function(
        answer,
        _ceiling,
        cases=cases_of(
            "tensors bandwidth_bytes_per_s",
            ([table, layers, {"parameters": 2_000_000, "bits": 16}], 2e10),
            ([whole_table, layers], 5e10),
            ([table, layers, mixture], 8e10),
        ),
        mistakes=[
            (partial(_ceiling, experts=False), "a token is sent to `used` of the experts and reads no others"),
            (partial(_ceiling, row=False), "an embedding that is no head is looked up: a token reads one row"),
            (partial(_ceiling, experts=False, row=False), "a token reads one row of a table and `used` of the experts"),
            (partial(_ceiling, tied=1 / 4000), "a tied table is the head, too, and the head multiplies by all of it"),
            (partial(_ceiling, tied=2), "the row that is looked up is part of what the head reads: count it once"),
            (partial(_ceiling, scale=1), "bandwidth is in bytes: eight bits each"),
            (partial(_ceiling, power=-1), "upside down: those are the seconds for one token"),
        ],
    )


def _parts(replicas, batches):
    return [[r(p) for r, p in zip(replicas, b.tensor_split(len(replicas)), strict=True)] for b in batches]


def _shared(predict):
    """Batches to outputs, whether these carry gradients, and whether a replica of three read more than its part."""

    def run(batches):
        torch.manual_seed(0)
        model, read = torch.nn.Linear(3, 2), [0, 0, 0]

        def replica(i, batch):
            read[i] += len(batch)
            return model(batch)

        outputs = predict([partial(replica, i) for i in range(3)], batches)
        carries = getattr(outputs, "requires_grad", False)
        return outputs, carries, max(read) > sum(-(-len(batch) // 3) for batch in batches)

    return run


def _free(predict):
    return _shared(torch.inference_mode()(predict))


@exercise("0.4")
def predict_all(answer):
    """Every batch's output, in order, without gradients, each replica with its part."""
    make, cat = torch.Generator().manual_seed(0), torch.cat
    mistakes = [
        (lambda rs, bs: cat(_parts(rs, bs)[-1]), "only the last batch came back: collect every output"),
        (lambda rs, bs: cat(sum(_parts(rs, bs), [])).mean(dim=1), "dim 1 holds features, not GPUs: leave the mean out"),
        (lambda rs, bs: cat([r(b) for b in bs for r in rs]), "each replica read whole batches: cut a batch into parts"),
        (lambda rs, bs: cat([rs[0](b) for b in bs]), "a replica that reads everything saves no time: give each a part"),
        (
            lambda rs, bs: cat(sum(_parts(rs, bs), [])),
            "inference keeps no graph: torch.inference_mode() around the loop",
        ),
        (lambda rs, bs: sum(_parts(rs, bs), []), "join the list's tensors into one: use torch.cat"),
        (
            lambda rs, bs: cat(sum(map(list, zip(*_parts(rs, bs), strict=True)), [])),
            "the outputs of a batch stay together",
        ),
    ]
    expect_function(
        _shared(answer),
        _free(lambda rs, bs: cat(sum(_parts(rs, bs), []))),
        cases=[{"batches": [torch.randn(n, 3, generator=make) for n in rows]} for rows in ((4, 6, 5, 1), (3, 2))],
        mistakes=[(mode(wrong), words) for wrong, words in mistakes for mode in (_free, _shared)],
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
            (partial(_refuted, shared=False), "all streams share one read of the weights: multiply by streams"),
            (partial(_refuted, scale=1), "bits are eight to the byte: divide them by 8"),
        ],
    )


def _cycles(parameters, tokens, bytes_per_parameter, gpu, *, each=2, of=max, passes=lambda tokens: 1):
    """Cycles of one forward pass, with one thing at a time gone wrong."""
    arithmetic_s = each * parameters * tokens / gpu["flops_per_s"]
    reading_s = parameters * bytes_per_parameter * passes(tokens) / gpu["bytes_per_s"]
    return of((arithmetic_s, reading_s)) * gpu["clock_hz"]


@exercise("0.6")
def clock_cycles(answer):
    """2 · parameters · tokens operations at so many a cycle, or the weights at so many bytes a cycle."""
    gpu = {"flops_per_s": 312e12, "bytes_per_s": 2.039e12, "clock_hz": 1.41e9}
    slow = {"flops_per_s": 5e12, "bytes_per_s": 3e11, "clock_hz": 1e9}
    names = "parameters tokens bytes_per_parameter gpu"
    rows = (85e6, 1, 2, gpu), (85e6, 128, 2, gpu), (85e6, 1024, 2, gpu), (3e8, 40, 4, slow)
    expect_function(
        answer,
        _cycles,
        cases=cases_of(names, *rows),
        mistakes=[
            (partial(_cycles, each=1), "a factor of 2 is missing: each parameter multiplies and adds"),
            (partial(_cycles, of=lambda both: both[0]), "the weights come out of memory: how long does that take?"),
            (partial(_cycles, of=lambda both: both[1]), "that is the reading alone: many tokens wait for arithmetic"),
            (partial(_cycles, of=sum), "be kind: reading and arithmetic can go on at the same time"),
            (partial(_cycles, of=min), "the pass ends when the slower of the two has ended"),
            (partial(_cycles, passes=lambda tokens: tokens), "one pass reads the weights once for all its tokens"),
            (lambda **case: _cycles(**case) / case["gpu"]["clock_hz"], "those are seconds: multiply by the clock"),
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

# %% [markdown]
# # 11 · Serving many
#
# **Goal:** build and understand an engine that answers many clients at once, say what each of them feels, and put it behind an
# address that real clients use.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 03; 09 and 10 help |
# | Time | 4 hours for you; all cells run in under 4 minutes on one core (measured: 138 and 147 s, the build included) |
# | Memory, download | 1.9 GB at the peak; nothing is downloaded but FastAPI and uvicorn, where they are missing |
# | Hardware | any computer; a C compiler for the int8 kernels |
# | Exercises | 14, each checked in the cell below it; short of time, do those marked `core` |

# %%
from labutils.course.extras import install_extra

with_server = install_extra("serve")  # FastAPI and uvicorn, for sections 10 and 11; all else runs without them

# %%
import inspect
import random
import statistics
import time

import matplotlib.pyplot as plt
import torch
from transformers.utils import logging as transformers_logging

from labutils.course.predictions import calibration, predict
from labutils.lab.models.drafting_text import text_prompts
from labutils.lab.models.load import load_model
from labutils.lab.models.served import paged_llama, served_model
from labutils.lab.models.tokenizer import chat_ids
from labutils.lab.plots.style import plain_log_scale, series_style
from labutils.measurement.timing import measure_interleaved, paired_ratio, quantile
from labutils.quantization.affine import Scheme
from labutils.quantization.packed import pack_model_
from labutils.serving import queueing
from labutils.serving.engine import Engine, run, run_at, run_static
from labutils.serving.scheduler import Limits, Request

transformers_logging.disable_progress_bar()

# %% [markdown]
# ## 1 · Queues before engines
#
# One client alone knows how long an answer takes. With many clients most of the time may be spent waiting for others, and that part
# follows laws which were known long before language models. A server that is busy with a request for $S$ seconds, while requests
# arrive at rate $\lambda$, is busy for the share
#
# $$\rho = \lambda\,E[S]$$
#
# of the time. If many independent clients send now and then, arrivals are *Poisson*: the gaps between them are exponential. For
# Poisson arrivals and any service time, the mean wait is (Pollaczek and Khinchine)
#
# $$W = \frac{\lambda\,E[S^2]}{2\,(1 - \rho)}$$
#
# **Tiny numbers:** services of exactly 1 s, a request every 2 s on average: ρ = 0.5 and W = 0.5 · 1 ÷ (2 · 0.5) = 0.5 s. Half of
# the time nobody is served, and still a request waits.

# %% [markdown]
# ## Exercise 11.1: queue_waits (core)
#
# Write `queue_waits(arrivals, service_s)`: one server, first come, first served. Both are lists of seconds, in the order of arrival. Return a
# list with the wait of each request before its service starts. 5 lines, 8 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>A service starts at <code>max(arrival, free_s)</code>, where <code>free_s</code> is the end of the previous one.</details>
# <details><summary>Hint 2</summary>After each request the server is free again at start + seconds.</details>


# %%
# EXERCISE queue_waits
def queue_waits(arrivals, service_s):
    """Seconds between arrival and start of service."""
    ### BEGIN SOLUTION
    waits, free_s = [], 0.0
    for arrival, seconds in zip(arrivals, service_s, strict=True):
        start = max(arrival, free_s)
        waits.append(start - arrival)
        free_s = start + seconds
    return waits
    ### END SOLUTION


# %%
# CHECK queue_waits
from labutils.course.checks import ch11

ch11.queue_waits(queue_waits)

# %% [markdown]
# ### The 90% trap
#
# Managers like busy machines. **Predict:** services take 1 s on average, with an exponential spread. How long does a request wait if the machine is
# busy for 50% of the time, and how long at 90%?

# %%
my_wait = predict("mean wait at 90% busy, where a service takes 1 s on average", None, unit="s")

# %%
COUNT = 20_000
BUSY = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def simulated_wait(arrivals, service_s):
    """The mean wait before service."""
    served = queueing.serve_in_order(arrivals, service_s)
    return statistics.fmean(start - arrival for arrival, (start, _) in zip(arrivals, served, strict=True))


rng = random.Random(0)
services = {"exponential": [rng.expovariate(1.0) for _ in range(COUNT)], "constant": [1.0] * COUNT}
waits = {
    name: [simulated_wait(queueing.poisson_arrivals(busy, COUNT, seed=1), some) for busy in BUSY]
    for name, some in services.items()
}
formula = {"exponential": queueing.mm1_wait_s, "constant": queueing.md1_wait_s}
for index, busy in enumerate(BUSY):
    line = (f"{name} {waits[name][index]:5.2f} s (formula {formula[name](busy, 1.0):5.2f})" for name in services)
    print(f"busy {busy:.0%}:", ", ".join(line))
my_wait.compare(waits["exponential"][BUSY.index(0.9)])

# %%
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for index, name in enumerate(services):
    style = series_style(index)
    axes.plot(
        [b / 100 for b in range(20, 97)], [formula[name](b / 100, 1.0) for b in range(20, 97)], color=style["color"]
    )
    axes.plot(BUSY, waits[name], linestyle="", label=f"{name} services, simulated", **style)
axes.set(xlabel="share of the time that the server is busy, ρ", ylabel="mean wait (services)")
axes.set_title("Waiting explodes near ρ = 1, and spread doubles it")
axes.legend()
plt.show()

# %% [markdown]
# *Mean wait of 20,000 simulated requests (markers) and Pollaczek and Khinchine's formula (lines). Services take 1 s on average.*
#
# The factor $1/(1-\rho)$ is the trap: from 90% to 95% the machine does 6% more work, and the formula's wait more than doubles. Near ρ = 1 even 20,000 simulated requests
# scatter around the formula, because one long busy period moves the mean. Spread costs too: constant services of the same mean wait half as
# long as exponential ones.

# %% [markdown]
# ## Exercise 11.2: highest_rate
#
# A promise is written the other way round: at most so much waiting, so how many requests a second? Write
# `highest_rate(mean_s, second_moment, wait_s)`: the λ at which the formula above gives W = `wait_s`, for E[S] = `mean_s` and E[S²] =
# `second_moment`. 1 line, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Multiply out: 2 W (1 − λ E[S]) = λ E[S²].</details>
# <details><summary>Hint 2</summary>Collect what has λ on one side, and divide by what stands beside it. For a W without end the result must come near 1 ÷ E[S].</details>


# %%
# EXERCISE highest_rate
def highest_rate(mean_s, second_moment, wait_s):
    """Requests/s at which the mean wait is `wait_s`."""
    ### BEGIN SOLUTION
    return 2 * wait_s / (second_moment + 2 * wait_s * mean_s)
    ### END SOLUTION


# %%
# CHECK highest_rate
ch11.highest_rate(highest_rate)

# %% [markdown]
# ### Bursts, convoys and Little's law
#
# Three more facts fit into one cell.
#
# * **Bursts.** A web page that sends eight requests at once has the same mean rate as eight strangers, and longer waits.
# * **Convoy.** One service of 20 s among services of 0.8 s: everybody who arrives meanwhile waits behind it. Only $E[S^2]$ notices.
# * **Little's law.** On average $L = \lambda W$ requests are in the system, for any arrivals and any order of service. If two of the three are
#   measured, the third is a check of the measurement.
#
# **Predict:** all three rows below are busy for 70% of the time. Which one waits longest?

# %%
RATE = 0.7
few_long = [20.0 if rng.random() < 0.01 else 0.8 for _ in range(COUNT)]
cases = {
    "Poisson, constant": (queueing.poisson_arrivals(RATE, COUNT, seed=2), services["constant"]),
    "bursts of 8, constant": (queueing.bursty_arrivals(RATE, COUNT, burst=8, seed=2), services["constant"]),
    "Poisson, 1% take 20 s": (queueing.poisson_arrivals(RATE, COUNT, seed=2), few_long),
}
for name, (arrivals, some) in cases.items():
    ends = [end for _, end in queueing.serve_in_order(arrivals, some)]
    in_system = queueing.mean_in_system(arrivals, ends)
    times = [end - arrival for arrival, end in zip(arrivals, ends, strict=True)]
    rate = COUNT / (ends[-1] - arrivals[0])
    print(
        f"{name:<22} mean service {statistics.fmean(some):.2f} s, mean wait {simulated_wait(arrivals, some):5.2f} s; "
        f"L = {in_system:.2f}, λ W = {rate * statistics.fmean(times):.2f}"
    )

# %% [markdown]
# The two columns at the end are counted in different ways: L counts heads at every moment, and λ W uses only the times of each request. A
# program whose own numbers break Little's law has lost requests or mixed up clocks.
#
# ## 2 · A real server in the queue
#
# LabLM in int8 now takes the server's place, one request at a time. The engine is the course's own, and `max_running=1` makes it a plain
# queue. Each answer has 10 tokens, so services are nearly constant.

# %%
model, tokenizer = load_model("lablm")
pack_model_(model, Scheme(8))
paged = paged_llama(model, positions=16_384)
prompts = {kind: [p[0].tolist() for p in text_prompts(kind, tokenizer, 32)] for kind in ("chat", "qa", "code")}
print(f"cpu, int8, threads: {torch.get_num_threads()}; {paged.blocks} blocks of {paged.block_size} positions")
print({kind: f"prompts of {min(map(len, some))} to {max(map(len, some))} tokens" for kind, some in prompts.items()})

# %%
print(inspect.getsource(run_at).split('"""')[2])

# %% [markdown]
# That is the body of `run_at`: arrivals are fixed in advance. The comment behind `submit` matters. A load generator that waits for the server before it sends the next request measures a polite crowd: the
# slow moments, which hurt most, are the ones it does not see ("coordinated omission").
#
# **Predict:** 120 requests at 90% busy: will their mean wait lie above or below the formula's?


# %%
def chats(count, new_tokens):
    return [Request(list(prompts["chat"][i % 32]), new_tokens) for i in range(count)]


def alone(count, new_tokens=10):
    """What a client feels whom nobody disturbs: several times, after a warm-up."""
    engine = Engine(paged, Limits(max_running=1))
    return [run(engine, [request])[0].times for request in chats(3 + count, new_tokens)][3:]


def one_at_a_time(busy, count=120):
    """Arrivals for a server that is busy for this share, and each request's wait and service, measured."""
    service_s = statistics.fmean(times.latency_s for times in alone(20))
    arrivals = queueing.poisson_arrivals(busy / service_s, count, seed=3)
    done = run_at(Engine(paged, Limits(max_running=1)), chats(count, 10), arrivals)
    ends = [request.token_s[-1] for request in done]
    starts = [max(request.arrival_s, end) for request, end in zip(done, [0.0, *ends], strict=False)]
    waits = [start - request.arrival_s for start, request in zip(starts, done, strict=True)]
    return arrivals, waits, [end - start for start, end in zip(starts, ends, strict=True)]


# %%
for aimed in (0.5, 0.7, 0.9):
    arrivals, measured, took = one_at_a_time(aimed)
    rate, mean_s, squares = len(arrivals) / arrivals[-1], statistics.fmean(took), statistics.fmean(s * s for s in took)
    busy = rate * mean_s
    by_formula = f"{1e3 * queueing.mg1_wait_s(rate, mean_s, squares):.1f} ms" if busy < 1 else "endless"
    print(
        f"aimed at {aimed:.0%}, busy {busy:.0%}, services {1e3 * mean_s:.1f} ms: waits {1e3 * statistics.fmean(measured):.1f} ms "
        f"measured, {1e3 * simulated_wait(arrivals, [mean_s] * len(arrivals)):.1f} ms simulated, {by_formula} by the formula"
    )

# %% [markdown]
# <details><summary>Explain</summary>
#
# The simulation knows these 120 arrivals and the mean service; the formula describes the average over endless arrivals. Compare the measurement with the
# simulation first: what is left between those two is the spread of the services. The share aimed at rests on a service time that was measured before the
# run, and on endless arrivals; the share behind it is what came of it. A short stretch of arrivals near ρ = 1 may wait far less than the
# formula says, or far more, and so may an hour of your own service.
# </details>

# %% [markdown]
# ## 3 · What a client feels
#
# A client that reads along feels two things: how long the first word takes, and how fast the rest flows.
#
# | | | |
# | --- | --- | --- |
# | TTFT | time to first token | queue and prefill |
# | ITL | inter-token latency | each gap between two tokens |
# | TPOT | time per output token | (last − first) ÷ (tokens − 1) |
#
# **Tiny numbers:** a request arrives at 1.0 s, and its tokens at 1.5, 1.6 and 1.8 s. TTFT is 0.5 s, the gaps are 0.1 and 0.2 s, TPOT is 0.15 s.

# %% [markdown]
# ## Exercise 11.3: client_times (core, a bug to hunt)
#
# This code counts the wait for the first token among the gaps, as a benchmark of a public engine did (vllm#7242). A long
# queue then looks like slow decoding.
#
# ```python
# def client_times(arrival_s, token_s):
#     gaps = [b - a for a, b in zip([arrival_s, *token_s], token_s)]
#     return gaps[0], gaps, sum(gaps) / len(gaps)
# ```
#
# Write `client_times(arrival_s, token_s)` without the bug. Return `(ttft, gaps, tpot)`; a single token has no gap, and its TPOT is None. 3 lines, 6
# minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Gaps lie between tokens only: <code>zip(token_s, token_s[1:])</code>.</details>
# <details><summary>Hint 2</summary>TPOT is the mean of the gaps, and None where there are none.</details>


# %%
# EXERCISE client_times
def client_times(arrival_s, token_s):
    """(TTFT, inter-token latencies, TPOT), in seconds."""
    ### BEGIN SOLUTION
    gaps = [b - a for a, b in zip(token_s, token_s[1:], strict=False)]
    return token_s[0] - arrival_s, gaps, sum(gaps) / len(gaps) if gaps else None
    ### END SOLUTION


# %%
# CHECK client_times
ch11.client_times(client_times)

# %% [markdown]
# A service promises something like "the first word within 0.5 s, then at least 20 words a second": a *service level objective*, SLO. **Goodput**
# counts the requests that meet it (DistServe, arXiv:2401.09670). Throughput can rise while goodput falls: a machine that is late for
# everybody is very busy.
#
# ## Exercise 11.4: good_share
#
# Write `good_share(times, ttft_s, tpot_s)`: `times` has a pair (TTFT, TPOT) for each answered request, where TPOT may be None, and None for each
# refused one. Return the share of all requests that meet both objectives, `<=` each. 3 lines, 8 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Who was refused is not good, but counts: divide by <code>len(times)</code>.</details>
# <details><summary>Hint 2</summary>A TPOT of None, from an answer of one token, misses nothing: <code>(tpot or 0.0) &lt;= tpot_s</code>.</details>


# %%
# EXERCISE good_share
def good_share(times, ttft_s, tpot_s):
    """The share of requests within both objectives."""
    ### BEGIN SOLUTION
    answered = [pair for pair in times if pair is not None]
    good = sum(ttft <= ttft_s and (tpot or 0.0) <= tpot_s for ttft, tpot in answered)
    return good / len(times)
    ### END SOLUTION


# %%
# CHECK good_share
ch11.good_share(good_share)

# %% [markdown]
# ## 4 · A step for many
#
# Decoding one request reads every weight for one token. Chapter 10 measured that with int8 weights a second row costs less than the first, and now the rows come
# from different clients. The question is who sits in which row, and when.
#
# * **Static batching:** take the next b requests, and start the following b when the last of them has ended.
# * **Continuous batching** (iteration-level scheduling; Orca, OSDI 2022): decide anew before *every step*. Who has ended leaves, who waits enters.
#
# **Tiny numbers:** two slots, answers of 2, 8, 2 and 8 tokens. Static batches take 8 + 8 = 16 steps. Continuous: slot 1 makes 2, 2, then 8 tokens, slot 2
# makes 8, so all is done after 12.

# %% [markdown]
# ## Exercise 11.5: steps_needed (core)
#
# Write `steps_needed(lengths, slots)`: answers of `lengths` tokens, in order, a token a step and slot. Return `(static, continuous)`: the number of
# decode steps both ways. A slot takes the next answer in the step after its last one ended. 4 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>A static batch takes as many steps as its longest answer: slices of <code>slots</code>.</details>
# <details><summary>Hint 2</summary>Continuous: keep the step at which each slot is free, <code>[0] * slots</code>; each answer goes to the smallest.</details>


# %%
# EXERCISE steps_needed
def steps_needed(lengths, slots):
    """Steps with static batches, and with continuous batching."""
    ### BEGIN SOLUTION
    static = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    free = [0] * slots
    for length in lengths:
        free[free.index(min(free))] += length
    return static, max(free)
    ### END SOLUTION


# %%
# CHECK steps_needed
ch11.steps_needed(steps_needed)

# %% [markdown]
# Now with LabLM: twelve questions, four slots, and answers of 8 or 64 tokens, as a service has short and long ones.

# %%
from labutils.lab.plots.serving import StepTimes, draw_timeline


class Watched:
    """A model for an engine that notes when each step began and ended, and what it computed."""

    def __init__(self, inner):
        self.inner, self.blocks, self.block_size = inner, inner.blocks, inner.block_size
        self.times = []

    def __call__(self, step):
        begin = time.monotonic()
        logits = self.inner(step)
        tokens = {chunk.request.place[1]: chunk.end - chunk.start for chunk in step.chunks}
        self.times.append(StepTimes(begin, time.monotonic(), tokens))
        return logits

    def from_zero(self):
        first = self.times[0].begin_s
        return [StepTimes(t.begin_s - first, t.end_s - first, t.tokens) for t in self.times]


# %%
LENGTHS = [8, 64, 8, 8, 8, 64, 8, 8, 64, 8, 8, 8]


def mixed(lengths=LENGTHS):
    return [Request(list(prompts["chat"][i % 32]), length) for i, length in enumerate(lengths)]


ways = {
    "static batches": lambda engine: run_static(engine, mixed(), batch=4),
    "continuous": lambda engine: run(engine, mixed()),
}
figure, panels = plt.subplots(2, figsize=(10, 4.6), layout="constrained", sharex=True)
for axes, (name, way) in zip(panels, ways.items(), strict=True):
    watched = Watched(paged)
    way(Engine(watched, Limits(max_running=4)))
    draw_timeline(axes, watched.from_zero())
    axes.set_title(f"{name}: {len(watched.times)} steps", fontsize=11)

plt.show()

# %% [markdown]
# *One run each of twelve requests on four slots; a bar is a request's part of one step, labelled with the request's number, and hatched where a prompt is read. White is an
# idle slot.* Your `steps_needed(LENGTHS, 4)` counts the same steps without a model.
#
# **Predict:** now 48 requests on eight slots, and one of each eight has a long answer. How many times as fast is continuous batching by the clock?

# %%
my_gain = predict("48 requests on 8 slots: continuous batching over static batches", None, unit="times")

# %%
LONGER = [64 if i % 8 == 1 else 8 for i in range(48)]
contest = {
    "static batches": lambda: run_static(Engine(paged, Limits(max_running=8)), mixed(LONGER), batch=8),
    "continuous": lambda: run(Engine(paged, Limits(max_running=8)), mixed(LONGER)),
}
timings = measure_interleaved(contest, repeats=5, warmup=1)
for timing in timings.values():
    print(timing)
gain = paired_ratio(timings["static batches"].samples_s, timings["continuous"].samples_s)
print(f"continuous batching is {gain} as fast (95% interval over 5 rounds)")
my_gain.compare(gain.value)

# %% [markdown]
# The steps that continuous batching saves are no average steps: those that a static batch drags to its end have a single row.
# How much do rows cost here?
#
# **Predict:** tokens per second for 16 requests, at 1, 2, 4, 8 and 16 at once. Where does the curve bend?

# %%
AT_ONCE = (1, 2, 4, 8, 16)


def sixteen(at_once):
    return lambda: run(Engine(paged, Limits(max_running=at_once)), chats(16, 16))


by_count = measure_interleaved({str(n): sixteen(n) for n in AT_ONCE}, repeats=5, warmup=1)
rates = [16 * 16 / by_count[str(n)].median_s for n in AT_ONCE]
spans = [[16 * 16 / s for s in by_count[str(n)].interval_s[::-1]] for n in AT_ONCE]
for n, rate, (low, high) in zip(AT_ONCE, rates, spans, strict=True):
    print(f"{n:>2} at once: {rate:5.0f} tokens/s [{low:.0f}, {high:.0f}], prompts included; {rate / n:.0f} for each")

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
errors = [
    [r - low for r, (low, _) in zip(rates, spans, strict=True)],
    [high - r for r, (_, high) in zip(rates, spans, strict=True)],
]
axes.errorbar(AT_ONCE, rates, yerr=errors, capsize=3, label="all together", **series_style(0))
axes.plot(AT_ONCE, [r / n for r, n in zip(rates, AT_ONCE, strict=True)], label="for each request", **series_style(1))
axes.set(xscale="log", xlabel="requests at once", ylabel="tokens/s")
plain_log_scale(axes, "y")
axes.set_xticks(AT_ONCE, AT_ONCE)
axes.minorticks_off()
gain = paired_ratio(by_count["1"].samples_s, by_count["16"].samples_s)
axes.set_title(f"16 at once: {gain} the tokens/s of one at a time")
axes.legend()
plt.show()

# %% [markdown]
# *LabLM int8, 16 requests of 16 new tokens, medians of 5 interleaved rounds with 95% intervals; both axes are logarithmic.*
#
# <details><summary>Explain</summary>
#
# On a GPU a step waits for weights from memory, so dozens of rows come nearly free. LabLM's int8 weights fit into the caches of many CPUs, so there is little waiting to share.
# What is saved here is what each step costs apart from its rows: Python, calls, and small matrices read by a vector. Attention and sampling
# are paid for each request. So the curve bends early, and each client's own stream gets slower.
# </details>
#
# So try a model whose float32 weights no cache of a usual computer holds; they are random, which changes no time. A step with one row then waits for memory, and one would expect further rows to come nearly free.
#
# **Predict:** how many times as fast is continuous batching now?

# %%
my_gain = predict("24 requests on 8 slots, 0.17B float32: continuous batching over static batches", None, unit="times")

# %%
from labutils.course.bench.subject import speed_subject

wide = speed_subject(vocab_size=4096)
print(f"{wide.name}, float32: a step reads {wide.weight_bytes / 1e6:.0f} MB of weights")
wide_paged, SHORT_AND_LONG = paged_llama(wide.model, positions=1024), [32 if i % 8 == 1 else 4 for i in range(24)]


def asked():
    return [Request(wide.token_ids[0, :8].tolist(), length, salt=str(i)) for i, length in enumerate(SHORT_AND_LONG)]


engines = {}


def contestant(name):
    """Serves all requests with an engine of its own, which is kept: it counts its steps."""
    engine = engines[name] = Engine(wide_paged, Limits(max_running=8))
    return run(engine, asked()) if name == "continuous" else run_static(engine, asked(), batch=8)


names = ("static batches", "continuous")
timings = measure_interleaved({name: lambda name=name: contestant(name) for name in names}, repeats=5, warmup=1)
steps = engines["static batches"].steps / engines["continuous"].steps
gain = paired_ratio(timings["static batches"].samples_s, timings["continuous"].samples_s)
print(f"{steps:.2f} times as many steps; continuous batching is {gain} as fast (95% interval over 5 rounds)")
my_gain.compare(gain.value)
for name in names:
    print(f"{name:<15}{1e3 * timings[name].median_s / engines[name].steps:6.1f} ms a step")
del wide, wide_paged, engines

# %% [markdown]
# Each engine has its own mean step, for its steps have more rows or fewer. Where a step of several rows takes longer by as much as steps were saved, nothing is won. What do more rows cost? Ask the matrix alone, in two libraries and in our own kernels, which have computed the steps above:

# %%
import numpy as np

from labutils.quantization.kernels import find_kernels, float_weight

draws, library = np.random.default_rng(0), find_kernels()[0]
matrices = [
    draws.standard_normal((5632, 1024), dtype=np.float32) for _ in range(10)
]  # 231 MB, read one after the other
tensors = [torch.from_numpy(matrix) for matrix in matrices]
columns = {}


def by_each(x):
    """All products of some rows: by each library, and by our kernels where they can be built."""
    rows_of_torch, made = torch.from_numpy(x), np.empty((len(x), 5632), np.float32)
    weights, threads = [float_weight(matrix) for matrix in matrices], torch.get_num_threads()

    def ours():
        for weight in weights:
            library.packed_linear(weight, x.ctypes.data, made.ctypes.data, len(x), threads)

    return {
        "NumPy": lambda: [x @ matrix.T for matrix in matrices],
        "torch": lambda: [torch.nn.functional.linear(rows_of_torch, tensor) for tensor in tensors],
    } | ({"ours": ours} if library else {})


# %%
for rows in (1, 2, 8, 16):
    products = by_each(draws.standard_normal((rows, 1024), dtype=np.float32))
    columns[rows] = {n: t.median_s for n, t in measure_interleaved(products, repeats=5, warmup=1).items()}
    print(f"rows {rows:>2}: " + ", ".join(f"{name} {1e3 * seconds:5.1f} ms" for name, seconds in columns[rows].items()))
print(f"8 rows ÷ 1 row: {', '.join(f'{n} {columns[8][n] / columns[1][n]:.1f}' for n in products)}")
del matrices, tensors

# %% [markdown]
# <details><summary>Explain</summary>
#
# Reading the weights is only the least that a product costs. Look at what the *second* row costs each of the three. A library may stream the matrix for one row and take its general product for two, which first copies the matrix, piece by piece, into another order; that pays with hundreds of rows and not with two. Our
# kernels read the matrix as it lies and let each weight that they have loaded meet several rows (chapter 03). So "rows come free" is a property of kernels, not of memory alone, and serving engines bring kernels of their own. Rows stop being free where
# their arithmetic takes longer than the reading.
# </details>
#
# ## 5 · Long prompts and short steps
#
# The more tokens a step has, the longer it takes. If somebody's prompt of 900 tokens is read in one step, everybody who decodes waits for that step. **Chunked
# prefill** (Sarathi-Serve, arXiv:2403.02310) gives each step a *token budget*: decoding requests go first, one token each, and what is left of the
# budget reads prompts in pieces.

# %% [markdown]
# ## Exercise 11.6: plan_step (core)
#
# Write `plan_step(left, budget)`. `left` has, for each running request in order of arrival, the tokens that are known and not yet computed: 1 for a
# request that decodes, more for one that still reads. Return how many tokens of each the next step computes. First 1 for each that decodes;
# then prompts, the oldest first, as far as the budget goes. 6 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Two passes over the list: the first for <code>left[i] == 1</code>, the second for the others.</details>
# <details><summary>Hint 2</summary>In the second pass: <code>min(left[i], budget)</code>, and subtract it from the budget.</details>


# %%
# EXERCISE plan_step
def plan_step(left, budget):
    """Tokens of each request in the next step."""
    ### BEGIN SOLUTION
    sizes = [int(tokens == 1) for tokens in left]
    budget -= sum(sizes)
    for i, tokens in enumerate(left):
        if tokens > 1:
            sizes[i] = min(tokens, budget)
            budget -= sizes[i]
    return sizes
    ### END SOLUTION


# %%
# CHECK plan_step
from labutils.course.checks import ch11_steps

ch11_steps.plan_step(plan_step)

# %% [markdown]
# Four clients read along while two documents of 900 tokens arrive.
#
# **Predict:** with the whole prompt in one step, how many times as long as the median gap is the gap at p99? And what does a small budget cost the
# client who sent the document?

# %%
my_tail = predict("a prompt of 900 tokens in one step: the gap at p99 over the median gap", None, unit="times")

# %%
BUDGETS = (1024, 256, 64, 16)
document = [token for some in prompts["code"][:4] for token in some][:900]


def beside_documents(budget):
    """Gaps of four decoding clients, and the documents' times to first token."""
    engine = Engine(paged, Limits(token_budget=budget, max_running=8, max_positions=1024))
    readers = [engine.submit(request) for request in chats(4, 100)]
    documents = []
    while engine.busy:
        if len(readers[0].new_ids) in (20, 50) and len(documents) < (1 if len(readers[0].new_ids) == 20 else 2):
            documents.append(engine.submit(Request(list(document), 1, salt=str(len(documents)))))
        engine.step()
    return [gap for r in readers for gap in r.times.itl_s], [d.times.ttft_s for d in documents]


# %%
beside_documents(64)  # warm-up
found = {budget: beside_documents(budget) for budget in BUDGETS}
for budget, (gaps, ttft) in found.items():
    p50, p99 = quantile(gaps, 0.5), quantile(gaps, 0.99)
    print(
        f"budget {budget:>4}: gaps p50 {1e3 * p50:5.1f} ms, p99 {1e3 * p99:6.1f} ms ({p99 / p50:4.1f} times), "
        f"longest {1e3 * max(gaps):6.1f} ms; first token of a document {1e3 * statistics.median(ttft):4.0f} ms"
    )
my_tail.compare(quantile(found[1024][0], 0.99) / quantile(found[1024][0], 0.5))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for index, budget in enumerate((1024, 64)):
    ordered = [1e3 * gap for gap in sorted(found[budget][0])]
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    left.plot(ordered, shares, label=f"budget {budget}", color=series_style(index)["color"], linestyle="-:"[index])
left.set(xscale="log", xlabel="gap between two tokens (ms)", ylabel="share of gaps", title="Most gaps, and the tail")
longest = [1e3 * max(found[b][0]) for b in BUDGETS]
right.plot(BUDGETS, longest, label="longest gap of a reader", **series_style(0))
first = [1e3 * statistics.median(found[b][1]) for b in BUDGETS]
right.plot(BUDGETS, first, label="first token of a document", **series_style(1))
right.set(xscale="log", yscale="log", xlabel="token budget", ylabel="ms", title="Who waits, by budget")
right.set_xticks(BUDGETS, BUDGETS)
for axes in (left, right):
    axes.legend()
plt.show()

# %% [markdown]
# *Left: distribution of the four readers' gaps. Right: the longest gap and the document's time to first token against the token budget. One run each,
# LabLM int8, two documents of 900 tokens.*
#
# <details><summary>Explain</summary>
#
# With one large step only a few gaps are long, two for each reader, so an average hides them: look at p99 and at the longest. A budget bounds the time of a step, and with it
# every gap. It has a price: every piece of a document pays the fixed cost of a step and attends to all that was read before. The smaller the budget, the
# shorter the longest gap, and below some size the document waits longer.
# </details>
#
# ### Who leaves, leaves at once
#
# Between two steps the scheduler clears who has ended. It sounds like nothing, but published pseudocode forgot it
# (from-tin-to-tokens#1).

# %% [markdown]
# ## Exercise 11.7: clear_ended (a bug to hunt)
#
# Two requests that end in the same step are one too many for this code:
#
# ```python
# def clear_ended(running, ended, references):
#     for request in running:
#         name, table = request
#         if name in ended:
#             running.remove(request)
#             for block in table:
#                 references[block] -= 1
#     return [name for name, _ in running], references
# ```
#
# `running` is a list of pairs (name, blocks), `ended` the names that have ended, and `references[block]` says how many tables hold a block. Write
# it without the bug, and leave the inputs as they are. Return the names that still run, in order, and the new references. 6 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>What does a <code>for</code> loop over a list do when the list becomes shorter under it?</details>
# <details><summary>Hint 2</summary>Copy <code>references</code> with <code>list(…)</code>, lower the counts, and build a new list of those who stay.</details>


# %%
# EXERCISE clear_ended
def clear_ended(running, ended, references):
    """Who still runs, and how many tables hold each block."""
    ### BEGIN SOLUTION
    references = list(references)
    for name, table in running:
        if name in ended:
            for block in table:
                references[block] -= 1
    return [name for name, _ in running if name not in ended], references
    ### END SOLUTION


# %%
# CHECK clear_ended
ch11_steps.clear_ended(clear_ended)

# %% [markdown]
# ## 6 · Memory in blocks
#
# A request's keys and values grow token by token, and nobody knows how far. Reserving the longest possible length wastes most of the memory.
# **Paged memory** (vLLM, arXiv:2309.06180) cuts it into blocks of a few positions, and a *block table* lists a request's blocks in order. A
# block may then stand in several tables: two requests with the same beginning share its keys and values.
#
# To find a beginning again, each full block gets a name. The same tokens mean different keys behind another text, so a name stands for *all* tokens up
# to the block's end:
#
# $$\text{name}_i = \text{hash}(\text{name}_{i-1},\ \text{tokens of block } i), \qquad \text{name}_{-1} = \text{salt}$$
#
# Clients with different salts never share. That protects more than memory: a fast first token tells a client that somebody has asked the same
# before.

# %% [markdown]
# ## Exercise 11.8: block_names
#
# Write `block_names(token_ids, block_size, salt, digest)`: the names of all *full* blocks, as a list. `digest(parent, tokens)` makes a name of a
# parent's name and a list of tokens; the first block's parent is the salt. 5 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Starts are <code>range(0, len(token_ids) - block_size + 1, block_size)</code>.</details>
# <details><summary>Hint 2</summary>Carry the parent along: <code>parent = digest(parent, token_ids[start : start + block_size])</code>.</details>


# %%
# EXERCISE block_names
def block_names(token_ids, block_size, salt, digest):
    """A chained name for each full block."""
    ### BEGIN SOLUTION
    names, parent = [], salt
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = digest(parent, token_ids[start : start + block_size])
        names.append(parent)
    return names
    ### END SOLUTION


# %%
# CHECK block_names
from labutils.course.checks import ch11_blocks

ch11_blocks.block_names(block_names)

# %% [markdown]
# ## Exercise 11.9: cached_tokens (core, a bug to hunt)
#
# A prompt arrives, and some of its blocks are known. In nano-vllm#144 a prompt of exactly so many blocks, all of them known, had nothing left to
# compute: zero queries, no logits, and the engine crashed.
#
# ```python
# def cached_tokens(names, known, block_size, prompt):
#     found = 0
#     while found < len(names) and names[found] in known:
#         found += 1
#     return found * block_size
# ```
#
# Write it without the bug: the largest number of prompt tokens that need not be computed, where at least one must be. `names` are the prompt's full
# blocks, `known` those in memory, `prompt` its tokens. 5 lines, 6 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>The next token is drawn from the logits of the prompt's last one.</details>
# <details><summary>Hint 2</summary>At most <code>prompt - 1</code>: a <code>min</code> is enough.</details>


# %%
# EXERCISE cached_tokens
def cached_tokens(names, known, block_size, prompt):
    """Prompt tokens that are in memory already and need no computing."""
    ### BEGIN SOLUTION
    found = 0
    while found < len(names) and names[found] in known:
        found += 1
    return min(found * block_size, prompt - 1)
    ### END SOLUTION


# %%
# CHECK cached_tokens
ch11_blocks.cached_tokens(cached_tokens)

# %% [markdown]
# A block whose last request has ended keeps its content: it is *cached*, and whoever brings the same beginning takes it again. When no block is
# free, the cached one that was used longest ago is evicted and written anew.
#
# ## Exercise 11.10: take_block (a bug to hunt)
#
# In nano-vllm#163 and kvcached#362 an evicted block kept its old name. The next request with that beginning can then find the block by it, and read another
# text's keys and values. Nothing crashes; the answer is wrong.
#
# ```python
# def take_block(free, cached, block_of):
#     if free:
#         return free[0], free[1:], cached, block_of
#     return cached[0], free, cached[1:], block_of
# ```
#
# `free` and `cached` are lists of blocks, `cached` with the least recently used first, and `block_of` leads from names to blocks. Write it without
# the bug. Return `(block, free, cached, block_of)` as they are afterwards, and leave the inputs alone. 4 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Only the second return is wrong. A free block has no name.</details>
# <details><summary>Hint 2</summary>Keep the names of other blocks: <code>{name: b for name, b in block_of.items() if b != block}</code>.</details>


# %%
# EXERCISE take_block
def take_block(free, cached, block_of):
    """A block to write on, and what is left."""
    ### BEGIN SOLUTION
    if free:
        return free[0], free[1:], cached, block_of
    block = cached[0]
    return block, free, cached[1:], {name: b for name, b in block_of.items() if b != block}
    ### END SOLUTION


# %%
# CHECK take_block
ch11_blocks.take_block(take_block)

# %% [markdown]
# ## Exercise 11.11: write_alone (core, two bugs to hunt)
#
# A prompt that is found whole computes its last token again and writes it into a block that others may hold. Done in place, it changes the block
# under the eyes of its readers. (In MinivLLM#98 hits on blocks in use corrupted texts in silence as well, for a reason of its own.) This course's own scheduler had the reverse bug: it rewrote a block of a single holder in place, the name still
# led there, and a longer prompt shared it in the same step.
#
# ```python
# def write_alone(table, index, references, block_of, new):
#     return table, references, block_of, None
# ```
#
# Write it without the bugs. If others hold block `table[index]`, put the free block `new` in its place, correct both counts, and return the pair (old, new) to
# copy. Otherwise write in place, and let no name lead there. Return `(table, references, block_of, pair or None)`; leave the inputs alone. 8
# lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Two cases: <code>references[block] &gt; 1</code> is copy on write, where the old block keeps its name.</details>
# <details><summary>Hint 2</summary>In place: drop the block from <code>block_of</code>, as in exercise 11.10.</details>


# %%
# EXERCISE write_alone
def write_alone(table, index, references, block_of, new):
    """Copy on write, or in place without a name."""
    ### BEGIN SOLUTION
    table, references, block = list(table), list(references), table[index]
    if references[block] > 1:
        table[index], references[new] = new, 1
        references[block] -= 1
        return table, references, block_of, (block, new)
    return table, references, {name: b for name, b in block_of.items() if b != block}, None
    ### END SOLUTION


# %%
# CHECK write_alone
ch11_blocks.write_alone(write_alone)

# %% [markdown]
# ### Seen
#
# A small memory of 48 blocks serves eight requests, three at a time; four of them begin with the same FAQ. After every step the map says who holds what.
#
# **Predict:** will a block of the FAQ ever be free again?

# %%
from labutils.lab.plots.serving import block_states, draw_blocks
from labutils.serving.blocks import check_blocks

faq = prompts["qa"][0][:96]
small_memory = paged_llama(model, positions=48 * 16)
engine = Engine(small_memory, Limits(max_running=3))
pool, frames = engine.scheduler.pool, []
for i in range(8):
    engine.submit(Request((faq if i % 2 else []) + list(prompts["chat"][i]), 24))
while engine.busy:
    engine.step()
    check_blocks(pool, [request.table for request in engine.scheduler.running])
    frames.append(block_states(pool.references, pool.cached))

# %%
shared_most = max(range(len(frames)), key=lambda i: sum("shared" in state for state in frames[i]))
figure, panels = plt.subplots(1, 3, figsize=(12, 2.4), layout="constrained")
for axes, step in zip(panels, (0, shared_most, len(frames) - 1), strict=True):
    draw_blocks(axes, frames[step])
    axes.set_title(f"step {step}", fontsize=10)
plt.show()

# %% [markdown]
# *The 48 blocks after the first step, after the step that shares most, and after the last: free, cached (c), owned by one request, or shared by as many as the
# digit says.*
#
# `check_blocks` ran after every step: each block is free, cached or owned, and all counts add up. When does sharing begin, and what is left of an ended request? The slider goes through the steps, and the
# lines print three of them.

# %%
from labutils.lab.widgets.serving import blocks_widget, print_blocks

print_blocks(frames, (0, shared_most, len(frames) - 1))
blocks_widget(frames)

# %% [markdown]
# ## 7 · What a shared beginning saves
#
# A shop's assistant reads the same instructions and the same FAQ before every question. With the prefix cache that beginning is computed once.
#
# **Predict:** 512 tokens are shared and about 30 are new. How many times as fast does the first token come when the beginning is known?

# %%
my_saving = predict("first token behind 512 shared tokens: computed over known", None, unit="times")

# %%
SHARED = (64, 128, 256, 512, 768)
long_text = [token for some in prompts["qa"] for token in some]


def first_token_s(engine, shared, index, salt):
    """Time to first token of a question behind `shared` tokens, by itself."""
    request = Request(long_text[:shared] + prompts["chat"][index], 1, salt=salt)
    return run(engine, [request])[0].times.ttft_s, request.cached


engine, ttfts = Engine(paged, Limits()), {(n, known): [] for n in SHARED for known in (False, True)}
for round_number in range(6):  # the first one is warm-up
    for shared in SHARED:
        salt = f"{round_number} {shared}"
        for known in (False, True):
            seconds, cached = first_token_s(engine, shared, 2 * round_number + known, salt)
            ttfts[shared, known].append(seconds)
            assert cached >= shared * known, (cached, shared)

# %%
saved = {n: paired_ratio(ttfts[n, False][1:], ttfts[n, True][1:]) for n in SHARED}
for n, ratio in saved.items():
    new, again = (1e3 * statistics.median(ttfts[n, known][1:]) for known in (False, True))
    print(f"{n:>3} shared tokens: first token after {new:5.1f} ms, known {again:4.1f} ms, {ratio} as fast")
my_saving.compare(saved[512].value)
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for index, (known, label) in enumerate({False: "computed", True: "found in the prefix cache"}.items()):
    axes.plot(
        SHARED, [1e3 * statistics.median(ttfts[n, known][1:]) for n in SHARED], label=label, **series_style(index)
    )
axes.set(xlabel="tokens of the shared beginning", ylabel="time to first token (ms)", ylim=(0, None))
axes.set_title(f"512 known tokens: the first token {saved[512]} as fast")
axes.legend()
plt.show()

# %% [markdown]
# *Median time to first token of a single request, 5 paired rounds, LabLM int8; the known beginning was computed by the request before.*
#
# What is left may still grow with the beginning: its blocks are looked up by name, and attention looks at all of it. Three things break a beginning in practice: a date or a name at the top of the
# instructions, a chat template that rewrites earlier turns, and a salt for each client. The last does it on purpose.
#
# ## 8 · When memory runs out
#
# A request needs a block more every 16 tokens, and sometimes there is none. Then somebody must give way. **Preemption by recompute** takes the blocks of the last in line, puts it
# back to the head of the queue, and later reads its prompt *and* its own text again.

# %% [markdown]
# ## Exercise 11.12: preempted
#
# Write `preempted(held, free, needed)`: `held[i]` is the number of blocks of running request i, in order of arrival, `free` blocks are free and `needed`
# must be. Return the indices of the requests that give way, in the order in which they do: from the last one on, and no more than it takes. 6 lines, 6 minutes,
# difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Go through <code>reversed(range(len(held)))</code>.</details>
# <details><summary>Hint 2</summary>Stop as soon as <code>free &gt;= needed</code>, before you take the next one.</details>


# %%
# EXERCISE preempted
def preempted(held, free, needed):
    """Indices of the requests that give way."""
    ### BEGIN SOLUTION
    gone = []
    for i in reversed(range(len(held))):
        if free >= needed:
            break
        free += held[i]
        gone.append(i)
    return gone
    ### END SOLUTION


# %%
# CHECK preempted
ch11_steps.preempted(preempted)

# %% [markdown]
# ### The same answers as alone?
#
# After chunks, shared blocks, copies and preemptions, is the text still right? Under greedy decoding each request has one right answer: the one
# that it gets when it is alone.
#
# **Predict:** how many of the 12 answers differ in float32 and in int8, each with NumPy between the matrices and with everything in our C code?

# %%
float_model = load_model("lablm").model


class Heard(Watched):
    """A model for an engine that also keeps the logits of each request, by the length of its text."""

    def __call__(self, step):
        logits = super().__call__(step)
        self.logits = getattr(self, "logits", {})
        due = [chunk for chunk in step.chunks if chunk.samples]
        self.logits |= {(c.request, c.end): row.clone() for c, row in zip(due, logits, strict=True)}
        return logits


def crowd(memory, *, one_by_one=False, **limits):
    """The engine's model and the answers of twelve requests, four of them behind the FAQ."""
    requests = [Request((faq if i % 3 == 0 else []) + list(prompts["chat"][i]), 40) for i in range(12)]
    heard = Heard(memory)
    for group in [[request] for request in requests] if one_by_one else [requests]:
        run(Engine(heard, Limits(**limits)), group)
    return heard, requests


# %%
def parted(ours, theirs):
    """Where two runs' texts part: the gap of the best two logits there, and by how much the runs' logits differ."""
    (heard, requests), (other, others) = ours, theirs
    for one, two in zip(requests, others, strict=True):
        pairs = enumerate(zip(one.new_ids, two.new_ids, strict=True))
        at = next((one.prompt + i for i, (a, b) in pairs if a != b), None)
        if at is not None:
            best, second = other.logits[two, at].topk(2).values.tolist()
            yield best - second, (heard.logits[one, at] - other.logits[two, at]).abs().max().item()


# %%
WAYS = {"all at once": {}, "steps of 16 tokens": {"token_budget": 16}, "40 blocks": {}}
for name in ("float32, NumPy", "float32, C", "int8, NumPy", "int8, C"):
    net = float_model if "float32" in name else model
    memories = {way: paged_llama(net, positions=40 * 16 if way == "40 blocks" else 4096) for way in WAYS}
    for memory in memories.values():
        memory.decoder.few_tokens = memory.decoder.few_tokens if "C" in name else None  # all layers in one call
    truth = crowd(memories["all at once"], one_by_one=True)
    for way, limits in WAYS.items():
        done = crowd(memories[way], max_running=8, **limits)
        gaps, preemptions = list(parted(done, truth)), sum(request.preemptions for request in done[1])
        print(
            f"{name:<14} {way:<19} {12 - len(gaps):>2}/12 answers equal, {preemptions} preemptions, {len(done[0].times)} steps"
        )
        for gap, moved in gaps:
            verdict = "a near-tie" if gap < 2 * moved else "look for a bug"
            print(
                f"{'':<15}parted where the best two logits were {gap:.4f} apart and had moved by up to {moved:.4f}: {verdict}"
            )

# %% [markdown]
# <details><summary>Explain</summary>
#
# The quantized matrices give a token's row the same bits in any company: integers add up alike in any order. Floats do not, so our C code fixes the
# order of every sum: a float32 matrix adds its products in the same eight lanes for each token, and attention goes through the keys of the token's own
# text, first to last. So the bits are the same alone, in a crowd and after any cut of the prompt. NumPy and PyTorch hand a whole chunk to a library, which
# chooses the order by the chunk's size, and that moves the last bits of the logits. Our int8 kernels also round the *inputs* of each matrix to 8 bits, and a value at the edge between two codes then falls to the other side: a whole step
# instead of a last bit. Where the best two tokens are closer than that, the texts part. It is chapter 10's near-tie again, with a larger lever. Such
# a difference is no bug of the scheduler, but only the two numbers can tell.
# </details>
#
# A preempted request reads its own text again, often from blocks that are still cached. The test suite runs 10,000 random schedules with a model that is pure bookkeeping,
# so that nothing rounds, and verifies every block after every step.
#
# ## 9 · Under load
#
# Back to the queue, now with eight slots: at which rate do clients stop being content? The objectives are multiples of what a client alone
# feels on this machine, so that the cell means the same everywhere.
#
# **Predict:** one at a time the engine manages the rate of section 2. How many times that rate can eight slots take before goodput falls?

# %%
lonely = alone(20)
service_s, ttft_s = (statistics.fmean(t.latency_s for t in lonely), 8 * statistics.median(t.ttft_s for t in lonely))
tpot_s = 4 * statistics.median(t.tpot_s for t in lonely)
print(
    f"one at a time {1 / service_s:.1f} requests/s; objectives: first token within {1e3 * ttft_s:.0f} ms, then {1e3 * tpot_s:.1f} ms a token"
)

# %%
LOADS, COUNT_AT, load_rows = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0), 100, []
for load in LOADS:
    arrivals = queueing.poisson_arrivals(load / service_s, COUNT_AT, seed=4)
    done = run_at(Engine(paged, Limits(max_running=8)), chats(COUNT_AT, 10), arrivals)
    times = [request.times for request in done]
    duration_s = max(t.token_s[-1] for t in times) - min(t.arrival_s for t in times)
    rate, share = queueing.goodput(times, duration_s=duration_s, ttft_s=ttft_s, tpot_s=tpot_s)
    row = [quantile([t.ttft_s for t in times], q) for q in (0.5, 0.99)]
    row += [quantile([t.tpot_s for t in times], q) for q in (0.5, 0.99)]
    load_rows.append((load, *row, rate, COUNT_AT / duration_s))
    print(
        f"load {load:.1f}: TTFT p50 {1e3 * row[0]:5.0f} ms, p99 {1e3 * row[1]:5.0f}; TPOT p50 {1e3 * row[2]:4.1f}, p99 {1e3 * row[3]:4.1f}; "
        f"{COUNT_AT / duration_s:4.1f} answers/s, {rate:4.1f} good, {share:.0%}"
    )

# %%
figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
columns = list(zip(*load_rows, strict=True))
names = ("TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "good", "all answers")
for index, name in enumerate(names):
    scale = 1e3 if index < 4 else 1
    panels[index // 2].plot(columns[0], [scale * v for v in columns[index + 1]], label=name, **series_style(index % 2))
panels[0].axhline(1e3 * ttft_s, color="grey", linestyle=":", label="objective")
panels[1].axhline(1e3 * tpot_s, color="grey", linestyle=":", label="objective")
for axes, label in zip(panels, ("time to first token (ms)", "time per token (ms)", "requests/s"), strict=True):
    axes.set(xlabel="arrival rate ÷ rate of one at a time", ylabel=label, ylim=(0, None))
    axes.legend()
load, *_, good, all_answers = load_rows[-1]
panels[2].set_title(f"Load {load:.0f}: {all_answers:.0f} answers/s, {good:.0f} of them good", fontsize=11)
plt.show()

# %% [markdown]
# *100 Poisson arrivals at each rate, eight slots, LabLM int8, one run each. The rate is a multiple of what one slot manages.*
#
# <details><summary>Explain</summary>
#
# As the rate grows, more requests share a step. The step becomes longer, so the time per token rises first, while nobody waits yet. Once the slots are full, a queue forms
# and the first token is late for everybody: throughput nears its limit, and goodput falls. A server that refuses some requests early keeps the others within
# their objectives, which is what `max_waiting` is for.
# </details>

# %% [markdown]
# ## 10 · A server that clients know
#
# `labutils.serving.server` puts the engine behind the addresses that OpenAI's clients use. From a terminal it is `python -m labutils serve lablm --bits 8`. Here it
# runs in a thread, so that we can look inside; client and server then share one process and its time. Without FastAPI and uvicorn
# (`pip install fastapi uvicorn`) this section and the next print one sentence.

# %%
import json
import socket
import threading
import urllib.error
import urllib.request

from labutils.serving.server import make_app
from labutils.serving.service import Service


# %%
def start_server(engine):
    """An engine behind a port of the loopback, and what stops both."""
    import uvicorn

    service = Service(engine, lambda ids: tokenizer.decode(ids, skip_special_tokens=True)).__enter__()
    app = make_app(service, served_model((model, tokenizer), "lablm"))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)

    def stop():
        server.should_exit = True
        thread.join()
        service.__exit__()

    return listening.getsockname()[1], stop


# %%
def post(port, **fields):
    """An open response of the server to a chat request; errors come as `urllib.error.HTTPError`."""
    body = json.dumps({"model": "lablm", "temperature": 0} | fields).encode()
    address, headers = f"http://127.0.0.1:{port}/v1/chat/completions", {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(address, body, headers), timeout=60)


QUESTION = [
    {"role": "system", "content": "You are the service desk."},
    {"role": "user", "content": "Where is my order?"},
]
if with_server:
    server_engine = Engine(paged, Limits(max_running=4, max_waiting=8))
    port, stop_server = start_server(server_engine)
    with post(port, messages=QUESTION, max_tokens=40) as response:
        answer = json.load(response)
    print(answer["choices"][0]["message"]["content"])
    print(answer["choices"][0]["finish_reason"], answer["usage"])
else:
    print("no server here: FastAPI and uvicorn are missing")

# %% [markdown]
# A *stream* sends each piece of text as soon as it is there, as server-sent events: lines that begin `data: `, each event ended by an empty line,
# the last one `data: [DONE]`. What a network delivers is something else: parts of any size, cut anywhere.
#
# ## Exercise 11.13: streamed_text
#
# Write `streamed_text(parts)`: `parts` is a list of bytes as they came. Return the text of all events: their `choices[…]["delta"]["content"]`, where there is one.
# Some events have no choices (the count of tokens), some no content. Here all parts are there at once. 8 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Join the bytes first; only then decode, and split into lines.</details>
# <details><summary>Hint 2</summary><code>json.loads(line[6:])</code> for lines that begin <code>data: </code> and are not <code>[DONE]</code>; <code>.get("content", "")</code>.</details>


# %%
# EXERCISE streamed_text
def streamed_text(parts):
    """The text of a stream of events."""
    ### BEGIN SOLUTION
    import json

    text = ""
    for line in b"".join(parts).decode().split("\n"):
        if line.startswith("data: ") and line != "data: [DONE]":
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content", "")
    return text
    ### END SOLUTION


# %%
# CHECK streamed_text
ch11_steps.streamed_text(streamed_text)

# %% [markdown]
# Four clients stream at once, each a thread with a real socket. **Predict:** how much of the engine's own speed is lost on the way through HTTP?

# %%
my_way = predict("four clients: the last piece over HTTP over the last piece without", None, unit="times")


# %%
def question(name):
    return [QUESTION[0], {"role": "user", "content": f"Question {name}: when does my parcel come?"}]


def stream(port, messages, new_tokens=32):
    """When each piece of one answer arrived at its client."""
    begin, came = time.monotonic(), []
    with post(port, messages=messages, max_tokens=new_tokens, stream=True) as response:
        for line in response:
            if line.startswith(b"data: {") and b'"content": "' in line:
                came.append(time.monotonic())
    return queueing.RequestTimes(begin, tuple(came))


# %%
def at_once(work, count):
    """Runs `work(index)` in threads of its own; returns the results in order."""
    results = [None] * count

    def one(index):
        results[index] = work(index)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return results


# %%
def without_http(asked):
    """The same questions for an engine of its own, which stops at the same token."""
    ids = [chat_ids(tokenizer, messages, add_generation_prompt=True) for messages in asked]
    requests = [Request(each, 32, stop=frozenset({tokenizer.eos_token_id})) for each in ids]
    return [request.times for request in run(Engine(own_memory, Limits(max_running=4)), requests)]


if with_server:
    own_memory, found = paged_llama(model, positions=4096), {"over HTTP": [], "without": []}
    for turn in range(6):
        asked = [question(f"{turn}, {index}") for index in range(4)]
        found["over HTTP"].append(at_once(lambda index, asked=asked: stream(port, asked[index]), 4))
        found["without"].append(without_http(asked))
    last = {}
    for name, turns in found.items():
        first, last[name] = (
            [statistics.median(getattr(times, what) for times in turn) for turn in turns[1:]]
            for what in ("ttft_s", "latency_s")
        )
        seconds = (1e3 * statistics.median(each) for each in (first, last[name]))
        print("{:<10} first piece after {:3.0f} ms, last after {:3.0f} ms".format(name, *seconds))
    ratio = paired_ratio(last["over HTTP"], last["without"])
    print(f"last piece, over HTTP ÷ without: {ratio} (5 turns, 1 warm-up)")
    my_way.compare(ratio.value)
else:
    print("no server here: FastAPI and uvicorn are missing")

# %% [markdown]
# <details><summary>Explain</summary>
#
# Clients, server and engine are threads of one interpreter here, which runs Python code of one thread at a time: while a client parses a piece, no step begins. Every
# piece also passes through two queues, JSON and a socket. LabLM's steps are so short that all this shows; beside the steps of a large model the same
# milliseconds would be few.
# </details>
#
# ## 11 · Clients that misbehave
#
# On an open address somebody always vanishes, reads too slowly, or sends too much. None of them may cost the others anything.
#
# | fault | what the server does |
# | --- | --- |
# | the client vanishes | its request is cancelled, its blocks come back |
# | the client does not read | its answer waits in its own queue; nobody waits for it |
# | a flood | the queue is bounded: one more is refused at once, with status 429 |
# | nonsense | status 400, and the field that is wrong, by name |
#
# **Predict:** 4 requests run and 8 may wait. 40 come at once: how many are answered?

# %%
my_count = predict("answered of 40 requests at once, where 4 run and 8 may wait", None)


# %%
def half_a_stream(port):
    """Opens a stream, reads its beginning, and leaves."""
    with post(port, messages=QUESTION, max_tokens=400, stream=True) as response:
        response.readline()


def running_until(value, seconds=5.0):
    """Waits until so many requests run; returns how many do."""
    end = time.monotonic() + seconds
    while len(server_engine.scheduler.running) != value and time.monotonic() < end:
        time.sleep(0.01)
    return len(server_engine.scheduler.running)


def status(port, **fields):
    """The status of an answer, and the error's words if it is one."""
    try:
        with post(port, **fields) as response:
            return response.status, json.load(response)["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


# %%
if with_server:
    half_a_stream(port)
    free = server_engine.scheduler.pool
    print("vanished:", running_until(0), "requests run,", len(free.references) - free.available, "blocks held")
    with post(port, messages=QUESTION, max_tokens=60, stream=True) as slow:  # and nobody reads it
        print("beside a client that does not read:", status(port, messages=QUESTION, max_tokens=5))
    running_until(0)
    flood = at_once(lambda index: status(port, messages=QUESTION, max_tokens=40), 40)
    codes = [code for code, _ in flood]
    print("flood of 40:", {code: codes.count(code) for code in sorted(set(codes))})
    my_count.compare(codes.count(200))
    print(next((words for code, words in flood if code == 429), "nobody was refused"))
    print("afterwards:", status(port, messages=QUESTION, max_tokens=5))
    print("nonsense:", status(port, messages=QUESTION, max_tokens=-1))
    stop_server()
else:
    print("no server here: FastAPI and uvicorn are missing")

# %% [markdown]
# Every request of the flood got an answer or a refusal with its reason, and nobody was forgotten. A refusal is cheap: the client can try again later, or
# elsewhere. The test suite sends 10,000 requests, 64 at a time, and lets clients vanish, stall and send half a body.
#
# ## 12 · Past one machine
#
# The client does not care who answers. On a machine with a GPU, vLLM serves the same addresses; only `base_url` and the model's name change:
#
# ```
# vllm serve Qwen/Qwen3-4B --max-num-seqs 64 --enable-prefix-caching --port 8000
# curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \
#   -d '{"model": "Qwen/Qwen3-4B", "messages": [{"role": "user", "content": "Hi"}], "stream": true}'
# ```
#
# Its names are now yours: sequences at once, token budget (`--max-num-batched-tokens`), block size, prefix caching, preemption. These lines were not run here.
# What was: two servers of vLLM's CPU backend with LabLM, behind chapter 09's dispatcher (`tests/test_vllm.py`, where you name a Python that has vLLM). `notebooks/RENTED_GPUS.md` says how a class rents GPUs.

# %% [markdown]
# ### Beside other engines
#
# `python -m labutils bench serving` gives the same weights, prompts and lengths to our engine, to llama.cpp's server, to vLLM's CPU backend and to transformers' continuous batching, with one thread
# each. Every engine has a process of its own, which is stopped while another is timed, and the rounds take turns. That takes half an hour, so the next cells read a stored run. The second model is LabLM tiled to seven times
# its width: it writes the same texts and reads 0.24 billion weights.
#
# **Predict:** which engine makes most tokens per second for 8 clients at once, and which one gains most between 1 client and 32?

# %%
my_guess = None  # words

# %%
from labutils.lab.paths import DATA

stored = [json.loads(line) for line in (DATA / "results" / "serving.jsonl").read_text().splitlines()]
closed = [row for row in stored if row["at_once"] and "again" not in row["engine"]]
models = list(dict.fromkeys(row["model"] for row in closed))
host = stored[0]["host"]
print(
    f"a stored run: {host['cpu']}, {stored[0]['threads']} of {host['cores']} cores, {len(stored[0]['rounds'])} rounds"
)
for model_name in models:
    print(f"\n{model_name}, 8 at once{'tokens/s':>25}{'TTFT p50, p99 (ms)':>36}{'a token p50, p99 (ms)':>24}")
    for row in sorted(
        (r for r in closed if r["model"] == model_name and r["at_once"] == 8), key=lambda r: -r["tokens_per_s"]
    ):
        low, high = row["interval"]
        waits = [1e3 * row[name][part] for name in ("ttft_s", "tpot_s") for part in ("p50", "p99")]
        print(
            f"{row['engine']:<22}{row['tokens_per_s']:8.0f} [{low:5.0f}, {high:5.0f}]"
            + "{:18.0f}{:8.0f}{:14.1f}{:8.1f}".format(*waits)
        )
print("you said", my_guess)

# %%
FAMILIES = ("ours", "llama.cpp", "vLLM", "transformers")
LINES = {32: "-", 8: "--", 4: ":"}  # by the bits of a weight
figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
for axes, model_name in zip(panels, models, strict=True):
    here = [row for row in closed if row["model"] == model_name]
    for engine_name in dict.fromkeys(row["engine"] for row in here):
        line = [row for row in here if row["engine"] == engine_name]
        style = series_style(FAMILIES.index(engine_name.split()[0])) | {"linestyle": LINES[line[0]["bits"]]}
        axes.plot([r["at_once"] for r in line], [r["tokens_per_s"] for r in line], label=engine_name, **style)
    counts = sorted({row["at_once"] for row in here})
    plain_log_scale(axes, "y")
    axes.set(xscale="log", xlabel="clients at once", ylabel="tokens/s")
    axes.set_xticks(counts, counts, minor=False)
    axes.minorticks_off()
    axes.set_title(model_name, fontsize=11)
panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
plt.show()

# %% [markdown]
# *Tokens per second against clients at once, medians of a stored run of interleaved rounds; both axes are logarithmic. Solid lines read float32 weights, dashed ones 8 bits, dotted ones 4. Intervals
# stand in the table above for 8 at once.*
#
# A promise is kept or broken by the slow ones. How many of the requests of each rate get their first token within 0.1 s and the later ones within 15 ms each on average?

# %%
OBJECTIVES = (0.1, 0.015)
rates_seen = sorted({row["rate"] for row in stored if row["rate"] and row["model"] == models[0]})
print(f"{'share of good requests at':<26}" + "".join(f"{rate:>8} /s" for rate in rates_seen))
for engine_name in dict.fromkeys(row["engine"] for row in closed):
    shares = []
    for rate in rates_seen:
        row = next(r for r in stored if (r["engine"], r["model"], r["rate"]) == (engine_name, models[0], rate))
        times = [
            (first - came, (last - first) / (row["new_tokens"] - 1))
            for some in row["rounds"]
            for came, first, last in some
        ]
        shares.append(statistics.fmean(ttft <= OBJECTIVES[0] and tpot <= OBJECTIVES[1] for ttft, tpot in times))
    print(f"{engine_name:<26}" + "".join(f"{share:>10.0%} " for share in shares))

# %% [markdown]
# <details><summary>Explain</summary>
#
# vLLM and transformers read float32 here, so compare them with our float32 first; the rest of a lead is low precision and not scheduling. An engine that
# gains more from many clients shares more among their rows: one reading of the weights, or what a step costs whatever its rows. A small model leaves little to share and shows what each step costs
# apart from weights; the wide one shows the kernels. An order found with one machine, thread and model is not an order of engines.
# </details>

# %% [markdown]
# Several machines are *replicas*. Chapter 09's dispatcher gives a request to whoever is free, and sends it again when a node is lost. With
# prefix caches there is a second thought: the beginning of a conversation lies in *one* replica's memory.

# %% [markdown]
# ## Exercise 11.14: route
#
# Write `route(names, replicas, slack)`. `names` are a prompt's block names, and each replica is a pair (names that it knows, length of its queue). Leave out replicas whose
# queue is longer than the shortest one plus `slack`. Of the rest take the one that knows most of the prompt's beginning; of equals, the one with the
# shorter queue; of those, the first. Return its index. 8 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>A known beginning ends at the first unknown name, as in exercise 11.9.</details>
# <details><summary>Hint 2</summary><code>max(open_ones, key=lambda i: (beginning of i, -queue of i, -i))</code>.</details>


# %%
# EXERCISE route
def route(names, replicas, slack):
    """The index of the replica that a prompt should go to."""

    ### BEGIN SOLUTION
    def beginning(known):
        return next((i for i, name in enumerate(names) if name not in known), len(names))

    shortest = min(queue for _, queue in replicas)
    open_ones = [i for i, (_, queue) in enumerate(replicas) if queue <= shortest + slack]
    return max(open_ones, key=lambda i: (beginning(replicas[i][0]), -replicas[i][1], -i))
    ### END SOLUTION


# %%
# CHECK route
ch11_steps.route(route)

# %% [markdown]
# Two replicas, each an engine with a memory of its own, in this process, and 24 questions about six documents. In turn, or by prefix?
#
# **Predict:** what share of the prompts' tokens is found in memory, each way?

# %%
from labutils.serving.routing import PrefixRouter

texts = [long_text[200 * i : 200 * i + 160] for i in range(6)]
order = random.Random(5).sample([(d, q) for d in range(6) for q in range(4)], 24)
memories = [paged_llama(model, positions=64 * 16) for _ in range(2)]
for name in ("in turn", "by prefix"):
    engines = [Engine(memory, Limits(max_running=2)) for memory in memories]
    router = PrefixRouter(block_size=paged.block_size, blocks=64, slack=3)
    requests = [Request(texts[d] + prompts["chat"][q], 8) for d, q in order]
    begin = time.perf_counter()
    for number, request in enumerate(requests):
        waiting = {i: len(e.scheduler.waiting) + len(e.scheduler.running) for i, e in enumerate(engines)}
        engines[number % 2 if name == "in turn" else router(request.token_ids, waiting)].submit(request)
        for engine in engines * 3:  # some steps pass before the next one arrives
            engine.step()
    while any(engine.busy for engine in engines):
        [engine.step() for engine in engines]
    share = sum(r.cached for r in requests) / sum(r.prompt for r in requests)
    print(f"{name:<9} {share:4.0%} of the prompts' tokens found in memory, {time.perf_counter() - begin:.2f} s for all")

# %% [markdown]
# The router asks no replica: it remembers what it sent where, as many blocks for each as a replica holds. In turn, each replica has to read every document for itself, and with too small a memory it also evicts what it will need again (give both fewer positions, and look). Routed by prefix, a document is read once and stays in
# one place. The share depends on the order of requests alone; the seconds are those of one run each, and on two small replicas they may go either way. The slack keeps a popular document from burying one replica while the other is idle.
#
# ## 13 · Points for the ledger
#
# Batching changes no weight, so the quality is that of int8 and only the speed moves. Speeds are those of section 4.

# %%
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.measurement import ledger

documents = held_out_documents(limit_bytes=600)
baseline = bits_by_document(load_model("lablm").model, tokenizer, documents)
quality = paired_quality(bits_by_document(model, tokenizer, documents), baseline)
records = []
for n in (1, 8):
    record = ledger.Record(
        technique=f"int8, {n} at once", model="lablm", device="cpu", dtype="int8", threads=torch.get_num_threads(),
        prompt_tokens=len(prompts["chat"][0]), output_tokens=16, batch=n,
        samples=[16 * 16 / seconds for seconds in by_count[str(n)].samples_s],
        bits_per_byte=quality.bits_per_byte, baseline_bits_per_byte=quality.baseline_bits_per_byte,
        quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in documents), chapter="11",
    )  # fmt: skip
    records.append(record)
    ledger.append(record)

# %%
from labutils.lab.plots.speed_quality import draw_speed_quality, speed_quality_table

figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
draw_speed_quality(records, ax=axes)
plt.show()
print(speed_quality_table(records))

# %% [markdown]
# *Tokens per second of all requests together, prompts included (5 rounds of 16 requests), against bits per byte of held-out code, the first
# 600 bytes of each module.*

# %% [markdown]
# ## What you have
#
# - the laws of waiting, and a load generator that does not look away;
# - TTFT, gaps and TPOT told apart, and goodput, which counts only what keeps its promise;
# - an engine that decides before every step who is computed: decoding first, prompts in pieces;
# - memory in blocks, whose names let beginnings be shared, and real bugs of real engines, ours among them, that you would now see;
# - the same answers as alone, up to near-ties that you can tell from bugs, and a server that goes on while clients vanish, stall, flood it or send nonsense.

# %% [markdown]
# **Open question:** your assistant must show its first word within 0.5 s for 99 of 100 customers. Mornings bring 5 requests a second, and a newsletter brings
# 60 within a minute, most with the same question and a few with long documents. Which limits would you set, what would you refuse, and which numbers would you watch?
#
# Next: **12 · Applications**.

# %%
calibration()

# %%
from labutils.course.progress import progress

progress()

# %% [markdown]
# # 06 · GPU acceleration
#
# **Goal:** find out what a device waits for, climb the ladder from an eager loop to the memory wall, check on every rung
# that the answers stayed the same, and write the kernels at its top yourself.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 02; 03 helps |
# | Time | 3.5 hours for you; all cells run in about a minute on one core, longer on a busy one (measured: 36 and 104 s) |
# | Memory, download | 2.0 GB at the peak (measured); Triton, 200 MB (700 MB on disk, Linux only), is installed by the first cell |
# | Hardware | any computer; the same cells use a GPU (T4, L4, A100, H100 …) where there is one; its compilations take minutes more, which nobody timed |
# | Exercises | 12, each checked in the cell below it; those marked *core* fit into two sessions of two hours |

# %% [markdown]
# **What is real here: not run on a GPU.** No GPU was at hand when these outputs were made. What is timed below was timed
# on a CPU. Kernels were run by Triton's interpreter, which shows that they are right and says nothing about their speed,
# and compiled to a GPU's machine code, which shows that they compile. Where a GPU is *simulated*, the text says so.
# On a machine with a GPU the same cells are meant to run on it; that, too, was never tried.

# %%
from labutils.course.extras import install_extra

install_extra("gpu")  # Triton; where it is already installed, nothing happens

# %%
import math
import statistics
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import scaled_dot_product_attention, silu

from labutils.acceleration.interpreter import WITHOUT_TRITON, interpret, missing_triton
from labutils.course.predictions import calibration, predict
from labutils.lab.models.load import load_model
from labutils.lab.plots.style import series_style
from labutils.measurement.timing import measure_interleaved, paired_ratio

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
has_triton = not missing_triton()
model, tokenizer = load_model("lablm", device=device)
prompt = tokenizer.bos_token + "import os\n\n\ndef read_lines(path):\n    "
prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
print(f"{device}, threads: {torch.get_num_threads()}, {'with' if has_triton else 'without'} Triton")
if not has_triton:
    print(WITHOUT_TRITON)

# %% [markdown]
# ## A GPU on one page
#
# A GPU is a set of **streaming multiprocessors** (SMs). Each keeps many threads ready, always 32 together (a **warp**). A program's
# threads have registers of their own and **shared memory** in common. Beside its ordinary units an SM has **tensor cores**, which
# multiply small matrices of 16 bits or fewer. All SMs share an **L2** cache and the device's memory: **HBM**, or GDDR on a T4.
#
# A warp that waits for memory costs nothing as long as its SM has another one to run. So a kernel wants many warps on each SM
# (**occupancy**), and each warp wants its 32 threads to read neighbours: then one wide fetch serves all of them.

# %%
from labutils.lab.plots.acceleration import draw_gpu

figure, axes = plt.subplots(figsize=(10, 3.4), layout="constrained")
draw_gpu(axes)
plt.show()

# %% [markdown]
# *The figure is a drawing, not a measurement: from the device's memory below through L2 up to the SMs, of which four are shown.*

# %% [markdown]
# | by NVIDIA's documents | T4 | A100 80 GB | H200 | B200 |
# | --- | --- | --- | --- | --- |
# | compute capability | 7.5 | 8.0 | 9.0 | 10.0 |
# | SMs | 40 | 108 | 132 | not in its datasheet |
# | shared memory of an SM | 64 KB | 164 KB | 228 KB | 228 KB |
# | warps on an SM, at most | 32 | 64 | 64 | 64 |
# | L2 | 4 MB | 40 MB | 50 MB | not in its datasheet |
# | memory | 0.32 TB/s | 2.04 TB/s | 4.8 TB/s | 8 TB/s |
# | 16-bit tensor cores, dense | 65 TFLOP/s | 312 TFLOP/s | 989 TFLOP/s | 2,250 TFLOP/s |
#
# (Whitepapers of the Turing, Ampere and Hopper architectures; datasheets of the four; the CUDA programming guide's table of compute
# capabilities. Nothing of this was measured here.)

# %% [markdown]
# ## 1 · Where does the time go?
#
# One token of LabLM is a few hundred operators, and Python asks for each of them. A **profiler** notes when each ran.
# On a GPU it notes three things: the host's *launches*, the *kernels* on the device, and the *copies* between both.
# On a CPU a "kernel" is an operator that touches numbers, and the gaps between are Python and bookkeeping.
#
# **Predict:** in which share of the time does *no* kernel run while LabLM decodes?

# %%
my_gap = predict("percent of a decoding step in which no kernel runs", None, unit="%")

# %%
from labutils.acceleration.timeline import profile
from labutils.generation.decode import decode_one_token, prefill, static_cache
from labutils.lab.plots.acceleration import draw_timeline


def eager_step():
    cache.truncate(prompt_ids.shape[1])
    return decode_one_token(model, prompt_ids[:, -1], cache)


cache = static_cache(model, prompt_ids, 8)
prefill(model, prompt_ids, cache)
timeline = profile(eager_step, device=device)
print(timeline)
for name, seconds, calls in timeline.longest_kernels(4):
    print(f"{name[:50]:<50} {seconds * 1e3:6.2f} ms in {calls} calls")
my_gap.compare(100 * timeline.gap_share)

# %%
figure, axes = plt.subplots(figsize=(10, 2.4), layout="constrained")
half = timeline.seconds / 2
draw_timeline(timeline, name="one eager token", window_s=(half, half + timeline.seconds / 6), ax=axes)
plt.show()

# %% [markdown]
# *The figure shows one sixth of one token, from its middle: every bar is a kernel, white is waiting.* Profiling
# slows everything down: read shares from it, never milliseconds. We show the fastest of five calls; in the slower ones
# another process may have been using the core.
#
# A GPU makes this worse. It can finish a small kernel in less time than the host takes to launch the next one, and then it waits
# for Python (an example with a clock: Gray 2019, "Getting Started with CUDA Graphs", NVIDIA's technical blog). Such a program is
# **launch-bound**, and no faster GPU helps it.

# %% [markdown]
# ## 2 · A trap
#
# Somebody times a kernel on a GPU. The GPU here is **simulated**: it obeys CUDA's rules (a launch returns at once, work
# queues up), and its seconds are made up: 50 µs for the kernel, 5 µs for a launch.
#
# **Predict:** which number will the careless benchmark print?

# %%
from labutils.acceleration.simulation import SimulatedGpu

gpu = SimulatedGpu(launch_s=5e-6)
gpu.launch(3e-3)  # somebody's earlier work is still in the queue
start = gpu.clock()
for _ in range(40):
    gpu.launch(50e-6)
print(f"careless: {(gpu.clock() - start) / 40 * 1e6:.1f} µs a call")
gpu.wait()
print(f"the same, the clock read after a wait: {(gpu.clock() - start) / 40 * 1e6:.1f} µs a call")

# %% [markdown]
# Both are wrong: the kernel takes 50 µs.
#
# ## Exercise 6.1: honest_seconds (core)
#
# Write `honest_seconds(launch, wait, clock, calls)`: the device's own seconds for one call. `launch()` queues the kernel,
# `wait()` blocks until the device is idle, `clock()` gives seconds. Waiting after *every* call would add the launch to
# it. 6 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>What was in the queue before the clock was started? What was in it when the clock was read?</details>
# <details><summary>Hint 2</summary>Wait, read the clock, launch all calls, wait once, read the clock, divide.</details>


# %%
# EXERCISE honest_seconds
def honest_seconds(launch, wait, clock, calls):
    """Seconds of device time for one call of a queued kernel."""
    ### BEGIN SOLUTION
    wait()
    start = clock()
    for _ in range(calls):
        launch()
    wait()
    return (clock() - start) / calls
    ### END SOLUTION


# %%
# CHECK honest_seconds
from labutils.course.checks import ch06

ch06.honest_seconds(honest_seconds)

# %% [markdown]
# `labutils.measurement.timing` waits in this way for every sample.
#
# Back to the profile. Its most useful number is the share of time in which *anything* ran. Kernels and copies overlap on
# a GPU, so their durations may not simply be added:
#
# $$\text{busy} = \frac{\left|\bigcup_i [s_i,\, s_i + d_i]\right|}{\max_i (s_i + d_i) - \min_i s_i}$$
#
# **Tiny numbers:** a kernel from 0 to 2, a copy from 1 to 3, a kernel from 5 to 6. Busy: 3 + 1 of 6.

# %% [markdown]
# ## Exercise 6.2: busy_share (core)
#
# Write `busy_share(events)`: `events` is a list of (start, seconds), in any order; return the share of the time from the
# first start to the last end in which at least one runs. 8 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Walk through them in order of their starts and remember until when you have counted already.</details>
# <details><summary>Hint 2</summary>For each event: <code>busy += max(0, end - max(start, counted))</code>, then <code>counted = max(counted, end)</code>.</details>


# %%
# EXERCISE busy_share
def busy_share(events):
    """Share of the time in which at least one event runs."""
    ### BEGIN SOLUTION
    first, busy = min(start for start, _ in events), 0.0
    counted = first
    for start, seconds in sorted(events):
        busy += max(0.0, start + seconds - max(start, counted))
        counted = max(counted, start + seconds)
    return busy / (counted - first)
    ### END SOLUTION


# %%
# CHECK busy_share
ch06.busy_share(busy_share)

# %% [markdown]
# ## 3 · Copies that hide
#
# A GPU has its own memory. Whatever comes from the host is copied first, and a copy can run *beside* the kernels: on a
# **stream** of its own, from **pinned** memory (pages that the system promised not to move). Unpinned memory is copied
# twice, through a pinned buffer, and the host waits.
#
# Eight batches, each copied (2 ms) and computed on (3 ms), on the **simulated** GPU. **Predict** both totals: 8 · (2 + 3)
# one after the other, and ... ?

# %%
from labutils.lab.plots.acceleration import as_timeline


def eight_batches(overlapped):
    gpu = SimulatedGpu()
    for _ in range(8):
        gpu.launch(2e-3, stream="copies")
        if not overlapped:
            gpu.wait()
        gpu.launch(3e-3, after="copies")  # a kernel waits for its own copy
        if not overlapped:
            gpu.wait()
    gpu.wait()
    return gpu


runs = {name: eight_batches(name == "overlapped") for name in ("one after the other", "overlapped")}
print({name: f"{gpu.clock() * 1e3:.1f} ms" for name, gpu in runs.items()})
figure, panels = plt.subplots(2, 1, figsize=(10, 4), layout="constrained", sharex=True)
for axes, (name, gpu) in zip(panels, runs.items(), strict=True):
    draw_timeline(as_timeline(gpu.events), name=name, ax=axes)
plt.show()

# %% [markdown]
# *The figure shows the simulated GPU without and with a second stream: with it, all copies but the first one hide behind kernels.*
# What remains is the first copy, and then the longer of the two.
#
# On a real GPU it takes three things: `pin_memory()`, `non_blocking=True`, and a second stream. `labutils`' `prefetched`
# is a loop with all three. Pin before the loop where you can, for pinning is itself a copy for which the host waits. On a CPU
# `prefetched` hands out the batches as they are; the times are for a GPU and only there.

# %%
from labutils.acceleration.copies import prefetched

batches = [torch.full((1024, 1024), i / 1024) for i in range(8)]
print("the same batches, in order:", [int(batch.sum() / 1024) for batch in prefetched(batches, device)])
if device == "cuda":
    pinned = [batch.pin_memory() for batch in batches]

    def work(b):  # about as long as a copy
        return [b @ b for _ in range(2)]

    ways = {
        "one pageable copy": lambda: batches[0].to(device),
        "one pinned copy": lambda: pinned[0].to(device, non_blocking=True),
        "eight, one after the other": lambda: [work(b.to(device)) for b in pinned],
        "eight, prefetched": lambda: [work(b) for b in prefetched(pinned, device)],
    }
    print(*measure_interleaved(ways, device=device).values(), sep="\n")
else:
    print("their times: not run on a GPU")

# %% [markdown]
# **Fix the article.** Its listing moves the model to the GPU and never the batch (its other mistakes: chapters 00, 03,
# 09). As printed it fails on the first call. Without a GPU, PyTorch's `meta` device stands in: it knows shapes only, and
# refuses mixed devices as a GPU does. The repair is one word, in front of every call.

# %%
elsewhere = "cuda" if device == "cuda" else "meta"
network = torch.nn.Linear(10, 10).to(elsewhere)  # model.to(device)
batch = torch.rand(4, 10)
try:
    network(batch)  # for batch in data: output = model(batch)
except RuntimeError as error:
    print("as printed:", str(error).splitlines()[0])
print("repaired:  ", tuple(network(batch.to(elsewhere)).shape), "on", elsewhere)

# %% [markdown]
# ## 4 · Memory-bound, or bound by arithmetic?
#
# When launches do not limit, the roofline of chapter 01 decides: decoding reads every weight for every token. But a batch
# of B texts reads it *once* for B tokens. So up to some B, more texts are almost free: **latency** stays,
# **throughput** grows. **Predict:** how many times the tokens per second of one text do 32 texts reach?

# %%
my_batch = predict("tokens/s of 32 texts over one text, LabLM, eager", None, unit="times")

# %%
steps = {}
for batch in (1, 2, 4, 8, 16, 32):
    ids = prompt_ids.repeat(batch, 1)
    its_cache = static_cache(model, ids, 8)
    prefill(model, ids, its_cache)

    def step(ids=ids, its_cache=its_cache):
        its_cache.truncate(ids.shape[1])
        return decode_one_token(model, ids[:, -1], its_cache)

    steps[batch] = step
sweep = measure_interleaved({str(b): f for b, f in steps.items()}, repeats=7, warmup=1, device=device)
for batch in steps:
    print(f"batch {sweep[str(batch)]}: {batch / sweep[str(batch)].median_s:.0f} tokens/s")

# %%
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
latency = [sweep[str(b)].median_s * 1e3 for b in steps]
throughput = [b / sweep[str(b)].median_s for b in steps]
axes.plot(latency, throughput, **series_style(0))
for b, x, y in zip(steps, latency, throughput, strict=True):
    axes.annotate(f"batch {b}", (x, y), xytext=(6, -10), textcoords="offset points")
my_batch.compare(throughput[-1] / throughput[0])
axes.margins(0.12)
axes.set(xlabel="time of one step (ms)", ylabel="tokens per second, all texts")
axes.set_title(
    f"32 texts: {throughput[-1] / throughput[0]:.1f} times the tokens, {latency[-1] / latency[0]:.1f} times the wait"
)
axes.grid(alpha=0.25)
plt.show()

# %% [markdown]
# *The figure shows one decoding step of LabLM for batches of 1 to 32 texts (float32, 7 rounds, medians): to the right
# everybody waits longer, upwards more tokens come out.*
#
# Reading a weight of b bytes takes b / bandwidth; using it for B texts takes 2·B / peak. Where both are equal, the batch
# balances. **Tiny numbers:** 10 GB/s, 100 GFLOP/s, 4 bytes: 0.4 ns to read, 0.02 ns a text to use: B = 20.

# %% [markdown]
# ## Exercise 6.3: balancing_batch (core)
#
# Write `balancing_batch(flops_per_s, bytes_per_s, bytes_per_weight)`: the batch at which reading a weight and computing
# with it take equally long. 1 line, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Write down both times for one weight and set them equal.</details>
# <details><summary>Hint 2</summary>bytes_per_weight / bytes_per_s = 2·B / flops_per_s.</details>


# %%
# EXERCISE balancing_batch
def balancing_batch(flops_per_s, bytes_per_s, bytes_per_weight):
    """The batch at which memory and arithmetic take equally long."""
    ### BEGIN SOLUTION
    return flops_per_s * bytes_per_weight / (2 * bytes_per_s)
    ### END SOLUTION


# %%
# CHECK balancing_batch
ch06.balancing_batch(balancing_batch)

# %% [markdown]
# How much of a step's time does memory explain, and how much arithmetic? Divide the bytes that it must read by the measured
# bandwidth, and its operations by the measured peak: each quotient is the time that *would* be enough. What neither explains went
# into launches, Python, and kernels too small to fill the device, which the texts of a batch share as well. Section 10's ladder tests the
# verdict: if decoding waited for memory alone, a format with a quarter of the bytes would be four times as fast. A datasheet's numbers for an A100
# (312 TFLOP/s, 2,039 GB/s) stand beside this machine's, which are measured.

# %%
from labutils.acceleration.timeline import explained_shares
from labutils.measurement.resources import weight_bytes_read
from labutils.measurement.roofline import measure_roofline

machine = measure_roofline(1.0, device=device)
print(machine)
roofs = {"bytes_per_s": machine.bandwidth_bytes_per_s, "flops_per_s": machine.flops_per_s}
read = weight_bytes_read(model)
for batch in (1, 32):
    seconds, flop = sweep[str(batch)].median_s, 2 * batch * read / 4
    shares = explained_shares(seconds, moved_bytes=read, flop=flop, **roofs)
    print(f"a step, batch {batch}:", ", ".join(f"{what} {share:.0%}" for what, share in shares.items()))
for name, flops, bandwidth, size in (
    ("this machine, float32", machine.flops_per_s, machine.bandwidth_bytes_per_s, 4),
    ("A100 by its datasheet, bf16", 312e12, 2.039e12, 2),
    ("A100 by its datasheet, int4 weights", 312e12, 2.039e12, 0.5),
):
    print(f"{name}: balanced at a batch of {flops * size / (2 * bandwidth):.0f}")

# %% [markdown]
# ## 5 · "Low precision is faster"
#
# The article says so, without a condition. Two products decide about a model's speed: one row times a matrix (decoding
# one text) and many rows times a matrix (prefill). The same shapes in four formats, on *this* processor; and once more
# in a process in which both libraries that compute them, oneDNN and MKL, are asked to use AVX2 only. (MKL may ignore this on a
# processor that is not Intel's. Then its float32 keeps its full speed: compare its absolute times in both processes.)
#
# **Predict** the order of the four formats, for each of the two.

# %%
from labutils.acceleration.formats import cpu_units, time_formats, time_formats_limited

print("units for vectors and low precision:", ", ".join(cpu_units()) or "unknown")
measured = {"this processor": time_formats(device=device)}
if device == "cpu":
    measured["held to AVX2"] = time_formats_limited("AVX2")
for where, formats in measured.items():
    print(f"{where}:", *formats.values(), sep="\n  ")

# %%
ROWS = {"1 row": "decoding, 1 row", "256 rows": "prefill, 256 rows"}
names = [name.split(", ")[1] for name in measured["this processor"] if name.startswith("1 row,")]
versus, slower, faster = {}, [], []
for where, formats in measured.items():
    for rows, work in ROWS.items():
        base = formats[f"{rows}, float32"].samples_s
        versus[where, rows] = [paired_ratio(formats[f"{rows}, {n}"].samples_s, base) for n in names]
        print(f"{where}, {work}:", ", ".join(f"{n} {r}" for n, r in zip(names, versus[where, rows], strict=True)))
        slower += [f"{n} ({where}, {work})" for n, r in zip(names, versus[where, rows], strict=True) if r.low > 1]
        faster += [f"{n} ({where}, {work})" for n, r in zip(names, versus[where, rows], strict=True) if r.high < 1]
print("time of float32 = 1; the interval lies above 1:", "; ".join(slower) or "none")
print("the interval lies below 1:", "; ".join(faster) or "none")

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
for axes, (rows, work) in zip(panels, ROWS.items(), strict=True):
    for index, where in enumerate(measured):
        ratios = versus[where, rows]
        bars = [[max(r.value - r.low, 0) for r in ratios], [max(r.high - r.value, 0) for r in ratios]]
        values, style = [r.value for r in ratios], {**series_style(index), "linestyle": "none"}
        axes.errorbar(values, range(len(names)), xerr=bars, capsize=3, label=where, **style)
    worst = max((r.value, n) for where in measured for n, r in zip(names, versus[where, rows], strict=True))
    axes.set(xscale="log", xlabel="time against float32 (times)")
    axes.set_title(f"{work}: slowest median {worst[1]}, {worst[0]:.1f}x")
    low, high = axes.set_xlim(axes.get_xlim()[0] / 1.2, axes.get_xlim()[1] * 1.2)
    ticks = [t for t in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low < t < high]
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1.0, color="0.4", linestyle=":")
    axes.grid(alpha=0.25)
panels[0].legend()
plt.show()

# %% [markdown]
# *The figure shows the time of one product with a 1024 × 1024 matrix, against float32 in the same process, with 95% intervals: left
# of the dotted line is faster. int8 is `torch._int_mm`, which sums in 32 bits (PyTorch's plain `@` of int8 returns int8, and its sums
# wrap around), on a CPU only.*
#
# **Explain.** With many rows a format can be fast where the processor has a unit for it *and* the library calls that unit. Without one,
# numbers are converted, multiplied in another format, and rounded back. With a single row the time goes into reading the matrix, so
# a smaller format can help even without a unit for it, and need not help with one: compare bfloat16 in the two processes. So the
# article's advice needs conditions, and the rule is: measure. Chapter 03's int8 brings its own kernel. On a GPU: TF32 and bf16 from Ampere on,
# fp16 since Volta; a T4 has fp16 but only emulates bf16.

# %% [markdown]
# **Why not autocast?** It was made for training: weights stay float32, and each `with` block casts them again when a product needs
# them. For inference, cast once: `model.to(torch.bfloat16)`. (The article's listing imports `autocast` and `GradScaler` and calls
# neither.) Count the casts in one decoding step.

# %%
import copy

half_model = copy.deepcopy(model).to(torch.bfloat16)


def one_pass(its_model, autocast):
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        return its_model(input_ids=prompt_ids[:, :1], use_cache=False).logits


for name, its_model, autocast in (("autocast", model, True), ("cast once", half_model, False)):
    with torch.profiler.profile() as recorded:
        one_pass(its_model, autocast)
    casts = sum(e.count for e in recorded.key_averages() if e.key == "aten::_to_copy")
    weights_mb = sum(p.nbytes for p in its_model.parameters()) / 1e6
    print(f"{name}: {casts} casts in one pass, {weights_mb:.1f} MB of weights kept")
del half_model

# %% [markdown]
# "Cast once" still casts: transformers computes RMSNorm and the rotary angles in float32 on purpose, and rounds the result. These
# casts touch activations, which are small; autocast's also touch the weights.

# %% [markdown]
# ## 6 · Attention without the square
#
# Plain attention writes the scores (n × n for each head) to memory, reads them for the softmax, writes the attention weights, and
# reads those to mix the values. A *fused* kernel never writes them: it keeps a block of scores on the chip
# (FlashAttention, Dao et al. 2022, arXiv:2205.14135). `scaled_dot_product_attention` (SDPA) picks such a kernel where it can; on a
# GPU a mask of one's own, or float32, rules FlashAttention out and leaves another fused kernel.
#
# **Tiny numbers:** n = 10 positions of 4 numbers in fp16. Query, key, value, output: 4 · 40 numbers = 320 bytes. Scores:
# written and read, attention weights: written and read: 4 · 100 numbers = 800 bytes more.

# %% [markdown]
# ## Exercise 6.4: attention_bytes
#
# Write `attention_bytes(positions, head_dim, element_bytes)`: return the tuple (plain, fused) of bytes that one head moves:
# fused reads query, key and value and writes the output, plain moves the scores and attention weights too, without savings by the
# causal mask. 3 lines, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The tiny example is (1120, 320).</details>
# <details><summary>Hint 2</summary>4·n·d numbers for both; 4·n² more for plain.</details>


# %%
# EXERCISE attention_bytes
def attention_bytes(positions, head_dim, element_bytes):
    """Bytes moved by one head of attention: (plain, fused)."""
    ### BEGIN SOLUTION
    fused = 4 * positions * head_dim * element_bytes
    return fused + 4 * positions**2 * element_bytes, fused
    ### END SOLUTION


# %%
# CHECK attention_bytes
ch06.attention_bytes(attention_bytes)


# %%
def plain_attention(query, key, value):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value


LENGTHS = (128, 256, 512, 1024)
if device == "cuda":  # there, short texts are launch-bound
    LENGTHS = tuple(8 * n for n in LENGTHS)
DTYPE = torch.float16 if device == "cuda" else torch.float32
contestants, error, longest = {}, 0.0, LENGTHS[-1]
for n in LENGTHS:
    q, k, v = torch.randn(3, 1, 4, n, 64, device=device, dtype=DTYPE)
    contestants[f"plain {n}"] = lambda q=q, k=k, v=v: plain_attention(q, k, v)
    contestants[f"SDPA {n}"] = lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True)
    error = max(error, (contestants[f"plain {n}"]() - contestants[f"SDPA {n}"]()).abs().max().item())
attention = measure_interleaved(contestants, repeats=7, warmup=1, device=device)
print(f"largest difference between the two: {error:.1e}")
print(attention[f"plain {longest}"], attention[f"SDPA {longest}"], sep="\n")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for index, name in enumerate(("plain", "SDPA")):
    medians = [attention[f"{name} {n}"].median_s * 1e3 for n in LENGTHS]
    left.plot(LENGTHS, medians, label=name, **series_style(index))
    moved = [4 * (4 * n * 64 + (4 * n * n if name == "plain" else 0)) * DTYPE.itemsize / 1e6 for n in LENGTHS]
    right.plot(LENGTHS, moved, label=name, **series_style(index))
ratio = paired_ratio(attention[f"plain {longest}"].samples_s, attention[f"SDPA {longest}"].samples_s)
left.set(ylabel="time (ms)", title=f"At {longest} tokens plain takes {ratio} the time of SDPA")
right.set(ylabel="bytes moved (MB), computed", title="Scores grow with the square of the text")
for axes in (left, right):
    axes.set(xscale="log", yscale="log", xlabel="length of the text (tokens)")
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.legend()
plt.show()

# %% [markdown]
# *Left: measured time of attention, 4 heads of 64, medians of 7 rounds (float32 on a CPU, float16 on a GPU); right: the bytes, computed
# by the formula of the exercise.* SDPA also skips the blocks that the causal mask empties, and `plain_attention` writes two copies
# more, the scaled and the masked scores: the formula counts neither.

# %% [markdown]
# ## 7 · Will it fit?
#
# Three things need memory: weights (parameters · bits / 8), the cache (texts · positions · bytes for each), and a
# **reserve** for the CUDA context, the allocator's rounding and a step's activations: `labutils` takes 8%.
#
# **Tiny numbers:** an 8B model in bf16 is 16 GB. Of 24 GB, 22.08 are usable; 6.08 are left. With 128 KiB a position, a text
# of 8,192 positions takes 1.07 GB: five texts.

# %% [markdown]
# ## Exercise 6.5: largest_batch
#
# Write `largest_batch(memory_bytes, parameters, weight_bits, position_bytes, positions)`: how many texts fit beside the
# weights when 8% of the memory is kept back; 0 where none does. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>What is left of 92% of the memory once the weights are in it?</details>
# <details><summary>Hint 2</summary>Half a text is none, and where the weights alone are too large, the number would be negative.</details>


# %%
# EXERCISE largest_batch
def largest_batch(memory_bytes, parameters, weight_bits, position_bytes, positions):
    """How many texts of that length fit beside the weights."""
    ### BEGIN SOLUTION
    free = memory_bytes * (1 - 0.08) - parameters * weight_bits / 8
    return max(int(free // (positions * position_bytes)), 0)
    ### END SOLUTION


# %%
# CHECK largest_batch
ch06.largest_batch(largest_batch)

# %%
from labutils.acceleration.memory import DoesNotFit, Need, memory_guard, what_fits

need = Need(parameters=8e9, weight_bits=16, position_bytes=131_072, positions=8192, batch=16)
for name, memory in (("T4", 15e9), ("L4", 24e9), ("A100", 80e9)):
    print(f"{name}: {what_fits(need, memory)}")

# %% [markdown]
# And if it happens all the same? In a notebook, catching the error frees nothing: its traceback keeps every frame, and
# every frame its tensors. `memory_guard` clears the frames, empties CUDA's cache, and says what would fit. Here the error
# is **raised by hand**.

# %%
try:
    with memory_guard(lambda: what_fits(need, 24e9), device=device):
        large = torch.zeros(1000, device=device)
        raise torch.OutOfMemoryError("CUDA out of memory (raised by hand).")
except DoesNotFit as error:
    print(error)
print("and the device works:", torch.ones(3, device=device).sum().item())

# %% [markdown]
# ## 8 · torch.compile, and what makes it start over
#
# A compiler sees many small operators and makes one kernel of them: the numbers travel to the chip once. Six operators (silu,
# sigmoid, tanh, two products and a sum), one million numbers. The first call compiles.

# %%
import time


def small_operators(x):
    return silu(x) * torch.sigmoid(x) + 0.5 * torch.tanh(x)


# %%
numbers = torch.randn(2**20, device=device)
fused_operators = torch.compile(small_operators)
start = time.perf_counter()
try:
    fused_operators(numbers)
    first_s = time.perf_counter() - start
    both = {"eager": lambda: small_operators(numbers), "compiled": lambda: fused_operators(numbers)}
    timed = measure_interleaved(both, repeats=7, device=device)
    gain = paired_ratio(timed["eager"].samples_s, timed["compiled"].samples_s)
    saved = timed["eager"].median_s - timed["compiled"].median_s
    print(timed["eager"], timed["compiled"], f"compiled is {gain} as fast", sep="\n")
    print(
        f"first call: {first_s:.1f} s, paid back after {first_s / saved:.0f} calls" if saved > 0 else "never paid back"
    )
except Exception as error:  # no C++ compiler, say
    print(f"left out: {type(error).__name__}: {str(error).splitlines()[0]}")

# %% [markdown]
# What was compiled holds for what was seen: shapes, dtypes, and **Python numbers**. With `dynamic=False` anything new compiles again.
# PyTorch's default compiles a second time with the changed number as a symbol, and then stops. A recorded CUDA graph (section 9)
# holds one shape, and a kernel for one shape can be tuned to it, so a decoder keeps its shapes fixed. Two modes matter here:
# `mode="reduce-overhead"` puts the compiled step into a CUDA graph, and `"max-autotune"` also times several kernels for each product.
# A backend that only counts shows the compilations without waiting for a compiler.
#
# **Predict** the number of compilations for six steps of each: a position as a Python number; the position in a tensor;
# a text that grows; a buffer of fixed length.

# %%
compiled_graphs = []


def counting(graph, _inputs):
    compiled_graphs.append(graph)
    return graph.forward


def count_compilations(function, calls, dynamic):
    torch._dynamo.reset()
    compiled_graphs.clear()
    compiled = torch.compile(function, backend=counting, dynamic=dynamic)
    for arguments in calls:
        compiled(*arguments)
    return len(compiled_graphs)


def shift(x, position):
    return x + position


six_steps = {
    "position as a number": (shift, [(torch.ones(8), i) for i in range(6)]),
    "position in a tensor": (shift, [(torch.ones(8), torch.tensor(i)) for i in range(6)]),
    "a text that grows": (torch.sum, [(torch.ones(n),) for n in range(3, 9)]),
    "a buffer of fixed size": (torch.sum, [(torch.ones(8),) for _ in range(6)]),
}
for name, (function, calls) in six_steps.items():
    fixed, default = (count_compilations(function, calls, dynamic) for dynamic in (False, None))
    print(f"{name:<23} {fixed} with dynamic=False, {default} by default")
torch._dynamo.reset()

# %% [markdown]
# This is why a compiled decoder has a **static KV cache**: buffers of full length, the position in a tensor, a mask over
# what is still empty (`CompiledKVCache`, chapter 01). After eight recompilations of one function PyTorch stops compiling it and
# runs it eagerly. A counter kept as an *attribute* of a module (`self.calls += 1` in `forward`) gets there with PyTorch's default, too:
# only arguments become symbols, and each new value of an attribute compiles again. Keep such a number in a tensor. Each layer's buffer is a
# tensor of its own, for a compiler copies a tensor that is written in parts; and beside a mask, transformers under a compiler copies the
# keys and values for every query head of a group (GQA): little at these lengths, much at 8,000 positions.

# %% [markdown]
# ## 9 · CUDA graphs: launch once, replay for ever
#
# A CUDA graph records the *kernels and addresses* of a step, and one launch replays them all: no Python, no gaps. The rules
# follow from the addresses: inputs are copied **into** the recorded memory, outputs appear in the recorded memory, and
# Python's decisions are frozen. `Tape` has the same rules on a CPU; it is made for this lesson.
#
# **Predict** the three lines.

# %%
from labutils.acceleration.graphs import CaptureError, Tape

x = torch.tensor([1.0, 2.0])
tape, doubled = Tape.record(lambda: x * 2)
x = torch.tensor([10.0, 20.0])
tape.replay()
print("x bound to a new tensor: ", doubled.tolist())
y = torch.tensor([1.0, 2.0])
tape, doubled = Tape.record(lambda: y * 2)
y.copy_(torch.tensor([10.0, 20.0]))
tape.replay()
print("y overwritten in place:  ", doubled.tolist())
try:
    Tape.record(lambda: y * 2 if y.sum().item() > 0 else y)
except CaptureError as error:
    print("a decision on a number:  ", error)

# %% [markdown]
# ## Exercise 6.6: replayed_step (core)
#
# Write `replayed_step(step, example, record)`: `record(function)` runs a function without arguments once and returns
# (tape, output). Return a function of one tensor `x` that gives `step(x)` by replaying. Record once, on a copy of
# `example`. The results are kept by the caller, so hand out copies. 8 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Which memory does the tape read? How does a new x get there?</details>
# <details><summary>Hint 2</summary>Outside the function: a buffer of your own, and the recording. Inside: overwrite the buffer in place; and what will the next replay do to the output?</details>


# %%
# EXERCISE replayed_step
def replayed_step(step, example, record):
    """A function that replays a recorded step on new inputs."""
    ### BEGIN SOLUTION
    buffer = example.clone()
    tape, output = record(lambda: step(buffer))

    def call(x):
        buffer.copy_(x)
        tape.replay()
        return output.clone()

    return call
    ### END SOLUTION


# %%
# CHECK replayed_step
ch06.replayed_step(replayed_step)

# %% [markdown]
# `labutils`' `GraphedStep` does it with a real CUDA graph on a GPU. There one more thing matters: a few trial runs on another
# stream first, for what happens at a first call only (workspaces, autotuning) must not be recorded.

# %% [markdown]
# ## 10 · The ladder
#
# One function takes a model to a rung by its name; rungs below it are included, and what a device lacks is left out, with
# its reason. Every rung is then held against its **twin**: float32, the same (rounded) weights, no cache. So a rung may
# not hide a bug behind "it is only rounding". Which rungs would a few devices leave out?

# %%
from labutils.acceleration.ladder import NAMES, Device, climb

for gpu in (
    Device("cuda", "T4", (7, 5)),
    Device("cuda", "A100", (8, 0)),
    Device("cuda", "H200", (9, 0)),
    Device.of("cpu"),
):
    plan, skipped = climb(NAMES[-1], gpu)
    print(f"{gpu.name}: leaves out {', '.join(skipped) or 'nothing'}")
print("for example:", climb("bf16", Device("cuda", "T4", (7, 5)))[1]["bf16"])

# %% [markdown]
# Now LabLM. Compiling it takes about a minute on a CPU and is left to `python -m labutils bench gpu`; on a GPU it is
# part of the ladder. One warning names everything that is left out. (Expect no gain of 2:4 while one text decodes: PyTorch pads the one row
# to eight, because the sparse units are made for many rows. It is on the ladder for what it costs.)

# %%
from labutils.lab.models.ladder import accelerate

abilities = Device.of(device)
if device == "cpu":
    abilities = replace(abilities, compiler="it takes a minute on a CPU: python -m labutils bench gpu")
_, skipped = climb(NAMES[-1], abilities)
host_model = model.to("cpu")
rungs = {
    n: accelerate(host_model, n, device=device, abilities=abilities, warn=False) for n in NAMES if n not in skipped
}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    accelerate(host_model, "fp8", device=device, abilities=abilities)
print(*(warning.message for warning in caught if "left out" in str(warning.message)))

# %% [markdown]
# The ladder leaves 16-bit formats to GPUs. Here they stand beside it by themselves, on an otherwise plain model: whether
# they help on this CPU is a measurement. Then every one is held against its twin.

# %%
from labutils.acceleration.ladder import Plan
from labutils.lab.models.ladder import build, check_equal

if device == "cpu":
    for dtype in (torch.float16, torch.bfloat16):
        rungs[f"{str(dtype)[6:]} by itself"] = build(host_model, Plan(dtype=dtype))
text_ids = tokenizer(prompt * 2, return_tensors="pt")["input_ids"]
equal = {name: check_equal(rung, text_ids, prompt=text_ids.shape[1] // 2) for name, rung in rungs.items()}
for name, result in equal.items():
    print(f"{name:<18} {result}")

# %% [markdown]
# The same `generate` runs on every rung. Timed is one decoding step, all rungs interleaved. **Predict:** which of these
# rungs help on *this* device? (A rung that saves launches helps where launches cost, one that saves bytes where bytes cost.)

# %%
my_int4 = predict("int4's tokens/s over fp32's on the ladder, LabLM", None, unit="times")

# %%
from labutils.course.bench.gpu import bytes_read, decode_step

new_tokens = {name: rung.generate(prompt_ids, 12)[0, -12:].tolist() for name, rung in rungs.items()}
others = [name for name, ids in new_tokens.items() if ids != new_tokens["fp32"]]
print("rungs whose 12 greedy tokens differ from fp32's:", ", ".join(others) or "none")
decoding = {name: decode_step(rung, prompt_ids) for name, rung in rungs.items()}
calls = 20 if device == "cuda" else 3
timings = measure_interleaved(decoding, repeats=9, warmup=2, device=device, calls_per_sample=calls)
below = "fp32"
for name, timing in timings.items():
    rate = bytes_read(rungs[name].model) / timing.median_s / 1e9
    print(f"{timing}, {bytes_read(rungs[name].model) / 1e6:.1f} MB read at {rate:.1f} GB/s")
    base = below if name in NAMES else "fp32"
    r = paired_ratio(timings[base].samples_s, timing.samples_s)
    verdict = "faster than" if r.low > 1 else "slower than" if r.high < 1 else "not told apart from"
    below = name if name in NAMES else below
    print(f"    {verdict} {base}: {r}" if name != "fp32" else "    the base")
my_int4.compare(timings["fp32"].median_s / timings["int4"].median_s)
if "cuda graph" in decoding:
    print("profile of a replayed step:", profile(decoding["cuda graph"], device=device))

# %%
from labutils.lab.plots.acceleration import draw_ladder

figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
draw_ladder(timings, skipped, base="fp32", ax=axes)
plt.show()
for name, reason in skipped.items():
    print(f"{name}: {reason}")

# %% [markdown]
# *The figure shows the speed of one decoding step on each rung against the first one, with 95% intervals; rungs that this
# device lacks are named, not drawn.*
#
# **Explain.** Compare the bytes that two rungs read with their times: they are far from proportional. LabLM is small. The
# profile of section 1 says which share of a step no kernel runs, and no format makes that shorter; and a small kernel takes
# its time to start, whatever it reads. A rung may also lose against the one below it: the second lines say which did.

# %% [markdown]
# ### Warm and cold weights
#
# A CPU keeps in its **caches** what it read last. LabLM's 23 MB may fit into the largest of them; then a step that follows itself reads its
# weights from there (*warm*). A step whose weights other models have pushed out meanwhile reads them from memory (*cold*), and so does
# every step of a model of gigabytes. On the ladder above the models took turns, with several steps in a row each (`calls`). Which time
# is right depends on the question: a server that does nothing else is warm, a laptop between two other programs is cold.
#
# So time one step both ways: before each cold sample we read an array far larger than any cache, outside the clock.
# **Predict:** how many times as long does the cold step take, and which of the two does the ladder's "static cache" resemble?

# %%
my_cold = predict("a cold step of LabLM over a warm one", None, unit="times")

# %%
from labutils.measurement.roofline import probe_working_set_bytes

evicting = torch.ones(probe_working_set_bytes() // 4, device=device)
same_step = decoding["static cache"]
cold_and_warm = measure_interleaved(
    {"warm": same_step, "cold": same_step},
    repeats=15,
    warmup=2,
    device=device,
    before=lambda name: evicting.sum() if name == "cold" else same_step(),
)
colder = paired_ratio(cold_and_warm["cold"].samples_s, cold_and_warm["warm"].samples_s)
print(*cold_and_warm.values(), f"cold takes {colder} the time of warm", sep="\n")
extra_s = cold_and_warm["cold"].median_s - cold_and_warm["warm"].median_s
fetch_s = bytes_read(rungs["static cache"].model) / machine.bandwidth_bytes_per_s
print(
    f"the difference: {extra_s * 1e3:.2f} ms; reading the weights once at the measured bandwidth: {fetch_s * 1e3:.2f} ms"
)
print(f"“static cache” on the ladder, among other models: {timings['static cache'].median_s * 1e3:.2f} ms")
my_cold.compare(colder.value)
del evicting

# %% [markdown]
# **Explain.** The interval says whether this machine has such a cache at all (a virtual machine shares it with neighbours, and on a GPU
# it is the L2). Where cold is slower, compare the difference with the time of reading all weights once at the bandwidth of a long sum. A smaller
# difference says that a cache saves a part of that only; a larger one, that more than the weights was pushed out, or is read more slowly. Of
# the ladder's steps only the first of each sample may be cold. The stored run below takes one step a sample, so there all may be, and its second panel has a model that is always cold.

# %% [markdown]
# On a GPU the gains are others; published for a 7B Llama on an A100 (gpt-fast): eager 25.5 tokens/s, compiled with a static cache 107,
# int8 157, int4 202.
# `python -m labutils bench gpu` runs all rungs on a 0.2B model, too large for most caches, beside transformers' own
# `generate` and torchao. What it wrote on this project's machines stands in `data/results`.

# %%
from labutils.course.bench.gpu import BASE, ladder_files, read_ladders
from labutils.lab.paths import DATA

stored = ladder_files(DATA / "results")
if "h200.jsonl" not in {path.name for path in stored}:
    print("data/results/h200.jsonl does not exist: nothing was ever run on an H200")
for path in stored:
    ladders, where = read_ladders(path), f"in {path.name}"
    lines = -(-len(ladders) // 2)
    figure, panels = plt.subplots(lines, 2, figsize=(12, 4.4 * lines), layout="constrained", squeeze=False)
    for axes, (its_model, found) in zip(panels.flat, ladders.items(), strict=False):
        draw_ladder(found, {}, base=BASE, ax=axes, where=where)
        axes.set_title(f"{its_model[:40]}\n{axes.get_title()}", fontsize="medium")
    for axes in panels.flat[len(ladders) :]:
        axes.axis("off")
    plt.show()

# %% [markdown]
# *The figures show the stored runs of `bench gpu`, one figure a file in `data/results` and one panel a model: speed of each rung and of
# other people's paths against the first rung, with 95% intervals. Where an interval reaches over the dotted line, nothing was shown.*

# %%
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.measurement import ledger

documents = held_out_documents(limit_bytes=1000)
baseline = bits_by_document(host_model, tokenizer, documents)
for name in ("fp32", "int8", "int4"):
    changed = baseline if name == "fp32" else bits_by_document(rungs[name].twin, tokenizer, documents)
    quality = paired_quality(changed, baseline)
    record = ledger.Record(
        technique=f"ladder: {name}", model="lablm", device=device, dtype=str(rungs[name].plan.dtype)[6:],
        threads=torch.get_num_threads(), prompt_tokens=prompt_ids.shape[1], output_tokens=1,
        samples=[1 / s for s in timings[name].samples_s], bits_per_byte=quality.bits_per_byte,
        baseline_bits_per_byte=quality.baseline_bits_per_byte, chapter="06",
        quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in documents),
    )  # fmt: skip
    ledger.append(record)
    print(f"{name}: {record.tokens_per_s:.0f} tokens/s, {quality}")

# %% [markdown]
# ## 11 · The CPU is an accelerator too
#
# It has the same three limits, and levers of its own: compile, formats that its units know, kernels that unpack inside (all
# on the ladder above), and **threads**. One core alone often cannot use the whole memory: it has only so many cache lines of 64
# bytes on their way at a time. Memory hangs on **channels**, 8 bytes wide. By Little's law (Little 1961),
#
# $$\text{threads} = \left\lceil \frac{\text{channels} \cdot \text{transfers/s} \cdot 8}{\text{lines} \cdot 64 / \text{latency}} \right\rceil$$
#
# **Tiny numbers:** 12 requests for cache lines in flight, each taking 80 ns: 9.6 GB/s a core. Two channels of DDR4-3200: 51.2 GB/s.
# So six threads.

# %% [markdown]
# ## Exercise 6.7: threads_to_saturate
#
# Write `threads_to_saturate(channels, transfers_per_s, lines, latency_s)`: how many threads fill the channels, a whole
# number. 3 lines, 6 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>What do all channels carry in a second? What does one thread have on its way in a second?</details>
# <details><summary>Hint 2</summary>Both are bytes a second: a transfer moves 8 bytes, a line holds 64. Half a thread is none that fills: <code>math.ceil</code>.</details>


# %%
# EXERCISE threads_to_saturate
def threads_to_saturate(channels, transfers_per_s, lines, latency_s):
    """How many threads fill the memory channels."""
    ### BEGIN SOLUTION
    memory = channels * transfers_per_s * 8
    core = lines * 64 / latency_s
    return math.ceil(memory / core)
    ### END SOLUTION


# %%
# CHECK threads_to_saturate
from labutils.course.checks import ch06_machine

ch06_machine.threads_to_saturate(threads_to_saturate)

# %% [markdown]
# Now this machine: a long sum, which only reads, and a decoding step of LabLM in float32, each with every number of
# threads, interleaved. **Predict:** which of the two gains by a second thread?

# %%
from labutils.acceleration.memory import channels_bytes_per_s
from labutils.measurement.threads import available_cores, best_thread_count, thread_candidates

numbers = torch.ones(probe_working_set_bytes() // 4)
jobs = {"reading memory": numbers.sum}
if device == "cpu":
    jobs["a decoding step"] = decoding["fp32"]
counts = thread_candidates(available_cores())
choices = {name: best_thread_count(job, candidates=counts, repeats=5) for name, job in jobs.items()}
for name, choice in choices.items():
    print(f"{name}: best with {choice} (5 rounds, medians)")

# %%
rates = {n: numbers.nbytes / t.median_s for n, t in choices["reading memory"].timings.items()}
print("memory is read, by threads:", ", ".join(f"{n}: {rate / 1e9:.1f} GB/s" for n, rate in rates.items()))
print(f"if a line took 80 ns here too, one thread would have {rates[1] * 80e-9 / 64:.0f} of them in flight")
for memory, transfers in (("DDR4-3200", 3.2e9), ("DDR5-4800", 4.8e9)):
    one = channels_bytes_per_s(1, transfers)
    print(
        f"one channel of {memory}: {one / 1e9:.1f} GB/s; reached here: {max(rates.values()) / one:.2f} channels' worth"
    )
del numbers, jobs

# %%
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for index, (name, choice) in enumerate(choices.items()):
    one = choice.timings[1].samples_s
    gains = [paired_ratio(one, choice.timings[n].samples_s) for n in counts]
    bars = [[max(r.value - r.low, 0) for r in gains], [max(r.high - r.value, 0) for r in gains]]
    axes.errorbar(counts, [r.value for r in gains], yerr=bars, capsize=3, label=name, **series_style(index))
best = ", ".join(f"{name}: {choice.threads}" for name, choice in choices.items())
axes.set(xlabel="threads", ylabel="speed against one thread (times)", title=f"Best median at threads: {best}")
axes.set_xticks(counts)
axes.axhline(1.0, color="0.6", linestyle=":")
axes.grid(alpha=0.25)
axes.legend()
plt.show()

# %% [markdown]
# *The figure shows the speed with several threads against one, with 95% intervals over 5 rounds.*
#
# **Explain.** Reading gains until the channels are full; a few threads need not get that far. A step of a small model is hundreds of
# small operators, each of which starts and joins its threads, so compare its line with the other. And threads that outnumber the
# *free* cores wait for one another, which can cost more than they bring. How many channels there are, a program may not ask; the board's manual
# says so, and a virtual machine shares them with its neighbours.

# %% [markdown]
# ### A benchmark that slowed the competitor it loaded
#
# To compare engines, this project once loaded them all into one process and timed them in turn. Its own decoder, with two
# threads on two cores, lost most of its speed there, while no other engine had anything to do. A thread that waits for work
# may **spin**: it starts sooner than one that sleeps, and holds a core all the while. Each engine had brought its own
# threads, and those of the idle ones spun.
#
# Here is the same in small. Four processes time one product in NumPy with a thread for each core. Two have nothing else in
# them. In the other two, PyTorch has computed something once and is idle since: in one its threads are told to spin, as
# some engines' threads do without being told, in the other to sleep. Whoever is not asked is *stopped* (`SIGSTOP`), so that the four cannot
# disturb one another. **Predict:** by how much does each idle engine slow its process?

# %%
import signal
import sys

from labutils.course.bench.child import Child, environment

PROGRAM = """
import sys, time
import numpy as np
if "beside" in sys.argv[1]:
    import torch
    torch.ones(512, 512) @ torch.ones(512, 512)  # starts its threads
weights, x = np.ones((4096, 1024), np.float32), np.ones((1024, 8), np.float32)
print("ready", flush=True)
for line in sys.stdin:
    weights @ x
    began = time.perf_counter()
    for _ in range(20):
        weights @ x
    print(time.perf_counter() - began, flush=True)
"""
names = {"alone": "ACTIVE", "alone, another process": "ACTIVE"}
names |= {"beside an idle engine that spins": "ACTIVE", "beside one that sleeps": "PASSIVE"}
settings, spent = environment(available_cores()), {name: [] for name in names}
if hasattr(signal, "SIGSTOP"):
    children = {
        name: Child([sys.executable, "-c", PROGRAM, name], environment=settings | {"OMP_WAIT_POLICY": policy})
        for name, policy in names.items()
    }
    jobs = {name: (lambda name=name: spent[name].append(children[name].ask("go"))) for name in children}
    measure_interleaved(jobs, repeats=9, warmup=1)
    for child in children.values():
        child.close()
else:
    print("this system cannot stop a process, so the four would disturb one another: not measured")

# %%
if spent["alone"]:
    seconds = {name: its[1:] for name, its in spent.items()}  # without the warm-up
    again, idle, asleep = (paired_ratio(seconds[name], seconds["alone"]) for name in list(names)[1:])
    figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
    for index, (name, its) in enumerate(seconds.items()):
        axes.plot([50 * s for s in its], [name] * len(its), linestyle="", alpha=0.6, **series_style(index))
    said = "no difference seen: {}" if idle.low <= 1 <= idle.high else "{} of the time alone"
    axes.set(
        xlabel="ms a product, nine rounds", title=f"Beside an engine that spins, {said.format(idle)}", xlim=(0, None)
    )
    plt.show()
    print(f"the same program in two processes: {again}; beside one that sleeps: {asleep}; on {available_cores()} cores")

# %% [markdown]
# *Milliseconds of a product in each of the four processes; a point is a round. The title compares the third process with the first,
# round by round.*
#
# **Explain.** The two equal processes show how far equal things differ here: a difference as small as theirs says nothing. The fourth has
# the same two libraries as the third: what the third loses and it does not, spinning costs. On one core there is no second thread, and so
# nothing to see. `python -m labutils bench quantization` gives each engine a process of its own and
# stops it while another is timed; it, too, times one engine in two processes before it believes a difference.

# %% [markdown]
# ## 12 · A kernel of your own
#
# Where no library has the kernel you need, you write it. In **Triton** you write what *one program* does with *a block* of
# numbers; a grid says how many programs there are. Three things make a kernel: where the block lies (`offsets`), what
# lies behind the end (`mask`), and what is computed between `tl.load` and `tl.store`.
#
# On a GPU the kernel is compiled. Here Triton's **interpreter** runs one program after the other, and `interpret` lists all
# memory accesses. **Tiny numbers:** ten numbers, blocks of four.

# %%
from labutils.acceleration import kernels

if has_triton:
    first, second, total = torch.arange(10.0), torch.ones(10), torch.zeros(10)
    accesses = interpret(kernels.add_kernel, (3,), first, second, total, 10, BLOCK=4)
    print(total.tolist())
    print([(a.program, a.kind, len(a.addresses)) for a in accesses])

# %%
from labutils.lab.plots.acceleration import draw_accesses


def where(**tensors):
    return {name: (t.data_ptr(), t.numel(), t.element_size()) for name, t in tensors.items()}


if has_triton:
    figure, panels = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained", sharey=True)
    title = "Each program touches one block; the mask cuts the last one"
    draw_accesses(accesses, where(x=first, y=second, out=total), title=title, axes=panels)
    plt.show()

# %% [markdown]
# *The figure shows which element of x, y and out each program touches, and in which order.* Neighbours are
# touched together: a GPU fetches them in one piece (*coalesced*). A kernel that jumps needs a fetch for each number.

# %% [markdown]
# ## Exercise 6.8: saxpy_kernel (core)
#
# Write the kernel of out = a·x + y for n numbers. `x`, `y`, `out` are pointers: `tl.load(x + offsets, mask=…)`. The
# arguments' order is given. 5 lines, 10 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Program i takes the numbers from i·BLOCK on: <code>tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)</code>.</details>
# <details><summary>Hint 2</summary><code>mask = offsets &lt; n</code>, given to both loads and to <code>tl.store(out + offsets, …, mask=mask)</code>.</details>


# %%
# EXERCISE saxpy_kernel
def saxpy_kernel(x, y, out, a, n, BLOCK: "tl.constexpr"):
    """Stores a * x + y."""
    ### BEGIN SOLUTION
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    result = a * tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask)
    tl.store(out + offsets, result, mask=mask)
    ### END SOLUTION


# %%
# CHECK saxpy_kernel
from labutils.course.checks import ch06_kernels

ch06_kernels.saxpy_kernel(saxpy_kernel)

# %% [markdown]
# (Where there is a GPU, this check and the next two also compile your kernel and run it there.)
#
# So far `tl` and the launch came from `labutils`. A program of your own needs three more lines: the decorator `triton.jit`, a **grid**
# in square brackets, and `triton.autotune`, which times some block sizes and numbers of warps at the first call for each n, and keeps
# the best. Here is a whole file. Without a GPU, `TRITON_INTERPRET=1` runs it in slow motion, and there is nothing to tune.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import torch, triton
import triton.language as tl

device, n = ("cuda", 10**7) if torch.cuda.is_available() else ("cpu", 10**4)
sizes = [(256, 4), (1024, 4), (4096, 8)] if device == "cuda" else [(1024, 4)]

@triton.autotune(configs=[triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in sizes], key=["n"])
@triton.jit
def saxpy_kernel(x, y, out, a, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out + offsets, a * tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)

x, y, out = torch.randn(3, n, device=device)
saxpy_kernel[lambda chosen: (triton.cdiv(n, chosen["BLOCK"]),)](x, y, out, 2.0, n)
print(f"{device}: largest error {(out - (2 * x + y)).abs().max().item():.1e}; chosen: {saxpy_kernel.best_config}")
"""

# %%
if has_triton:
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "saxpy.py").write_text(PROGRAM, encoding="utf-8")
        slow = {} if device == "cuda" else {"TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, file], env=os.environ | slow, capture_output=True, encoding="utf-8")
    print(done.stdout or done.stderr)

# %% [markdown]
# Now a program for each row. transformers computes RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467, equation 4) by several operators, each a
# pass over memory; a fused kernel reads the row once and writes it once:
#
# $$y_j = \frac{x_j}{\sqrt{\tfrac{1}{n}\sum_k x_k^2 + \varepsilon}}\; g_j$$
#
# **Tiny numbers:** x = (3, 4), g = (1, 2), ε = 0: the mean square is 12.5, so y = (0.849, 2.263).

# %% [markdown]
# ## Exercise 6.9: rms_norm_kernel (core)
#
# Write the kernel: program i takes row i of `x` (rows of n numbers, one after the other), `gain` has n numbers, BLOCK is a
# power of two of at least n. 6 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Row i begins at <code>x + tl.program_id(0) * n</code>. Masked elements should be 0 in a sum: <code>other=0.0</code>.</details>
# <details><summary>Hint 2</summary><code>1 / tl.sqrt(tl.sum(row * row, axis=0) / n + eps)</code></details>


# %%
# EXERCISE rms_norm_kernel
def rms_norm_kernel(x, gain, out, n, eps, BLOCK: "tl.constexpr"):
    """Stores the normalised row."""
    ### BEGIN SOLUTION
    start, columns = tl.program_id(0) * n, tl.arange(0, BLOCK)
    mask = columns < n
    row = tl.load(x + start + columns, mask=mask, other=0.0)
    inverse = 1 / tl.sqrt(tl.sum(row * row, axis=0) / n + eps)
    tl.store(out + start + columns, row * inverse * tl.load(gain + columns, mask=mask, other=0.0), mask=mask)
    ### END SOLUTION


# %%
# CHECK rms_norm_kernel
ch06_kernels.rms_norm_kernel(rms_norm_kernel)

# %% [markdown]
# The kernel that decoding is made of: a matrix of int8 codes times one vector. A row has one scale, so it can be moved outside the sum,
#
# $$y_r = \sum_k s_r\, q_{rk}\, x_k = s_r \sum_k q_{rk}\, x_k ,$$
#
# so the weights travel as bytes and become floats *inside*. Dequantizing first would read the bytes, then write and read the whole
# matrix as floats: more traffic than fp16 weights ever cause. This kernel avoids it; whether it is fast on a GPU was never measured
# here.

# %% [markdown]
# ## Exercise 6.10: int8_gemv_kernel (core)
#
# Write it: program r takes row r of `codes` (n int8 numbers), walks along it in blocks, and stores one number.
# 8 lines, 15 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary><code>for start in range(0, n, BLOCK)</code> works inside a kernel. Keep a sum for each element of the block, add them up at the end.</details>
# <details><summary>Hint 2</summary><code>sums = tl.zeros((BLOCK,), dtype=tl.float32)</code>; <code>k = start + tl.arange(0, BLOCK)</code>; <code>mask=k &lt; n</code> for codes and x; store <code>tl.sum(sums, axis=0) * tl.load(scales + r)</code> at <code>out + r</code>.</details>


# %%
# EXERCISE int8_gemv_kernel
def int8_gemv_kernel(codes, scales, x, out, n, BLOCK: "tl.constexpr"):
    """Stores scale times the sum of code times input, for one row."""
    ### BEGIN SOLUTION
    r = tl.program_id(0)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        k = start + tl.arange(0, BLOCK)
        q = tl.load(codes + r * n + k, mask=k < n, other=0)
        sums += q * tl.load(x + k, mask=k < n, other=0.0)
    tl.store(out + r, tl.sum(sums, axis=0) * tl.load(scales + r))
    ### END SOLUTION


# %%
# CHECK int8_gemv_kernel
ch06_kernels.int8_gemv_kernel(int8_gemv_kernel)

# %% [markdown]
# How wide are its loads? A GPU's thread can fetch 16 bytes at once. Block size and warps decide whether it does: with 128 threads,
# 128 int8 codes are one byte for each. The compiler's **PTX**, an assembly language for all NVIDIA GPUs, tells, and needs no GPU.
# **Predict:** how does the kernel read its codes in blocks of 1 × 128, and in blocks of 4 rows × 512?

# %%
from collections import Counter

from labutils.acceleration import triton_ops as ops

if has_triton:
    import re

    types = {"codes": "*i8", "scales": "*fp32", "x": "*fp16", "out": "*fp32", "rows": "i32", "n": "i32"}
    for rows, block in ((1, 128), (4, 512)):
        blocks = {"ROWS": rows, "BLOCK": block}
        assembly = ops.machine_code(kernels.int8_gemv_kernel, types, blocks, capability=80)
        print(f"{rows} x {block}:", dict(Counter(re.findall(r"ld\.global\S*", assembly))))

# %% [markdown]
# `v4.b32` is four times 32 bits, 16 bytes; `b8` is one. (Loads of x, of the scales and of a row's end are in the list too.)
#
# `labutils`' kernels give each program several rows; the int4 one unpacks two codes from a byte. Their memory, for 4 rows of
# 64 weights, in four groups:

# %%
if has_triton:
    packed = torch.randint(0, 256, (4, 32), dtype=torch.uint8)
    scales, inputs, result = torch.rand(4, 4), torch.randn(64), torch.zeros(4)
    accesses = interpret(
        kernels.int4_gemv_kernel, (2,), packed, scales, inputs, result, 4, 64, GROUP=16, GROUPS=1, ROWS=2
    )
    figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained", sharey=True)
    title = f"128 weights of a program travel as {packed.numel() // 2} bytes; every program reads all of x"
    draw_accesses(accesses, where(codes=packed, scales=scales, x=inputs), title=title, axes=panels)
    plt.show()

# %% [markdown]
# *The figure shows the int4 kernel at work, group after group from bottom to top: codes are read once, x by every
# program (on a GPU, from its cache).*
#
# ### Flash attention
#
# The softmax of a row needs its maximum and its sum, and so, it seems, the whole row. It does not (Milakov and Gimelshein
# 2018, arXiv:1805.02867). Keep the maximum m so far, the sum ℓ of $e^{s-m}$, and the output o, not yet divided; a new block of
# scores s with values V changes them so:
#
# $$m' = \max(m, \max_j s_j), \qquad \ell' = \ell\, e^{m-m'} + \sum_j e^{s_j-m'}, \qquad o' = o\, e^{m-m'} + \sum_j e^{s_j-m'}\, V_j$$
#
# At the end the output is o / ℓ. **Tiny numbers:** m = 0, ℓ = 1, then one score ln 2: m' = ln 2, ℓ' = 1/2 + 1.

# %% [markdown]
# ## Exercise 6.11: online_update (core)
#
# Write `online_update(m, total, output, scores, values)` in PyTorch: `m` and `total` are tensors of shape (), `output`
# (head_dim,), `scores` (block,), `values` (block, head_dim). Return the new (m, total, output), not yet divided.
# 5 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Everything old was computed with the old maximum. By what factor is it too large now?</details>
# <details><summary>Hint 2</summary><code>larger = torch.maximum(m, scores.max())</code>, <code>shrink = torch.exp(m - larger)</code>, <code>powers = torch.exp(scores - larger)</code>.</details>


# %%
# EXERCISE online_update
def online_update(m, total, output, scores, values):
    """The running softmax after one more block."""
    ### BEGIN SOLUTION
    larger = torch.maximum(m, scores.max())
    shrink, powers = torch.exp(m - larger), torch.exp(scores - larger)
    return larger, total * shrink + powers.sum(), output * shrink + powers @ values
    ### END SOLUTION


# %%
# CHECK online_update
ch06_kernels.online_update(online_update)

# %% [markdown]
# With it, attention never holds more than a block of scores. All six kernels of `labutils` against PyTorch in float64, by
# relative error $\lVert \hat y - y \rVert / \lVert y \rVert$; float32 rounds by up to 6e-8, and a few roundings add up.


# %%
def against_float64(place):
    """Name to (kernel's result, PyTorch's in float64)."""
    a, b, gain = torch.randn(5, 96, device=place), torch.randn(5, 96, device=place), torch.randn(96, device=place)
    codes = torch.randint(-127, 128, (5, 96), dtype=torch.int8, device=place)
    nibbles, vector = torch.randint(0, 16, (5, 96), device=place), torch.randn(96, device=place)
    row_scales, group_scales = torch.rand(5, device=place), torch.rand(5, 3, device=place)
    int4_weight = (nibbles - 8).double() * group_scales.double().repeat_interleave(32, dim=1)
    q, k, v = torch.randn(3, 2, 70, 16, device=place)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    return {
        "vector add": (ops.add(a[0], b[0]), a[0].double() + b[0].double()),
        "softmax": (ops.softmax(a), a.double().softmax(dim=1)),
        "RMSNorm": (ops.rms_norm(a, gain), torch.nn.functional.rms_norm(a.double(), (96,), gain.double(), 1e-6)),
        "int8 GEMV": (ops.int8_gemv(codes, row_scales, vector), row_scales.double() * (codes.double() @ vector.double())),
        "int4 GEMV": (ops.int4_gemv((nibbles[:, ::2] | nibbles[:, 1::2] << 4).byte(), group_scales, vector), int4_weight @ vector.double()),
        "flash attention": (ops.flash_attention(q, k, v), exact),
    }  # fmt: skip


# %%
for place in ("cpu", "cuda") if device == "cuda" else ("cpu",):
    for name, (ours, exact) in against_float64(place).items() if has_triton else ():
        print(
            f"{'compiled' if place == 'cuda' else 'interpreted'}: {name:<16} error {ops.relative_error(ours, exact):.1e}"
        )
if device == "cuda" and has_triton:
    # Eight matrices in turn: half a gigabyte of codes, more than any L2 holds.
    codes = [torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device=device) for _ in range(8)]
    halves = [matrix.half() for matrix in codes]
    x, scales = torch.randn(8192, dtype=torch.half, device=device), torch.ones(8192, device=device)
    race = {
        "fp16 by PyTorch": lambda: [matrix @ x for matrix in halves],
        "int8 by our kernel": lambda: [ops.int8_gemv(matrix, scales, x) for matrix in codes],
    }
    raced = measure_interleaved(race, device=device, calls_per_sample=5)
    for timing, matrices in zip(raced.values(), (halves, codes), strict=True):
        print(f"{timing}: {sum(matrix.nbytes for matrix in matrices) / timing.median_s / 1e9:.0f} GB/s")
else:
    print("compiled and timed: not run on a GPU")

# %% [markdown]
# Right on paper; does it run on a GPU? That needs one. But Triton's *compiler* needs none: it makes
# machine code for NVIDIA's GPUs on a computer that has none. Does the attention kernel use the matrix units of each?

# %%
if has_triton:
    pointers = dict.fromkeys(("q", "k", "v", "out"), "*fp16") | {"positions": "i32", "scale": "fp32"}
    for gpu, capability, queries in (("T4", 75, 32), ("A100", 80, 32), ("H200", 90, 32), ("H200", 90, 64)):
        sizes = {"CAUSAL": True, "DIM": 64, "QUERIES": queries, "KEYS": queries}
        assembly = ops.machine_code(kernels.flash_attention_kernel, pointers, sizes, capability=capability)
        found = sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)[\w.]*", assembly)))
        print(f"{gpu}, {queries} queries a block: {', '.join(found) or 'no matrix instructions'}")

# %% [markdown]
# Two lines deserve a word. *T4:* Triton gave up Turing's matrix instructions (its pull request 5066, in version 3.3), so there this
# kernel multiplies with ordinary units. *H200:* `mma.sync` is Ampere's instruction. Hopper's own, `wgmma`, multiplies 64 rows at a time,
# and a block of 32 queries has too few. Compiled is not fast: block sizes, numbers of warps and the order of memory accesses are
# chosen by measuring, on the device itself.

# %% [markdown]
# ### What production kernels add
#
# - **Flash-decoding** (Dao et al. 2023): decoding has one query, so one program a head leaves most SMs idle. The keys are split among
#   several programs, and exercise 6.11's update merges their (m, ℓ, o). Products with few rows do the same (*split-K*).
# - **Marlin** (Frantar et al. 2024, arXiv:2408.11743) stores 4-bit codes in the order in which the threads of a warp hand them to the
#   tensor cores, so that every load is 16 bytes and nothing is shuffled.
# - **fp8** (Ada, Hopper) and, on Blackwell, 4-bit floats go into the tensor cores as they are: **MXFP4** with a power of two as the
#   scale of 32 numbers, **NVFP4** with an fp8 scale for 16.
#
# `labutils`' kernels do none of this; compare with them before you blame your own GPU.

# %% [markdown]
# Write what Blackwell's tensor cores do with NVFP4 (chapter 02 makes its codes). A code is an E2M1 float: its lower three bits
# name one of 0, 0.5, 1, 1.5, 2, 3, 4, 6, the fourth is the sign. With t for the tensor's scale and s for a block's,
#
# $$y_r = t \sum_b s_{rb} \sum_{k \in b} e_{rk}\, x_k$$
#
# so the products are of short numbers, and each scale is used once for 16 of them. **Tiny numbers:** t = 2, one block with s = 3, codes 7
# and 9 (6 and −0.5), then zeros, x = 1: y = 2 · 3 · 5.5 = 33.

# %% [markdown]
# ## Exercise 6.12: nvfp4_gemv
#
# Write `nvfp4_gemv(codes, scales, tensor_scale, x)` in PyTorch: codes (rows, n / 2) uint8, in each byte input 2i in the low half and 2i + 1
# in the high half; scales (rows, n / 16) float; x (n,). Return (rows,). 6 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Put the 16 values into a tensor, and index it with the codes. In which order do a byte's two halves stand beside x?</details>
# <details><summary>Hint 2</summary><code>torch.stack([low, high], dim=-1).flatten(1)</code> puts neighbours side by side; <code>unflatten(1, (-1, 16))</code> makes the blocks. Scale after the sum.</details>


# %%
# EXERCISE nvfp4_gemv
def nvfp4_gemv(codes, scales, tensor_scale, x):
    """A matrix of NVFP4 codes times a vector."""
    ### BEGIN SOLUTION
    positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat([positive, -positive])
    values = table[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).long()]
    blocks = (values * x).unflatten(1, (-1, 16)).sum(dim=-1)
    return tensor_scale * (blocks * scales).sum(dim=-1)
    ### END SOLUTION


# %%
# CHECK nvfp4_gemv
ch06_machine.nvfp4_gemv(nvfp4_gemv)

# %% [markdown]
# What does the format cost in accuracy, at how many bits? LabLM's 42 matrices times 20 random vectors, in NVFP4, in MXFP4, and in int4 with a
# 16-bit scale for 32. **Predict** the order of the three errors.

# %%
from labutils.lab.layers.linears import linear_layers
from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.floats import mxfp4_dequantize, mxfp4_quantize, nvfp4_dequantize, nvfp4_quantize

int4 = Scheme(4, granularity="group", group_size=32, scale_dtype=torch.float16)
ways_to_store = {
    "NVFP4, an 8-bit scale for 16": (4 + 8 / 16, lambda w: nvfp4_dequantize(*nvfp4_quantize(w))),
    "MXFP4, an 8-bit scale for 32": (4 + 8 / 32, lambda w: mxfp4_dequantize(*mxfp4_quantize(w))),
    "int4, a 16-bit scale for 32": (4 + 16 / 32, lambda w: fake_quantize(w, int4)),
}
errors = {name: [] for name in ways_to_store}
for _, layer in linear_layers(host_model):
    w = layer.weight.detach()
    vectors = torch.randn(w.shape[1], 20, generator=torch.Generator().manual_seed(0))
    for name, (_, stored_and_back) in ways_to_store.items():
        errors[name].append(ops.relative_error(stored_and_back(w) @ vectors, w @ vectors))
least = [min(errors, key=lambda name: errors[name][i]) for i in range(len(errors[name]))]
for name, (bits, _) in ways_to_store.items():
    middle = statistics.median(errors[name])
    print(
        f"{name:<30}{bits:5.2f} bits a weight, median error {middle:.3f}, least in {least.count(name)} of {len(least)}"
    )

# %% [markdown]
# (An error is $\lVert \hat y - y \rVert / \lVert y \rVert$ of the product.) MXFP4 saves a quarter of a bit against NVFP4: half as many
# scales, and each a power of two; what each of the two costs, this table does not separate. NVFP4 and int4 take the same bits: NVFP4 has twice as
# many scales, and its codes lie closer together near zero.

# %% [markdown]
# ## 13 · What does it cost?
#
# Speed becomes money: a million tokens at v tokens/s take $10^6/v/3600$ hours; each costs the rent, and the energy if it
# is not included. **Tiny numbers:** 100 tokens/s, 3.60 an hour: 2.78 hours, 10.00.

# %% [markdown]
# Energy is read from a counter (NVML on NVIDIA GPUs, RAPL on some CPUs) or not stated at all: a TDP times seconds is an
# estimate, not a measurement.

# %%
from labutils.acceleration.cost import cost_per_million, joules_per_token
from labutils.measurement.energy import energy
from labutils.measurement.timing import synchronize

if device == "cuda":
    install_extra("nvml")  # the driver's counters, for Python
per_token = {}
for name in ("fp32", "int8"):
    tokens, end = 0, time.perf_counter() + (5 if device == "cuda" else 1)  # a GPU's counter moves ten times a second
    with energy() as spent:
        while time.perf_counter() < end:
            decoding[name]()
            tokens += 1
            synchronize(device)
    per_token[name] = joules_per_token(spent, tokens)
    print(f"{name}: energy of {tokens} tokens: {spent}")
    cost = cost_per_million(1 / timings[name].median_s, price_per_hour=1.0, joules_per_token=per_token[name])
    print(f"{name}, at a made-up price of 1.00 an hour: {cost}")

# %% [markdown]
# **Question for the calculator:** your machine is in use a third of the time. What does a million tokens really cost, and
# which is cheaper: twice the speed, or twice the use? The plain function is `cost_per_million(...)` above.

# %%
from labutils.lab.widgets.acceleration import cost_widget

cost_widget(1 / timings["fp32"].median_s, joules_per_token=per_token["fp32"])

# %% [markdown]
# ## What you have
#
# - three limits told apart: launches, memory, arithmetic;
# - a timing that waits, a batch that balances, copies that hide, an error that says what would fit;
# - thirteen rungs by name, each held against its twin, each with its reason where a device lacks it;
# - kernels of your own, right to a few roundings and compiled for GPUs that were not there;
# - threads and formats of a CPU, measured where you are, and its channels, computed;
# - the price of a million tokens.
#
# This machine's ladder stands in section 10. **On a GPU: not run**, for none could be had: `data/results/h200.jsonl` does
# not exist. The tests for GPUs wait for one (`python -m labutils test -m gpu`).

# %% [markdown]
# **Open question:** your model decodes at 30% of a GPU's memory bandwidth. Name three different causes, for each the one
# measurement that would confirm it, and the rung that answers it.
#
# Next: **07 · TPU and XLA**.

# %%
calibration()

# %%
from labutils.course.progress import progress

progress()

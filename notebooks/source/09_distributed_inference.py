# %% [markdown]
# # 09 · Multi-GPU and distributed inference
#
# **Goal:** spread requests over nodes that are slow, stop and die without losing one, and spread one model over devices
# so that its answers stay the same; know what each way sends over the link, and what the link then costs.
#
# | | |
# | --- | --- |
# | Prerequisites | chapter 01; 00 for the set-up |
# | Time | 3 hours for you; all cells run in three to four minutes on two cores (measured: 192 and 236 s, the cores shared with other work) |
# | Memory, download | 2 GB at the peak, all processes together; where Dask is missing, as on Colab, the first cell installs it |
# | Hardware | any computer: devices are processes here, and they talk through gloo. NCCL was not run |
# | Exercises | 12, each checked in the cell below it; those marked *core* fit into one session of two hours |

# %%
from labutils.course.extras import install_extra

has_dask = install_extra("distributed")  # Dask and psutil; where they are already installed, nothing happens

# %%
import contextlib
import os
import shutil
import signal
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from labutils.course.predictions import calibration, predict
from labutils.distributed.launch import RankError, launch
from labutils.lab.models.load import load_model
from labutils.lab.plots import distributed as plots
from labutils.measurement.limits import available_cores

transformers_logging.disable_progress_bar()
cores = available_cores()
print(f"{cores} cores, {torch.cuda.device_count()} GPUs; ranks run on the CPU over gloo, one thread each")

# %% [markdown]
# ## 1 · Fix the article: twenty answers in, four out
#
# The article wraps its model in `nn.DataParallel` for every batch and keeps, of each output, a mean:
#
# ```
# for batch in batches:
#     model = nn.DataParallel(model)
#     output = model(batch)
#     output = torch.mean(output, dim=1)   # "merge the results of the GPUs"
# return output
# ```
#
# **Predict:** 20 requests in 5 batches of 4, three numbers of output each. What shape comes out? How deep is the model
# wrapped afterwards?


# %%
def article_loop(model, batches):
    for batch in batches:
        model = nn.DataParallel(model)
        output = torch.mean(model(batch), dim=1)
    return output, model


torch.manual_seed(0)
network, requests = nn.Linear(10, 3), torch.randn(20, 10)
answers, wrapped = article_loop(network, requests.split(4))
depth = 0
while isinstance(wrapped, nn.DataParallel):
    wrapped, depth = wrapped.module, depth + 1
print(f"{len(requests)} requests in, {len(answers)} numbers out; wrapped {depth} times")
print("right:", tuple(network(requests).shape), "- the article:", tuple(answers.shape))

# %% [markdown]
# Only the last batch is returned. `DataParallel` already puts the GPUs' parts together along dim 0, so the added mean runs over each
# request's own numbers. `torch` itself now advises against `DataParallel`: one process with threads, the model copied anew for every
# call.
#
# What the listing wanted has four steps, and the rest of this part does each of them properly: **partition** the requests,
# **schedule** them to nodes, **synchronise** what nodes must agree on, and **merge** the answers.

# %% [markdown]
# ## Exercise 9.1: all_answers
#
# Write `all_answers(replicas, batches)`: `replicas` are copies of one model, `batches` a list of (size, in) tensors. Batch i goes to
# replica i modulo their number. Return all answers, (requests, out), in the order of the requests.
# 4 lines, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Collect the outputs in a list; <code>enumerate(batches)</code> counts them.</details>
# <details><summary>Hint 2</summary><code>torch.cat(outputs)</code> joins along dim 0, the requests.</details>


# %%
# EXERCISE all_answers
def all_answers(replicas, batches):
    """Every request's answer, in order."""
    ### BEGIN SOLUTION
    outputs = [replicas[i % len(replicas)](batch) for i, batch in enumerate(batches)]
    return torch.cat(outputs)
    ### END SOLUTION


# %%
# CHECK all_answers
from labutils.course.checks import ch09, ch09_models

ch09.all_answers(all_answers)

# %% [markdown]
# ## 2 · Ranks that always end
#
# Nodes are processes. PyTorch calls each member of a group a **rank**; `torchrun` starts them and tells each its number. `launch`
# does that from a notebook and brings the results back. Its ranks run functions from an importable module, never forked from this kernel
# (a fork of a process that has used torch's threads hangs). **gloo** carries messages between CPUs, NVIDIA's **NCCL** those between GPUs. The
# ranks meet through a file and talk over the **loopback**, the network that a machine has with itself: no port is open to
# others. (It tells NCCL the same, which was not run here.) And each watches its standard input, which
# closes however this kernel ends, so nothing is left running.
#
# The first **synchronisation**: every rank draws its own weights, then all take rank 0's. A checksum proves it.

# %%
for result in launch("labutils.course.bench.ranks:hello", 2, device="cpu"):
    print(f"rank {result['rank']}: 1 + 2 = {result['sum']}, weights {result['before']:08x} -> {result['after']:08x}")

# %% [markdown]
# The sum needed both ranks: `all_reduce` is also a **barrier**, nobody passes before all have come (with NCCL the GPU's stream waits, and
# Python goes on). Between the first and the last
# broadcast a rank holds a *mixture* of old and new weights; only after the checksums were compared may it answer.
#
# Barriers are also why distributed programs hang: one rank fails, the others wait for it for ever. **Predict:** what do you want to
# see when rank 1 divides by zero?

# %%
try:
    launch("labutils.course.bench.ranks:divides", 2, {"dividend": 6.0, "divisors": [2.0, 0.0]}, device="cpu")
except RankError as error:
    print(f"rank {error.rank} is to blame:", str(error).strip().splitlines()[-1])

# %% [markdown]
# ## 3 · Partition: what goes together
#
# A batch is padded to its longest request, so it costs (requests) × (longest). **Tiny numbers:** lengths 1 and 9 together cost 18
# positions for 10 tokens; sorted by length, short ones share a batch. A bound on the *padded* size keeps memory in check. Each request
# keeps a stable **id**, its place in the list, so that answers find their way home.

# %% [markdown]
# ## Exercise 9.2: partition (core)
#
# Write `partition(lengths, max_tokens)`: go through the ids by length (the smaller id first where lengths are equal) and put each into the
# open batch if, padded, the batch stays within `max_tokens` positions; else open a new one. Return a list of lists of ids. No request is
# longer than `max_tokens`. 7 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The request you look at is the longest so far: the batch would cost (its size + 1) × this length.</details>
# <details><summary>Hint 2</summary><code>sorted(range(len(lengths)), key=lambda i: (lengths[i], i))</code>.</details>


# %%
# EXERCISE partition
def partition(lengths, max_tokens):
    """Batches of similar lengths within a padded budget."""
    ### BEGIN SOLUTION
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
    ### END SOLUTION


# %%
# CHECK partition
ch09.partition(partition)

# %%
from labutils.distributed import partition as parts
from labutils.lab.data import service

model, tokenizer = load_model("lablm")
queries = [d.messages[-2]["content"] for d in service.evaluation_set(service.INTENT, "test", 64, seed=0)]
lengths = [len(tokenizer(query)["input_ids"]) for query in queries]
arrival = [list(range(i, i + 8)) for i in range(0, 64, 8)]
by_length = parts.partition(lengths, max_requests=8)
print(f"64 queries of {min(lengths)} to {max(lengths)} tokens in batches of 8")
for name, batches in {"in order of arrival": arrival, "by length": by_length}.items():
    print(f"{name}: {parts.padding(lengths, batches):.0%} of all positions are padding")

# %% [markdown]
# ## 4 · Schedule: who gets what
#
# Three **policies** for nodes of different speed:
#
# - **static:** deal the requests out in turn;
# - **weighted:** in proportion to each node's measured rate $r_k$, $n_k \approx n\, r_k / \sum_j r_j$;
# - **pull:** whoever is free takes the next one.
#
# No schedule beats all nodes busy all the time: $T_{\text{ideal}} = n / \sum_k 1/d_k$ with $d_k$ seconds a request.
# **Tiny numbers:** nodes of 20, 40 and 160 ms and 120 requests: ideal 1.48 s.
#
# **Predict:** how long does static need?

# %%
my_static = predict("120 requests dealt out in turn to nodes of 20, 40 and 160 ms", None, unit="s")

# %% [markdown]
# ## Exercise 9.3: weighted_shares (core)
#
# Write `weighted_shares(count, rates)`: integers that add up to `count`. Round each exact share down; what is left goes one each to the
# nodes with the largest fractions (no two are equal here where it matters; else the first node). 6 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Sort the nodes by (share rounded down) − (exact share), smallest first; <code>sorted</code> keeps equal ones in order.</details>
# <details><summary>Hint 2</summary>How many are left? <code>count - sum(shares)</code>.</details>


# %%
# EXERCISE weighted_shares
def weighted_shares(count, rates):
    """Shares in proportion to the rates, by largest remainder."""
    ### BEGIN SOLUTION
    exact = [count * rate / sum(rates) for rate in rates]
    shares = [int(share) for share in exact]
    for node in sorted(range(len(rates)), key=lambda i: shares[i] - exact[i])[: count - sum(shares)]:
        shares[node] += 1
    return shares
    ### END SOLUTION


# %%
# CHECK weighted_shares
ch09.weighted_shares(weighted_shares)

# %% [markdown]
# ## Exercise 9.4: pull_finish_s (core)
#
# Write `pull_finish_s(count, delays_s)`: when is the last request answered, if each node takes the next one as soon as it is free (the
# first node, where several are)? All start free at 0. 6 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Keep for each node the time at which it is free. Which one takes the next request?</details>
# <details><summary>Hint 2</summary><code>node = free.index(min(free))</code>; the answer is the largest end, and 0 without requests.</details>


# %%
# EXERCISE pull_finish_s
def pull_finish_s(count, delays_s):
    """When the last request is answered."""
    ### BEGIN SOLUTION
    free = [0.0] * len(delays_s)
    for _ in range(count):
        node = free.index(min(free))
        free[node] += delays_s[node]
    return max(free)
    ### END SOLUTION


# %%
# CHECK pull_finish_s
ch09.pull_finish_s(pull_finish_s)

# %% [markdown]
# Now with real processes. `local_cluster` starts three nodes on **Dask distributed**, loopback only. They sleep for 20, 40 and 160 ms a
# request: the *work* is simulated, processes, messages and scheduling are real. The weighted policy first measures the rates.

# %%
from labutils.course.bench.distributed import DELAYS_S, bench_policies, continue_texts, paced
from labutils.distributed.dask_engine import connect, local_cluster, make_certificates
from labutils.distributed.dispatch import Report, Settings, dispatch

open_clusters = contextlib.ExitStack()
engine = open_clusters.enter_context(local_cluster(3))
policies = bench_policies(engine, requests=120)
print(*policies, sep="\n")
delays = list(DELAYS_S.values())
print(f"by formula: static {parts.shares_finish_s([40, 40, 40], delays):.2f} s,", end=" ")
print(f"weighted {parts.shares_finish_s(parts.weighted_shares(120, [1 / d for d in delays]), delays):.2f} s,", end=" ")
print(f"pull {parts.pull_finish_s(120, delays):.2f} s")
my_static.compare(next(p for p in policies if p.policy == "static").samples_s[0])

# %%
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
plots.draw_policies(axes, {p.policy: p.samples_s[0] for p in policies}, policies[0].ideal_s)
worst = max(policies, key=lambda p: p.ratio)
axes.set_title(f"In this run the {worst.policy} policy takes {worst.ratio:.1f} times the ideal time")
plt.show()

# %% [markdown]
# *Time for 120 requests on nodes of 20, 40 and 160 ms (simulated work, real processes, one run each), and its multiple of the ideal
# time (dashed).*
#
# **Explain.** Static waits for the slowest node while the others stand idle. By the formulas weighted is best where rates are known and stay as
# they are; one run cannot tell it from pull where the bars are nearly equal. Pull needs no rates and follows a node that slows down, at the price
# that the last request may start late on the slow node.

# %% [markdown]
# ## 5 · Merge: did all come back?
#
# Answers arrive in any order. Some come twice: when a node is lost, nobody can know whether it had already finished, so the request runs again
# (**at-least-once** execution). Some never come. All three must be noticed.

# %% [markdown]
# ## Exercise 9.5: merge (core)
#
# Write `merge(count, pairs)`: pairs are (id, answer) in order of arrival, ids in 0 … count − 1. Return three lists: the answers by id, with
# `None` where one is missing; the missing ids, in order; and the ids of the duplicates, in order, one entry for each time that an id came again
# (keep the first answer). 8 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>A dict from id to answer; an id that is in it already is a duplicate.</details>
# <details><summary>Hint 2</summary><code>[found.get(i) for i in range(count)]</code>; the duplicates need <code>sorted</code>.</details>


# %%
# EXERCISE merge
def merge(count, pairs):
    """Answers in order, missing ids, duplicate ids."""
    ### BEGIN SOLUTION
    found, duplicates = {}, []
    for request, answer in pairs:
        if request in found:
            duplicates.append(request)
        else:
            found[request] = answer
    missing = [i for i in range(count) if i not in found]
    return [found.get(i) for i in range(count)], missing, sorted(duplicates)
    ### END SOLUTION


# %%
# CHECK merge
ch09.merge(merge)

# %% [markdown]
# ## 6 · One answer or one named error, whatever happens
#
# `dispatch` promises for every id, in order, one answer or one named error; the answer is the one a single process would give, as long as it does
# not depend on what shares the batch. A node that dies:
# its requests run elsewhere. A node that stops: no progress for `timeout_s`, the same. A request that raises: an error of its own. A
# **poisonous** request that kills each node it meets: after a loss it runs *alone* on a node, and after two such losses it is given up.
# A scheduler that is silent for `timeout_s` ends the requests that are left with an error that names it.
#
# **Predict:** of 60 requests, one raises and one kills its node. How many nodes are lost, and how many answers?

# %%
my_lost = predict("nodes that one killing request costs", None, unit="nodes")


# %%
def careless(batch):
    """Answers numbers with their squares; 13 raises, 37 takes the whole process down."""
    time.sleep(0.02)
    if 13 in batch:
        raise ValueError("13 is bad luck")
    if 37 in batch:
        os.kill(os.getpid(), signal.SIGKILL)
    return [x * x for x in batch]


report = Report()
answers = list(dispatch(range(60), careless, engine, Settings(max_requests=4), report=report))
print(report)
print("equal to the single process:", all(a.value == a.id**2 for a in answers if not a.error))
my_lost.compare(report.lost_nodes)
print(*[f"request {a.id}: {a.error}" for a in answers if a.error], sep="\n")

# %% [markdown]
# Three nodes were lost to one request: the first with innocent neighbours in its batch, two more to be sure whose fault it was. (A **nanny**
# starts each node again.) Now the faults one by one, each in a run of its own: what does each cost?

# %%
faults = {"a request that raises and one that kills": f"{report.seconds:.1f} s; {report}"}


def with_fault(name, fault, **settings):
    """60 requests of 20 ms; the fault strikes after the fifth answer."""
    engine.client.wait_for_workers(3)
    report = Report()
    for answer in dispatch(range(60), slow_squares, engine, Settings(**settings), report=report):
        if answer.id == 5:
            fault()
    faults[name] = f"{report.seconds:.1f} s; {report}"


def slow_squares(batch):
    time.sleep(0.02)
    return [x * x for x in batch]


def victim():
    return next(iter(engine.client.run(os.getpid).values()))


# %%
stopped = []


def stop():
    stopped.append(victim())
    os.kill(stopped[0], signal.SIGSTOP)


with_fault("none", lambda: None)
with_fault("a node is killed", lambda: os.kill(victim(), signal.SIGKILL))
with_fault("a node is stopped", stop, timeout_s=2.0, window=40)
os.kill(stopped[0], signal.SIGCONT)
print(*[f"{name}: {words}" for name, words in faults.items()], sep="\n")

# %% [markdown]
# Memory is bounded too, in number and in bytes: requests may come from a generator, which is read only `window` requests and about
# `window_bytes` bytes ahead of the oldest unanswered one (the test suite passes a million through). This is **backpressure**: a slow
# cluster slows the reader instead of filling the memory. (A stopped node costs at least `timeout_s`: until then nobody can tell it from a slow one.)
# A user who waits is served by one more setting, `deadline_s`: a request that has not ended so long after it was read ends with an error that says so.
# Two single points of failure remain: this notebook and the cluster's scheduler.
#
# Real answers, live: which node does most of the work on LabLM's queries, and is every answer what a single process says? The box
# fills as answers come; the line below it says the same in text.

# %%
from labutils.lab.widgets.dispatch import dispatch_widget, print_progress, show_progress

box = dispatch_widget(len(queries))
box

# %%
for show in (show_progress(len(queries), box), print_progress(len(queries), steps=2)):
    settings = Settings(max_requests=8, length=len, timeout_s=120)
    answers = list(dispatch(queries, continue_texts, engine, settings, on_progress=show))
alone = [text for batch in by_length[:2] for text in continue_texts([queries[i] for i in batch])]
same = [answers[i].value for batch in by_length[:2] for i in batch] == alone
print(f"{sum(a.error is None for a in answers)} answers; the first {len(alone)} by length equal this process: {same}")
open_clusters.close()

# %% [markdown]
# ## 7 · Tensor parallelism: every device a slice of every matrix
#
# Data parallelism needs a whole model on each node. When it does not fit, or one token takes too long, the model itself is cut.
#
# Megatron's trick (Shoeybi et al. 2019, arXiv:1909.08053): two matrices in a row need **one** sum. Cut the first by outputs (*column
# parallel*), so that each rank has some neurons whole, activation included; cut the second by inputs (*row parallel*):
#
# $$y = \sum_{r} \big(\operatorname{silu}(x G_r^\top) \odot x U_r^\top\big) D_r^\top$$
#
# The sum over ranks is an **all-reduce**. Attention works the same way with heads for neurons: two all-reduces a layer.

# %% [markdown]
# ## Exercise 9.6: mlp_part
#
# Write `mlp_part(x, gate, up, down, rank, ranks)`: one rank's summand of y above. Shapes as in `nn.Linear`: gate and up (neurons, hidden),
# down (hidden, neurons); rank r holds the r-th of `ranks` equal blocks of neurons. 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The block is <code>slice(rank * size, (rank + 1) * size)</code>; which axis of each matrix are the neurons?</details>
# <details><summary>Hint 2</summary>Rows of gate and up, columns of down; <code>nn.functional.silu</code>.</details>


# %%
# EXERCISE mlp_part
def mlp_part(x, gate, up, down, rank, ranks):
    """A rank's summand of a SwiGLU layer."""
    ### BEGIN SOLUTION
    size = gate.shape[0] // ranks
    mine = slice(rank * size, (rank + 1) * size)
    neurons = nn.functional.silu(x @ gate[mine].T) * (x @ up[mine].T)
    return neurons @ down[:, mine].T
    ### END SOLUTION


# %%
# CHECK mlp_part
ch09_models.mlp_part(mlp_part)

# %% [markdown]
# Heads are never cut: a head's softmax needs all of its scores. With **grouped queries** (GQA) query head q reads key/value head q // (heads / kv_heads),
# so a rank needs the key/value heads that its queries read. With more ranks than key/value heads, neighbours hold copies of one.
#
# ## Exercise 9.7: heads_of
#
# Write `heads_of(rank, ranks, heads, kv_heads)`: two lists, the rank's query heads (the rank-th block of heads / ranks) and the key/value
# heads that these read, each once, in order. `ranks` divides `heads`, `kv_heads` divides `heads`. 4 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>First the queries, a range; then look up each query's key/value head.</details>
# <details><summary>Hint 2</summary><code>sorted({q // (heads // kv_heads) for q in queries})</code>.</details>


# %%
# EXERCISE heads_of
def heads_of(rank, ranks, heads, kv_heads):
    """A rank's query heads and key/value heads."""
    ### BEGIN SOLUTION
    size = heads // ranks
    queries = list(range(rank * size, (rank + 1) * size))
    return queries, sorted({q // (heads // kv_heads) for q in queries})
    ### END SOLUTION


# %%
# CHECK heads_of
ch09_models.heads_of(heads_of)

# %% [markdown]
# What does it send? A **ring** all-reduce of n bytes over p ranks moves 2(p−1)/p · n from each rank: p−1 steps add up, p−1 pass the sums on.
# In one decoding step the payload is a hidden state per request: batch × hidden × bytes per value. The vocabulary is cut as well: one more
# all-reduce for the embedding, one all-gather for the logits.
#
# ## Exercise 9.8: sent_bytes
#
# Write `sent_bytes(layers, hidden, batch, ranks, value_bytes)`: bytes that each rank sends in all-reduces for one decoding step: two a
# layer, and one for the embedding. 2 lines, 6 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Payload of one all-reduce first, then the ring's factor, then how many there are.</details>
# <details><summary>Hint 2</summary><code>(2 * layers + 1) * 2 * (ranks - 1) / ranks * payload</code>.</details>


# %%
# EXERCISE sent_bytes
def sent_bytes(layers, hidden, batch, ranks, value_bytes):
    """Bytes that a rank sends for one decoding step."""
    ### BEGIN SOLUTION
    payload = batch * hidden * value_bytes
    return (2 * layers + 1) * 2 * (ranks - 1) / ranks * payload
    ### END SOLUTION


# %%
# CHECK sent_bytes
ch09_models.sent_bytes(sent_bytes)

# %% [markdown]
# Three ways, one result, on LabLM over two ranks: by hand (`tensor_parallel_`, a meter counting), torch's `parallelize_module`, and transformers'
# `DistributedConfig(tp_plan="auto")`. The same launch decodes over **links** for section 9. transformers' way needs one more package,
# accelerate; without it that row says so.

# %%
from labutils.course.bench.ranks import greedy
from labutils.distributed.collectives import Link

LINKS = {
    "this machine's loopback": None,
    "no delay (control)": Link(),  # the simulation's own messages, and nothing to wait for
    "0.1 ms, 10 GB/s": Link(latency_s=1e-4, bytes_per_s=10e9),
    "1 ms, 100 MB/s": Link(latency_s=1e-3, bytes_per_s=1e8),
    "5 ms, 10 MB/s": Link(latency_s=5e-3, bytes_per_s=1e7),
}
NEW = 8
text = load_model("lablm").tokenizer.bos_token + "import os\n\n\ndef read_lines(path):\n    with open(path) as file:\n"
prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :12]
batch = torch.cat([prompt.roll(shift, dims=1) for shift in range(4)])
asked = {"name": "lablm", "token_ids": batch, "new_tokens": NEW, "links": LINKS, "repeats": 5}
two = launch("labutils.course.bench.ranks:two_ranks", 2, asked, device="cpu", timeout_s=300)

# %%
with torch.no_grad():
    reference = model(batch, use_cache=False).logits
single = greedy(model, batch, NEW)
for way in ("by hand", "parallelize_module", "tp_plan='auto'"):
    if way in two[0]:
        off = max((rank[way] - reference).abs().max().item() for rank in two)
        print(f"{way:<20} largest difference of a logit {off:.1e}")
print(two[0].get("skipped", "transformers' own tensor and pipeline parallelism ran, too"))
if "pp_size" in two[0]:
    print("transformers' pp_size=2, tokens equal:", torch.equal(two[0]["pp_size"], single[:, : prompt.shape[1] + 4]))
print("by hand, tokens equal:", torch.equal(two[1]["over"]["tokens"]["tensor"], single))
calls, sent = two[0]["over"]["sent"]
formula = 13 * 4 * 256 * 4
print(f"a step of 4 requests: {dict(calls)}; {sent['all_reduce']} bytes in all-reduces, {formula} by formula")

# %% [markdown]
# The meter counts what *should* cross the link. Does the kernel agree? On a large tensor, the loopback's own byte counter against the ring
# formula (others on this machine use the loopback, too, so the counter may be a little higher):

# %%
measured, predicted = two[0]["loopback"]
print(f"loopback counter {measured / 1e6:.1f} MB, formula {predicted / 1e6:.1f} MB: {measured / predicted:.3f} times")

# %% [markdown]
# ## 8 · Pipeline parallelism: every device some layers
#
# The other cut: rank 0 holds the first layers, rank 1 the next. Only a hidden state crosses each border, once a token. But a single request
# keeps one stage busy and the others idle. GPipe (Huang et al. 2018, arXiv:1811.06965) cuts the batch into m **micro-batches** that follow one another;
# with p equal stages the idle share, the **bubble**, is
#
# $$\frac{p-1}{m+p-1}$$
#
# **Tiny numbers:** 4 stages and 1 micro-batch: 3/4 idle; with 4: 3/7.

# %% [markdown]
# ## Exercise 9.9: pipeline_s (core)
#
# Write `pipeline_s(stage_s, micro_batches)`: the total time of a forward pass, where stage k takes `stage_s[k]` seconds for each
# micro-batch and messages take none. Stages need not be equal. 1 line, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The first micro-batch meets no queue. After it, how often does a micro-batch leave the slowest stage?</details>
# <details><summary>Hint 2</summary>Sum of the stages, plus (m − 1) times the slowest.</details>


# %%
# EXERCISE pipeline_s
def pipeline_s(stage_s, micro_batches):
    """When the last micro-batch leaves the last stage."""
    ### BEGIN SOLUTION
    return sum(stage_s) + (micro_batches - 1) * max(stage_s)
    ### END SOLUTION


# %%
# CHECK pipeline_s
ch09_models.pipeline_s(pipeline_s)

# %% [markdown]
# Four real ranks whose stages sleep 0.1 s for each micro-batch (simulated work, real messages, and no need for four cores). The same launch
# does section 10's ring attention and experts.

# %%
from labutils.distributed.pipeline import bubble, measured_bubble
from labutils.measurement.threads import thread_count
from labutils.measurement.timing import measure, paired_ratio

COUNTS = (1, 2, 4, 8)
four = launch("labutils.course.bench.ranks:four_ranks", 4, {"pace_s": 0.1, "counts": COUNTS}, device="cpu")
idle = {m: measured_bubble([rank["times"][m] for rank in four]) for m in COUNTS}
for m in COUNTS:
    print(f"4 stages, micro-batches: {m}; {idle[m]:.3f} idle, {bubble(4, m):.3f} by formula")

# %%
figure, panels = plt.subplots(2, 1, figsize=(8, 4.4), layout="constrained", sharex=True)
for axes, m in zip(panels, (1, 4), strict=True):
    plots.draw_pipeline(axes, [rank["times"][m] for rank in four])
    axes.set_title(f"{m} micro-batch{'es' if m > 1 else ''}: {idle[m]:.0%} of the stages' time is idle")
plt.show()

# %% [markdown]
# *Who worked when: four stages, each bar one micro-batch (its number inside), white is the bubble. Stages sleep 0.1 s for a piece.*
#
# **Decoding** has no micro-batches to cut a token into: a token needs the one before it. So several **groups** of requests are in flight: while stage
# 1 works on group 0, stage 0 works on group 1, and the last stage sends the chosen token back to the first. Each stage keeps a KV cache for each
# group. LabLM over two stages, two groups of two:

# %%
piped = torch.cat(two[1]["over"]["tokens"]["pipeline"])
print("tokens equal the single process:", torch.equal(piped, single))
per_token = {
    way: {link: statistics.median(two[0]["over"]["seconds"][way, link]) / NEW * 1e3 for link in LINKS}
    for way in ("tensor", "pipeline")
}
with thread_count(1):
    alone = measure(lambda: greedy(model, batch, NEW), name="one process", repeats=5, warmup=1)
one_ms = alone.median_s / NEW * 1e3
print(f"4 requests, float32, ms a token: one process {one_ms:.1f} (median of 5, 1 thread)")
for way, times in per_token.items():
    found = times["this machine's loopback"]
    print(f"    {way:<9}{found:6.1f} (two ranks, median of 5), {found / one_ms:.1f} times the time of one process")

# %% [markdown]
# **Explain.** LabLM is tiny: its matrices take little time beside the messages, so both tensor and pipeline parallelism *lose* to one process
# here (one process was timed apart, not in turns with them). Both pay where a model does not fit or its weights take long to read:
# gpt-fast reports 1.61, 2.42 and 3.13 times the speed of one GPU on 2, 4 and 8 (Llama-2-7B, A100 80 GB with NVLink,
# github.com/pytorch-labs/gpt-fast).

# %% [markdown]
# ## 9 · What a slow link does
#
# Count messages for one token of LabLM's 6 layers: tensor parallelism waits for 13 all-reduces and an all-gather, one after the other; a pipeline of
# two stages for one message and the token back. So latency counts 27 times (in a ring of two an all-reduce has two steps) or twice.
#
# **Predict:** at 5 ms latency, how long is a token in each?

# %%
my_token = predict("a token of LabLM by tensor parallelism over a link of 5 ms and 10 MB/s", None, unit="ms")

# %%
print(
    f"{'link (all simulated except the first)':<38}{'tensor':>9}{'pipeline':>10}   ms a token, 4 requests, medians of 5"
)
for link in LINKS:
    print(f"{link:<38}{per_token['tensor'][link]:>9.1f}{per_token['pipeline'][link]:>10.1f}")
figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
plots.draw_links(axes, per_token)
slowest = list(LINKS)[-1]
ratio = paired_ratio(*(two[0]["over"]["seconds"][way, slowest] for way in ("tensor", "pipeline")))
axes.set_title(f"On the slowest link tensor parallelism takes {ratio} the pipeline's time")
plt.show()
my_token.compare(per_token["tensor"][slowest])

# %% [markdown]
# *Milliseconds a token of LabLM over two ranks, by link (medians of 5). The first is this machine's loopback; the others are **simulated**: every
# message waits for latency + bytes / bandwidth on top of what it really takes. The control waits for nothing: between it and the loopback
# lies what the simulation itself costs, and what runs differ by.*

# %% [markdown]
# A simulation says what its author believes. On Linux, as root, the kernel can do better: two **network namespaces**, a virtual cable, and a
# traffic shaper that lets 2 MB/s through (16 Mbit/s; this shaper limits bandwidth and adds no latency). One rank sits at each end. Elsewhere
# the cell says why it was skipped.

# %%
from labutils.distributed.namespaces import launch_over_link, why_not

RATE = 2e6
real = None
if reason := why_not():
    print("skipped:", reason)
else:
    over = asked | {"links": {"real": None}}
    real = launch_over_link("labutils.course.bench.ranks:over_links", over, bytes_per_s=RATE, timeout_s=240)[0]
    for way in ("tensor", "pipeline"):
        milliseconds = statistics.median(real["seconds"][way, "real"]) / NEW * 1e3
        print(f"{way} over a shaped virtual link of 2 MB/s: {milliseconds:.1f} ms a token, prompt included")

# %% [markdown]
# ## 10 · Longer texts, more experts
#
# **Context parallelism:** a text longer than one device's memory. Each rank keeps the queries of its slice; keys and values go round the ring (Liu et
# al. 2023, arXiv:2310.01889). What a rank has seen so far is merged with what arrives. If $o_a$ is attention over some keys and $L_a$ the log of
# the sum of its exponentials, then over both sets
#
# $$L = \log(e^{L_a} + e^{L_b}), \qquad o = e^{L_a - L}\, o_a + e^{L_b - L}\, o_b$$

# %% [markdown]
# ## Exercise 9.10: merge_attention (core)
#
# Write `merge_attention(output, log_sum, other, other_log_sum)`: outputs (heads, queries, head_dim), log sums (heads, queries); return the merged
# output. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>torch.logaddexp(a, b)</code> is L, without overflow.</details>
# <details><summary>Hint 2</summary>The weights lack the last axis: <code>(log_sum - total).exp()[..., None]</code>.</details>


# %%
# EXERCISE merge_attention
def merge_attention(output, log_sum, other, other_log_sum):
    """Attention over both sets of keys."""
    ### BEGIN SOLUTION
    total = torch.logaddexp(log_sum, other_log_sum)
    first, second = (log_sum - total).exp(), (other_log_sum - total).exp()
    return output * first[..., None] + other * second[..., None]
    ### END SOLUTION


# %%
# CHECK merge_attention
ch09_models.merge_attention(merge_attention)

# %%
query, key, value = four[0]["text"]
whole = nn.functional.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
ringed = torch.cat([rank["attended"] for rank in four], dim=1)
print(f"64 positions over 4 ranks: largest difference from one device {(ringed - whole).abs().max():.1e}")
print("each rank sent", four[0]["ring"], "bytes: 3 steps of keys and values of 16 positions")
print(f"experts on 4 ranks: largest difference {max(rank['expert_off'] for rank in four):.1e}")
rows = four[0]["rows"]
print(
    "rows for the expert of each rank:",
    rows,
    f"the busiest has {max(rows) / statistics.fmean(rows):.2f} times the mean",
)
for kind in ("counts", "dispatch", "expert ids", "combine"):
    print(f"bytes sent to other ranks, {kind:<10}", [rank["moved"][kind] for rank in four])

# %% [markdown]
# **Expert parallelism:** in a mixture of experts each token needs k experts of many, here 2 of 4 (GShard, Lepikhin et al. 2020, arXiv:2006.16668;
# Switch Transformer, Fedus et al. 2021, arXiv:2101.03961, takes one; today's models take more, of hundreds). Experts live on different ranks.
# **All-to-alls** carry the rows there ("dispatch") and the results back ("combine"); two small ones go before them, with the number of rows and
# with the experts' numbers. The router of this cell is skewed on purpose: expert 1 is drawn less often than expert 0, and so on. All ranks wait
# for the rank with the most rows.

# %% [markdown]
# ## 11 · A mesh, and a planner
#
# The ways multiply: with 8 devices, 2 replicas × 2 stages × 2 slices. Tensor neighbours talk 13 times a token, so they get neighbouring ranks (the
# same machine, the fastest link); pipeline stages talk once, data replicas never.
#
# ## Exercise 9.11: coordinates
#
# Write `coordinates(rank, tensor, pipeline)`: the tuple (data, pipeline, tensor) of a rank, the tensor index running fastest, the replica
# slowest. 1 line, 5 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Like the digits of a number with mixed bases.</details>
# <details><summary>Hint 2</summary>The last digit is <code>rank % tensor</code>; the next <code>rank // tensor % pipeline</code>.</details>


# %%
# EXERCISE coordinates
def coordinates(rank, tensor, pipeline):
    """(data, pipeline, tensor) of a rank."""
    ### BEGIN SOLUTION
    return rank // (tensor * pipeline), rank // tensor % pipeline, rank % tensor
    ### END SOLUTION


# %%
# CHECK coordinates
ch09_models.coordinates(coordinates)

# %% [markdown]
# A planner tries every mesh: weights and caches must fit; time is bytes read ÷ bandwidth + messages. First check it against what was measured: from the
# *control* row alone we take each way's own time, add the link's formula, and predict the slow links.

# %%
from labutils.distributed.planner import Devices, Load, ModelShape, plan, step_s

shape, load = ModelShape.of(model), Load(requests=4, positions=20)
for name, link in list(LINKS.items())[2:]:
    quiet = Devices(2, 1e9, float("inf"), link)
    gather = link.all_gather_s(4 * 4096 * 4, ranks=2)
    added = {"tensor": (step_s(shape, quiet, load, tensor=2, pipeline=1) + gather) * 1e3}
    added["pipeline"] = step_s(shape, quiet, Load(2, 20), tensor=1, pipeline=2) * 1e3
    for way, milliseconds in added.items():
        predicted = per_token[way]["no delay (control)"] + milliseconds
        late = max(rank["over"]["late_s"][way, name] for rank in two) / NEW * 1e3
        print(f"{name:<16}{way:<9} predicted {predicted:6.1f} ms, measured {per_token[way][name]:6.1f} ms", end="; ")
        print(f"woken late by {late:.2f} ms in all")

# %% [markdown]
# (A simulated message sleeps, and a system wakes a sleeper later than asked; the last two milliseconds are therefore spent looking at the clock, and what is
# still late is counted and printed. Compare it with the miss: where the miss is larger, sleeping does not explain it. The rest we have not taken apart. The
# prompt's messages, which are longer and not in the prediction, are part of it; two ranks also share this machine's cores with everything else, and runs of one
# row differ. The pipeline hides part of a message behind the other group's work, so it may come out below its prediction.)
#
# Now a model that nobody loads here: Llama-2-70B's shape in fp16, on eight devices of 24 GB that read 1 TB/s, with two links. Its messages are small
# (16 requests × 8192 × 2 bytes), so a ring of eight spends most of its time on 14 latencies. Engines therefore have a **one-shot** all-reduce as well:
# each rank sends all of its part to all others at once, p − 1 times the bytes for one latency. **Predict:** which mesh on which?

# %%
llama_70b = ModelShape(weight_bytes=138e9, layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128)
nvlink, ethernet = Link(5e-6, 300e9), Link(5e-5, 1.25e9)
for name, (link, one_shot) in {
    "NVLink-like, ring": (nvlink, False), "NVLink-like, one-shot": (nvlink, True), "10 Gbit Ethernet, ring": (ethernet, False)
}.items():  # fmt: skip
    devices = Devices(8, 24e9, 1e12, link, one_shot=one_shot)
    print(name, "(formula, not measured):")
    for candidate in plan(llama_70b, devices, Load(requests=16, positions=2048))[:3]:
        print("   ", candidate)

# %% [markdown]
# ## 12 · Prefill here, decode there
#
# A long prompt holds up everybody who shares its device: chapter 11 measures by how much. **Disaggregation** (DistServe, Zhong et al. 2024,
# arXiv:2401.09670) reads prompts on some devices and writes answers on others, and sends the keys and values across. That can only pay where the
# link brings the cache sooner than the second device would compute it.

# %% [markdown]
# ## Exercise 9.12: break_even_bytes_per_s
#
# Write `break_even_bytes_per_s(layers, kv_heads, head_dim, positions, value_bytes, recompute_s, latency_s)`: the bandwidth at which the cache of a
# prompt arrives after exactly the `recompute_s` seconds that its prefill takes. The link adds `latency_s` once. 2 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>How many numbers does one position leave in the cache, over all layers?</details>
# <details><summary>Hint 2</summary>The bytes have <code>recompute_s - latency_s</code> seconds for their way.</details>


# %%
# EXERCISE break_even_bytes_per_s
def break_even_bytes_per_s(layers, kv_heads, head_dim, positions, value_bytes, recompute_s, latency_s):
    """Bytes a second over which sending a cache takes as long as computing it."""
    ### BEGIN SOLUTION
    nbytes = 2 * layers * kv_heads * head_dim * positions * value_bytes
    return nbytes / (recompute_s - latency_s)
    ### END SOLUTION


# %%
# CHECK break_even_bytes_per_s
ch09_models.break_even_bytes_per_s(break_even_bytes_per_s)

# %% [markdown]
# Now with LabLM and a prompt of 512 tokens: rank 0 reads it, rank 1 writes eight tokens. The control is rank 1 alone.
#
# **Predict:** how many bytes does the cache have in float32, and over which of these links does sending it win?

# %%
my_cache = predict("LabLM's cache of 512 tokens in float32", None, unit="MB")

# %%
PROMPT = torch.arange(512)[None] % 4000 + 50
APART = {
    "loopback": None,
    "100 MB/s": Link(1e-4, 1e8),
    "10 MB/s": Link(1e-4, 1e7),
    "2 MB/s": Link(1e-4, 2e6),
}
wanted = {"name": "lablm", "token_ids": PROMPT, "new_tokens": 8, "links": APART, "repeats": 5}
_, apart = launch("labutils.course.bench.ranks:prefill_apart", 2, wanted, timeout_s=240)
config = model.config
predicted = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PROMPT.shape[1] * 4 + 8
print(f"sent for one answer: {apart['sent']} bytes, predicted {predicted}")
my_cache.compare(apart["sent"] / 1e6)
print(
    "the same tokens every way:", all(torch.equal(apart["tokens"]["alone"], text) for text in apart["tokens"].values())
)
for way, seconds in apart["seconds"].items():
    ratio = "" if way == "alone" else f"; alone takes {paired_ratio(apart['seconds']['alone'], seconds)} as long"
    print(f"{way:<9} {1e3 * statistics.median(seconds):6.1f} ms{ratio}")

# %% [markdown]
# *Medians of 5 interleaved rounds, from the prompt's arrival to the eighth token; the links but the first are **simulated**.*
#
# Both ranks are equally fast, so for a single request sending cannot win: it adds the link's time to the same work. What disaggregation buys is that
# rank 1 could go on writing other answers meanwhile, and that devices for prompts may be of another kind. Whether a link deserves it is the
# question of your exercise; it needs the time of the prefill alone.

# %%
with torch.no_grad():
    prefill = measure(lambda: model(PROMPT, use_cache=True, logits_to_keep=1), repeats=5, name="prefill of 512 tokens")
print(prefill)
for value_bytes, name in ((4, "float32"), (2, "bfloat16")):
    needed = break_even_bytes_per_s(6, 2, 64, 512, value_bytes, prefill.median_s, 1e-4)
    print(f"LabLM here, cache in {name}: {needed / 1e6:.1f} MB/s are break-even")
needed = break_even_bytes_per_s(80, 8, 128, 2048, 2, 2 * 70e9 * 2048 / 400e12, 5e-5)
print(f"Llama-2-70B's shape, 2,048 tokens, prefill at 400 TFLOP/s (formula, not measured): {needed / 1e9:.1f} GB/s")

# %% [markdown]
# <details><summary>Explain</summary>
#
# A cache grows with the prompt, and so does its prefill: the break-even hardly depends on the prompt's length, until attention makes prefill grow
# faster than the cache. It depends on how fast the device computes. Our cores are slow, so a modest link will do; a device a thousand times as fast
# needs a link in proportion. A smaller cache (fewer key-value heads, 8 bits) moves the break-even down. Disaggregation has lost in practice too: Ben
# Hamm (October 2025, Dynamo 0.5.0, ten H200, Qwen3-32B in FP8) saw the first token after 4.7 s with it and after 1.1 s without, and says
# that he did not profile the transfer.
# </details>

# %% [markdown]
# ## 13 · Beyond one machine
#
# Nothing above changes but the address: `connect("tls://scheduler:8786", certificates=folder)` joins a Dask cluster of other machines, and
# `ray_cluster(4, address=…)` a Ray one (`pip install "ray>=2.60"`). **Whoever reaches a scheduler can run any code on its nodes**, so beyond the
# loopback `connect` refuses an address without TLS. `notebooks/RENTED_GPUS.md` says how a class does it.

# %%
try:
    connect("tcp://10.0.0.7:8786").__enter__()
except ValueError as error:
    print("refused:", error)
if shutil.which("openssl"):
    with (
        tempfile.TemporaryDirectory() as folder,
        local_cluster(2, certificates=make_certificates(Path(folder))) as safe,
    ):
        squares = [a.value for a in dispatch(range(6), lambda batch: [x * x for x in batch], safe)]
        print(squares, "over", {address.partition(":")[0] for address in safe.nodes().values()})

# %% [markdown]
# Where Ray is installed, the next cell gives its actors the raising and the killing request of section 6. The promise is `dispatch`'s own, so it
# must hold on any engine. What a lost scheduler costs does depend on the engine: a Dask client hands its batches to the scheduler, so the requests that are
# left end with an error that names it, while Ray's client talks to its actors directly and gets every answer (the test suite
# stops and kills both).

# %%
from importlib.util import find_spec

from labutils.distributed.ray_engine import ray_cluster

if find_spec("ray") is None:
    print('skipped: Ray is not installed here; pip install "ray>=2.60"')
else:
    with ray_cluster(2) as actors:
        report = Report()
        answers = list(dispatch(range(60), careless, actors, Settings(max_requests=4), report=report))
    print(report)
    print(*[f"request {a.id}: {a.error}" for a in answers if a.error], sep="\n")

# %% [markdown]
# Most teams run a **serving engine** instead: vLLM, or `transformers serve`. They speak OpenAI's protocol, batch requests continuously, and hold
# tensor parallelism behind a flag. Our client needs only the standard library, and is a function for `dispatch` that keeps several requests of a
# batch in flight; `notebooks/RENTED_GPUS.md` gives each node a client of its own. Name servers in `SERVERS` to try it. With vLLM on a machine with two GPUs: `vllm serve MODEL --tensor-parallel-size 2 --host 127.0.0.1`. **That line
# was not run here**; two servers of vLLM's CPU backend were, behind `dispatch` (`tests/test_vllm.py`, where you name a Python that has vLLM). Where its packages can be installed, the test suite runs `transformers serve
# --continuous-batching` on LabLM and holds the client against it.

# %%
from labutils.distributed.client import ChatClient, ServerError
from labutils.lab.models.tokenizer import control_tokens

SERVERS = os.environ.get("LABUTILS_SERVERS", "").split()  # such as "http://127.0.0.1:8000 http://127.0.0.1:8001"
if not SERVERS:
    print("skipped: no server named in LABUTILS_SERVERS; this cell needs `vllm serve` or `transformers serve`")
for url in SERVERS:
    name = os.environ.get("LABUTILS_SERVED_MODEL", "lablm")
    client = ChatClient(url, name, control_tokens=control_tokens(load_model("lablm").tokenizer))  # take your model's
    try:
        print(url, client([[{"role": "user", "content": "Where is my parcel?"}]]))
    except ServerError as error:
        print("skipped:", error)

# %% [markdown]
# ## What you have
#
# The chapter's three tables, from the runs above:

# %%
print("POLICIES (simulated work, real processes)", *policies, sep="\n  ")
print("\nFAULTS (real signals)", *[f"{name}: {words}" for name, words in faults.items()], sep="\n  ")
print("\nLINKS, ms a token (all simulated except the first, and the shaped one where it ran)")
rows = {link: tuple(per_token[way][link] for way in ("tensor", "pipeline")) for link in LINKS}
if real:
    rows["shaped virtual link, 2 MB/s"] = tuple(
        statistics.median(real["seconds"][way, "real"]) / NEW * 1e3 for way in ("tensor", "pipeline")
    )
print(*[f"  {link:<28} tensor {t:7.1f}   pipeline {p:7.1f}" for link, (t, p) in rows.items()], sep="\n")

# %% [markdown]
# - the article's loop repaired, and its four steps with a promise: one answer or one named error per request;
# - ranks that end with the notebook, whatever ends it;
# - one model cut over several ranks, by slices and by layers, with the tokens of the single process and its bytes counted;
# - a planner that says which mesh a link deserves;
# - a prompt read on one rank and answered on another, and the link speed that it needs.
#
# **Open question:** your service has 8 GPUs in two machines of four, joined by ordinary Ethernet, and a model that needs three GPUs' memory. How do
# you split it, what happens when one machine stops, and which measurement of this chapter would you repeat before you buy anything?
#
# Next: **10 · Decoding faster**.

# %%
from labutils.course.progress import progress

progress()
calibration()

# %% [markdown]
# # 13 · Capstone
#
# **Goal:** the customer-service assistant that the course began with: in a browser, answering within a second, every technique on one plot, and the questions that come after speed: energy, fairness, privacy, and what to tell the people who rely on it.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 03 to 05, 10 to 12 |
# | Time | 4 hours for you; all cells run in about 5 minutes on one core (measured: 270 s, the build included) |
# | Memory, download | 1.8 GB at the peak; nothing to download beyond FastAPI, where it is missing |
# | Hardware | any computer; a C compiler for the packed layers |
# | Exercises | 11, each checked in the cell below it, the last a design that is graded; short of time, do those marked `core` |

# %%
from labutils.course.extras import install_extra

with_server = install_extra("serve")  # the assistant's page; all else runs without it

# %%
import json
import math
import random
import statistics
import time
from collections import Counter

import matplotlib.pyplot as plt
import torch
from transformers.utils import logging as transformers_logging

from labutils.capstone.designs import Design
from labutils.course.predictions import calibration, predict
from labutils.lab.data import service
from labutils.lab.models.load import load_model
from labutils.lab.models.quantized import fast_llama
from labutils.lab.models.tokenizer import chat_ids, text_ids
from labutils.lab.plots.style import plain_log_scale, series_style
from labutils.measurement.timing import measure_interleaved, paired_ratio, quantile

transformers_logging.disable_progress_bar()
tokenizer = load_model("lablm").tokenizer
END = tokenizer.eos_token_id

# %% [markdown]
# ## 1 · The assistant in a browser
#
# Everything comes together on one page: chapter 11's server answers on this machine, and the *name of the model* in a request chooses what was done to it.
# `lablm-float32` is chapter 01, `lablm-int8` chapter 03, `lablm-small-int8` chapter 05 on top, `…-speculative` adds chapter 10's guesses, `…-x2` a second replica. Each technique is a `Design`
# with an engine and a thread of its own, built when somebody first asks for it.
#
# From a terminal it is `python -m labutils assistant`. Here it runs in a thread.

# %%
import urllib.request
import uuid
from contextlib import ExitStack

assistant = ExitStack()


def fetch(path, **body):
    """The server's JSON; a body makes it a POST."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


# %%
if with_server:
    from labutils.capstone.assistant import running_assistant

    address = assistant.enter_context(running_assistant())
    offered = {model["id"]: model["state"] for model in fetch("/v1/models")["data"]}
    ready = [name for name, state in offered.items() if state != "unavailable"]
    print(f"open {address} in a browser on this machine; {len(ready)} of {len(offered)} techniques can be had here")
else:
    print("no server here: FastAPI and uvicorn are missing")

# %% [markdown]
# On the page you type, switch the technique in the middle of a conversation, and read a *badge* below each answer. Its table goes from the question to the answer: preprocess, compress,
# accelerate, distribute. Each step is a switch, and what it costs and gains is the median of your own session, "not measured yet" before that.
#
# The badge comes from the engine's clock, in three numbers:
#
# $$\text{queue} = t_{\text{admitted}} - t_{\text{arrival}}, \qquad \text{TTFT} = t_1 - t_{\text{arrival}}, \qquad \text{time per token} = \frac{t_n - t_1}{n - 1}$$
#
# **Tiny numbers:** a request arrives at 1.0 s, is admitted at 1.25 s, and its three tokens come at 1.5, 1.75 and 2.5 s. Queue 0.25 s, TTFT 0.5 s, time per token (2.5 − 1.5) ÷ 2 = 0.5 s.

# %% [markdown]
# ## Exercise 13.1: badge (core)
#
# Write `badge(arrival_s, admitted_s, token_s)`: `token_s` lists when each token was made. Return the three numbers as a tuple. An answer of one token has no time per token: `None`.
# 5 lines, 8 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>The client waits from its arrival on, so TTFT contains the queue. n tokens have n − 1 gaps.</details>
# <details><summary>Hint 2</summary><code>(token_s[-1] - token_s[0]) / (len(token_s) - 1)</code>, but only if there are two tokens.</details>


# %%
# EXERCISE badge
def badge(arrival_s, admitted_s, token_s):
    """Seconds in the queue, to the first token, and for each further token."""
    ### BEGIN SOLUTION
    per_token_s = None
    if len(token_s) > 1:
        per_token_s = (token_s[-1] - token_s[0]) / (len(token_s) - 1)
    return admitted_s - arrival_s, token_s[0] - arrival_s, per_token_s
    ### END SOLUTION


# %%
# CHECK badge
from labutils.course.checks import ch13_assistant

ch13_assistant.badge(badge)

# %% [markdown]
# Now the same question goes to five techniques in turn, five rounds, one request at a time. A fresh `cache_salt` keeps each request from finding its beginning in the cache, so TTFT always
# includes the whole prompt. The first, untimed call builds the technique.
#
# **Predict:** by how much does int8 shorten an answer of float32, from the question to the last token?

# %%
my_gain = predict("a whole answer of the assistant: float32 over int8", None, unit="times")

# %%
QUESTION = "Hello! I want to track order A12345."
NAMES = ("lablm-float32", "lablm-int8", "lablm-int4", "lablm-int8-speculative", "lablm-small-int8")


def ask(name, **more):
    """The answer's text and its badge."""
    body = {"model": name, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 64}
    answer = fetch("/v1/chat/completions", **body, **more)
    return answer["choices"][0]["message"]["content"], answer["latency"] | answer["usage"]


if with_server:
    asked = [name for name in NAMES if name in ready]
    texts = {name: ask(name)[0] for name in asked}
    badges = {name: [] for name in asked}
    for turn in range(5):
        for name in asked[turn % len(asked) :] + asked[: turn % len(asked)]:
            badges[name].append(ask(name, cache_salt=uuid.uuid4().hex)[1])


# %%
def total_s(found):
    """From the question to the last token."""
    return found["ttft_s"] + (found["per_token_s"] or 0.0) * (found["completion_tokens"] - 1)


def line(seconds):
    return f"{1e3 * statistics.median(seconds):6.1f} [{1e3 * min(seconds):5.1f} to {1e3 * max(seconds):5.1f}]"


if with_server:
    print(f"{'ms, median [least to most] of 5':<32}{'TTFT':<26}{'per token':<26}whole answer")
    for name, found in badges.items():
        columns = [[b["ttft_s"] for b in found], [b["per_token_s"] for b in found], list(map(total_s, found))]
        print(f"{name:<30}" + "".join(f"{line(seconds):<26}" for seconds in columns))
    base = list(map(total_s, badges[asked[0]]))
    gains = {name: paired_ratio(base, list(map(total_s, badges[name]))) for name in asked[1:]}
    for name, gain in gains.items():
        print(f"{asked[0]} ÷ {name}: {gain}")
    print("all the same text" if len(set(texts.values())) == 1 else texts)
    if "lablm-int8" in gains:
        my_gain.compare(gains["lablm-int8"].value)

# %% [markdown]
# One user alone never queues, so the whole answer is TTFT plus the tokens; what many users feel is the next section's question. Look at the spread before you believe a median: server, client and
# notebook share the same cores.
#
# Guessing needs no change of the engine. `Lookahead` wraps the model: a step reads a request's last token and some guesses behind it, as many as fit into the request's last block of memory.
# The engine then draws its next token as always. If that was the guess, its logits are known already and nothing is computed.
#
# **Predict:** prompt lookup copies from the conversation. What share of the model's steps does it save on short service answers? And what does a table save that has counted training's answers?

# %%
my_guess = None  # a pair of shares

# %%
from labutils.decoding.proposers import CorpusNgram, PromptLookup
from labutils.lab.models.served import paged_llama
from labutils.quantization.kernels import find_kernels
from labutils.serving.engine import Engine, run
from labutils.serving.lookahead import Lookahead
from labutils.serving.scheduler import Request

served = Design(bits=8 if find_kernels()[0] else None)
memory = paged_llama(served.build().model, positions=4096)
chats = [item.messages[:-1] for item in service.evaluation_set(service.ANSWER, "test", 20, seed=13)]
prompts = [chat_ids(tokenizer, chat, add_generation_prompt=True) for chat in chats]
training = [chat_ids(tokenizer, dialogue.messages) for dialogue in service.dialogues(13, "train", 600)]
counted = CorpusNgram(training, vocab_size=tokenizer.vocab_size, order=4, shortest=2)


def answers(model):
    """All answers, one after the other, and the steps that the model computed."""
    engine = Engine(model)
    made = [run(engine, [Request(ids, 48, stop=frozenset([END]))])[0].new_ids for ids in prompts]
    return made, getattr(model, "steps", engine.steps)


# %%
plain, plain_steps = answers(memory)
print(f"{served}, {len(prompts)} answers, {sum(map(len, plain))} tokens\n{'plain':<16}{plain_steps:4} steps")
proposers = {"prompt lookup": PromptLookup, "counted n-grams": lambda: counted}
for name, proposer in proposers.items():
    ahead = Lookahead(memory, draft_tokens=6, proposer=proposer)
    made, steps = answers(ahead)
    same = sum(a == b for a, b in zip(made, plain, strict=True))
    print(
        f"{name:<16}{steps:4} steps, {1 - steps / plain_steps:4.0%} saved; {ahead.accepted} of {ahead.drafted} guesses "
        f"used; {same} of {len(plain)} texts the same"
    )
print("you said", my_guess)

# %% [markdown]
# A saved step is not a saved millisecond: a step that reads seven tokens takes longer than one that reads a single one, and a wrong guess is paid like a right one. So the same answers once more, timed.

# %%
ways = {"plain": lambda: answers(memory)}
for name, proposer in proposers.items():
    ways[name] = lambda proposer=proposer: answers(Lookahead(memory, draft_tokens=6, proposer=proposer))
timings = measure_interleaved(ways, repeats=5, warmup=1)
for name in proposers:
    ratio = paired_ratio(timings["plain"].samples_s, timings[name].samples_s)
    print(f"plain ÷ {name}: {ratio} (time, prompts included)")

# %% [markdown]
# The texts stay the same because every token is drawn from the same logits by the same draw; with packed weights even the last bit agrees. What differs is how much there is to copy: a short
# answer repeats an order number and little else of its question, while a service says the same sentences to everybody. And what differs again is the price: compare the saved steps with the saved
# time, and with the badge of `lablm-int8-speculative` above, which guesses by prompt lookup.
#
# To go on by hand, leave the next cell for later and open the address from above. Two tabs do not disturb one another, and closing the server shows what the page says then.

# %%
assistant.close()
print("the assistant is closed")

# %% [markdown]
# ## 2 · Within a second
#
# "How fast is it?" has an answer in milliseconds, and nobody buys milliseconds. Whoever runs a service asks: *how many users may I let in, if 99 of 100 are to have their whole answer within a second?*
# Let a user send a question once in 20 seconds on average (think time is our assumption), independently of all others. Then $N$ users are Poisson arrivals at the rate $N / 20$ (chapter 11), and
# they are served if at most one answer in a hundred is late:
#
# $$\#\{i : t_i \le 1\ \text{s}\} \ \ge\ 0.99\, n$$
#
# **Tiny numbers:** of 150 questions one may be late; of 99 none. A run must also be long. If 200 questions came in one moment and all were answered within the second, that would say nothing about the next second, so the searches below let
# each run last several seconds.

# %%
from labutils.capstone.users import allowed_late, serve_crowd, users_within

for count in (99, 150, 300):
    print(f"{count} questions: {allowed_late(count)} may be late")

# %% [markdown]
# ## Exercise 13.2: most_users (core)
#
# Write `most_users(runs, limit_s=1.0)`: `runs` maps a number of users to the list of their latencies in seconds; a question that was refused is `None`. Return the largest number of users that was served, provided that every smaller crowd
# of the list was served too; 0 if none was. 8 lines, 10 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Go through <code>sorted(runs)</code> and stop at the first crowd that was not served.</details>
# <details><summary>Hint 2</summary>A crowd is served if <code>100 * in_time >= 99 * len(latencies)</code>; whole numbers do not round.</details>


# %%
# EXERCISE most_users
def most_users(runs, limit_s=1.0):
    """The largest crowd of whom 99% had their answer in time."""
    ### BEGIN SOLUTION
    most = 0
    for users in sorted(runs):
        in_time = sum(seconds is not None and seconds <= limit_s for seconds in runs[users])
        if 100 * in_time < 99 * len(runs[users]):
            break
        most = users
    return most
    ### END SOLUTION


# %%
# CHECK most_users
from labutils.course.checks import ch13_users

ch13_users.most_users(most_users)

# %% [markdown]
# Now with the real engine. The same hundred questions, in English and Chinese, in phrasings that training never showed; prefix sharing off, so that a repeated question is computed again. The search doubles or
# halves the crowd until it has seen both verdicts, and then narrows the bracket down to a factor of 1.5. A run that can no longer pass is given up. Runs here last three seconds, to be short.
#
# **Predict:** float32, sixteen requests in a step: how many users?

# %%
my_users = predict("float32, 16 requests in a step: users of whom 99% have their answer within a second", None)

# %%
from dataclasses import replace

from labutils.course.bench.users import RUNGS, paged_design, questions, table

asked = replace(questions(), duration_s=3.0)
for rung, start in ((RUNGS[1], 500), (RUNGS[2], 2000)):
    model = paged_design(rung.design, rung.running)
    began = time.perf_counter()
    found = users_within(
        lambda users, m=model, r=rung: serve_crowd(m, asked, users, running=r.running, seed=1), start=start, factor=1.5
    )
    runs = ", ".join(
        f"{run.users}: {'served' if run.served else 'not'}" for run in sorted(found.runs, key=lambda run: run.users)
    )
    print(
        f"{rung.design!s:<18} {found.served:>6,} users, {found.not_served:,} are too many ({time.perf_counter() - began:.0f} s)\n{'':19}{runs}"
    )
    if rung == RUNGS[1] and found.served:
        my_users.compare(found.served)
print(f"cpu, threads: {torch.get_num_threads()}, {rung.running} requests in a step")

# %% [markdown]
# That was one search each. `python -m labutils bench users` climbs the whole ladder and searches each rung several times, each time with other arrivals. Here is what it stored, on the machine named below it, before chapter 03 had its float32 kernel: float32 went through PyTorch then, so compare its rows with the other rows and not with the search above. Each row differs in one
# thing from the row that its last column names. All searches of a row begin at the same number and end in a bracket of a factor of at most 1.25, so equal results mean the same bracket.

# %%
from labutils.lab.paths import DATA

stored = json.loads((DATA / "results" / "users.json").read_text())
print(table(stored))
host = stored[0]["host"]
print(f"{len(stored[0]['served'])} searches a row; {host['cpu']}, {host['cores']} cores, 1 thread a process")

# %%
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for place, row in enumerate(stored):
    style = series_style(0 if row["design"]["model"] == "lablm" else 1)
    axes.plot(row["served"], [place] * len(row["served"]), linestyle="", alpha=0.5, **style)
    axes.plot(statistics.median(row["served"]), place, markersize=10, linestyle="", **style)
axes.set_yticks(range(len(stored)), [row["name"] for row in stored])
axes.invert_yaxis()
plain_log_scale(axes, "x")
axes.set_xlabel("users of whom 99% have their whole answer within 1 s")
first, last = stored[0]["served"], stored[-1]["served"]
low, high = min(last) / max(first), max(last) / min(first)
axes.set_title(f"The last row serves {low:.0f} to {high:.0f} times as many users as the first", fontsize=11)
axes.xaxis.set_major_formatter("{x:,g}")
plt.show()

# %% [markdown]
# *Each small mark is one search, the large one their median; the title divides least by most, and most by least. Colours and shapes: LabLM, LabLM-small.*
#
# Compare neighbours only as far as their marks lie apart. Continuous batching makes no single answer faster; it lets sixteen share what a step costs whatever its rows (chapter 11, section 4), and the second is long enough for an answer to take several times as long as alone.
# Two replicas share this machine's cores, so what the second one adds is what a second core adds.

# %% [markdown]
# ### A thousand times as many
#
# On paper, then: if one replica serves $u$ users, the peak of $N$ users needs $\lceil N / u \rceil$ replicas, and a spare, since one that fails must not make everybody wait. They are paid day and night, while the answers follow the
# *mean* load:
#
# $$\text{dollars per million answers} = \frac{\text{replicas} \cdot \text{price per hour}}{3600 \cdot \text{peak users} \cdot \text{mean load} / \text{think time}} \cdot 10^6$$
#
# **Tiny numbers:** 1,000 users at the peak, 300 a replica, 1 spare: 5 replicas. At 0.50 dollars an hour and half the peak on average they give 90,000 answers an hour: 27.78 dollars a million.

# %% [markdown]
# ## Exercise 13.3: fleet_cost
#
# Write `fleet_cost(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0)`: return `(replicas, dollars_per_million_answers)`. `price_per_hour` is that of one replica, `mean_load` the mean of the day as a share of the peak.
# 4 lines, 8 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary><code>math.ceil(peak_users / per_replica) + spare</code> replicas; all of them are paid.</details>
# <details><summary>Hint 2</summary>Answers an hour: <code>peak_users * mean_load / think_s * 3600</code>.</details>


# %%
# EXERCISE fleet_cost
def fleet_cost(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
    """Replicas, and dollars for a million answers."""
    ### BEGIN SOLUTION
    import math

    replicas = math.ceil(peak_users / per_replica) + spare
    answers_per_hour = peak_users * mean_load / think_s * 3600
    return replicas, replicas * price_per_hour / answers_per_hour * 1e6
    ### END SOLUTION


# %%
# CHECK fleet_cost
from labutils.course.checks import ch13_users

ch13_users.fleet_cost(fleet_cost)

# %%
PRICE = 0.05  # dollars an hour for one core: an assumption, put your own


def cost_of(peak_users, per_replica, spare, mean_load=0.4, think_s=20.0):
    replicas = math.ceil(peak_users / per_replica) + spare
    return replicas, replicas * PRICE / (peak_users * mean_load / think_s * 3600) * 1e6


peak = 1000 * round(statistics.median(stored[0]["served"]))
print(
    f"{peak:,} users at the peak (a thousand times the first row above), {PRICE} dollars a core and hour, mean load 40%"
)
for row in stored[:-1]:
    replicas, dollars = cost_of(peak, statistics.median(row["served"]), spare=2)
    print(f"{row['name']:<24}{replicas:>6,} replicas {dollars:8.2f} dollars for a million answers")

# %% [markdown]
# The price is an assumption, and the *ratios* do not depend on it. For a model that does not fit one device, chapter 09's planner says which mesh a replica is. Here are eight devices and a model of eight billion parameters in 8 bits; the
# device's numbers are round ones of the H100 class (80 GB, 3.35 TB/s, links of 450 GB/s each way: NVIDIA's data sheet), and the step is modelled, not measured.

# %%
from labutils.distributed.collectives import Link
from labutils.distributed.planner import Devices, Load, ModelShape, plan

large = ModelShape(weight_bytes=8e9, layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128)  # Llama-3-8B's shape
devices = Devices(8, 80e9, 3.35e12, Link(latency_s=5e-6, bytes_per_s=450e9))
ANSWER_TOKENS = 100
for requests in (64, 512):
    best = plan(large, devices, Load(requests, 1000))[0]
    answer_s = ANSWER_TOKENS * best.step_s
    print(f"{requests} requests at once, 1,000 positions each: {best}")
    verdict = "within" if answer_s <= 1 else "NOT within"
    print(
        f"  {ANSWER_TOKENS} tokens take {answer_s:.2f} s: {verdict} a second; {best.tokens_per_s / ANSWER_TOKENS:,.0f} answers/s if all 8 devices are full"
    )

# %% [markdown]
# A model of the memory's traffic is optimistic: it knows nothing of prefill, of queues, or of arithmetic. It is good for a comparison of meshes, and for the question whether a second is possible at all.

# %% [markdown]
# ## 3 · Every technique on one plot
#
# Thirteen chapters, and one question that a service asks: which of all this should I use *here*? So all ways to answer are measured in one run. Each request is answered by every technique before the next request
# comes, so a slow moment of the machine hits all of them; each answer is parsed and judged as in chapter 12. Besides speed and right answers a technique has a size in memory, a surprise on held-out text
# (bits per byte), and its compute for an answer: a vote among five samples makes five answers to give one.

# %% [markdown]
# | family | what changes |
# | --- | --- |
# | the model itself | `generate` of transformers, nothing done |
# | faster code | the same float32 weights, our decoder (01) |
# | quantized | 8, 4 and 3 bits, the last in the space of 4; rounded to nearest or by GPTQ (02, 03) |
# | pruned | Wanda, then 8 bits (04) |
# | distilled | LabLM-small (05) |
# | speculative | guesses copied from the text, checked in one step (10) |
# | test-time compute | a vote among samples |

# %%
from labutils.capstone import techniques as ways
from labutils.lab.data.service_labels import read_answer
from labutils.lab.models.compare import bits_by_document, held_out_documents

REQUESTS = 40
documents = held_out_documents(limit_bytes=400)
small = "lablm-small"
quantized = [Design(bits=b, calibrated=c) for b, c in ((8, False), (4, False), (4, True), (3, False), (3, True))]
designs = {Design(): "faster code"} | dict.fromkeys(quantized, "quantized")
designs |= {Design(bits=8, pruned=share): "pruned" for share in (0.3, 0.5)}
designs |= {Design(model=small, bits=b): "distilled" for b in (None, 8, 4)}
built = {design: design.build() for design in designs}
decoders = {design: fast_llama(loaded.model, max_length=128) for design, loaded in built.items()}
bits = {design: tuple(bits_by_document(loaded.model, tokenizer, documents)) for design, loaded in built.items()}
print(
    f"bits per byte: {len(documents)} held-out modules, the first {max(len(d.text.encode()) for d in documents)} bytes of each at most"
)


# %%
def text_of(token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True)


def known(design, *, with_bits=True):
    """What a technique has from its model, whatever way it writes."""
    found = {
        "bytes_resident": decoders[design].weight_bytes,
        "dtype": f"int{design.bits}" if design.bits else "float32",
    }
    return found | ({"document_bits": bits[design]} if with_bits else {})


contenders = [
    ways.Technique(str(design), family, ways.plain(decoders[design], text_of, {END}), **known(design))
    for design, family in designs.items()
]

# %%
float32, int8, int3 = Design(), Design(bits=8), Design(bits=3)
original = ways.library(load_model("lablm"), text_of, {END})
guess = ways.guessing(decoders[int8], text_of, {END}, draft_tokens=4)
vote = ways.voting(decoders[int3], text_of, {END}, votes=5, temperature=0.5, seed=0)
contenders += [
    ways.Technique("transformers", "the model itself", original, **known(float32)),
    ways.Technique("int8, 4 guessed", "speculative", guess, **known(int8)),
    ways.Technique("int3, vote of 5", "test-time compute", vote, **known(int3, with_bits=False)),
]

# %% [markdown]
# **Predict:** how many of these will be surely beaten in speed *and* in right answers by another?

# %%
my_guess = None  # a number


# %%
items = service.evaluation_set(service.ANSWER, "test", REQUESTS, seed=12)
prompts = [chat_ids(tokenizer, item.messages[:-1], add_generation_prompt=True) for item in items]
expected = [read_answer(item.messages[-1]["content"]) for item in items]
task = ways.Task(service.ANSWER, prompts, expected, parse=read_answer)
records = ways.compare(contenders, task, model="lablm", chapter="13")
print(f"cpu, threads: {torch.get_num_threads()}, {REQUESTS} requests, each answered by all techniques in turn")

# %%
from labutils.lab.plots.one_plot import draw_techniques, techniques_table
from labutils.measurement import ledger

for record in records:
    ledger.append(record)
draw_techniques(records, x="speed", y="task score", ax=plt.subplots(figsize=(9.5, 5.6), layout="constrained")[1])
plt.show()
print(techniques_table(records, x="speed", y="task score"))

# %% [markdown]
# *A point leads if no other is surely better on one axis without being surely worse on the other; it is beaten if another is surely better on both. Intervals: 95% bootstrap, over eight rounds of requests (speed) and over the requests (right answers). The tokens of a vote are those of all its samples.*
#
# Right answers are counted, so many techniques stand on one line: forty requests cannot tell them apart, and speed alone decides among them. Where all are right, the bootstrap's interval has no width; chapter 12's rule of three
# still allows 3 of 40 to go wrong. Bits per byte are finer. They are paired by document, and they ask the model about text that is no service request at all: short beginnings of modules, which cost more bits a byte than a whole
# file, so compare them only with one another.

# %%
figure, panels = plt.subplots(1, 2, figsize=(15, 5.6), layout="constrained")
draw_techniques(records, x="memory", y="bits per byte", ax=panels[0])
draw_techniques(records, x="test-time compute", y="task score", ax=panels[1])
plt.show()
print(techniques_table(records, x="memory", y="bits per byte"))
print("you said", my_guess)

# %% [markdown]
# *Left: the size of the weights against the surprise on held-out text. Right: the compute of a thousand answers against right answers. Filled, pale and hollow as above.*
#
# <details><summary>Explain</summary>
#
# Read three things off your own figures. *Which techniques lead on every pair of axes?* Those are safe to recommend here. *Which change sides?* A model that is small and quick may answer
# as well and still be worse on other text: the two qualities ask different questions. *What does the vote buy?* Five samples are made for one answer, and every token of them is drawn at random: the right panel says how many times the compute of
# the same weights without a vote that is. Compare their intervals, and ask what more bits give for less.
# </details>
#
# Both axes can be chosen here; everything that earlier chapters wrote into your ledger about LabLM joins in ("other chapters"). Energy has no points where no counter can be read (section 5).

# %%
from labutils.lab.widgets.one_plot import techniques_widget

earlier = [r for r in ledger.read() if r.model == "lablm" and r.device == "cpu" and r.chapter != "13" and r.drawable]
techniques_widget(records + earlier)

# %% [markdown]
# ## 4 · Architecture search: which smaller LabLM?
#
# LabLM-small was drawn by hand: three layers, a third of the neurons. Would another shape answer better in the same time? A *search* tries shapes $s$ and looks for
#
# $$s^* = \arg\min_{s:\ t(s)\,\le\,T} L(s)$$
#
# where $L$ is the loss on held-out answers (bits per byte) and $t$ the *measured* time of an answer (MnasNet, Tan et al. 2019, arXiv:1807.11626, measures on the phone itself). Two things make it
# affordable: a student *inherits* LabLM's weights instead of beginning from noise, and a shape that is too slow is dropped before it is trained.

# %%
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from labutils.capstone import inherit as students
from labutils.capstone.inherit import Shape, shape_of
from labutils.capstone.search import COMPARED, SEEDS, SPACE, TIME_BUDGET, Table, evaluate, measure_time

for axis, sizes in SPACE._asdict().items():
    print(f"{axis:<11}", *sizes)
print(math.prod(map(len, SPACE)), "shapes; LabLM is", shape_of("lablm"))
print(f"LabLM-small: {shape_of('lablm-small')}; a shape may take {TIME_BUDGET} times its time")

# %% [markdown]
# ### A smaller vocabulary
#
# LabLM's tokenizer numbers its tokens in the order in which they were merged. So the first $V$ tokens with the first merges *are* a tokenizer: every text still
# round-trips, because all 256 bytes stay, and the embedding of the smaller model is simply the first $V$ rows. The head, which has one row for each token,
# is almost half of LabLM-small's weights. The price is longer texts.

# %%
question = service.evaluation_set("answer", "test", 40, seed=13)[1].messages[-2]["content"]
for size in (1024, *SPACE.vocabulary):
    smaller = students.smaller_tokenizer(tokenizer, size)
    ids = text_ids(smaller, question)
    assert smaller.decode(ids) == question
    print(
        f"{size:5} tokens: {len(ids):2} for {len(question.encode())} bytes  ",
        [smaller.decode([i]) for i in ids[:9]],
        "…",
    )

# %% [markdown]
# Tokens of two vocabularies are different units. Compare models per *byte*, or per answer: $\text{bits per byte} = \sum_i -\log_2 p(\text{token}_i) \,/\, \text{bytes of the text}$.
#
# **Predict:** the head of LabLM-small shrinks from 4,096 rows to 1,024. By what factor does the time of an *answer* change?

# %%
my_factor = predict("time of an answer: a head of 1,024 rows over one of 4,096", None, unit="times")

# %%
hand_made = shape_of("lablm-small")
for size in (1024, *SPACE.vocabulary):
    student = students.inherit(hand_made._replace(vocabulary=size))
    value, low, high = measure_time(student)["ratio"]
    rows = student.model.num_parameters()
    print(
        f"{size:5} tokens: {rows / 1e6:.2f} M parameters, {value:.2f} [{low:.2f}, {high:.2f}] times LabLM-small's time"
    )
    if size == 1024:
        my_factor.compare(value)
print(f"float32, cpu, threads: {torch.get_num_threads()}, 61 rounds in turn with LabLM-small")

# %% [markdown]
# <details><summary>Explain</summary>
#
# A step reads fewer weights, but an answer takes more steps, and the layers are read in each of them. Which side wins depends on the head's share of the weights and on
# how fast tokens get shorter; so measure answers, not tokens.
# </details>

# %% [markdown]
# ## Exercise 13.4: inherit (core)
#
# Write `inherit(embedding, gain, read, write, channels, tokens)`. A small model keeps the listed `channels` of the residual stream and the first `tokens` tokens.
# Shapes: `embedding` (vocabulary, hidden), `gain` of an RMSNorm (hidden,), a matrix that reads the stream (out, hidden), one that writes it (hidden, in).
# Return the four smaller tensors in this order. The small model must compute what the large one would with all other channels at zero; mind that RMSNorm takes a mean over the width,
# $y = g \cdot x \,/\, \sqrt{\tfrac1h \sum x^2}$. 4 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Channels are the columns of <code>embedding</code> and <code>read</code>, but the rows of <code>write</code>.</details>
# <details><summary>Hint 2</summary>With k of h channels the mean is h/k times as large, so the gain takes the factor <code>(h / k) ** 0.5</code>.</details>


# %%
# EXERCISE inherit
def inherit(embedding, gain, read, write, channels, tokens):
    """The four tensors of the smaller model."""
    ### BEGIN SOLUTION
    factor = (len(gain) / len(channels)) ** 0.5
    return embedding[:tokens][:, channels], gain[channels] * factor, read[:, channels], write[channels]
    ### END SOLUTION


# %%
# CHECK inherit
from labutils.course.checks import ch13_search

ch13_search.inherit(inherit)

# %% [markdown]
# What is inherited is a beginning, not a model. A short *recovery* on answers of the training split follows: 48 steps in the stored runs, 24 here.
#
# **Predict:** LabLM-small's shape inherits from LabLM. How many bits per byte of 48 held-out answers does it need at once, after 24 steps, and how many does the hand-made LabLM-small need, which was trained far longer (`data/MODEL_CARD.md`)?

# %%
my_guess = None  # three numbers

# %%
held_out = service.evaluation_set("answer", "validation", 48, seed=13)


def bits_per_byte(loaded):
    """Over all answers."""
    bits, sizes = zip(*students.answer_bits(loaded, held_out), strict=True)
    return sum(bits) / sum(sizes)


student = students.inherit(hand_made)
print(f"inherited            {bits_per_byte(student):.3f} bits per byte")
began = time.perf_counter()
students.recover_(student, steps=24)
print(f"24 steps later       {bits_per_byte(student):.3f}, after {time.perf_counter() - began:.1f} s")
print(f"LabLM-small itself   {bits_per_byte(load_model('lablm-small')):.3f}; you said", my_guess)

# %% [markdown]
# ### Evolution
#
# *Random search* trains shapes at random. *Evolution* (Real et al. 2019, arXiv:1802.01548) lets the best so far have children: a tournament picks a parent, half the time another survivor adds
# some of its axes (crossover), and one axis moves by one place (mutation). Evolution must earn its keep: both get the same number of trainings, begin with the same four shapes and never train one twice. Li and Talwalkar
# (2019, arXiv:1902.07638) found random search with early stopping at least as good as ENAS, a published search that was leading then.

# %% [markdown]
# ## Exercise 13.5: evolve_step
#
# Write `evolve_step(found, space, budget)`. `found` maps each candidate that was tried (a tuple, one value for each axis) to `(time, loss)`; `space` lists each axis' values in order. Take the candidate with
# the smallest loss among those whose time is at most `budget`, and return its children as a sorted list: all candidates that differ from it in one axis by one place
# and were not tried before. If none fits, return `[]`. 10 lines, 15 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>First <code>fitting = [c for c in found if found[c][0] &lt;= budget]</code>, then <code>min</code> with the loss as key.</details>
# <details><summary>Hint 2</summary><code>place = values.index(best[axis])</code>; try <code>place - 1</code> and <code>place + 1</code> if they lie in <code>range(len(values))</code>; a child is <code>(*best[:axis], value, *best[axis + 1:])</code>.</details>


# %%
# EXERCISE evolve_step
def evolve_step(found, space, budget):
    """The untried neighbours of the best that fits."""
    ### BEGIN SOLUTION
    fitting = [c for c in found if found[c][0] <= budget]
    if not fitting:
        return []
    best = min(fitting, key=lambda c: found[c][1])
    children = []
    for axis, values in enumerate(space):
        place = values.index(best[axis])
        for other in (place - 1, place + 1):
            if 0 <= other < len(values):
                child = (*best[:axis], values[other], *best[axis + 1 :])
                if child not in found:
                    children.append(child)
    return sorted(children)
    ### END SOLUTION


# %%
# CHECK evolve_step
ch13_search.evolve_step(evolve_step)

# %% [markdown]
# A tiny search, live: five trainings of 6 steps each, so the losses are large; what counts here is how it proceeds. Shapes that are too slow are timed and cost no training.


# %%
def evaluated(shape):
    """A row of the table, said aloud."""
    row = evaluate(shape, steps=6)
    print(f"{shape!s:<70}{row['ratio'][0]:5.2f}", row.get("bits_per_byte", "too slow"))
    return row


with TemporaryDirectory() as folder:
    tiny = Table(Path(folder) / "tiny.jsonl", measure=evaluated)
    found = tiny.search("evolution", 1, evaluations=5)
print("best:", Shape(*min(found, key=found.get)))

# %% [markdown]
# The whole experiment is stored, because it takes a quarter of an hour of one core: every shape of the space, timed in turn with LabLM-small, and trained for 48 steps if it fits
# (`python -m labutils.capstone.search --all`). The machine was busy with other work meanwhile; each row keeps its load. Losses do not depend on that; the times are ratios of medians of 61 rounds.
#
# **Predict:** after 12 trainings, by how many bits per byte is the best shape of evolution better than the best of random search?

# %%
my_guess = None  # bits per byte; 0 if neither is better

# %%
from labutils.lab.models.students import mean_interval

table = Table()
trained = {shape: row["bits_per_byte"] for shape, row in table.rows.items() if "bits_per_byte" in row}
loads = [row["load"] for row in table.rows.values()]
print(
    f"{len(table.rows)} shapes timed, {len(trained)} within the budget; load {min(loads)} to {max(loads)} on two cores"
)
best = {m: [min(table.search(m, seed).values()) for seed in range(SEEDS)] for m in ("random", "evolution")}
for method, losses in best.items():
    print(f"{method:<10}", *(f"{loss:.3f}" for loss in losses))
gaps = [e - r for e, r in zip(best["evolution"], best["random"], strict=True)]
middle, (low, high) = mean_interval(gaps)
print(f"evolution minus random, {SEEDS} seeds: {middle:+.3f} [{low:+.3f}, {high:+.3f}]; you said", my_guess)

# %% [markdown]
# Three seeds are what a paper often has, and three seeds say little: look at whether that interval holds zero. Because every shape's row is stored, a search now costs nothing but looking up, and
# we can afford 200 seeds (NAS-Bench-101, Ying et al. 2019, arXiv:1902.09635, was built for that).

# %%
from labutils.measurement.timing import bootstrap_interval


def best_so_far(method, seed):
    """The smallest loss after each training."""
    losses = list(table.search(method, seed).values())
    return [min(losses[: n + 1]) for n in range(len(losses))]


curves = {m: [best_so_far(m, seed) for seed in range(200)] for m in best}
gaps = [e[-1] - r[-1] for e, r in zip(curves["evolution"], curves["random"], strict=True)]
low, high = bootstrap_interval(gaps, statistic=statistics.fmean)
print(f"evolution minus random after 12 trainings, 200 seeds: {statistics.fmean(gaps):+.3f} [{low:+.3f}, {high:+.3f}]")
print(
    f"evolution ends ahead in {sum(g < 0 for g in gaps)}, level in {gaps.count(0)}, behind in {sum(g > 0 for g in gaps)}"
)
winner = min(trained, key=trained.get)
print(f"best of all {len(trained)}: {trained[winner]:.3f} bits per byte, {Shape(*winner)}")
print("that is LabLM-small's own shape:", winner == hand_made)

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
for index, (method, some) in enumerate(curves.items()):
    style, x = series_style(index), range(1, 13)
    columns = list(zip(*some, strict=True))
    axes.plot(x, [statistics.fmean(c) for c in columns], label=method, **style)
    axes.fill_between(
        x, [quantile(c, 0.25) for c in columns], [quantile(c, 0.75) for c in columns], alpha=0.2, color=style["color"]
    )
axes.axhline(min(trained.values()), color="black", linestyle=":", label="best of the whole space")
axes.set(xlabel="shapes trained", ylabel="best loss so far, bits per byte", title="Evolution pays, but late")
axes.legend()
plt.show()

# %% [markdown]
# *Means over 200 seeds; the bands hold the middle half of them. The first four shapes are the same for both. The dotted line is what training every shape would find.*

# %%
figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
for index, size in enumerate(SPACE.vocabulary):
    some = [(table.rows[s]["ratio"][0], loss) for s, loss in trained.items() if s[4] == size]
    axes.plot(*zip(*some, strict=True), linestyle="none", label=f"{size} tokens", **series_style(index))
points = sorted((table.rows[s]["ratio"][0], loss) for s, loss in trained.items())
front = [p for i, p in enumerate(points) if p[1] < min((loss for _, loss in points[:i]), default=math.inf)]
axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=0.8, label="front")
place = (table.rows[tuple(hand_made)]["ratio"][0], trained[tuple(hand_made)])
axes.annotate(
    "LabLM-small's shape", place, xytext=(-170, 4), textcoords="offset points", arrowprops={"arrowstyle": "->"}
)
axes.axvline(TIME_BUDGET, color="black", linestyle=":")
axes.set(xlabel="time of an answer ÷ LabLM-small's", ylabel="bits per byte after 48 steps")
axes.set_title("Every shape within the time: the vocabulary decides first")
axes.legend()
plt.show()

# %% [markdown]
# *Each point is a shape that inherited and recovered for 48 steps; the dotted line is the budget of time, the thin line the front: nothing to its left is better. Validation answers.*

# %%
twins = [(table.rows[(*s[:4], 2048)], table.rows[s]) for s in trained if s[4] == 4096]
factors = [short["ratio"][0] / long["ratio"][0] for short, long in twins]
lost = [short["bits_per_byte"] - long["bits_per_byte"] for short, long in twins if "bits_per_byte" in short]
print(f"the same shape with 2,048 instead of 4,096 tokens, {len(twins)} pairs:")
print(
    f"time of an answer: median factor {statistics.median(factors):.2f}, from {min(factors):.2f} to {max(factors):.2f}"
)
print(f"loss: {statistics.median(lost):+.2f} bits per byte in the median, {min(lost):+.2f} at best")

# %% [markdown]
# Half of the vocabulary saves no time in the middle, because the answers get longer, and it costs quality in every pair. Part of that may be our recovery: 48 steps are few to learn
# to write in shorter pieces, when the inherited weights were trained on long ones. A search with a *short* recovery prefers what is easy to inherit. That is a bias of the method and no law about vocabularies.
#
# ### The winners beside the hand-made model
#
# Winners were chosen by validation loss, so only new data can say how good they are. The control is LabLM-small's *shape*, inherited and recovered in the same way: then nothing but the shape differs.

# %%
from labutils.lab.models.compare import paired_quality

stored = [json.loads(line) for line in COMPARED.read_text(encoding="utf-8").splitlines()]
for steps in sorted({row["steps"] for row in stored if row["steps"]}):
    rows = [row for row in stored if row["steps"] == steps]
    control = next(row for row in rows if row["name"] == "LabLM-small's shape")
    for row in rows:
        quality = paired_quality(row["bits"], control["bits"])
        low, high = quality.interval
        print(
            f"{steps:4} steps  {row['name']:<20} {Shape(*row['shape'])}: {sum(row['right'])} of {len(row['right'])} right"
        )
        print(
            f"{'':12}{quality.bits_per_byte:.3f} bits per byte; minus control {quality.difference:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
hand = next(row for row in stored if row["steps"] is None)
bits, sizes = zip(*hand["bits"], strict=True)
print(
    f"LabLM-small itself: {sum(bits) / sum(sizes):.3f} bits per byte, {sum(hand['right'])} of {len(hand['right'])} right"
)

# %% [markdown]
# No shape within the time is better than the one that was drawn by hand. One of the six stored searches found it, a random one, although over 200 seeds evolution ends ahead far more often:
# three seeds are an anecdote. The order after 48 steps is still the order after 384 here, which need not be so. And what separates the control from LabLM-small itself, the same shape,
# is training alone: eight times as many steps did more for the loss than any change of shape.

# %% [markdown]
# ## 5 · Energy: what a counter says, and what does not replace it
#
# Time is only one price of an answer. Energy can be *read*: RAPL counts the microjoules of a processor's packages, NVML the millijoules of an NVIDIA
# GPU. With readings $E_i$ at times $t_i$ of a counter that starts again at $W$, and the power $P_0$ of the idle machine,
#
# $$\frac{\text{J}}{\text{token}} = \frac{1}{n}\left(\sum_i \big[(E_{i+1} - E_i) \bmod W\big] - P_0\,(t_{\text{end}} - t_{\text{begin}})\right)$$

# %% [markdown]
# Three rules come with it: measure $P_0$ just before, since the machine draws it anyway; run long enough for the counter, which is refreshed about every
# 1 ms (RAPL) or every 20 to 100 ms (NVML); say how often it was read. Both count the whole device, neighbours included.
#
# **Tiny numbers:** 15 J from 80 to 95 of a counter that wraps at 100, then 30 J to 25. Take 10 W idle for 3 s off 45 J, and 15 J remain; 8 tokens cost
# 1.9 J each.

# %%
from labutils.measurement.energy import (
    HOROWITZ_PJ,
    energy,
    estimate_by_counting,
    estimate_by_load,
    find_counters,
    idle_power,
)

found = find_counters("cpu")
idle_w = idle_power(found, seconds=2.0)

# %%
decoders = {
    name: design.decoder()
    for name, design in (("float32", Design()), ("int8", Design(bits=8)), ("int4", Design(bits=4)))
}
QUESTION = "Hello! I want to track order A12345."
chat = [{"role": "system", "content": service.SYSTEM_MESSAGES["answer"]}, {"role": "user", "content": QUESTION}]
PROMPT_IDS = chat_ids(tokenizer, chat, add_generation_prompt=True)
print("counters:", found[0] or found[1])
print("idle power:", "not measured" if idle_w is None else f"{idle_w:.2f} W")

# %%
from labutils.applications.tasks import answer

replies = {name: answer(decoder, PROMPT_IDS, 40, stop={END}) for name, decoder in decoders.items()}
for name, decoder in decoders.items():
    with energy(found, idle_w=idle_w) as spent:
        until = time.perf_counter() + (2.0 if found[0] else 0.0)
        while time.perf_counter() < until:
            answer(decoder, PROMPT_IDS, 40, stop={END})
    print(f"{name:<8} {spent}")
print({name: tokenizer.decode(reply.token_ids) for name, reply in replies.items()})

# %% [markdown]
# Where a line above says "not measured", that is the result. Most virtual machines have no counter, and since CVE-2020-8694, a side channel that read secrets
# from power, most systems let only root read it. The temptation is to compute a number instead.

# %% [markdown]
# ## Exercise 13.6: joules_per_token (core)
#
# Write `joules_per_token(readings, wraps_at, idle_w, tokens)`: `readings` is a list of (second, microjoules) of one counter, at uneven intervals, which
# starts again at `wraps_at` microjoules, at most once between two readings. Return the joules above idle for each token. 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Go through neighbouring readings: <code>zip(readings, readings[1:])</code>; where the second is smaller, it wrapped.</details>
# <details><summary>Hint 2</summary>Sum of the steps ÷ 1e6, minus <code>idle_w</code> × (last second − first second), all that ÷ <code>tokens</code>.</details>


# %%
# EXERCISE joules_per_token
def joules_per_token(readings, wraps_at, idle_w, tokens):
    """Joules above idle for each token."""
    ### BEGIN SOLUTION
    total = 0
    for (_, before), (_, after) in zip(readings, readings[1:], strict=False):
        total += after - before if after >= before else after - before + wraps_at
    seconds = readings[-1][0] - readings[0][0]
    return (total / 1e6 - idle_w * seconds) / tokens
    ### END SOLUTION


# %%
# CHECK joules_per_token
from labutils.course.checks import ch13_energy

ch13_energy.joules_per_token(joules_per_token)

# %% [markdown]
# ### Two estimators of the same answers
#
# *By load* (codecarbon, where a processor has no counter): TDP × share of the cores × seconds, or half of the TDP where the load is unknown; a processor
# that it does not know gets 85 W. *By counting*: bytes that are moved and operations, each at a price in picojoules. The usual prices are those of
# Horowitz (ISSCC 2014, figure 1.1.9), for 45 nm, a technology of 2008; a byte from DRAM is given as 162 to 325 pJ.
#
# Here both end in joules. Before you quote grams of CO₂, ask where the tool thinks that you are: codecarbon looks your place up on the network, and
# without one it takes Quebec, whose electricity is nearly all hydropower.
#
# Each answer reads the weights once a token, and multiplies and adds once a weight; the whole prompt counts as one token.
#
# **Predict:** by what factor do the two differ for float32, and for int4?

# %%
my_guess = None  # a pair of factors

# %%
TDP_W = 85.0  # of no known processor: codecarbon's default
print("pJ, from and to:", {name: tuple(round(pj, 1) for pj in pair) for name, pair in HOROWITZ_PJ.items()})
weights = sum(p.numel() for p in load_model("lablm").model.parameters())
cores = torch.multiprocessing.cpu_count()
print(
    f"{'':<9}{'tokens':>7}{'ms':>7}   by load, J ({torch.get_num_threads()} of {cores} cores)   half of the TDP, J   by counting, J"
)

# %%
estimates = {}
rounds = measure_interleaved(
    {n: lambda d=d: answer(d, PROMPT_IDS, 40, stop={END}) for n, d in decoders.items()}, repeats=7
)
for name, decoder in decoders.items():
    seconds, passes = rounds[name].median_s, len(replies[name].token_s)
    kind = "float32 multiply and add" if name == "float32" else "int8 multiply, int32 add"
    prices = [
        (b, HOROWITZ_PJ[kind][0]) for memory in ("1 MB cache, a byte", "DRAM, a byte") for b in HOROWITZ_PJ[memory]
    ]
    counted = [
        estimate_by_counting(passes * decoder.weight_bytes, passes * weights, pj_per_byte=b, pj_per_operation=o)
        for b, o in prices
    ]
    load = estimate_by_load(TDP_W, seconds, torch.get_num_threads() / cores)
    estimates[name] = (load, estimate_by_load(TDP_W, seconds, 0.5), min(counted), max(counted))
    print(
        f"{name:<9}{passes:>7}{1e3 * seconds:7.1f}   {load:28.3f} {estimates[name][1]:20.3f}   {min(counted):.4f} to {max(counted):.4f}"
    )

# %%
for name, (load, _, low, high) in estimates.items():
    print(f"{name:<8} by load ÷ by counting: {load / high:6.0f} to {load / low:.0f} times")
first, last = estimates["float32"], estimates["int4"]
print(
    f"int4 saves, by load: {first[0] / last[0]:.1f} times; by counting: {first[2] / last[2]:.1f} (cache), {first[3] / last[3]:.1f} (DRAM)"
)
print("you said", my_guess)

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
rows = [("by load", 0, 0), ("half of the TDP", 1, 1), ("by counting, cache to DRAM", 2, 3)]
for index, (label, low, high) in enumerate(rows):
    style = series_style(index)
    for row, name in enumerate(estimates):
        ends, place = (estimates[name][low], estimates[name][high]), row + 0.2 * (index - 1)
        axes.plot(ends, [place, place], **style, label=label if row == 0 else None)
axes.set_yticks(range(3), list(estimates))
axes.invert_yaxis()
axes.set(xscale="log", xlabel="joules for one answer (estimated, not measured)")
load, _, low, high = estimates["float32"]
axes.set_title(f"Two estimates of the energy of float32 differ {load / high:.0f} to {load / low:.0f} times")
axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% [markdown]
# *One answer of the same model, greedy, three widths of its weights. Neither estimate is a measurement.*
#
# <details><summary>Explain</summary>
#
# By load, energy is time in another unit: whatever is faster seems to save, and a memory that waits costs as much as a unit that multiplies. By counting,
# energy is bytes in another unit: it leaves out the clock, the caches in between, instructions, leakage, the board. So they answer different
# questions, and even the ranking of two designs may depend on the choice. A comparison of designs needs a counter; without one, say "not measured".
# </details>

# %% [markdown]
# ## 6 · Fairness: who pays for a compression
#
# A mean hides who lost. Split the requests into groups $g$, and compare each request with itself: with score $q'$ of the compressed model and $q$ of
# the original, a group's loss is $L_g = \overline{q - q'}$ over its requests, and the gap is $\max_g L_g - \min_g L_g$.
#
# Each customer's sentence stands in the corpus in English and in Chinese with one meaning. So the languages can be compared meaning by meaning, and
# nothing but the language differs. Other groups: intents that training showed often or seldom; phrasings that it showed, new frames around known acts, and
# acts that it never showed.

# %% [markdown]
# **Tiny numbers:** of 10 English answers 9 were right and 8 are now, of 10 Chinese ones 6 and 6. Chinese has the lower quality, English the loss: 0.1, and
# the gap is 0.1.

# %%
from labutils.capstone import fairness

MEANINGS = 40
requests = fairness.drawn_requests(MEANINGS)
counts = fairness.intent_counts()
groups = fairness.groups_of(requests, counts)
for request in requests[4:6]:
    print(f"{request.language}, {request.phrasing}: {request.query.text(request.language)} → {request.answer}")
print({name: len(members) for name, members in groups.items()})
(often, most), (seldom, least) = counts.most_common()[0], counts.most_common()[-1]
print(f"in 20,000 training dialogues: {often} {most} times, {seldom} {least} times, {most / least:.2f} times as often")

# %% [markdown]
# The corpus draws every intent equally often, so "frequent" and "rare" differ by chance alone. The groups stay in as a control: a gap between them
# needs another reason than frequency.
#
# **Predict:** which compression widens the gap between the languages most, and which language loses?

# %%
my_guess = None  # such as ("int3", "zh")

# %%
names = ("float32", "int8", "int3", "50% pruned", "LabLM-small")
targets = {name: fairness.COMPRESSED[name].decoder() for name in names}
live = fairness.answered(targets, tokenizer, requests)
base = live["float32"].scores
print(f"live, {MEANINGS} meanings in two languages: mean difference to float32, with its 95% interval")
for name in names[1:]:
    found = fairness.group_differences(live[name].scores, base, groups)
    print(f"{name:<12} en {found['en']}   zh {found['zh']}")

# %% [markdown]
# Forty meanings tell only large losses apart. The stored run asked all variants the same way, 600 meanings, on this course's machine; greedy answers depend
# on the weights, not on how busy a machine is (`python -m labutils.capstone.fairness` makes it anew). The figure is drawn from it. Two answers to one meaning count as *one*
# observation in every group that holds both.

# %%
stored = fairness.stored_scores()
many = fairness.drawn_requests(fairness.MEANINGS)
wide = fairness.groups_of(many, counts)
compressed = [name for name in fairness.COMPRESSED if name != "float32"]
losses = {name: fairness.group_differences(stored[name], stored["float32"], wide) for name in compressed}
original = {group: statistics.fmean(stored["float32"][i] for i in members) for group, members in wide.items()}
print("stored run, float32 itself:", {group: f"{value:.2f}" for group, value in original.items()})
print(f"{'difference':<14}" + "".join(f"{group:>17}" for group in wide))
for name in compressed:
    print(f"{name:<14}" + "".join(f"{gap.mean:+9.3f} ±{gap.mean - gap.low:.3f} " for gap in losses[name].values()))

# %%
figure, panels = plt.subplots(1, len(compressed), figsize=(12, 3.6), sharey=True, layout="constrained")
for axes, name in zip(panels, compressed, strict=True):
    for row, gap in enumerate(losses[name].values()):
        style = series_style(0 if row < 2 else 1 if row < 4 else 2)
        axes.errorbar(gap.mean, row, xerr=gap.high - gap.mean, capsize=3, **style)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(title=name, xlabel="score against float32")
    axes.locator_params(axis="x", nbins=3)
panels[0].set_yticks(range(len(wide)), list(wide))
panels[0].invert_yaxis()
figure.suptitle("One compression, unequal losses: each panel has its own scale")
plt.show()

# %% [markdown]
# *Stored run: paired differences with 95% intervals, 600 meanings in two languages. Colours and markers: language, frequency, phrasing.*
#
# ### Forty-two intervals
#
# Of many intervals of 95%, one in twenty misses its value by chance. Bonferroni's answer is to ask each of $m$ intervals for $1 - 0.05/m$: the half width
# grows from 1.96 to $z_{1 - 0.025/m}$ deviations.

# %%
intervals = [(name, group, gap) for name in compressed for group, gap in losses[name].items()]
m = len(intervals)
z = statistics.NormalDist().inv_cdf(1 - 0.025 / m)
outside = [(name, group) for name, group, gap in intervals if gap.low > 0 or gap.high < 0]
kept = [(name, group) for name, group, gap in intervals if abs(gap.mean) > (gap.high - gap.mean) * z / 1.96]
print(f"{m} intervals: {len(outside)} leave out 0, {0.05 * m:.1f} would by chance if nothing had changed")
print(f"with Bonferroni's z = {z:.2f}: {len(kept)}; no longer there: {sorted(set(outside) - set(kept))}")

# %%
print("how much more Chinese loses than English (negative: more), meaning by meaning")
for name in compressed:
    print(f"{name:<14}{fairness.language_difference(stored[name], stored['float32'])}")
print("you said", my_guess)

# %% [markdown]
# ## Exercise 13.7: loss_gap
#
# Write `loss_gap(changed, baseline, picks)`. The first two map each group to the scores of its requests, in one order. `picks` maps each group to a list of
# resamples: each a list of indices into that group's requests. Return `(gap, low, high)`: the loss of the worst-off group minus the loss of the best-off one, and
# the `quantile` 0.025 and 0.975 of this difference over the resamples. Decide which groups are worst and best once, from all requests. 8 lines, 15 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>First a list of losses for each group: baseline − changed, request by request; then the group with the largest mean and the one with the smallest.</details>
# <details><summary>Hint 2</summary>Resample k: mean of the worst group's losses at <code>picks[worst][k]</code>, minus that of the best group's at <code>picks[best][k]</code>.</details>


# %%
# EXERCISE loss_gap
def loss_gap(changed, baseline, picks):
    """(gap, low, high) between the worst-off and the best-off group."""
    ### BEGIN SOLUTION
    losses = {n: [b - c for c, b in zip(changed[n], baseline[n], strict=True)] for n in changed}
    means = {n: statistics.fmean(loss) for n, loss in losses.items()}
    worst, best = max(means, key=means.get), min(means, key=means.get)
    drawn = []
    for one, two in zip(picks[worst], picks[best], strict=True):
        drawn.append(statistics.fmean(losses[worst][i] for i in one) - statistics.fmean(losses[best][i] for i in two))
    return means[worst] - means[best], quantile(drawn, 0.025), quantile(drawn, 0.975)
    ### END SOLUTION


# %%
# CHECK loss_gap
from labutils.course.checks import ch13_fairness

ch13_fairness.loss_gap(loss_gap)

# %% [markdown]
# The worst of several groups always looks worse than it is, since the largest of several noisy numbers was chosen. The control is to shuffle which
# meaning belongs to which phrasing, and to look at the gap that chance makes.


# %%
def phrasing_scores(scores, members):
    return {group: fairness.by_meaning(scores, members[group]) for group in fairness.PHRASINGS}


def shuffled(members, rng):
    meanings = [i // 2 for group in fairness.PHRASINGS for i in members[group][::2]]
    rng.shuffle(meanings)
    third = len(meanings) // 3
    parts = (meanings[k * third : (k + 1) * third] for k in range(3))
    return {g: [i for n in part for i in (2 * n, 2 * n + 1)] for g, part in zip(fairness.PHRASINGS, parts, strict=True)}


# %%
rng = random.Random(13)
for name in compressed:
    gap, chance = fairness.loss_gap(phrasing_scores(stored[name], wide), phrasing_scores(stored["float32"], wide)), []
    for _ in range(100):
        mixed = shuffled(wide, rng)
        old, new = (phrasing_scores(stored[n], mixed) for n in ("float32", name))
        means = [statistics.fmean(old[g]) - statistics.fmean(new[g]) for g in fairness.PHRASINGS]
        chance.append(max(means) - min(means))
    print(f"{name:<12} {gap}; by chance up to {quantile(chance, 0.95):.3f}")

# %% [markdown]
# ### Look inside a group before you blame it
#
# Groups overlap. Here is the student's loss, language by phrasing; then the "frequent" and "rare" intents once more, without the acts that training never
# showed. The last line counts each *act* as one observation: a conclusion about new acts rests on as many acts as there are.

# %%
student, first = stored["LabLM-small"], stored["float32"]
for language in service.LANGUAGES:
    for phrasing in fairness.PHRASINGS:
        both = [i for i in wide[language] if i in set(wide[phrasing])]
        gap = fairness.paired_difference([student[i] for i in both], [first[i] for i in both])
        print(f"{language}, {phrasing:<15} float32 {statistics.fmean(first[i] for i in both):.2f}, LabLM-small {gap}")
for group in ("frequent intent", "rare intent"):
    known = [i for i in wide[group] if many[i].phrasing != fairness.NEW_ACT]
    print(f"{group}, without new acts: {fairness.group_differences(student, first, {group: known})[group]}")

# %%
acts = {}
for i in wide[fairness.NEW_ACT]:
    if many[i].language == "zh":
        acts.setdefault((many[i].query.intent, many[i].query.phrasing.act), []).append(student[i] - first[i])
by_act = [statistics.fmean(values) for values in acts.values()]
print(
    f"Chinese, new acts, LabLM-small: {fairness.paired_difference(by_act, [0.0] * len(by_act))} over {len(by_act)} acts"
)
print(
    "acts that lost:",
    {intent: f"{statistics.fmean(v):+.2f}" for (intent, _), v in acts.items() if statistics.fmean(v) < -0.2},
)

# %% [markdown]
# <details><summary>Explain</summary>
#
# Read three things off the tables. A compression may hurt either language: compare the signs of pruning and of the student. The group with the lowest
# quality, new acts, loses *least* where a compression breaks much (three bits, half of the weights): where float32 fails already, there is little to lose. Where little breaks, in the student and at 30%, it
# loses *most*. And a loss that seems to belong
# to frequent intents sits in the few intents whose acts are new: the two lines without them show it. An interval over requests says nothing about other
# acts, hence the last, wider one: counted by act, it reaches 0, so the student is not shown to lose Chinese on *other* new acts.
# </details>

# %% [markdown]
# ### The price in time
#
# Petrov et al. (arXiv:2305.15425, 2023) found that one sentence may cost many times as many tokens in another language. A tokenizer is the cause, so ask this one.

# %%
sizes = {}
for language in service.LANGUAGES:
    texts = [r.query.text(language) + r.answer for r in many if r.language == language]
    sizes[language] = [(len(text_ids(tokenizer, text)), len(text), len(text.encode())) for text in texts]
for place, unit in enumerate(("tokens", "characters", "bytes")):
    en, zh = ([size[place] for size in sizes[language]] for language in service.LANGUAGES)
    print(
        f"{unit:<11} en {statistics.fmean(en):6.1f}   zh {statistics.fmean(zh):6.1f}   zh ÷ en {paired_ratio(zh, en)}"
    )

# %%
print(f"cpu, threads: {torch.get_num_threads()}, {MEANINGS} meanings, each answered once; ms for a whole answer, p50")
for name in names:
    en, zh = ([1e3 * reply.latency_s for reply in live[name].replies[start::2]] for start in (0, 1))
    tokens = [statistics.fmean(len(reply.token_s) for reply in live[name].replies[start::2]) for start in (0, 1)]
    print(
        f"{name:<12} en {quantile(en, 0.5):5.1f}   zh {quantile(zh, 0.5):5.1f}   zh ÷ en {paired_ratio(zh, en)}   "
        f"tokens {tokens[0]:.1f} and {tokens[1]:.1f}"
    )

# %% [markdown]
# This tokenizer was trained on the corpus itself, so Chinese costs no more; one of bytes would charge what the line "bytes" says. Compare the
# numbers of tokens with float32's: a compressed model that answers wrongly may also write answers of another length, and then quality and time move together.

# %% [markdown]
# ### A repair: what calibration reads
#
# GPTQ chooses codes that keep the outputs on its calibration text, $\min \lVert X (W - \hat W)^\top \rVert^2$, and sees that text only as $X^\top X$, a sum over tokens. Texts are therefore mixed by
# mixing sums. Suppose someone calibrated int3 on English alone, as is usual. The repair: half of the tokens in Chinese. The control: half of the tokens *other* English
# text, so that more or fresher text is not what helps.
#
# **Predict:** how much of Chinese's loss does the repair win back, and what does English pay?

# %%
my_guess = None  # two numbers of points

# %%
seen = fairness.calibration_statistics("en", "zh", rows=16, context=256)
print("tokens of each text:", 16 * 256)
arms = ("GPTQ, English", "GPTQ, English, Chinese")
repaired = {name: fairness.calibrated_decoder(Design(bits=3), seen, fairness.MIXES[name]) for name in arms}
again = fairness.answered(repaired, tokenizer, requests)
print(f"live, {MEANINGS} meanings; difference to float32")
for name in arms:
    found = fairness.group_differences(again[name].scores, base, groups)
    print(f"{name:<28} en {found['en']}   zh {found['zh']}")

# %%
arms = [name for name in stored if name.startswith("GPTQ")]
fixes = {name: fairness.group_differences(stored[name], stored["float32"], wide) for name in arms}
print("stored run, 600 meanings; difference to float32")
for name in arms:
    more = fairness.language_difference(stored[name], stored["float32"])
    print(f"{name:<28} en {fixes[name]['en']}   zh {fixes[name]['zh']}   zh − en {more}")
print("against English calibration, after the same number of tokens")
for name in ("GPTQ, English, Chinese", "GPTQ, English, more English"):
    found = fairness.group_differences(stored[name], stored["GPTQ, English"], wide)
    print(f"{name:<28} en {found['en']}   zh {found['zh']}")
print("you said", my_guess)

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for index, language in enumerate(service.LANGUAGES):
    for row, name in enumerate(arms):
        gap = fixes[name][language]
        axes.errorbar(
            gap.mean,
            row + 0.15 * (2 * index - 1),
            xerr=gap.high - gap.mean,
            capsize=3,
            label=language if row == 0 else None,
            **series_style(index),
        )
axes.axvline(0, color="black", linewidth=0.8)
axes.set_yticks(range(len(arms)), arms)
axes.invert_yaxis()
axes.set(xlabel="score against float32, int3", title="The language that calibration does not read pays for it")
axes.legend()
plt.show()

# %% [markdown]
# *Stored run, int3 with one scale for 32 weights, 600 meanings; the tokens of every arm weigh the same in total; "more English" reads other rows.*
#
# <details><summary>Explain</summary>
#
# The repair wins back most of what Chinese lost, and English keeps what it had. The control leaves Chinese where it was: what counted was the language, not the amount of text. There is a
# price: the same tokens in English would have helped English, as the control shows. Calibration on Chinese alone turns the gap round. The default text of this course, half of it code, favours
# English too. So a model card should name its calibration text.
# </details>

# %% [markdown]
# ## 7 · Privacy: what a service gives away
#
# The assistant reads names, codes and order numbers. They may leave it in four places, and each of them can be measured:
#
# | where | who looks | measured by |
# | --- | --- | --- |
# | weights | whoever may ask the model | exposure of planted secrets |
# | losses | whoever asks "was this text in your training data?" | ROC of an attack |
# | time | another customer of the same server | how soon a first token comes |
# | logs | whoever reads them later | what a filter misses |
#
# All attacks here go against our own models and our own engine, and every customer is made up.

# %% [markdown]
# ### Canaries: does the model remember a secret?
#
# Plant random secrets in the training text and see how far training moves them up. With R all possible secrets, each ranked by the
# model's probability (Carlini et al. 2019, arXiv:1802.08232):
#
# $$\text{exposure}(s) = \log_2 |R| - \log_2 \text{rank}(s)$$

# %%
from labutils.capstone import canaries as canary_tools

canaries = canary_tools.draw_canaries(0, times=(0, 1, 4, 16), each=12)
for message in canaries[-1].messages:
    print(f"{message['role']}: {message['content']}")
print(
    f"{len(canaries)} secrets; the last one is to be planted {canaries[-1].times} times, the first {canaries[0].times}"
)
print(f"three digits: {10**3} codes, so all are ranked; the most is {math.log2(10**3):.2f} bits")
chance = canary_tools.chance_exposure(10**3)
print(f"mean exposure of a random secret: {chance:.2f} bits; log2 e is {math.log2(math.e):.2f}")

# %% [markdown]
# **Tiny numbers:** of four codes the model finds one likelier than the secret, so its rank is 2 and its exposure log₂ 4 − log₂ 2 = 1 bit.
#
# A secret that was never planted has a random rank, whatever the model. Its exposure is not 0 but, on average, about log₂ e. That is why some of our
# secrets are never planted: they are the control.

# %% [markdown]
# ## Exercise 13.8: exposure (core)
#
# Write `exposure(log_probs, secret)`: a list with the log-probability of every code, and the secret's index in it. Rank 1 is the likeliest. Equals share their
# mean rank: two at the top have rank 1.5. 4 lines, 10 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>Count the codes with a higher log-probability, and the codes with the same one.</details>
# <details><summary>Hint 2</summary><code>rank = higher + (equal + 1) / 2</code>, where <code>equal</code> counts the secret itself.</details>


# %%
# EXERCISE exposure
def exposure(log_probs, secret):
    """log2 |R| - log2 rank."""
    ### BEGIN SOLUTION
    import math

    higher = sum(x > log_probs[secret] for x in log_probs)
    equal = log_probs.count(log_probs[secret])
    return math.log2(len(log_probs)) - math.log2(higher + (equal + 1) / 2)
    ### END SOLUTION


# %%
# CHECK exposure
from labutils.course.checks import ch13_privacy

ch13_privacy.exposure(exposure)

# %% [markdown]
# Now a short training: LabLM-small reads 120 dialogues twice, and among them the canaries. Another 120 dialogues, drawn from the *same* stream, stay out. Every
# second one goes in, and none occurs twice.

# %%
from labutils.lab.training.loop import FitPlan, fit_
from labutils.lab.training.losses import teacher_loss, text_loss


def drawn_texts(count, seed, *, keep=lambda dialogue: True, without=()):
    """Different dialogues of at most 64 tokens."""
    found = dict.fromkeys(without)
    for dialogue in service.dialogues(seed, "train", 40 * count):
        ids = tuple(chat_ids(tokenizer, dialogue.messages)) if keep(dialogue) else ()
        if 0 < len(ids) <= 64:
            found[ids] = None
        if len(found) == len(without) + count:
            return list(found)[len(without) :]


stream = drawn_texts(240, seed=77)
members, others = stream[::2], stream[1::2]
planted = [chat_ids(tokenizer, c.messages) for c in canaries for _ in range(c.times)]
print(f"{len(members)} members, {len(others)} others, {len(planted)} canary texts")


# %%
def trained(texts, loss_of=text_loss, seed=0):
    """LabLM-small after one pass over the texts."""
    model = load_model("lablm-small").model
    parts = canary_tools.shuffled_parts(texts, batch=8, seed=seed)
    plan = FitPlan(steps=len(parts), lr=1e-3, warmup_steps=5, final_lr_share=0.1)
    losses = fit_(model, lambda step: parts[step], loss_of(model), plan)
    print(f"{len(parts)} steps of 8 texts, loss {losses[0]:.2f} → {losses[-1]:.2f} nats per token")
    return model


started = time.perf_counter()
untrained = load_model("lablm-small").model
tuned = trained([*members, *members, *planted])
print(f"{time.perf_counter() - started:.0f} s, threads: {torch.get_num_threads()}")

# %% [markdown]
# What happens to it afterwards? It is quantized. Or it is distilled: a student begins where the tuned model began, and reads *other* dialogues, in which no canary stands.
# One student learns from the tuned model's distributions (logits), the other from the plain text.
#
# **Predict:** the exposure in bits of a code planted 1, 4 and 16 times, and of one planted 16 times after int3.

# %%
my_guess = None  # four numbers

# %%
import copy

from labutils.quantization.packed import pack_model_

fresh = drawn_texts(240, seed=78, without=stream)
versions = {"before training": untrained, "tuned, float32": tuned}
for bits in (8, 4, 3):
    versions[f"tuned, int{bits}"] = pack_model_(copy.deepcopy(tuned), Design(bits=bits).scheme)
versions["student, logits"] = trained(fresh, lambda model: teacher_loss(model, tuned), seed=1)
versions["student, text"] = trained(fresh, seed=1)

# %%
from labutils.measurement.timing import bootstrap_interval

TIMES = (0, 1, 4, 16)
found = {name: canary_tools.exposures(model, tokenizer, canaries) for name, model in versions.items()}
by_times = {}
print(f"{'exposure, bits':<18}" + "".join(f"{f'planted: {k}':>22}" for k in TIMES))
for name, bits in found.items():
    row = ""
    for k in TIMES:
        values = [b for b, c in zip(bits, canaries, strict=True) if c.times == k]
        low, high = bootstrap_interval(values, statistic=statistics.fmean)
        by_times[name, k] = statistics.fmean(values), low, high
        row += f"{statistics.fmean(values):8.2f} [{low:5.2f}, {high:5.2f}]"
    print(f"{name:<18}{row}")
print(f"chance {canary_tools.chance_exposure(1000):.2f}; you said", my_guess)

# %%
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for row, name in enumerate(versions):
    mean, low, high = zip(*(by_times[name, k] for k in TIMES), strict=True)
    spread = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
    places = [i + 0.07 * (row - 3) for i in range(len(TIMES))]
    axes.errorbar(places, mean, yerr=spread, capsize=2, linestyle="none", **series_style(row), label=name)
axes.axhline(canary_tools.chance_exposure(1000), color="black", linewidth=0.8, linestyle=":")
axes.axhline(math.log2(1000), color="black", linewidth=0.8)
axes.set_xticks(range(len(TIMES)), [f"planted: {k}" for k in TIMES])
axes.set(ylabel="exposure, bits", ylim=(0, 10.5), title="Repetition exposes a secret")
axes.legend(fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0.0, 0.96))
plt.show()

# %% [markdown]
# *Mean exposure of 12 canaries each, with 95% bootstrap intervals over canaries, for one training run. Dotted: a random secret. Solid: the secret is the likeliest code of all.*

# %% [markdown]
# <details><summary>Explain</summary>
#
# Compare the columns first: what is seen often is remembered, and removing duplicates is the cheapest protection (Kandpal et al. 2022, arXiv:2202.06539). Eight and
# four bits forget little: compression is no protection. Where three bits forget some, the next table shows that they forget other things as well. A student that never reads a canary's
# text stays near chance, even with the teacher's logits, for nobody asked the teacher about those customers. An interval that reaches the
# dotted line proves no safety, since 12 secrets are few; and where an interval of the untrained model or of a student misses it, above or below, chance did so: to these models every code is
# random, 28 intervals are drawn, and those of a column judge the same 12 secrets.
# </details>

# %% [markdown]
# ### Membership: was this text in the training data?
#
# A model has a lower loss on what it was trained on. Three attacks give each text a score; a high one says "member":
#
# | score | idea |
# | --- | --- |
# | − loss | Yeom et al. 2018, arXiv:1709.01604 |
# | loss before training − loss | some texts are easy for any model |
# | loss of a reference − loss | the reference was trained on *other* texts of the same kind |

# %% [markdown]
# A threshold on the score makes a point of the ROC: false accusations against members found. The area under it (AUC) is the chance that a member scores higher than another text.
# An accusation needs few errors, however, so look also at the members found while at most 1% of the others are accused (Carlini et al. 2022, arXiv:2112.03570).
#
# **Tiny numbers:** members score 3 and 1, others 2 and 0. Three of four pairs are in order, so the AUC is 0.75; above 2 stands one member of two and no other.

# %% [markdown]
# ## Exercise 13.9: attack_scores
#
# Write `attack_scores(members, others, fpr)`, two lists of scores and an allowed rate. Return a pair: the AUC, in which equal scores count ½, and the largest share of members at or above a threshold that
# at most a share `fpr` of the others reaches (0 if every threshold accuses too many). 6 lines, 15 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>AUC: the mean over all pairs of <code>(m > o) + (m == o) / 2</code>.</details>
# <details><summary>Hint 2</summary>Every score that occurs is a threshold to try: <code>for t in {*members, *others}</code>.</details>


# %%
# EXERCISE attack_scores
def attack_scores(members, others, fpr):
    """The AUC, and the members found at a rate of false accusations."""
    ### BEGIN SOLUTION
    pairs = [(m > o) + (m == o) / 2 for m in members for o in others]
    best = 0.0
    for t in {*members, *others}:
        if sum(o >= t for o in others) / len(others) <= fpr:
            best = max(best, sum(m >= t for m in members) / len(members))
    return sum(pairs) / len(pairs), best
    ### END SOLUTION


# %%
# CHECK attack_scores
from labutils.course.checks import ch13_privacy

ch13_privacy.attack_scores(attack_scores)

# %% [markdown]
# **Predict:** which of the three attacks has the largest AUC, and how many of 100 members does it find at 1% false accusations?

# %%
my_guess = None  # a pair: attack, members of 100

# %%
from labutils.capstone import membership

losses = {name: [membership.text_losses(m, some) for some in (members, others)] for name, m in versions.items()}


def attack(name, reference=None):
    """Scores of members and of others."""
    base = [0.0, 0.0] if reference is None else losses[reference]
    return [(b - own).tolist() for b, own in zip(base, losses[name], strict=True)]


def describe(label, scored):
    low, high = membership.auc_interval(*scored)
    found_at = membership.tpr_at(*scored, 0.01)
    print(f"{label:<38}AUC {membership.auc(*scored):.2f} [{low:.2f}, {high:.2f}], {found_at:4.0%} found at 1%")


references = {"- loss": None, "before training - loss": "before training", "student, text - loss": "student, text"}
for label, reference in references.items():
    describe(label, attack("tuned, float32", reference))
print("you said", my_guess)

# %% [markdown]
# Why does taking the loss before training off *not* help? A calibration helps if it predicts how hard a text is for the tuned model. Ask the texts that were not trained on:

# %%
hard = losses["tuned, float32"][1].tolist()
for reference in ("before training", "student, text"):
    r = statistics.correlation(losses[reference][1].tolist(), hard)
    print(f"loss of {reference:<16} and of the tuned model, on the others: correlation {r:.2f}")
for name in versions:
    describe(f"{name:<16} (others lose {losses[name][1].mean():.2f})", attack(name))

# %% [markdown]
# <details><summary>Explain</summary>
#
# What is hard for the model before training says less about what is hard for the tuned one than a reference does that was trained alike. But is even that reference ahead of the plain loss by more than the intervals?
# Quantization takes little of the signal away. And look at the student that learnt from logits: it has read *no* member, yet members have a lower loss in it. The teacher's distributions, on other texts, carry what the teacher memorised. The
# student of plain text is the control.
# </details>

# %% [markdown]
# ### The control that exposes false success
#
# Some published attacks did not tell members from others, but old texts from new ones (Duan et al. 2024, arXiv:2402.07841). Here is the mistake on purpose: the model *before* training, which has seen neither.

# %%
shifted = drawn_texts(120, seed=79, keep=lambda dialogue: dialogue.task == service.INTENT, without=stream)
untouched = losses["before training"]
describe("before training, same stream", attack("before training"))
describe(
    "before training, others: intents only",
    [(-untouched[0]).tolist(), (-membership.text_losses(untrained, shifted)).tolist()],
)

# %%
curves = {
    "tuned": attack("tuned, float32"),
    "tuned, with reference": attack("tuned, float32", "student, text"),
    "tuned, int3": attack("tuned, int3"),
    "student, logits": attack("student, logits"),
    "student, text": attack("student, text"),
}

# %%
figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
for row, (label, scored) in enumerate(curves.items()):
    wrong, right = membership.roc(*scored)
    axes.plot(wrong, right, drawstyle="steps-post", **series_style(row), markevery=0.2, markersize=5, label=label)
chance = [10 ** (-i / 20) for i in range(47)]
axes.plot(chance, chance, color="black", linewidth=0.8, linestyle=":")
axes.set(
    xscale="log",
    xlim=(0.005, 1),
    xlabel="others accused",
    ylabel="members found",
    title="Who can be accused with few errors",
)
axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% [markdown]
# *ROC of the attacks on 120 members and 120 others; the horizontal axis is logarithmic, as the left end is what matters. Dotted: guessing.*

# %% [markdown]
# ### Training with differential privacy
#
# DP-SGD limits what any one example can do (Abadi et al. 2016, arXiv:1607.00133). Each example's gradient is clipped to length C, and the sum gets noise $z \sim N(0, I)$:
#
# $$g = \frac{1}{B}\left(\sum_i g_i \min\!\left(1, \frac{C}{\lVert g_i\rVert}\right) + \sigma C z\right)$$

# %% [markdown]
# Every step draws its batch anew, each example with probability q, and B = qN is its *expected* size. Then a number ε can be proved: with or without one person, no outcome becomes more than $e^\varepsilon$ times as likely, but for a probability δ.
#
# **Tiny numbers:** gradients (3, 4) and (0.3, 0.4), C = 1: the first has length 5 and becomes (0.6, 0.8), the second stays. With B = 2 and no noise, g = (0.45, 0.6).

# %% [markdown]
# ## Exercise 13.10: clipped_noisy_gradient
#
# Write `clipped_noisy_gradient(gradients, noise, clip, sigma, expected)`: `gradients` is a tensor (batch, n) with a row for each example, `noise` a tensor (n) of standard normal numbers.
# Return g. The batch may be empty. 3 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Lengths: <code>gradients.norm(dim=1)</code>; a factor <code>clip / length</code>, at most 1.</details>
# <details><summary>Hint 2</summary><code>factors @ gradients</code> adds up the clipped rows; the noise joins the sum before it is divided.</details>


# %%
# EXERCISE clipped_noisy_gradient
def clipped_noisy_gradient(gradients, noise, clip, sigma, expected):
    """(sum of clipped rows + sigma C z) / B."""
    ### BEGIN SOLUTION
    factors = (clip / gradients.norm(dim=1)).clamp(max=1)
    total = factors @ gradients + sigma * clip * noise
    return total / expected
    ### END SOLUTION


# %%
# CHECK clipped_noisy_gradient
from labutils.course.checks import ch13_privacy

ch13_privacy.clipped_noisy_gradient(clipped_noisy_gradient)

# %% [markdown]
# The accountant adds up what each step gives away (Mironov et al. 2019, arXiv:1908.10530). Its proof needs the random batches: an example that may have been left out can be denied. In batches from a fixed shuffle every
# example takes part once an epoch for certain, and what is left to prove is a step *without* sampling for each epoch.

# %%
from labutils.capstone import private_training

Q, STEPS, SIGMAS = 0.05, 100, (0.5, 1.0, 2.0, 4.0)
DELTA = 1e-5
for sigma in SIGMAS:
    spent, order = private_training.epsilon(Q, sigma, STEPS, delta=DELTA)
    shuffled, _ = private_training.epsilon(1.0, sigma, round(STEPS * Q), delta=DELTA)
    print(f"sigma {sigma}: epsilon {spent:6.2f} (order {order}); batches from a fixed shuffle: {shuffled:6.2f}")

# %% [markdown]
# Now chapter 12's linear classifier of intents over hashed n-grams. Its gradient is an outer product of error and input, so the length of an example's gradient is a product of two lengths: nothing else has to be computed.
#
# **Predict:** with σ = 2, how many points of accuracy are lost with 2,000 training queries, and with 10,000?

# %%
my_guess = None  # a pair of numbers

# %%
from torch.nn.functional import normalize

from labutils.distillation.classifiers import ngram_ids

INTENTS = list(service.intents())


def query_features(split, count, seed):
    """Hashed n-grams as rows of length 1, and the numbers of the intents."""
    items = service.evaluation_set(service.INTENT, split, count, seed)
    rows = torch.zeros(count, 1024)
    for row, item in zip(rows, items, strict=True):
        row[ngram_ids(item.messages[-2]["content"], buckets=1024)] = 1.0
    return normalize(rows, dim=1), torch.tensor([INTENTS.index(item.messages[-1]["content"]) for item in items])


learn, new = query_features("train", 10_000, seed=1), query_features("test", 500, seed=2)


# %%
def trained_privately(count, sigma, seed):
    """Accuracy on new phrasings after DP-SGD on `count` queries."""
    plan = private_training.PrivatePlan(steps=STEPS, sample_rate=Q, sigma=sigma, clip=1.0, lr=20.0)
    x, y = (some[:count] for some in learn)
    generator = torch.Generator().manual_seed(seed)
    weight = private_training.fit_privately(x, y, classes=len(INTENTS), plan=plan, generator=generator)
    return ((new[0] @ weight.T).argmax(dim=1) == new[1]).float().mean().item()


# %%
accuracy = {}
for count in (2_000, 10_000):
    for sigma in (0.0, *SIGMAS):
        runs = accuracy[count, sigma] = [trained_privately(count, sigma, seed) for seed in range(3)]
        spent = private_training.epsilon(Q, sigma, STEPS, delta=DELTA)[0] if sigma else math.inf
        shown = f"{statistics.fmean(runs):.2f} ({min(runs):.2f} to {max(runs):.2f})"
        print(f"{count:>6} queries, sigma {sigma}: epsilon {spent:6.2f}, accuracy {shown}")
print(f"guessing: {1 / len(INTENTS):.2f}; delta {DELTA}; you said", my_guess)

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
epsilons = [private_training.epsilon(Q, sigma, STEPS, delta=DELTA)[0] for sigma in SIGMAS]
for row, count in enumerate((2_000, 10_000)):
    runs = [accuracy[count, sigma] for sigma in SIGMAS]
    axes.plot(epsilons, [statistics.fmean(r) for r in runs], **series_style(row), label=f"{count:,} queries")
    axes.vlines(epsilons, [min(r) for r in runs], [max(r) for r in runs], color=series_style(row)["color"])
    axes.axhline(statistics.fmean(accuracy[count, 0.0]), color=series_style(row)["color"], linestyle=":", linewidth=1)
axes.set(xscale="log", ylim=(0, 1), xlabel=f"epsilon (delta = {DELTA})", ylabel="accuracy, new phrasings")
axes.set_title("More data pays for privacy")
axes.legend()
plt.show()

# %% [markdown]
# *Mean and range of three seeds. Dotted: no noise, but still clipped, and without any ε.*

# %% [markdown]
# <details><summary>Explain</summary>
#
# The noise has one size whatever N is, while the sum of gradients grows with N. So at each ε here the smaller training set loses a larger share of its accuracy than the larger one. Three things that the number does not say: it counts one *query* as a person, so whoever
# wrote many is protected less; choosing σ and the learning rate by looking at the results spends privacy that we have not counted; and δ should stay well below 1/N, which 10⁻⁵ does.
# </details>

# %% [markdown]
# ### The prefix cache as a timing channel
#
# Chapter 11's server keeps the keys and values of prompts, so whoever asks the same again gets a first token sooner. *Whoever*: the time tells a stranger that somebody has asked this before (Gu et al. 2025,
# arXiv:2502.07776). A *salt* for each user names the blocks differently, and then nobody shares anything, not even the system prompt. A salt that enters *behind* the public system prompt keeps that.
#
# **Predict:** with which AUC does the time of one first token tell an asked prompt from a new one?

# %%
my_guess = None  # a number from 0.5 to 1

# %%
from labutils.capstone.timing_channel import probe

rng = random.Random(3)
PUBLIC = {
    "role": "system",
    "content": "You are the service desk. Answer in one sentence, politely, and never ask for a password.",
}
public = len(chat_ids(tokenizer, [PUBLIC]))
questions = list(dict.fromkeys(service.sample_query(rng, "test").text_en for _ in range(80)))[:60]
prompts = [chat_ids(tokenizer, [PUBLIC, {"role": "user", "content": q}], add_generation_prompt=True) for q in questions]
length = statistics.fmean(map(len, prompts))
print(
    f"{public} public tokens of {length:.0f} in a prompt; one half of {len(prompts)} prompts is asked, then the other"
)


# %%
def listened(*, salted, public=0):
    """A stranger's probes of asked and of new prompts, each once of either, and the tokens that users found."""
    asked, new, saved = [], [], []
    for half in (0, 1):
        engine = Engine(paged_llama(load_model("lablm").model, positions=8192, block_size=8))
        for number, prompt in enumerate(prompts[half::2]):
            user = f"user {number}" if salted else ""
            saved.append(probe(engine, prompt, salt=user, public=public)[1])
        for i in random.Random(1).sample(range(60), 60):
            heard = probe(engine, prompts[i], salt="eve" if salted else "", public=public)
            (asked if i % 2 == half else new).append(heard)
    return asked, new, saved


# %%
ways = {
    "one cache for all": {"salted": False},
    "a salt each": {"salted": True},
    "salt behind the prompt": {"salted": True, "public": public},
}
heard = {name: listened(**way) for name, way in ways.items()}
for name, (asked, new, saved) in heard.items():
    scored = [[-seconds for seconds, _ in some] for some in (asked, new)]
    low, high = membership.auc_interval(*scored)
    counted = membership.auc([c for _, c in asked], [c for _, c in new])
    print(
        f"{name:<24}AUC by time {membership.auc(*scored):.2f} [{low:.2f}, {high:.2f}], by tokens {counted:.2f};",
        end=" ",
    )
    print(f"a user finds {statistics.fmean(saved):4.1f} of {length:.0f} tokens")
print("cpu, float32, batch 1, each prompt probed once a cache; you said", my_guess)

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 3), sharex=True, sharey=True, layout="constrained")
for axes, (name, (asked, new, _)) in zip(panels, heard.items(), strict=True):
    for row, (label, some) in enumerate({"asked before": asked, "new": new}.items()):
        times = sorted(1e3 * seconds for seconds, _ in some)
        shares = [(i + 1) / len(times) for i in range(len(times))]
        axes.plot(times, shares, **series_style(row), markersize=4, label=label)
    axes.set(title=name, xlabel="time to first token, ms")
panels[0].set_ylabel("share of the probes")
panels[0].legend()
plt.show()

# %% [markdown]
# *The stranger's times to first token, sorted. Every prompt is in both curves, once asked by somebody before and once not, so their lengths do not matter. Where the two curves lie apart, a prompt's past can be read from the clock.*

# %% [markdown]
# <details><summary>Explain</summary>
#
# The engine's own count of found tokens decides it without a clock: with one cache it all but separates the two groups, with a salt it is the same for both. A probe asks itself into the cache, so each prompt can be tested once. A salt each
# makes every user pay for the system prompt again; behind the public part, the salt only gives up what users share by chance. The answer must stay salted as well: when we wrote this, a test found that a
# public part which filled all blocks of a prompt would have left the answer's blocks open.
# </details>

# %% [markdown]
# ### Redaction before logging
#
# What is not written down cannot leak. Numbers are known by their form, card numbers by their check digit too, and names by a list. The grammar knows which values stand in its sentences, so what is missed can be counted. Our list knows every second name.

# %%
from labutils.capstone.redaction import find_values, redact
from labutils.lab.data.service_grammar import VALUES
from labutils.lab.data.service_labels import entities

listed = {"en": [en for en, _ in VALUES["name"][::2]], "zh": [zh for _, zh in VALUES["name"][::2]]}
PERSONAL = {
    "order_id": "order",
    "other_order": "order",
    "tracking": "tracking",
    "phone": "phone",
    "name": "name",
    "recipient": "name",
}

# %%
rng, results = random.Random(5), {}
for language in service.LANGUAGES:
    for _ in range(600):
        query = service.sample_query(rng, "test")
        text = query.text(language)
        caught = {span[:2] for span in find_values(text, names=listed[language])}
        truth = {span[:2]: PERSONAL[span.label] for span in entities(query, language) if span.label in PERSONAL}
        for span in caught | truth.keys():
            key = language, truth.get(span, "not personal")
            results.setdefault(key, []).append(span in caught)

# %%
for language in service.LANGUAGES:
    rows = {kind: hits for (of, kind), hits in results.items() if of == language}
    caught = sum(map(sum, rows.values()))
    wanted = sum(len(hits) for kind, hits in rows.items() if kind != "not personal")
    right = caught - len(rows.get("not personal", []))
    print(
        f"{language}: recall {right / wanted:.2f}, precision {right / caught:.2f}, {wanted} values; by kind:",
        ", ".join(f"{kind} {sum(hits)}/{len(hits)}" for kind, hits in sorted(rows.items())),
    )
for text in (
    "Mail anna.b@shop.example, card 4111 1111 1111 1111, order A12345, phone 555-0142.",
    "order a12345; order A 12345; card 4111 1111 1111 1112 (one digit wrong)",
    "anna called; Grace gave us a Grace period; my house is the green one beside the bakery",
):
    print(redact(text, names=listed["en"] + ["Grace"]))

# %% [markdown]
# The last two lines show what forms and lists cannot do: other spellings pass, a mistyped card number is taken for no card, a common word is taken for a name, and a description that points to one house has no form at all. So redaction is the second defence;
# the first is to log less. Where it belongs matters as well: in the *formatter* of the handler, so that it sees tracebacks and the loggers below.

# %%
import io
import logging

from labutils.capstone.redaction import RedactingFormatter

log, page = logging.getLogger("assistant.demo"), io.StringIO()
log.handlers, log.propagate = [logging.StreamHandler(page)], False
log.handlers[0].setFormatter(RedactingFormatter("%(levelname)s %(message)s", names=listed["en"]))
log.warning("order %s of %s was asked for", "A12345", "Anna")
try:
    raise KeyError("A12345")
except KeyError:
    log.exception("no such order")
print(page.getvalue().splitlines()[0], "|", page.getvalue().splitlines()[-1])

# %% [markdown]
# ## 8 · The best LabLM under a budget
#
# A customer does not ask for a technique. A customer gives limits, and you compose: a model, zeros, bits, groups, calibration, guessed tokens. The limits here:

# %%
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from labutils.capstone.budget import ITEMS, NOISE, READ_BYTES, REFERENCE, Budget, TooNoisy, examine, judge
from labutils.capstone.leaderboard import HandInError, ranked, read_hand_in, table, write_hand_in

BUDGET = Budget()
print(BUDGET)
print(f"LabLM in float32 has {Design().decoder().weight_bytes:,} bytes of weights")
print(
    f"asked: {ITEMS} requests of each of {len(service.TASKS)} tasks; in the exercise a token reads {READ_BYTES:,} bytes at most"
)

# %% [markdown]
# * **Size:** bytes of all weights, scales included.
# * **Quality:** test requests of all tasks, answered by the design and by float32 LabLM. The paired interval of chapter 12 must lie above −`margin`.
# * **Time:** an answer's time ÷ float32 LabLM's, both measured in turn in one run; the *upper* end of the interval counts.
#
# Among designs that meet all three, the **score** is float32 LabLM's time ÷ the design's time, the *lower* end of its interval. A design that misses a limit scores 0. So a lucky measurement with a
# wide interval does not win; a sure one does.
#
# Bytes are counted, not measured. A 4-bit weight with a float32 scale for each group of $G$ takes $4 + 32/G$ bits.

# %%
for group in (32, 64, 128):
    print(f"groups of {group:3}: {4 + 32 / group} bits a weight")

# %% [markdown]
# **Predict:** what does LabLM-small in int4 with groups of 32 lose, in points of the score, and does it fit into the size?

# %%
my_guess = None  # (points lost, True or False)

# %%
tried = {
    "LabLM int4": Design(bits=4),
    "LabLM-small int8": Design(model="lablm-small", bits=8),
    "LabLM-small int4": Design(model="lablm-small", bits=4),
    "LabLM-small int3": Design(model="lablm-small", bits=3),
}
print(f"{'':<18}{'bytes':>10}{'read a token':>14}  score, paired")
for name, design in tried.items():
    found = examine(design)
    print(f"{name:<18}{found.weight_bytes:>10,}{found.read_bytes:>14,.0f}  {found.quality}")
    print(*(f"{'':<18}{reason}" for reason in found.misses(BUDGET)), sep="\n")
print("you said", my_guess)

# %% [markdown]
# The third column is a *model* of speed that does not depend on the machine's mood: decoding one stream is bound by memory, so count the bytes of weights that are read for a token.
# Drafted tokens that stand share one reading (chapter 10):
#
# $$\text{bytes a token} = \text{bytes of weights} \times \frac{\text{steps of the model}}{\text{tokens made}}$$
#
# It leaves out the cache, the arithmetic and the overhead of a step, so it ranks designs, and it predicts no milliseconds.

# %% [markdown]
# ## Exercise 13.11: best_design (core, graded)
#
# Write `best_design()`, which returns a `Design` that fits `Budget()`: at most 1,300,000 bytes of weights, and the quality kept at a margin of 0.06. In place of a time the check asks that a token reads at most 1,200,000 bytes,
# because a check must not depend on the machine's speed; speed is the leaderboard's. Read `labutils/capstone/designs.py` for what a `Design` can be, and try with `examine(design)`; each try takes
# a few seconds. 1 line, 30 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>Begin with the size: which model, how many bits, how large a group? Then win back the quality within that size (chapter 03 has two ways to choose codes).</details>
# <details><summary>Hint 2</summary>The last limit is met without touching a weight: let prompt lookup guess a few tokens ahead.</details>


# %%
# EXERCISE best_design
def best_design():
    """A design within the budget."""
    ### BEGIN SOLUTION
    return Design(model="lablm-small", bits=4, group_size=64, calibrated=True, draft_tokens=4)
    ### END SOLUTION


# %%
# CHECK best_design
from labutils.course.checks import ch13_design

ch13_design.best_design(best_design)

# %% [markdown]
# ### The judge
#
# `judge` times the design in turn with float32 LabLM, and float32 LabLM *against itself*, in the same rounds. That control must come out as 1. Where its interval reaches further than `NOISE` from 1, the machine is too
# busy just now, and the judge refuses instead of giving points.
#
# **Predict:** the score of the reference solution: how many times as fast as float32 LabLM is it, at least?

# %%
my_score = predict("score of the reference solution: times as fast as float32, at least", None, unit="times")


# %%
def judged(design, tries=4):
    """A judgement, or None where the machine stays too noisy."""
    for _ in range(tries):
        try:
            return judge(design)
        except TooNoisy as reason:
            print("no verdict:", reason)


print(f"NOISE = {NOISE}")
reference = judged(REFERENCE)
if reference:
    print(f"control {reference.control}; an answer takes {reference.latency} of float32 LabLM's time")
    print(f"the reference solution scores {reference.score(BUDGET):.2f}; {reference.speedup} as fast")
    my_score.compare(reference.speedup.low)
    print(
        f"cpu, threads: {torch.get_num_threads()}, {len(reference.samples_s['design'])} rounds of one answer, 2 warm-up"
    )

# %% [markdown]
# ### The leaderboard
#
# A hand-in is a JSON file: the design, the scores of all requests and the raw samples of all rounds. `python -m labutils leaderboard FOLDER` reads a folder of them and believes none: nothing in a
# file is run, every value is checked, and the medians and the score must follow from the raw samples. Designs whose intervals overlap are *not told apart* and share a rank.

# %%
class_of = {
    "Ada": REFERENCE,
    "Bo": replace(REFERENCE, draft_tokens=0),
    "Chen": Design(model="lablm-small", bits=4, draft_tokens=4),
}
with TemporaryDirectory() as folder:
    for name, design in class_of.items():
        judgement = reference if design == REFERENCE else judged(design)
        if judgement:
            write_hand_in(Path(folder) / f"{name}.json", name, design, judgement)
    hand_ins = [read_hand_in(path) for path in sorted(Path(folder).glob("*.json"))]
    text = next(iter(sorted(Path(folder).glob("*.json")))).read_text() if hand_ins else ""
print(table(hand_ins, BUDGET))

# %% [markdown]
# Somebody opens their file and writes a better score:

# %%
with TemporaryDirectory() as folder:
    cheat = Path(folder) / "cheat.json"
    cheat.write_text(re.sub(r'"score": [0-9.]+', '"score": 99.0', text))
    try:
        read_hand_in(cheat)
    except HandInError as error:
        print("refused:", error)

# %%
figure, axes = plt.subplots(figsize=(7.5, 2.6), layout="constrained")
for row, (rank, each) in enumerate(ranked(hand_ins, BUDGET)):
    speedup = each.judgement.speedup
    error = [[speedup.value - speedup.low], [speedup.high - speedup.value]]
    axes.errorbar(speedup.value, row, xerr=error, capsize=3, **series_style(row))
    axes.annotate(
        f"rank {rank}" if rank else "no rank: misses a limit",
        (speedup.value, row),
        xytext=(0, 8),
        textcoords="offset points",
    )
axes.set_yticks(range(len(hand_ins)), [each.name for _, each in ranked(hand_ins, BUDGET)])
axes.margins(y=0.4)
axes.invert_yaxis()
axes.set(xlabel="times as fast as float32 LabLM", title="Overlapping intervals share a rank")
plt.show()

# %% [markdown]
# *Speed-up over float32 LabLM with 95% bootstrap intervals over the rounds, as in the table above.*
#
# **For teachers.** Whoever can write raw samples can also invent them, and the speeds of two machines cannot be compared even as ratios: a machine with slow memory gains more from few bytes. So where
# the rank counts, let one machine measure all designs again: `python -m labutils leaderboard FOLDER --judge`. Fix the budget before you see a hand-in, and let a learner hand in one design, not the luckiest of ten: every extra try on the
# same requests is a small chance to fit them.

# %% [markdown]
# ## 9 · A card for the model that you made
#
# A compressed model is another model, so it needs a model card of its own (Mitchell et al., arXiv:1810.03993): from what it was made, what was done, what it
# costs and what it loses, for whom. The card below is generated from the design and from measurements of this run. Nothing is filled in by hand, and what was
# not measured says so.

# %%
from labutils.applications.scores import paired_difference
from labutils.capstone import fairness
from labutils.capstone.card import Measured, model_card
from labutils.measurement.energy import energy, find_counters, idle_power
from labutils.measurement.timing import bootstrap_interval

design = Design(bits=4)
asked = fairness.drawn_requests(30)
pair = {"float32": Design().decoder(), "int4": design.decoder()}
outcome = fairness.answered(pair, tokenizer, asked)

# %%
gap = paired_difference(*(fairness.by_meaning(outcome[n].scores, range(60)) for n in ("int4", "float32")))
parts = fairness.groups_of(asked, fairness.intent_counts(2000))
groups = fairness.group_differences(outcome["int4"].scores, outcome["float32"].scores, parts)
right = fairness.by_meaning(outcome["int4"].scores, range(60))
low, high = bootstrap_interval(right, statistic=statistics.fmean)
quality = (
    {
        "measure": "answers right, service corpus",
        "value": outcome["int4"].mean,
        "low": low,
        "high": high,
        "items": len(right),
    },
    {"measure": "difference to float32", "value": gap.mean, "low": gap.low, "high": gap.high, "items": gap.items},
    {"measure": "translation, chrF", "value": None},
)

# %%
step = pair["int4"]
step.prefill(torch.tensor([chat_ids(tokenizer, asked[0].messages, add_generation_prompt=True)]))
found = find_counters("cpu")
idle_w, begin = idle_power(found), step.length


def one_token():
    step.rewind(step.length - begin)
    step.extend([70])


# %%
timing = measure_interleaved({"one token": one_token}, repeats=9, calls_per_sample=20)["one token"]
with energy(found, idle_w=idle_w) as spent:
    for _ in range(500 if found[0] else 1):
        one_token()
card = model_card(
    design,
    Measured(weight_bytes=step.weight_bytes, quality=quality, groups=groups, timing=timing, energy=spent, tokens=500),
)
print(card)

# %% [markdown]
# **Question:** which line of this card would you miss most, if you had to decide whether to use the model for your own customers?
#
# ## 10 · Outlook: three bets on hardware, in numbers
#
# **Memory beside the arithmetic.** A stream's next token waits for the weights, so tokens/s ≤ bandwidth ÷ bytes read. Cerebras states 44 GB of SRAM on one wafer
# with 21 PB/s (WSE-3, 2024); NVIDIA states 80 GB of HBM3 with 3.35 TB/s for an H100 SXM. What fits decides as much as what is fast.

# %%
chips = {"H100 SXM (HBM3)": (80e9, 3.35e12), "WSE-3 (SRAM)": (44e9, 21e15)}
models = {"LabLM int4": pair["int4"].weight_bytes, "70 billion, 16 bits": 140e9, "70 billion, 4 bits": 35e9}
for chip, (capacity, bandwidth) in chips.items():
    for name, size in models.items():
        count = math.ceil(size / capacity)
        print(
            f"{chip:<16} {name:<20} {count} chip{'s' * (count > 1):<2} at most {count * bandwidth / size:14,.0f} tokens/s of one stream"
        )

# %% [markdown]
# An upper bound, not a forecast: it leaves out arithmetic, latency, and the links between chips. For LabLM the bound is absurd:
# something else is in the way long before.
#
# **Arithmetic inside the memory.** Analog cells multiply where the weight is stored. Le Gallo et al. (Nature Electronics 2023, arXiv:2212.02872, abstract and section on the
# chip) built 64 cores of 256 × 256 cells of phase-change memory in 14 nm: 9.76 TOPS/W in the fast mode, 2.48 in the precise one, with 8-bit inputs and outputs.

# %%
from labutils.measurement.energy import HOROWITZ_PJ

cells = 64 * 256 * 256
weights = sum(p.numel() for p in load_model("lablm").model.parameters())
print(f"LabLM has {weights:,} weights, a chip {cells:,} cells: {math.ceil(weights / cells)} chips")
for mode, tops_per_watt in (("fast", 9.76), ("precise", 2.48)):
    print(f"in memory, {mode:<8} {2 * weights / (tops_per_watt * 1e12) * 1e6:8.2f} µJ a token (2 operations a weight)")
for memory in ("1 MB cache, a byte", "DRAM, a byte"):
    low = weights * (HOROWITZ_PJ[memory][0] + HOROWITZ_PJ["int8 multiply, int32 add"][0]) * 1e-6
    print(f"by counting, int8, {memory:<20} {low:8.2f} µJ a token (45 nm)")

# %% [markdown]
# Two technologies of different years stand in this table, so its ratio is no merit of the idea alone. Activations, attention and the cache stay digital, and cells drift:
# the accuracy of a language model is not in that paper.

# %% [markdown]
# **Memory that keeps its content, and wears out.** For phase-change memory a cell bears about 10⁹ writes, for memristors 10¹², for spin-torque RAM 10¹⁵, and a bit costs 2 to 25, 0.1
# to 3 and 0.1 to 2.5 pJ (Yang, Strukov and Stewart, Nature Nanotechnology 8:13, 2013, table 1, after the ITRS of 2011); 10⁸ is a cautious value. Weights are written once. A KV
# cache is written with every token: with $N$ slots in turn, $R$ tokens a second and $e$ writes a cell, it lasts $e N / R$ seconds.

# %%
from labutils.measurement.resources import kv_bytes_per_position

YEAR = 365 * 24 * 3600
per_token = kv_bytes_per_position(load_model("lablm").model.config)
print(f"LabLM writes {per_token:,} bytes of keys and values a token in float32")
for endurance in (1e8, 1e9, 1e12, 1e15):
    years = {slots: endurance * slots / 1_000 / YEAR for slots in (1, 1_024, 65_536)}
    print(f"{endurance:.0e} writes, 1,000 tokens/s; years by slots:", {n: f"{y:.3g}" for n, y in years.items()})

# %%
budget = 1e8 * 1_024
print(f"1e8 writes and 1,024 slots: {budget:.2e} tokens, {budget * per_token / 1e12:,.0f} TB of cache written")
for name, pj in (("phase-change", (2, 25)), ("memristor", (0.1, 3)), ("spin-torque", (0.1, 2.5))):
    low, high = (8 * per_token * one * 1e-6 for one in pj)
    print(f"{name:<13} {low:.4f} to {high:.4f} µJ to write one token's keys and values")

# %% [markdown]
# One slot is what happens to a cell that is written at every token, such as a running sum: without levelling wear, 10⁸ writes are soon used up.
#
# **Work that adapts.** With early exit a token leaves after layer $l$ with probability $p_l$: expected layers $E = \sum_l l\,p_l$. But each look at an exit reads the output matrix,
# and that is work too: cost in layers $= E + c \cdot$ (looks), where $c$ = weights of the output matrix ÷ weights of a layer.
#
# **Predict:** at LabLM's size, how many layers does one look cost?

# %%
my_look = predict("layers that one look at an exit costs in LabLM", None)

# %%
from labutils.decoding.early_exit import ExitHeads, adaptive_logits, by_margin

whole = load_model("lablm").model
layer = sum(p.numel() for p in whole.model.layers[0].parameters())
look = whole.get_output_embeddings().weight.numel()
depth, heads = whole.config.num_hidden_layers, ExitHeads(whole)
print(f"a look costs {look / layer:.2f} layers")
my_look.compare(look / layer)
text = torch.tensor([chat_ids(tokenizer, [*asked[0].messages, {"role": "assistant", "content": asked[0].answer}])])
with torch.no_grad():
    best = whole(text).logits.argmax(-1)

# %%
for threshold in (0.5, 0.9, 0.99, 1.1):
    logits, left = adaptive_logits(whole, heads, text, by_margin(whole, threshold))
    expected = left.float().mean().item()
    looks = left.clamp(max=depth - 1).float().mean().item() if threshold <= 1 else 0.0
    same = (logits.argmax(-1) == best).float().mean().item()
    print(
        f"margin {threshold:<4} {expected:.2f} of {depth} layers, with looks {expected + look / layer * looks:5.2f}; same token {same:.0%}"
    )

# %% [markdown]
# *Untrained exits, one dialogue of known text; 1.1 is never reached and looks nowhere.*
#
# <details><summary>Explain</summary>
#
# A small model with a large vocabulary pays more for asking than a layer costs, so the looks eat up nearly all that leaving saves, or more. A large model turns this round: width grows the layers faster than the
# output matrix. Chapter 10 trains the exits, and CALM (arXiv:2207.07061) asks cheaper questions than a whole output matrix.
# </details>

# %% [markdown]
# ## What you have
#
# - an assistant that runs on your own machine, shows what each answer cost, and changes its technique while it talks;
# - a number that people understand, users within a second, before and after each technique, and what a thousand times as many would need;
# - one plot of everything, which tells a lead from a tie and a tie from a loss, with six quantities to choose as its axes;
# - a search that is worth its cost only if it beats chance at the same cost, and a design that holds its limits by measurement;
# - energy told apart from estimates of energy; losses by group, with the number of chances to be fooled; secrets counted in bits;
# - a card that says "not measured" where nothing was measured.

# %% [markdown]
# **Open question:** a city wants this assistant at its citizens' office, in two languages, on one small server in the cellar, and it will be asked questions by people whose claim to help depends on the answer. Which design would you run, which of this
# chapter's numbers would you show to the council, which would you have to measure anew on the city's own questions, and what should the page do when the model is not sure?
#
# This is the last chapter. The plot of section 3 and the table of section 2 are what to take with you, made on *your* machine.

# %%
calibration()

# %%
from labutils.course.progress import progress

progress()

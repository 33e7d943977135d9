# %% [markdown]
# # 10 · Decoding faster
#
# **Goal:** make one stream of tokens faster without changing a single one of them, prove that nothing changed, and know for each trick
# when it pays.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 03; 05 helps |
# | Time | two sessions of 2 hours for you; all cells run in under 4 minutes on two cores |
# | Memory, download | 3 GB at the peak; nothing is downloaded |
# | Hardware | any computer; a C compiler for the int8 and int4 kernels |
# | Exercises | 15, each checked in the cell below it; the core path is marked `core` |

# %%
import statistics

import matplotlib.pyplot as plt
import torch
from transformers.utils import logging as transformers_logging

from labutils.decoding.proposers import CorpusNgram, ModelDraft, NoDraft, PromptLookup, SuffixAutomaton
from labutils.decoding.speculate import generate_speculative
from labutils.generation.fast_llama import FastLlama
from labutils.generation.sampling import Sampler
from labutils.measurement.timing import bootstrap_interval, measure_interleaved, paired_ratio
from labutils.models.drafting_text import KINDS, text_prompts
from labutils.models.load import load_model
from labutils.models.quantized import fast_packed_llama
from labutils.plots.style import series_style
from labutils.quantization.affine import Scheme
from labutils.quantization.packed import pack_model_

transformers_logging.disable_progress_bar()
INT8, INT4 = Scheme(8), Scheme(4, granularity="group", group_size=32)

# %%
model, tokenizer = load_model("lablm")
STOP = (tokenizer.eos_token_id,)
targets = {
    "LabLM float32": FastLlama(model, max_length=1024),
    "LabLM int8": fast_packed_llama(pack_model_(load_model("lablm").model, INT8), max_length=1024),
    "LabLM int4": fast_packed_llama(pack_model_(load_model("lablm").model, INT4), max_length=1024),
}
prompts = {kind: text_prompts(kind, tokenizer, 6) for kind in KINDS}
print(f"cpu, {torch.get_num_threads()} threads;", {kind: [p.shape[1] for p in some] for kind, some in prompts.items()})
print(tokenizer.decode(prompts["qa"][1][0, -80:]))

# %% [markdown]
# Four kinds of text stand behind every table of this chapter, none of it seen in training: *code* (held-out modules), *chat* (a
# customer's first question), *translation*, and *qa*: five questions with their answers stand in the conversation, as a FAQ does in a
# prompt, and the customer asks one of them. The last lines above are such a prompt.
#
# ## 1 · What do more rows cost?
#
# Decoding reads every weight to make one token. Those weights could serve several rows of input at the same price, if only we had
# several tokens to feed. All of speculative decoding lives on that "if". The first curve to know is therefore
#
# $$t(r, n) = \text{seconds of one step with } r \text{ new tokens after } n \text{ cached ones}$$
#
# **Tiny numbers:** if $t(1) = 1$ ms and $t(4) = 1.2$ ms, then four tokens cost 20% more than one. Are three of four guesses right, a
# step of 1.2 ms makes four tokens.
#
# **Predict** before you run: how many times the step of 1 row will the step of 8 rows take, for int8 weights? Write your number.

# %%
my_guess = None  # a number: t(8) / t(1) of LabLM int8

# %%
ROWS = (1, 2, 4, 8, 16, 32)
some_ids = prompts["code"][0][0].tolist()


def step_of(target, rows, context):
    """A step of `rows` tokens after `context` cached ones, that leaves the cache as it was."""

    def step():
        target.extend(some_ids[:rows])
        target.rewind(rows)

    def prepared():
        if target.length != context:
            target.rewind(target.length)
            target.prefill(torch.tensor([(some_ids * 4)[:context]]))
        step()

    return prepared


def step_times(target, rows, context, repeats=7, calls=3):
    contest = {r: step_of(target, r, context) for r in rows}
    return {r: t.median_s for r, t in measure_interleaved(contest, repeats=repeats, calls_per_sample=calls).items()}


by_rows = {name: step_times(target, ROWS, 256) for name, target in targets.items()}
for name, times in by_rows.items():
    print(f"{name:<14}", "  ".join(f"{r}: {1e3 * t:.2f} ms ({t / times[1]:.1f}x)" for r, t in times.items()))
if my_guess is not None:
    print(
        f"you said {my_guess:.1f}x for 8 rows of int8; measured {by_rows['LabLM int8'][8] / by_rows['LabLM int8'][1]:.1f}x"
    )

# %% [markdown]
# LabLM is small enough to lie in a CPU's caches. Does a model that does not fit behave the same? `tiled_model` repeats LabLM's units 7 times
# over and shares the weights out among the copies: 0.24 billion parameters, the same logits to 1e-5, the bandwidth of a large model.
# So its drafts are accepted exactly as often as LabLM's.

# %%
from labutils.models.tiled import tiled_model

large = fast_packed_llama(pack_model_(tiled_model(load_model("lablm").model), INT8), max_length=1024)
by_rows["0.24B int8"] = step_times(large, (1, 2, 4, 8, 16), 256, repeats=5, calls=1)
contexts = (32, 256, 512, 900)
by_context = {r: [step_times(targets["LabLM int8"], (r,), n, calls=2)[r] for n in contexts] for r in (1, 8)}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for index, (name, times) in enumerate(by_rows.items()):
    left.plot(list(times), [t / times[1] for t in times.values()], label=name, **series_style(index))
left.plot(ROWS, ROWS, color="grey", linestyle=":", label="no sharing: r times")
left.set(xscale="log", yscale="log", xlabel="rows in a step", ylabel="time ÷ time of 1 row")
cheapest = min(by_rows, key=lambda name: by_rows[name][4] / by_rows[name][1])
ratio = by_rows[cheapest][4] / by_rows[cheapest][1]
left.set_title(f"4 rows cost {cheapest} {ratio:.1f} times one row")
left.legend()
for index, (r, times) in enumerate(by_context.items()):
    left_style = series_style(index)
    right.plot(contexts, [1e3 * t for t in times], label=f"{r} row{'s' * (r > 1)}", **left_style)
right.set(xlabel="cached positions", ylabel="ms a step, LabLM int8", ylim=(0, None))
right.set_title(
    f"From {contexts[0]} to {contexts[-1]} positions, 8 rows: {by_context[8][-1] / by_context[8][0]:.1f} times the time"
)
right.legend()
plt.show()

# %% [markdown]
# *Left: median step time against rows at 256 cached positions, each line over its own single row, both axes logarithmic. Right: the same for
# LabLM int8 against the cache's length. Interleaved rounds on this machine.*
#
# <details><summary>Explain</summary>
#
# A matrix times one vector is bound by reading the matrix; times a few vectors it reads as much and computes more, so the left end of
# a curve is flat where the machine waits for memory and turns into the dotted slope where it computes. A model that fits into the caches
# leaves the flat part sooner. Attention has no weights to share: each row reads the whole cache again, so a long context tilts the curve.
# </details>
#
# Keep this curve in mind: a step that checks γ guesses has γ + 1 rows.

# %% [markdown]
# ## 2 · One verifier
#
# Someone guesses γ tokens, the target reads all of them in one step, and its logits judge them from left to right: row i is what the
# target says *before* guess i.
#
# * **Greedy:** a guess stands while it is the target's own favourite. The first that is not is replaced by that favourite.
# * **Bonus:** if all stand, the last row is the target's next token, for nothing.
#
# So each step makes at least one token, the very one that plain decoding would make, and a bad guesser costs time but never quality.
# Nobody needs to trust the guesser. Everybody needs to trust the verifier, and that is where real programs go wrong.

# %% [markdown]
# ## Exercise 10.1: greedy_verify (core)
#
# Write `greedy_verify(target_logits, drafted)`: logits (γ + 1, vocab), a list of γ guesses; return `(accepted, token)`: how many stand, and the target's
# token after them. 5 lines, 8 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary><code>target_logits.argmax(-1).tolist()</code> are γ + 1 tokens of the target's own.</details>
# <details><summary>Hint 2</summary>Count guesses while they agree; the answer's token is the target's at that index, also when all agree.</details>


# %%
# EXERCISE greedy_verify
def greedy_verify(target_logits, drafted):
    """How many guesses stand, and the target's token after them."""
    ### BEGIN SOLUTION
    own = target_logits.argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == own[accepted]:
        accepted += 1
    return accepted, own[accepted]
    ### END SOLUTION


# %%
# CHECK greedy_verify
from labutils.checks import ch10

ch10.greedy_verify(greedy_verify)

# %% [markdown]
# ### Sampling, exactly
#
# At temperature 1 there is no "right" token, only a right *law*. Let p be the target's probabilities, after temperature and top-p, and q
# those that the guess was drawn from. Keep a guess x with probability $\min(1, p(x)/q(x))$; replace the first that falls by a draw from
# the residual $\max(p - q, 0)$, normalised. Then x comes out with
#
# $$\underbrace{q(x)\min\!\left(1, \tfrac{p(x)}{q(x)}\right)}_{\min(p,\,q)} + \underbrace{\Bigl(1 - \sum_y \min(p, q)\Bigr)}_{\text{a guess falls}}
# \cdot \frac{\max(p(x) - q(x), 0)}{\sum_y \max(p - q, 0)} = p(x)$$
#
# since $1 - \sum\min(p,q) = \sum\max(p-q,0)$. **Tiny numbers:** p = (0.5, 0.5), q = (0.9, 0.1): token 0 is kept 5 times of 9, so
# 0.9 · 5/9 = 0.5 of all tokens are a kept 0, and the rest are 1. A guesser without chance, such as a copy from the prompt, has q = 1 at its token.
# **Predict:** what if a draft takes its *favourite*, and is judged by the full q? (transformers#32867 did that.)

# %% [markdown]
# ## Exercise 10.2: sampled_verify (core)
#
# Write `sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms)`: target_probs (γ + 1, vocab), draft_probs (γ, vocab), uniforms: γ numbers of
# [0, 1). Guess i stands while `uniforms[i] < min(1, p / q)`. If `is_drawn` is False, the draft took its favourite, and q is 1 at that
# token, 0 elsewhere. Return `(accepted, next_probs)`, the law (vocab,) that the next token is drawn from. 10 lines, 20 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>If not drawn, replace draft_probs by <code>torch.nn.functional.one_hot(torch.tensor(drafted), vocab)</code>; the rest stays the same.</details>
# <details><summary>Hint 2</summary>All stand: <code>target_probs[-1]</code>. Else the residual <code>(p - q).clamp(min=0)</code> of that row, divided by its sum.</details>


# %%
# EXERCISE sampled_verify
def sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms):
    """How many guesses stand, and the law of the next token."""
    ### BEGIN SOLUTION
    if not is_drawn:
        draft_probs = torch.nn.functional.one_hot(torch.tensor(drafted), target_probs.shape[1]).float()
    for i, token in enumerate(drafted):
        p, q = target_probs[i], draft_probs[i]
        if uniforms[i] >= min(1.0, (p[token] / q[token]).item()):
            left = (p - q).clamp(min=0)
            return i, left / left.sum()
    return len(drafted), target_probs[-1]
    ### END SOLUTION


# %%
# CHECK sampled_verify
ch10.sampled_verify(sampled_verify)

# %% [markdown]
# ### The proof, by adding up everything
#
# Five tokens, two guesses: 25 drafts, and of each we know how likely it is and what comes out. Add up all of it, and the law of the first
# token must be p to the last digit. No dice, no confidence interval. The same sum convicts four verifiers that look right.

# %%
from labutils.decoding.verify import acceptance_probs, residual

p = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05]).double()
q = torch.tensor([0.10, 0.20, 0.40, 0.10, 0.20]).double()
favourite = torch.eye(5).double()[q.argmax()]


def law(drawn_from, judged_by, rest=residual):
    """The law of the token that comes out, summed over every guess."""
    out = torch.zeros(5).double()
    for token, chance in enumerate(drawn_from.tolist()):
        if chance > 0:
            keep = acceptance_probs(p[None], [token], judged_by[None]).item()
            out[token] += chance * keep
            out += chance * (1 - keep) * rest(p, judged_by)
    return out


verifiers = {
    "right: drawn from q, judged by q": law(q, q),
    "right: sure of its favourite": law(favourite, favourite),
    "favourite judged by the full q": law(favourite, q),
    "replaced from p, no residual": law(q, q, rest=lambda p, q: p),
    "first guess unverified": q,
}
for name, out in verifiers.items():
    print(f"{name:<34} {[round(x, 3) for x in out.tolist()]}  total variation {(out - p).abs().sum() / 2:.4f}")

# %% [markdown]
# ### And on real contexts, with controls
#
# A sum over 4,096 tokens is too long, but the acceptance rate $\alpha = \sum_x \min(p, q)$ can be added up at each place of a real text.
# Three controls tell a working measurement from an artefact: the draft *equal* to the target must give exactly 1; the target *shifted* by one
# place must fall to chance; a *bad* draft (probabilities of the tokens shuffled) must be lower than a real one, and harmless.

# %%
small, _ = load_model("lablm-small")
sampler = Sampler(torch.Generator().manual_seed(0), temperature=0.8, top_p=0.95)
with torch.no_grad():
    text = torch.cat([prompts["code"][i] for i in range(3)], dim=1)[:, :600]
    laws = {"LabLM": sampler.probs(model(text).logits[0]), "LabLM-small": sampler.probs(small(text).logits[0])}
shuffled = torch.randperm(4096, generator=torch.Generator().manual_seed(1))
drafts = {
    "draft = target": laws["LabLM"],
    "LabLM-small": laws["LabLM-small"],
    "target shifted by one place": laws["LabLM"].roll(1, dims=0),
    "tokens shuffled": laws["LabLM-small"][:, shuffled],
}
for name, draft in drafts.items():
    rates = torch.minimum(draft, laws["LabLM"]).sum(-1).tolist()
    low, high = bootstrap_interval(rates, statistic=statistics.fmean)
    print(f"{name:<28} acceptance {statistics.fmean(rates):.3f} [{low:.3f}, {high:.3f}]")

# %% [markdown]
# ### How many guesses?
#
# Each further guess is less likely to be reached: it counts only if all before it stood. And it adds a row. The curve of section 1 and the
# acceptance decide together.

# %% [markdown]
# ## Exercise 10.3: best_draft_tokens (core)
#
# If each guess stands with probability α, a step with γ guesses makes $1 + \alpha + \dots + \alpha^\gamma = \frac{1-\alpha^{\gamma+1}}{1-\alpha}$
# tokens (Leviathan et al. 2022, arXiv:2211.17192, equation 1) and takes $t(\gamma+1) + \gamma\,d$ seconds, with $d$ for one guess.
#
# Write `best_draft_tokens(acceptance, step_s, draft_s)`: `step_s[r - 1]` are the seconds of a step with r rows. Return `(γ, speed-up)`: the γ
# from 0 to `len(step_s) - 1` with the highest speed-up over plain decoding, `step_s[0]` a token; the smallest such γ. 5 lines, 12
# minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>For each γ: <code>sum(acceptance**i for i in range(γ + 1))</code> tokens; a published formula had γ where α belongs (llama.cpp#3649).</details>
# <details><summary>Hint 2</summary>Speed-up: tokens times <code>step_s[0]</code>, divided by <code>step_s[γ] + γ * draft_s</code>.</details>


# %%
# EXERCISE best_draft_tokens
def best_draft_tokens(acceptance, step_s, draft_s):
    """(γ, speed-up) of the best γ."""
    ### BEGIN SOLUTION
    gains = []
    for count, seconds in enumerate(step_s):
        tokens = sum(acceptance**i for i in range(count + 1))
        gains.append(tokens * step_s[0] / (seconds + count * draft_s))
    best = max(range(len(gains)), key=gains.__getitem__)
    return best, gains[best]
    ### END SOLUTION


# %%
# CHECK best_draft_tokens
from labutils.checks import ch10_loop

ch10_loop.best_draft_tokens(best_draft_tokens)

# %%
from labutils.decoding.choosing import best_draft_tokens, curve_of

for name, times in by_rows.items():
    curve = curve_of(times, up_to=16)
    best = {alpha: best_draft_tokens(alpha, curve, 0.0) for alpha in (0.3, 0.6, 0.8, 0.95)}
    print(f"{name:<14}", "  ".join(f"α = {a}: γ = {g}, {gain:.2f}x" for a, (g, gain) in best.items()))

# %% [markdown]
# ## 3 · Guesses for nothing
#
# The cheapest guesser owns no weights. Much of what a model writes stands already in its context: a name, an order number, the answer from
# the FAQ, the line of code above. **Prompt lookup** finds the last few tokens earlier in the text and proposes what followed them there
# (Saxena 2023).
#
# **Predict:** on which of our four kinds of text does it help most, and on which least?

# %% [markdown]
# ## Exercise 10.4: prompt_lookup (core)
#
# Write `prompt_lookup(token_ids, count, longest)`: take the longest suffix, of at most `longest` tokens and at least 1, that occurs earlier in
# the list with something behind it; of several occurrences the most recent; return at most `count` tokens that followed it, cut at the
# list's end; `[]` without a match. 6 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Two loops: n from the longest suffix down to 1; start from the most recent place back to 0.</details>
# <details><summary>Hint 2</summary>A suffix of n tokens can start at 0 … len − n − 1: at len − n it would find itself.</details>


# %%
# EXERCISE prompt_lookup
def prompt_lookup(token_ids, count, longest):
    """What followed the longest suffix where it last occurred."""
    ### BEGIN SOLUTION
    for n in range(min(longest, len(token_ids) - 1), 0, -1):
        for start in range(len(token_ids) - n - 1, -1, -1):
            if token_ids[start : start + n] == token_ids[-n:]:
                return token_ids[start + n : start + n + count]
    return []
    ### END SOLUTION


# %%
# CHECK prompt_lookup
ch10_loop.prompt_lookup(prompt_lookup)

# %% [markdown]
# Two relatives. A **corpus n-gram** does not look at the prompt but at counted training text: after these four tokens, which came most
# often? A **suffix automaton** finds the longest repeated suffix of *any* length in constant time a token. All three keep an index as the
# text grows, so a guess costs microseconds. The exercise's version searches everything each time.

# %%
from labutils.models.calibration_text import calibration_batches

counted = [row.tolist() for batch in calibration_batches(tokenizer, code=120, dialogues=120) for row in batch]
free = {
    "nothing": NoDraft(),
    "prompt lookup": PromptLookup(),
    "corpus n-gram": CorpusNgram(counted, vocab_size=len(tokenizer), shortest=2),
    "suffix automaton": SuffixAutomaton(),
}
print(f"counted: {sum(map(len, counted)):,} tokens of training text")
NEW_TOKENS = {"code": 64, "chat": 48, "translation": 48, "qa": 64}


def speculate_on(target, proposer, kind, draft_tokens=5, choose=None):
    extra = {} if choose is None else {"choose": choose}
    run = lambda prompt: generate_speculative(  # noqa: E731
        target, proposer, prompt, NEW_TOKENS[kind], draft_tokens=draft_tokens, stop=STOP, **extra
    )
    return [run(prompt) for prompt in prompts[kind]]


# %%
target = targets["LabLM int8"]
plain = {kind: speculate_on(target, NoDraft(), kind, 0) for kind in KINDS}
runs = {(name, kind): speculate_on(target, proposer, kind) for name, proposer in free.items() for kind in KINDS}
for name in list(free)[1:]:
    for kind in KINDS:
        done = runs[name, kind]
        same = sum(torch.equal(a.token_ids, b.token_ids) for a, b in zip(done, plain[kind], strict=True))
        judged, steps = sum(d.judged for d in done), sum(d.target_steps for d in done)
        alpha = sum(d.accepted for d in done) / max(judged, 1)
        made = sum(step.made for d in done for step in d.steps)
        cost = 1e6 * sum(d.draft_s for d in done) / steps
        print(
            f"{name:<17} {kind:<12} acceptance {alpha:.2f} of {judged:>3} judged, {made / steps:.2f} tokens a step, "
            f"{cost:4.0f} µs a guess, same text {same}/{len(done)}"
        )

# %% [markdown]
# *Six prompts of each kind, up to 64 new tokens, at most 5 guesses a step, LabLM int8.* "Same text" is the point: the C kernels give a
# row the same bits alone and among others, so greedy output is equal to the last token. In float32 a matrix product of several rows may
# round differently from one of a single row, and then a near-tie can fall the other way. The cell below counts differing tokens there and shows the
# gap between the two best logits at each first difference: below 0.001 it is a near-tie, not an error.

# %%
float_target, ties = targets["LabLM float32"], []
for kind in KINDS:
    alone = [float_target.generate(prompt, NEW_TOKENS[kind], stop=STOP)[0] for prompt in prompts[kind]]
    for one, other in zip(alone, speculate_on(float_target, PromptLookup(), kind), strict=True):
        theirs = other.token_ids[0]
        if not torch.equal(one, theirs):
            at = next(i for i, (a, b) in enumerate(zip(one, theirs, strict=False)) if a != b)
            with torch.no_grad():
                best = model(one[None, :at]).logits[0, -1].topk(2).values
            ties.append((kind, at, (best[0] - best[1]).item()))
print(
    f"float32: {len(ties)} of {sum(map(len, prompts.values()))} texts differ; top-2 gap at the first difference:", ties
)

# %% [markdown]
# ## Exercise 10.5: repaired_loop (hunt a real bug)
#
# This loop ships with a bug that aprender PR#2014 had: it writes wrong text, and hardly a guess is accepted. The target knows `length`,
# `extend(token_ids)` (reads tokens, returns the logits after each) and `rewind(count)`.

# %%
from labutils.checks.ch10_loop import ToyDraft, ToyTarget, toy_next


def broken_loop(target, draft, token_ids, new_tokens, draft_tokens):
    text = list(token_ids)
    target.extend(text[:-1])  # the cache holds the text but its last token
    while len(text) < len(token_ids) + new_tokens:
        drafted = draft.propose(text, draft_tokens)
        own = target.extend([text[-1], *drafted]).argmax(-1).tolist()
        accepted = next((i for i in range(len(drafted)) if drafted[i] != own[i]), len(drafted))
        target.rewind(target.length)
        text += [*drafted[:accepted], own[accepted]]
    return text[: len(token_ids) + new_tokens]


truth = [1, 2, 3]
while len(truth) < 15:
    truth.append(toy_next(3, truth))
print("written:  ", broken_loop(ToyTarget(3), ToyDraft(3), [1, 2, 3], 12, 3))
print("the truth:", truth)

# %% [markdown]
# Write `repaired_loop` with the same arguments: the target's own text, and no token read twice. Change one line. 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>What must the cache hold at the start of each turn? The comment on the second line says it.</details>
# <details><summary>Hint 2</summary>Of 1 + len(drafted) new positions, 1 + accepted are part of the text.</details>


# %%
# EXERCISE repaired_loop
def repaired_loop(target, draft, token_ids, new_tokens, draft_tokens):
    """The loop without its bug."""
    ### BEGIN SOLUTION
    text = list(token_ids)
    target.extend(text[:-1])
    while len(text) < len(token_ids) + new_tokens:
        drafted = draft.propose(text, draft_tokens)
        own = target.extend([text[-1], *drafted]).argmax(-1).tolist()
        accepted = next((i for i in range(len(drafted)) if drafted[i] != own[i]), len(drafted))
        target.rewind(len(drafted) - accepted)
        text += [*drafted[:accepted], own[accepted]]
    return text[: len(token_ids) + new_tokens]
    ### END SOLUTION


# %%
# CHECK repaired_loop
ch10_loop.repaired_loop(repaired_loop)

# %% [markdown]
# ## 4 · A model as draft
#
# What copies nothing needs a guesser that can write. A small model is one. Its price is $c$, the seconds of one drafted token over the
# seconds of one plain step, and with acceptance $\alpha$ and $\gamma$ drafted tokens (Leviathan et al. 2022, arXiv:2211.17192):
#
# $$\text{speed-up} = \frac{1 + \alpha + \dots + \alpha^\gamma}{t(\gamma + 1)/t(1) + \gamma c}$$
#
# **Tiny numbers:** α = 0.8, γ = 2, c = 0.5 and a step of 3 rows that costs no more than one: 2.44 ÷ 2 = 1.22. Half the cost is a dear draft.
#
# LabLM-small has 39% of LabLM's weights, and nearly half of those are its output layer, 4,096 rows for as many tokens. A draft may be silent
# about rare tokens: the target corrects it. FR-Spec (Zhao et al. 2025, arXiv:2502.14856) keeps the tokens that training text uses most.
#
# **Predict:** of 4,096 tokens keep the 1,024 most frequent. Which share of the running text do they cover?

# %%
import copy

import matplotlib.pyplot as plt
import torch

from labutils.decoding.drafts import TrimmedTarget, frequent_tokens, trim_head
from labutils.decoding.proposers import NoDraft
from labutils.measurement.timing import bootstrap_interval
from labutils.models.calibration_text import calibration_batches
from labutils.models.drafting_text import KINDS, text_prompts
from labutils.models.load import load_model
from labutils.models.quantized import fast_packed_llama
from labutils.models.tiled import tiled_model
from labutils.plots.style import series_style
from labutils.quantization.affine import Scheme
from labutils.quantization.packed import pack_model_

lablm, tokenizer = load_model("lablm")
small, vocab = load_model("lablm-small").model, lablm.config.vocab_size
texts = {kind: text_prompts(kind, tokenizer, 5) for kind in KINDS}
training_rows = torch.cat(calibration_batches(tokenizer, code=48, dialogues=48)).tolist()

for keep in (256, 512, 1024, 2048):
    kept = frequent_tokens(training_rows, vocab_size=vocab, count=keep)
    covered = {kind: torch.isin(torch.cat(some, dim=1), kept).float().mean() for kind, some in texts.items()}
    weights = 1 - (vocab - keep) * small.config.hidden_size / small.num_parameters()
    print(f"{keep:>5} tokens: {weights:.0%} of the weights;", {kind: f"{share:.0%}" for kind, share in covered.items()})

# %% [markdown]
# ## Exercise 10.6: trimmed_probs (core)
#
# Write `trimmed_probs(hidden, head, counts, keep)`: the draft's probabilities over *all* tokens when its head keeps the `keep` tokens of the
# highest `counts`. hidden (width,), head (vocab, width), counts (vocab,); return (vocab,). 4 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>counts.topk(keep).indices</code> are the rows to keep; multiply only those.</details>
# <details><summary>Hint 2</summary>Start from <code>torch.full((len(head),), -torch.inf)</code>, fill in the kept logits, then take the softmax.</details>


# %%
# EXERCISE trimmed_probs
def trimmed_probs(hidden, head, counts, keep):
    """Softmax over the kept tokens, 0 elsewhere."""
    ### BEGIN SOLUTION
    kept = counts.topk(keep).indices
    logits = torch.full((len(head),), -torch.inf)
    logits[kept] = head[kept] @ hidden
    return torch.softmax(logits, dim=-1)
    ### END SOLUTION


# %%
# CHECK trimmed_probs
from labutils.checks import ch10_drafts

ch10_drafts.trimmed_probs(trimmed_probs)

# %% [markdown]
# The zeros are what keeps the text exact: a token that the draft cannot draw has q = 0, so all of its p lies in the residual.
#
# Now three drafts under one verifier: LabLM-small in int8, the same with 2,048 tokens, and LabLM itself in int4, drafting for its own float32
# weights (*self-speculation*: the draft's memory is already there).
#
# **Predict:** which draft is accepted most often, and which one makes decoding fastest?

# %%
INT8_DRAFT, INT4_DRAFT = Scheme(8), Scheme(4, granularity="group", group_size=64)


def packed(model, scheme):
    return fast_packed_llama(pack_model_(copy.deepcopy(model), scheme), max_length=512)


kept = frequent_tokens(training_rows, vocab_size=vocab, count=2048)
narrow, wide = packed(lablm, INT8_DRAFT), packed(tiled_model(lablm), INT8_DRAFT)
drafts = {
    "LabLM-small": ModelDraft(packed(small, INT8_DRAFT)),
    "LabLM-small, 2,048 tokens": ModelDraft(
        TrimmedTarget(packed(trim_head(small, kept), INT8_DRAFT), kept, vocab_size=vocab)
    ),
    "LabLM int4": ModelDraft(packed(lablm, INT4_DRAFT)),
}


# %%
def decode(target, proposer, kind, draft_tokens, prompts=5):
    """All prompts of a kind: the texts, tokens a second after the first token, acceptance, tokens a step."""
    made = []
    for prompt in texts[kind][:prompts]:
        proposer.propose(prompt[0].tolist(), 1) if isinstance(proposer, ModelDraft) else None  # reads the prompt
        made.append(
            generate_speculative(
                target, proposer, prompt, 32, draft_tokens=draft_tokens, stop=(tokenizer.eos_token_id,)
            )
        )
    seconds, tokens = sum(m.draft_s + m.target_s for m in made), sum(s.made for m in made for s in m.steps)
    judged = max(sum(m.judged for m in made), 1)
    return {
        "texts": [m.token_ids.tolist() for m in made],
        "tokens_per_s": tokens / seconds,
        "acceptance": sum(m.accepted for m in made) / judged,
        "pairs": [(m.accepted, m.judged) for m in made],
        "a_step": tokens / sum(m.target_steps for m in made),
        "draft_s": sum(m.draft_s for m in made) / max(sum(m.drafted for m in made), 1),
    }


def interval(pairs):
    """95% bootstrap interval of the acceptance, over prompts."""
    return "[{:.2f}, {:.2f}]".format(*bootstrap_interval(pairs, statistic=share_of))


def share_of(pairs):
    return sum(accepted for accepted, _ in pairs) / max(sum(judged for _, judged in pairs), 1)


plain = {(n, kind): decode(t, NoDraft(), kind, 0) for n, t in (("LabLM", narrow), ("0.24B", wide)) for kind in KINDS}
print(f"{'draft':<27}{'target':<8}{'text':<12}{'acceptance':>18}{'a step':>8}{'c':>7}{'speed-up':>10}  same text")
for draft_name, draft in drafts.items():
    for (target_name, kind), alone in plain.items():
        found = decode(narrow if target_name == "LabLM" else wide, draft, kind, 3)
        cost, gain = found["draft_s"] * alone["tokens_per_s"], found["tokens_per_s"] / alone["tokens_per_s"]
        share = f"{found['acceptance']:.2f} {interval(found['pairs'])}"
        same = sum(a == b for a, b in zip(found["texts"], alone["texts"], strict=True))
        print(
            f"{draft_name:<27}{target_name:<8}{kind:<12}{share:>18}{found['a_step']:>8.2f}{cost:>7.2f}{gain:>9.2f}x  {same}/5"
        )

# %% [markdown]
# *Greedy, 5 prompts of each kind, γ = 3, int8 targets, one run (intervals of acceptance over prompts); `python -m labutils bench decoding`
# repeats it in interleaved rounds.* The same guesses meet two targets. Beside LabLM a draft costs a good part of a step (column c), beside the
# tiled 0.24B model almost nothing. A true 0.24B model would know more than LabLM and agree less often with so small a draft: the tiled
# model shows the cost of a large target together with the acceptance of a small one.
#
# <details><summary>What does trimming cost?</summary>A draft can only be right where the target's next token is among the kept ones, so the share
# of running text that they cover, printed above, caps its acceptance. FR-Spec trims vocabularies of 128,000 tokens, most of which hardly
# occur. Of LabLM's 4,096 nearly every token is in use: a quarter of them would cost the services' dialogues a good part of their
# acceptance (set <code>count=1024</code> and see), and half of them saves only 24% of the weights.</details>
#
# How many tokens should a draft guess? Acceptance sets how fast the numerator stops growing, c and the rows how fast the denominator grows.

# %%
LENGTHS = (1, 2, 3, 4, 6, 8)
figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
for panel, (target_name, target) in zip(panels, (("LabLM", narrow), ("0.24B", wide)), strict=True):
    for index, kind in enumerate(KINDS):
        alone = plain[target_name, kind]["tokens_per_s"]
        gains = [
            decode(target, drafts["LabLM-small, 2,048 tokens"], kind, n, prompts=2)["tokens_per_s"] / alone
            for n in LENGTHS
        ]
        panel.plot(LENGTHS, gains, label=kind, **series_style(index))
        print(
            f"{target_name}, {kind}: best γ = {LENGTHS[gains.index(max(gains))]}, {max(gains):.2f} times plain decoding"
        )
    panel.axhline(1, color="grey", linestyle=":")
    panel.set(
        xlabel="drafted tokens a step, γ", ylabel="times plain decoding", title=f"LabLM-small drafts for {target_name}"
    )
panels[0].legend()
plt.show()

# %% [markdown]
# *Measured speed-up against γ, two prompts of each kind; the dotted line is plain decoding.* There is no best γ, only a best γ for a text, a draft
# and a machine.
#
# ## Exercise 10.7: output_law
#
# Hunt a real bug. In transformers#32867 the assistant *took its likeliest token*, while the acceptance test used min(1, p/q) with the
# assistant's *whole* q, as if the token had been drawn from it. Every text looked fine. Was its law the target's?
#
# Write `output_law(target_probs, draft_probs, drawn_from)`: all (vocab,); the drafted token is drawn from `drawn_from`, judged with q = `draft_probs`,
# and replaced from the normalised residual max(p − q, 0) if it falls. Return the exact law of the token that comes out.
# 4 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>A token comes out as a draft that stands, <code>drawn_from * (p / q).clamp(max=1)</code>, or as a replacement.</details>
# <details><summary>Hint 2</summary>The chance that some draft falls is <code>(drawn_from * (1 - stands)).sum()</code>; it multiplies the residual.</details>


# %%
# EXERCISE output_law
def output_law(target_probs, draft_probs, drawn_from):
    """Drafts that stand, plus what replaces those that fall."""
    ### BEGIN SOLUTION
    stands = (target_probs / draft_probs).clamp(max=1)
    left = (target_probs - draft_probs).clamp(min=0)
    falls = (drawn_from * (1 - stands)).sum()
    return drawn_from * stands + falls * left / left.sum()
    ### END SOLUTION


# %%
# CHECK output_law
ch10_drafts.output_law(output_law)

# %% [markdown]
# Three ways to pair a draft with a judge, enumerated exactly: the bug, and two repairs. **Predict** which token the bug prefers.

# %%
from labutils.decoding.verify import residual


def exact_law(p, q, drawn_from):
    """What the exercise asks for, token by token with the course's verifier."""
    law = torch.zeros_like(p)
    for token in drawn_from.nonzero().flatten().tolist():
        stands = acceptance_probs(p[None], [token], q[None])[0].float()
        law[token] += drawn_from[token] * stands
        law += drawn_from[token] * (1 - stands) * residual(p, q)
    return law


p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.1, 0.3])
favourite = torch.eye(3)[q.argmax()]
ways = {
    "the bug: likeliest token, judged by q": (q, favourite),
    "repair 1: drawn from q, judged by q": (q, q),
    "repair 2: likeliest token, judged as certain": (favourite, favourite),
}
print("the target's law:", p.tolist())
for name, (judge, drawn) in ways.items():
    law = exact_law(p, judge, drawn)
    print(f"{name:<46}{[round(x, 3) for x in law.tolist()]}, off by {(law - p).abs().sum() / 2:.3f}")

# %% [markdown]
# The distance is the total variation. The bug gives too much to the draft's favourite, for it is proposed always and judged as if it came in
# q of the cases. A deterministic draft is judged as certain: its token stands with probability p.
#
# ## 5 · A head that looks ahead
#
# A draft model reads the text anew, and yet the target has just read it: its last hidden state $h_i$ knows the whole text. A small block on top can
# guess the token *after* the next, once it is told which token the target has chosen:
#
# $$h'_{i+1} = h_i + W_{down}\,\mathrm{swiglu}\bigl(W\,[h_i;\ e(t_{i+1})]\bigr), \qquad \text{logits} = E\,h'_{i+1}$$
#
# Fed with its own answer, it goes on. This is the plainest of a family: Hydra (arXiv:2402.05109), EAGLE (arXiv:2401.15077) and the MTP modules
# of DeepSeek-V3 (arXiv:2412.19437), the latter two with attention inside. Ours was trained on the course's own text
# (`python -m labutils train mtp`, see data/MODEL_CARD.md), with the loss that chapter 05 would use: KL from LabLM, two places ahead.
#
# **Predict:** the head has about half of LabLM-small's weights. Is it accepted more often or less?

# %%
from labutils.decoding.heads import LookAheadDraft
from labutils.models.draft_heads import load_head

head, shared = load_head("mtp", lablm), pack_model_(copy.deepcopy(lablm), INT8_DRAFT)
print(
    f"{sum(w.numel() for w in head.parameters()) / 1e6:.2f}M weights in the head, {small.num_parameters() / 1e6:.2f}M in LabLM-small"
)
print(f"{'target':<8}{'text':<12}{'acceptance':>18}{'a step':>8}{'c':>7}{'speed-up':>10}  same text")
for target_name, target in (("LabLM", narrow), ("0.24B", wide)):
    ahead = LookAheadDraft(target, head, shared)
    for kind in KINDS:
        found, alone = decode(target, ahead, kind, 2), plain[target_name, kind]
        cost, gain = found["draft_s"] * alone["tokens_per_s"], found["tokens_per_s"] / alone["tokens_per_s"]
        share = f"{found['acceptance']:.2f} {interval(found['pairs'])}"
        same = sum(a == b for a, b in zip(found["texts"], alone["texts"], strict=True))
        print(f"{target_name:<8}{kind:<12}{share:>18}{found['a_step']:>8.2f}{cost:>7.2f}{gain:>9.2f}x  {same}/5")

# %% [markdown]
# *The same prompts, γ = 2, greedy, one run.* The head needs no cache and reads no prompt. Compare its acceptance with
# LabLM-small's above, text by text. Without attention it cannot look back for a name that stood further up, and it was trained for minutes:
# DeepSeek reports 85 to 90% for the second token of a module trained along with the model.
#
# ## Trees against chains
#
# Where the head is unsure, its second choice may be right. A **tree** puts both into one step: each node attends to the text, to its ancestors
# and to itself (SpecInfer, arXiv:2305.09781).
#
# **Tiny numbers:** parents (−1, 0, 0, 1): node 3 sees 0, 1 and 3, not its uncle 2. Its position is the text's end plus 2, its depth.
#
# ## Exercise 10.8: tree_mask
#
# Write `tree_mask(parents)`: a list, −1 for node 0, else an earlier node; return a bool tensor (nodes, nodes), True where the row's node may attend to the
# column's. 5 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Begin with <code>torch.eye(n, dtype=torch.bool)</code>; go through the nodes in order.</details>
# <details><summary>Hint 2</summary>A node sees all that its parent sees: <code>mask[node] |= mask[parent]</code>.</details>


# %%
# EXERCISE tree_mask
def tree_mask(parents):
    """Ancestors and itself."""
    ### BEGIN SOLUTION
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask
    ### END SOLUTION


# %%
# CHECK tree_mask
ch10_drafts.tree_mask(tree_mask)

# %% [markdown]
# Which nodes are worth a row? Those that the draft itself finds likeliest, by the product of its probabilities along the branch (EAGLE-2,
# arXiv:2406.16858). With one branch allowed this grows a chain. Tree and chain then cost the same: as many steps of the head, as many rows of the target.
#
# **Predict:** at 6 drafted rows, on which text does the tree gain most, and does the chain ever win?

# %%
from labutils.decoding.trees import generate_tree, likeliest_tree

NODES = 6
grown = {
    "plain": likeliest_tree(head, lablm, nodes=0, branches=1),
    "chain": likeliest_tree(head, lablm, nodes=NODES, branches=1),
    "tree": likeliest_tree(head, lablm, nodes=NODES, branches=3),
}
print(f"{'text':<13}{'shape':<7}{'tokens a step':>14}{'tokens/s':>10}  same text")
for kind in KINDS:
    references = None
    for shape, grow in grown.items():
        made = [generate_tree(lablm, grow, prompt, 32, (tokenizer.eos_token_id,)) for prompt in texts[kind][:3]]
        references = references or made
        tokens, steps = sum(s.made for m in made for s in m.steps), sum(m.target_steps for m in made)
        rate = tokens / sum(m.draft_s + m.target_s for m in made)
        same = sum(torch.equal(a.token_ids, b.token_ids) for a, b in zip(made, references, strict=True))
        print(f"{kind:<13}{shape:<7}{tokens / steps:>14.2f}{rate:>10.0f}  {same}/3")

# %% [markdown]
# *LabLM in float32 through `transformers`, 6 drafted rows, 3 prompts of each kind, greedy, one run.* A wrong first token kills a whole chain, but only one
# branch of a tree, so the tree can only gain where the first guess often fails. Where the draft is nearly always right, it spends rows on second
# choices that nobody needs, and the chain reaches deeper. Compare the two columns as well: growing a tree is work in Python, and more tokens a
# step are not yet more tokens a second.

# %% [markdown]
# ## 6 · Early exit: ask before the last layer
#
# A layer's output has the width of the last one, so the final norm and the output layer can read it too. The text can leave
# after any layer:
#
# $$\text{logits}_\ell = E\,M_\ell\,\bigl(g_\ell \odot h_\ell / \mathrm{rms}(h_\ell)\bigr)$$
#
# E is the output matrix. An *untrained* exit takes the final norm's gain for $g_\ell$ and the identity for $M_\ell$. Its first
# layers are the model's own, so the draft needs no weights of its own: *self-speculation* (LayerSkip, arXiv:2404.16710).
# LayerSkip's README reports an acceptance of 0.019 for a 1.5B model that was never trained to leave early, which took it from
# 45 tokens a second down to 14.
#
# LabLM also has *trained* exits: $g_\ell$ and $M_\ell$ learnt from LabLM's own final distribution for a few minutes, while
# LabLM stood still (`data/MODEL_CARD.md`).
#
# **Predict:** LabLM has six layers. How often does an untrained exit after the third name the model's favourite token? A
# trained one?

# %%
import math

import matplotlib.pyplot as plt
import torch

from labutils.decoding import early_exit
from labutils.decoding.early_exit import AdaptiveDecoder, ExitHeads, adaptive_logits, exit_model
from labutils.models.compare import held_out_documents, paired_quality
from labutils.models.draft_heads import load_head
from labutils.models.load import load_model
from labutils.plots.quality_share import draw_quality

model, tokenizer = load_model("lablm")
model.requires_grad_(False)
heads, untrained, depth = load_head("exit", model), ExitHeads(model), model.config.num_hidden_layers
documents = held_out_documents(limit_bytes=3000)


def rows_of(documents, length):
    """The first `length` tokens of each document that has so many."""
    encoded = (tokenizer(d.text, add_special_tokens=False, verbose=False).input_ids for d in documents)
    return torch.tensor([[tokenizer.bos_token_id, *ids[: length - 1]] for ids in encoded if len(ids) >= length - 1])


texts = rows_of(documents[:8], 192)
with torch.no_grad():
    whole = model(texts, output_hidden_states=True)
favourites = whole.logits.argmax(-1)

# %%
print(f"{texts.numel()} places in {len(texts)} held-out modules: the exit's favourite is the model's favourite")
agreement = {}
for layers in range(1, depth):
    for name, exits in (("untrained", untrained), ("trained", heads)):
        found = model.lm_head(exits(whole.hidden_states[layers], layers)).argmax(-1)
        agreement[name, layers] = (found == favourites).float().mean().item()
    row = "   ".join(f"{name} {agreement[name, layers]:.3f}" for name in ("untrained", "trained"))
    print(f"after {layers} of {depth} layers: {row}")

# %% [markdown]
# The trained exit has 65,536 numbers in its matrix and 256 gains; everything else is LabLM's. As a draft it is an ordinary
# model of few layers, so the fast decoder of chapter 01 runs it, and the verifier of this chapter makes the result LabLM's
# own. **Predict:** which exit makes the most of LabLM's own speed on a text that repeats its context, and which on code?

# %%
from labutils.decoding.proposers import ModelDraft, NoDraft
from labutils.generation.fast_llama import FastLlama
from labutils.models.drafting_text import text_prompts

target = FastLlama(model, max_length=768)
drafts = {"plain decoding": NoDraft()}
for name, exits, layers in (("untrained, 2", untrained, 2), ("trained, 1", heads, 1), ("trained, 2", heads, 2)):
    short = exit_model(model, layers=layers, heads=exits)
    drafts[f"{name} layers"] = ModelDraft(FastLlama(short, max_length=768, matvec=target.matvec))
    price = drafts[f"{name} layers"].model.weight_bytes / target.weight_bytes
    print(f"{name} of {depth} layers: a drafted token reads {price:.0%} of the weights that LabLM reads")
print(f"3 drafted tokens a step, 40 tokens a prompt, 2 prompts; cpu, float32, {torch.get_num_threads()} threads")
for kind in ("code", "qa"):
    for name, draft in drafts.items():
        made = [
            generate_speculative(target, draft, prompt, 40, draft_tokens=3)
            for prompt in text_prompts(kind, tokenizer, 2)
        ]
        seconds = sum(s.draft_s + s.target_s for s in made) / sum(len(s.steps) * s.tokens_per_step for s in made)
        judged = sum(s.judged for s in made)
        rate = f"{sum(s.accepted for s in made) / judged:.2f} accepted of {judged}" if judged else "nothing drafted"
        print(f"{kind:<5} {name:<22} {1e3 * seconds:>5.1f} ms a token, {rate}")

# %% [markdown]
# Read the times against the first row of each kind. An exit after one of six layers costs a sixth of the layers *and the whole
# output layer*. Section 4's formula says what that price needs: acceptance above it, and by how much. LabLM has few layers, so
# each of them matters; LayerSkip trains a deep model from the start so that its early layers can answer.

# %% [markdown]
# ### Leave when you are sure
#
# CALM (arXiv:2207.07061) asks after every layer and leaves for good at the first that is sure enough: by the lead of its best
# token over the second (softmax margin), or by how little the layer turned the hidden state (saturation). Nothing verifies
# the token, so this is quality for time.
#
# A later token attends, in every layer, to the keys and values of all earlier ones. A token that left has none above its exit.
# CALM's **state propagation** makes them there from the hidden state that the token left with.
#
# **Tiny numbers:** with margins 0.2, 0.9, 0.4 after layers 1 to 3 of 4 and a threshold of 0.8, a token runs 2 layers.

# %% [markdown]
# ## Exercise 10.9: exit_depths
#
# Write `exit_depths(confidence, threshold)`: `confidence` is (tokens, layers − 1), after every layer but the last; return how
# many layers each token runs, (tokens,). It leaves at the first confidence at or above the threshold. 2 lines, 8 minutes,
# difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>The first True of a row: <code>.int().argmax(dim=1)</code>. What does it say of a row without any?</details>
# <details><summary>Hint 2</summary>Append a column of True for the last layer, after which every token leaves.</details>


# %%
# EXERCISE exit_depths
def exit_depths(confidence, threshold):
    """Layers that each token runs."""
    ### BEGIN SOLUTION
    always = torch.ones(len(confidence), 1, dtype=torch.bool)
    return torch.cat([confidence >= threshold, always], dim=1).int().argmax(dim=1) + 1
    ### END SOLUTION


# %%
# CHECK exit_depths
from labutils.checks import ch10_cache

ch10_cache.exit_depths(exit_depths)

# %% [markdown]
# **Predict:** at half of the layers, does a token that chooses its own depth beat a depth that is fixed for all? And does it
# beat the same depths dealt out at random?

# %%
sizes = [len(tokenizer.decode(row[1:]).encode()) for row in texts]


def bits_of(logits, ids=texts, sizes=sizes):
    """Bits and bytes of each row, by logits that predict its tokens from the second on."""
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -logits.shape[1] :], reduction="none")
    return list(zip((nats.sum(1) / math.log(2)).tolist(), sizes, strict=True))


full = bits_of(whole.logits[:, :-1])


def point(leave):
    """Share of the layers that ran, quality, the depths, and the bits of each text."""
    logits, depths = adaptive_logits(model, heads, texts, leave)
    bits = bits_of(logits[:, :-1])
    return depths.float().mean().item() / depth, paired_quality(bits, full), depths, bits


# %%
margins = [point(early_exit.by_margin(model, threshold)) for threshold in (0.1, 0.25, 0.5)]
turns = [point(early_exit.by_saturation(threshold)) for threshold in (0.9, 0.95, 0.98)]
generator = torch.Generator().manual_seed(0)
dealt = [point[2].flatten()[torch.randperm(texts.numel(), generator=generator)].view_as(texts) for point in margins]
curves = {
    "margin": margins,
    "saturation": turns,
    "fixed depth": [point(early_exit.by_depth(torch.full_like(texts, layers))) for layers in (2, 3, 4, 5)],
    "the margin's depths, at random": [point(early_exit.by_depth(depths)) for depths in dealt],
}
for name, points in curves.items():
    print(name, *(f"   {share:.0%} of the layers: {quality}" for share, quality, *_ in points), sep="\n")
against_chance = [paired_quality(ours[3], chance[3]) for ours, chance in zip(*list(curves.values())[::3], strict=True)]
print("the margin against its own depths at random", *(f"   {quality}" for quality in against_chance), sep="\n")

# %%
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
draw_quality(ax, {name: [p[:2] for p in points] for name, points in curves.items()}, share_of="layers that ran")
ax.set_title(
    f"At {margins[0][0]:.0%} of the layers, choosing saves {-against_chance[0].difference:.3f} bits per byte over chance"
)
plt.show()

# %% [markdown]
# *Bits per byte lost against the share of layers that ran, with 95% intervals over modules; the random control has exactly the
# margin's depths.* Now the clock. A margin costs an output layer at every exit it asks.

# %%

layer_weights = sum(p.numel() for p in model.model.layers[0].parameters())
print(f"an output layer has {model.lm_head.weight.numel() / layer_weights:.2f} times the weights of a layer")
leaves = {
    "all layers": early_exit.by_saturation(2.0),
    "margin 0.25": early_exit.by_margin(model, 0.25),
    "saturation 0.95": early_exit.by_saturation(0.95),
    "2 layers": early_exit.by_depth(torch.tensor([[2]])),
}


def decode_known(leave, ids=texts[:1, :64]):
    """Feeds 24 known tokens behind 40 of a prompt."""
    decoder = AdaptiveDecoder(model, heads, leave)
    decoder.prefill(ids[:, :40])
    for token in ids[0, 40:].split(1):
        decoder.decode_one_token(token)
    return sum(decoder.depths) / len(decoder.depths)


timings = measure_interleaved(
    {n: lambda leave=leave: decode_known(leave) for n, leave in leaves.items()}, repeats=5, warmup=1
)
for name, leave in leaves.items():
    ratio = paired_ratio(timings["all layers"].samples_s, timings[name].samples_s)
    print(f"{name:<15} {decode_known(leave):.1f} layers a token, {ratio} as fast as all layers")
print(timings["all layers"])

# %% [markdown]
# <details><summary>Explanation</summary>
# A fixed depth of two layers shows what leaving can save when nobody asks. The margin reads the whole output layer after every
# layer, and one output layer weighs more than one layer: unless most tokens leave at once, asking costs more than leaving saves.
# Saturation asks almost for nothing, but see above how little it knows beyond a fixed depth. A batch has a harder problem still:
# its rows leave at different depths, and the slowest decides.
# </details>

# %% [markdown]
# ## 7 · The cache that stays small
#
# Each step reads all weights once and all keys and values once. When does the cache weigh as much as the weights?
#
# $$n^* = \frac{\text{weight bytes read a step}}{\text{KV bytes a position}}$$
#
# **Tiny numbers:** LabLM in bf16 reads 11.5 MB of weights and 3 KiB a position: 11.5 MB ÷ 3 KiB ≈ 3,750 positions, beyond the
# 1,024 it was trained for. Nothing in this section can make LabLM itself faster; it shows what quality costs.
#
# Sizes from: Llama 3 arXiv:2407.21783, Qwen3 arXiv:2505.09388, gpt-oss arXiv:2508.10925 (every second layer sees 128 positions
# and then stops growing), DeepSeek-V3 arXiv:2412.19437 (one latent vector of 512 numbers and 64 rotary ones for all heads). A
# mixture of experts reads its active parameters only.
#
# **Predict:** which of them first spends half of a step on its cache?

# %%
from transformers import LlamaConfig, Qwen3Config

from labutils.decoding.small_cache import crossover_positions
from labutils.measurement.resources import kv_bytes_per_position

GQA = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
MODELS = {  # name: weight bytes read a step, KV bytes a position (bf16)
    "LabLM, bf16": (2 * model.num_parameters(), kv_bytes_per_position(model.config, element_bytes=2)),
    "Qwen3-0.6B, bf16": (
        2 * 0.6e9,
        kv_bytes_per_position(Qwen3Config(**GQA | {"num_attention_heads": 16}, num_hidden_layers=28), element_bytes=2),
    ),
    "Llama-3.1-8B, bf16": (
        2 * 8.03e9,
        kv_bytes_per_position(LlamaConfig(**GQA, num_hidden_layers=32), element_bytes=2),
    ),
    "Llama-3.1-8B, 4 bits": (
        0.5 * 8.03e9,
        kv_bytes_per_position(LlamaConfig(**GQA, num_hidden_layers=32), element_bytes=2),
    ),
    "gpt-oss-20b, 4 bits": (0.5 * 3.6e9, 12 * 2 * 8 * 64 * 2),
    "DeepSeek-V3, 8 bits": (37e9, 61 * (512 + 64) * 2),
}
for name, (weights, kv) in MODELS.items():
    positions = crossover_positions(weight_bytes=weights, kv_bytes_per_position=kv)
    print(
        f"{name:<22} {weights / 1e9:>7.3f} GB a step, {kv / 1024:>6.1f} KiB a position: equal at {positions:>9,.0f} positions"
    )

# %% [markdown]
# Those are one stream's numbers. A batch of 32 reads the weights once and 32 caches, so the crossover comes 32 times earlier:
# that is why serving cares most. Two kinds of remedy:
#
# * **evict**: keep few positions, for good. *Sinks and window* (StreamingLLM) keeps the first four and the newest; *heavy
#   hitters* (H2O) what got most attention so far; *SnapKV* what the prompt's last queries looked at;
# * **select**: keep all, read few. *Quest* bounds each page of keys, *DSA* scores each position with a cheap indexer.

# %% [markdown]
# ## Exercise 10.10: kept_positions
#
# Write `kept_positions(length, sinks, budget)`: which positions of a text of `length` tokens stay in a cache of at most `budget`:
# the first `sinks` and the newest. An ascending list. 3 lines, 6 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>For length 10, 2 sinks and a budget of 5: [0, 1, 7, 8, 9].</details>
# <details><summary>Hint 2</summary>A text that fits stays whole. Otherwise the window has budget − sinks positions.</details>


# %%
# EXERCISE kept_positions
def kept_positions(length, sinks, budget):
    """The first and the newest positions."""
    ### BEGIN SOLUTION
    if length <= budget:
        return list(range(length))
    return [*range(sinks), *range(length - (budget - sinks), length)]
    ### END SOLUTION


# %%
# CHECK kept_positions
ch10_cache.kept_positions(kept_positions)

# %% [markdown]
# ## Exercise 10.11: visible
#
# **A bug to hunt.** An engine (Mikyx-1/TinyLLM, PR #18) skipped its causal mask whenever the cache held something. That is right
# for one new token and wrong for several, and a verifier always reads several. The rule below has that bug. Write
# `visible(cached, new)` without it: a boolean (new, cached + new), True where a new query sees a key. 1 line, 8 minutes, difficulty
# 2 of 3.
#
# ```python
# def visible(cached, new):
#     if cached > 0:
#         return torch.ones(new, cached + new, dtype=torch.bool)
#     return torch.ones(new, new, dtype=torch.bool).tril()
# ```
#
# <details><summary>Hint 1</summary>New query i stands at position cached + i, and sees positions 0 to cached + i.</details>
# <details><summary>Hint 2</summary><code>.tril(k)</code> keeps k diagonals more to the right of the main one.</details>


# %%
# EXERCISE visible
def visible(cached, new):
    """Which keys each new query sees."""
    ### BEGIN SOLUTION
    return torch.ones(new, cached + new, dtype=torch.bool).tril(cached)
    ### END SOLUTION


# %%
# CHECK visible
ch10_cache.visible(visible)

# %% [markdown]
# ### What does a position cost that is gone?
#
# Eight held-out modules: 640 tokens of each are the prompt, read in full. Then each policy has its budget, and the next 48 tokens
# are read one by one. First the proof that the machinery changes nothing while it keeps everything.

# %%
from labutils.decoding import small_cache
from labutils.decoding.small_cache import SmallCache, decode

PROMPT, NEW = 640, 48
long_texts = rows_of(held_out_documents(limit_bytes=12_000), PROMPT + NEW)[:8]


def reader(ids, prompt):
    """Reads the prompts in full; returns a function that reads the rest under a policy."""
    sizes = [len(tokenizer.decode(row[prompt:]).encode()) for row in ids]
    whole = SmallCache()
    first = decode(model, ids[:, :prompt], whole)

    def read_on(**policy):
        """Share of the positions read, bits of the new tokens, logits and cache."""
        cache = whole.fork(**policy)
        logits = torch.cat([first, decode(model, ids[:, prompt:], cache)], dim=1)
        return cache.share, bits_of(logits[:, :-1], ids, sizes), logits, cache

    return read_on


# %%
after_prompt = reader(long_texts, PROMPT)
share, everything, logits, _ = after_prompt(budget=None)
with torch.no_grad():
    reference = model(long_texts).logits[:, PROMPT - 1 :]
spent = sum(bits for bits, _ in everything) / sum(size for _, size in everything)
print(f"{len(long_texts)} texts; everything kept ({share:.0%}): {spent:.4f} bits per byte")
print(f"largest difference from the model's own logits: {(logits - reference).abs().max():.1e}")

# %% [markdown]
# **Predict:** a quarter of the positions is kept. Order the policies, the random control among them.


# %%
def policies(budget, prompt=PROMPT):
    generator = torch.Generator().manual_seed(0)
    return {
        "control: half at random": {"keep": small_cache.at_random(recent=budget // 2, generator=generator)},
        "sinks and window": {"keep": small_cache.newest()},
        "heavy hitters (H2O)": {"keep": small_cache.heavy_hitters(recent=budget // 2)},
        "observed (SnapKV)": {"keep": small_cache.observed(prompt=prompt, window=16)},
        "pages (Quest)": {"read": small_cache.page_bounds(page=16)},
        "index (after DSA)": {"read": small_cache.index_scores(dims=16, recent=budget // 2)},
    }


kept = {name: [] for name in policies(1)}
for budget in (96, 240):
    control = None
    for name, policy in policies(budget).items():
        share, bits, _, cache = after_prompt(budget=budget, **policy)
        control = control or bits
        kept[name].append((share, paired_quality(bits, everything)))
        print(f"{name:<24} {share:>4.0%} read, {cache.resident_bytes / 1e6:>5.1f} MB: {kept[name][-1][1]}")
        if bits is not control:
            low, high = paired_quality(bits, control).interval
            print(f"{'':<24} against the control [{low:+.4f}, {high:+.4f}]")

# %%
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
draw_quality(ax, kept, share_of="positions read")
losses = [points[0][1].difference for points in kept.values()]
ax.set_title(
    f"{kept['sinks and window'][0][0]:.0%} of the positions cost {min(losses):.2f} to {max(losses):.2f} bits per byte"
)
plt.show()

# %% [markdown]
# *Bits per byte lost against the share of positions that a step reads, with paired 95% intervals over modules.* Read the lines
# "against the control": where the interval holds 0, nothing shows that the policy chose better than chance. Much of what helps in
# code is near, and the control keeps what is near too.
#
# Now a text where what helps is far: 96 tokens of a module, 400 of another, then the first module begins again. LabLM has learnt to
# copy. **Predict:** which policies still find what they have to copy, when 96 of 528 positions are kept or read?

# %%
again = torch.cat([long_texts[:, :96], long_texts.roll(1, 0)[:, 96:496], long_texts[:, 1:81]], dim=1)
copying = reader(again, 528)
_, with_all, *_ = copying(budget=None)
spent = sum(bits for bits, _ in with_all) / sum(size for _, size in with_all)
print(f"everything kept: {spent:.3f} bits per byte of what is copied")
for name, policy in policies(96, prompt=528).items():
    _, bits, *_ = copying(budget=96, **policy)
    print(f"{name:<24} {paired_quality(bits, with_all)}")

# %% [markdown]
# <details><summary>Explanation</summary>
# A window forgets whatever lies outside it, however much it will be needed. H2O and SnapKV keep what was looked at in time; what a
# later token will want to copy, earlier ones need not have looked at. Quest and the index ask for every token anew, so they can
# still find what nobody wanted before; they save reading but no memory. A reader that skips what does not matter can even predict
# better than one that reads everything: look at the signs. Keys stay where they were: their rotary angle is that of their position.
# </details>

# %% [markdown]
# ## 8 · Grammars: what may come next
#
# A model may be free to say anything and still be asked for one of 63 names, or for JSON. So the pattern of the answer becomes an
# automaton over *bytes*, and every token is walked through it from every state, once (Willard and Louf 2023, Outlines,
# arXiv:2307.09702; XGrammar, arXiv:2411.15100, does most of it ahead of time for grammars that nest). While decoding, the logits of
# tokens that lead nowhere become −∞.
#
# **Tiny numbers:** `ab|aé|c` has a start, a state after "a", one in the middle of "é" (two bytes), and an end. Token "ab" leads from
# the start to the end, token "ac" nowhere.
#
# **Predict:** LabLM has 4,096 tokens. In the middle of an answer that must be one of 63 names, how many of them are allowed on
# average?

# %%
import json
import re
import time

import torch

from labutils.data import service
from labutils.decoding.automaton import compile_pattern
from labutils.decoding.grammar import GrammarDraft, GrammarTarget, choice, compile_grammar, json_object, token_bytes
from labutils.decoding.proposers import NoDraft
from labutils.decoding.speculate import generate_speculative
from labutils.generation.fast_llama import FastLlama
from labutils.measurement.timing import bootstrap_interval, measure_interleaved, paired_ratio
from labutils.models.load import load_model
from labutils.models.tokenizer import chat_ids, text_ids

lablm = load_model("lablm")
model, tokenizer = lablm
END, ANSWER = (tokenizer.convert_tokens_to_ids(name) for name in ("<|end|>", "<|assistant|>"))
NAMES, TOKENS = list(service.intents()), token_bytes(tokenizer)

small = compile_pattern("ab|aé|c")
for text in ("", "a", "aé", "ac"):
    print(
        f"after {text!r:5} state {small.walk(text.encode())}, may end: {bool(small.accepting[small.walk(text.encode())])}"
    )
print("after half of é: state", small.walk("aé".encode()[:2]))

# %%
PATTERNS = {"intent": choice(NAMES), "JSON": json_object({"intent": NAMES, "urgent": [True, False]})}
grammars = {}
for name, pattern in PATTERNS.items():
    began = time.perf_counter()
    grammars[name] = g = compile_grammar(pattern, TOKENS, end=END)
    took, (states, vocab) = time.perf_counter() - began, g.allowed.shape
    allowed = g.allowed[:-1].sum(1).float()
    print(
        f"{name}: {states} states × {vocab} tokens in {took:.2f} s, {states * vocab / 8 / 1e6:.2f} MB as bits; "
        f"allowed in a state: {allowed.mean():.1f} on average, {int(allowed.max())} at most"
    )
after = grammars["intent"].walk(text_ids(tokenizer, "change"))
print("after 'change':", [TOKENS[t].decode() for t in grammars["intent"].allowed[after].nonzero().flatten()])

# %% [markdown]
# <details><summary>What you see</summary>Few tokens are allowed, and often only one text can follow. That is why masks cost almost
# nothing, and why a grammar can also draft. The tests hold every bit of these tables against <code>xgrammar</code> on random walks,
# with tokens that end inside a Chinese character among them.</details>

# %% [markdown]
# ## Exercise 10.12: token_mask
#
# Write `token_mask(next_state, tokens, state)`: `next_state[s]` is a dict from byte to state, `tokens` a list of `bytes`; return a list
# of booleans: whether each token's bytes, one after the other, all lead on from `state`. A token without bytes is special and not
# allowed. 8 lines, 8 minutes, difficulty 2 of 3, core.
#
# <details><summary>Hint 1</summary>A byte outside the dict ends the walk: not allowed.</details>
# <details><summary>Hint 2</summary>Keep a variable for where you are, and set it back to <code>state</code> for each token.</details>


# %%
# EXERCISE token_mask
def token_mask(next_state, tokens, state):
    """Whether each token may come next."""
    ### BEGIN SOLUTION
    mask = []
    for token in tokens:
        here = state
        for byte in token:
            here = next_state[here].get(byte) if here is not None else None
        mask.append(bool(token) and here is not None)
    return mask
    ### END SOLUTION


# %%
# CHECK token_mask
from labutils.checks import ch10_grammar

ch10_grammar.token_mask(token_mask)

# %% [markdown]
# ### Forced text is a free draft
#
# Where a state has one way on and may not end, the next byte is certain, and the one after it perhaps too. `{"intent": "` costs six steps
# of the model and needs none. SGLang inserts such text unseen ("jump forward"). But what is forced is a *text*, and a model may cut it
# into other tokens: `{`, `"` or `{"`, and the last piece may swallow what follows. So we only *draft* it and let the verifier
# decide, with logits masked along the drafted path. The text is then the one that masked decoding gives token by token.

# %% [markdown]
# ## Exercise 10.13: forced_run
#
# Write `forced_run(next_state, accepting, state)`: the longest `bytes` that must come next. Stop where there are two ways on, none,
# or where the text may end (`accepting[s]`). 5 lines, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>len(next_state[state]) == 1</code>, and the state is not accepting.</details>
# <details><summary>Hint 2</summary><code>((byte, state),) = next_state[state].items()</code> takes the only way.</details>


# %%
# EXERCISE forced_run
def forced_run(next_state, accepting, state):
    """The text that must come next, whatever is chosen later."""
    ### BEGIN SOLUTION
    forced = bytearray()
    while len(next_state[state]) == 1 and not accepting[state]:
        ((byte, state),) = next_state[state].items()
        forced.append(byte)
    return bytes(forced)
    ### END SOLUTION


# %%
# CHECK forced_run
ch10_grammar.forced_run(forced_run)

# %% [markdown]
# Now let customers ask. LabLM was trained to name intents and has never written JSON. Three ways to ask it for
# `{"intent": …, "urgent": …}`: masked, so that any tokens may write the text; masked to the *usual* tokens, those that the tokenizer cuts
# forced text into (llguidance does so); and with the forced text drafted as well.
#
# **Predict:** every masked answer will be valid JSON. How many will name the right intent? And how many target steps does an answer of
# about 20 tokens need once forced text is drafted?

# %%
from labutils.decoding.grammar import with_usual_tokens

fast = FastLlama(model, max_length=1024)
ITEMS = service.evaluation_set(service.INTENT, "test", 16, seed=10)


def encode(text):
    return text_ids(tokenizer, text)


usual = with_usual_tokens(grammars["JSON"], TOKENS, encode)


def prompt_of(*messages):
    return torch.tensor([chat_ids(tokenizer, messages, add_generation_prompt=True)])


def answered(prompt, grammar=None, *, forced=False):
    """The answer's text, its tokens, how it was made, and the seconds it took."""
    target = fast if grammar is None else GrammarTarget(fast, grammar)
    proposer = GrammarDraft(grammar, encode, opens=ANSWER) if forced else NoDraft()
    began = time.perf_counter()
    made = generate_speculative(target, proposer, prompt, 40, draft_tokens=16 if forced else 0, stop=[END])
    ids = made.token_ids[0, prompt.shape[1] :].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True), ids, made, time.perf_counter() - began


# %%
WAYS = {  # the grammar, and whether forced text is drafted
    "intent, plain": (None, False),
    "intent, masked": (grammars["intent"], False),
    "intent, forced drafts": (grammars["intent"], True),
    "JSON, any tokens": (grammars["JSON"], False),
    "JSON, masked": (usual, False),
    "JSON, forced drafts": (usual, True),
}
asked_prompts = [prompt_of(*item.messages[:-1]) for item in ITEMS[:12]]
truths = [item.messages[-1]["content"] for item in ITEMS[:12]]
answered(asked_prompts[0], usual, forced=True)  # warm-up
results = {way: [] for way in WAYS}
for prompt in asked_prompts:
    for way, (grammar, forced) in WAYS.items():  # in turns: a slow moment hits all of them
        results[way].append(answered(prompt, grammar, forced=forced))


# %%
def intent_in(text):
    found = re.search(r'"intent": "(\w+)"', text)
    return found[1] if found else text


for way, rows in results.items():
    right = sum(intent_in(text) == truth for (text, *_), truth in zip(rows, truths, strict=True))
    made = [m for _, _, m, _ in rows]
    judged, seconds = sum(m.judged for m in made), sorted(s for *_, s in rows)
    print(
        f"{way:<22} right {right:>2} of {len(rows)}, {sum(len(ids) for _, ids, _, _ in rows) / len(rows):.1f} tokens in "
        f"{1 + sum(m.target_steps for m in made) / len(rows):.1f} steps, {1e3 * seconds[len(seconds) // 2]:.1f} ms (median)"
        + (f", {sum(m.accepted for m in made) / judged:.0%} of judged drafts stood" if judged else "")
    )
for kind in ("intent", "JSON"):
    slow, quick = results[f"{kind}, masked"], results[f"{kind}, forced drafts"]
    same = sum(a[1] == b[1] for a, b in zip(slow, quick, strict=True))
    gain = paired_ratio([s for *_, s in slow], [s for *_, s in quick])
    print(f"{kind}: {same} of {len(slow)} answers token for token the same; forced drafts are {gain} as fast")


# %%
def is_answer(text):
    try:
        return set(json.loads(text)) == {"intent", "urgent"}
    except (json.JSONDecodeError, TypeError):
        return False


asked = {"role": "system", "content": 'Answer in JSON: {"intent": …, "urgent": true or false}.'}
for name, grammar in {"plain": None, "masked": usual}.items():
    texts = [answered(prompt_of(asked, item.messages[-2]), grammar)[0] for item in ITEMS[:8]]
    valid = sum(is_answer(text) for text in texts)
    print(f"asked for JSON in words, {name}: {valid} of {len(texts)} valid; for instance {texts[0]!r}")
for way in ("JSON, any tokens", "JSON, masked"):
    said = {intent_in(text) for text, *_ in results[way]}
    print(f"{way}: {len(results[way])} customers, {len(said)} different intents named")
first = results["JSON, any tokens"][0][1]
print("cut as the model likes:", [TOKENS[t].decode(errors="replace") for t in first[:12]], "…")
by_code = json.dumps(
    {"intent": results["intent, forced drafts"][0][0], "urgent": "urgent" in ITEMS[0].messages[-2]["content"]}
)
print(f"the intent asked for as trained, the JSON written by code: {by_code}")

# %% [markdown]
# <details><summary>What the masks did and did not do</summary>They guarantee the <em>form</em>: every finished masked answer parses. They add
# no sense. Inside JSON, where training never put an intent, LabLM's choice hardly depends on the customer; asked as it was trained it
# names the intent, and a line of code writes the JSON. Free to cut forced text as it likes, it even spells it in pieces it has never seen side
# by side, which takes more steps and refuses drafts. With the usual tokens most forced drafts stand, and most steps are saved.</details>

# %% [markdown]
# ### What masking does to the distribution
#
# Masking token by token is *not* the model's distribution among the allowed answers. With names $c = c_1 c_2 \dots$,
#
# $$p(c \mid \text{allowed}) = \frac{\prod_i p(c_i \mid c_{<i})}{\sum_{c'} \prod_i p(c'_i \mid c'_{<i})}, \qquad
# q(c) = \prod_i \frac{p(c_i \mid c_{<i})}{\sum_{t \text{ allowed after } c_{<i}} p(t \mid c_{<i})}$$
#
# The left one divides once. The right one divides at every step, and forgives a first token whose continuations the model itself finds
# unlikely. **Tiny numbers:** first token A 0.75 or B 0.25. After A the only allowed second token has 0.1, after B 1.0. Masking gives A
# 0.75; the model's own opinion is 0.075 against 0.25, so A 0.23.

# %% [markdown]
# ## Exercise 10.14: masked_and_conditioned
#
# Texts of two tokens: `first` (vocab,) are the first token's probabilities, `second` (vocab, vocab) the second's after each first,
# `allowed` (vocab, vocab) says which texts are. Return both tables (vocab, vocab): masked step by step, and the model's own among the
# allowed. 5 lines, 10 minutes, difficulty 2 of 3, core.
#
# <details><summary>Hint 1</summary>A first token is allowed when some text begins with it: <code>allowed.any(1)</code>.</details>
# <details><summary>Hint 2</summary>A row without allowed texts would divide by 0: <code>.clamp(min=1e-12)</code>.</details>


# %%
# EXERCISE masked_and_conditioned
def masked_and_conditioned(first, second, allowed):
    """q of masking step by step, and p among the allowed texts."""
    ### BEGIN SOLUTION
    both = first[:, None] * second * allowed
    kept, rows = first * allowed.any(1), second * allowed
    masked = kept[:, None] / kept.sum() * rows / rows.sum(1, keepdim=True).clamp(min=1e-12)
    return masked, both / both.sum()
    ### END SOLUTION


# %%
# CHECK masked_and_conditioned
ch10_grammar.masked_and_conditioned(masked_and_conditioned)

# %% [markdown]
# LabLM's opinion of all 63 names, exactly, both ways (each name in its usual tokens), for customers who are asked for an intent as in
# training, and for the same customers without the system message, where LabLM wants to *answer* them.
#
# **Predict:** in which of the two does masking distort more?

# %%
from labutils.decoding.grammar import masked_choice_log_probs
from labutils.distillation.classifiers import choice_step_log_probs
from labutils.models.intents import intent_token_ids

CHOICES = intent_token_ids(tokenizer)


def both_ways(prompt):
    """P of each name masked and conditioned, and the probability that the model names one at all."""
    steps = choice_step_log_probs(model, prompt[0], CHOICES)
    whole = torch.stack([sum(row[i, t] for i, t in enumerate(c)) for row, c in zip(steps, CHOICES, strict=True)])
    return masked_choice_log_probs(steps, CHOICES).exp(), whole.softmax(0), whole.logsumexp(0).exp().item()


def compared(name, chats):
    distances, named, changed = [], [], []
    for chat in chats:
        masked, own, any_name = both_ways(prompt_of(*chat))
        distances.append((masked - own).abs().sum().item() / 2)
        named.append(any_name)
        if masked.argmax() != own.argmax():
            changed.append((chat[-1]["content"], masked, own))
    print(
        f"{name}: P(some name) {min(named):.2g} to {max(named):.2g}; total variation {sum(distances) / len(distances):.3f} on average, "
        f"{max(distances):.3f} at most; another winner for {len(changed)} of {len(chats)} customers"
    )
    return changed


changed = compared("with the system message", [item.messages[:-1] for item in ITEMS[:10]])
changed += compared("without it", [item.messages[-2:-1] for item in ITEMS[:10]])

# %%
for text, masked, own in changed[:2]:
    a, b = int(masked.argmax()), int(own.argmax())
    print(f"{text}\n  masking prefers {NAMES[a]} ({masked[a]:.2f}; the model's own {own[a]:.2f})")
    print(f"  the model's own favourite is {NAMES[b]} ({own[b]:.2f}; masked {masked[b]:.2f})")
if not changed:
    print("no winner changed here; only the probabilities did")

# %% [markdown]
# <details><summary>Why</summary>Where the model nearly always names an intent, almost nothing is masked away, and the two agree. Where it would
# rather say something else, masking chooses by first tokens that the model meant for another sentence. Ask for the form in the
# prompt or train it; let the mask catch the rest. Scoring whole names, as above, gives the model's own opinion when the answers can be
# listed.</details>

# %% [markdown]
# ## 9 · The prompt as speed
#
# "Prompt engineering" can be measured: each prompt token costs time until the first token (TTFT), each answer token costs a step, and
# both must buy something.
#
# $$T = \text{TTFT}(n_\text{prompt}) + (n_\text{answer} - 1)\, t_\text{step}$$
#
# **Predict:** does TTFT grow faster or slower than the prompt?

# %%
LENGTHS = (32, 128, 512)
texts = {n: torch.randint(6, 4096, (1, n), generator=torch.Generator().manual_seed(n)) for n in LENGTHS}


def first_token(path, ids):
    if path == "ours":
        fast.truncate(0)
        return fast.prefill(ids)
    with torch.inference_mode():
        return model(input_ids=ids, logits_to_keep=1)


taken = measure_interleaved(
    {
        f"{path} {n}": lambda path=path, n=n: first_token(path, texts[n])
        for path in ("ours", "transformers")
        for n in LENGTHS
    },
    repeats=5,
    warmup=1,
)
for path in ("ours", "transformers"):
    ms = {n: 1e3 * taken[f"{path} {n}"].median_s for n in LENGTHS}
    marginal = (ms[512] - ms[32]) / (512 - 32)
    print(
        f"{path:<13} TTFT "
        + ", ".join(f"{n} tokens {t:.1f} ms" for n, t in ms.items())
        + f"; {1e3 * marginal:.0f} µs for each further token"
    )
print(f"float32, batch 1, cpu, {torch.get_num_threads()} threads, median of 5 interleaved rounds")

# %% [markdown]
# What do prompt tokens buy? LabLM names an intent when the system message says "Name the intent.", because it was *trained* so: the
# prompt is a switch, the knowledge is in the weights. Without the message the task must come from examples in the conversation. All
# answers are masked to the 63 names, so that only the choice counts.

# %%
EXAMPLES = [
    message for item in service.evaluation_set(service.INTENT, "train", 4, seed=1) for message in item.messages[1:]
]
system = ITEMS[0].messages[:1]
PROMPTS = {
    "trained message": list(system),
    "trained message, 4 examples": [*system, *EXAMPLES],
    "an instruction never seen": [
        {"role": "system", "content": "Which of our intents is this? Reply with its name only."}
    ],
    "no message, 4 examples": EXAMPLES,
    "nothing": [],
}
tried = {name: [] for name in PROMPTS}
for item in ITEMS:
    for name, before in PROMPTS.items():
        prompt = prompt_of(*before, item.messages[-2])
        text, ids, made, seconds = answered(prompt, grammars["intent"])
        tried[name].append((text == item.messages[-1]["content"], prompt.shape[1], len(ids), made.prefill_s, seconds))


# %%
def mean(values):
    return sum(values) / len(values)


base = [row[0] for row in tried["trained message"]]
for name, rows in tried.items():
    right, prompt_tokens, answer_tokens, first_s, seconds = (list(column) for column in zip(*rows, strict=True))
    off = [100 * (r - b) for r, b in zip(right, base, strict=True)]
    low, high = bootstrap_interval(off, statistic=mean)
    print(
        f"{name:<28} {mean(prompt_tokens):>4.0f} prompt tokens, TTFT {1e3 * mean(first_s):>5.1f} ms, whole {1e3 * mean(seconds):>5.1f} ms, "
        f"right {mean(right):>4.0%}; {mean(off):+.0f} points [{low:+.0f}, {high:+.0f}] against the trained message"
    )
print(f"paired over {len(base)} customers, 95% bootstrap intervals")

# %% [markdown]
# <details><summary>How to read it</summary>Fine-tuning has moved the instruction into the weights: a few tokens call it. Examples are read
# again for every customer, unless a prefix cache keeps them, and LabLM was never trained on several customers in one chat: compare the
# rows with examples with the row of nothing. A large model gains more from examples; the comparison, paired and with its cost beside it, stays
# the same.</details>

# %%
query = ITEMS[0]
SAID = {
    "intent name": query.messages[-1]["content"],
    "JSON": json.dumps({"intent": query.messages[-1]["content"], "urgent": False}),
    "sentence": service.intents()[query.messages[-1]["content"]].answer[0],
}
steps = [s.target_s for m in (r[2] for r in results["intent, plain"]) for s in m.steps]
step_s = sorted(steps)[len(steps) // 2]
for name, text in SAID.items():
    tokens = len(encode(text)) + 1
    print(
        f"{name:<12} {tokens:>3} tokens, {1e3 * step_s * (tokens - 1):.0f} ms after the first at {1e3 * step_s:.2f} ms a step: {text}"
    )

# %% [markdown]
# ## 10 · Determinism: the neighbours in the batch
#
# Greedy decoding should give the same text every time. On a server it often does not (vLLM's issues #5898, #9567 and #11658 report it at
# temperature 0), though nothing random is left. Sums are rounded, so their order matters, and a kernel chooses its order by the
# *shape* it gets: how many customers share the batch.
#
# **Predict:** how many of the logits' bits change when seven other rows join?

# %%
a, b, c = (torch.tensor(x, dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0))
print(f"bfloat16: (256 + 1) + 1 = {((a + b) + c).item():g}, 256 + (1 + 1) = {(a + (b + c)).item():g}")
a, b, c = (torch.tensor(x) for x in (2.0**24, 1.0, 1.0))
print(
    f"float32: (2^24 + 1) + 1 = 2^24 + {((a + b) + c - a).item():g}, 2^24 + (1 + 1) = 2^24 + {(a + (b + c) - a).item():g}"
)
print(
    f"a last bit weighs {torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps:,.0f} times more in bfloat16"
)

# %%
from contextlib import nullcontext

from labutils.decoding.determinism import RowByRow
from labutils.generation.cache import KVCache
from labutils.generation.decode import prefill
from labutils.models.compare import held_out_documents

codes = (tokenizer(d.text, return_tensors="pt").input_ids[0] for d in held_out_documents(limit_bytes=600))
batch = torch.stack([ids[:40] for ids in codes if len(ids) >= 40][:8])


def decoded(net, ids, new=8):
    """Logits of the steps that decode `new` tokens greedily, and the tokens; every row has a cache and no padding."""
    cache, logits = KVCache(), []
    step = prefill(net, ids, cache)
    for _ in range(new):
        logits.append(step)
        step = prefill(net, step.argmax(-1)[:, None], cache)
    return torch.stack(logits, dim=1)


def alone_and_together(net, cure=None):
    with cure or nullcontext():
        began = time.perf_counter()
        together = decoded(net, batch)
        took = time.perf_counter() - began
        alone = torch.cat([decoded(net, row[None]) for row in batch])
    return alone, together, took


# %%
bf16 = load_model("lablm", dtype=torch.bfloat16).model
outcome = {}
for dtype, net in {"bfloat16": bf16, "float32": model}.items():
    for cure in ("none", "row by row"):
        alone, together, took = alone_and_together(net, RowByRow() if cure != "none" else None)
        same_text = (alone.argmax(-1) == together.argmax(-1)).cumprod(1).bool()  # compare until the first other token
        differ = (alone != together).any(-1)
        outcome[dtype, cure] = took
        print(
            f"{dtype:<9} cure: {cure:<11} {(alone[:, :2] != together[:, :2]).float().mean():.0%} of the first two steps' logits differ in some bit, "
            f"{int((~same_text[:, -1]).sum())} of {len(batch)} greedy texts; {1e3 * took:.0f} ms for the batch"
        )
    print(
        f"  the cure costs {outcome[dtype, 'row by row'] / outcome[dtype, 'none']:.1f} times the time at batch {len(batch)}"
    )

# %% [markdown]
# <details><summary>Why your machine may print something else</summary>It depends on the processor, the threads and the library: some
# kernels sum in the same order for one row and for eight, and then no bit differs. In float32 more bits may differ than in bfloat16, but
# each weighs far less, and it takes a nearer tie to change a token. Inside <code>RowByRow</code> every kernel sees the shapes of
# batch 1, whatever the batch: the share of differing bits should be 0% on any machine.</details>
#
# A GPU with few rows leaves most of its cores idle, so its kernels **split** the sum over features among them, and into more parts the
# fewer rows there are ("split-K"). Here is such a product with real weights: LabLM's head on real hidden states, each row summed in 8
# parts when alone and in one when eight share the kernel.


# %%
def head_in_parts(hidden, weight, parts):
    """hidden @ weight.T, the sum over features cut into parts that are rounded and added one by one."""
    pieces = [h @ w.T for h, w in zip(hidden.chunk(parts, -1), weight.chunk(parts, -1), strict=True)]
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total


with torch.inference_mode():
    hidden = model.model(batch).last_hidden_state.flatten(0, 1)
for dtype in (torch.bfloat16, torch.float32):
    h, w = hidden.to(dtype), model.lm_head.weight.detach().to(dtype)
    eight, one = head_in_parts(h, w, 8), head_in_parts(h, w, 1)
    moved = int((eight.argmax(-1) != one.argmax(-1)).sum())
    print(
        f"{dtype}: {(eight != one).float().mean():.0%} of the logits differ, by {(eight - one).abs().float().mean():.2g} on average; "
        f"{moved} of {len(h)} favourites change"
    )

# %% [markdown]
# The cure that larger systems use is the same as ours with a better price: one fixed split, whatever the batch (He et al. 2025,
# `batch_invariant_ops`; SGLang and vLLM have such a mode). It gives up some speed where rows are few.

# %% [markdown]
# ## Exercise 10.15: row_sums (a bug to hunt)
#
# This kernel sums rows in bfloat16 on eight workers. Its answers change when other rows join. Find the reason and mend it: the bits
# of a row's sum must not depend on the batch, and all eight workers must stay in use. 1 line changes, 8 minutes, difficulty 2 of 3.
#
# ```python
# def row_sums(rows):
#     parts = max(8 // len(rows), 1)  # few rows: several workers share each
#     sums = []
#     for row in rows:
#         total = torch.zeros((), dtype=rows.dtype)
#         for part in row.chunk(parts):
#             subtotal = torch.zeros((), dtype=rows.dtype)
#             for value in part:
#                 subtotal = subtotal + value
#             total = total + subtotal
#         sums.append(total)
#     return torch.stack(sums)
# ```
#
# <details><summary>Hint 1</summary>Which number in the code changes when a second row joins?</details>
# <details><summary>Hint 2</summary>One worker for each row would be deterministic too, but it leaves seven idle for a single row.</details>


# %%
# EXERCISE row_sums
def row_sums(rows):
    """The sum of each row (rows, n); the same bits in every batch."""
    ### BEGIN SOLUTION
    parts = 8
    sums = []
    for row in rows:
        total = torch.zeros((), dtype=rows.dtype)
        for part in row.chunk(parts):
            subtotal = torch.zeros((), dtype=rows.dtype)
            for value in part:
                subtotal = subtotal + value
            total = total + subtotal
        sums.append(total)
    return torch.stack(sums)
    ### END SOLUTION


# %%
# CHECK row_sums
ch10_grammar.row_sums(row_sums)

# %% [markdown]
# ## 11 · What larger systems do
#
# | idea | reported | source | question |
# | --- | --- | --- | --- |
# | MTP: a head trained with the model drafts one token more | second token accepted 85 to 90%, 1.8 times the tokens per second | DeepSeek-V3, arXiv:2412.19437 | 1 |
# | EAGLE-3: a draft layer reads the target's hidden states | H100, batch 1: 373 tokens/s against 158; 1.38 times the throughput at batch 64 | arXiv:2503.01840 and its repository | 2 |
# | the same, independently on an A100 | 3.02 times, 5.71 tokens a step | hemingkx/Spec-Bench | 3 |
# | DFlash: a diffusion model drafts a whole block at once | up to 6.17 times, lossless, Qwen3-8B | arXiv:2602.06036 | 4 |
# | linear hybrids: three layers of linear attention to one full | 75% less KV, 6 times the decode speed at a million tokens | Kimi Linear, arXiv:2510.26692 | 5 |
# | sparse attention: an indexer picks 2,048 tokens | MMLU-Pro 85.0 with and without | DeepSeek-V3.2 (DSA) | 6 |
# | disaggregation: prefill and decode on different machines, joined with the usual way | the KV travels: 144 KiB a token for Qwen3-4B (36 layers, 8 heads of 128, 16 bits) | TaiChi, arXiv:2508.01989 | 7 |
#
# Diffusion language models go further and write many tokens at a time without a target to verify them. They are not lossless, so they
# are compared on quality and speed together.

# %% [markdown]
# Answer with a pencil before you open the cell below.
#
# 1. Acceptance α = 0.85 to 0.90 with one drafted token gives how many tokens a step? What must a step cost for 1.8 times to come out?
# 2. EAGLE-3 speeds one stream up by 373 ÷ 158. If it were one model on one machine, which share of the gain would be left at batch 64?
# 3. 5.71 tokens a step, but 3.02 times as fast: how many plain steps does one speculative step cost?
# 4. If a whole block of γ costs one pass of c = 0.1 and α = 0.9, what is the best γ? And if each token costs c?
# 5. Three of four layers keep a state of fixed size. What share of the KV is left? Could that alone give 6 times the speed?
# 6. At 128,000 tokens of context, how many keys does full attention read for each that DSA reads?
# 7. At which link speed is shipping the KV of a prompt as fast as computing it anew at 5,000 tokens/s?


# %%
def per_step(alpha, drafted):
    """Tokens a step: (1 - α^(γ+1)) / (1 - α)."""
    return (1 - alpha ** (drafted + 1)) / (1 - alpha)


mtp = [per_step(a, 1) for a in (0.85, 0.90)]
print(
    f"1. {mtp[0]:.2f} to {mtp[1]:.2f} tokens a step; 1.8 times means a step of {mtp[0] / 1.8:.2f} to {mtp[1] / 1.8:.2f} plain ones"
)
print(
    f"2. {373 / 158:.2f} times for one stream, 1.38 at batch 64: {(1.38 - 1) / (373 / 158 - 1):.0%} of the gain is left"
)
print(f"3. one speculative step costs {5.71 / 3.02:.2f} plain ones: drafting, a tree to verify, and the host's work")
gain = {g: (per_step(0.9, g) / 1.1, per_step(0.9, g) / (1 + 0.1 * g)) for g in range(1, 33)}
block, serial = (max(gain, key=lambda g, i=i: gain[g][i]) for i in (0, 1))
print(
    f"4. token by token γ = {serial} is best, {gain[serial][1]:.2f} times; as a block γ = {block} (the longest tried), {gain[block][0]:.2f} "
    f"times, {gain[8][0]:.2f} at γ = 8: verifying many rows must stay free"
)
print(
    f"5. {1 / 4:.0%} of the KV: reading it {4} times as fast at most, so the rest of 6 must come from elsewhere (larger batches)"
)
print(f"6. {128_000 / 2048:.1f} keys for each one")
kv_bytes = 2 * 36 * 8 * 128 * 2
print(
    f"7. {kv_bytes / 1024:.0f} KiB × 5,000 tokens/s = {kv_bytes * 5000 / 1e9:.2f} GB/s; 10 Gbit Ethernet has {10 / 8:.2f} GB/s"
)

# %% [markdown]
# <details><summary>What the numbers say together</summary>(1) MTP's step is nearly free: the head is small beside the model. (2, 3) A gain for one
# stream shrinks in a batch, where rows are no longer free. (4) A block draft changes the formula: γ c becomes c, so the limit is α and the
# price of verifying. (5, 6) Hybrids and sparse attention change the model, not the decoder; they pay where context is long. (7) A
# link faster than that ships the KV sooner than this prefill makes it.</details>

# %% [markdown]
# ## 12 · One table
#
# All proposers that this chapter built, on the same texts, with the same verifier, in interleaved rounds. The **predicted** speed-up comes from the
# acceptance, the step curve of section 1 and the measured cost of a guess, by the formula of exercise 10.3; the **measured** one from the clock. Where
# the two differ, the formula's assumption shows: it takes every guess as equally likely, and a copy from the prompt is right in long runs or not at
# all.
#
# **Predict:** which of the proposers that own a model beats the ones that own nothing, and on which text?

# %%
my_favourite = None  # a name of the table, such as "suffix automaton"

# %%
from labutils.decoding.choosing import curve_of, predicted_speedup

drafts = {
    "prompt lookup": (PromptLookup(), 6),
    "corpus n-gram": (free["corpus n-gram"], 3),
    "suffix automaton": (SuffixAutomaton(), 6),
    "LabLM-small int8": (
        ModelDraft(fast_packed_llama(pack_model_(load_model("lablm-small").model, INT8), max_length=1024)),
        2,
    ),
    "int4 LabLM": (ModelDraft(targets["LabLM int4"]), 2),
}
step_curve = curve_of(by_rows["LabLM int8"], up_to=16)


contest = {"plain": (NoDraft(), 0)} | drafts


def speculate(name, kind):
    proposer, count = contest[name]
    texts = prompts[kind][:3]
    settings = {"draft_tokens": count, "stop": STOP}
    return [generate_speculative(targets["LabLM int8"], proposer, text, NEW_TOKENS[kind], **settings) for text in texts]


seconds = {(name, kind): [] for name in contest for kind in KINDS}
outputs = {}
for _ in range(6):  # interleaved rounds; the first one warms up
    for name, kind in seconds:
        outputs[name, kind] = done = speculate(name, kind)
        seconds[name, kind].append(sum(d.draft_s + d.target_s for d in done))
speedups = {
    (name, kind): paired_ratio(seconds["plain", kind][1:], seconds[name, kind][1:]) for name in drafts for kind in KINDS
}

# %%
print(f"{'proposer':<17} {'text':<12} {'γ':>2} {'acceptance':<20} tokens/step  predicted  measured")
for (name, kind), speedup in speedups.items():
    runs = outputs[name, kind]
    outcomes = [x for d in runs for s in d.steps for x in [1] * s.accepted + [0] * (s.accepted < s.drafted)]
    alpha, (low, high) = (0.0, (0.0, 0.0))
    if outcomes:
        alpha, (low, high) = (
            statistics.fmean(outcomes),
            bootstrap_interval(outcomes, statistic=statistics.fmean, resamples=300),
        )
    drafted, steps = sum(d.drafted for d in runs), sum(d.target_steps for d in runs)
    per_guess = sum(d.draft_s for d in runs) / max(drafted, 1)
    used = min(round(drafted / steps), 15)
    made = sum(s.made for d in runs for s in d.steps) / steps
    same = all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(outputs["plain", kind], runs, strict=True))
    guess = predicted_speedup(alpha, used, step_curve, per_guess)
    print(
        f"{name:<17} {kind:<12} {drafts[name][1]:>2} {alpha:.2f} [{low:.2f}, {high:.2f}]    {made:>5.2f} "
        f"{guess:>10.2f}x   {speedup}{'' if same else '  TEXT DIFFERS'}"
    )
best = {kind: max(drafts, key=lambda name, kind=kind: speedups[name, kind].value) for kind in KINDS}
print({kind: f"{name}, {speedups[name, kind]}" for kind, name in best.items()}, "you said", my_favourite)

# %%
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
for index, name in enumerate(drafts):
    gains = [speedups[name, kind] for kind in KINDS]
    places = [place + 0.15 * (index - 2) for place in range(len(KINDS))]
    values = [gain.value for gain in gains]
    spread = [[gain.value - gain.low for gain in gains], [gain.high - gain.value for gain in gains]]
    style = series_style(index)
    axes.errorbar(places, values, yerr=spread, fmt=style["marker"], color=style["color"], label=name, capsize=2)
axes.axhline(1, color="grey", linestyle=":")
axes.set(xticks=range(len(KINDS)), xticklabels=KINDS, ylabel="times plain decoding's speed")
sure = [f"{name} on {kind}" for kind, name in best.items() if speedups[name, kind].low > 1]
axes.set_title(f"Surely faster than plain decoding: {', '.join(sure) or 'none here'}")
axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# *Measured speed-up of each proposer over plain decoding of LabLM int8, the prompt's reading left out; bars: 95% interval over paired rounds. Three
# prompts of each kind.*
#
# <details><summary>Explain</summary>
#
# A draft that owns a model must run it once for each guess. If one guess costs a share c of a target step, even perfect guesses gain at most
# 1 / c. A free guess costs microseconds, so its low acceptance hardly matters, and long repeats make whole answers in a few steps. Chat and
# translation repeat little: there the best choice may be to draft nothing.
# </details>
#
# ### And with several customers?
#
# All this was one stream. With a batch of b streams a step has b (γ + 1) rows: the free rows are already taken by other people's tokens. The cell
# asks the curve.

# %%
wide = by_rows["LabLM int8"]
for batch in (1, 4, 8):
    gains = []
    for count in range(0, 32 // batch):
        rows = curve_of(wide, up_to=32)
        tokens = sum(0.8**i for i in range(count + 1))
        gains.append(tokens * rows[batch - 1] / rows[batch * (count + 1) - 1])
    best_count = max(range(len(gains)), key=gains.__getitem__)
    print(f"batch {batch}: at α = 0.8 draft {best_count} tokens, {gains[best_count]:.2f}x by the curve")

# %% [markdown]
# ## 13 · Points for the ledger
#
# One speed and one quality for each record. All the lossless proposers share their target's quality: their text is the same. So on the
# speed-quality plot speculation moves a point to the right and never down.

# %%
from labutils.measurement import ledger
from labutils.models.compare import bits_by_document, held_out_documents, paired_quality

documents = held_out_documents(limit_bytes=600)
baseline = bits_by_document(model, tokenizer, documents)
packed_model = pack_model_(load_model("lablm").model, INT8)
qualities = {
    "float32": paired_quality(baseline, baseline),
    "int8": paired_quality(bits_by_document(packed_model, tokenizer, documents), baseline),
}
contestants = {
    "float32, plain": ("float32", "LabLM float32", NoDraft(), 0),
    "float32, suffix automaton": ("float32", "LabLM float32", SuffixAutomaton(), 6),
    "int8, plain": ("int8", "LabLM int8", NoDraft(), 0),
    "int8, suffix automaton": ("int8", "LabLM int8", SuffixAutomaton(), 6),
}
speeds = {name: [] for name in contestants}
for _ in range(6):
    for name, (_, target_name, proposer, count) in contestants.items():
        done = [
            generate_speculative(targets[target_name], proposer, p, NEW_TOKENS["qa"], draft_tokens=count, stop=STOP)
            for p in prompts["qa"][:3]
        ]
        made = sum(step.made for d in done for step in d.steps)
        speeds[name].append(made / sum(d.draft_s + d.target_s for d in done))

# %%
records = []
for name, (dtype, _, _, _) in contestants.items():
    quality = qualities[dtype]
    record = ledger.Record(
        technique=f"speculation: {name}", model="lablm", device="cpu", dtype=dtype, threads=torch.get_num_threads(),
        prompt_tokens=prompts["qa"][0].shape[1], output_tokens=NEW_TOKENS["qa"], samples=speeds[name][1:],
        bits_per_byte=quality.bits_per_byte, baseline_bits_per_byte=quality.baseline_bits_per_byte,
        quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in documents), chapter="10",
    )  # fmt: skip
    records.append(record)
    ledger.append(record)

# %%
from labutils.plots.speed_quality import draw_speed_quality, speed_quality_table

figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
draw_speed_quality(records, ax=axes)
plt.show()
print(speed_quality_table(records))

# %% [markdown]
# *Tokens per second of the qa texts after the first token (5 rounds after one for warm-up) against bits per byte.*
#
# ## What you have
#
# - the curve of step time against rows, which decides how far to guess;
# - one verifier, greedy and sampled, proved by adding up everything that can happen, with controls;
# - proposers that cost nothing, a smaller model, a head, an early exit, a grammar, each with its acceptance, its price and the text on which it pays;
# - caches that stay small and exits that come early, which do change the text, with their price in bits;
# - output that is the same at every batch size, and what it takes.
#
# **Open question:** your service answers customers from a long FAQ on a GPU that serves 64 streams at once during the day and one at night. Where
# would you speculate, with which proposer, and which two numbers would you log every hour to know when to stop?
#
# Next: **11 · Serving many**.

# %%
from labutils.course.progress import progress

progress()

# %% [markdown]
# # 10 · Decoding faster
#
# **Goal:** make one stream of tokens faster without changing a single token, prove that nothing changed, and know when each
# trick pays.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 03; 05 helps |
# | Time | 4 hours for you; all cells run in two to four minutes on one core (measured: 107 and 209 s, the build included) |
# | Memory, download | 2.0 GB at the peak; nothing is downloaded |
# | Hardware | any computer; a C compiler for the int8 and int4 kernels |
# | Exercises | 15, each checked in the cell below it; short of time, do those marked `core` |

# %%
import copy
import statistics

import matplotlib.pyplot as plt
import torch
from transformers.utils import logging as transformers_logging

from labutils.course.bench.decoding_ways import Remembering
from labutils.course.predictions import calibration, predict
from labutils.decoding.proposers import CorpusNgram, ModelDraft, NoDraft, PromptLookup, SuffixAutomaton
from labutils.decoding.speculate import generate_speculative
from labutils.generation.fast_llama import FastLlama
from labutils.lab.models.drafting_text import KINDS, text_prompts
from labutils.lab.models.load import load_model
from labutils.lab.models.quantized import fast_packed_llama
from labutils.lab.plots.style import plain_log_scale, series_style
from labutils.measurement.timing import bootstrap_interval, measure_interleaved, paired_ratio
from labutils.quantization.affine import Scheme
from labutils.quantization.packed import pack_model_

transformers_logging.disable_progress_bar()
INT8, INT4 = Scheme(8), Scheme(4, granularity="group", group_size=64)

# %%
model, tokenizer = load_model("lablm")
small = load_model("lablm-small").model
STOP, VOCAB, NEW_TOKENS = (tokenizer.eos_token_id,), model.config.vocab_size, 40


def packed(net, scheme=INT8):
    """A decoder of packed weights. It reads each prompt once, and puts its keys and values back the next time."""
    return Remembering(fast_packed_llama(pack_model_(copy.deepcopy(net), scheme), max_length=1024))


targets = {
    "LabLM float32": Remembering(FastLlama(model, max_length=1024)),
    "LabLM int8": packed(model),
    "LabLM int4": packed(model, INT4),
}
prompts = {kind: text_prompts(kind, tokenizer, 5) for kind in KINDS}
print(f"cpu, threads: {torch.get_num_threads()};", {kind: [p.shape[1] for p in some] for kind, some in prompts.items()})
print(tokenizer.decode(prompts["qa"][1][0, -80:]))

# %% [markdown]
# Four kinds of text stand behind every table of this chapter, and LabLM saw none of it in training. *Code* comes from held-out
# modules. *Chat* is a customer's first question. *Translation* is a sentence to put into Chinese or English. *QA* has a context:
# the conversation holds five questions with their answers, as a FAQ in a prompt does, and the customer asks one of them again.
# The last lines above end such a prompt.

# %% [markdown]
# ## 1 · What do more rows cost?
#
# Decoding reads every weight to make one token. The same weights could serve several rows of input for nearly the same price, if
# only we had several tokens to feed. Speculative decoding lives on that "if", so the first curve to know is
#
# $$t(r, n) = \text{seconds of one step with } r \text{ new tokens after } n \text{ cached ones}$$
#
# **Tiny numbers:** let t(1) be 1 ms and t(4) 1.2 ms. If three guesses out of three are right, a step of 1.2 ms makes four tokens.
#
# **Predict** before you run: with int8 weights, how many times as long as a step of 1 row does a step of 8 rows take?

# %%
my_rows = predict("int8: a step of 8 rows over a step of 1 row", None, unit="times")

# %%
ROWS, some_ids = (1, 2, 4, 8, 16, 32), prompts["code"][0][0].tolist()


def step_of(target, rows, context):
    """A step of `rows` tokens after `context` cached ones, which leaves the cache as it found it."""

    def step():
        if target.length != context:
            target.rewind(target.length)
            target.prefill(torch.tensor([(some_ids * 4)[:context]]))
        target.extend(some_ids[:rows])
        target.rewind(rows)

    return step


def step_times(target, rows=ROWS, context=128, repeats=5, calls=2):
    contest = {r: step_of(target, r, context) for r in rows}
    return measure_interleaved(contest, repeats=repeats, warmup=1, calls_per_sample=calls)


# %%
timings = {name: step_times(target) for name, target in targets.items()}
for name, times in timings.items():
    print(f"{name:<14}", "  ".join(f"{r}: {1e3 * t.median_s:.2f} ms" for r, t in times.items()))
of_eight = paired_ratio(timings["LabLM int8"][8].samples_s, timings["LabLM int8"][1].samples_s)
print(f"int8: 8 rows take {of_eight} as long as 1 (95% interval over 5 rounds)")
my_rows.compare(of_eight.value)

# %% [markdown]
# LabLM is small enough for the caches of many CPUs. Does a model that does not fit behave in the same way? `tiled_model` makes LabLM
# 7 times as wide and shares each weight out among the copies. The result has 0.24 billion parameters, LabLM's logits up to
# rounding, and the memory traffic of a large model, so it accepts drafts about as often as LabLM does.

# %%
from labutils.lab.models.tiled import tiled_model

wide = tiled_model(model)
print(f"{wide.num_parameters() / 1e9:.2f} billion parameters")
large = Remembering(fast_packed_llama(pack_model_(wide, INT8), max_length=512))
timings["0.24B int8"] = step_times(large, rows=(1, 2, 4, 8, 16), calls=1)
by_rows = {name: {r: t.median_s for r, t in times.items()} for name, times in timings.items()}
contexts = (32, 256, 512, 900)
by_context = {n: step_times(targets["LabLM int8"], (1, 8), n) for n in contexts}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for index, (name, times) in enumerate(by_rows.items()):
    left.plot(list(times), [t / times[1] for t in times.values()], label=name, **series_style(index))
left.plot(ROWS, ROWS, color="grey", linestyle=":", label="no sharing: r times")
left.set(xscale="log", xlabel="rows in a step", ylabel="time ÷ time of 1 row")
plain_log_scale(left, "y")
left.set_xticks(ROWS, ROWS)
left.minorticks_off()
left.set_title(f"8 rows of LabLM int8 take {of_eight} as long as 1", fontsize=11)
left.legend()
for index, r in enumerate((1, 8)):
    milliseconds = [1e3 * by_context[n][r].median_s for n in contexts]
    right.plot(contexts, milliseconds, label=f"{r} row{'s' * (r > 1)}", **series_style(index))
right.set(xlabel="cached positions", ylabel="ms a step, LabLM int8", ylim=(0, None))
right.set_title("A step against the length of the cache", fontsize=11)
right.legend()
plt.show()

# %% [markdown]
# *Left: median step time against rows at 128 cached positions, each line divided by its own single row; both axes are logarithmic.
# Right: step time of LabLM int8 against the length of the cache. Interleaved rounds on this machine.*
#
# <details><summary>Explain</summary>
#
# A matrix times one vector waits for the matrix to be read. A matrix times a few vectors reads as much and computes more, so a curve is
# flat as long as the machine waits for memory and follows the dotted slope once it waits for arithmetic. Attention shares nothing:
# each row reads the whole cache again, so a long context tilts the curve. A jump from one row to two is neither: the float32 decoder here goes
# through NumPy and PyTorch, where a single row and several go to different kernels. A kernel that is written for a few rows need not have such a step.
# </details>
#
# Keep this curve in mind, because a step that checks γ guesses has γ + 1 rows.

# %% [markdown]
# ## 2 · One verifier
#
# A *proposer* guesses γ tokens. The target reads them all in one step, and its logits judge them from left to right: row i is what the
# target says *before* guess i.
#
# * **Greedy:** a guess stands while it is the target's own favourite. The first that is not is replaced by that favourite.
# * **Bonus:** if all guesses stand, the last row gives one more token for nothing.
#
# So each step makes at least one token, and always the token that plain decoding would make. A bad proposer costs time but never
# quality. Nobody has to trust the proposer, but everybody has to trust the verifier, and that is where real programs go wrong.

# %% [markdown]
# ## Exercise 10.1: greedy_verify (core)
#
# Write `greedy_verify(target_logits, drafted)`, where `target_logits` is (γ + 1, vocab) and `drafted` a list of γ guesses. Return
# `(accepted, token)`: how many guesses stand, and the target's token after them. 5 lines, 8 minutes, difficulty 1 of 3.
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
from labutils.course.checks import ch10

ch10.greedy_verify(greedy_verify)

# %% [markdown]
# ### Sampling, exactly
#
# At temperature 1 there is no "right" token, only a right *distribution*. Let p be the target's probabilities after temperature and top-p, and
# q those that the guess was drawn from. Keep a guess x with probability $\min(1, p(x)/q(x))$, and replace the first that falls by a draw
# from the residual $\max(p - q, 0)$, normalised. Then x comes out with
#
# $$\underbrace{q(x)\min\!\left(1, \tfrac{p(x)}{q(x)}\right)}_{\min(p,\,q)} + \underbrace{\Bigl(1 - \sum_y \min(p, q)\Bigr)}_{\text{a guess falls}}
# \cdot \frac{\max(p(x) - q(x), 0)}{\sum_y \max(p - q, 0)} = p(x)$$
#
# since $1 - \sum\min(p,q) = \sum\max(p-q,0)$. **Tiny numbers:** with p = (0.5, 0.5) and q = (0.9, 0.1), token 0 is kept 5 times in 9, so
# 0.9 · 5/9 = 0.5 of all tokens are a kept 0, and the rest are 1. A proposer that leaves nothing to chance, such as a copy from the
# prompt, has q = 1 at its token.

# %% [markdown]
# ## Exercise 10.2: sampled_verify (core)
#
# Write `sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms)`: target_probs (γ + 1, vocab), draft_probs (γ, vocab), and
# `uniforms`, γ numbers in [0, 1). Guess i stands while `uniforms[i] < min(1, p / q)`. If `is_drawn` is False, the draft took its favourite,
# and q is 1 at that token and 0 elsewhere. Return `(accepted, next_probs)`, where the next token is drawn from `next_probs` (vocab,).
# 10 lines, 20 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>If not drawn, replace draft_probs by <code>torch.nn.functional.one_hot(torch.tensor(drafted), vocab)</code>; the rest stays the same.</details>
# <details><summary>Hint 2</summary>All stand: <code>target_probs[-1]</code>. Else the residual <code>(p - q).clamp(min=0)</code> of that row, divided by its sum.</details>


# %%
# EXERCISE sampled_verify
def sampled_verify(target_probs, drafted, draft_probs, is_drawn, uniforms):
    """How many guesses stand, and the distribution of the next token."""
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
# ## Exercise 10.3: output_law
#
# Hunt a real bug. In transformers#32867 the assistant *took its likeliest token*, while the acceptance test used min(1, p/q) with the
# assistant's *whole* q, as if the token had been drawn from it. Every text looked fine. Was its distribution the target's?
#
# Write `output_law(target_probs, draft_probs, drawn_from)`, all (vocab,). The guess is drawn from `drawn_from`, judged with q = `draft_probs`,
# and replaced from the normalised residual max(p − q, 0) if it falls. Return the exact distribution of the token that comes out.
# 4 lines, 12 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary>A token comes out as a guess that stands, <code>drawn_from * (p / q).clamp(max=1)</code>, or as a replacement.</details>
# <details><summary>Hint 2</summary>The chance that some guess falls is <code>(drawn_from * (1 - stands)).sum()</code>; it multiplies the residual.</details>


# %%
# EXERCISE output_law
def output_law(target_probs, draft_probs, drawn_from):
    """Guesses that stand, plus what replaces those that fall."""
    ### BEGIN SOLUTION
    stands = (target_probs / draft_probs).clamp(max=1)
    left = (target_probs - draft_probs).clamp(min=0)
    falls = (drawn_from * (1 - stands)).sum()
    return drawn_from * stands + falls * left / left.sum()
    ### END SOLUTION


# %%
# CHECK output_law
from labutils.course.checks import ch10_drafts

ch10_drafts.output_law(output_law)

# %% [markdown]
# ### The proof, by adding up everything
#
# With five tokens we can list every guess, how likely it is, and what comes out. The sum must be p to the last digit, with no dice and no
# confidence interval. The same sum convicts three verifiers that look right, the bug among them.
#
# **Predict:** which tokens does the bug prefer?

# %%
from labutils.decoding.verify import acceptance_probs, residual

p = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05], dtype=torch.float64)
q = torch.tensor([0.10, 0.20, 0.40, 0.10, 0.20], dtype=torch.float64)
favourite = torch.eye(5).double()[q.argmax()]


def law(drawn_from, judged_by, rest=residual):
    """The distribution of the token that comes out, summed over every guess."""
    out = torch.zeros(5).double()
    for token in drawn_from.nonzero().flatten().tolist():
        keep = acceptance_probs(p[None], [token], judged_by[None]).item()
        out[token] += drawn_from[token] * keep
        out += drawn_from[token] * (1 - keep) * rest(p, judged_by)
    return out


# %%
verifiers = {
    "right: drawn from q, judged by q": law(q, q),
    "right: favourite, judged as certain": law(favourite, favourite),
    "favourite, judged by the full q": law(favourite, q),
    "replaced from p, no residual": law(q, q, rest=lambda p, q: p),
    "first guess unverified": q,
}
print(f"{'the target':<36} {p.tolist()}")
for name, out in verifiers.items():
    print(f"{name:<36} {[round(x, 3) for x in out.tolist()]}  total variation {(out - p).abs().sum() / 2:.4f}")

# %% [markdown]
# ### And on real contexts, with controls
#
# The acceptance rate $\alpha = \sum_x \min(p, q)$ can be added up over all 4,096 tokens at each place of a real text. Three controls tell a
# working measurement from an artefact. A draft *equal* to the target must give exactly 1. The target *shifted* by one place must fall
# to chance. A *bad* draft, whose tokens are shuffled, must score lower than a real one.

# %%
from labutils.generation.sampling import Sampler

sampler = Sampler(torch.Generator().manual_seed(0), temperature=0.8, top_p=0.95)
text = torch.cat(prompts["code"][:2], dim=1)[:, :400]
with torch.no_grad():
    laws = {"LabLM": sampler.probs(model(text).logits[0]), "LabLM-small": sampler.probs(small(text).logits[0])}
shuffled = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))
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
# Each further guess counts only if all before it stood, so it is less likely to pay. And it adds a row. The curve of section 1 and the
# acceptance decide together.

# %% [markdown]
# ## Exercise 10.4: best_draft_tokens (core)
#
# If each guess stands with probability α, a step with γ guesses makes $1 + \alpha + \dots + \alpha^\gamma = \frac{1-\alpha^{\gamma+1}}{1-\alpha}$
# tokens (Leviathan et al. 2022, arXiv:2211.17192, equation 1) and takes $t(\gamma+1) + \gamma\,d$ seconds, where $d$ is the time of one guess.
#
# Write `best_draft_tokens(acceptance, step_s, draft_s)`, where `step_s[r - 1]` are the seconds of a step with r rows. Return `(γ, speed-up)`: the γ
# from 0 to `len(step_s) - 1` with the highest speed-up over plain decoding, which takes `step_s[0]` for a token. Of equals, return the
# smallest γ. 5 lines, 12 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>For each γ: <code>sum(acceptance**i for i in range(γ + 1))</code> tokens; a published calculation had α where γ belongs, in the denominator (llama.cpp#3649).</details>
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
from labutils.course.checks import ch10_loop

ch10_loop.best_draft_tokens(best_draft_tokens)

# %%
from labutils.decoding import choosing

curves = {name: choosing.curve_of(times, up_to=max(times)) for name, times in by_rows.items()}
for name, curve in curves.items():
    best = {alpha: choosing.best_draft_tokens(alpha, curve, 0.0) for alpha in (0.3, 0.6, 0.8, 0.95)}
    print(f"{name:<14}", "  ".join(f"α = {a}: γ = {g}, {gain:.2f}x" for a, (g, gain) in best.items()))

# %% [markdown]
# *The best γ and its predicted speed-up for guesses that cost nothing.*
#
# ## 3 · Guesses for nothing
#
# The cheapest proposer owns no weights. Much of what a model writes already stands in its context: a name, an order number, the answer from
# the FAQ, the line of code above. **Prompt lookup** finds the last few tokens earlier in the text and proposes what followed them there
# (Saxena 2023).
#
# **Predict:** on which of our four kinds of text does it help most, and on which least?

# %% [markdown]
# ## Exercise 10.5: prompt_lookup (core)
#
# Write `prompt_lookup(token_ids, count, longest)`. Take the longest suffix, of at most `longest` tokens and at least 1, that occurs earlier in
# the list with something behind it. If it occurs several times, take the most recent. Return at most `count` tokens that followed it, cut at the
# list's end, and `[]` without a match. 6 lines, 12 minutes, difficulty 2 of 3.
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
# The exercise's version searches the whole text at every step. The course's own keeps an index as the text grows, so a guess takes
# microseconds. It has two relatives. A **corpus n-gram** looks at counted training text instead of the prompt: which token came
# most often after these four? A **suffix automaton** finds the longest repeated suffix of *any* length, in constant time a token.

# %%
from labutils.lab.models.calibration_text import calibration_batches

counted = torch.cat(calibration_batches(tokenizer, code=80, dialogues=80)).tolist()
free = {
    "prompt lookup": PromptLookup(),
    "corpus n-gram": CorpusNgram(counted, vocab_size=VOCAB, shortest=2),
    "suffix automaton": SuffixAutomaton(),
}
print(f"counted: {sum(map(len, counted)):,} tokens of training text")


def speculate(target, proposer, kind, draft_tokens, texts=5):
    """Each prompt of a kind; the proposer has read the prompt before the clock starts."""
    runs = []
    for prompt in prompts[kind][:texts]:
        proposer.propose(prompt[0].tolist(), 1)
        made = generate_speculative(target, proposer, prompt, NEW_TOKENS, draft_tokens=draft_tokens, stop=STOP)
        runs.append(made)
    return runs


# %%
def acceptance(pairs):
    """α of pairs (accepted, judged)."""
    return sum(accepted for accepted, _ in pairs) / max(sum(judged for _, judged in pairs), 1)


def tokens_made(runs):
    return sum(step.made for run in runs for step in run.steps)


def seconds_a_guess(runs):
    return sum(run.draft_s for run in runs) / max(sum(run.drafted for run in runs), 1)


def described(runs, alone):
    """Acceptance with its 95% interval over prompts, tokens a step, time of a guess, texts equal to plain decoding's."""
    pairs = [(run.accepted, run.judged) for run in runs]
    low, high = bootstrap_interval(pairs, statistic=acceptance)
    same = sum(torch.equal(run.token_ids, other.token_ids) for run, other in zip(runs, alone, strict=True))
    per_step = tokens_made(runs) / max(sum(run.target_steps for run in runs), 1)
    share = f"{acceptance(pairs):.2f} [{low:.2f}, {high:.2f}] of {sum(judged for _, judged in pairs):>3}"
    return f"{share:<25} {per_step:>5.2f} {1e6 * seconds_a_guess(runs):>8.0f} µs   {same}/{len(runs)}"


# %%
HEADER = f"{'proposer':<26} {'text':<12} {'acceptance, judged':<25} tokens/step  a guess  same text"
target = targets["LabLM int8"]
plain = {kind: speculate(target, NoDraft(), kind, 0) for kind in KINDS}
found = {}  # (proposer, kind): its runs
print(HEADER)
for name, proposer in free.items():
    for kind in KINDS:
        found[name, kind] = speculate(target, proposer, kind, 5)
        print(f"{name:<26} {kind:<12} {described(found[name, kind], plain[kind])}")

# %% [markdown]
# *LabLM int8, greedy, five prompts of each kind, up to 40 new tokens, at most 5 guesses a step. "Judged" leaves out guesses behind the
# first that fell.*
#
# "Same text" is the point. The C kernels give a row the same bits alone and among others, so greedy output is equal to the last token. In NumPy
# and PyTorch, which our float32 decoder uses here, a product of several rows may round differently from one of a single row, and a near-tie can
# then fall the other way. The
# next cell counts the texts that differ in float32, with the gap between the two best logits at the first difference.

# %%
float_target, ties = targets["LabLM float32"], []
for kind in ("code", "qa"):
    pairs = zip(
        speculate(float_target, NoDraft(), kind, 0), speculate(float_target, PromptLookup(), kind, 5), strict=True
    )
    for one, other in ((a.token_ids[0], b.token_ids[0]) for a, b in pairs):
        if not torch.equal(one, other):
            at = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            with torch.no_grad():
                best = model(one[None, :at]).logits[0, -1].topk(2).values
            ties.append((kind, at, (best[0] - best[1]).item()))
print(f"float32: {len(ties)} of 10 texts differ; top-2 gap at the first difference: {ties}")
if ties:
    print("near-ties, below 0.001" if max(gap for *_, gap in ties) < 1e-3 else "a gap above 0.001: look for a bug")

# %% [markdown]
# ### A loop with a real bug
#
# This loop has the bug of aprender PR#2014. It writes wrong text, and hardly a guess is accepted. The target has a `length`,
# `extend(token_ids)`, which reads tokens and returns the logits after each, and `rewind(count)`.

# %%
from labutils.course.checks.ch10_loop import ToyDraft, ToyTarget, toy_next


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
# ## Exercise 10.6: repaired_loop
#
# Hunt the bug. Write `repaired_loop` with the same arguments. It returns the target's own text and reads no token twice. 1 line changes, 10
# minutes, difficulty 2 of 3.
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
# Where nothing can be copied, the proposer must be able to write, and a small model can. Its price is $c$, the seconds of one drafted
# token over the seconds of one plain step. With acceptance $\alpha$ and $\gamma$ drafted tokens (Leviathan et al. 2022, arXiv:2211.17192),
#
# $$\text{speed-up} = \frac{1 + \alpha + \dots + \alpha^\gamma}{t(\gamma + 1)/t(1) + \gamma c}$$
#
# **Tiny numbers:** let α = 0.8, γ = 2, c = 0.5, and let a step of 3 rows cost no more than one. The speed-up is 2.44 ÷ 2 = 1.22. At half
# the price of the target a draft is expensive.

# %% [markdown]
# In LabLM-small the output layer is a large part of the weights: 4,096 rows for as many tokens. A draft may leave rare tokens out, because
# the target corrects it. FR-Spec (Zhao et al. 2025, arXiv:2502.14856) keeps the tokens that training text uses most.
#
# **Predict:** keep the 1,024 most frequent of 4,096 tokens. Which share of the running text do they cover?

# %%
from labutils.decoding.drafts import TrimmedTarget, frequent_tokens, trim_head

sizes = {name: net.num_parameters() for name, net in (("LabLM", model), ("LabLM-small", small))}
head_share = VOCAB * small.config.hidden_size / sizes["LabLM-small"]
print(
    f"LabLM-small has {sizes['LabLM-small'] / sizes['LabLM']:.0%} of LabLM's weights, {head_share:.0%} of them its output layer"
)
for keep in (256, 512, 1024, 2048):
    kept = frequent_tokens(counted, vocab_size=VOCAB, count=keep)
    covered = {kind: torch.isin(torch.cat(some, dim=1), kept).float().mean() for kind, some in prompts.items()}
    weights = 1 - (1 - keep / VOCAB) * head_share
    print(f"{keep:>5} tokens: {weights:.0%} of the weights;", {kind: f"{share:.0%}" for kind, share in covered.items()})

# %% [markdown]
# ## Exercise 10.7: trimmed_probs (core)
#
# Write `trimmed_probs(hidden, head, counts, keep)`: the draft's probabilities over *all* tokens when its head keeps the `keep` tokens with the
# highest `counts`. hidden is (width,), head (vocab, width), counts (vocab,); return (vocab,). 4 lines, 8 minutes, difficulty 2 of 3.
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
ch10_drafts.trimmed_probs(trimmed_probs)

# %% [markdown]
# The zeros keep the text exact: a token that the draft cannot draw has q = 0, so all of its p lies in the residual.
#
# Now three drafts meet one verifier: LabLM-small in int8, the same with 2,048 tokens, and LabLM's own weights in int4 (*self-speculation*
# with a cheaper copy).
#
# **Predict:** which draft is accepted most often, and which one costs least?

# %%
kept = frequent_tokens(counted, vocab_size=VOCAB, count=2048)
trimmed = TrimmedTarget(packed(trim_head(small, kept)), kept, vocab_size=VOCAB)
models = {
    "LabLM-small": ModelDraft(packed(small)),
    "LabLM-small, 2,048 tokens": ModelDraft(trimmed),
    "LabLM int4": ModelDraft(targets["LabLM int4"]),
}
print(HEADER)
for name, proposer in models.items():
    for kind in KINDS:
        found[name, kind] = speculate(target, proposer, kind, 3)
        print(f"{name:<26} {kind:<12} {described(found[name, kind], plain[kind])}")
alone = [run for kind in KINDS for run in plain[kind]]
step_s = {"LabLM int8": sum(run.target_s for run in alone) / tokens_made(alone), "0.24B int8": by_rows["0.24B int8"][1]}
for name in models:
    guess_s = statistics.median(seconds_a_guess(found[name, kind]) for kind in KINDS)
    print(f"{name:<26}", {target_name: f"c = {guess_s / seconds:.2f}" for target_name, seconds in step_s.items()})

# %% [markdown]
# *Greedy, γ = 3, the same prompts.* The last lines divide the seconds of one drafted token by those of a step of each target: first
# LabLM, then the tiled 0.24B model. A real
# 0.24B model would know more than LabLM and agree less often with so small a draft: the tiled model combines the cost of a large target with the
# acceptance of a small one.
#
# <details><summary>What does trimming cost?</summary>A draft can only be right where the target's next token is among the kept ones, so the share
# of running text that they cover, printed above, limits its acceptance. FR-Spec trims vocabularies of 128,000 tokens, most of which hardly
# occur; LabLM has 4,096 in all. Compare c of the first two drafts as well: did fewer rows buy time here? Set <code>count=1024</code> and see.</details>
#
# How many tokens should a draft guess? The formula answers with what you have measured: α, c and the curve of section 1.

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
draft = "LabLM-small, 2,048 tokens"
for panel, target_name in zip(panels, ("LabLM int8", "0.24B int8"), strict=True):
    best = {}
    for index, kind in enumerate(KINDS):
        alpha = acceptance([(run.accepted, run.judged) for run in found[draft, kind]])
        guess_s, curve = seconds_a_guess(found[draft, kind]), curves[target_name][:9]
        gains = [choosing.predicted_speedup(alpha, count, curve, guess_s) for count in range(9)]
        best[kind] = gains.index(max(gains))
        panel.plot(range(9), gains, label=kind, **series_style(index))
    panel.axhline(1, color="grey", linestyle=":")
    panel.set(xlabel="drafted tokens a step, γ", ylabel="predicted, times plain decoding")
    panel.set_title(f"{target_name}: best γ {', '.join(f'{kind} {n}' for kind, n in best.items())}", fontsize=10)
panels[0].legend()
plt.show()

# %% [markdown]
# *Predicted speed-up of LabLM-small with 2,048 tokens against γ, from measured acceptance, cost and steps; the dotted line is plain decoding.*
# A best γ holds for one text, one draft and one machine: see the titles. Section 12 checks the prediction by the clock.
#
# Other tools have a γ as well. In `transformers` it is `num_assistant_tokens`, and it is read from the *assistant's* `generation_config`: the
# same argument to `generate(…, assistant_model=…)` changes nothing. Set it there before you compare.

# %% [markdown]
# ## 5 · A head that looks ahead
#
# A draft model reads the whole text anew, although the target has just read it: the target's last hidden state $h_i$ knows the text. A small
# block on top of it can guess the token *after* the next, once it is told which token $t_{i+1}$ the target has chosen:
#
# $$h'_{i+1} = h_i + W_{down}\,\mathrm{swiglu}\bigl(W\,[h_i;\ e(t_{i+1})]\bigr), \qquad \text{logits} = E\,h'_{i+1}$$
#
# Fed with its own answer, it goes on. This is the plainest of a family: Hydra (arXiv:2402.05109), EAGLE (arXiv:2401.15077) and the MTP modules
# of DeepSeek-V3 (arXiv:2412.19437), the latter two with attention inside. Ours was trained on the course's own text
# (`python -m labutils train mtp`, see data/MODEL_CARD.md) with a loss from chapter 05, KL from LabLM, two places ahead.
#
# **Predict:** will the head be accepted more often than LabLM-small, or less?

# %%
from labutils.decoding.heads import LookAheadDraft
from labutils.lab.models.draft_heads import load_head

head, shared = load_head("mtp", model), pack_model_(copy.deepcopy(model), INT8)
ahead = LookAheadDraft(target, head, shared)
millions = sum(w.numel() for w in head.parameters()) / 1e6
print(f"{millions:.2f}M weights in the head, {sizes['LabLM-small'] / 1e6:.2f}M in LabLM-small")
print(HEADER)
for kind in KINDS:
    found["look-ahead head", kind] = speculate(target, ahead, kind, 2)
    print(f"{'look-ahead head':<26} {kind:<12} {described(found['look-ahead head', kind], plain[kind])}")

# %% [markdown]
# *The same prompts, γ = 2, greedy.* The head needs no cache and reads no prompt. Compare its acceptance with LabLM-small's, text by text.
# Without attention it cannot look back for a name that stands further up, and it was trained for minutes. DeepSeek reports 85 to 90% for the
# second token of a module that was trained along with the model.
#
# ### Trees against chains
#
# Where the head is unsure, its second choice may be right. A **tree** puts both into one step: each node attends to the text, to its ancestors
# and to itself (SpecInfer, arXiv:2305.09781).
#
# **Tiny numbers:** with parents (−1, 0, 0, 1), node 3 sees 0, 1 and 3, but not its uncle 2. Its position is the text's end plus 2, its depth.

# %% [markdown]
# ## Exercise 10.8: tree_mask
#
# Write `tree_mask(parents)`: a list, −1 for node 0, else an earlier node. Return a bool tensor (nodes, nodes), True where the row's node may
# attend to the column's. 5 lines, 10 minutes, difficulty 2 of 3.
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
# arXiv:2406.16858). With one branch allowed, this grows a chain. Tree and chain then cost the same number of steps of the head and the same
# number of rows of the target.
#
# **Predict:** at 6 drafted rows, on which text does the tree gain most, and does the chain ever win?

# %%
from labutils.decoding.trees import generate_tree, likeliest_tree

grown = {
    "plain": likeliest_tree(head, model, nodes=0, branches=1),
    "chain": likeliest_tree(head, model, nodes=6, branches=1),
    "tree": likeliest_tree(head, model, nodes=6, branches=3),
}
print(f"{'text':<13}{'shape':<7}{'tokens a step':>14}{'tokens/s':>10}  same text")
for kind in KINDS:
    references = None
    for shape, grow in grown.items():
        made = [generate_tree(model, grow, prompt, 16, STOP) for prompt in prompts[kind][:2]]
        references = references or made
        per_step = tokens_made(made) / max(sum(run.target_steps for run in made), 1)
        rate = tokens_made(made) / sum(run.draft_s + run.target_s for run in made)
        same = sum(torch.equal(a.token_ids, b.token_ids) for a, b in zip(made, references, strict=True))
        print(f"{kind:<13}{shape:<7}{per_step:>14.2f}{rate:>10.0f}  {same}/2")

# %% [markdown]
# *LabLM in float32 through `transformers`, 6 drafted rows, 2 prompts of each kind, greedy, one run.* A wrong first token kills a whole chain but only
# one branch of a tree, so the tree can only gain where the first guess often fails. Where the draft is nearly always right, the tree spends rows on
# second choices that nobody needs, and the chain reaches deeper. Compare both columns: Python grows the tree, and more tokens a step are
# not yet more tokens a second.

# %% [markdown]
# ## 6 · Early exit: ask before the last layer
#
# Every layer's output has the width of the last one, so the final norm and the output layer can read it too. A token can leave
# after any layer:
#
# $$\text{logits}_\ell = E\,M_\ell\,\bigl(g_\ell \odot h_\ell / \mathrm{rms}(h_\ell)\bigr)$$
#
# E is the output matrix. An *untrained* exit takes the final norm's gain for $g_\ell$ and the identity for $M_\ell$. As a draft it
# needs no weights of its own, for its layers are the target's first: *self-speculation* (LayerSkip, arXiv:2404.16710).
# LayerSkip's README reports an acceptance of 0.019 for a 1.5B model that was never trained to leave early, which took it from
# 45 tokens a second down to 14.
#
# LabLM also has *trained* exits: $g_\ell$ and $M_\ell$ learnt LabLM's own final distribution for a few minutes while the rest of
# LabLM stayed as it was (`data/MODEL_CARD.md`).
#
# **Predict:** LabLM has six layers. How often does an untrained exit after the third layer name the model's favourite token, and how
# often does a trained one?

# %%
import math

from labutils.decoding import early_exit
from labutils.decoding.early_exit import AdaptiveDecoder, ExitHeads, adaptive_logits, exit_model
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.lab.plots.quality_share import draw_quality

model.requires_grad_(False)
heads, untrained, depth = load_head("exit", model), ExitHeads(model), model.config.num_hidden_layers
documents = held_out_documents(limit_bytes=3000)


def rows_of(documents, length):
    """The first `length` tokens of each document that has so many."""
    encoded = (tokenizer(d.text, add_special_tokens=False, verbose=False).input_ids for d in documents)
    return torch.tensor([[tokenizer.bos_token_id, *ids[: length - 1]] for ids in encoded if len(ids) >= length - 1])


texts = rows_of(documents[:8], 128)
with torch.no_grad():
    whole = model(texts, output_hidden_states=True)
favourites = whole.logits.argmax(-1)

# %%
print(f"{texts.numel()} places in {len(texts)} held-out modules: the exit's favourite is the model's favourite")
agreement = {}
for layers in range(1, depth):
    for name, exits in (("untrained", untrained), ("trained", heads)):
        guessed = model.lm_head(exits(whole.hidden_states[layers], layers)).argmax(-1)
        agreement[name, layers] = (guessed == favourites).float().mean().item()
    row = "   ".join(f"{name} {agreement[name, layers]:.3f}" for name in ("untrained", "trained"))
    print(f"after {layers} of {depth} layers: {row}")

# %% [markdown]
# As a draft, an exit is an ordinary model of few layers, so the fast decoder of chapter 01 runs it, and this chapter's verifier makes the
# text LabLM's own.
#
# **Predict:** which exit is accepted most often, and which one costs least?

# %%
print(f"a trained exit adds {sum(p.numel() for p in heads.parameters()) // (depth - 1):,} numbers")
exits = {}
for name, chosen, layers in (("untrained", untrained, 2), ("trained", heads, 1), ("trained", heads, 2)):
    draft = packed(exit_model(model, layers=layers, heads=chosen))
    exits[f"{name} exit, {layers} layer{'s' * (layers > 1)}"] = ModelDraft(draft)
    price = draft.decoder.weight_bytes / target.decoder.weight_bytes
    print(f"{name}, {layers} of {depth} layers: a drafted token reads {price:.0%} of the bytes that LabLM reads")
print(HEADER)
for name, proposer in exits.items():
    for kind in ("code", "qa"):
        found[name, kind] = speculate(target, proposer, kind, 3)
        print(f"{name:<26} {kind:<12} {described(found[name, kind], plain[kind])}")

# %% [markdown]
# An exit after one of six layers costs a sixth of the layers *and the whole output layer*. Put its price and its acceptance into section
# 4's formula before you read section 12. LabLM has few layers, so each of them matters; LayerSkip trains a deep model from the start so that
# its early layers can answer.

# %% [markdown]
# ### Leave when you are sure
#
# CALM (arXiv:2207.07061) lets a token leave for good after the first layer that is sure enough. It measures confidence by the lead of the
# best token over the second (softmax margin), or by how little the layer turned the hidden state (saturation). Nothing verifies
# the token, so this trades quality for time.
#
# In every layer, a later token attends to the keys and values of all earlier ones, and a token that left early has none above its exit.
# CALM's **state propagation** computes them from the hidden state that the token left with.
#
# **Tiny numbers:** with margins of 0.2, 0.9 and 0.4 after layers 1 to 3 of 4 and a threshold of 0.8, a token runs 2 layers.

# %% [markdown]
# ## Exercise 10.9: exit_depths
#
# Write `exit_depths(confidence, threshold)`, where `confidence` (tokens, layers − 1) was measured after every layer but the last. A token
# leaves at the first confidence at or above the threshold. Return how many layers each token runs, (tokens,). 2 lines, 8 minutes,
# difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>.int().argmax(dim=1)</code> finds the first True of a row. What does it say of a row without any?</details>
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
from labutils.course.checks import ch10_cache

ch10_cache.exit_depths(exit_depths)

# %% [markdown]
# **Predict:** when half of the layers run, is it better that each token chooses its own depth than that all run the same? And is it
# better than the same depths dealt out at random?

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
exit_curves = {
    "margin": margins,
    "saturation": turns,
    "fixed depth": [point(early_exit.by_depth(torch.full_like(texts, layers))) for layers in (2, 3, 4, 5)],
    "the margin's depths, at random": [point(early_exit.by_depth(depths)) for depths in dealt],
}
for name, points in exit_curves.items():
    print(name, *(f"   {share:.0%} of the layers: {quality}" for share, quality, *_ in points), sep="\n")
against_chance = [
    paired_quality(ours[3], chance[3]) for ours, chance in zip(*list(exit_curves.values())[::3], strict=True)
]
print("the margin against its own depths at random", *(f"   {quality}" for quality in against_chance), sep="\n")

# %%
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
draw_quality(ax, {name: [p[:2] for p in points] for name, points in exit_curves.items()}, share_of="layers that ran")
low, high = (-bound for bound in reversed(against_chance[0].interval))
gain = f"saves {low:.3f} to {high:.3f} bits per byte over chance" if low > 0 else "is not surely better than chance"
ax.set_title(f"At {margins[0][0]:.0%} of the layers, choosing by margin {gain}", fontsize=11)
plt.show()

# %% [markdown]
# *Bits per byte lost on the first 128 tokens of each module against the share of layers that ran, with 95% intervals over modules;
# the random control has exactly the margin's depths.* Bits per byte fall with the length of the text, for a model knows little at its
# beginning: compare only values of equal length. Now the clock, for a margin costs an output layer at every exit it asks.

# %%
layer_weights = sum(p.numel() for p in model.model.layers[0].parameters())
print(f"an output layer has {model.lm_head.weight.numel() / layer_weights:.2f} times the weights of a layer")
leaves = {
    "all layers": early_exit.by_saturation(2.0),
    "margin 0.25": early_exit.by_margin(model, 0.25),
    "saturation 0.95": early_exit.by_saturation(0.95),
    "2 layers": early_exit.by_depth(torch.tensor([[2]])),
}


def decode_known(leave, ids=texts[:1, :56]):
    """Feeds 16 known tokens behind 40 of a prompt."""
    decoder = AdaptiveDecoder(model, heads, leave)
    decoder.prefill(ids[:, :40])
    for token in ids[0, 40:].split(1):
        decoder.decode_one_token(token)
    return sum(decoder.depths) / len(decoder.depths)


ran = {}
contest = {n: lambda n=n: ran.update({n: decode_known(leaves[n])}) for n in leaves}
left_early = measure_interleaved(contest, repeats=5, warmup=1)
for name in leaves:
    ratio = paired_ratio(left_early["all layers"].samples_s, left_early[name].samples_s)
    print(f"{name:<15} {ran[name]:.1f} layers a token, {ratio} as fast as all layers")
print(left_early["all layers"])

# %% [markdown]
# <details><summary>Explanation</summary>
# The fixed depth of two layers shows what leaving can save when nothing has to be asked. The margin reads the whole output layer after
# every layer. Compare the weights printed above: unless most tokens leave at once, asking can cost more than leaving saves.
# Saturation asks for almost nothing; see above whether it knows more than a fixed depth. A batch has a harder problem still:
# its rows leave at different depths, and the slowest decides.
# </details>

# %% [markdown]
# ## 7 · The cache that stays small
#
# Each step reads all weights once, and all keys and values once. From which length on does the cache weigh as much as the weights?
#
# $$n^* = \frac{\text{weight bytes read a step}}{\text{KV bytes a position}}$$
#
# **Tiny numbers:** 12 MB of weights and 3 kB a position make 4,000 positions. LabLM is near that, far beyond the 1,024 positions it
# was trained for, so nothing in this section can make LabLM itself faster. It shows what a smaller cache costs in quality.
#
# The sizes come from the papers: Llama 3 arXiv:2407.21783, Qwen3 arXiv:2505.09388, gpt-oss arXiv:2508.10925 (every second layer sees only
# 128 positions, so only half of the layers grow) and DeepSeek-V3 arXiv:2412.19437 (one latent vector of 512 numbers, and 64 rotary
# ones, for all heads). A mixture of experts reads its active parameters only.
#
# **Predict:** in which of them does the cache weigh as much as the weights first?

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
# Those are one stream's numbers. A batch of 32 reads the weights once and 32 caches, so the crossover comes 32 times earlier, and a
# server feels it first. There are two kinds of remedy:
#
# * **Evict:** keep few positions, for good. *Sinks and window* (StreamingLLM) keeps the first four and the newest, *heavy
#   hitters* (H2O) what got most attention so far, and *SnapKV* what the prompt's last queries looked at.
# * **Select:** keep all positions and read few. *Quest* bounds each page of keys, and *DSA* scores each position with a cheap indexer.

# %% [markdown]
# ## Exercise 10.10: kept_positions
#
# A text has `length` tokens, and its cache holds at most `budget` positions: the first `sinks` and the newest. Write
# `kept_positions(length, sinks, budget)`, which returns the positions that stay, ascending. 3 lines, 6 minutes, difficulty 1 of 3.
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
# **A bug to hunt.** An engine (Mikyx-1/TinyLLM, PR #18) skipped its causal mask whenever a cache was given, also for a prompt of many tokens. That is right
# for one new token and wrong for several, and a verifier reads several. The rule below has the same bug once something is cached. Write `visible(cached, new)`
# without it. Return a boolean (new, cached + new), True where a new query sees a key. 1 line, 8 minutes, difficulty 2 of 3.
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
# The first 512 tokens of six held-out modules are the prompts, read in full. Then each policy has its budget, and the next 24 tokens are
# read one by one. First comes the proof that the machinery changes nothing while it keeps everything.

# %%
from labutils.decoding import small_cache
from labutils.decoding.small_cache import SmallCache, decode

PROMPT, NEW = 512, 24
long_texts = rows_of(held_out_documents(limit_bytes=5_000), PROMPT + NEW)[:6]


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
print(
    f"{len(long_texts)} texts, {NEW} tokens behind {PROMPT}; everything kept ({share:.0%}): {spent:.4f} bits per byte"
)
print(f"largest difference from the model's own logits: {(logits - reference).abs().max():.1e}")

# %% [markdown]
# **Predict:** put the policies in order, the random control among them.


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


kept_at, surely = {name: [] for name in policies(1)}, []
for budget in (96, 240):
    control = None
    for name, policy in policies(budget).items():
        share, bits, _, cache = after_prompt(budget=budget, **policy)
        control = control or bits
        kept_at[name].append((share, paired_quality(bits, everything)))
        print(f"{name:<24} {share:>4.0%} read, {cache.resident_bytes / 1e6:>5.1f} MB: {kept_at[name][-1][1]}")
        if bits is not control:
            low, high = paired_quality(bits, control).interval
            print(f"{'':<24} against the control [{low:+.4f}, {high:+.4f}]")
            surely += [f"{name} at {share:.0%}"] * (low > 0 or high < 0)

# %%
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
draw_quality(ax, kept_at, share_of="positions read", apart=0.5)
ax.set_title(f"Told apart from the control at random: {', '.join(surely) or 'no policy here'}", fontsize=11)
plt.show()

# %% [markdown]
# *Bits per byte lost against the share of positions that a step reads, with paired 95% intervals over modules; points of one share stand
# a little apart.* Read the lines "against the control": where the interval contains 0, nothing shows that the policy chose better
# than chance. Much of what helps in
# code is near, and the control keeps what is near, too.
#
# Now a text where what helps is far away: 96 tokens of a module, 400 of another, then the first module begins again.
#
# **Predict:** which policies still find what they have to copy when 96 of 528 positions are kept or read?

# %%
again = torch.cat([long_texts[:, :96], long_texts.roll(1, 0)[:, 96:496], long_texts[:, 1:65]], dim=1)
copying = reader(again, 528)
_, with_all, *_ = copying(budget=None)
spent = sum(bits for bits, _ in with_all) / sum(size for _, size in with_all)
print(f"everything kept: {spent:.3f} bits per byte of the 64 tokens that are copied")
for name, policy in policies(96, prompt=528).items():
    _, bits, *_ = copying(budget=96, **policy)
    print(f"{name:<24} {paired_quality(bits, with_all)}")

# %% [markdown]
# <details><summary>Explanation</summary>
# A window forgets whatever lies outside it, however much it will be needed. H2O and SnapKV keep what was looked at in time, but earlier
# tokens need not have looked at what a later token will want to copy. Quest and the index choose anew for every token, so they can
# still find what nothing wanted before; they save reading but no memory. Look at the signs: a reader that skips what does not matter can
# even predict better than one that reads everything. All keys keep the rotary angle of their first position.
# </details>

# %% [markdown]
# ## 8 · Grammars: what may come next
#
# A model can say anything, but a program may need one of 63 names, or JSON. So we compile the pattern of the answer into an automaton over
# *bytes* and walk every token through it from every state, once (Willard and Louf 2023, Outlines, arXiv:2307.09702; XGrammar,
# arXiv:2411.15100, precomputes most of it for grammars that nest). During decoding, the logits of tokens that lead nowhere become −∞.
#
# **Tiny numbers:** `ab|aé|c` has a start, a state after "a", one in the middle of "é" (two bytes), and an end. Token "ab" leads from
# the start to the end, and token "ac" leads nowhere.
#
# **Predict:** in the middle of an answer that must be one of 63 names, how many of LabLM's 4,096 tokens are allowed on average?

# %%
my_allowed = predict("tokens of 4,096 that may come next within one of 63 names", None)

# %%
import json
import re
import time

from labutils.decoding.automaton import compile_pattern
from labutils.decoding.grammar import GrammarDraft, GrammarTarget, choice, compile_grammar, json_object, token_bytes
from labutils.lab.data import service
from labutils.lab.models.tokenizer import chat_ids, text_ids

END, ANSWER = (tokenizer.convert_tokens_to_ids(name) for name in ("<|end|>", "<|assistant|>"))
NAMES, TOKENS = list(service.intents()), token_bytes(tokenizer)

automaton = compile_pattern("ab|aé|c")
for text in ("", "a", "aé", "ac"):
    print(
        f"after {text!r:5} state {automaton.walk(text.encode())}, may end: {bool(automaton.accepting[automaton.walk(text.encode())])}"
    )
print("after half of é: state", automaton.walk("aé".encode()[:2]))

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
my_allowed.compare(grammars["intent"].allowed[:-1].sum(1).float().mean().item())
print("after 'change':", [TOKENS[t].decode() for t in grammars["intent"].allowed[after].nonzero().flatten()])

# %% [markdown]
# <details><summary>What you see</summary>Few tokens are allowed, and often only one text can follow, so a grammar can also draft. The
# course's tests compare these tables with <code>xgrammar</code>'s masks on random walks, with tokens that end inside a Chinese character
# among them.</details>

# %% [markdown]
# ## Exercise 10.12: token_mask (core)
#
# Write `token_mask(next_state, tokens, state)`, where `next_state[s]` is a dict from byte to state and `tokens` a list of `bytes`. Return a list
# of booleans that says of each token whether its bytes, one after the other, all lead on from `state`. A token without bytes is special and not
# allowed. 8 lines, 8 minutes, difficulty 2 of 3.
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
from labutils.course.checks import ch10_grammar

ch10_grammar.token_mask(token_mask)

# %% [markdown]
# ### Forced text is a free draft
#
# Where a state has one way on and may not end, the next byte is certain, and perhaps the one after it as well. The model need not be asked for
# `{"intent": "`. SGLang inserts such text unseen ("jump forward"). But what is forced is a *text*, and a model may cut it into other
# tokens: `{` and `"`, or `{"`, and the last piece may contain what follows. So we only *draft* it and let the verifier decide, with logits
# masked along the drafted path. The result is then exactly what masked decoding writes token by token.

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
# Now customers ask. LabLM was trained to name intents and has never written JSON. There are three ways to get `{"intent": …, "urgent": …}`
# from it: masked, so that any tokens may write the text; masked to the *usual* tokens, those that the tokenizer cuts forced text into
# (llguidance does so); and with the forced text drafted as well.
#
# **Predict:** every finished masked answer is valid JSON. How many name the right intent? And how many target steps does an answer need once
# forced text is drafted?

# %%
from labutils.decoding.grammar import with_usual_tokens

fast = FastLlama(model, max_length=1024, matvec=targets["LabLM float32"].decoder.matvec)
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
    print(f"{way}: {len(results[way])} customers, different intents named: {len(said)}")
first = results["JSON, any tokens"][0][1]
print("cut as the model likes:", [TOKENS[t].decode(errors="replace") for t in first[:12]], "…")
by_code = json.dumps(
    {"intent": results["intent, forced drafts"][0][0], "urgent": "urgent" in ITEMS[0].messages[-2]["content"]}
)
print(f"the intent asked for as trained, the JSON written by code: {by_code}")

# %% [markdown]
# <details><summary>What the masks did and did not do</summary>They guarantee the <em>form</em>, for every finished masked answer parses, but they add
# no sense. Training never put an intent inside JSON: count how many different intents LabLM names there. Asked as it was trained, it names the
# intent, and a line of code writes the JSON. Where it may cut forced text as it likes, it writes pieces that it has never seen side by side, and
# needs more tokens for an answer of the same form. Compare the rows above.</details>

# %% [markdown]
# ### What masking does to the distribution
#
# Masking token by token is *not* the model's distribution among the allowed answers. With names $c = c_1 c_2 \dots$,
#
# $$p(c \mid \text{allowed}) = \frac{\prod_i p(c_i \mid c_{<i})}{\sum_{c'} \prod_i p(c'_i \mid c'_{<i})}, \qquad
# q(c) = \prod_i \frac{p(c_i \mid c_{<i})}{\sum_{t \text{ allowed after } c_{<i}} p(t \mid c_{<i})}$$
#
# The left one divides once. The right one divides at every step, and so forgives a first token whose continuations the model itself finds
# unlikely. **Tiny numbers:** the first token is A with 0.75 or B with 0.25. After A the only allowed second token has 0.1, after B 1.0. Masking
# gives A 0.75. The model's own opinion is 0.075 against 0.25, which makes 0.23 for A.

# %% [markdown]
# ## Exercise 10.14: masked_and_conditioned (core)
#
# Texts have two tokens. `first` (vocab,) holds the first token's probabilities, `second` (vocab, vocab) the second's after each first, and
# `allowed` (vocab, vocab) says which texts may be written. Write `masked_and_conditioned(first, second, allowed)`, which returns two tables
# (vocab, vocab): masked step by step, and the model's own opinion among the allowed. 5 lines, 10 minutes, difficulty 2 of 3.
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
# The next cell computes LabLM's opinion of all 63 names exactly, both ways (each name in its usual tokens). It does so for customers whose intent
# is asked for as in training, and for the same customers without the system message, where LabLM wants to *answer* them.
#
# **Predict:** in which of the two does masking distort more?

# %%
from labutils.decoding.grammar import masked_choice_log_probs
from labutils.distillation.classifiers import choice_step_log_probs
from labutils.lab.models.intents import intent_token_ids

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


changed = compared("with the system message", [item.messages[:-1] for item in ITEMS[:8]])
changed += compared("without it", [item.messages[-2:-1] for item in ITEMS[:8]])

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
# The article that this course began with lists "prompt engineering" among its techniques. It can be measured: each prompt token costs time
# until the first token (TTFT), each answer token costs a step, and both must buy something.
#
# $$T = \text{TTFT}(n_\text{prompt}) + (n_\text{answer} - 1)\, t_\text{step}$$
#
# **Predict:** does TTFT grow faster or slower than the prompt? From 32 tokens to 512 the prompt becomes 16 times as long.

# %%
my_growth = predict("time to first token: a prompt of 512 tokens over one of 32", None, unit="times")

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
growth = paired_ratio(taken["ours 512"].samples_s, taken["ours 32"].samples_s)
print(f"ours: 512 tokens take {growth} as long as 32")
my_growth.compare(growth.value)
print(f"float32, batch 1, cpu, threads: {torch.get_num_threads()}, median of 5 interleaved rounds")

# %% [markdown]
# What do prompt tokens buy? LabLM names an intent when the system message says "Name the intent.", because it was *trained* to: the
# prompt is a switch, and the knowledge is in the weights. Without the message the task must come from examples in the conversation. All
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
# <details><summary>How to read it</summary>Fine-tuning has moved the instruction into the weights, and a few tokens call it. Examples are read
# again for every customer unless a prefix cache keeps them, and LabLM was never trained on several customers in one chat: compare the
# rows with examples with the row of nothing. For a large model make the same comparison, paired and with the cost beside it.</details>

# %%
query = ITEMS[0]
SAID = {
    "intent name": query.messages[-1]["content"],
    "JSON": json.dumps({"intent": query.messages[-1]["content"], "urgent": False}),
    "sentence": service.evaluation_set(service.ANSWER, "test", 1, seed=10)[0].messages[-1]["content"],
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
# Greedy decoding should give the same text every time. On a server it often does not, although nothing random is left (vLLM's issues #5898,
# #9567 and #11658 report it at temperature 0). Sums are rounded, so their order matters, and a kernel chooses its order by the
# *shape* it gets, which depends on how many customers share the batch.
#
# **Predict:** in what share of the logits does some bit change when seven other rows join?

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

codes = (tokenizer(d.text, return_tensors="pt").input_ids[0] for d in held_out_documents(limit_bytes=600))
batch = torch.stack([ids[:40] for ids in codes if len(ids) >= 40][:8])


def decoded(net, ids, new=5):
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
bf16 = copy.deepcopy(model).to(torch.bfloat16)
for dtype, net in {"bfloat16": bf16, "float32": model}.items():
    for cure in ("none", "row by row"):
        alone, together, took = alone_and_together(net, RowByRow() if cure != "none" else None)
        differ = (alone[:, :2] != together[:, :2]).float().mean()  # later steps may read other tokens
        other_text = (alone.argmax(-1) != together.argmax(-1)).any(1).sum()
        print(
            f"{dtype:<9} cure: {cure:<11} {differ:.0%} of the first two steps' logits differ in some bit, "
            f"{other_text} of {len(batch)} greedy texts; {1e3 * took:.0f} ms for the batch (one run)"
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
# Larger systems use the same cure at a better price: one fixed split, whatever the batch (He et al. 2025, `batch_invariant_ops`; SGLang and
# vLLM have such a mode). It gives up some speed where rows are few.

# %% [markdown]
# ## Exercise 10.15: row_sums (a bug to hunt)
#
# This kernel sums rows in bfloat16 on eight workers, and its answers change when other rows join. Find the reason and write `row_sums`
# without it: the bits of a row's sum must not depend on the batch, and all eight workers must stay in use. 1 line changes, 8 minutes,
# difficulty 2 of 3.
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
# | MTP: a head trained with the model drafts one more token | second token accepted 85 to 90%, 1.8 times the tokens per second | DeepSeek-V3, arXiv:2412.19437 | 1 |
# | EAGLE-3: a draft layer reads the target's hidden states | H100, batch 1: 373 tokens/s against 158; 1.38 times the throughput at batch 64 | arXiv:2503.01840 and its repository | 2 |
# | the same, independently on an A100 | 3.02 times, 5.71 tokens a step | hemingkx/Spec-Bench | 3 |
# | DFlash: a diffusion model drafts a whole block at once | up to 6.17 times, lossless, Qwen3-8B | arXiv:2602.06036 | 4 |
# | linear hybrids: three layers of linear attention to one full | 75% less KV, 6 times the decode speed at a million tokens | Kimi Linear, arXiv:2510.26692 | 5 |
# | sparse attention: an indexer picks 2,048 tokens | MMLU-Pro 85.0 with and without | DeepSeek-V3.2 (DSA) | 6 |
# | disaggregation: prefill and decode on different machines, mixed with the usual way where that is better | the KV travels: 144 KiB a token for Qwen3-4B (36 layers, 8 heads of 128, 16 bits) | TaiChi, arXiv:2508.01989 | 7 |
#
# Diffusion language models go further and write many tokens at a time without a target to verify them. They are not lossless, so compare
# them on quality and speed together.

# %% [markdown]
# Answer with a pencil before you run the cell below.
#
# 1. How many tokens a step does α = 0.85 to 0.90 give with one drafted token? What must a step cost for a speed-up of 1.8?
# 2. EAGLE-3 speeds one stream up by 373 ÷ 158. If both rows were one model on one machine, which share of the gain would be left at batch 64?
# 3. EAGLE-3 makes 5.71 tokens a step and is 3.02 times as fast. How many plain steps does one speculative step cost?
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
    f"5. {1 / 4:.0%} of the KV is left: at most {4} times as fast to read, so the rest of 6 comes from elsewhere, such as larger batches"
)
print(f"6. {128_000 / 2048:.1f} keys for each one")
kv_bytes = 2 * 36 * 8 * 128 * 2
print(
    f"7. {kv_bytes / 1024:.0f} KiB × 5,000 tokens/s = {kv_bytes * 5000 / 1e9:.2f} GB/s; 10 Gbit Ethernet has {10 / 8:.2f} GB/s"
)

# %% [markdown]
# <details><summary>What the numbers say together</summary>(1) MTP's step costs little more than a plain one, because the head is small beside the model. (2, 3) A gain for one
# stream shrinks in a batch, where rows are no longer cheap. (4) A block draft changes the formula: γ c becomes c, so the limits are α and the
# price of verifying. (5, 6) Hybrids and sparse attention change the model, not the decoder, and pay where the context is long. (7) A
# link faster than that ships the KV sooner than this prefill computes it.</details>

# %% [markdown]
# ## 12 · One table
#
# The chapter's proposers meet again on the same texts, with the same verifier, in interleaved rounds. The **predicted** speed-up comes from the
# acceptance, the step curve of section 1 and the measured cost of a guess, by the formula of exercise 10.4. The **measured** one comes from
# the clock. The formula takes every guess as equally likely to stand, and it leaves out the verifier's own work in Python between two
# steps: compare the two columns. (Trees and forced text have their own tables in sections 5 and 8.)
#
# **Predict:** does a proposer that owns a model beat those that own nothing, and on which text? How fast is the best on QA?

# %%
my_best = predict("LabLM int8 on QA: the fastest proposer over plain decoding", None, unit="times")

# %%
TABLE = {  # proposer, γ
    "prompt lookup": (free["prompt lookup"], 5),
    "corpus n-gram": (free["corpus n-gram"], 3),
    "suffix automaton": (free["suffix automaton"], 5),
    "LabLM-small, 2,048 tokens": (models["LabLM-small, 2,048 tokens"], 2),
    "LabLM int4": (models["LabLM int4"], 2),
    "look-ahead head": (ahead, 2),
    "trained exit, 1 layer": (exits["trained exit, 1 layer"], 2),
}


def contest_of(target, contestants, kinds, texts):
    """Five interleaved rounds: runs of the last one, and seconds of each. What runs here has run before, and is warm."""
    contest = {"plain": (NoDraft(), 0)} | contestants
    runs, seconds = {}, {(name, kind): [] for kind in kinds for name in contest}
    for _ in range(5):
        for name, kind in seconds:
            proposer, count = contest[name]
            runs[name, kind] = done = speculate(target, proposer, kind, count, texts)
            seconds[name, kind].append(sum(run.draft_s + run.target_s for run in done))
    return runs, seconds


runs, seconds = contest_of(target, TABLE, KINDS, texts=2)


# %%
def table(contestants, runs, seconds, curve):
    """Prints predicted and measured speed-ups; returns the measured ones."""
    speedups = {}
    for name, kind in (key for key in seconds if key[0] != "plain"):
        done, alone = runs[name, kind], runs["plain", kind]
        alpha, steps = acceptance([(run.accepted, run.judged) for run in done]), sum(run.target_steps for run in done)
        count = min(round(sum(run.drafted for run in done) / max(steps, 1)), contestants[name][1])
        guess = choosing.predicted_speedup(alpha, count, curve, seconds_a_guess(done))
        speedups[name, kind] = paired_ratio(seconds["plain", kind], seconds[name, kind])
        same = all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(alone, done, strict=True))
        print(
            f"{name:<26} {kind:<12} {contestants[name][1]:>2} {alpha:>6.2f} {tokens_made(done) / max(steps, 1):>7.2f} "
            f"{guess:>10.2f}x   {speedups[name, kind]}{'' if same else '  TEXT DIFFERS'}"
        )
    return speedups


TITLES = f"{'proposer':<26} {'text':<12}  γ      α  tokens/step  predicted  measured"
print(f"LabLM int8, cpu, threads: {torch.get_num_threads()}\n{TITLES}")
speedups = table(TABLE, runs, seconds, curves["LabLM int8"])
best = {kind: max(TABLE, key=lambda name, kind=kind: speedups[name, kind].value) for kind in KINDS}
print({kind: f"{name}, {speedups[name, kind]}" for kind, name in best.items()})
my_best.compare(speedups[best["qa"], "qa"].value)

# %%
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
for index, name in enumerate(TABLE):
    gains = [speedups[name, kind] for kind in KINDS]
    places = [place + 0.1 * (index - 3) for place in range(len(KINDS))]
    values = [gain.value for gain in gains]
    spread = [[abs(gain.value - gain.low) for gain in gains], [abs(gain.high - gain.value) for gain in gains]]
    style = series_style(index)
    axes.errorbar(places, values, yerr=spread, fmt=style["marker"], color=style["color"], label=name, capsize=2)
axes.axhline(1, color="grey", linestyle=":")
axes.set(xticks=range(len(KINDS)), xticklabels=KINDS, ylabel="times plain decoding's speed")
sure = [f"{name} on {kind}" for kind, name in best.items() if speedups[name, kind].low > 1]
axes.set_title(f"Surely faster than plain decoding: {', '.join(sure) or 'none here'}", fontsize=10)
axes.legend(fontsize=8, ncols=2)
plt.show()

# %% [markdown]
# *Measured speed-up over plain decoding of LabLM int8, after the prompt has been read. Bars are 95% intervals over 5 paired rounds, two prompts of
# each kind; the title names the fastest proposer of each text if its interval lies above 1.*
#
# <details><summary>Explain</summary>
#
# A draft that owns a model must run it once for each guess. If one guess costs a share c < 1 of a target step, even perfect guesses gain at most
# 1 / c. A guess for nothing is free to make and not to check: it is one more row of the step, beside the verifier's own work. Is there one here that is right more often than not and
# loses all the same? Long repeats finish whole answers in a few steps. Where a text repeats little, the best choice may be to draft nothing.
# </details>
#
# ### The same drafts for a large target
#
# **Predict:** the 0.24B target accepts the same guesses and its step is many times as long. Which proposers gain from that?

# %%
few = ("suffix automaton", "LabLM-small, 2,048 tokens", "LabLM int4")
large_table = {name: TABLE[name] for name in few} | {"look-ahead head": (LookAheadDraft(large, head, shared), 2)}
large_runs, large_seconds = contest_of(large, large_table, ("chat", "qa"), texts=1)
print(f"0.24B int8, cpu, threads: {torch.get_num_threads()}\n{TITLES}")
large_speedups = table(large_table, large_runs, large_seconds, curves["0.24B int8"])

# %% [markdown]
# *One prompt of each kind, 5 paired rounds. `python -m labutils bench decoding` measures more prompts, all kinds, and transformers and llama.cpp
# beside them.*
#
# ### And with several customers?
#
# So far there was one stream. With a batch of b streams a step has b (γ + 1) rows, and other people's tokens already take the rows that were
# cheap. `generate_speculative_batch` checks the guesses of all streams in one step, on the paged decoder of chapter 11: the tokens of all
# streams pass through the matrices together, and each attends to its own stream.
#
# **Predict:** at 8 streams, what is left of the suffix automaton's gain on QA?

# %%
my_gain = predict("8 streams on QA: with the suffix automaton over without", None, unit="times")

# %%
from labutils.course.bench.decoding_ways import predicted_at
from labutils.lab.models.served import paged_llama
from labutils.serving.speculate import generate_speculative_batch

COUNT, some_qa = 3, [ids[0].tolist() for ids in text_prompts("qa", tokenizer, 8)]
many = paged_llama(shared, positions=8 * 320)
done = runs["suffix automaton", "qa"]
alpha, guess_s = acceptance([(run.accepted, run.judged) for run in done]), seconds_a_guess(done)


def batch_of(streams, make, draft_tokens):
    proposers = [make() for _ in range(streams)]
    return generate_speculative_batch(many, proposers, some_qa[:streams], 24, draft_tokens=draft_tokens, stop=STOP)


# %%
for streams in (1, 4, 8):
    rounds = [(batch_of(streams, NoDraft, 0), batch_of(streams, SuffixAutomaton, COUNT)) for _ in range(5)]
    gain = paired_ratio(*([made[side].tokens_per_s for made in rounds] for side in (1, 0)))
    predicted = predicted_at(streams, alpha, COUNT, curves["LabLM int8"], guess_s)
    (alone, drafted), step_s = rounds[-1], curves["LabLM int8"]
    longer = paired_ratio(*([made[side].seconds / made[side].steps for made in rounds] for side in (1, 0)))
    print(
        f"streams {streams}, γ = {COUNT}: predicted {predicted:.2f}x, measured {gain}, same texts: {alone.new_ids == drafted.new_ids}"
    )
    print(
        f"    {drafted.steps} steps for {alone.steps}; {drafted.accepted} of {drafted.drafted} guesses stood;", end=" "
    )
    print(
        f"a step takes {longer} as long, by the curve {step_s[streams * (COUNT + 1) - 1] / step_s[streams - 1]:.2f}x;",
        end=" ",
    )
    print(f"a plain step {1e3 * alone.seconds / alone.steps:.1f} ms, by the curve {1e3 * step_s[streams - 1]:.1f} ms")
my_gain.compare(gain.value)

# %% [markdown]
# *Five interleaved rounds, 24 tokens behind each prompt; γ is the same for all. The prediction takes α from section 12 and the price of more
# rows from section 1's curve, which one stream has drawn.*
#
# <details><summary>Explain</summary>
#
# By the curve, a plain step of 8 streams has 8 rows already, 24 more cost nearly in proportion, and little of the gain is left, or nothing. What a plain step
# takes beyond the curve (last column) goes to bookkeeping in Python and to attention over each stream's own text. Drafts add the bookkeeping of
# their check and share the rest among more tokens, so they may gain less than the curve foretells, or more: compare one stream with eight.
# Whether a busy server should draft is a question to its own step, not to a rule.
# </details>

# %% [markdown]
# ## 13 · Points for the ledger
#
# Each record has one speed and one quality. All lossless proposers have their target's quality, because their text is the same, so on the
# speed-quality plot speculation never moves a point down: only to the right, or to the left where guessing costs more than it saves. The
# speeds are those of section 12.

# %%
from labutils.measurement import ledger

baseline_documents = held_out_documents(limit_bytes=600)
baseline = bits_by_document(model, tokenizer, baseline_documents)
quality = paired_quality(bits_by_document(shared, tokenizer, baseline_documents), baseline)
records = []
for name in ("plain", "suffix automaton", "look-ahead head"):
    made = tokens_made(runs[name, "qa"])
    record = ledger.Record(
        technique=f"int8, {name}", model="lablm", device="cpu", dtype="int8", threads=torch.get_num_threads(),
        prompt_tokens=prompts["qa"][0].shape[1], output_tokens=NEW_TOKENS, samples=[made / s for s in seconds[name, "qa"]],
        bits_per_byte=quality.bits_per_byte, baseline_bits_per_byte=quality.baseline_bits_per_byte,
        quality_tokens=sum(len(tokenizer(d.text)["input_ids"]) for d in baseline_documents), chapter="10",
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
# *Tokens per second on the QA texts after the first token (5 rounds) against bits per byte of held-out code, the first 600 bytes of each
# module.*
#
# ## What you have
#
# - the curve of step time against rows, which decides how far to guess;
# - one verifier, greedy and sampled, proved by adding up everything that can happen, with controls;
# - proposers that cost nothing, a smaller model, a head, an early exit and a grammar, each with its acceptance, its price and the text on which it pays;
# - caches that stay small and exits that come early, which do change the text, with their price in bits;
# - the reason why output changes with the batch, and a cure with its price.
#
# **Open question:** your service answers customers from a long FAQ on a GPU that serves 64 streams at once during the day and one at night. Where
# would you speculate, with which proposer, and which two numbers would you log every hour to know when to stop?
#
# Next: **11 · Serving many**.

# %%
calibration()

# %%
from labutils.course.progress import progress

progress()

# %% [markdown]
# # 05 · Knowledge distillation
#
# **Goal:** train a student that is truly smaller and truly faster than its teacher, and say with an interval how much of
# its quality comes from the teacher.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 02; 04 helps |
# | Time | 3 hours for you; all cells run in about 4 minutes on one core (measured: 252 s, the core shared, the build included) |
# | Memory, download | 2 GB at the peak; nothing is downloaded |
# | Hardware | any computer |
# | Exercises | 8, each checked in the cell below it; those marked *core* fit into one session of two hours |

# %%
import copy
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy, softmax
from transformers.utils import logging as transformers_logging

from labutils.course.predictions import calibration, predict
from labutils.lab.models.calibration_text import calibration_batches
from labutils.lab.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.lab.models.load import load_model
from labutils.lab.plots import distillation as plots
from labutils.lab.plots.style import series_style

transformers_logging.disable_progress_bar()

# %%
wisdom = load_model("lablm")
teacher, tokenizer = wisdom
documents = held_out_documents(limit_bytes=600)
baseline = bits_by_document(teacher, tokenizer, documents)


def quality_of(model):
    return paired_quality(bits_by_document(model, tokenizer, documents), baseline)


measured_bytes = sum(len(d.text.encode()) for d in documents)
print(f"{len(documents)} held-out modules to measure on, {measured_bytes:,} bytes; cpu, float32", end=", ")
print(f"threads: {torch.get_num_threads()}")
print(
    f"the teacher, LabLM: {teacher.num_parameters():,} parameters, {quality_of(teacher).bits_per_byte:.4f} bits per byte"
)

# %% [markdown]
# ## 1 · Fix the article: a loss that praises any confident answer
#
# The article mixes K teachers $f_k$ with weights $p_{yk}$ and trains with
#
# $$p_y = \sum_k p_{yk} f_k(x), \qquad L = -\sum_y p_y \log p_y$$
#
# That is the *entropy* of the model's own answer. Neither a label nor a teacher is its target.
#
# **Tiny numbers:** a fair coin costs ln 2 = 0.69; "surely heads" costs 0; "surely tails" costs 0 as well.
#
# **Predict:** we let 200 random answers follow this loss downhill. How often will they end at the teacher's favourite?

# %%
from labutils.distillation.divergences import article_loss
from labutils.lab.training.losses import forward_kl

text = tokenizer(documents[0].text, return_tensors="pt").input_ids[:, :201]
with torch.no_grad():
    wise = teacher(text).logits[0, :-1]
favourites, truth = wise.argmax(-1), text[0, 1:]


def trained(loss, steps=150):
    """Free logits for 200 positions, from the same random start, by gradient descent on a loss."""
    student = torch.randn(wise.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(student).mean().backward()
        optimizer.step()
    return student.detach()


# %%
answers = {
    "the article's loss": trained(article_loss),
    "KL from the teacher": trained(lambda student: forward_kl(student, wise)),
}
for name, student in answers.items():
    agree = (student.argmax(-1) == favourites).float().mean()
    right = (student.argmax(-1) == truth).float().mean()
    print(
        f"{name}: entropy {article_loss(student).mean():.3f} nats, agrees with the teacher {agree:.0%}, right {right:.0%}"
    )
print(
    f"the teacher itself: entropy {article_loss(wise).mean():.3f} nats, right {(favourites == truth).float().mean():.0%}"
)

# %% [markdown]
# The article's loss falls to nothing and the answers are certain, and wrong: whichever token chance put first has won. A
# loss must say *whose* answer is wanted. Hinton, Vinyals and Dean (2015, arXiv:1503.02531) take the teacher's:
#
# $$\mathrm{KL}(p_T \Vert p_S) = \sum_y p_T(y)\,\bigl(\ln p_T(y) - \ln p_S(y)\bigr)$$
#
# It is zero exactly when both agree. **Tiny numbers:** teacher (¾, ¼), student (½, ½):
# ¾ ln 1.5 + ¼ ln 0.5 = 0.304 − 0.173 = 0.131.

# %% [markdown]
# ## Exercise 5.1: soft_loss (core)
#
# Write `soft_loss(student_logits, teacher_logits)`: both (positions, vocab); return KL(teacher ‖ student) in nats, the mean over positions,
# as a tensor of one number through which the student can be trained. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>torch.log_softmax(…, dim=-1)</code> of both; the weights are the teacher's probabilities, its <code>.exp()</code>.</details>
# <details><summary>Hint 2</summary>Sum over the vocabulary, <code>.sum(-1)</code>, then <code>.mean()</code> over the positions.</details>


# %%
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    """KL(teacher ‖ student), mean over positions."""
    ### BEGIN SOLUTION
    student = torch.log_softmax(student_logits, dim=-1)
    wanted = torch.log_softmax(teacher_logits, dim=-1)
    return (wanted.exp() * (wanted - student)).sum(-1).mean()
    ### END SOLUTION


# %%
# CHECK soft_loss
from labutils.course.checks import ch05, ch05_stored

ch05.soft_loss(soft_loss)

# %% [markdown]
# ## 2 · Dark knowledge
#
# A label says one token. A teacher says which *wrong* tokens are nearly right. Hinton called this dark knowledge, and held that most
# of what a model has learnt lies there. Here is what LabLM really predicts: a customer's intent (of 63, each by its whole name), and the next
# token at three positions.
#
# **Predict:** a customer says "Something is wrong with my order." Which intents could that be?

# %%
from labutils.lab.data import service
from labutils.lab.models.intents import intent_opinion

CONTEXTS = {
    "a customer, cut off": "<|user|>Could you please",
    "code, a name": "<|endoftext|>import os\n\n\ndef read_lines(path):\n    with open(",
    "code, a keyword": "<|endoftext|>def f(x):\n    if x is None:\n        ",
}
NAMES = list(service.intents())
unclear = (
    {"role": "system", "content": "Name the intent."},
    {"role": "user", "content": "Something is wrong with my order."},
)


def opinion(prompt):
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        return teacher(ids).logits[0, -1]


# %%
opinions = {name: opinion(prompt) for name, prompt in CONTEXTS.items()}
views = {"a customer's intent": (intent_opinion(wisdom, unclear), NAMES.__getitem__)}
views |= {name: (logits, lambda i: repr(tokenizer.decode([i]))) for name, logits in opinions.items()}
figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
elsewhere = {}
for panel, (name, (logits, name_of)) in zip(panels, views.items(), strict=True):
    probs, ids = softmax(logits, dim=-1).topk(6)
    names, elsewhere[name] = [name_of(int(i)) for i in ids], 1 - probs[0].item()
    plots.draw_opinion(panel, names, probs.tolist(), right=names[0], title=f"{name}: {elsewhere[name]:.0%} on others")
figure.suptitle(f"The teacher is least sure at “{max(elsewhere, key=elsewhere.get)}”")
plt.show()

# %% [markdown]
# *LabLM's six likeliest answers at four positions (favourite hatched); the share in each title is what it gives to all others.* Where the favourite takes nearly everything, the rest is invisible, and so is what it could teach.
# **Temperature** makes it visible: divide the logits by T before the softmax.

# %% [markdown]
# ## Exercise 5.2: soften (core)
#
# Write `soften(logits, temperature)`: probabilities of the last axis at that temperature. 1 line, 3 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>T → ∞ must give equal probabilities. Which operation on the logits does that?</details>
# <details><summary>Hint 2</summary>Divide before the softmax, not after it: only then do the results still sum to 1.</details>


# %%
# EXERCISE soften
def soften(logits, temperature):
    """softmax(z / T)."""
    ### BEGIN SOLUTION
    return torch.softmax(logits / temperature, dim=-1)
    ### END SOLUTION


# %%
# CHECK soften
ch05.soften(soften)

# %% [markdown]
# Move the slider: at which temperature do you first see more than three alternatives to the teacher's favourite? Without a
# slider, `print(opinion_at(tokenizer, logits, 4.0))` says the same in words, and the figure below shows three temperatures.

# %%
from labutils.lab.widgets.distillation import opinion_at, temperature_widget

temperature_widget(tokenizer, opinions["code, a keyword"])

# %%
print(opinion_at(tokenizer, opinions["code, a keyword"], 4.0, count=5))
figure, panels = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
for panel, temperature in zip(panels, (1.0, 1.5, 3.0), strict=True):
    probs, ids = softmax(views["a customer's intent"][0] / temperature, dim=-1).topk(6)
    names = [NAMES[int(i)] for i in ids]
    title = f"T = {temperature:g}: {1 - probs[0].item():.0%} on others"
    plots.draw_opinion(panel, names, probs.tolist(), right=names[0], title=title)
    panel.set_xlim(0, 1.1 * probs[0].item())
plt.show()

# %% [markdown]
# *The opinion of the customer's intent at three temperatures (each panel has its own scale): the order never changes, the favourite's
# lead shrinks.* Among thousands of tokens a high temperature gives most of the mass to what means nothing, so T is a choice, not a
# number to raise for ever.

# %% [markdown]
# ## 3 · Why T²?
#
# By a student's logit, the gradient of the KL at temperature T is
#
# $$\frac{\partial}{\partial z_S} \mathrm{KL} = \frac{1}{T}\,\bigl(p_S^{(T)} - p_T^{(T)}\bigr) \approx
# \frac{1}{T^2}\,\frac{z_S - z_T}{V} \quad\text{for large } T$$
#
# (V tokens, centred logits). One 1/T comes from dividing the student's logits, the other from both distributions moving
# closer. Without a factor T² the soft part would fade against the hard one whenever T is raised.
#
# $$L = \lambda\,T^2\,\mathrm{KL}\bigl(p_T^{(T)} \Vert p_S^{(T)}\bigr) + (1-\lambda)\,\mathrm{CE}(y, p_S^{(1)})$$
#
# **Predict:** from T = 4 to T = 16, how much does the gradient's norm change with T², and without?

# %%
my_fading = predict("norm of the gradient without T²: at T = 4 over at T = 16", None, unit="times")

# %%
from labutils.distillation.divergences import at_temperature

small, _ = load_model("lablm-small")
with torch.no_grad():
    pupil = small(text).logits[0, :-1]


def gradient_norm(loss):
    student = pupil.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(student).mean(), student)
    return gradient.norm().item()


TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0)
with_factor = {t: gradient_norm(lambda s, t=t: at_temperature(forward_kl, t)(s, wise)) for t in TEMPERATURES}
norms = {"with T²": with_factor, "without": {t: n / t**2 for t, n in with_factor.items()}}
norms["hard labels"] = dict.fromkeys(TEMPERATURES, gradient_norm(lambda s: cross_entropy(s, truth, reduction="none")))

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
plots.draw_gradients(axes, norms)
change = {name: {t: line[t] / line[16.0] for t in (1.0, 4.0)} for name, line in norms.items()}
axes.set_title(
    f"From T = 4 to 16 the gradient shrinks {change['with T²'][4.0]:.1f} times with T², {change['without'][4.0]:.0f} times without"
)
plt.show()
print({name: f"T = 1 to 16: {ratio[1.0]:.1f}" for name, ratio in change.items()})
my_fading.compare(change["without"][4.0])

# %% [markdown]
# *Norm of the loss's gradient by the logits of LabLM-small on 200 tokens of held-out code, LabLM the teacher; both axes
# logarithmic.* Where T is large the line with T² is level, as derived. Near T = 1 it falls as well: the approximation is for large T. On the
# level part T changes *what* is taught, and λ how much.

# %% [markdown]
# ## Exercise 5.3: hinton_loss (core)
#
# Write `hinton_loss(student_logits, teacher_logits, labels, temperature, soft)`: λ = `soft` weighs T² · KL (mean over positions), 1 − λ
# the cross-entropy with `labels` (positions,). 4 lines, 10 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Both sides are divided by T in the soft part; neither in the hard part.</details>
# <details><summary>Hint 2</summary><code>torch.nn.functional.cross_entropy(student_logits, labels)</code> is the hard part; 5.1 on divided logits the soft one.</details>


# %%
# EXERCISE hinton_loss
def hinton_loss(student_logits, teacher_logits, labels, temperature, soft):
    """λ T² KL + (1 − λ) CE."""
    ### BEGIN SOLUTION
    student = torch.log_softmax(student_logits / temperature, dim=-1)
    wanted = torch.log_softmax(teacher_logits / temperature, dim=-1)
    kd = temperature**2 * (wanted.exp() * (wanted - student)).sum(-1).mean()
    return soft * kd + (1 - soft) * torch.nn.functional.cross_entropy(student_logits, labels)
    ### END SOLUTION


# %%
# CHECK hinton_loss
ch05.hinton_loss(hinton_loss)

# %% [markdown]
# ## 4 · Which way round?
#
# A student too small to copy its teacher must choose its mistakes, and the divergence chooses for it.
#
# | divergence | punishes most | the student |
# | --- | --- | --- |
# | forward KL(T ‖ S) | silence where the teacher speaks | covers every mode |
# | reverse KL(S ‖ T) | speech where the teacher is silent | picks one mode |
# | Jensen-Shannon | either, but never above ln 2 | may do either: it has several minima |
# | total variation | either, by the share of mass | what a draft model needs (section 13) |
#
# **Tiny numbers** for Jensen-Shannon: (¾, ¼) and (½, ½) have the mixture (0.625, 0.375), and JS = 0.033.
#
# **Predict:** a teacher with two bells, a student that can only be one bell. Where does each divergence put it?

# %%
from labutils.distillation.divergences import DIVERGENCES

tokens = torch.arange(32.0)
two_bells = torch.logaddexp(-((tokens - 8) ** 2) / 8, -((tokens - 24) ** 2) / 8 - 0.69)


def one_bell(divergence, start, steps=1500):
    """The loss, centre, width and probabilities of the bell that descent reaches from a centre."""
    shape = torch.tensor([start, 1.0], requires_grad=True)  # centre, ln width
    optimizer = torch.optim.Adam([shape], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        bell = -((tokens - shape[0]) ** 2) / (2 * shape[1].exp() ** 2)
        loss = divergence(bell, two_bells)
        loss.backward()
        optimizer.step()
    return loss.item(), shape[0].item(), shape[1].exp().item(), softmax(bell.detach(), dim=-1)


bells = {}
for name in ("forward KL", "reverse KL", "Jensen-Shannon"):
    ends = [one_bell(DIVERGENCES[name], start) for start in (8.0, 16.0, 24.0)]
    bells[name] = min(ends, key=lambda end: end[0])[-1]
    minima = (f"{loss:.3f} nats at centre {centre:.1f}, width {width:.1f}" for loss, centre, width, _ in ends)
    print(f"{name:<15}", "; ".join(minima))

# %%
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
plots.draw_modes(axes, softmax(two_bells, dim=-1), bells)
in_valley = {name: bell[13:20].sum().item() for name, bell in bells.items()}
axes.set_title(
    f"Mass where the teacher has almost none: forward {in_valley['forward KL']:.0%}, reverse {in_valley['reverse KL']:.0%}"
)
plt.show()

# %% [markdown]
# *A two-mode teacher over 32 tokens and, by each divergence, the best of the bells reached from three starts.* Where a
# divergence ends in several places, their losses say which of these were traps. Forward KL's trap is a bell that grows so wide that it says nothing;
# the others' is the smaller of the teacher's bells, or a place between the two. For one next token, forward KL is the
# usual choice: it keeps the student's probabilities honest. For whole texts that the student writes by itself, reverse KL
# avoids what the teacher would never say (MiniLLM, Gu et al. 2023, arXiv:2306.08543).

# %% [markdown]
# ## Exercise 5.4: jensen_shannon (core)
#
# Write `jensen_shannon(student_probs, teacher_probs)`: probabilities (positions, vocab), none zero; return (positions,), in nats:
# ½ KL(teacher ‖ m) + ½ KL(student ‖ m) with m the mean of both. 3 lines, 7 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Build m first; both KLs compare with it.</details>
# <details><summary>Hint 2</summary><code>(p * (p / m).log()).sum(-1)</code> is one KL.</details>


# %%
# EXERCISE jensen_shannon
def jensen_shannon(student_probs, teacher_probs):
    """½ KL(T ‖ m) + ½ KL(S ‖ m)."""
    ### BEGIN SOLUTION
    m = (student_probs + teacher_probs) / 2
    kls = [(p * (p / m).log()).sum(-1) for p in (teacher_probs, student_probs)]
    return sum(kls) / 2
    ### END SOLUTION


# %%
# CHECK jensen_shannon
ch05.jensen_shannon(jensen_shannon)

# %% [markdown]
# ## 5 · Store the teacher
#
# A teacher that answers anew for every student costs more than the student. Its answers can be stored once, if they are
# small. In float16, all logits of a vocabulary V take 2V bytes a token; the k likeliest tokens take 6k (an int32 and a
# float16 each).
#
# But the k likeliest alone, rescaled to sum to 1, say that nothing else exists. Two cures: one **bucket** for the rest, or k
# tokens **drawn** from the teacher, each worth 1/k, which are right on average (Anshumann et al. 2025, arXiv:2503.16870). We compare
# them at equal storage, 3 and 96 tokens a position, drawn once; and beside them a teacher that is asked anew at each step.
#
# **Predict:** at the 20 positions where the teacher is least sure, how much will a student trained on its 3 favourites, rescaled, leave for
# all other tokens?

# %%
my_rest = predict("percent left to all others by a student of the 3 favourites, rescaled", None, unit="%")

# %%
from labutils.distillation.cache import stored_bytes
from labutils.distillation.sparse import drawn, sparse_cross_entropy, top_k

for vocab, model_name in ((4096, "LabLM"), (128_256, "Llama 3")):
    whole, few = 2 * vocab * 10**9 / 1e12, stored_bytes(10**9, k=32) / 1e12
    print(f"{model_name}: a billion tokens take {whole:.1f} TB in full, {few:.2f} TB as the 32 likeliest")

unsure = wise[article_loss(wise).topk(20).indices]  # the 20 positions where the teacher is least sure
three, coin = top_k(unsure, 3), torch.Generator().manual_seed(0)


# %%
def trained_on(targets, steps=200):
    student = torch.zeros(20, wise.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sparse_cross_entropy(student, targets()).mean().backward()
        optimizer.step()
    return softmax(student.detach(), dim=-1)


true = softmax(unsure, dim=-1)
print(f"{'the teacher':<24} leaves {1 - true.gather(1, three.ids).sum(1).mean():.1%} to all but its three favourites")
stored = {"3, rescaled": three.rescaled(), "3, with a bucket": three, "3 drawn": drawn(unsure, 3, generator=coin)}
stored |= {"96, with a bucket": top_k(unsure, 96), "96 drawn": drawn(unsure, 96, generator=coin)}
cures = {name: lambda targets=targets: targets for name, targets in stored.items()}
cures["96 drawn at every step"] = lambda: drawn(unsure, 96, generator=coin)
for name, targets in cures.items():
    probs = trained_on(targets)
    rest = 1 - probs.gather(1, three.ids).sum(1).mean()
    print(f"{name:<24} leaves {rest:.1%}; distance from the teacher {(probs - true).abs().sum(1).mean() / 2:.3f}")
    if name == "3, rescaled":
        my_rest.compare(100 * rest.item())

# %% [markdown]
# **Explain.** The distance is the total variation, 0 for a copy and 1 for nothing in common. The bucket gets the *mass* of the rest right and
# cannot know how it is spread. Tokens drawn *once* say, like rescaling, that all others do not exist. Draws are right only on average:
# over steps that draw anew, or over many similar positions whose weights are shared. These free logits share nothing, so this cell
# shows the draws' lack of bias (its last line) and not what they are worth in a real training.

# %% [markdown]
# ## Exercise 5.5: bucket_loss
#
# Write `bucket_loss(student_logits, ids, probs)`: student_logits (positions, vocab); ids and probs (positions, k), the teacher's likeliest
# tokens, **not** rescaled. Return (positions,): −Σ p_T ln p_S over the stored tokens and the rest of both sides as one more.
# 5 lines, 10 minutes, difficulty 3 of 3.
#
# <details><summary>Hint 1</summary><code>log_softmax</code> over the whole vocabulary first, then <code>.gather(-1, ids)</code>.</details>
# <details><summary>Hint 2</summary>The teacher's rest is <code>1 - probs.sum(-1)</code>; the student's rest is 1 minus its own probabilities at ids. It enters like a token.</details>


# %%
# EXERCISE bucket_loss
def bucket_loss(student_logits, ids, probs):
    """Cross-entropy over k tokens and a bucket."""
    ### BEGIN SOLUTION
    stored = torch.log_softmax(student_logits, dim=-1).gather(-1, ids)
    teachers_rest = 1 - probs.sum(-1)
    students_rest = 1 - stored.exp().sum(-1)
    return -(probs * stored).sum(-1) - teachers_rest * students_rest.log()
    ### END SOLUTION


# %%
# CHECK bucket_loss
ch05_stored.bucket_loss(bucket_loss)

# %% [markdown]
# On disk the store is a folder; a batch's file is named by its own ids, so order does not matter, and a killed run loses one
# batch at most. The size is said *before* the teacher is asked, and refused where the disk is too small.

# %%
from labutils.distillation.cache import TeacherCache

lesson = calibration_batches(tokenizer, code=4, dialogues=4, context=128, batch=8, seed=5)[0]
with tempfile.TemporaryDirectory() as folder:
    store = TeacherCache(Path(folder), teacher, k=32, tokens=lesson[:, 1:].numel())
    print(f"announced {store.announced_bytes / 1e3:.1f} kB", end=", ")
    store(lesson)
    print(f"used {store.used_bytes / 1e3:.1f} kB for {lesson[:, 1:].numel()} positions")

# %% [markdown]
# ## 6 · What does not count
#
# Prompts and padding are no answers; their labels are −100. Position t predicts the label t + 1, so the labels lose their first
# column, and the values of a loss are one shorter than the text.
#
# **Tiny numbers:** losses (1, 5, 9) with labels (7, 3, 4, −100): the mean of 1 and 5 is 3.
#
# ## Exercise 5.6: mean_where_counted
#
# Write `mean_where_counted(values, labels)`: values (rows, n − 1), labels (rows, n); return the mean over all positions whose label
# counts, over all rows together. 2 lines, 5 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>labels[:, 1:] != -100</code> has the shape of the values.</details>
# <details><summary>Hint 2</summary>Indexing with a boolean mask flattens: <code>values[mask]</code>.</details>


# %%
# EXERCISE mean_where_counted
def mean_where_counted(values, labels):
    """Mean over the positions whose label counts."""
    ### BEGIN SOLUTION
    return values[labels[:, 1:] != -100].mean()
    ### END SOLUTION


# %%
# CHECK mean_where_counted
ch05_stored.mean_where_counted(mean_where_counted)

# %% [markdown]
# ## 7 · Where does a student begin?
#
# DistilBERT (Sanh et al. 2019, arXiv:1910.01108) begins with every second layer of its teacher. Our student has 3 of LabLM's 6
# layers and 256 of each layer's 768 neurons: a *pruned* teacher (chapter 04). Four choices of layers, and one student that starts
# from nothing; then 8 short steps with the teacher's KL, the same for all, so the teacher answers once and the rest read its store.
#
# **Predict:** which layers make the best beginning, before and after those steps?

# %%
from labutils.distillation.recipe import Recipe, distillation_loss, stored_loss
from labutils.lab.models.students import SIZES, Size, first_student
from labutils.lab.training.loop import FitPlan, fit_
from labutils.lab.training.losses import text_loss

lessons = calibration_batches(tokenizer, code=96, dialogues=24, context=128, batch=4, seed=1)
print(f"{len(lessons)} lessons of {lessons[0].numel()} tokens of training text, a fifth of them dialogues")


def parts_in_order(seed):
    order = torch.randperm(len(lessons), generator=torch.Generator().manual_seed(seed)).tolist()
    return lambda step: [(lessons[order[step % len(order)]],) * 2]


def per_byte(measured):
    return sum(bits for bits, _ in measured) / sum(size for _, size in measured)


def from_nothing(model):
    torch.manual_seed(0)
    return type(model)(model.config).eval()


# %%
CHOICES = {
    "0, 2, 5 (spaced)": (0, 2, 5),
    "0, 1, 2 (first)": (0, 1, 2),
    "3, 4, 5 (last)": (3, 4, 5),
    "0, 1, 5": (0, 1, 5),
}
beginnings = {name: first_student(wisdom, Size(layers, 256)) for name, layers in CHOICES.items()}
beginnings["from nothing"] = from_nothing(beginnings["0, 1, 5"])
# %%
soft_only, found = Recipe(soft=1.0, hard=0.0, temperature=1.0), {}
folder = tempfile.TemporaryDirectory()
store = TeacherCache(Path(folder.name), teacher, k=32, tokens=8 * lessons[0][:, 1:].numel())
for name, student in beginnings.items():
    before = quality_of(student).bits_per_byte
    loss_of = stored_loss(student, store, soft_only)
    fit_(student, parts_in_order(0), loss_of, FitPlan(steps=8, lr=1e-3, warmup_steps=2))
    found[name] = bits_by_document(student, tokenizer, documents)
    print(f"{name:<18} at first {before:6.3f}, after 8 steps {per_byte(found[name]):.3f} bits per byte")
print(f"the store: announced {store.announced_bytes / 1e6:.2f} MB, used {store.used_bytes / 1e6:.2f} MB, read 5 times")
folder.cleanup()

# %%
taught = {name: per_byte(bits) for name, bits in found.items()}
best = min(taught, key=taught.get)
for name in [n for n in taught if n != best]:
    low, high = paired_quality(found[name], found[best]).interval
    print(f"{name:<18} loses {taught[name] - taught[best]:.3f} [{low:+.3f}, {high:+.3f}] to {best}")

# %% [markdown]
# **Explain.** The intervals are over documents and one training each: they say how sure the order is on *these* runs. The right layers of the
# teacher save the long first part of training. The wrong ones can be worse than random weights: compare the last three layers with the
# random start above. Which layers are right depends on the model, so measure it.

# %% [markdown]
# ## 8 · The trainer
#
# One plain function trains everything in this chapter: `fit_(model, parts_of, loss_of, plan)`.
#
# - `parts_of(step)` depends on the step's number alone. Several parts add up to one step (gradient accumulation), each weighted
#   by its labels.
# - The plan has a linear warm-up, a cosine, clipping, and bfloat16 products with float32 weights.
# - With a `state_path`, weights, optimizer, curve and random state go to disk every few steps. A killed run goes on as if nothing
#   had been.
# - A loss that is no number stops the run *before* the weights move, and names the step.
#
# **Predict:** killed at step 5 and resumed, how far is the student from one that was never killed?

# %%
start = first_student(wisdom, SIZES["tiny"])
brief = FitPlan(
    steps=6, lr=1e-3, warmup_steps=2, final_lr_share=0.1, max_grad_norm=1.0, mixed_precision=True, save_every=2
)


def short_run(path=None, *, kill_at=None, nan_at=None, log=lambda line: None):
    student, now = copy.deepcopy(start), [0]

    def parts(step):
        now[0] = step + 1
        if now[0] == kill_at:
            raise KeyboardInterrupt
        rows = lessons[step][:, :32]
        return [(rows[:1], rows[:1]), (rows[1:], rows[1:])]  # two parts, one step

    honest = text_loss(student)
    broken = lambda ids, labels: honest(ids, labels) * (float("nan") if now[0] == nan_at else 1.0)  # noqa: E731
    fit_(student, parts, broken, brief, state_path=path, log=log)
    return torch.cat([p.detach().flatten() for p in student.parameters()])


# %%
with tempfile.TemporaryDirectory() as folder:
    state = Path(folder) / "state.pt"
    try:
        short_run(state, kill_at=5)
    except KeyboardInterrupt:
        print("killed in step 5; on disk: step", torch.load(state, weights_only=True)["step"])
    gap = (short_run(state, log=print) - short_run()).abs().max().item()
    print(f"resumed and unbroken differ by {gap:.1e} at most, in any weight")
    try:
        short_run(Path(folder) / "other.pt", nan_at=4)
    except FloatingPointError as stop:
        print(f"stopped: {stop}; on disk: step", torch.load(Path(folder) / "other.pt", weights_only=True)["step"])

# %% [markdown]
# ## 9 · A short distillation, done honestly
#
# Does the teacher help? The *same* student, the same tokens in the same order, the same beginning and learning rates, with three
# losses:
#
# - **CE**: the text alone;
# - **smoothed**: CE with 10% of each label spread over all tokens, the control. If it gains as much, softness helped, not knowledge;
# - **KD**: Hinton's loss, λ = ½, T = 2.
#
# Repeat over seeds, which draw the order of the lessons, and look at *paired* differences on held-out text.
#
# **Predict:** after so few steps, by how much will KD be ahead, if at all? And what does it cost in time?

# %%
my_cost = predict("time of a step with KD over a step with CE, the teacher asked anew", None, unit="times")

# %%
import itertools

from labutils.distillation.divergences import label_smoothing
from labutils.measurement.timing import measure_interleaved, paired_ratio

SEEDS, STEPS, EVERY = (0, 1, 2), 24, 8
plan = FitPlan(steps=STEPS, lr=1e-3, warmup_steps=3, final_lr_share=0.1, max_grad_norm=1.0)


def smoothed_loss(student):
    def loss(ids, labels):
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
        return label_smoothing(logits.flatten(0, 1), labels[:, 1:].flatten(), share=0.1).mean()

    return loss


LOSSES = {
    "CE": text_loss,
    "smoothed": smoothed_loss,
    "KD": lambda student: distillation_loss(student, teacher, Recipe()),
}

# %%
curves = {name: [] for name in LOSSES}
for seed, (name, loss_of) in itertools.product(SEEDS, LOSSES.items()):
    student, looked, count = copy.deepcopy(start), [], itertools.count(1)

    def look(student=student, looked=looked, count=count):
        if next(count) % EVERY == 0:
            looked.append(per_byte(bits_by_document(student, tokenizer, documents)))

    fit_(student, parts_in_order(seed), loss_of(student), plan, after_step=look)
    curves[name].append(looked)
short = student
losses = {name: loss_of(copy.deepcopy(start)) for name, loss_of in LOSSES.items()}
once = {name: lambda loss=loss: loss(lessons[0], lessons[0]).backward() for name, loss in losses.items()}
spent = {name: timing.samples_s for name, timing in measure_interleaved(once, repeats=7, warmup=1).items()}
print("time of a loss and its gradient against CE:", {n: str(paired_ratio(s, spent["CE"])) for n, s in spent.items()})
my_cost.compare(paired_ratio(spent["KD"], spent["CE"]).value)

# %%
from labutils.lab.models.students import mean_interval

verdicts = {}
for name in ("smoothed", "KD"):
    ends = [(a[-1], b[-1]) for a, b in zip(curves[name], curves["CE"], strict=True)]
    gap, (low, high) = mean_interval([mine - ce for mine, ce in ends])
    verdicts[name] = "beats CE" if high < 0 else "loses to CE" if low > 0 else "not told apart from CE"
    print(f"{name} minus CE: {gap:+.4f} [{low:+.4f}, {high:+.4f}] bits per byte, Student's t over {len(ends)} seeds")

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
gaps = {
    f"{name} minus CE": [
        [a - b for a, b in zip(*pair, strict=True)] for pair in zip(curves[name], curves["CE"], strict=True)
    ]
    for name in verdicts
}
plots.draw_training(axes, gaps, steps=range(EVERY, STEPS + 1, EVERY), ylabel="bits per byte against CE, held out")
axes.axhline(0, color="0.4", linestyle="--")
axes.set_xticks(range(EVERY, STEPS + 1, EVERY))
axes.set_title(f"After {STEPS} steps KD: {verdicts['KD']}; smoothing: {verdicts['smoothed']}")
plt.show()

# %% [markdown]
# *Held-out bits per byte of one small student while it learns, minus those of the same seed with CE: mean over seeds, bands: Student's
# 95% interval of the mean; below the dashed line is better.* What a seed does to all three losses alike drops
# out of their differences. Training losses of the three cannot be compared: they are different quantities. Only held-out quality
# can. Equal steps are not equal time: the teacher must answer too, unless its answers are stored. (The times above leave out the optimizer's
# step, the same for all three.)

# %% [markdown]
# ## 10 · The experiment
#
# A short run shows a beginning. The real question takes hours: three sizes, CE and KD, several seeds, equal tokens and steps. So it
# ran once, by `python -m labutils distil`, which you can repeat, and which goes on after a kill. Its raw curves and scores lie in
# `data/results/distillation_runs.jsonl`; this section only reads them. "KD beats CE" stands where the interval says so, and nowhere
# else. For bits per byte the interval covers both what another seed and what other text would change: it is the hull of Student's over
# the seeds and of one that resamples seeds and documents together.

# %%
from labutils.lab.models.students import effects, longest_runs, mean_interval, validation_curves, wrong_share

runs = longest_runs()
table = effects(runs)

print(
    f"{len(runs)} recorded runs of {runs[0]['steps']} steps, about 5,000 tokens each; bits per byte, held out:",
    *table,
    sep="\n",
)
print(
    f"share of wrong answers over four service tasks, {runs[0]['items']} items each:",
    *effects(runs, wrong_share),
    sep="\n",
)

# %%
figure, panels = plt.subplots(1, 1 + len(table), figsize=(4.4 * (1 + len(table)), 3.8), layout="constrained")
for panel, effect in zip(panels, table, strict=False):
    lines, steps = validation_curves([row for row in runs if row["size"] == effect.size])
    plots.draw_training(panel, lines, steps=steps, ylabel="bits per byte, validation")
    gap, (low, high) = mean_interval([kd[-1] - ce[-1] for kd, ce in zip(lines["KD"], lines["CE"], strict=True)])
    panel.set_title(
        f"“{effect.size}”, validation: KD − CE\n{gap:+.4f} [{low:+.4f}, {high:+.4f}] at step {steps[-1]}", size=10
    )
plots.draw_effects(panels[-1], table)
plt.show()

# %% [markdown]
# *All panels but the last: quality on the validation text while a student learns, with and without its teacher, mean over seeds with
# Student's 95% interval; in each title the difference there at the end, paired by seed. The last: KD minus CE on the held-out modules, other
# text, with the intervals printed above.* The steps down after step 200 are where sequences grow from 512 to 1,024 tokens. The rise before it, where there is one, fell
# together with training on short sequences. A likely reason, which no cell here tests: there a pruned model forgets how to copy from far back.
#
# So the teacher helps the two larger students, by a little. For the smallest these runs do not settle it: compare its two differences,
# on validation text and on the held-out modules. An effect that changes its sign with the text is no effect to explain. Its right answers
# are judged by an interval over seeds alone, on a hundred items a task, which says nothing of other items. (A *capacity gap*, Cho and Hariharan
# 2019, arXiv:1910.01348, would be an explanation if one were needed.)

# %% [markdown]
# ## 11 · Looking inside the teacher
#
# Answers are not all. TinyBERT (Jiao et al. 2019, arXiv:1909.10351) also matches hidden states and attention: student layer m looks up
# teacher layer g(m), and a learnt matrix W takes a narrower student to the teacher's width. DistilBERT adds one term to Hinton's two,
# the direction of the last hidden state, and weighs them 5 · KD + 2 · CE + 1 · (1 − cos).
#
# We divide the squared distance by the teacher's mean square, so that a layer with large numbers does not drown the others:
#
# $$\frac{\operatorname{mean}\,(W h_S - h_T)^2}{\operatorname{mean}\, h_T^2}$$

# %% [markdown]
# ## Exercise 5.7: hidden_distance
#
# Write `hidden_distance(student, teacher, projection)`: student (positions, d), teacher (positions, D), projection (D, d), as `nn.Linear` stores
# it; return the quotient above, one number. 2 lines, 6 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary>Rows are positions: <code>student @ projection.T</code> has the teacher's shape.</details>
# <details><summary>Hint 2</summary>Two means of squares, one divided by the other.</details>


# %%
# EXERCISE hidden_distance
def hidden_distance(student, teacher, projection):
    """Mean square of the difference, relative to the teacher's."""
    ### BEGIN SOLUTION
    difference = student @ projection.T - teacher
    return (difference**2).mean() / (teacher**2).mean()
    ### END SOLUTION


# %%
# CHECK hidden_distance
ch05_stored.hidden_distance(hidden_distance)

# %% [markdown]
# **Predict:** at the same few steps, does looking inside help more than the answers alone?

# %%
from labutils.distillation.hidden import Projections, layer_map
from labutils.distillation.recipe import DISTILBERT

print("g of a student of 3 layers and a teacher of 6:", layer_map(3, 6))
narrow = Projections(4, student_width=128, teacher_width=256)
print(
    f"projections for a student of half the width: {sum(p.numel() for p in narrow.parameters()):,} weights, thrown away later"
)
insides = {
    "answers alone": Recipe(),
    "+ hidden states": Recipe(hidden=1.0),
    "+ hidden and attention": Recipe(hidden=1.0, attention=1000.0),  # squared attention weights are tiny
    "DistilBERT's three parts": DISTILBERT,
}
attentive = copy.deepcopy(teacher)
attentive.set_attn_implementation("eager")  # fused kernels do not return their attention

# %%
inside_bits = {}
for name, recipe in insides.items():
    student = copy.deepcopy(start)
    student.set_attn_implementation("eager")
    loss_of = distillation_loss(student, attentive, recipe)
    fit_(student, parts_in_order(0), loss_of, FitPlan(steps=8, lr=1e-3, warmup_steps=2, max_grad_norm=1.0))
    inside_bits[name] = bits_by_document(student, tokenizer, documents)
for name, bits in inside_bits.items():
    compared = paired_quality(bits, inside_bits["answers alone"])
    low, high = compared.interval
    print(f"{name:<26}{compared.bits_per_byte:.4f} bits per byte, {compared.difference:+.4f} [{low:+.4f}, {high:+.4f}]")

# %% [markdown]
# With one seed and eight steps this shows only the order of magnitude; do not rank the losses by it. The intervals are over documents
# and know nothing of another seed. And g spaces the layers evenly, while this student began as its teacher's layers 0 and 5, so the
# hidden loss also pulls it away from where it began.

# %% [markdown]
# ## 12 · Learning from whole texts
#
# - **Sequence-level** (Kim and Rush 2016, arXiv:1606.07947): the teacher writes the answers, the student trains on them as on any
#   text. It is the simplest way when the two have different tokenizers. Ours then refuses soft targets, as the next cell shows; ULD
#   (Boizard et al. 2024, arXiv:2402.12030) compares the sorted probabilities instead, and so needs no common vocabulary.
# - **On-policy** (GKD, Agarwal et al. 2023, arXiv:2306.13649): the *student* writes, and the teacher judges every token. The student
#   practises in the situations that it gets itself into. A schedule mixes both: data first, its own texts later.

# %%
from labutils.distillation.sequences import OnPolicySchedule, on_policy_parts, written
from labutils.distillation.student import require_same_tokens
from labutils.lab.models.tokenizer import chat_ids, train_tokenizer

other = train_tokenizer(["def f(x): return x"] * 5, vocab_size=300, max_positions=64)
try:
    require_same_tokens(other, tokenizer)
except ValueError as refusal:
    print("refused:", refusal)

END = tokenizer.convert_tokens_to_ids("<|end|>")


def prompt_of(query):
    return torch.tensor(chat_ids(tokenizer, query.messages[:-1], add_generation_prompt=True))


# %% [markdown]
# What ULD does, in tiny numbers: it sorts both sides' probabilities, fills the shorter list up with zeros, and adds up the
# differences. Which token is which, it never asks. **Predict:** the distance between (0.7, 0.2, 0.1) and (0.1, 0, 0.7, 0.2)?


# %%
def uld(student_probs, teacher_probs):
    """Σ |sorted student − sorted teacher|, the shorter side filled up with zeros."""
    longest = max(len(student_probs), len(teacher_probs))
    ours, theirs = (
        torch.nn.functional.pad(p.sort(descending=True).values, (0, longest - len(p)))
        for p in (student_probs, teacher_probs)
    )
    return (ours - theirs).abs().sum()


print(f"{uld(torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.0, 0.7, 0.2])):.2f}: as sure, of other tokens")
free, goal = torch.zeros(len(other), requires_grad=True), softmax(wise[0], dim=-1)
optimizer = torch.optim.Adam([free], lr=0.1)
for step in range(200):
    loss = uld(softmax(free, dim=-1), goal)
    if step in (0, 199):
        print(f"{len(other)} tokens learn from {len(goal)}: distance {loss.item():.3f} after {step} steps")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% [markdown]
# So ULD hands on how sure the teacher is, and over how many tokens, across any two tokenizers. The labels must say of which.

# %%
prompts = [prompt_of(query) for query in service.evaluation_set(service.ANSWER, "train", 96, seed=3)]
asked, practice = prompts[:24], prompts[24:88]
STEPS_OF_DIET, schedule = 32, OnPolicySchedule(final=0.75, rising_steps=8)
shares = [schedule.share(step) for step in range(STEPS_OF_DIET)]
print("share of steps on its own texts:", shares[:10], f"..., {sum(shares):.1f} of {STEPS_OF_DIET} steps on average")

# %% [markdown]
# All four students begin as LabLM-small with half of its weights set to zero (chapter 04), free to grow back, and train for the same
# number of steps. We judge them where on-policy training aims: on what *they* write to 24 other customers, how many nats per token does
# the teacher object to (reverse KL)?
#
# **Predict:** which diet lowers that number most, and what does each do to code?

# %%
from labutils.pruning.masks import apply_masks_, mask_model
from labutils.pruning.scores import magnitude_scores

judge = Recipe(soft=1.0, hard=0.0, temperature=1.0, divergence=DIVERGENCES["reverse KL"])
gentle = Recipe(soft=1.0, hard=0.0, temperature=1.0, divergence=DIVERGENCES["Jensen-Shannon"])
wounded = copy.deepcopy(small)
apply_masks_(wounded, mask_model(magnitude_scores(small), 0.5))
dialogues = calibration_batches(tokenizer, code=0, dialogues=4 * STEPS_OF_DIET, context=128, batch=4, seed=1)
lectures = [practice[i : i + 8] for i in range(0, len(practice), 8)]
by_teacher = [written(teacher, some, max_new_tokens=16, end_id=END) for some in lectures]


@torch.no_grad()
def own_mistakes(student):
    """For each customer, the nats per token that the teacher objects to in the student's own words."""
    ids, labels = written(student, asked, max_new_tokens=12, end_id=END)
    objection = distillation_loss(student, teacher, judge)
    return [(objection(ids[i : i + 1], labels[i : i + 1]).item(), 1) for i in range(len(ids))]


# %%
def from_data(step):
    return [(dialogues[step],) * 2]


def on_policy(student):
    return on_policy_parts(
        student, from_data, lambda step: lectures[step % len(lectures)], schedule, max_new_tokens=16, end_id=END
    )


ways = {
    "text alone": lambda student: (from_data, text_loss(student)),
    "teacher's texts": lambda student: (lambda step: [by_teacher[step % len(by_teacher)]], text_loss(student)),
    "soft targets on the text": lambda student: (from_data, distillation_loss(student, teacher, gentle)),
    "mostly on-policy": lambda student: (on_policy(student), distillation_loss(student, teacher, gentle)),
}
# %%
students = {"before": wounded}
for name, way in ways.items():
    students[name] = student = copy.deepcopy(wounded)
    parts, loss_of = way(student)
    plan_of_diet = FitPlan(steps=STEPS_OF_DIET, lr=3e-4, warmup_steps=4, final_lr_share=0.1, max_grad_norm=1.0)
    fit_(student, parts, loss_of, plan_of_diet)
objections = {name: own_mistakes(student) for name, student in students.items()}
for name, student in students.items():
    bits = per_byte(bits_by_document(student, tokenizer, documents))
    print(f"{name:<26}{per_byte(objections[name]):.3f} nats per own token; {bits:.3f} bits per byte of code")
for name in ("text alone", "teacher's texts", "soft targets on the text"):
    gap = paired_quality(objections["mostly on-policy"], objections[name])
    low, high = gap.interval
    told = "loses" if low > 0 else "wins" if high < 0 else "not told apart"
    print(f"on-policy minus {name}: {gap.difference:+.3f} [{low:+.3f}, {high:+.3f}] nats, paired by customer: {told}")

# %% [markdown]
# **Explain.** On-policy training aims at the first number, the student's own mistakes. The last three lines compare it there, customer by customer, with
# each of the others: read who won, and where the interval reaches over zero, nobody did. They know nothing of another seed, and 32 steps
# are far fewer than the papers' thousands. Two things differ besides whose words are read: a step on its own texts holds fewer tokens than a
# step on data, and the student practises at temperature 1 but is judged on its greedy answers. Nobody asks for code here, so look also at
# what each diet does to it. The teacher's *texts* need no logits, so they work across tokenizers, even through a paid interface.

# %% [markdown]
# ### Back to health
#
# A rounded or pruned model has a natural teacher: itself, before. `train_quantized_` (chapter 03) and `fine_tune_`
# (chapter 04) take one; this is quantization-aware distillation (QAD). **Predict:** at 2 bits, does the teacher or the text repair more?

# %%
from labutils.lab.layers.linears import change_weights_
from labutils.pruning.recovery import fine_tune_
from labutils.quantization.affine import Scheme, fake_quantize
from labutils.quantization.qat import train_quantized_

two_bits = Scheme(bits=2, granularity="group", group_size=64)
masks = mask_model(magnitude_scores(small), 0.6)
# %%
small_base, repaired = bits_by_document(small, tokenizer, documents), {}
rounded, pruned = copy.deepcopy(small), copy.deepcopy(small)
change_weights_(rounded, lambda name, w: fake_quantize(w, two_bits))
apply_masks_(pruned, masks)
for kind, model in {"2 bits": rounded, "60% zeros": pruned}.items():
    lost = per_byte(bits_by_document(model, tokenizer, documents)) - per_byte(small_base)
    print(f"{kind:<10} not repaired                {lost:+.4f} bits per byte against LabLM-small")
for teacher_name, master in {"the text": None, "its former self": small}.items():
    rounded, pruned = copy.deepcopy(small), copy.deepcopy(small)
    train_quantized_(rounded, lessons[:10], two_bits, learning_rate=3e-4, teacher=master)
    apply_masks_(pruned, masks)
    fine_tune_(pruned, lessons[:10], lr=1e-3, masks=masks, teacher=master)
    for kind, model in {"2 bits": rounded, "60% zeros": pruned}.items():
        repaired[kind, teacher_name] = bits = bits_by_document(model, tokenizer, documents)
        print(
            f"{kind:<10} repaired by {teacher_name:<16}{per_byte(bits) - per_byte(small_base):+.4f} bits per byte against LabLM-small"
        )
for kind in ("2 bits", "60% zeros"):
    low, high = paired_quality(repaired[kind, "its former self"], repaired[kind, "the text"]).interval
    print(f"{kind:<10} teacher minus text [{low:+.4f}, {high:+.4f}], 95% over documents, one run each")

# %% [markdown]
# ## 13 · A student that drafts
#
# A student also serves its teacher: it drafts tokens, the teacher checks several at once (speculative decoding, chapter 10). A draft token
# from $q$ is kept with probability min(1, p/q), so the share kept is
#
# $$\alpha = \mathbb{E} \sum_y \min\bigl(p_{\text{target}}(y),\, q_{\text{draft}}(y)\bigr) = 1 - \mathrm{TV}$$
#
# (Leviathan et al. 2022, arXiv:2211.17192, section 3). **Tiny numbers:** draft (0.9, 0.1), target (0.5, 0.5): 0.5 + 0.1 = 0.6.
#
# ## Exercise 5.8: acceptance (core)
#
# Write `acceptance(draft_probs, target_probs)`: both (positions, vocab); return the share of draft tokens kept, one number, the mean over
# positions. 1 line, 4 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>The smaller of both at each token, summed over the vocabulary.</details>
# <details><summary>Hint 2</summary>Which axis holds the tokens of one position? Sum over it first; the mean is over what is left.</details>


# %%
# EXERCISE acceptance
def acceptance(draft_probs, target_probs):
    """Share of draft tokens that the target keeps."""
    ### BEGIN SOLUTION
    return torch.minimum(draft_probs, target_probs).sum(-1).mean()
    ### END SOLUTION


# %%
# CHECK acceptance
ch05_stored.acceptance(acceptance)

# %%
from labutils.distillation.acceptance import acceptance_rate, greedy_agreement, tokens_per_target_step
from labutils.lab.models.mixture import chat_text, reply_labels
from labutils.lab.models.tokenizer import role_ids

codes = [tokenizer(d.text, return_tensors="pt").input_ids[0] for d in documents]
talks = [
    tokenizer(chat_text(query.messages), return_tensors="pt", add_special_tokens=False).input_ids[0]
    for query in service.evaluation_set(service.ANSWER, "test", 32, seed=0)
]
# %%
replies = [reply_labels(ids, roles=role_ids(tokenizer))[1:] != -100 for ids in talks]  # only what the assistant says
TEXTS = {
    "code": (codes, [torch.ones(len(ids) - 1, dtype=torch.bool) for ids in codes]),
    "replies": (talks, replies),
}


@torch.no_grad()
def accepted(draft, texts, kept):
    """Share of draft tokens that LabLM keeps: drawn at temperature 1, and greedy."""
    both = [
        [softmax(m(ids[None]).logits[0, :-1], dim=-1)[k] for m in (draft, teacher)]
        for ids, k in zip(texts, kept, strict=True)
    ]
    drawn_share = torch.cat([acceptance_rate(*pair) for pair in both]).mean().item()
    return drawn_share, torch.cat([greedy_agreement(*pair) for pair in both]).float().mean().item()


# %%
def own_texts(draft, begun):
    """What the draft itself writes, drawn at temperature 1, and where."""
    luck = torch.Generator().manual_seed(0)
    ids, labels = written(draft, begun, max_new_tokens=16, end_id=END, temperature=1.0, generator=luck)
    return list(ids), list(labels[:, 1:] != -100)


BEGUN = {
    "code": [ids[:64] for ids in codes],
    "replies": [prompt_of(query) for query in service.evaluation_set(service.ANSWER, "test", 32, seed=0)],
}
rates = {}
for name, draft in {"LabLM-small": small, "this chapter's short student": short}.items():
    own = {f"{what}, its own": own_texts(draft, begun) for what, begun in BEGUN.items()}
    for text_name, (texts, kept) in (TEXTS | own).items():
        rates[name, text_name] = alpha, greedy = accepted(draft, texts, kept)
        print(
            f"{name:<30}{text_name:<17}{sum(int(k.sum()) for k in kept):>6} positions: accepted {alpha:.1%} drawn, {greedy:.1%} greedy; "
            f"4 drafted tokens give {tokens_per_target_step(alpha, draft_tokens=4):.2f} a step"
        )

# %% [markdown]
# Tokens a step follow $(1-\alpha^{\gamma+1})/(1-\alpha)$ for γ drafted ones. What that buys depends on the draft's own time, which
# the next section measures: the speed-up is this number divided by γc + 1, with c the draft's time over the teacher's. When it drafts, a
# student reads what it has just written itself, and the teacher may object to the second token because of the first. So the rows
# "its own" take α on 16 tokens drawn from the draft. The formula also assumes that the target checks γ + 1 tokens in the time of one, which
# chapter 10 tests.

# %% [markdown]
# ## 14 · Smaller, faster, nearly as good?
#
# | published | smaller | faster | quality |
# | --- | --- | --- | --- |
# | DistilBERT (Sanh et al. 2019, arXiv:1910.01108) | 40% | 60% | 97% of BERT's GLUE score (77.0 of 79.5) |
# | DistilGPT2 (its model card; the speed is from the authors' distillation README) | 34% (82M of 124M) | 2 times | perplexity 21.1 against 16.3, WikiText-103, both after fine-tuning on its train set |
#
# Ours in the same columns. Speed does not depend on the weights' values, so the recorded experiment's sizes are timed here, decoding 32
# tokens with our cached loop, in turns. **Predict:** LabLM-small has 3 of 6 layers and a third of their neurons: 39% of the parameters.
# How many times as fast is it?

# %%
my_gain = predict("tokens/s of LabLM-small over LabLM", None, unit="times")

# %%
from labutils.generation.decode import generate_cached
from labutils.measurement import ledger

built = {"tiny": short, "small": beginnings["0, 2, 5 (spaced)"], "half": first_student(wisdom, SIZES["half"])}
shapes = {f"size “{name}”": model for name, model in built.items()}
entrants = {"LabLM": teacher, "LabLM-small": small, **shapes}
ask = codes[0][None, :16]
times = measure_interleaved(
    {n: lambda m=m: generate_cached(m, ask, 32) for n, m in entrants.items()}, repeats=9, warmup=1
)
smaller = {name: 1 - model.num_parameters() / teacher.num_parameters() for name, model in entrants.items()}
faster = {name: paired_ratio(times["LabLM"].samples_s, times[name].samples_s) for name in entrants}
# %%
for name in entrants:
    print(f"{name:<14} {smaller[name]:>4.0%} smaller, {faster[name]} as fast; {times[name]}")
my_gain.compare(faster["LabLM-small"].value)
c = times["LabLM-small"].median_s / times["LabLM"].median_s
for text_name in (*TEXTS, *own):
    step = tokens_per_target_step(rates["LabLM-small", text_name][0], draft_tokens=4)
    print(f"LabLM-small as a draft on {text_name}: c = {c:.2f}, speed-up by the formula {step / (4 * c + 1):.2f}x")

# %% [markdown]
# Now quality, from the recorded runs: perplexity per token beside the teacher's (as for DistilGPT2), and the mean share of right answers
# over four service tasks beside the teacher's on the same items (as for GLUE). The students are those trained with KD.

# %%
from labutils.lab.models.students import bits_per_byte_of, reference_scores

known, per_token = reference_scores(), sum(len(d.text.encode()) for d in documents) / sum(map(len, codes))


def right_share(row):
    return sum(row["right"].values()) / row["items"]


def columns(row):
    """Perplexity beside the teacher's, and right answers beside the teacher's."""
    extra = bits_per_byte_of(row) - bits_per_byte_of(known["lablm"])
    return 2 ** (extra * per_token), right_share(row) / right_share(known["lablm"])


# %%
def shown(values):
    if len(values) == 1:
        return f"{values[0]:.3f} (one model)"
    middle, (low, high) = mean_interval(values)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def line(name, rows):
    perplexity, right = map(shown, zip(*map(columns, rows), strict=True))
    print(f"{name:<14}{smaller[name]:>8.0%}{faster[name].value:>9.2f}x{perplexity:>28}{right:>28}")


# %%
print(f"{'':<14}{'smaller':>8}{'faster':>10}{'perplexity, times teacher':>28}{'right answers, of teacher':>28}")
line("LabLM-small", [known["lablm-small"]])
for size in SIZES:
    line(f"size “{size}”", [row for row in runs if row["size"] == size and row["loss"] == "KD"])
print(f"our tokens hold {per_token:.1f} bytes on average; a perplexity depends on what a token is, also as a ratio")
print(f"published: DistilGPT2 perplexity {21.1 / 16.3:.3f} times its teacher's; DistilBERT {77.0 / 79.5:.3f} of GLUE")

# %% [markdown]
# **Explain.** Why do ours differ? Look first at LabLM-small and the size "small" in the table. They are of one size, three layers of 256 neurons, but
# LabLM-small took another middle layer and was trained for thousands of steps (with a softer loss and longer sequences), and together
# that closes most of the gap to the teacher. Other reasons, whose shares nobody measured here: a language model must predict *every* token, while GLUE asks for a class; DistilBERT kept half of 12 layers,
# ours a third or half of 6 and often fewer neurons; and LabLM has few parameters to spare.

# %% [markdown]
# The course wants a small sibling that meets four aims. LabLM-small was chosen by short runs, one each, which
# `data/results/lablm_small_choices.jsonl` keeps, then trained on for thousands of steps (the model card tells how).
#
# **Predict:** all these beginnings have equally many weights, but for a few norms. How far apart are they after 90 steps?

# %%
import json

from labutils.lab.paths import DATA

with open(DATA / "results" / "lablm_small_choices.jsonl", encoding="utf-8") as file:
    choices = [json.loads(line) for line in file]
for c in sorted(choices, key=lambda c: c["curve"][-1]["validation_bits_per_byte"]):
    print(
        f"layers {c['layers']!s:<10} {c['neurons']} neurons  soft {c['soft']}, hard {c['hard']}, T = {c['temperature']:.0f}, learning rates × "
        f"{c['lr_factor']}: {c['curve'][-1]['validation_bits_per_byte']:.3f} bits per byte (validation) after {c['steps']} steps"
    )

# %% [markdown]
# In these runs, one each, the choice of layers can decide more than the choice of loss or of learning rate. Does the shipped LabLM-small
# meet its aims? The last two lines say on how much they rest: where a point is a single item, a few points are within the error. And
# LabLM itself was trained briefly, which may make it easier to follow.

# %%
reference, sibling = known["lablm"], known["lablm-small"]
off = {
    t: 100 * (reference["right"][t] / reference["items"] - sibling["right"][t] / sibling["items"])
    for t in service.TASKS
}
worse = bits_per_byte_of(sibling) / bits_per_byte_of(reference) - 1
twice = faster["LabLM-small"]
aims = {
    f"at least 60% fewer parameters: {smaller['LabLM-small']:.0%}": smaller["LabLM-small"] >= 0.6,
    f"twice the decode speed: {twice}": twice.low >= 2 or (None if twice.high >= 2 else False),
    f"at most 10% more bits per byte: {worse:+.0%}": worse <= 0.1,
    f"at most 5 points off each task: { {t: f'{points:+.0f}' for t, points in off.items()} }": max(off.values()) <= 5,
}
for aim, is_met in aims.items():
    print({True: "met", False: "not met", None: "not shown"}[is_met].ljust(9), aim)
print(f"each task: {sibling['items']} items, so one item is {100 / sibling['items']:.0f} point(s)")
print(f"bits per byte: {len(sibling['documents'])} modules; the next cell has an interval, on shorter pieces of them")

# %%
quality = {
    "teacher": quality_of(teacher),
    "shipped sibling": quality_of(small),
    f"{STEPS} steps of KD": quality_of(short),
}
for name, timed in zip(quality, ("LabLM", "LabLM-small", "size “tiny”"), strict=True):  # the last is `short`
    ledger.append(
        ledger.Record(
            technique=name, model=timed, device="cpu", dtype="float32", threads=torch.get_num_threads(),
            prompt_tokens=16, output_tokens=32, samples=[32 / s for s in times[timed].samples_s],
            bits_per_byte=quality[name].bits_per_byte, baseline_bits_per_byte=quality[name].baseline_bits_per_byte,
            quality_tokens=sum(map(len, codes)), bytes_resident=4 * entrants[timed].num_parameters(), chapter="05",
        )
    )  # fmt: skip
    print(f"{name:<14} {quality[name]}")

# %%
from labutils.lab.plots.speed_quality import draw_speed_quality

records = [r for r in ledger.read() if r.chapter == "05" and r.bits_per_byte is not None]
figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
draw_speed_quality(records[-len(quality) :], ax=axes)
lost = quality["shipped sibling"]
axes.set_title(
    f"The shipped sibling is {faster['LabLM-small']} as fast\nand loses {lost.difference:.3f} "
    f"[{lost.interval[0]:.3f}, {lost.interval[1]:.3f}] bits per byte"
)
plt.show()

# %% [markdown]
# *Tokens per second (median of 9 interleaved rounds, 95% interval) against bits per byte on held-out code, for the teacher, its shipped
# sibling, and the student of section 9.* Speed came at once, with the layers; quality has to be trained.

# %% [markdown]
# Teacher and students answer the same customer.


# %%
def answered(model, prompt):
    ids = generate_cached(model, prompt[None], 40, stop=[END])[0, len(prompt) :]
    return tokenizer.decode(ids, skip_special_tokens=True)


for query in service.evaluation_set(service.ANSWER, "test", 2, seed=12):
    print("customer:     ", query.messages[-2]["content"])
    for name, model in {"LabLM": teacher, "LabLM-small": small, "short student": short}.items():
        print(f"{name:<14}{answered(model, prompt_of(query))}")

# %% [markdown]
# ## 15 · How small may a classifier be?
#
# Naming one of 63 intents needs no language model. LabLM gave its opinion of *all* intents (`choice_log_probs`) on 2000 queries of the
# training phrasings, once; `data/results/intent_opinions.safetensors` keeps it. From it we teach one matrix over hashed character
# n-grams, and an encoder of one Transformer layer.
#
# A shop has few labelled queries and many unlabelled ones. So: 300 labels alone; all 2000 through the teacher, *no* label; and, as a
# bound, 2000 true labels.
#
# **Predict:** how near to LabLM does the best of them come on phrasings nobody has seen, and how much of that do 2000 labels explain?

# %%
from labutils.distillation.classifiers import (
    NgramLinear,
    TinyEncoder,
    classifier_loss,
    drawn_rows,
    ngram_ids,
    padded_rows,
)
from labutils.lab.models.intents import intent_queries, recorded_opinions

recorded, seen, new = recorded_opinions(), intent_queries("train"), intent_queries("test")
gap = max(
    (intent_opinion(wisdom, new.chats[i]) - recorded["test"][i]).exp().sub(1).abs().max().item() for i in range(3)
)
print(f"recorded and live opinions of three queries agree within {gap:.1%}")
teacher_right = {
    s: (recorded[s].argmax(1) == q.labels).float().mean().item() for s, q in {"train": seen, "test": new}.items()
}
print(
    f"LabLM: {teacher_right['train']:.1%} of {len(seen.texts)} known phrasings right, {teacher_right['test']:.1%} of {len(new.texts)} new ones"
)


# %%
def rows_of(texts, kind, size):
    if kind == "n-grams":
        return padded_rows([ngram_ids(text, buckets=size) for text in texts])
    return padded_rows([[1 + t for t in tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts])


def classifier(kind, size):
    torch.manual_seed(0)
    if kind == "n-grams":
        return NgramLinear(buckets=size, classes=63)
    return TinyEncoder(vocab=4097, classes=63, width=size)


# %%
LESSONS = {
    "300 labels": (300, None, 0.0),
    "2000 queries, LabLM": (2000, recorded["train"], 1.0),
    "2000 labels": (2000, None, 0.0),
}
KINDS = {"n-grams": ((128, 1024, 8192), 0.05, 200), "encoder": ((16, 64), 1e-2, 200)}
nets = {}
for kind, (sizes, lr, steps) in KINDS.items():
    for (lesson, (count, soft_labels, soft)), size in itertools.product(LESSONS.items(), sizes):
        nets[kind, lesson, size] = net = classifier(kind, size)
        loss_of = classifier_loss(net, seen.labels, soft_labels, soft=soft)
        rows = rows_of(seen.texts[:count], kind, size)
        fit_(net, drawn_rows(rows, batch=64), loss_of, FitPlan(steps=steps, lr=lr, warmup_steps=10, final_lr_share=0.1))

# %%
one, chat = new.texts[:1], new.chats[0]
ask = torch.tensor([chat_ids(tokenizer, chat, add_generation_prompt=True)])
contest = {key: lambda net=net, key=key: net(rows_of(one, key[0], key[2])) for key, net in nets.items()}
large = {
    "LabLM": lambda: intent_opinion(wisdom, chat),
    "LabLM, one greedy reply": lambda: generate_cached(teacher, ask, 16, stop=[END]),
}
with torch.no_grad():
    took = measure_interleaved(contest, repeats=9, calls_per_sample=10) | measure_interleaved(large, repeats=9)
print(took["LabLM"], took["LabLM, one greedy reply"], sep="\n")

# %%
points = {"LabLM": [(took["LabLM"].median_s, teacher_right["test"], teacher.num_parameters())]}
for (kind, lesson, size), net in nets.items():
    with torch.no_grad():
        share = (net(rows_of(new.texts, kind, size)).argmax(1) == new.labels).float().mean().item()
    count, time_s = sum(p.numel() for p in net.parameters()), took[kind, lesson, size].median_s
    points.setdefault(f"{kind}, {lesson}", []).append((time_s, share, count))
    print(f"{kind:<8} {lesson:<20} size {size:>5} {count:>8,} parameters, {share:.1%} right, {1e6 * time_s:.0f} µs")

# %%
figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
reply_s = took["LabLM, one greedy reply"].median_s
plots.draw_classifiers(axes, points, items=len(new.texts))
axes.axvline(1000 * reply_s, color="0.4", linestyle=":")
beside = {"xytext": (-3, 0), "textcoords": "offset points", "rotation": 90, "va": "center", "ha": "right"}
axes.annotate("LabLM, one greedy reply", (1000 * reply_s, 0.5), fontsize="small", **beside)
taught_ones = [point for name, series in points.items() if "LabLM" in name and name != "LabLM" for point in series]
worth = [point for point in taught_ones if point[1] >= teacher_right["test"] - 0.1]
if worth:
    time_s, share, count = min(worth, key=lambda point: point[2])
    axes.set_title(
        f"{count:,} parameters are enough for {share:.0%}; LabLM {teacher_right['test']:.0%}, one reply {reply_s / time_s:.0f} times as slow"
    )
else:
    time_s, share, count = max(taught_ones, key=lambda point: point[1])
    axes.set_title(
        f"None within ten points of LabLM's {teacher_right['test']:.0%}; best {share:.0%} with {count:,} parameters"
    )
plt.show()

# %% [markdown]
# *Share of held-out queries whose intent is named right against the time of one query on this machine (median of 9 interleaved rounds);
# bars: one standard error; beside each point its parameters. LabLM's point scores all 63 names; the dotted line is the time of writing one
# name, whose share of right answers was not measured here.* A teacher turns *unlabelled* queries into lessons: compare its series with
# both kinds of labels, and mind the bars, for two points whose bars overlap are not told apart. And below some size a student only saves
# microseconds that nobody misses, for tens of points.

# %% [markdown]
# ## What you have
#
# - the article's loss, refuted by running it, and Hinton's in its place, with T² seen in measured gradients;
# - four divergences, a teacher on disk in a few bytes a token, and the bias of that repaired;
# - a trainer that survives kills and stops at NaN;
# - students begun from their teacher, compared with CE and with a control, paired, over seeds;
# - hidden states, whole texts, on-policy steps, and models nursed back to health;
# - the three columns, a draft's acceptance, and how small a classifier may be.
#
# **Open question:** your company has a 70B model that works, and a budget for one month of eight GPUs. Would you distil it into 8B, or take
# a ready 8B model and fine-tune it on your data? What would you measure first, and what would make you change your mind?
#
# Next: **06 · GPU acceleration**.

# %%
calibration()

# %%
from labutils.course.progress import progress

progress()

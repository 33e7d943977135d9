# %% [markdown]
# # 05 · Knowledge distillation
#
# **Goal:** train a student that is truly smaller and truly faster than its teacher, and say with an interval how much of
# its quality comes from the teacher.
#
# | | |
# | --- | --- |
# | Prerequisites | chapters 01 and 02; 04 helps |
# | Time | 3 hours for you; all cells run in about 3 minutes on one core (measured: 0 s, not yet measured) |
# | Memory, download | 3 GB at the peak, not yet measured; nothing is downloaded |
# | Hardware | any computer |
# | Exercises | 8, each checked in the cell below it |

# %%
import copy
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy, softmax
from transformers.utils import logging as transformers_logging

from labutils.models.calibration_text import calibration_batches
from labutils.models.compare import bits_by_document, held_out_documents, paired_quality
from labutils.models.load import load_model
from labutils.plots import distillation as plots
from labutils.plots.style import series_style

transformers_logging.disable_progress_bar()

# %%
teacher, tokenizer = load_model("lablm")
documents = held_out_documents(limit_bytes=600)
baseline = bits_by_document(teacher, tokenizer, documents)


def quality_of(model):
    return paired_quality(bits_by_document(model, tokenizer, documents), baseline)


print(f"{len(documents)} held-out modules to measure on; cpu, float32, {torch.get_num_threads()} threads")
print(f"the teacher, LabLM: {teacher.num_parameters():,} parameters, {quality_of(teacher).bits_per_byte:.4f} bits per byte")

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
from labutils.training.losses import forward_kl

text = tokenizer(documents[0].text, return_tensors="pt").input_ids[:, :201]
with torch.no_grad():
    wise = teacher(text).logits[0, :-1]
favourites, truth = wise.argmax(-1), text[0, 1:]


def trained(loss, steps=150):
    """Free logits for 200 places, from the same random start, by gradient descent on a loss."""
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
    print(f"{name}: entropy {article_loss(student).mean():.3f} nats, agrees with the teacher {agree:.0%}, right {right:.0%}")
print(f"the teacher itself: entropy {article_loss(wise).mean():.3f} nats, right {(favourites == truth).float().mean():.0%}")

# %% [markdown]
# The article's loss falls to nothing and the answers are certain, and wrong: whichever token chance put first has won. A
# loss must say *whose* answer is wanted. Hinton, Vinyals and Dean (2015, arXiv:1503.02531) take the teacher's:
#
# $$\mathrm{KL}(p_T \Vert p_S) = \sum_y p_T(y)\,\bigl(\ln p_T(y) - \ln p_S(y)\bigr)$$
#
# It is zero exactly when both agree. **Tiny numbers:** teacher (¾, ¼), student (½, ½):
# ¾ ln 1.5 + ¼ ln 0.5 = 0.304 − 0.173 = 0.131.

# %% [markdown]
# ## Exercise 5.1: soft_loss
#
# Write `soft_loss(student_logits, teacher_logits)`: both (places, vocab); return one number, KL(teacher ‖ student) in nats, the
# mean over places. 3 lines, 8 minutes, difficulty 2 of 3.
#
# <details><summary>Hint 1</summary><code>torch.log_softmax(…, dim=-1)</code> of both; the weights are the teacher's probabilities, its <code>.exp()</code>.</details>
# <details><summary>Hint 2</summary>Sum over the vocabulary, <code>.sum(-1)</code>, then <code>.mean()</code> over the places.</details>


# %%
# EXERCISE soft_loss
def soft_loss(student_logits, teacher_logits):
    """KL(teacher ‖ student), mean over places."""
    ### BEGIN SOLUTION
    student = torch.log_softmax(student_logits, dim=-1)
    wanted = torch.log_softmax(teacher_logits, dim=-1)
    return (wanted.exp() * (wanted - student)).sum(-1).mean()
    ### END SOLUTION


# %%
# CHECK soft_loss
from labutils.checks import ch05, ch05_stored

ch05.soft_loss(soft_loss)

# %% [markdown]
# ## 2 · Dark knowledge
#
# A label says one token. A teacher says which *wrong* tokens are nearly right, and that is most of what it knows. Hinton
# called it dark knowledge. Here is what LabLM really predicts at four places of two customers' dialogues and of code.
#
# **Predict:** the customer says "I want to cancel"; which other words would the teacher accept?

# %%
PLACES = {
    "a customer's intent": "<|system|>Name the intent.<|end|><|user|>I would like my money back.<|end|><|assistant|>",
    "a customer, cut off": "<|user|>Could you please",
    "code, a name": "<|endoftext|>import os\n\n\ndef read_lines(path):\n    with open(",
    "code, a keyword": "<|endoftext|>def f(x):\n    if x is None:\n        ",
}


def opinion(prompt):
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        return teacher(ids).logits[0, -1]


opinions = {name: opinion(prompt) for name, prompt in PLACES.items()}

# %%
figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
for panel, (name, logits) in zip(panels, opinions.items(), strict=True):
    probs, ids = softmax(logits, dim=-1).topk(6)
    names = [repr(tokenizer.decode([int(i)])) for i in ids]
    others = 1 - probs[0].item()
    plots.draw_opinion(panel, names, probs.tolist(), right=names[0], title=f"{name}: {others:.0%} on others")
spread = max(opinions, key=lambda name: article_loss(opinions[name]).item())
figure.suptitle(f"The teacher is least sure at “{spread}”")
plt.show()

# %% [markdown]
# *LabLM's six likeliest next tokens at four places (favourite hatched); the share in each title is what it gives to all
# other tokens.* Where the favourite takes nearly everything, the rest is invisible, and so is what it could teach.
# **Temperature** makes it visible: divide the logits by T before the softmax.

# %% [markdown]
# ## Exercise 5.2: soften
#
# Write `soften(logits, temperature)`: probabilities of the last axis at that temperature. 1 line, 3 minutes, difficulty 1 of 3.
#
# <details><summary>Hint 1</summary>T → ∞ must give equal probabilities. Which operation on the logits does that?</details>
# <details><summary>Hint 2</summary><code>torch.softmax(…, dim=-1)</code> of the divided logits.</details>


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
# Move the slider: at which temperature do you first see more than three alternatives to the teacher's favourite? Below the
# widget, the plain function does the same for three temperatures.

# %%
from labutils.widgets.distillation import opinion_at, temperature_widget

temperature_widget(tokenizer, opinions["code, a name"])

# %%
for temperature in (1.0, 2.0, 8.0):
    print(opinion_at(tokenizer, opinions["code, a name"], temperature, count=5), end="\n\n")

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
# **Predict:** from T = 1 to T = 16, how much does the gradient's norm change with T², and without?

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
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
plots.draw_gradients(axes, norms)
change = {name: max(line.values()) / min(line.values()) for name, line in norms.items()}
axes.set_title(f"From T = 1 to 16: a factor {change['with T²']:.1f} with T², {change['without']:.0f} without")
plt.show()

# %% [markdown]
# *Norm of the loss's gradient by the logits of LabLM-small on 200 tokens of held-out code, LabLM the teacher; both axes
# logarithmic.* Choose T and λ apart from each other: with the factor, T changes *what* is taught, and λ how much.

# %% [markdown]
# ## Exercise 5.3: hinton_loss
#
# Write `hinton_loss(student_logits, teacher_logits, labels, temperature, soft)`: λ = `soft` weighs T² · KL (mean over places), 1 − λ
# the cross-entropy with `labels` (places,). 4 lines, 10 minutes, difficulty 2 of 3.
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
# | Jensen-Shannon | either, but never above ln 2 | in between |
# | total variation | either, by the share of mass | what a draft model needs (section 12) |
#
# **Tiny numbers** for Jensen-Shannon: (¾, ¼) and (½, ½) have the mixture (0.625, 0.375), and JS = 0.033.
#
# **Predict:** a teacher with two bells, a student that can only be one bell. Where does each divergence put it?

# %%
from labutils.distillation.divergences import DIVERGENCES

tokens = torch.arange(32.0)
two_bells = torch.logaddexp(-((tokens - 8) ** 2) / 8, -((tokens - 24) ** 2) / 8 - 0.69)


def one_bell(divergence, steps=400):
    shape = torch.tensor([11.0, 1.0], requires_grad=True)  # centre, ln width
    optimizer = torch.optim.Adam([shape], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        bell = -((tokens - shape[0]) ** 2) / (2 * shape[1].exp() ** 2)
        divergence(bell, two_bells).backward()
        optimizer.step()
    return softmax(bell.detach(), dim=-1)


bells = {name: one_bell(DIVERGENCES[name]) for name in ("forward KL", "reverse KL", "Jensen-Shannon")}

# %%
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
plots.draw_modes(axes, softmax(two_bells, dim=-1), bells)
in_valley = {name: bell[13:20].sum().item() for name, bell in bells.items()}
axes.set_title(
    f"Mass where the teacher has almost none: forward {in_valley['forward KL']:.0%}, reverse {in_valley['reverse KL']:.0%}"
)
plt.show()

# %% [markdown]
# *A two-mode teacher over 32 tokens and the best single bell by each divergence.* For one next token, forward KL is the
# usual choice: it keeps the student's probabilities honest. For whole texts that the student writes by itself, reverse KL
# avoids what the teacher would never say (MiniLLM, Gu et al. 2023, arXiv:2306.08543).

# %% [markdown]
# ## Exercise 5.4: jensen_shannon
#
# Write `jensen_shannon(student_probs, teacher_probs)`: probabilities (places, vocab), none zero; return (places,), in nats:
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

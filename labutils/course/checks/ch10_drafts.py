"""Checks of chapter 10, drafts: a trimmed head, the law of a draft that is judged wrongly, a tree's mask."""

from functools import partial

import torch

from labutils.course.checks import exercise, expect_function
from labutils.decoding import trees
from labutils.decoding.drafts import frequent_tokens, full_vocabulary
from labutils.decoding.verify import residual


def _kept(counts, keep):
    rows = [torch.arange(len(counts)).repeat_interleave(counts)]
    return frequent_tokens(rows, vocab_size=len(counts), count=keep)


def _trimmed(hidden, head, counts, keep):
    kept = _kept(counts, keep)
    return full_vocabulary((head[kept] @ hidden)[None], kept, len(head))[0].softmax(-1)


def _whole(hidden, head, counts, keep):
    return (head @ hidden).softmax(-1)


def _zeroed(hidden, head, counts, keep):
    kept = torch.zeros(len(head)).index_fill(0, _kept(counts, keep), 1.0)
    return _whole(hidden, head, counts, keep) * kept


def _zero_logits(hidden, head, counts, keep):
    kept = _kept(counts, keep)
    return torch.zeros(len(head)).index_copy(0, kept, head[kept] @ hidden).softmax(-1)


def _first_ids(hidden, head, counts, keep):
    logits = (head[:keep] @ hidden)[None]
    return full_vocabulary(logits, torch.arange(keep), len(head))[0].softmax(-1)


def _rarest(hidden, head, counts, keep):
    kept = counts.argsort(stable=True)[:keep]
    return full_vocabulary((head[kept] @ hidden)[None], kept, len(head))[0].softmax(-1)


def _likeliest(hidden, head, counts, keep):
    logits = head @ hidden
    kept = logits.topk(keep).indices
    return full_vocabulary(logits[kept][None], kept, len(head))[0].softmax(-1)


def _unscattered(hidden, head, counts, keep):
    return (head[_kept(counts, keep)] @ hidden).softmax(-1)


@exercise("10.7")
def trimmed_probs(answer):
    """Probabilities of a draft whose head has only the most frequent tokens."""
    generator = torch.Generator().manual_seed(0)
    head, hidden = torch.randn(6, 4, generator=generator), torch.randn(4, generator=generator)
    counts = torch.tensor([5, 0, 9, 1, 0, 7])
    expect_function(
        answer,
        _trimmed,
        cases=[
            {
                "hidden": torch.tensor([1.0, 0.0]),
                "head": torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 5.0], [1.0, 2.0]]),
                "counts": torch.tensor([1, 0, 8, 4]),
                "keep": 2,
            },
            {"hidden": hidden, "head": head, "counts": counts, "keep": 3},
        ],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (_whole, "the head is still whole: keep the rows of the most frequent tokens only"),
            (_zeroed, "the kept probabilities no longer sum to 1: take the softmax over the kept logits alone"),
            (_zero_logits, "a logit of 0 is no probability of 0: the other tokens' logits must be minus infinity"),
            (_first_ids, "the first ids are not the most frequent: sort the counts"),
            (_rarest, "those are the rarest tokens: sort the counts from the highest down"),
            (_likeliest, "chosen by the logits: that needs the whole head first; choose by the counts"),
            (
                _unscattered,
                "only the kept tokens have a place: put each probability at its own token's id, of vocab places",
            ),
        ],
    )


def _law(target_probs, draft_probs, drawn_from, *, judged_by=None, replaced_by=residual):
    q = draft_probs if judged_by is None else judged_by(draft_probs, drawn_from)
    law = torch.zeros_like(target_probs)
    for token, chance in enumerate(drawn_from.tolist()):
        if chance > 0:
            stands = min(1.0, float(target_probs[token] / q[token]))
            law[token] += chance * stands
            law += chance * (1 - stands) * replaced_by(target_probs, q)
    return law


def _only_drafts(target_probs, draft_probs, drawn_from):
    return drawn_from * (target_probs / draft_probs).clamp(max=1)


def _unweighted(target_probs, draft_probs, drawn_from):
    return _law(target_probs, draft_probs, torch.ones_like(drawn_from))


@exercise("10.3")
def output_law(answer):
    """The exact law of the token that comes out when a draft is drawn from one law and judged by another."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.6, 0.1, 0.3])
    generator = torch.Generator().manual_seed(3)
    long_p, long_q, other = torch.rand(3, 5, generator=generator).softmax(-1)
    expect_function(
        answer,
        _law,
        cases=[
            {"target_probs": p, "draft_probs": q, "drawn_from": torch.tensor([1.0, 0.0, 0.0])},
            {"target_probs": long_p, "draft_probs": long_q, "drawn_from": other},
        ],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda target_probs, draft_probs, drawn_from: target_probs,
                "that is what should come out; enumerate what does come out of this draft and this judge",
            ),
            (
                partial(_law, judged_by=lambda q, drawn: torch.where(drawn > 0, drawn, 1.0)),
                "judged by the law it was drawn from: that is the repair; here q is draft_probs",
            ),
            (
                _only_drafts,
                "only tokens that stand are counted: each that falls is replaced by a draw from the residual",
            ),
            (_unweighted, "each token counts as if it were always drafted: weigh it with drawn_from"),
            (
                partial(_law, replaced_by=lambda p, q: (p - q).clamp(min=0)),
                "the law does not sum to 1: divide the residual by its own sum",
            ),
            (
                partial(_law, replaced_by=lambda p, q: p),
                "a token that falls is replaced from the residual max(p − q, 0), not from p itself",
            ),
            (
                partial(_law, replaced_by=lambda p, q: residual(q, p)),
                "the residual is what the target has too much of, max(p − q, 0); you took max(q − p, 0)",
            ),
        ],
    )


def _reference_mask(parents):
    return trees.tree_mask(parents)


def _parent_only(parents):
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents[1:], start=1):
        mask[node, parent] = True
    return mask


@exercise("10.8")
def tree_mask(answer):
    """Which nodes a node of a token tree attends to."""
    expect_function(
        answer,
        _reference_mask,
        cases=[{"parents": [-1, 0, 0, 1]}, {"parents": [-1, 0, 1, 1, 0, 4, 3]}],
        mistakes=[
            (
                lambda parents: torch.ones(len(parents), len(parents)).tril().bool(),
                "that is a chain's causal mask: a node must not see its siblings and their children",
            ),
            (_parent_only, "only the parent is seen: every ancestor up to node 0 must be"),
            (
                lambda parents: _reference_mask(parents).T,
                "rows and columns are swapped: a row is the node that looks, a column the one it sees",
            ),
            (
                lambda parents: _reference_mask(parents) & ~torch.eye(len(parents), dtype=torch.bool),
                "a node sees itself as well: set the diagonal",
            ),
            (
                lambda parents: ~_reference_mask(parents),
                "True means may attend: you marked what is hidden",
            ),
        ],
    )

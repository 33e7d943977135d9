"""Checks of chapter 10, first part: the verifier, greedy and sampled."""

import torch
from torch.nn.functional import one_hot, softmax

from labutils.course.checks import cases_of, exercise, expect_function
from labutils.decoding.verify import acceptance_probs, residual, verify

VOCAB = 6


def _rows(*tokens):
    """Logits whose favourite is the wanted token; the runner-up is the next one."""
    return torch.stack(
        [3 * one_hot(torch.tensor(t), VOCAB) + one_hot(torch.tensor((t + 1) % VOCAB), VOCAB) for t in tokens]
    )


def _greedy(target_logits, drafted):
    verdict = verify(target_logits, drafted)
    return verdict.accepted, verdict.token


def _own(target_logits):
    return target_logits.argmax(-1).tolist()


def _until(agree, start=0):
    return next((i for i in range(start, len(agree)) if not agree[i]), len(agree))


def _first_unverified(target_logits, drafted):
    own = _own(target_logits)
    accepted = _until([t == w for t, w in zip(drafted, own, strict=False)], start=min(1, len(drafted)))
    return accepted, own[accepted]


def _shifted(target_logits, drafted):
    own = _own(target_logits)
    accepted = _until([t == w for t, w in zip(drafted, own[1:], strict=False)])
    return accepted, own[accepted]


def _counts_all(target_logits, drafted):
    own = _own(target_logits)
    accepted = sum(t == w for t, w in zip(drafted, own, strict=False))
    return accepted, own[accepted]


def _no_bonus(target_logits, drafted):
    accepted, token = _greedy(target_logits, drafted)
    return (accepted - 1, _own(target_logits)[accepted - 1]) if accepted == len(drafted) > 0 else (accepted, token)


def _draft_kept(target_logits, drafted):
    accepted, token = _greedy(target_logits, drafted)
    return accepted, drafted[accepted] if accepted < len(drafted) else token


@exercise("10.1")
def greedy_verify(answer):
    """How many drafted tokens stand, and the target's token after them."""
    expect_function(
        answer,
        _greedy,
        cases=cases_of(
            "target_logits drafted",
            (_rows(3, 1, 2, 4), [3, 1, 2]),
            (_rows(3, 1, 2, 4), [3, 0, 2]),
            (_rows(3, 1, 2, 4), [5, 1, 2]),
            (_rows(2), []),
        ),
        mistakes=[
            (_first_unverified, "the first drafted token was taken unverified: row 0 of the logits judges it"),
            (_shifted, "shifted by one: row i judges drafted[i], because it is what the target says BEFORE that token"),
            (_counts_all, "agreement behind the first wrong token does not count: the target never read that text"),
            (_no_bonus, "if all stand, the last row gives one more token for nothing: the bonus"),
            (_draft_kept, "after the tokens that stand comes the TARGET's token, not the draft's"),
        ],
    )


def _sampled(target_probs, drafted, draft_probs, is_drawn, uniforms):
    q = draft_probs if is_drawn else one_hot(torch.tensor(drafted), target_probs.shape[1]).to(target_probs)
    keep = acceptance_probs(target_probs[:-1], drafted, q).tolist()
    accepted = next((i for i in range(len(drafted)) if uniforms[i] >= keep[i]), len(drafted))
    return accepted, target_probs[-1] if accepted == len(drafted) else residual(target_probs[accepted], q[accepted])


def _sampled_wrong(*, full_q=False, ratio=None, rest=None, from_last=False):
    def judge(target_probs, drafted, draft_probs, is_drawn, uniforms):
        q = (
            draft_probs
            if is_drawn or full_q
            else one_hot(torch.tensor(drafted), target_probs.shape[1]).to(target_probs)
        )
        pairs = [(target_probs[i, t].item(), q[i, t].item()) for i, t in enumerate(drafted)]
        keep = [(ratio or (lambda p, q: p / q))(*pair) for pair in pairs]
        accepted = next((i for i in range(len(drafted)) if uniforms[i] >= keep[i]), len(drafted))
        if accepted == len(drafted):
            return accepted, target_probs[-2 if from_last else -1]
        return accepted, (rest or residual)(target_probs[accepted], q[accepted])

    return judge


@exercise("10.2")
def sampled_verify(answer):
    """How many drafted tokens stand, and the distribution that the next token is drawn from."""
    made = torch.Generator().manual_seed(3)
    p, q = (softmax(1.5 * torch.randn(n, VOCAB, generator=made), -1) for n in (4, 3))
    favourites = q.argmax(-1).tolist()
    rare = q.argmin(-1).tolist()
    both = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    other = torch.tensor([[0.6, 0.1, 0.3]])
    expect_function(
        answer,
        _sampled,
        cases=cases_of(
            "target_probs drafted draft_probs is_drawn uniforms",
            (both, [0], other, True, [0.84]),  # p / q = 5/6
            (both, [0], other, True, [0.8]),
            (both, [1], other, True, [0.99]),
            (both, [0], other, False, [0.7]),
            (p, favourites, q, True, [0.2, 0.6, 0.9]),
            (p, favourites, q, False, [0.05, 0.6, 0.9]),
            (p, rare, q, True, [0.0, 0.0, 0.0]),
            (p, rare, q, True, [0.3, 0.99, 0.5]),
        ),
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                _sampled_wrong(full_q=True),
                "a favourite was judged by the full q: if is_drawn is False, q is 1 at the drafted token",
            ),
            (
                _sampled_wrong(rest=lambda p, q: (p - q).clamp(min=0)),
                "the residual is not normalised: divide max(p - q, 0) by its sum",
            ),
            (
                _sampled_wrong(rest=lambda p, q: p),
                "a replacement drawn from p counts tokens twice that the draft already gave: draw from max(p - q, 0)",
            ),
            (
                _sampled_wrong(rest=lambda p, q: softmax((p - q).clamp(min=0), -1)),
                "a softmax gives every token something: divide max(p - q, 0) by its sum",
            ),
            (_sampled_wrong(ratio=lambda p, q: q / p), "upside down: a token stands with probability p / q"),
            (_sampled_wrong(ratio=lambda p, q: p), "that is the chance of a sure draft: divide p by q"),
            (_sampled_wrong(from_last=True), "the bonus comes from the LAST row, after all drafted tokens"),
        ],
    )

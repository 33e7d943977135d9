"""Checks of chapter 13, privacy: exposure, the scores of an attack, a step of DP-SGD."""

import math

import torch

from labutils.capstone import canaries, membership, private_training
from labutils.course.checks import cases_of, exercise, expect_function


def _exposure(log_probs, secret):
    return canaries.exposure(torch.tensor(log_probs, dtype=torch.float64), secret)


def _exposure_wrong(*, log=math.log2, first=1, ties=0.5, above=True, size=True):
    def answer(log_probs, secret):
        own = log_probs[secret]
        better = sum(x > own if above else x < own for x in log_probs)
        rank = first + better + ties * (log_probs.count(own) - 1)
        return (log(len(log_probs)) if size else 0.0) - log(rank)

    return answer


@exercise("13.8")
def exposure(answer):
    """The exposure of one secret, in bits."""
    graded = [-0.5 * i * i for i in range(16)]
    expect_function(
        answer,
        _exposure,
        cases=cases_of(
            "log_probs secret",
            ([-4.0, -1.0, -2.0, -3.0], 1),
            ([-4.0, -1.0, -2.0, -3.0], 2),
            ([-4.0, -1.0, -2.0, -3.0], 0),
            ([-2.0, -7.0, -5.5, -5.0, -9.0, -3.0, -6.0, -4.0], 3),
            (graded, 5),
            ([-3.0] * 8, 3),
            ([-1.0, -2.0, -2.0, -2.0, -5.0, -6.0, -7.0, -8.0], 2),
        ),
        mistakes=[
            (_exposure_wrong(log=math.log), "exposure is counted in bits: take log2"),
            (_exposure_wrong(first=0), "the likeliest code has rank 1, not 0"),
            (_exposure_wrong(above=False), "rank 1 is the LIKELIEST code: count those with a higher log-probability"),
            (
                lambda log_probs, secret: -log_probs[secret] / math.log(2),
                "that is the secret's surprise: a model may find all codes unlikely; take the rank among them",
            ),
            (_exposure_wrong(size=False), "begin with log2 of the number of codes, then take log2 of the rank off"),
            (_exposure_wrong(ties=0.0), "equals share their mean rank: one place for each pair of equals, halved"),
            (_exposure_wrong(ties=1.0), "equals share their mean rank: counting all of them before it is too hard"),
        ],
    )


def _attack_scores(members, others, fpr):
    return membership.auc(members, others), membership.tpr_at(members, others, fpr)


def _attack_wrong(*, equal=0.5, sign=1, allowed=lambda rate, fpr: rate <= fpr, swap=False):
    def answer(members, others, fpr):
        m, o = ([sign * s for s in some] for some in (members, others))
        area = sum((a > b) + equal * (a == b) for a in m for b in o) / (len(m) * len(o))
        if swap:
            m, o = o, m
        rates = [(sum(s >= t for s in o) / len(o), sum(s >= t for s in m) / len(m)) for t in {*m, *o, math.inf}]
        return area, max((found for wrong, found in rates if allowed(wrong, fpr)), default=0.0)

    return answer


def _next_threshold(members, others, fpr):
    thresholds = sorted({*members, *others}, reverse=True)
    rates = [[sum(s >= t for s in some) / len(some) for t in thresholds] for some in (others, members)]
    return membership.auc(members, others), next(f for w, f in zip(*rates, strict=True) if w >= fpr)


@exercise("13.9")
def attack_scores(answer):
    """AUC of an attack, and the members that it finds at a given share of false accusations."""
    many = [float(i % 7) for i in range(20)], [float(i % 5) - 0.5 for i in range(20)]
    expect_function(
        answer,
        _attack_scores,
        cases=cases_of(
            "members others fpr",
            ([3.0, 1.0], [2.0, 0.0], 0.0),
            ([3.0, 1.0], [2.0, 0.0], 0.5),
            ([1.0, 1.0], [1.0, 1.0, 1.0], 0.1),
            ([4.0, 3.0, 1.0], [2.0, 1.0], 0.6),
            (*many, 0.25),
            (*many, 0.3),
        ),
        mistakes=[
            (_attack_wrong(equal=1.0), "a member and another with equal scores are a coin's toss: count ½, not a win"),
            (_attack_wrong(equal=0.0), "a member and another with equal scores count ½, not nothing"),
            (_attack_wrong(sign=-1), "a HIGH score says member: scores are minus the loss already"),
            (
                _attack_wrong(allowed=lambda rate, fpr: rate < fpr),
                "a rate of exactly fpr is allowed: at most, not below",
            ),
            (_next_threshold, "that threshold accuses more of the others than fpr allows: stay at or below it"),
            (_attack_wrong(swap=True), "the allowed rate is that of the OTHERS who are accused, not of the members"),
        ],
    )


def _noisy(gradients, noise, clip, sigma, expected):
    return private_training.clipped_noisy_gradient(gradients, noise, clip=clip, sigma=sigma, expected=expected)


def _noisy_wrong(*, rows="clip", scale=True, noise_last=False, twice=False, real=False):
    def answer(gradients, noise, clip, sigma, expected):
        batch = len(gradients) if real else expected
        lengths = gradients.norm(dim=1, keepdim=True)
        total = {
            "clip": gradients * (clip / lengths).clamp(max=1),
            "stretch": gradients * (clip / lengths),
            "each number": gradients.clamp(-clip, clip),
            "none": gradients,
        }[rows].sum(dim=0)
        if rows == "none":  # the mean is clipped
            total = total * (clip * expected / total.norm()).clamp(max=1)
        noise = sigma * noise * (clip if scale else 1) * (batch if noise_last else 1) / (batch if twice else 1)
        return (total + noise) / batch

    return answer


@exercise("13.10")
def clipped_noisy_gradient(answer):
    """One step's gradient of DP-SGD."""
    generator = torch.Generator().manual_seed(13)
    rows = [torch.randn(count, 4, generator=generator) * 2 for count in (3, 6, 1)]
    noise = [torch.randn(4, generator=generator) for _ in range(4)]
    small = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    expect_function(
        answer,
        _noisy,
        cases=cases_of(
            "gradients noise clip sigma expected",
            (small, torch.zeros(2), 1.0, 1.0, 2.0),
            (rows[0], noise[0], 0.5, 1.5, 4.0),
            (rows[1], noise[1], 2.5, 0.7, 5.0),
            (rows[2], noise[2], 3.0, 2.0, 2.0),
            (torch.zeros(0, 4), noise[3], 2.0, 0.5, 4.0),
        ),
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (_noisy_wrong(rows="none"), "the mean is clipped too late: clip each example's gradient, then add up"),
            (_noisy_wrong(rows="each number"), "clip the LENGTH of an example's gradient, not each number in it"),
            (_noisy_wrong(rows="stretch"), "a gradient shorter than clip stays as it is: the factor is at most 1"),
            (
                _noisy_wrong(scale=False),
                "the noise hides what one example can do, so it grows with clip: sigma · clip · z",
            ),
            (_noisy_wrong(noise_last=True), "the noise joins the SUM and is divided by expected with it"),
            (_noisy_wrong(twice=True), "the noise is divided by expected once, together with the sum"),
            (_noisy_wrong(real=True), "divide by the EXPECTED batch size: the real one tells how many took part"),
        ],
    )

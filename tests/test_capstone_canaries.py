"""Canaries and membership: ranks, thresholds, losses, and that planting is what raises an exposure."""

import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from tiny_models import random_ids, tiny_model

from labutils.capstone.canaries import (
    DIGITS,
    chance_exposure,
    code_log_probs,
    draw_canaries,
    exposure,
    exposures,
    shuffled_parts,
)
from labutils.capstone.designs import Design
from labutils.capstone.membership import auc, auc_interval, roc, text_losses, tpr_at
from labutils.lab.models.load import load_model
from labutils.lab.models.tokenizer import chat_ids, text_ids
from labutils.lab.training.loop import FitPlan, fit_
from labutils.lab.training.losses import IGNORED, text_loss
from labutils.quantization.packed import pack_model_

SCORES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=12)


@pytest.mark.parametrize(("secret", "bits"), [(1, 2.0), (2, 1.0), (3, 2 - math.log2(3)), (0, 0.0)])
def test_exposure_by_hand(secret, bits):
    assert exposure(torch.tensor([-4.0, -1.0, -2.0, -3.0]), secret) == pytest.approx(bits)


def test_model_that_knows_nothing_exposes_nobody():
    assert exposure(torch.zeros(1000), 7) == pytest.approx(math.log2(1000 / 500.5))


@given(st.integers(1, 60), st.integers(0, 99))
def test_mean_exposure_over_all_secrets_is_that_of_chance(secrets, seed):
    log_probs = torch.tensor(random.Random(seed).sample(range(secrets), secrets)).float()
    mean = statistics.fmean(exposure(log_probs, secret) for secret in range(secrets))
    assert mean == pytest.approx(chance_exposure(secrets), abs=1e-9)


def test_chance_exposure_tends_to_log2_e():
    assert chance_exposure(10**7) == pytest.approx(math.log2(math.e), abs=1e-5)


@pytest.mark.parametrize(("values", "secret"), [([0.0], 1), ([0.0], -1), ([math.nan, 0.0], 1)])
def test_bad_secret_is_refused(values, secret):
    with pytest.raises(ValueError, match="secret must be an index"):
        exposure(torch.tensor(values), secret)


@pytest.mark.parametrize("bits", [None, 4])
def test_shared_beginnings_equal_one_code_at_a_time(bits):
    model = tiny_model("llama-gqa-tied")
    if bits:
        pack_model_(model, Design(bits=bits).scheme)
    prompt, digits = random_ids(7)[0], torch.tensor([5, 9, 3, 40])
    ours = code_log_probs(model, prompt, digits, length=3)
    assert ours.shape == (64,)
    for code in (0, 1, 7, 39, 63):
        places = [code // 16, code // 4 % 4, code % 4]
        tokens = digits[places]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, tokens])[None]).logits[0]
        alone = logits[6:9].log_softmax(-1).gather(1, tokens[:, None]).sum()
        torch.testing.assert_close(ours[code], alone, rtol=1e-4, atol=1e-4)


def test_prompt_is_all_but_the_code_and_does_not_depend_on_it():
    tokenizer = load_model("lablm-small").tokenizer
    for canary in draw_canaries(3, times=(0, 1), each=5):
        whole, prompt = chat_ids(tokenizer, canary.messages), canary.prompt(tokenizer)
        code = [text_ids(tokenizer, digit)[0] for digit in canary.code]
        assert whole[: len(prompt) + DIGITS] == prompt + code
        assert tokenizer.decode(whole[len(prompt) :]) == f"{canary.code}.<|end|>"


def test_canaries_differ_and_repeat_by_seed():
    drawn = draw_canaries(1, times=(0, 4, 16), each=20)
    assert drawn == draw_canaries(1, times=(0, 4, 16), each=20) != draw_canaries(2, times=(0, 4, 16), each=20)
    assert len({canary.customer for canary in drawn}) == 60
    assert [canary.times for canary in drawn] == [0] * 20 + [4] * 20 + [16] * 20
    with pytest.raises(ValueError, match="at most 1000 canaries; got 1002"):
        draw_canaries(1, times=(0, 1, 2), each=334)


def test_parts_show_each_text_once_without_padding():
    texts = [[n, *range(10, 10 + n)] for n in range(1, 12)]
    parts = shuffled_parts(texts, batch=4, seed=0)
    rows = [label[label != IGNORED].tolist() for ((_, labels),) in parts for label in labels]
    assert sorted(rows) == texts and rows != texts
    assert all(((ids == labels) | ((labels == IGNORED) & (ids == 0))).all() for ((ids, labels),) in parts)


@pytest.mark.slow
def test_planting_raises_the_exposure_of_what_was_planted():
    loaded = load_model("lablm-small")
    canaries = draw_canaries(0, times=(0, 20), each=6)
    texts = [chat_ids(loaded.tokenizer, c.messages) for c in canaries for _ in range(c.times)]
    parts = shuffled_parts(texts, batch=8, seed=0)
    fit_(loaded.model, lambda step: parts[step], text_loss(loaded.model), FitPlan(steps=len(parts), lr=1e-3))
    found = exposures(loaded.model, loaded.tokenizer, canaries)
    assert statistics.fmean(found[6:]) > 7 > 4 > statistics.fmean(found[:6])  # chance is 1.4, the most is 10


def test_attack_scores_by_hand():
    members, others = [4.0, 3.0, 1.0], [2.0, 1.0]
    assert auc(members, others) == pytest.approx((2 + 2 + 0.5) / 6)
    assert [tpr_at(members, others, fpr) for fpr in (0.0, 0.49, 0.5, 1.0)] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1])


@given(SCORES, SCORES)
def test_auc_is_the_area_under_the_roc_and_mann_whitney(members, others):
    x, y = roc(members, others)
    area = sum((b - a) * (c + d) / 2 for a, b, c, d in zip(x, x[1:], y, y[1:], strict=False))
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert auc(members, others) == pytest.approx(area)
    assert auc(members, others) == pytest.approx(mannwhitneyu(members, others).statistic / len(members) / len(others))
    assert auc(members, others) == pytest.approx(1 - auc(others, members))


def test_interval_holds_the_value_and_shrinks_with_more_texts():
    rng = random.Random(0)
    widths = []
    for count in (20, 320):
        members, others = ([rng.gauss(mean, 1) for _ in range(count)] for mean in (1, 0))
        low, high = auc_interval(members, others, resamples=100)
        assert low < auc(members, others) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize("score", [auc, roc, lambda m, o: tpr_at(m, o, 0.1)])
def test_attack_without_members_or_others_is_refused(score):
    for members, others in (([], [1.0]), ([1.0], [])):
        with pytest.raises(ValueError, match="members and others"):
            score(members, others)


def test_losses_do_not_depend_on_the_texts_beside():
    model = tiny_model("llama-gqa-tied")
    texts = [random_ids(3 + n % 9, seed=n)[0].tolist() for n in range(20)]
    rows = [torch.tensor([text]) for text in texts]
    alone = torch.stack([model(input_ids=row, labels=row).loss.detach() for row in rows])
    torch.testing.assert_close(text_losses(model, texts), alone)
    with pytest.raises(ValueError, match="at least two tokens"):
        text_losses(model, [[1, 2], [3]])

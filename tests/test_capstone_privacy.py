"""DP-SGD and its accountant, the timing channel of a shared cache, redaction."""

import io
import logging
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import random_ids, tiny_model
from torch.nn.functional import cross_entropy, linear

from labutils.capstone.private_training import (
    PrivatePlan,
    clipped_noisy_gradient,
    epsilon,
    fit_privately,
    renyi_divergence,
)
from labutils.capstone.redaction import RedactingFormatter, find_values, passes_luhn, redact
from labutils.capstone.timing_channel import hashes_behind, probe
from labutils.lab.data import service
from labutils.lab.data.service_grammar import VALUES
from labutils.lab.data.service_labels import entities
from labutils.lab.models.served import paged_llama
from labutils.serving.blocks import chained_hashes
from labutils.serving.engine import Engine


def test_noisy_gradient_by_hand():
    gradients = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    found = clipped_noisy_gradient(gradients, torch.tensor([1.0, -1.0]), clip=1.0, sigma=0.5, expected=4.0)
    torch.testing.assert_close(found, torch.tensor([(0.6 + 0.3 + 0.5) / 4, (0.8 + 0.4 - 0.5) / 4]))
    empty = clipped_noisy_gradient(torch.zeros(0, 2), torch.ones(2), clip=2.0, sigma=1.5, expected=3.0)
    torch.testing.assert_close(empty, torch.ones(2))


@given(st.integers(0, 99), st.floats(0.1, 5))
def test_one_example_moves_the_sum_by_at_most_the_clip(seed, clip):
    gradients = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    settings = {"clip": clip, "sigma": 0.0, "expected": 1.0}
    whole, without = (clipped_noisy_gradient(g, torch.zeros(4), **settings) for g in (gradients, gradients[1:]))
    assert (whole - without).norm() <= clip * (1 + 1e-5)


@pytest.mark.parametrize(("clip", "sigma", "expected"), [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, 0.0)])
def test_bad_step_is_refused(clip, sigma, expected):
    with pytest.raises(ValueError, match="clip and expected must be above 0"):
        clipped_noisy_gradient(torch.zeros(1, 1), torch.zeros(1), clip=clip, sigma=sigma, expected=expected)


def examples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(12, 5, generator=generator), torch.randint(3, (12,), generator=generator)


def gradients_of(weight, x, y):
    """One row an example, by autograd of one example at a time."""
    one = torch.func.grad(lambda w, a, b: cross_entropy(linear(a[None], w), b[None]))
    return torch.func.vmap(one, in_dims=(None, 0, 0))(weight, x, y).flatten(1)


def test_training_equals_clipped_gradients_made_one_by_one():
    x, y = examples()
    plan = PrivatePlan(steps=4, sample_rate=0.5, sigma=0.7, clip=0.8, lr=0.9)
    ours = fit_privately(x, y, classes=3, plan=plan, generator=torch.Generator().manual_seed(1))
    weight, generator = torch.zeros(3, 5), torch.Generator().manual_seed(1)
    for _ in range(4):
        drawn = torch.rand(12, generator=generator) < 0.5
        noise = torch.randn(3, 5, generator=generator).flatten()
        rows = gradients_of(weight, x[drawn], y[drawn])
        weight = weight - 0.9 * clipped_noisy_gradient(rows, noise, clip=0.8, sigma=0.7, expected=6.0).view(3, 5)
    torch.testing.assert_close(ours, weight)


def test_without_noise_and_clipping_it_is_gradient_descent():
    x, y = examples(2)
    plan = PrivatePlan(steps=3, sample_rate=1.0, sigma=0.0, clip=1e6, lr=0.1)
    weight = torch.zeros(3, 5, requires_grad=True)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(cross_entropy(linear(x, weight), y), weight)
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
    ours = fit_privately(x, y, classes=3, plan=plan, generator=torch.Generator())
    torch.testing.assert_close(ours, weight.detach())


@pytest.mark.parametrize(("q", "sigma"), [(0.1, 1.0), (0.5, 2.0), (0.01, 0.7)])
def test_order_two_by_hand(q, sigma):
    assert renyi_divergence(q, sigma, 2) == pytest.approx(math.log1p(q**2 * math.expm1(1 / sigma**2)))


def test_whole_batches_are_the_plain_gaussian_and_tiny_ones_tend_to_nothing():
    assert renyi_divergence(1.0, 1.5, 8) == pytest.approx(renyi_divergence(1 - 1e-12, 1.5, 8)) == 8 / 4.5
    assert renyi_divergence(1e-9, 1.5, 8) == pytest.approx(0, abs=1e-12)


def test_epsilon_grows_with_steps_and_falls_with_noise():
    values = [epsilon(0.05, 1.0, steps, delta=1e-5)[0] for steps in (10, 100, 1000)]
    assert values == sorted(values) and values[0] < values[-1]
    noisy = [epsilon(0.05, sigma, 100, delta=1e-5)[0] for sigma in (0.6, 1.2, 2.4)]
    assert noisy == sorted(noisy, reverse=True)


@pytest.mark.parametrize("values", [(-0.1, 1.0, 2), (1.1, 1.0, 2), (0.5, 0.0, 2), (0.5, 1.0, 1)])
def test_bad_mechanism_is_refused(values):
    with pytest.raises(ValueError, match="are needed; got"):
        renyi_divergence(*values)
    with pytest.raises(ValueError, match="delta must lie between 0 and 1; got 0"):
        epsilon(0.1, 1.0, 1, delta=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mechanism", [(0.01, 1.0, 1000, 1e-5), (0.1, 1.0, 60, 1e-5), (0.05, 0.5, 100, 1e-4), (1.0, 3.0, 10, 1e-6)]
)
@pytest.mark.filterwarnings("ignore")
def test_epsilon_is_that_of_opacus(library_aside, mechanism):
    library_aside("opt_einsum")
    rdp = library_aside("opacus.accountants.analysis.rdp")
    q, sigma, steps, delta = mechanism
    orders = list(range(2, 257))
    spent = rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
    theirs = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
    assert epsilon(q, sigma, steps, delta=delta) == (pytest.approx(theirs[0], rel=1e-9), theirs[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_step_is_that_of_opacus_with_the_same_noise(library_aside, monkeypatch):
    library_aside("opt_einsum")
    optimizer_module = library_aside("opacus.optimizers.optimizer")
    wrapped = library_aside("opacus.grad_sample").GradSampleModule
    x, y = examples(4)
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(9))
    monkeypatch.setattr(optimizer_module, "_generate_noise", lambda std, **_: std * noise)
    model = wrapped(torch.nn.Linear(5, 3, bias=False))
    torch.nn.init.zeros_(model._module.weight)
    optimizer = optimizer_module.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5), noise_multiplier=0.7, max_grad_norm=0.8, expected_batch_size=10
    )
    cross_entropy(model(x), y).backward()
    optimizer.step()
    rows = gradients_of(torch.zeros(3, 5), x, y)
    ours = -0.5 * clipped_noisy_gradient(rows, noise.flatten(), clip=0.8, sigma=0.7, expected=10.0).view(3, 5)
    torch.testing.assert_close(model._module.weight.detach(), ours, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 20), st.integers(0, 99))
def test_salt_behind_the_public_part_parts_exactly_what_follows_it(public, seed):
    text = random.Random(seed).choices(range(9), k=20)
    mine, yours = (hashes_behind(text, 3, salt=salt, public=public) for salt in ("ada", "bob"))
    shared = min(public // 3, 5)
    assert [a == b for a, b in zip(mine, yours, strict=True)] == [i < shared for i in range(6)]
    assert mine[:shared] == chained_hashes(text, 3)[:shared]
    answers = [chained_hashes([*text, 1, 2, 3, 4], 3, known=known) for known in (mine, yours)]  # as the scheduler does
    assert not set(answers[0][shared:]) & set(answers[1][shared:])


def test_salt_enters_the_chain_for_good():
    assert hashes_behind([1, 2, 3, 4], 2, salt="", public=0) == chained_hashes([1, 2, 3, 4], 2)
    assert len(set(hashes_behind([1] * 8, 2, salt="ada", public=2))) == 4
    with pytest.raises(ValueError, match="public must lie between 0 and 2 tokens; got 3"):
        hashes_behind([1, 2], 2, salt="", public=3)


def test_cache_tells_what_was_asked_and_a_salt_does_not():
    model = tiny_model("llama-gqa-tied")
    system, asked, other = (random_ids(count, seed=count)[0].tolist() for count in (8, 13, 14))

    def cached(victim, attacker):
        engine = Engine(paged_llama(model, positions=256, block_size=4))
        probe(engine, system + asked, **victim)
        return [probe(engine, system + text, **attacker)[1] for text in (asked, other)]

    assert cached({}, {}) == [20, 8]
    assert cached({"salt": "ada"}, {"salt": "eve"}) == [0, 8]  # the 8 are the attacker's own
    split = [{"salt": salt, "public": 8} for salt in ("ada", "eve")]
    assert cached(*split) == [8, 8]
    assert cached(split[0], split[0]) == [20, 8]


def test_probe_takes_its_time_from_the_engine():
    engine = Engine(paged_llama(tiny_model("llama-gqa-tied"), positions=64, block_size=4))
    ticks = iter(range(100))
    engine.clock = lambda: float(next(ticks))
    assert probe(engine, [1, 2, 3, 4, 5]) == (2.0, 0)  # submitted at 0, scheduled at 1, done at 2


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Mail anna.b@shop.example!", "Mail [email]!"),
        ("订单A12345已出库，电话555-0142。", "订单[order_id]已出库，电话[phone]。"),
        ("parcel TR12345678, order Z00001", "parcel [tracking], order [order_id]"),
        ("4111-1111-1111-1111 2 items", "[card] 2 items"),
        ("3782 822463 10005 and 4111111111111112", "[card] and 4111111111111112"),
        ("AB12345 A123456 A1234 XTR12345678", "AB12345 A123456 A1234 XTR12345678"),
        ("Anna, Annabel and Wang Fang", "[name], Annabel and [name]"),
        ("我是王芳。", "我是[name]。"),
    ],
)
def test_redaction_by_hand(text, clean):
    names = ["Anna", "Wang Fang", "Wang", "王芳"]
    assert redact(text, names=names) == clean
    assert redact(clean, names=names) == clean


@given(st.text(alphabet="A1T5R@.-[] 4订", max_size=60))
def test_redacting_twice_is_redacting_once(text):
    assert redact(redact(text)) == redact(text)


@given(st.integers(0, 10**14 - 1), st.integers(0, 14), st.integers(1, 9))
def test_check_digit_finds_every_single_wrong_digit(number, place, step):
    body = f"{number:014d}"
    (check,) = [d for d in range(10) if passes_luhn(f"{body}{d}")]
    right = f"{body}{check}"
    wrong = right[:place] + str((int(right[place]) + step) % 10) + right[place + 1 :]
    assert passes_luhn(right) and not passes_luhn(wrong)
    assert not passes_luhn("")


@pytest.mark.parametrize("language", service.LANGUAGES)
def test_every_number_and_listed_name_of_the_corpus_is_found(language):
    names = [pair[service.LANGUAGES.index(language)] for pair in VALUES["name"]]
    personal = {"order_id", "other_order", "tracking", "phone", "name", "recipient"}
    rng = random.Random(0)
    for _ in range(200):
        query = service.sample_query(rng, "train")
        text = query.text(language)
        wanted = {span[:2] for span in entities(query, language) if span.label in personal}
        assert wanted == {found[:2] for found in find_values(text, names=names)}, text


def test_formatter_cleans_one_handler_and_leaves_the_record_to_others():
    clean, raw = io.StringIO(), io.StringIO()
    parent, logger = (logging.getLogger(name) for name in ("test_redaction", "test_redaction.below"))
    parent.handlers, parent.propagate = [logging.StreamHandler(clean), logging.StreamHandler(raw)], False
    parent.handlers[0].setFormatter(RedactingFormatter("%(levelname)s %(message)s", names=["Anna"]))
    logger.warning("order %s of %s", "A12345", "Anna")
    try:
        raise ValueError("no order A12345")
    except ValueError:
        logger.exception("failed for %(who)s", {"who": "Anna"})
    lines = clean.getvalue().splitlines()
    assert lines[:2] == ["WARNING order [order_id] of [name]", "ERROR failed for [name]"]
    assert lines[-1] == "ValueError: no order [order_id]" and "A12345" not in clean.getvalue()
    assert raw.getvalue().startswith("order A12345 of Anna\nfailed for Anna\nTraceback")

"""Checks of chapter 01: attention, prefill and decode, the KV cache, and honest timing."""

import statistics
from functools import partial

import torch

from labutils.course.checks import cases_of, exercise, expect_close, expect_function, expect_true
from labutils.course.checks.passes import Watch, generation_cases, watched
from labutils.generation.cache import KVCache
from labutils.generation.decode import decode_one_token, forward_logits, generate_cached, prefill
from labutils.lab.language import translated

NEW_TOKENS = 8


def _recurrent(query, key, value, *, late=False, forgets=False, turned=False, scale=1.0):
    """Linear attention token by token, with one thing at a time gone wrong."""
    state, rows = torch.zeros(key.shape[1], value.shape[1]), []
    for q, k, v in zip(query, key, value, strict=True):
        before, new = state, torch.outer(v, k) if turned else torch.outer(k, v)
        state = new if forgets else state + new
        rows.append(q @ (before if late else state) * scale)
    return torch.stack(rows), state


@exercise("1.1")
def linear_attention(answer):
    """Outputs and last state of linear attention."""
    make = torch.Generator().manual_seed(0)
    expect_function(
        answer,
        _recurrent,
        cases=cases_of("query key value", *(torch.randn(3, n, 4, generator=make) for n in (3, 6))),
        rtol=1e-4,
        atol=1e-5,
        mistakes=[
            (partial(_recurrent, late=True), "a token must see itself: add its key and value to the state, then read"),
            (partial(_recurrent, forgets=True), "the state holds the newest token only: add to it"),
            (partial(_recurrent, turned=True), "the outer product is turned round: torch.outer(key, value)"),
            (partial(_recurrent, scale=0.5), "nothing is divided here: the formula has neither softmax nor scale"),
            (lambda query, key, value: (query @ (key.T @ value), key.T @ value), "a row reads the state as it was"),
            (lambda **case: _recurrent(**case)[::-1], "the order is (outputs, state)"),
            (lambda **case: _recurrent(**case)[0], "return the outputs and the last state"),
        ],
    )


def _attention(query, key, value, *, scale=lambda d: d**0.5, dim=1, diagonal=1, filler=-torch.inf):
    """Attention with one thing at a time gone wrong; `diagonal` is where the mask begins."""
    scores = query @ key.T / scale(query.shape[1])
    future = torch.ones_like(scores).triu(diagonal).bool()
    return scores.masked_fill(future, filler).softmax(dim=dim) @ value


def _masked_too_late(query, key, value):
    return (query @ key.T / query.shape[1] ** 0.5).softmax(dim=1).tril() @ value


@exercise("1.2")
def causal_attention(answer):
    """Equal to PyTorch's own."""
    make = torch.Generator().manual_seed(0)
    cases = cases_of("query key value", *(torch.randn(3, n, 8, generator=make) for n in (4, 7)))
    expect_function(
        answer,
        partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True),
        cases=cases,
        rtol=1e-4,
        atol=1e-5,
        mistakes=[
            (partial(_attention, diagonal=10**6), "the mask is missing: position i must not see keys after i"),
            (partial(_attention, scale=lambda d: 1), "the scale is missing: divide by the square root of head_dim"),
            (partial(_attention, scale=lambda d: d), "you divided by head_dim: divide by its square root"),
            (_masked_too_late, "masked after the softmax, the rows no longer sum to 1: mask the scores before"),
            (partial(_attention, filler=0.0), "a score of 0 is no mask, for exp(0) is 1: fill with minus infinity"),
            (partial(_attention, dim=0), "softmax over the wrong axis: a query shares itself out over the keys, dim=1"),
            (partial(_attention, diagonal=0), "a token must see itself: mask from the first diagonal above, triu(1)"),
        ],
    )
    own = torch.nn.functional.scaled_dot_product_attention
    with Watch(lambda function, _: function is own) as watch:
        answer(**cases[0])
    expect_true(
        not watch.called,
        "the answer calls PyTorch's own attention",
        hint="write the steps yourself: scores, scale, mask, softmax, values",
    )


def _transformers(model, token_ids, new_tokens):
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": [], "pad_token_id": 0}  # no early end
    return model.generate(token_ids, attention_mask=torch.ones_like(token_ids), **settings)


def _loop(model, token_ids, new_tokens, *, place=-1, pick=torch.argmax, last_only=False, stuck=False):
    """The naive loop, with one thing at a time gone wrong."""
    text = token_ids
    for _ in range(new_tokens):
        seen = token_ids if stuck else text
        logits = forward_logits(model, seen[:, -1:] if last_only else seen)
        text = torch.cat([text, pick(logits[:, place], dim=-1)[:, None]], dim=1)
    return text


def _naive_passes(model, token_ids, new_tokens):
    """The tokens of transformers' `generate`, and what each pass of the naive loop reads."""
    case = {"model": model, "token_ids": token_ids, "new_tokens": new_tokens}
    return _transformers(**case).tolist(), *watched(_loop, **case)[1:]


@exercise("1.4")
def greedy_naive(answer, model, token_ids):
    """The tokens of transformers' generate, and the whole text in every pass."""

    def wrong(**settings):
        return partial(watched, partial(_loop, **settings))

    def without_prompt(model, token_ids, new_tokens):
        return _loop(model, token_ids, new_tokens)[:, -new_tokens:]

    def short(model, token_ids, new_tokens):
        return _loop(model, token_ids, new_tokens - 1)

    expect_function(
        partial(watched, answer),
        _naive_passes,
        cases=generation_cases(model, token_ids, new_tokens=NEW_TOKENS),
        mistakes=[
            (partial(watched, without_prompt), "only the new tokens came back: return the prompt too"),
            (wrong(place=0), "those are the logits after the first token: take the last, logits[:, -1:]"),
            (wrong(last_only=True), "the model saw only the last token: hand it the whole text every time"),
            (wrong(stuck=True), "the same token every time: hand the longer text to the model next time"),
            (wrong(pick=torch.argmin), "that is the least likely token: take argmax"),
            (partial(watched, short), "one token too few: the loop runs new_tokens times"),
            (
                partial(watched, generate_cached),
                "the right tokens, but from a cache (`generate` has one too): here every pass reads the whole text",
            ),
        ],
    )


def _joined(updates, *, dim=2, newest_first=False):
    """What a cache returns after each update."""
    results = [updates[0]]
    for new in updates[1:]:
        pairs = zip(results[-1], new, strict=True)
        results.append(tuple(torch.cat([n, o] if newest_first else [o, n], dim=dim) for o, n in pairs))
    return results


def _forgetful(updates):
    return [updates[0], *(_joined([updates[0], new])[1] for new in updates[1:])]


class _PluggedIn(KVCache):
    """A learner's cache of one layer, one for each layer of a model."""

    def __init__(self, layer_cache):
        super().__init__()
        self.layer_cache, self.layers = layer_cache, []

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if layer_idx == len(self.layers):
            self.layers.append(self.layer_cache())
            self.keys.append(keys)
        self.keys[layer_idx], values = self.layers[layer_idx].update(keys, values)
        return self.keys[layer_idx], values


@exercise("1.5")
def layer_cache(answer, model, token_ids):
    """All keys and values come back, and LabLM computes the same logits with it."""
    make = torch.Generator().manual_seed(0)
    updates = [tuple(torch.randn(2, 1, 2, n, 4, generator=make)) for n in (3, 1, 1)]

    def drive(updates):
        cache, other = answer(), answer()
        other.update(*updates[1])  # another layer's: the two must not share anything
        return [cache.update(keys, values) for keys, values in updates]

    expect_function(
        drive,
        _joined,
        cases=[{"updates": updates}],
        mistakes=[
            (lambda updates: updates, "only the new ones came back: return everything that is stored"),
            (_forgetful, "the longer tensors were returned but not stored: assign them to self.keys and self.values"),
            (lambda updates: _joined(updates, newest_first=True), "the old come first: torch.cat([self.keys, keys])"),
            (lambda updates: _joined(updates, dim=1), "dim 1 holds the heads: positions are dim 2"),
            (lambda updates: [(keys, keys) for keys, _ in _joined(updates)], "the values are copies of the keys"),
            (lambda updates: _joined([updates[1], *updates])[1:], "two layers share one store: make it in __init__"),
        ],
    )
    cache = _PluggedIn(answer)
    logits = [prefill(model, token_ids[:, :4], cache)]
    logits += [decode_one_token(model, token_ids[:, i], cache) for i in range(4, token_ids.shape[1])]
    given = translated("LabLM with your cache in every layer, {count} tokens", count=token_ids.shape[1])
    expect_close(torch.cat(logits), forward_logits(model, token_ids)[0, 3:], given=given, rtol=0.0, atol=1e-4)


def _cached_loop(model, token_ids, new_tokens, *, anew=False, whole=False, twice=False, apart=False, extra=0):
    """The cached loop, with one thing at a time gone wrong."""
    cache, text = KVCache(), token_ids
    logits = prefill(model, text[:, :-1] if apart else text, cache)
    if apart:
        logits = decode_one_token(model, text[:, -1], cache)
    if twice:
        logits = decode_one_token(model, text[:, -1], cache)
    for _ in range(new_tokens - 1 + extra):
        text = torch.cat([text, logits.argmax(dim=-1)[:, None]], dim=1)
        cache = KVCache() if anew else cache
        logits = prefill(model, text if whole else text[:, -1:], cache)
    return text if extra else torch.cat([text, logits.argmax(dim=-1)[:, None]], dim=1)


@exercise("1.6")
def greedy_cached(answer, model, token_ids):
    """The naive tokens, every position read once."""

    def wrong(**settings):
        return partial(watched, partial(_cached_loop, **settings))

    expect_function(
        partial(watched, answer),
        partial(watched, generate_cached),
        cases=generation_cases(model, token_ids, new_tokens=NEW_TOKENS),
        mistakes=[
            (wrong(whole=True, anew=True), "every pass read the whole text: keep one cache, feed only the new token"),
            (wrong(whole=True), "the whole text went into a cache that holds it already: feed only the new token"),
            (wrong(extra=1), "one pass too many: the last token is chosen, nobody needs the logits after it"),
            (wrong(twice=True), "the prompt's last token was read twice: prefill gives the first new token already"),
            (wrong(apart=True), "the prompt's last token needs no pass of its own: prefill the whole prompt"),
            (wrong(anew=True), "a new cache for every token forgets the text: make one before the loop"),
        ],
    )


class _Machine:
    """A simulated machine: it queues work, is slow at first, slows down midway, and has two odd calls."""

    WARMUP, ROUNDS, SLOWER_FROM = 3, 7, 11
    ODD = {7: 0.05, 12: 50.0}

    def __init__(self):
        self.now = self.queued = 0.0
        self.calls, self.own_calls = 0, {"baseline": 0, "candidate": 0}

    def _call(self, name, *, seconds, launch_s, setup_s):
        cost = seconds * (2 if self.calls >= self.SLOWER_FROM else 1) * self.ODD.get(self.calls, 1)
        cost += setup_s if self.own_calls[name] < self.WARMUP else 0
        self.own_calls[name] += 1
        self.calls += 1
        self.now += launch_s
        self.queued += max(cost - launch_s, 0)

    def wait(self):
        self.now, self.queued = self.now + self.queued, 0.0

    def clock(self):
        return self.now

    def ask(self, answer):
        baseline = partial(self._call, "baseline", seconds=2.0, launch_s=0.03, setup_s=20.0)
        candidate = partial(self._call, "candidate", seconds=1.0, launch_s=0.01, setup_s=90.0)
        return answer(baseline, candidate, self.WARMUP, self.ROUNDS, self.wait, self.clock)


def _timed(*, warm=True, blocks=False, statistic=statistics.median, waits=True):
    def speedup(baseline, candidate, warmup, rounds, wait, clock):
        functions, samples = (baseline, candidate), ([], [])
        wait = wait if waits else lambda: None
        for i in [0, 1] * (warmup if warm else 0):
            functions[i]()
        for i in [0] * rounds + [1] * rounds if blocks else [0, 1] * rounds:
            wait()
            start = clock()
            functions[i]()
            wait()
            samples[i].append(clock() - start)
        return statistic(samples[0]) / statistic(samples[1])

    return speedup


@exercise("1.9")
def speedup(answer):
    """2.0 on a machine that does its best to mislead."""
    given = "a simulated machine: queued work, slow first calls, half the speed from call 11 on, two odd calls"
    wrong = [
        ({"waits": False}, "you timed the launch: call wait() before you read the clock, at the start and at the end"),
        ({"warm": False}, "set-up is inside the timed region: call each function `warmup` times untimed"),
        ({"blocks": True}, "the machine slowed down between the two: time one call of each in every round"),
        ({"statistic": statistics.mean}, "one disturbed call drags the mean along: take the median"),
        ({"statistic": min}, "the fastest call is the luckiest: take the median"),
    ]
    mistakes = [(lambda s=settings: _Machine().ask(_timed(**s)), hint) for settings, hint in wrong]
    mistakes.append((0.5, "upside down: how many times as fast is baseline time over candidate time"))
    hint = "for each sample: wait(), clock(), one call, wait(), clock()"
    expect_close(_Machine().ask(answer), 2.0, given=given, rtol=0.03, mistakes=mistakes, hint=hint)

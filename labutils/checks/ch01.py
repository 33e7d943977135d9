"""Checks of chapter 01: operations, attention, prefill and decode, the KV cache, intensity, and honest timing."""

import statistics
from functools import partial

import torch

from labutils.checks import cases_of, exercise, expect_close, expect_function
from labutils.checks.passes import generation_cases, watched
from labutils.generation.cache import KVCache
from labutils.generation.decode import decode_one_token, forward_logits, generate_cached, prefill
from labutils.language import translated

NEW_TOKENS = 8


def _flop(*, lstm=16, projections=8, square=4, linear=0):
    def layer_flop(length, width):
        each = length * width
        return lstm * each * width, projections * each * width + square * each * length + linear * each

    return layer_flop


@exercise("1.1")
def layer_flop(answer):
    """FLOP of an LSTM and an attention layer over a text."""
    expect_function(
        answer,
        _flop(),
        cases=[{"length": 3, "width": 10}, {"length": 1024, "width": 256}],
        mistakes=[
            (_flop(lstm=8, projections=4, square=2), "those are multiplications: each has an addition, so double both"),
            (_flop(lstm=4), "the LSTM has four gates, and you counted one"),
            (_flop(lstm=8), "each gate multiplies the token and the hidden state: the LSTM has 8 products a token"),
            (_flop(square=2), "scores are half of it: the weights also mix the values, again length² times width"),
            (_flop(square=0, linear=4), "every position meets every position: the scores grow with length squared"),
            (_flop(projections=0), "attention's four projections are missing: query, key, value and output"),
            (lambda length, width: _flop()(length, width)[::-1], "the order is (LSTM, attention)"),
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


@exercise("1.3")
def greedy_naive(answer, model, token_ids):
    """The tokens of transformers' generate."""
    expect_function(
        answer,
        _transformers,
        cases=generation_cases(model, token_ids, new_tokens=NEW_TOKENS),
        mistakes=[
            (lambda **case: _loop(**case)[:, -NEW_TOKENS:], "only the new tokens came back: return the prompt too"),
            (partial(_loop, place=0), "those are the logits after the first token: take the last, logits[:, -1:]"),
            (partial(_loop, last_only=True), "the model saw only the last token: hand it the whole text every time"),
            (partial(_loop, stuck=True), "the same token every time: hand the longer text to the model next time"),
            (partial(_loop, pick=torch.argmin), "that is the least likely token: take argmax"),
            (lambda **case: _loop(**case)[:, :-1], "one token too few: the loop runs new_tokens times"),
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


@exercise("1.4")
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


def _cached_loop(model, token_ids, new_tokens, *, anew=False, whole=False, twice=False, extra=0):
    """The cached loop, with one thing at a time gone wrong."""
    cache, text = KVCache(), token_ids
    logits = prefill(model, text, cache)
    if twice:
        logits = decode_one_token(model, text[:, -1], cache)
    for _ in range(new_tokens - 1 + extra):
        text = torch.cat([text, logits.argmax(dim=-1)[:, None]], dim=1)
        cache = KVCache() if anew else cache
        logits = prefill(model, text if whole else text[:, -1:], cache)
    return text if extra else torch.cat([text, logits.argmax(dim=-1)[:, None]], dim=1)


@exercise("1.5")
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
            (wrong(anew=True), "a new cache for every token forgets the text: make one before the loop"),
        ],
    )


def _cache_bytes(layers, heads, kv_heads, head_dim, positions, element_bytes):
    return 2 * layers * kv_heads * head_dim * positions * element_bytes


@exercise("1.6")
def kv_cache_bytes(answer):
    """Keys and values of the KV heads, in bytes."""
    names = "layers heads kv_heads head_dim positions element_bytes"
    expect_function(
        answer,
        _cache_bytes,
        cases=cases_of(names, (80, 64, 8, 128, 4096, 2), (6, 4, 2, 64, 100, 4)),
        mistakes=[
            (lambda **shape: _cache_bytes(**{**shape, "kv_heads": shape["heads"]}), "count kv_heads, not heads"),
            (lambda **shape: _cache_bytes(**shape) // 2, "half of it is missing: keys and values are both stored"),
            (lambda **shape: _cache_bytes(**shape) * 8, "those are bits: element_bytes is in bytes already"),
            (lambda **shape: _cache_bytes(**shape) // shape["layers"], "that is one layer: every layer has its own"),
            (lambda **shape: _cache_bytes(**{**shape, "element_bytes": 1}), "each number takes element_bytes bytes"),
        ],
    )


def _intensity(parameters, tokens, bytes_per_parameter, cache_bytes, reads=1):
    return 2 * parameters * tokens / (reads * parameters * bytes_per_parameter + cache_bytes)


@exercise("1.7")
def flop_per_byte(answer):
    """2 FLOP a parameter and token, each parameter read once."""
    names = "parameters tokens bytes_per_parameter cache_bytes"
    expect_function(
        answer,
        _intensity,
        cases=cases_of(names, (7e9, 1, 2, 2e9), (5.8e6, 256, 4, 1.5e6)),
        mistakes=[
            (lambda **case: _intensity(**case) / 2, "each parameter multiplies and adds: 2 FLOP a parameter and token"),
            (lambda **case: _intensity(**case, reads=case["tokens"]), "weights are read once a pass, not once a token"),
            (lambda **case: 1 / _intensity(**case), "upside down: those are bytes per FLOP"),
            (lambda **case: _intensity(**{**case, "tokens": 1}), "that is one token: the pass does all of them"),
            (lambda **case: _intensity(**{**case, "cache_bytes": 0}), "the cache is read too: add cache_bytes"),
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


@exercise("1.8")
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

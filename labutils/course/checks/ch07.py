"""Checks of chapter 07, first half: programs, the static cache, buckets, scan, break-even, and the compiler's FLOP."""

from functools import partial

import numpy as np

from labutils.course.checks import CheckFailed, cases_of, exercise, expect_function, expect_raises, expect_true
from labutils.xla import generate, hlo
from labutils.xla.lazy import jax, jnp


def _keys(calls, *, parts=(0, 1, 2)):
    return len({tuple(call[part] for part in parts) for call in calls})


def _changes(calls):
    return 1 + sum(left != right for left, right in zip(calls[:-1], calls[1:], strict=True))


@exercise("7.1")
def programs(answer):
    """As many programs as different keys: shape, dtype, static argument."""
    four, eight, whole = ((4,), "float32", 1), ((8,), "float32", 1), ((4,), "int32", 1)
    first = [four, eight, four, four, whole, ((8,), "float32", 2)]
    second = [*first, ((8, 1), "float32", 1), ((4,), "float32", 1), ((8,), "float32", 3), ((4,), "int32", 3)]
    expect_function(
        answer,
        _keys,
        cases=[{"calls": first}, {"calls": second}],
        mistakes=[
            (
                lambda calls: len(calls),
                "a call whose shapes were there before finds its program: count the different ones",
            ),
            (partial(_keys, parts=(0, 2)), "the dtype is part of the key: int32 and float32 need two programs"),
            (
                partial(_keys, parts=(0, 1)),
                "a static argument's value is built into the program: it is part of the key",
            ),
            (partial(_keys, parts=(0,)), "the shape alone is not the key: dtype and static argument belong to it"),
            (_changes, "jit keeps all its programs, not only the last: going back to an old shape compiles nothing"),
        ],
    )


TRACED = "Python asked for the value of `position` while JAX traced"


def _compiled(attention, query, keys, values, position):
    """Runs the answer as XLA would: compiled, with the position traced."""
    try:
        return np.asarray(jax.jit(attention)(query, keys, values, position))
    except (IndexError, TypeError, jax.errors.JAXTypeError) as error:
        if "trace" in str(error).lower() or "static" in str(error).lower():
            raise ValueError(TRACED) from None
        raise


def _attention(query, keys, values, position, *, scale=0.5, hide=lambda at, now: at > now, filler=-np.inf, late=False):
    scores = keys @ query * query.shape[0] ** -scale
    hidden = hide(np.arange(len(keys)), position)
    shares = _softmax(scores) if late else _softmax(np.where(hidden, filler, scores))
    return (np.where(hidden, 0, shares) if late else shares) @ values


def _softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def _asks_for_the_value(**_):
    raise ValueError(TRACED)


@exercise("7.2")
def cached_attention(answer):
    """Compiled once, right at every position."""
    numbers = np.random.default_rng(0)
    query, (keys, values) = numbers.normal(size=8), numbers.normal(size=(2, 12, 8))
    case = {"query": query, "keys": keys, "values": values}
    cases = [{n: np.float32(a) for n, a in case.items()} | {"position": np.int32(at)} for at in (5, 0, 11)]
    expect_function(
        partial(_compiled, answer),
        _attention,
        cases=cases,
        rtol=1e-4,
        atol=1e-5,
        mistakes=[
            (
                _asks_for_the_value,
                "a shape cannot depend on a traced value: keep the whole cache, and hide with a mask",
            ),
            (partial(_attention, hide=lambda at, now: at > 10**6), "the empty positions take part: mask them"),
            (partial(_attention, hide=lambda at, now: at >= now), "a token must see itself: visible is <= position"),
            (
                partial(_attention, hide=lambda at, now: at < now),
                "turned round: what lies before is visible, not after",
            ),
            (
                partial(_attention, late=True),
                "masked after the softmax, the attention weights no longer sum to 1: mask the scores",
            ),
            (partial(_attention, filler=0.0), "a score of 0 is no mask, for exp(0) is 1: use minus infinity"),
            (partial(_attention, scale=0), "the scale is missing: divide by the square root of head_dim"),
        ],
    )


@exercise("7.3")
def bucket_for(answer):
    """The smallest bucket that holds the text."""
    lengths, buckets = (17, 16, 1, 64, 40, 200), (64, 16, 256, 32)
    expect_function(
        answer,
        generate.bucket_for,
        cases=[{"length": length, "buckets": buckets} for length in lengths],
        mistakes=[
            (
                lambda length, buckets: min(b for b in buckets if b > length),
                "a text as long as the bucket fits: use >=",
            ),
            (
                lambda length, buckets: next(b for b in buckets if b >= length),
                "the buckets need not be sorted: take the smallest that holds the text, not the first",
            ),
            (lambda length, buckets: max(buckets), "always the largest: most of the work would be padding"),
            (
                lambda length, buckets: min(buckets, key=lambda b: abs(b - length)),
                "the nearest may be too short, and would cut the text off: only buckets of at least its length",
            ),
        ],
    )
    hint = "a text that no bucket holds must be refused with ValueError, never cut off"
    expect_raises(answer, ValueError, hint=hint, length=300, buckets=buckets)


def _toy(token, cache, position):
    """A model of ten tokens whose answer depends on all three."""
    return jax.nn.one_hot((token + position + 3 * cache) % 10, 10), cache + 1


def _loop(step, cache, token, position, new_tokens, *, moves=1, keeps=True, echo=False, extra=0):
    tokens = []
    for _ in range(new_tokens + extra):
        fed = token
        logits, new_cache = step(token, cache, position)
        token, position = jnp.argmax(logits).astype(jnp.int32), position + moves
        cache = new_cache if keeps else cache
        tokens.append(int(fed if echo else token))
    return np.array(tokens)


@exercise("7.4")
def decode_scan(answer):
    """The tokens of the Python loop, from one program whose size does not depend on their number."""

    def run(step, **case):
        return np.asarray(answer(step, **case))

    def program_lines(new_tokens):
        program = jax.jit(lambda cache, token, at: answer(_toy, cache, token, at, new_tokens))
        return len(program.lower(jnp.int32(4), jnp.int32(2), jnp.int32(3)).as_text().splitlines())

    start = {"step": _toy, "cache": jnp.int32(4), "token": jnp.int32(2), "position": jnp.int32(3), "new_tokens": 9}
    expect_function(
        run,
        _loop,
        cases=[start, start | {"token": jnp.int32(7), "new_tokens": 12}],
        mistakes=[
            (partial(_loop, echo=True), "those are the tokens that were fed: give out the one chosen in this step"),
            (partial(_loop, moves=0), "the position stands still: carry position + 1 on"),
            (partial(_loop, keeps=False), "the cache is forgotten: carry on the one that the step returned"),
            (partial(_loop, extra=-1), "one token too few: the scan's length is new_tokens"),
            (lambda **case: _loop(**case)[-1:], "only the last token: scan stacks what the body returns second"),
        ],
    )
    hint = "lax.scan traces its body once: put the loop into lax.scan(body, …)"
    try:
        short, long = program_lines(8), program_lines(64)
    except jax.errors.JAXTypeError:
        raise CheckFailed("Python asked for a token's value, so this cannot be one program", hint=hint) from None
    expect_true(long == short, f"the program has {short} lines for 8 tokens and {long} for 64", hint=hint)


@exercise("7.5")
def break_even_tokens(answer):
    """Compile time over time saved a token."""
    names = "compile_s slow_token_s fast_token_s"

    def saved(slow_token_s, fast_token_s):
        return slow_token_s - fast_token_s

    def unguarded(compile_s, slow_token_s, fast_token_s):
        return compile_s / saved(slow_token_s, fast_token_s) if slow_token_s >= fast_token_s else float("inf")

    expect_function(
        answer,
        hlo.break_even_tokens,
        cases=cases_of(
            names, (3.0, 0.02, 0.005), (0.8, 0.004, 0.003), (2.0, 0.01, 0.03), (1.0, 0.01, 0.003), (1.0, 0.01, 0.01)
        ),
        mistakes=[
            (unguarded, "equal speed never pays: return float('inf') there, too"),
            (lambda compile_s, **t: compile_s / saved(**t), "slower code never pays: return float('inf') there"),
            (
                lambda compile_s, **t: abs(compile_s / saved(**t)),
                "slower code never pays: the sign of the saving counts",
            ),
            (
                lambda compile_s, slow_token_s, fast_token_s: compile_s / fast_token_s,
                "that many fast tokens fit into the compile time; what counts is the time saved on each, slow - fast",
            ),
            (
                lambda compile_s, slow_token_s, fast_token_s: compile_s / slow_token_s,
                "the compiled code's own time is missing: each token saves slow - fast",
            ),
            (
                lambda compile_s, **t: saved(**t) / compile_s if saved(**t) > 0 else float("inf"),
                "upside down: tokens are the compile time over the time saved a token",
            ),
        ],
    )


@exercise("7.6")
def total_flop(answer):
    """One layer, plus what each further one adds."""
    expect_function(
        answer,
        hlo.total_flop,
        cases=cases_of("one_layer two_layers layers", (5.0e6, 7.0e6, 6), (120.0, 150.0, 3)),
        mistakes=[
            (lambda one_layer, two_layers, layers: one_layer * layers, "the output layer is counted once a layer"),
            (
                lambda one_layer, two_layers, layers: two_layers / 2 * layers,
                "half of two layers holds half an output layer",
            ),
            (
                lambda one_layer, two_layers, layers: one_layer + layers * (two_layers - one_layer),
                "one layer too many: the first is in one_layer already",
            ),
            (
                lambda one_layer, two_layers, layers: layers * (two_layers - one_layer),
                "what stands outside the layers is missing: start from one_layer",
            ),
        ],
    )

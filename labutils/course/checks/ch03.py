"""Checks of chapter 03: flips on purpose, GPTQ, AWQ, LLM.int8, butterfly, KIVI's keys, straight-through gradients."""

from functools import partial

import torch

from labutils.course.checks import cases_of, exercise, expect_function
from labutils.lab.layers import calibration
from labutils.lab.layers.calibration import inverse_factor
from labutils.quantization import awq, gptq, integer_linear, kv_cache
from labutils.quantization.affine import QParams, Scheme, fake_quantize


def _layers(*sizes: int):
    """Random weights with a rounded copy and the Gram matrix of correlated inputs."""
    make = torch.Generator().manual_seed(0)
    for n in sizes:
        weight = torch.randn(3, n, generator=make)
        x = torch.randn(50, n, generator=make) @ torch.randn(n, n, generator=make) * torch.linspace(0.2, 3, n)
        yield weight, fake_quantize(weight, Scheme(bits=3)), x.T @ x


def _flip(row, rounded, gram, step, *, whole=True, cost=1, sign=1, must=False):
    """The best move of one weight, with one thing at a time gone wrong."""
    pull = (row - rounded) @ (gram if whole else gram.diagonal().diag())
    gains = 2 * step * pull.abs() - cost * step**2 * gram.diagonal()
    column = gains.argmax().item()
    return (column, sign if pull[column] > 0 else -sign) if must or gains[column] > 0 else None


def _nearest_tie(row, rounded, gram, step):
    column = (row - rounded).abs().argmax().item()
    return column, 1 if row[column] > rounded[column] else -1


@exercise("3.1")
def best_flip(answer):
    """The move that lowers d G dᵀ most."""
    cases = [{"row": torch.tensor([0.4, 0.3]), "rounded": torch.zeros(2), "gram": torch.eye(2), "step": 1.0}]
    for weight, _, gram in _layers(6, 9, 12):
        step = weight.abs().max().item() / 3
        for row in weight[:2]:
            cases.append({"row": row, "rounded": (row / step).round() * step, "gram": gram, "step": step})
    expect_function(
        answer,
        _flip,
        cases=cases,
        mistakes=[
            (partial(_flip, must=True), "return None where no move lowers the error"),
            (partial(_flip, whole=False), "errors of two inputs cancel or add up: use the whole Gram matrix"),
            (partial(_flip, cost=0), "a move also adds an error of its own, step² · G[j, j]"),
            (partial(_flip, sign=-1), "that move raises the error: turn the direction round"),
            (_nearest_tie, "a weight near the middle of two codes need not matter: compare output errors"),
            (lambda **case: (_flip(**case) or (None,))[0], "the direction is missing: return (column, direction)"),
        ],
    )


def _gptq(weight, factor, scale, qmax, *, divide=True, push=1.0, clamp=True, whole_row=False):
    """GPTQ for one scale a row, with one thing at a time gone wrong."""
    work, rounded = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes = torch.round(work[:, j] / scale)
        rounded[:, j] = (codes.clamp(-qmax, qmax) if clamp else codes) * scale
        error = (work[:, j] - rounded[:, j]) / (factor[j, j] if divide else 1)
        start = 0 if whole_row else j + 1
        work[:, start:] -= push * error[:, None] * factor[j, start:]
    return rounded


def _reference_gptq(weight, factor, scale, qmax):
    gram = torch.linalg.inv(factor.T @ factor)
    qparams = QParams(scale[:, None], torch.zeros_like(scale)[:, None].int(), -qmax, qmax)
    return gptq.gptq(weight, gram, qparams, damping=1e-9, block=2)


@exercise("3.2")
def gptq_round(answer):
    """Equal to labutils' blocked version."""
    cases = []
    for weight, _, gram in _layers(12, 16):
        factor = inverse_factor(gram / 100, damping=0.05).float()
        scale = weight.abs().amax(dim=1) / 6
        cases.append({"weight": weight, "factor": factor, "scale": scale, "qmax": 5})
    expect_function(
        answer,
        _reference_gptq,
        cases=cases,
        rtol=1e-3,
        atol=1e-4,
        mistakes=[
            (partial(_gptq, push=0.0), "that is plain rounding: hand each error on, along row j of U"),
            (partial(_gptq, push=-1.0), "the sign is wrong: subtract error · U[j, k] from the columns after j"),
            (partial(_gptq, divide=False), "divide the error by U[j, j] before you hand it on"),
            (partial(_gptq, clamp=False), "a code left the range: clamp it to -qmax … qmax before you multiply"),
            (lambda **case: _gptq(**case) / case["scale"][:, None], "those are codes: multiply by the row's scale"),
        ],
    )


def _losses(weight, mean_abs, gram, scheme, *, undo=True, flip=False, square=True, own=False):
    losses = {}
    for alpha in awq.ALPHAS:
        scale = awq.awq_scale(mean_abs, -alpha if flip else alpha)
        rounded = fake_quantize(weight * scale, scheme)
        rounded = rounded / scale if undo else rounded
        losses[alpha] = calibration.layer_error(weight, rounded, torch.eye(len(gram)) if own else gram)
    return losses


def _best(losses):
    return min(losses, key=losses.get)


def _reference_alpha(weight, mean_abs, gram, scheme):
    return _best(awq.scale_losses([weight], mean_abs, gram, scheme))


@exercise("3.3")
def best_alpha(answer):
    """The α that the search of labutils finds."""
    make, cases = torch.Generator().manual_seed(0), []
    for n, loud in ((16, 12.0), (16, 4.0), (32, 30.0), (24, 8.0)):
        x = torch.randn(200, n, generator=make) * torch.where(torch.arange(n) % 5 == 0, loud, 1.0)
        weight = torch.randn(6, n, generator=make)
        scheme = Scheme(bits=3, granularity="channel")
        cases.append({"weight": weight, "mean_abs": x.abs().mean(dim=0), "gram": x.T @ x, "scheme": scheme})
    wrong = [
        ({"undo": False}, "divide the rounded weight by s again before you compare it with the weight"),
        ({"flip": True}, "the columns that meet large inputs must become larger: s grows with mean_abs"),
        ({"own": True}, "that compares weights: the loss is the output error, layer_error with the Gram matrix"),
    ]
    mistakes = [(lambda s=settings, **case: _best(_losses(**case, **s)), hint) for settings, hint in wrong]
    mistakes.append((lambda **case: min(_losses(**case).values()), "that is the least loss: return its α"))
    mistakes.append((lambda **case: max(_losses(**case), key=_losses(**case).get), "that α has the largest loss"))
    mistakes.append((lambda **case: awq.ALPHAS.index(_best(_losses(**case))), "that is the index of α, not α"))
    expect_function(answer, _reference_alpha, cases=cases, rtol=0.0, atol=1e-6, mistakes=mistakes)


def _split(x, weight, threshold, *, regular=True, added=True, keep=False, per_tensor=False, signed=False):
    outliers = ((x if signed else x.abs()) >= threshold).any(dim=0)
    rest_x = x if keep else x.masked_fill(outliers, 0)
    rest_weight = weight if keep else weight.masked_fill(outliers, 0)
    rows = Scheme(granularity="tensor" if per_tensor else "token")
    product = fake_quantize(rest_x, rows) @ fake_quantize(rest_weight, Scheme()).T
    return product * regular + (x[:, outliers] @ weight[:, outliers].T if added else 0)


@exercise("3.4")
def split_product(answer):
    """LLM.int8's product."""
    make, cases = torch.Generator().manual_seed(0), []
    for rows, n in ((3, 5), (4, 8)):
        x = torch.randn(rows, n, generator=make)
        x[1, 2], x[0, n - 1], x[2, 0] = 40.0, -20.0, 6.0
        cases.append({"x": x, "weight": torch.randn(4, n, generator=make), "threshold": 6.0})
    expect_function(
        answer,
        lambda x, weight, threshold: integer_linear.llm_int8(x, weight, threshold=threshold),
        cases=cases,
        rtol=1e-4,
        atol=1e-4,
        mistakes=[
            (partial(_split, added=False), "the outliers' own product is missing: add x[:, outliers] @ weight part"),
            (partial(_split, regular=False), "only the outliers' product came back: add the rounded rest"),
            (partial(_split, keep=True), "the outliers were rounded and added again: set them to 0 first"),
            (lambda x, weight, threshold: _split(x, weight, threshold + 1e-3), "|x| ≥ threshold: equality counts"),
            (lambda x, weight, threshold: _split(x, weight, 1e9), "nothing was split off: find |x| ≥ threshold"),
            (partial(_split, signed=True), "negative outliers count too: take |x|"),
            (partial(_split, per_tensor=True), "one scale for each token: granularity 'token' for x"),
        ],
    )


def _butterfly(x, *, root=True, last=None, sign=1, neighbours=False):
    """The Hadamard transform by sums and differences, with one thing at a time gone wrong."""
    y, n, distance = x, x.shape[-1], 1
    while distance < (last or n):
        a, b = (
            y.unflatten(-1, (-1, 2)) if neighbours else y.unflatten(-1, (-1, 2, distance)).transpose(-1, -2)
        ).unbind(-1)
        y = torch.stack([a + b, sign * (a - b)], dim=-1)
        y = y.flatten(-2) if neighbours else y.transpose(-1, -2).flatten(-3)
        distance *= 2
    return y / (n**0.5 if root else n)


@exercise("3.5")
def butterfly(answer):
    """X times Hadamard's matrix."""

    def reference(x):
        matrix = torch.ones(1, 1)
        while len(matrix) < x.shape[-1]:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
        return x @ matrix

    make = torch.Generator().manual_seed(0)
    expect_function(
        answer,
        reference,
        cases=[{"x": torch.randn(*shape, generator=make)} for shape in ((4,), (3, 8), (2, 2, 16))],
        rtol=1e-4,
        atol=1e-5,
        mistakes=[
            (partial(_butterfly, root=False), "divide by the root of n, so that the length stays"),
            (lambda x: _butterfly(x) * x.shape[-1] ** 0.5, "the division is missing: by the root of n, at the end"),
            (partial(_butterfly, last=2), "that is the first pass alone: go on with distances 2, 4, … up to n/2"),
            (partial(_butterfly, sign=-1), "the second of a pair becomes a − b, not b − a"),
            (partial(_butterfly, neighbours=True), "each pass has a distance of its own: 1, then 2, then 4"),
        ],
    )


def _keys(keys, bits, group_size, *, turned=True, back=True, whole=False, scheme=None):
    """Keys rounded in groups by their own minimum and maximum, or by a scheme of chapter 02."""
    keys = keys.transpose(-1, -2) if turned else keys
    size = keys.shape[-1] if whole else group_size
    if scheme is None:
        groups = keys.unflatten(-1, (-1, size))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        rounded = (((groups - low) / scale).round() * scale + low).flatten(-2)
    else:
        rounded = fake_quantize(keys, Scheme(bits=bits, granularity="group", group_size=size, **scheme))
    return rounded.transpose(-1, -2) if turned and back else rounded


@exercise("3.6")
def round_keys(answer):
    """KIVI's keys."""
    make = torch.Generator().manual_seed(0)
    cases = [
        {
            "keys": torch.randn(1, 2, n, n, generator=make) * torch.linspace(0.2, 9, n) + offset,
            "bits": bits,
            "group_size": size,
        }
        for n, bits, size, offset in ((8, 2, 4, 0.0), (12, 4, 6, 50.0))
    ]

    def reference(keys, bits, group_size):
        return kv_cache.PackedBlock(keys, bits=bits, group_size=group_size, along="channel").unpack()

    variants = {
        "those groups lie along a token: keys need groups along the positions": {"turned": False},
        "turn the axes back: (batch, heads, positions, head_dim) again": {"back": False},
        "a scale for group_size positions, not for the whole text": {"whole": True},
        "KIVI's range is the group's own minimum to its maximum: zero need not lie in it": {},
    }
    expect_function(
        answer,
        reference,
        cases=cases,
        rtol=1e-2,
        atol=5e-2,
        mistakes=[
            *((partial(_keys, **change), hint) for hint, change in variants.items() if change),
            *((partial(_keys, scheme={"symmetric": False}, **change), hint) for hint, change in variants.items()),
            (partial(_keys, scheme={}), "a group's codes start at its minimum: a symmetric range wastes half of them"),
        ],
    )


@exercise("3.7")
def straight_through(answer):
    """Rounded forward; backward, the true gradients but for round's."""

    def passes(function):
        def run(weight, scale, qmax):
            leaves = weight.clone().requires_grad_(), scale.clone().requires_grad_()
            value = function(*leaves, qmax)
            if value.requires_grad:
                (value * torch.arange(1.0, weight.numel() + 1).view_as(weight)).sum().backward()
            gradients = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
            return value.detach(), *gradients

        return run

    def lsq(weight, scale, qmax):
        x = (weight / scale).clamp(-qmax, qmax)
        return scale * (x + (x.round() - x).detach())

    def rounded(weight, scale, qmax):
        return scale * (weight / scale).clamp(-qmax, qmax).round()

    wrong = [
        (rounded, "round() has the gradient 0 almost everywhere: let x pass and detach what rounding adds"),
        (lambda w, s, q: rounded(w.detach(), s.detach(), q), "no gradient arrives: detach less"),
        (lambda w, s, q: w + (rounded(w, s, q) - w).detach(), "a clamped weight has a gradient still, the scale none"),
        (lambda w, s, q: lsq(w, s.detach(), q), "the scale gets no gradient: it is no constant"),
        (lambda w, s, q: lsq(w, s, q) / s * s.detach(), "one of the scale's two places is a constant"),
        (lambda w, s, q: s * (w / s).clamp(-q, q), "the forward pass saw the weight as it was: round it"),
        (lambda w, s, q: lsq(w, s, 1e9), "codes lie within -qmax … qmax: clamp w / s before you round"),
        (lambda w, s, q: lsq(w, s, q) / s, "those are codes: multiply by the scale"),
    ]
    weight = torch.tensor([[0.3, -0.7, 1.2, 5.0], [2.3, -0.1, -9.0, 1.8]])
    expect_function(
        passes(answer),
        passes(lsq),
        cases=cases_of("weight scale qmax", (weight, torch.tensor([[0.5], [1.0]]), 3), (weight, torch.tensor(0.8), 1)),
        mistakes=[(passes(function), hint) for function, hint in wrong],
    )

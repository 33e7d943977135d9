"""Checks of chapter 09, second part: one model over several devices."""

import torch
from torch.nn.functional import silu

from labutils.course.checks import cases_of, exercise, expect_function
from labutils.distributed import disaggregation, pipeline, planner, ring_attention, tensor_parallel
from labutils.distributed.collectives import all_reduce_bytes


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _mlp(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def _rows(weight, rank, ranks):
    return list(tensor_parallel.span(weight.shape[0], rank, ranks))


def _by_outputs(x, gate, up, down, rank, ranks):
    return _mlp(x, gate, up, down[_rows(down, rank, ranks)])


def _by_inputs(x, gate, up, down, rank, ranks):
    part = list(tensor_parallel.span(x.shape[1], rank, ranks))
    return _mlp(x[:, part], gate[:, part], up[:, part], down)


def _interleaved(x, gate, up, down, rank, ranks):
    return _mlp(x, gate[rank::ranks], up[rank::ranks], down[:, _rows(gate, rank, ranks)])


@exercise("9.6")
def mlp_part(answer):
    """One rank's contribution to a SwiGLU layer."""

    def reference(x, gate, up, down, rank, ranks):
        mine = _rows(gate, rank, ranks)
        return _mlp(x, gate[mine], up[mine], down[:, mine])

    weights = {"gate": _random(4, 6, seed=1), "up": _random(4, 6, seed=2), "down": _random(6, 4, seed=3)}
    expect_function(
        answer,
        reference,
        cases=[{"x": _random(2, 6), **weights, "rank": r, "ranks": 2} for r in (0, 1)]
        + [{"x": _random(2, 6), **weights, "rank": 3, "ranks": 4}],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda x, gate, up, down, rank, ranks: _mlp(x, gate, up, down),
                "that is the whole layer: added up over the ranks it comes out `ranks` times too large",
            ),
            (
                lambda x, gate, up, down, rank, ranks: _mlp(x, gate, up, down) / ranks,
                "the whole layer divided by `ranks` adds up, but each rank did all the work: use its own neurons",
            ),
            (_by_outputs, "down was cut by its outputs: its *inputs* are the neurons, so cut its columns"),
            (
                _by_inputs,
                "the first two were cut by their inputs: then SiLU would need an all-reduce before it; cut by rows",
            ),
            (
                _interleaved,
                "gate and up took every ranks-th neuron, down a contiguous block: all three need the same ones",
            ),
            (
                lambda x, gate, up, down, rank, ranks: reference(x, gate, up, down, ranks - 1 - rank, ranks),
                "that is another rank's part: rank 0 holds the first neurons",
            ),
        ],
    )


def _every_other_head(rank, ranks, heads, kv_heads):
    mine = list(range(rank, heads, ranks))
    return mine, sorted({q // (heads // kv_heads) for q in mine})


@exercise("9.7")
def heads_of(answer):
    """Query heads and key/value heads of a rank."""

    def reference(rank, ranks, heads, kv_heads):
        queries, keys = tensor_parallel.heads_of(rank, ranks, heads=heads, kv_heads=kv_heads)
        return list(queries), list(keys)

    def variant(make):
        def wrong(rank, ranks, heads, kv_heads):
            queries, _ = reference(rank, ranks, heads, kv_heads)
            return queries, make(queries, rank, ranks, heads, kv_heads)

        return wrong

    cases = [(1, 2, 4, 2), (0, 4, 4, 2), (2, 4, 4, 2), (1, 2, 8, 8), (1, 4, 16, 2), (1, 4, 8, 4)]
    expect_function(
        answer,
        reference,
        cases=cases_of("rank ranks heads kv_heads", *cases),
        mistakes=[
            (
                variant(lambda queries, *_: queries),
                "one key/value head per query head: with grouped queries several share one, q // (heads // kv_heads)",
            ),
            (
                variant(lambda q, rank, ranks, heads, kv_heads: list(range(kv_heads))),
                "every rank keeps all key/value heads, so the cache is not shared out: keep those its queries read",
            ),
            (
                variant(lambda q, rank, ranks, heads, kv: list(range(rank * kv // ranks, (rank + 1) * kv // ranks))),
                "with more ranks than key/value heads some are left without one: they hold a copy of a neighbour's",
            ),
            (
                variant(lambda queries, rank, ranks, heads, kv_heads: [q // (heads // kv_heads) for q in queries]),
                "a key/value head came more than once: one copy serves all of a rank's queries",
            ),
            (
                variant(lambda queries, rank, ranks, heads, kv_heads: sorted({q % kv_heads for q in queries})),
                "`%` deals the keys out in turn: neighbouring queries share one, so divide: q // (heads // kv_heads)",
            ),
            (_every_other_head, "every ranks-th query head: a rank holds neighbouring heads, which share their keys"),
        ],
    )


@exercise("9.8")
def sent_bytes(answer):
    """What each rank sends for one decoding step."""

    def make(*, per_layer=2, extra=1, factor=all_reduce_bytes, width=True):
        def count(layers, hidden, batch, ranks, value_bytes):
            payload = (batch if width else 1) * hidden * value_bytes
            return (per_layer * layers + extra) * factor(payload, ranks)

        return count

    names = "layers hidden batch ranks value_bytes"
    expect_function(
        answer,
        make(),
        cases=cases_of(names, (6, 256, 4, 2, 4), (32, 4096, 1, 8, 2), (2, 8, 3, 1, 4)),
        mistakes=[
            (make(extra=0), "the embedding's all-reduce is missing: 2 a layer, and 1 before the first"),
            (make(per_layer=1), "one all-reduce a layer: attention's output and the MLP's each need one"),
            (
                make(factor=lambda n, p: n),
                "that is the size of what is added up; a rank of a ring sends 2(p-1)/p of it",
            ),
            (make(factor=lambda n, p: (p - 1) * n / p), "half of it: a ring adds up first, then passes the sums round"),
            (make(factor=lambda n, p: 2 * (p - 1) * n), "all ranks together: each of the p ranks sends 2(p-1)/p of it"),
            (make(width=False), "the batch is missing: each request has its own hidden state"),
        ],
    )


@exercise("9.9")
def pipeline_s(answer):
    """When the last stage is done with the last micro-batch."""

    def serial(stage_s, micro_batches):
        return micro_batches * sum(stage_s)

    expect_function(
        answer,
        pipeline.pipeline_s,
        cases=[
            {"stage_s": [1.0, 1.0, 1.0], "micro_batches": 4},
            {"stage_s": [1.0, 3.0, 1.5], "micro_batches": 5},
            {"stage_s": [2.0], "micro_batches": 3},
        ],
        mistakes=[
            (serial, "one micro-batch at a time: a stage may start the next one while the others are still at work"),
            (
                lambda stage_s, micro_batches: micro_batches * max(stage_s),
                "the filling is missing: the first micro-batch must pass through all stages",
            ),
            (
                lambda stage_s, micro_batches: sum(stage_s) + micro_batches * max(stage_s),
                "one too many: the first micro-batch is in the sum already, m - 1 follow it",
            ),
            (
                lambda stage_s, micro_batches: (micro_batches + len(stage_s) - 1) * max(stage_s),
                "right for equal stages only: the first micro-batch takes each stage's own time",
            ),
            (
                lambda stage_s, micro_batches: (micro_batches + len(stage_s) - 1) * sum(stage_s) / len(stage_s),
                "the mean stage does not set the pace: the slowest one does",
            ),
        ],
    )


def _two_parts(seed, sizes):
    q, k, v = (
        _random(2, 3, 4, seed=seed),
        _random(2, sum(sizes), 4, seed=seed + 1),
        _random(2, sum(sizes), 4, seed=seed + 2),
    )
    parts = [
        ring_attention.partial_attention(3 * q, keys, values, offset=99)
        for keys, values in zip(k.split(sizes, dim=1), v.split(sizes, dim=1), strict=True)
    ]
    names = ("output", "log_sum"), ("other", "other_log_sum")
    return {
        name: value for part, pair in zip(parts, names, strict=True) for name, value in zip(pair, part, strict=True)
    }


@exercise("9.10")
def merge_attention(answer):
    """Attention over two sets of keys, joined."""

    def reference(output, log_sum, other, other_log_sum):
        return ring_attention.merge_attention(output, log_sum, other, other_log_sum)[0]

    def weighted(a, b, output, other):
        return output * a[..., None] + other * b[..., None]

    expect_function(
        answer,
        reference,
        cases=[_two_parts(0, [5, 2]), _two_parts(7, [1, 6])],
        rtol=1e-4,
        atol=1e-6,
        mistakes=[
            (
                lambda output, log_sum, other, other_log_sum: (output + other) / 2,
                "a plain mean: the part with the larger sum of exponentials weighs more",
            ),
            (
                lambda output, log_sum, other, other_log_sum: output + other,
                "added without weights: each part was normalised by its own sum",
            ),
            (
                lambda output, log_sum, other, other_log_sum: weighted(
                    log_sum.exp(), other_log_sum.exp(), output, other
                ),
                "not divided by the joint sum: the two weights must add up to 1",
            ),
            (
                lambda output, log_sum, other, other_log_sum: weighted(
                    log_sum / (log_sum + other_log_sum), other_log_sum / (log_sum + other_log_sum), output, other
                ),
                "the logs themselves are no weights: take exp first",
            ),
            (
                lambda output, log_sum, other, other_log_sum: reference(output, other_log_sum, other, log_sum),
                "the weights are swapped: each output goes with its own sum",
            ),
        ],
    )


@exercise("9.11")
def coordinates(answer):
    """A rank's place in the mesh: data, pipeline, tensor."""
    expect_function(
        answer,
        planner.coordinates,
        cases=[{"rank": r, "tensor": t, "pipeline": p} for r, t, p in [(5, 2, 2), (7, 4, 2), (11, 2, 3), (0, 2, 2)]],
        mistakes=[
            (
                lambda rank, tensor, pipeline: (
                    rank // (tensor * pipeline),
                    rank % pipeline,
                    rank // pipeline % tensor,
                ),
                "neighbouring ranks share a pipeline: let them share a tensor group, which talks at every layer",
            ),
            (
                lambda rank, tensor, pipeline: planner.coordinates(rank, tensor=tensor, pipeline=pipeline)[::-1],
                "in the reverse order: return (data, pipeline, tensor)",
            ),
            (
                lambda rank, tensor, pipeline: (rank // (tensor * pipeline), rank // tensor, rank % tensor),
                "the stage grows beyond the pipeline: take it modulo `pipeline`",
            ),
            (
                lambda rank, tensor, pipeline: (rank // tensor, rank // tensor % pipeline, rank % tensor),
                "the replica counts stages too: a replica has tensor * pipeline ranks",
            ),
        ],
    )


@exercise("9.12")
def break_even_bytes_per_s(answer):
    """The bandwidth over which a cache travels as long as it takes to compute."""

    def reference(layers, kv_heads, head_dim, positions, value_bytes, recompute_s, latency_s):
        nbytes = 2 * layers * kv_heads * head_dim * positions * value_bytes
        return disaggregation.break_even_bytes_per_s(nbytes, recompute_s, latency_s=latency_s)

    def changed(name, change):
        return lambda **case: reference(**case | {name: change(case[name])})

    lablm = {"layers": 6, "kv_heads": 2, "head_dim": 64, "value_bytes": 2}
    expect_function(
        answer,
        reference,
        cases=[
            lablm | {"positions": 512, "recompute_s": 0.25, "latency_s": 0.0},
            lablm | {"positions": 1000, "recompute_s": 0.5, "latency_s": 0.1, "layers": 36, "value_bytes": 1},
        ],
        rtol=1e-9,
        mistakes=[
            (changed("layers", lambda n: n / 2), "keys *and* values travel: twice as many bytes"),
            (changed("positions", lambda _: 1), "that is one position: the cache holds all of the prompt"),
            (changed("latency_s", lambda _: 0.0), "the latency passes before the first byte comes: less time is left"),
            (
                changed("latency_s", lambda s: -s),
                "latency and transfer together last as long as the prefill: subtract it",
            ),
            (changed("value_bytes", lambda n: 8 * n), "that is in bits a second: bytes are asked for"),
            (lambda **case: 1 / reference(**case), "that is seconds for a byte: turn it over"),
        ],
    )

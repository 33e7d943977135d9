"""Six Triton kernels: vector add, softmax, RMSNorm, int8 and int4 dequantize-GEMV, and a small flash attention.

Each is a plain function: `triton_ops` compiles it for a GPU, or has it interpreted on a CPU. `tl` is
`triton.language`, given to them when they run, so that this file needs no Triton to be read.

A *program* is one instance of a kernel: `tl.program_id(0)` tells which. It works on a block of numbers at once; the
block's size is a power of two fixed at compile time, and a mask hides what lies beyond the end.
"""

from __future__ import annotations

tl = None  # triton.language; set where a kernel is compiled or interpreted


def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    """Stores x + y of n numbers: program i takes the i-th block."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    total = tl.load(x + offsets, mask=mask, other=0.0) + tl.load(y + offsets, mask=mask, other=0.0)
    tl.store(out + offsets, total, mask=mask)


def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    """Stores softmax(x) of rows of n: program i takes row i, reads it once and writes it once."""
    start, columns = tl.program_id(0) * n, tl.arange(0, BLOCK)
    mask = columns < n
    scores = tl.load(x + start + columns, mask=mask, other=-float("inf")).to(tl.float32)
    powers = tl.exp(scores - tl.max(scores, axis=0))
    tl.store(out + start + columns, powers / tl.sum(powers, axis=0), mask=mask)


def rms_norm_kernel(x, gain, out, n, eps, BLOCK: tl.constexpr):
    """Stores x / sqrt(mean(x^2) + eps) * gain of rows of n (arXiv:1910.07467, eq. 4): program i takes row i."""
    start, columns = tl.program_id(0) * n, tl.arange(0, BLOCK)
    mask = columns < n
    row = tl.load(x + start + columns, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(row * row, axis=0) / n + eps)
    gains = tl.load(gain + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + start + columns, row * inverse * gains, mask=mask)


def int8_gemv_kernel(codes, scales, x, out, rows, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores y_r = s_r * sum_k q_rk x_k: a program takes ROWS rows and walks along them in blocks.

    Every lane of a block keeps a sum of its own; they are added up once, at the end.
    """
    row, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, n, BLOCK):
        k = start + columns
        inside = (row[:, None] < rows) & (k[None, :] < n)
        q = tl.load(codes + row[:, None] * n + k[None, :], mask=inside, other=0).to(tl.float32)
        part = tl.load(x + k, mask=k < n, other=0.0).to(tl.float32)
        sums += q * part[None, :]
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    tl.store(out + row, tl.sum(sums, axis=1) * scale, mask=row < rows)


def int4_gemv_kernel(codes, scales, x, out, rows, n, GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """Stores y_r = sum_g s_rg * sum_(k in g) (q_rk - 8) x_k; a byte holds inputs 2i (low half) and 2i + 1 (high).

    A block is GROUPS groups of ROWS rows. As in the int8 kernel, the sums are added up once, at the end.
    """
    row, groups = tl.program_id(0) * ROWS + tl.arange(0, ROWS), n // GROUP
    sums = tl.zeros((ROWS, GROUPS, GROUP // 2), dtype=tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        inside = (row[:, None] < rows) & (group[None, :] < groups)
        byte = group[:, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, :]
        pointers = codes + row[:, None, None] * (n // 2) + byte[None, :, :]
        packed = tl.load(pointers, mask=inside[:, :, None], other=0).to(tl.int32)
        inputs = x + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        part = tl.load(inputs, mask=group[:, None] < groups, other=0.0).to(tl.float32)
        x_even, x_odd = tl.split(tl.reshape(part, (GROUPS, GROUP // 2, 2)))
        scale = tl.load(scales + row[:, None] * groups + group[None, :], mask=inside, other=0.0)
        even, odd = ((packed & 15) - 8).to(tl.float32), ((packed >> 4) - 8).to(tl.float32)
        sums += (even * x_even[None, :, :] + odd * x_odd[None, :, :]) * scale[:, :, None]
    tl.store(out + row, tl.sum(tl.sum(sums, axis=2), axis=1), mask=row < rows)


def flash_attention_kernel(
    q, k, v, out, positions, scale, CAUSAL: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """Stores softmax(q k^T * scale) v of one head, without ever holding the whole score matrix.

    A program takes QUERIES rows and walks over the keys. For each row it keeps the largest score m so far, the sum l
    of exp(score - m), and the output; a larger m rescales both (Milakov and Gimelshein 2018, arXiv:1805.02867;
    Dao et al. 2022, arXiv:2205.14135, algorithm 1). The grid's second axis counts heads.
    """
    head = tl.program_id(1) * positions * DIM
    rows, columns = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, DIM)
    query = tl.load(q + head + rows[:, None] * DIM + columns[None, :], mask=rows[:, None] < positions, other=0.0)
    m = tl.full((QUERIES,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    accumulator = tl.zeros((QUERIES, DIM), dtype=tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * QUERIES, positions) if CAUSAL else positions
    for start in range(0, end, KEYS):
        at = start + tl.arange(0, KEYS)
        inside = (at < positions)[:, None]
        key = tl.load(k + head + at[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
        value = tl.load(v + head + at[:, None] * DIM + columns[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (at[None, :] < positions) & ((at[None, :] <= rows[:, None]) | (not CAUSAL))
        scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(m, tl.max(scores, axis=1))
        shrink, powers = tl.exp(m - larger), tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(powers, axis=1)
        accumulator = accumulator * shrink[:, None] + tl.dot(powers.to(value.dtype), value, input_precision="ieee")
        m = larger
    result = accumulator / total[:, None]
    tl.store(out + head + rows[:, None] * DIM + columns[None, :], result, mask=rows[:, None] < positions)

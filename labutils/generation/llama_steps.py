"""What a Llama layer does between its matrices, in NumPy: normalise, attend, gate."""

import numpy as np
from jaxtyping import Float


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: np.float32) -> np.ndarray:
    """Returns x / sqrt(mean(x^2) + eps) * gain over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    >>> rms_norm(np.array([[2.0, 2.0]]), np.array([1.0, 3.0]), 0.0).tolist()
    [[1.0, 3.0]]
    """
    mean_square = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    return x * (gain / np.sqrt(mean_square + eps))


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotates the pairs (x_i, x_{i + d/2}) by their position's angle (RoPE, arXiv:2104.09864, eq. 34).

    >>> rotate(np.array([1.0, 0.0]), np.array([0.0, 0.0]), np.array([1.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half] -= x[..., half:] * sin[..., :half]
    rotated[..., half:] += x[..., :half] * sin[..., half:]
    return rotated


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    """Returns silu(gate) * up, silu(g) = g / (1 + exp(-g)); gate and up lie side by side (arXiv:2002.05202, eq. 6).

    >>> swiglu(np.array([[0.0, 5.0]])).tolist()
    [[0.0]]
    """
    half = gate_up.shape[-1] // 2
    gate, up = gate_up[:, :half], gate_up[:, half:]
    return gate / (1 + np.exp(-gate)) * up


def attend(
    qkv: Float[np.ndarray, "positions all_heads"],
    keys: Float[np.ndarray, "kv_heads max_length head_dim"],
    values: Float[np.ndarray, "kv_heads max_length head_dim"],
    cos: Float[np.ndarray, "positions head_dim"],
    sin: Float[np.ndarray, "positions head_dim"],
    start: int,
) -> Float[np.ndarray, "positions heads_times_dim"]:
    """Rotates queries and keys, stores keys and values from position `start` on, and attends to all before.

    softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), heads sharing keys in groups.
    """
    (kv_heads, _, dim), count = keys.shape, len(qkv)
    qkv, end = qkv.reshape(count, -1, dim), start + count
    heads = qkv.shape[1] - 2 * kv_heads
    groups = heads // kv_heads
    rotated = rotate(qkv[:, : heads + kv_heads], cos[:, None], sin[:, None])
    keys[:, start:end] = rotated[:, heads:].swapaxes(0, 1)
    values[:, start:end] = qkv[:, heads + kv_heads :].swapaxes(0, 1)
    query = rotated[:, :heads].reshape(count, kv_heads, groups, dim).transpose(1, 2, 0, 3)
    query = query.reshape(kv_heads, groups * count, dim) * np.float32(dim**-0.5)
    scores = query @ keys[:, :end].swapaxes(1, 2)
    if count > 1:
        future = np.arange(end) > np.arange(start, end)[:, None]
        scores += np.tile(np.where(future, np.float32(-np.inf), np.float32(0)), (groups, 1))
    mixed = softmax_(scores) @ values[:, :end]
    mixed = mixed.reshape(kv_heads, groups, count, dim).transpose(2, 0, 1, 3)
    return mixed.reshape(count, heads * dim)


def softmax_(scores: np.ndarray) -> np.ndarray:
    """Turns scores into probabilities over the last axis, in place.

    >>> softmax_(np.array([[0.0, 0.0]])).tolist()
    [[0.5, 0.5]]
    """
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores

"""A Llama decoder as a pure JAX function, on the weights of any Hugging Face Llama checkpoint.

Pure: weights and cache come in as arguments and the new cache goes out as a result, because XLA compiles functions of
arrays and knows no objects. Written for one text; `jax.vmap` makes a batch of it. Every shape is fixed when the
function is traced: the cache has room for `max_length` positions from the start, and a mask hides the empty ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import nn

from labutils.lab.layers.architecture import ROPES, is_tied, require, require_llama, require_plain_layers
from labutils.xla.lazy import Array, jax, jnp, lax

Cache = tuple[Array, Array]  # keys and values, each (layers, kv_heads, max_length, head_dim)
MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Shape:
    """What the compiled program depends on besides the arrays' shapes; hashable, so that `jit` can key on it."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    eps: float


def shape_of(config, *, max_length: int) -> Shape:
    """The static sizes of a Llama configuration.

    Raises:
        ValueError: If the architecture, activation or rotary embedding is one that this decoder does not know.
    """
    known = require_llama(config, families=("llama",), ropes=ROPES)
    require({"max_length must be at least 1": (max_length, max_length >= 1)})
    sizes = {name: getattr(known, name) for name in ("layers", "heads", "kv_heads", "head_dim")}
    return Shape(**sizes, max_length=max_length, eps=config.rms_norm_eps)


def params_of(model: nn.Module, shape: Shape, *, dtype: str = "float32") -> dict:
    """The weights as one tree of JAX arrays; each layer's are stacked along a first axis, which `lax.scan` walks.

    Matrices keep their layout (out_features, in_features). The rotary tables are the model's own, its scaling included.

    Raises:
        ValueError: If a layer was replaced by another kind.
    """
    require_plain_layers(model)
    layers = model.model.layers

    def stacked(path: str) -> Array:
        return _to_jax(torch.stack([layer.get_parameter(path).detach() for layer in layers]), dtype)

    with torch.inference_mode():
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(shape.max_length)[None])
    params = {
        "embedding": _to_jax(model.get_input_embeddings().weight, dtype),
        "final_gain": _to_jax(model.model.norm.weight, dtype),
        "cos": _to_jax(cos[0], "float32"),
        "sin": _to_jax(sin[0], "float32"),
        "layers": {
            "attention_gain": stacked("input_layernorm.weight"),
            "mlp_gain": stacked("post_attention_layernorm.weight"),
        },
    }
    if not is_tied(model):
        params["head"] = _to_jax(model.get_output_embeddings().weight, dtype)
    for name, path in MATRICES.items():
        params["layers"][name] = stacked(f"{path}.weight")
        if layers[0].get_submodule(path).bias is not None:
            params["layers"][f"{name}_bias"] = stacked(f"{path}.bias")
    return params


def empty_cache(shape: Shape, *, dtype: str = "float32") -> Cache:
    """Keys and values for `max_length` positions, all zero."""
    size = (shape.layers, shape.kv_heads, shape.max_length, shape.head_dim)
    return jnp.zeros(size, dtype), jnp.zeros(size, dtype)


def rms_norm(x: Float[Array, "... width"], gain: Float[Array, " width"], eps: float) -> Array:
    """Returns x / sqrt(mean(x²) + eps) · gain, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)).astype(x.dtype) * gain


def rotate(
    x: Float[Array, "positions heads head_dim"],
    cos: Float[Array, "positions head_dim"],
    sin: Float[Array, "positions head_dim"],
) -> Array:
    """Turns the pairs (x_i, x_{i + d/2}) by their position's angle (RoPE, arXiv:2104.09864, eq. 34)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = x * cos[:, None] + jnp.concatenate([-second, first], axis=-1) * sin[:, None]
    return turned.astype(x.dtype)


def cached_attention(
    query: Float[Array, "positions heads head_dim"],
    keys: Float[Array, "kv_heads max_length head_dim"],
    values: Float[Array, "kv_heads max_length head_dim"],
    positions: Int[Array, " positions"],
) -> Float[Array, "positions heads head_dim"]:
    """softmax(Q Kᵀ / √d + M) V over a whole static cache; M hides every position after the query's own.

    Vaswani et al. 2017 (arXiv:1706.03762, eq. 1); heads share keys in groups (arXiv:2305.13245). The empty part of the
    cache is multiplied too: that is the price of a fixed shape.
    """
    count, heads, dim = query.shape
    grouped = query.reshape(count, keys.shape[0], heads // keys.shape[0], dim)
    scores = jnp.einsum("pkgd,kmd->kgpm", grouped, keys, preferred_element_type=jnp.float32) / dim**0.5
    visible = jnp.arange(keys.shape[1]) <= positions[:, None]
    shares = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(values.dtype)
    return jnp.einsum("kgpm,kmd->pkgd", shares, values).reshape(count, heads, dim)


def decoder_layer(
    hidden: Array, weights: dict, keys: Array, values: Array, tables: tuple, start, shape: Shape
) -> tuple:
    """One layer on (positions, width): attention, then the gated MLP; returns hidden and the layer's new cache."""
    count = len(hidden)

    def linear(x: Array, name: str) -> Array:
        y = x @ weights[name].T
        return y + weights[f"{name}_bias"] if f"{name}_bias" in weights else y

    normed = rms_norm(hidden, weights["attention_gain"], shape.eps)
    query, key, value = (linear(normed, name).reshape(count, -1, shape.head_dim) for name in "qkv")
    query, key = rotate(query, *tables), rotate(key, *tables)
    keys = lax.dynamic_update_slice(keys, key.swapaxes(0, 1), (0, start, 0))
    values = lax.dynamic_update_slice(values, value.swapaxes(0, 1), (0, start, 0))
    attended = cached_attention(query, keys, values, start + jnp.arange(count))
    hidden = hidden + linear(attended.reshape(count, -1), "o")
    normed = rms_norm(hidden, weights["mlp_gain"], shape.eps)
    hidden = hidden + linear(jax.nn.silu(linear(normed, "gate")) * linear(normed, "up"), "down")
    return hidden, keys, values


def forward(
    params: dict, token_ids: Int[Array, " positions"], cache: Cache, start, *, shape: Shape, unroll: bool = False
) -> tuple[Array, Cache]:
    """Reads tokens at positions start, start + 1, …; returns the last layer's states (positions, width) and the cache.

    With `unroll` the program repeats the layer `shape.layers` times; otherwise it holds one layer and a loop.
    `start` may be traced: the same program serves every position. Beyond `max_length` XLA would clamp it in silence.
    """
    positions = start + jnp.arange(len(token_ids))
    tables = params["cos"][positions], params["sin"][positions]

    def step(hidden: Array, layer: tuple) -> tuple:
        hidden, keys, values = decoder_layer(hidden, *layer, tables, start, shape)
        return hidden, (keys, values)

    hidden = params["embedding"][token_ids]
    return lax.scan(step, hidden, (params["layers"], *cache), unroll=shape.layers if unroll else 1)


def logits_of(params: dict, hidden: Float[Array, "... width"], shape: Shape) -> Float[Array, "... vocab"]:
    """The output layer, in float32: final norm, then the head, which may be the embedding again."""
    head = params.get("head", params["embedding"])
    return (rms_norm(hidden, params["final_gain"], shape.eps) @ head.T).astype(jnp.float32)


def _to_jax(tensor: torch.Tensor, dtype: str) -> Array:
    """A JAX array that shares no memory with torch; by way of float32, because NumPy has no bfloat16."""
    return jnp.array(tensor.detach().float().cpu().numpy(), dtype)

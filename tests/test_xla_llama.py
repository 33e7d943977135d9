"""The pure JAX Llama equals torch at every step, and planted bugs show that the comparison can fail."""

from functools import partial

import numpy as np
import pytest
import torch
from jax_here import devices  # noqa: F401
from tiny_models import LLAMAS, random_ids, tiny_model

from labutils.lab.models.load import load_model
from labutils.xla import llama
from labutils.xla.lazy import jax, jnp


def built(model, *, max_length=32, dtype="float32"):
    shape = llama.shape_of(model.config, max_length=max_length)
    return llama.params_of(model, shape, dtype=dtype), shape


def reference(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).logits[0].numpy()


def step_by_step(params, shape, ids, *, shift=0):
    """Logits of every position, one token at a time through the static cache."""
    run = jax.jit(partial(llama.forward, shape=shape))
    cache, rows = llama.empty_cache(shape), []
    for position, token in enumerate(ids[0].tolist()):
        hidden, cache = run(params, jnp.array([token]), cache, position + shift)
        rows.append(np.asarray(llama.logits_of(params, hidden, shape))[0])
    return np.stack(rows)


def largest(left, right):
    return float(np.abs(left - right).max())


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("unroll", [False, True])
def test_forward_equals_torch_at_every_position(name, unroll):
    model, ids = tiny_model(name), random_ids(20)
    params, shape = built(model)
    run = jax.jit(partial(llama.forward, shape=shape, unroll=unroll))
    hidden, _ = run(params, jnp.array(ids[0].numpy()), llama.empty_cache(shape), 0)
    assert largest(np.asarray(llama.logits_of(params, hidden, shape)), reference(model, ids)) < 1e-4


@pytest.mark.parametrize("name", LLAMAS)
def test_decoding_through_the_cache_equals_torch_at_every_step(name):
    model, ids = tiny_model(name), random_ids(20)
    assert largest(step_by_step(*built(model), ids), reference(model, ids)) < 1e-4


def test_lablm_s_logits_equal_torch_s_at_every_step():
    model, tokenizer = load_model("lablm")
    ids = tokenizer("def read(path):\n    with open(path) as file:\n        return file", return_tensors="pt").input_ids
    assert largest(step_by_step(*built(model), ids), reference(model, ids)) < 1e-4


def swapped_norms(params):
    layers = params["layers"]
    swapped = {"attention_gain": layers["mlp_gain"], "mlp_gain": layers["attention_gain"]}
    return params | {"layers": layers | swapped}


@pytest.mark.parametrize("bug", ["norms", "pairing", "position", "groups"])
def test_planted_bugs_are_seen(bug, monkeypatch):
    model, ids = tiny_model("llama-gqa-tied"), random_ids(12)
    params, shape = built(model)
    if bug == "norms":
        params = swapped_norms(params)
    if bug == "pairing":  # neighbours (0, 1), (2, 3), … instead of halves

        def neighbours(x, cos, sin):
            turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
            return x * cos[:, None] + turned * sin[:, None]

        monkeypatch.setattr(llama, "rotate", neighbours)
    if bug == "groups":  # query head h reads KV head h % kv_heads instead of h // group
        order = jnp.array([0, 2, 1, 3])
        queries = params["layers"]["q"].reshape(shape.layers, shape.heads, shape.head_dim, -1)[:, order]
        params = params | {"layers": params["layers"] | {"q": queries.reshape(params["layers"]["q"].shape)}}
    seen = step_by_step(params, shape, ids, shift=1 if bug == "position" else 0)
    assert largest(seen, reference(model, ids)) > 1e-2


def test_cached_attention_by_hand():
    query = jnp.zeros((1, 2, 1))  # equal scores: the mean of what is visible
    keys, values = jnp.zeros((1, 4, 1)), jnp.array([[[1.0], [3.0], [100.0], [100.0]]])
    mixed = llama.cached_attention(query, keys, values, jnp.array([1]))
    assert mixed.shape == (1, 2, 1) and np.asarray(mixed).ravel().tolist() == [2.0, 2.0]


def test_empty_positions_of_the_cache_change_nothing():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(6)
    (params, shape), tokens = built(model), jnp.array(ids[0].numpy())
    dirty = tuple(part.at[:, :, 6:].set(77.0) for part in llama.empty_cache(shape))
    clean, _ = llama.forward(params, tokens, llama.empty_cache(shape), 0, shape=shape)
    seen, _ = llama.forward(params, tokens, dirty, 0, shape=shape)
    assert largest(np.asarray(clean), np.asarray(seen)) == 0.0


def test_vmap_makes_a_batch_of_it():
    model, ids = tiny_model("llama-untied-bias"), random_ids(7, batch=3)
    params, shape = built(model)
    rows = jax.vmap(partial(llama.forward, shape=shape), in_axes=(None, 0, None, None))
    hidden, cache = rows(params, jnp.array(ids.numpy()), llama.empty_cache(shape), 0)
    assert cache[0].shape == (3, shape.layers, shape.kv_heads, 32, shape.head_dim)
    with torch.inference_mode():
        assert largest(np.asarray(llama.logits_of(params, hidden, shape)), model(input_ids=ids).logits.numpy()) < 1e-4


def test_bfloat16_stays_near_and_keeps_its_dtype():
    model, ids = tiny_model("llama-gqa-tied"), random_ids(8)
    params, shape = built(model, dtype="bfloat16")
    cache = llama.empty_cache(shape, dtype="bfloat16")
    hidden, cache = llama.forward(params, jnp.array(ids[0].numpy()), cache, 0, shape=shape)
    logits = llama.logits_of(params, hidden, shape)
    assert hidden.dtype == cache[0].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    wanted = reference(model, ids)
    assert largest(np.asarray(logits), wanted) < 0.05 * np.abs(wanted).max()


def test_shape_of_refuses_what_it_would_compute_wrongly():
    with pytest.raises(ValueError, match="model_type must be one of llama; got qwen2"):
        llama.shape_of(tiny_model("qwen2").config, max_length=8)
    config = tiny_model("llama-gqa-tied").config
    with pytest.raises(ValueError, match="max_length must be at least 1; got 0"):
        llama.shape_of(config, max_length=0)
    config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="hidden_act must be silu; got gelu"):
        llama.shape_of(config, max_length=8)

"""Checks of chapter 01 on costs: parameters, bytes of the KV cache, texts up to the ridge."""

import math
from functools import partial
from types import SimpleNamespace

from labutils.course.checks import cases_of, exercise, expect_function


def _parameters(config, *, heads="num_attention_heads", kv_heads="num_key_value_heads", mlp=3, gains=True, **wrong):
    """Parameters of a Llama with one thing at a time gone wrong."""
    hidden, head_dim = config.hidden_size, config.head_dim
    attention = 2 * hidden * head_dim * (getattr(config, heads) + getattr(config, kv_heads))
    layer = attention + mlp * hidden * config.intermediate_size + 2 * hidden * gains
    tables = wrong.get("tables", 1 if config.tie_word_embeddings else 2)
    layers = wrong.get("layers", config.num_hidden_layers)
    return layers * layer + hidden * gains + tables * config.vocab_size * hidden


def _shape(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied):
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
    )
    sizes = (hidden, intermediate, layers, heads, kv_heads, head_dim, vocab)
    return SimpleNamespace(**dict(zip(names.split(), sizes, strict=True)), tie_word_embeddings=tied)


@exercise("1.3")
def parameter_count(answer):
    """Every number that training learned, counted from the configuration."""
    shapes = _shape(256, 768, 6, 4, 2, 64, 4096, True), _shape(48, 100, 3, 4, 2, 16, 50, False)
    expect_function(
        answer,
        _parameters,
        cases=cases_of("config", *((shape,) for shape in shapes)),
        mistakes=[
            (partial(_parameters, kv_heads="num_attention_heads"), "keys and values have num_key_value_heads heads"),
            (partial(_parameters, mlp=2), "the MLP has three matrices: gate, up and down"),
            (partial(_parameters, gains=False), "a norm has hidden_size gains: two norms a layer, one at the end"),
            (partial(_parameters, tables=2), "where the head is tied, it is the embedding: count the table once"),
            (partial(_parameters, tables=1), "where the head is not tied, it is a table of its own"),
            (partial(_parameters, tables=0), "the embedding is missing: a row of hidden_size numbers for each token"),
            (partial(_parameters, layers=1), "that is one layer: all num_hidden_layers have their own"),
            (lambda config: _parameters(_with_square_heads(config)), "a head has head_dim numbers of its own"),
        ],
    )


def _with_square_heads(config):
    return SimpleNamespace(**{**vars(config), "head_dim": config.hidden_size // config.num_attention_heads})


def _cache_bytes(layers, positions, element_bytes, *, both=2, latent=1, window=min, fixed=True):
    """Bytes of all layers' caches, with one thing at a time gone wrong."""
    numbers = 0
    for layer in layers:
        kept = window(positions, layer["window"]) if "window" in layer else positions
        if "state" in layer:
            numbers += layer["state"] * (1 if fixed else positions)
        elif "latent_dim" in layer:
            numbers += latent * kept * layer["latent_dim"]
        else:
            numbers += both * kept * layer["kv_heads"] * layer["head_dim"]
    return numbers * element_bytes


@exercise("1.7")
def kv_cache_bytes(answer):
    """Bytes kept of one text: all positions, a window, a latent vector, or a state."""
    full, sliding = {"kv_heads": 8, "head_dim": 64}, {"kv_heads": 8, "head_dim": 64, "window": 128}
    latent, linear = {"latent_dim": 576}, {"state": 524_288}
    expect_function(
        answer,
        _cache_bytes,
        cases=cases_of(
            "layers positions element_bytes",
            ([full] * 2, 4096, 2),
            ([sliding, full], 1000, 2),
            ([sliding, full], 100, 4),
            ([latent] * 3, 500, 2),
            ([linear, linear, linear, full], 1000, 2),
        ),
        mistakes=[
            (partial(_cache_bytes, both=1), "half of it is missing: keys and values are both stored"),
            (partial(_cache_bytes, latent=2), "a latent vector serves as key and as value: it is stored once"),
            (partial(_cache_bytes, window=lambda n, most: n), "a layer with a window keeps at most so many positions"),
            (partial(_cache_bytes, window=lambda n, most: most), "a text shorter than the window has fewer positions"),
            (partial(_cache_bytes, fixed=False), "a state has a fixed size: it does not grow with the text"),
            (lambda **case: _cache_bytes(**case) * 8, "those are bits: element_bytes is in bytes already"),
            (lambda **case: _cache_bytes(**{**case, "layers": case["layers"][:1]}), "that is one layer: add all up"),
            (lambda **case: _cache_bytes(**{**case, "element_bytes": 1}), "each number takes element_bytes bytes"),
        ],
    )


def _texts(parameters, bytes_per_parameter, cache_bytes, machine, *, each=2, caches=1, rounded=math.ceil, never=None):
    """Texts to the ridge, with one thing at a time gone wrong."""
    weights_s = parameters * bytes_per_parameter / machine["bytes_per_s"]
    gap_s = each * parameters / machine["flops_per_s"] - caches * cache_bytes / machine["bytes_per_s"]
    return rounded(weights_s / gap_s) if gap_s > 0 else never


@exercise("1.8")
def texts_to_ridge(answer):
    """Each text adds arithmetic and a cache of its own; the weights are read once."""
    machine, slow = {"flops_per_s": 1e15, "bytes_per_s": 3e12}, {"flops_per_s": 1.6e11, "bytes_per_s": 2.5e10}

    def one_cache(parameters, bytes_per_parameter, cache_bytes, machine):
        read_s = (parameters * bytes_per_parameter + cache_bytes) / machine["bytes_per_s"]
        return math.ceil(read_s / (2 * parameters / machine["flops_per_s"]))

    expect_function(
        answer,
        _texts,
        cases=cases_of(
            "parameters bytes_per_parameter cache_bytes machine",
            (7e9, 2, 1e7, machine),
            (7e9, 2, 5e8, machine),
            (8e9, 1, 3e7, machine),
            (2e8, 4, 1e6, slow),
            (2e8, 4, 9e7, slow),
        ),
        mistakes=[
            (partial(_texts, caches=0), "each text brings a cache of its own, which is read in every step"),
            (one_cache, "that is one cache for all: every further text brings its own"),
            (partial(_texts, each=1), "each parameter multiplies and adds: 2 FLOP a parameter and token"),
            (partial(_texts, rounded=math.floor), "one text fewer is not enough yet: round up"),
            (partial(_texts, rounded=float), "texts are whole: round up to the next one"),
            (partial(_texts, never=math.inf), "no number is enough if a text adds more reading than work: None"),
            (partial(_texts, never=0), "return None where no number of texts is enough"),
        ],
    )

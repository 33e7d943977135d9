"""The Pallas kernel, the exported artefact, the weights over a mesh, and the saved words of the TPU compiler."""

import json
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from jax_here import devices  # noqa: F401
from tiny_models import random_ids, tiny_model

from labutils.xla import exporting, generate, hlo, llama, sharding, tpu_compiler
from labutils.xla import pallas_matmul as pm
from labutils.xla.lazy import jax, jnp

SAVED = Path(__file__).resolve().parents[1] / "data" / "results" / "tpu_compiler.json"
BLOCKS = (32, 128, 128)


def codes(rows, columns, *, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-128, 128, (rows, columns)), jnp.int8)


def exact(x, w):
    return np.asarray(x, np.int64) @ np.asarray(w, np.int64)


@pytest.mark.parametrize("mode", ["plain", "simulated memory"])
def test_int8_matmul_is_exact_in_both_interpreters(mode):
    x, w = codes(64, 256), codes(256, 128, seed=1)
    interpret = True if mode == "plain" else pm.pltpu.InterpretParams()
    product = pm.int8_matmul(x, w, blocks=BLOCKS, interpret=interpret)
    assert product.dtype == jnp.int32 and (np.asarray(product) == exact(x, w)).all()


def test_int8_matmul_holds_the_largest_sums():
    x, w = jnp.full((32, 512), -128, jnp.int8), jnp.full((512, 128), -128, jnp.int8)
    assert (np.asarray(pm.int8_matmul(x, w, blocks=BLOCKS, interpret=True)) == 512 * 128 * 128).all()


def test_races_are_found_where_the_summed_axis_is_declared_parallel():
    x, w = codes(32, 256), codes(256, 128, seed=1)
    right, raced = pm.races(partial(pm.int8_matmul, x, w, blocks=BLOCKS))
    assert not raced and (np.asarray(right) == exact(x, w)).all()
    _, raced = pm.races(partial(pm.int8_matmul, x, w, blocks=BLOCKS, parallel=(True, True, True)))
    assert raced


def test_int8_matmul_refuses_sizes_that_are_no_multiple():
    with pytest.raises(ValueError, match=r"multiples of the blocks \(32, 128, 128\); got \(33, 128, 128\)"):
        pm.int8_matmul(codes(33, 128), codes(128, 128), blocks=BLOCKS)


def test_the_interpreters_fill_gaps_differently_and_one_of_them_hides_a_ragged_block():
    """Six rows in blocks of four: the last block has two rows of rubbish. This is why `int8_matmul` refuses them."""

    def total(x_ref, out_ref):
        out_ref[...] = x_ref[...].sum(axis=0, keepdims=True)

    sums, x = {}, jnp.arange(1, 7, dtype=jnp.int32)[:, None]
    for name, interpret in (("plain", True), ("simulated memory", pm.pltpu.InterpretParams())):
        specs = {n: pm.pl.BlockSpec((rows, 1), lambda i: (i, 0)) for n, rows in (("in", 4), ("out", 1))}
        shape = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        call = pm.pl.pallas_call(
            total, grid=(2,), in_specs=[specs["in"]], out_specs=specs["out"], out_shape=shape, interpret=interpret
        )
        sums[name] = np.asarray(call(x)).ravel().tolist()
    assert sums["simulated memory"] != [10, 11]
    if version("jax") == "0.10.2":
        assert sums["plain"] == [10, 11]  # −2³¹ twice: as if nothing were wrong


def test_xla_reads_denormals_as_zero_and_products_of_ours_stay_close():
    """On a CPU; PyTorch keeps them. Probabilities of exp(−88) and less are 0 in XLA, which no logit notices."""
    small = np.array([1e-40, 1.5e-38], np.float32)
    twice = np.asarray(jax.jit(lambda x: x + x)(small))
    assert twice[0] == 0 < twice[1] and (torch.from_numpy(small) * 2 > 0).all()
    scores = np.array([0.0, -89.0], np.float32)
    assert jax.nn.softmax(scores)[1] == 0 < torch.softmax(torch.from_numpy(scores), 0)[1] < 1e-38


def test_vmem_bytes_by_hand_and_as_the_compiler_said():
    assert pm.vmem_bytes((2, 3, 4)) == 2 * (8 + 12 + 24) + 24
    refused = {tuple(k["blocks"]): k["refused"] for k in json.loads(SAVED.read_text(encoding="utf-8"))["kernels"]}
    assert f"size {pm.vmem_bytes((2048, 2048, 1024)) / 2**20:.2f}M" in refused[2048, 2048, 1024]
    assert "limit 16.00M" in refused[2048, 2048, 1024] and pm.vmem_bytes((1024, 1024, 512)) < 16 * 2**20
    assert refused[1024, 1024, 512] == refused[128, 128, 128] == "" and "8 and 128" in refused[64, 64, 64]


def test_saved_report_tells_of_two_all_reduces_of_tiles_and_of_units():
    saved = json.loads(SAVED.read_text(encoding="utf-8"))
    assert [d["collectives"] for d in saved["decoders"]] == [{}, {"all-reduce": 2}, {"all-reduce": 2}]
    assert [d["aliased_bytes"] for d in saved["decoders"]] == [2 * 6 * 4 * 1024 * 64 * 2 // n for n in (1, 2, 4)]
    layouts = {p["dtype"]: " ".join(p["layouts"]) for p in saved["products"] if p["rows"] == 1024}
    assert "T(8,128)}" in layouts["float32"] and "T(8,128)(2,1)" in layouts["bfloat16"]
    assert "T(32,128)(4,1)" in layouts["int8"]
    for product in saved["products"]:  # one row never meets the matrix unit
        assert product["operations"] == ("multiply + reduce" if product["rows"] == 1 else "convolution")


@pytest.fixture(scope="module")
def decoder(devices):  # noqa: F811
    model = tiny_model("llama-untied-bias")
    shape = llama.shape_of(model.config, max_length=16)
    return model, llama.params_of(model, shape), shape


def logits_at(run, params, shape, ids, *, place=lambda cache: cache):
    cache, rows = place(llama.empty_cache(shape)), []
    for position, token in enumerate(ids[0].tolist()):
        logits, cache = run(params, jnp.int32(token), cache, jnp.int32(position))
        rows.append(np.asarray(logits))
    return torch.from_numpy(np.stack(rows))


def test_exported_step_runs_here_and_equals_torch(decoder):
    model, params, shape = decoder
    step = jax.jit(partial(generate.decode_one_token, shape=shape))
    artefact = exporting.export_bytes(step, params, jnp.int32(0), llama.empty_cache(shape), jnp.int32(0))
    ids = random_ids(6)
    seen = logits_at(exporting.load_exported(artefact), params, shape, ids)
    with torch.inference_mode():
        torch.testing.assert_close(seen, model(input_ids=ids).logits[0], rtol=0, atol=1e-4)


def test_load_exported_refuses_a_wrong_platform():
    artefact = exporting.export_bytes(jax.jit(jnp.sin), jnp.ones(3), platforms=["tpu"])
    with pytest.raises(ValueError, match="this artefact runs on tpu; got platform 'cpu'"):
        exporting.load_exported(artefact)
    with pytest.raises(ValueError, match="runs on tpu; got platform 'cuda'"):
        exporting.load_exported(artefact, platform="cuda")


def sharded_step(params, shape, mesh, cuts):
    """The step compiled over the mesh, and its collectives."""
    placed = sharding.placed(params, mesh, sharding.partition_specs(params, cuts))
    cache = sharding.placed(llama.empty_cache(shape), mesh, sharding.cache_spec())
    step = jax.jit(partial(generate.decode_one_token, shape=shape))
    text = step.lower(placed, jnp.int32(1), cache, jnp.int32(0)).compile().as_text()
    return step, placed, hlo.collectives(text)


@pytest.mark.parametrize("count", [1, 2])
def test_sharded_logits_equal_torch_with_two_all_reduces_a_layer(decoder, devices, count):  # noqa: F811
    model, params, shape = decoder
    mesh, ids = sharding.device_mesh(devices[:count]), random_ids(5)
    step, placed, found = sharded_step(params, shape, mesh, sharding.MEGATRON)
    assert found == ({"all-reduce": 2} if count > 1 else {})  # in the loop's body, which runs once a layer
    place = partial(sharding.placed, mesh=mesh, specs=sharding.cache_spec())
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[0]
    torch.testing.assert_close(logits_at(step, placed, shape, ids, place=place), expected, rtol=0, atol=1e-4)


def test_another_cut_talks_more(decoder, devices):  # noqa: F811
    _, params, shape = decoder
    mesh = sharding.device_mesh(devices[:2])
    *_, found = sharded_step(params, shape, mesh, sharding.MEGATRON | {"down": "out", "o": "out"})
    assert sum(found.values()) > 2


def test_partition_specs_cut_what_they_should(decoder):
    _, params, _ = decoder
    specs = sharding.partition_specs(params)
    spec = jax.sharding.PartitionSpec
    assert specs["layers"]["q"] == spec(None, "model", None) and specs["layers"]["o"] == spec(None, None, "model")
    assert specs["layers"]["q_bias"] == spec(None, "model") and specs["layers"]["o_bias"] == spec()
    assert specs["embedding"] == specs["layers"]["mlp_gain"] == spec()
    for cuts in ({"q": "both"}, {"quarrel": "in"}):
        with pytest.raises(ValueError, match="cuts map .* to 'out', 'in' or None"):
            sharding.partition_specs(params, cuts)


@pytest.mark.skipif(not tpu_compiler.can_compile(), reason="libtpu is optional and not installed")
def test_the_real_compiler_says_what_is_saved():
    found = tpu_compiler.report_from_compiler()
    assert found["kernels"][0]["refused"].startswith("The Pallas TPU lowering")
    assert {p["operations"] for p in found["products"] if p["rows"] == 1} == {"multiply + reduce"}

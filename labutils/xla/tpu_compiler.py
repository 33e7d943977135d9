"""The real TPU compiler without a TPU: layouts, memory plan, cycles, collectives. Optional, Linux on x86-64.

`python -m labutils.xla.tpu_compiler` compiles for a described TPU v5e of four chips with libtpu (`pip install
"jax[tpu]"`, 0.2 GB, under its own terms) and prints what the compiler says as JSON. Nothing is executed. The repository
keeps the result in data/results/tpu_compiler.json for everyone else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

from labutils.xla import generate, hlo, llama, pallas_matmul, sharding
from labutils.xla.lazy import Lazy, jax, jnp

topologies = Lazy("jax.experimental.topologies")
TOPOLOGY = "v5e:2x2"
QUIET = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "XLA_FLAGS": ""}
QUIET |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # the process that asks may hold the library already
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
FETCHED = re.compile(r" copy-start\(%(\w)")
LAYOUT = re.compile(r"[a-z]+\d+\[[\d,]+\]\{[\d,]+:T\([^}]*\}")
BLOCKS = ((64, 64, 64), (128, 128, 128), (1024, 1024, 512), (2048, 2048, 1024))
# LabLM's sizes, but four KV heads instead of two, so that four chips get one each. Values do not change a program.
SIZES = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "head_dim": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}


def can_compile() -> bool:
    """Tells whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def refusal(message: str) -> str:
    """The sentence of a compiler's long message that says why.

    >>> refusal("ERROR: something. Scoped allocation with size 2M and limit 1M exceeded scoped vmem limit by 1M. More.")
    'Scoped allocation with size 2M and limit 1M exceeded scoped vmem limit by 1M'
    """
    sentences = re.sub(r"\s+", " ", message).split(". ")
    return next((s for s in sentences if "exceeded scoped" in s or "divisible by" in s), sentences[0])


def report_from_compiler() -> dict:
    """Runs this module in a process of its own, where libtpu's settings and messages disturb nobody.

    Raises:
        RuntimeError: If the compiler fails; its last line is quoted.
    """
    command = [sys.executable, "-m", "labutils.xla.tpu_compiler"]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | QUIET, check=False)
    if result.returncode:
        raise RuntimeError(f"the TPU compiler failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def compile_for_tpu(function, *arguments, devices: list) -> Any:
    """Compiles a jitted function for described TPU devices; arguments without a layout go to the first."""
    one = jax.sharding.SingleDeviceSharding(devices[0])

    def described(leaf):
        layout = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding else one
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    traced = function.trace(*jax.tree.map(described, arguments))
    return traced.lower(lowering_platforms=("tpu",)).compile()


def product_report(devices: list, *, rows: int, dtype: str) -> dict:
    """A product (rows × 1024) · (1024 × 1024): the compiler's layouts, its estimate of cycles and what it made of it.

    A `convolution` is how this compiler writes a product for the matrix unit; a `multiply` with a `reduce` is work for
    the vector unit. An operand fetched by a `copy-start` of its own is not in the estimate: copies have none.
    """
    wide = jnp.int32 if dtype == "int8" else jnp.float32
    product = jax.jit(lambda x, w: jnp.dot(x, w, preferred_element_type=wide))
    shapes = [jax.ShapeDtypeStruct((n, 1024), dtype) for n in (rows, 1024)]
    text = compile_for_tpu(product, *shapes, devices=devices).as_text()
    layouts = sorted(set(LAYOUT.findall(text.splitlines()[0])))
    return {
        "rows": rows,
        "dtype": dtype,
        "layouts": layouts,
        "cycles": sum(map(int, CYCLES.findall(text))),
        "operations": " + ".join(name for name in ("convolution", "multiply", "reduce") if f" {name}(" in text),
        "fetched": "".join(sorted(set(FETCHED.findall(text)))),
    }


def decoder_report(devices: list, params: dict, shape: llama.Shape, *, chips: int) -> dict:
    """One decoding step over so many chips: memory for each chip, and collectives in the loop over layers."""
    params, cache = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16 if a.dtype == jnp.float32 else a.dtype),
        (params, jax.eval_shape(partial(llama.empty_cache, shape))),
    )
    mesh = sharding.device_mesh(devices[:chips])
    params = sharding.placed(params, mesh, sharding.partition_specs(params))
    cache = sharding.placed(cache, mesh, sharding.cache_spec())
    token = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    step = jax.jit(partial(generate.decode_one_token, shape=shape), donate_argnums=2)
    compiled = compile_for_tpu(step, params, token, cache, token, devices=devices)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return {
        "chips": chips,
        "layers": shape.layers,
        "arguments_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": dict(hlo.collectives(text)),
    }


def kernel_report(devices: list, *, blocks: tuple[int, int, int]) -> dict:
    """Our Pallas kernel with these blocks: accepted, or the compiler's refusal."""
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.int8)
    kernel = jax.jit(partial(pallas_matmul.int8_matmul, blocks=blocks))
    try:
        compile_for_tpu(kernel, x, x, devices=devices)
    except Exception as error:  # the compiler's own classes of errors are private
        return {"blocks": blocks, "refused": refusal(str(error))}
    return {"blocks": blocks, "refused": ""}


def report() -> dict:
    """Everything that chapter 07 shows of the compiler, made in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    shape = llama.shape_of(model.config, max_length=1024)
    params = llama.params_of(model, shape)
    return {
        "topology": TOPOLOGY,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "products": [
            product_report(devices, rows=rows, dtype=dtype)
            for dtype in ("float32", "bfloat16", "int8")
            for rows in (1, 2, 8, 128, 1024)
        ],
        "kernels": [kernel_report(devices, blocks=blocks) for blocks in BLOCKS],
        "decoders": [decoder_report(devices, params, shape, chips=chips) for chips in (1, 2, 4)],
    }


if __name__ == "__main__":
    print(json.dumps(report()))

"""Tensor parallelism told, not written: weights get a layout over a mesh of devices, and XLA adds the communication.

Megatron's split (Shoeybi et al. 2019, arXiv:1909.08053, section 3): matrices that read the replicated hidden state are
cut along their outputs, those that follow them along their inputs, so each half of a layer needs one all-reduce.
"""

from __future__ import annotations

from collections.abc import Mapping

from labutils.xla import llama
from labutils.xla.lazy import Lazy, jax

sharding = Lazy("jax.sharding")
AXIS = "model"
# Which axis of a matrix (out_features, in_features) is cut; what is not named here is replicated.
MEGATRON = {"q": "out", "k": "out", "v": "out", "o": "in", "gate": "out", "up": "out", "down": "in"}
AXES = {"out": 0, "in": 1, None: None}


def device_mesh(devices: list):
    """A mesh of one axis, `model`, over these devices."""
    import numpy as np

    return sharding.Mesh(np.array(devices), (AXIS,))


def partition_specs(params: dict, cuts: Mapping[str, str | None] = MEGATRON) -> dict:
    """For each array of the weights, which of its axes is spread over the mesh; same tree as `params`.

    Biases of matrices cut along their outputs are cut with them.

    Raises:
        ValueError: If a cut is none of "out", "in" and None, or its matrix is unknown.
    """
    for name, cut in cuts.items():
        if cut not in AXES or name not in llama.MATRICES:
            raise ValueError(f"cuts map {tuple(llama.MATRICES)} to 'out', 'in' or None; got {name!r}: {cut!r}")
    specs = jax.tree.map(lambda _: sharding.PartitionSpec(), params)
    for name in params["layers"]:
        cut = AXES[cuts.get(name.removesuffix("_bias"))]
        if name.endswith("_bias") and cut == 1 or cut is None:
            continue
        spec = [None] * params["layers"][name].ndim
        spec[1 + cut] = AXIS  # the first axis counts the layers
        specs["layers"][name] = sharding.PartitionSpec(*spec)
    return specs


def cache_spec():
    """Keys and values are spread by head: each device keeps those of its own heads."""
    return (sharding.PartitionSpec(None, AXIS),) * 2


def placed(tree, mesh, specs):
    """The arrays (or descriptions of arrays) laid out over the mesh."""

    def place(leaf, spec):
        layout = sharding.NamedSharding(mesh, spec)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)
        return jax.device_put(leaf, layout)

    return jax.tree.map(place, tree, specs)

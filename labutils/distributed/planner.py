"""Which mesh for a model? Memory and time of one decoding step for every data x tensor x pipeline split.

The model is deliberately simple: decoding reads every weight once (memory-bound), messages cost what `Link` says, and
a stage that waits does nothing else. Formulas: Megatron-LM (arXiv:1909.08053), GPipe (arXiv:1811.06965).
"""

from dataclasses import dataclass

from labutils.distributed.collectives import Link
from labutils.distributed.tensor_parallel import heads_of


@dataclass(frozen=True)
class ModelShape:
    """What the planner needs to know of a Llama-like model; bytes as stored on the devices."""

    weight_bytes: float
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_bytes: int = 2

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one position, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes

    @classmethod
    def of(cls, model) -> "ModelShape":
        """Returns a loaded model's shape."""
        config = model.config
        return cls(
            weight_bytes=sum(p.nbytes for p in model.parameters()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            value_bytes=model.dtype.itemsize,
        )


@dataclass(frozen=True)
class Devices:
    """`count` equal devices: memory of each, the rate at which it reads memory, the link, fixed cost of a layer.

    `one_shot` says that small all-reduces go to all others at once instead of round a ring.
    """

    count: int
    memory_bytes: float
    read_bytes_per_s: float
    link: Link
    layer_s: float = 0.0
    one_shot: bool = False


@dataclass(frozen=True)
class Load:
    """Requests answered at the same time, and the positions that each one's cache holds at its longest."""

    requests: int
    positions: int


@dataclass(frozen=True)
class Plan:
    """One mesh, what it needs and what it gives."""

    data: int
    tensor: int
    pipeline: int
    memory_bytes: float
    step_s: float
    tokens_per_s: float
    fits: bool

    def __str__(self) -> str:
        fits = "fits" if self.fits else "DOES NOT FIT"
        return (
            f"data {self.data} x tensor {self.tensor} x pipeline {self.pipeline}: {self.memory_bytes / 1e9:.2f} GB a "
            f"device, {fits}; {self.step_s * 1e3:.3g} ms a token, {self.tokens_per_s:.4g} tokens/s"
        )


def coordinates(rank: int, *, tensor: int, pipeline: int) -> tuple[int, int, int]:
    """Returns a rank's place (data, pipeline, tensor); tensor neighbours have neighbouring ranks, for they talk most.

    >>> coordinates(5, tensor=2, pipeline=2)
    (1, 0, 1)
    """
    return rank // (tensor * pipeline), rank // tensor % pipeline, rank % tensor


def step_s(model: ModelShape, devices: Devices, load: Load, *, tensor: int, pipeline: int) -> float:
    """Returns the seconds that one token takes through all stages, for `load.requests` together.

    layers (read/tensor + fixed) + all-reduces: 2 a layer and 1 for the embedding + messages between stages.
    """
    read = model.weight_bytes + load.requests * load.positions * model.kv_bytes_per_token
    message = load.requests * model.hidden * model.value_bytes
    reduces = (2 * model.layers + 1) * devices.link.all_reduce_s(message, ranks=tensor, one_shot=devices.one_shot)
    hops = (pipeline - 1) * devices.link.send_s(message) + (pipeline > 1) * devices.link.send_s(8 * load.requests)
    return read / tensor / devices.read_bytes_per_s + model.layers * devices.layer_s + reduces + hops


def plan(model: ModelShape, devices: Devices, load: Load) -> list[Plan]:
    """Returns every mesh that uses all devices and cuts no head and no layer: those that fit first, the fastest first.

    Data-parallel replicas share the requests; a pipeline has as many groups of requests in flight as stages, so that
    its stages are all busy, each group of a p-th of the requests.

    Raises:
        ValueError: Without a device or a request.
    """
    if devices.count < 1 or load.requests < 1:
        raise ValueError(f"a plan needs devices and requests; got {devices.count} and {load.requests}")
    plans = [
        _one(model, devices, load, tensor, pipeline)
        for tensor in range(1, devices.count + 1)
        for pipeline in range(1, model.layers + 1)
        if devices.count % (tensor * pipeline) == 0 and _whole_heads(model, tensor)
    ]
    return sorted(plans, key=lambda p: (not p.fits, -p.tokens_per_s, p.step_s))


def _whole_heads(model: ModelShape, tensor: int) -> bool:
    try:
        heads_of(0, tensor, heads=model.heads, kv_heads=model.kv_heads)
    except ValueError:
        return False
    return True


def _one(model: ModelShape, devices: Devices, load: Load, tensor: int, pipeline: int) -> Plan:
    data = devices.count // (tensor * pipeline)
    replica = -(-load.requests // data)  # the fullest one
    group = Load(-(-replica // pipeline), load.positions)
    seconds = step_s(model, devices, group, tensor=tensor, pipeline=pipeline)
    cache = replica * load.positions * model.kv_bytes_per_token / max(1, min(tensor, model.kv_heads))
    memory = model.weight_bytes / (tensor * pipeline) + cache / pipeline
    rate = load.requests / seconds
    return Plan(data, tensor, pipeline, memory, seconds, rate, memory <= devices.memory_bytes)

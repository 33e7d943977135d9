"""What tests let ranks do with models: everything one group can show, in one launch."""

import time

import torch
import torch.distributed as dist
from tiny_models import random_ids, tiny_model
from transformers import DynamicCache

from labutils.distributed.collectives import Comm, broadcast_weights_, checksum
from labutils.distributed.disaggregation import generate_disaggregated
from labutils.distributed.experts import expert_parallel
from labutils.distributed.libraries import load_by_transformers, parallelize_by_torch_
from labutils.distributed.pipeline import Stage, gpipe_forward, pipeline_generate
from labutils.distributed.ring_attention import ring_attention
from labutils.distributed.tensor_parallel import tensor_parallel_

MODELS = ("llama-gqa-tied", "llama-untied-bias", "llama-head-dim", "qwen2", "qwen3")
IDS = {"count": 7, "batch": 3, "seed": 5}


def tensor_parallel(names):
    """Logits of a prompt and of one cached step after it, and the meter, for each model."""
    found = {}
    for name in names:
        comm = Comm()
        model = tensor_parallel_(tiny_model(name), comm)
        ids, cache = random_ids(**IDS), DynamicCache()
        with torch.no_grad():
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            calls, sent = dict(comm.calls), dict(comm.sent_bytes)
            step = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits
            model.set_attn_implementation("eager")  # it repeats the keys for the queries by the layer's own count
            eager = model(input_ids=ids, use_cache=False).logits
        found[name] = (logits, step, eager, calls, sent)
    return found


def groups_of_prompts():
    return [random_ids(count=4 + g, batch=2, seed=g) for g in range(3)]


def piped_model():
    """Untied, and with large weights: other tiny models' tokens hardly depend on what they attend to."""
    return tiny_model("llama-untied-bias", std=0.4, num_hidden_layers=5)


def pipeline():
    comm = Comm()
    stage = Stage(piped_model(), comm)
    texts = pipeline_generate(stage, groups_of_prompts(), 5)
    meter = dict(comm.calls), dict(comm.sent_bytes)
    ids = random_ids(**IDS).split(1)
    outputs, _ = gpipe_forward(stage, comm, ids, shape=lambda x: (*x.shape, stage.model.config.hidden_size))
    return texts, outputs, meter


def ring(length, heads=2, dim=8):
    comm = Comm()
    q, k, v = torch.randn(3, heads, length, dim, generator=torch.Generator().manual_seed(1)).unbind()
    part = slice(comm.rank * length // comm.size, (comm.rank + 1) * length // comm.size)
    return ring_attention(q[:, part], k[:, part], v[:, part], comm), dict(comm.calls)


def expert_weights(count, hidden=6):
    return torch.randn(count, hidden, hidden, generator=torch.Generator().manual_seed(2))


def experts(per_rank=2, tokens=9):
    comm = Comm()
    weights = expert_weights(per_rank * comm.size)[comm.rank * per_rank : (comm.rank + 1) * per_rank]
    generator = torch.Generator().manual_seed(10 + comm.rank)
    x = torch.randn(tokens, 6, generator=generator)
    ids = torch.rand(tokens, per_rank * comm.size, generator=generator).argsort(dim=1)[:, :2]
    gates = torch.rand(tokens, 2, generator=generator)
    y = expert_parallel(x, ids, gates, [lambda rows, w=w: rows @ w for w in weights], comm)
    return x, ids, gates, y, dict(comm.sent_bytes)


def synchronised():
    model = tiny_model("llama-gqa-tied", seed=dist.get_rank())
    before = checksum(model)
    return before, broadcast_weights_(model), checksum(model)


def everything(names=MODELS):
    large = dist.get_world_size() == 4
    return {
        "mesh": mesh(tensor=2) if large else None,
        "refusal": refusal() if large else None,
        "tensor": tensor_parallel(names),
        "pipeline": pipeline(),
        "ring": ring(8),
        "experts": experts(),
        "weights": synchronised(),
        "disaggregated": disaggregated(),
    }


def libraries(folder, name):
    """Logits by torch's and by transformers' own tensor parallelism, and tokens by transformers' pipeline."""
    from torch.distributed.tensor.debug import CommDebugMode

    ids, found = random_ids(**IDS), {}
    by_torch = parallelize_by_torch_(tiny_model(name))
    with torch.no_grad():
        with CommDebugMode() as meter:
            found["torch"] = by_torch(input_ids=ids, use_cache=False).logits
        found["torch calls"] = meter.get_total_counts()
        found["transformers"] = load_by_transformers(folder, tp_size=dist.get_world_size())(ids, use_cache=False).logits
        piped = load_by_transformers(folder, pp_size=dist.get_world_size())
        found["pipeline"] = piped.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    return found


def mesh(tensor):
    """Tensor parallelism inside of each pipeline stage: neighbouring ranks share a stage."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (dist.get_world_size() // tensor, tensor)
    grid = init_device_mesh("cpu", shape, mesh_dim_names=("pipeline", "tensor"))
    model = tensor_parallel_(tiny_model("llama-gqa-tied"), Comm(grid["tensor"].get_group()))
    stage = Stage(model, Comm(grid["pipeline"].get_group()))
    return pipeline_generate(stage, [random_ids(**IDS)], 5)


def seconds_of_messages(count, nbytes):
    """Seconds that `count` all-reduces of `nbytes` take, after one to connect."""
    tensor = torch.ones(nbytes // 4)
    dist.all_reduce(tensor.clone())
    began = time.monotonic()
    for _ in range(count):
        dist.all_reduce(tensor)
    return time.monotonic() - began, float(tensor[0])


def disaggregated():
    """One prompt of each model read by rank 0 and continued by rank 1, with the meter; or what was refused."""
    comm = Comm()
    try:
        texts = {}
        for name in MODELS:
            comm.reset()
            text = generate_disaggregated(tiny_model(name), random_ids(7, seed=3), 5, comm)
            texts[name] = text, dict(comm.calls), dict(comm.sent_bytes)
        return texts
    except ValueError as error:
        return str(error)


def refusal():
    """What is said to more ranks than layers."""
    try:
        Stage(tiny_model("llama-gqa-tied"), Comm())
    except ValueError as error:
        return str(error)

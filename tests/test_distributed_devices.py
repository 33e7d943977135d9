"""Ranks keep their tensors on their own device: tried with torch's "meta" device, for which no GPU is needed.

Tensors there have a shape and no numbers, and an operation on two devices is an error, as it is with a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_model
from torch.testing._internal.distributed.fake_pg import FakeStore

from labutils.course.bench import ranks
from labutils.distributed import collectives
from labutils.distributed.pipeline import Stage, pipeline_generate
from labutils.distributed.rank import join_group
from labutils.distributed.ring_attention import ring_attention
from labutils.distributed.tensor_parallel import tensor_parallel_

META = torch.device("meta")


@pytest.fixture(params=[0, 1], ids="rank {}".format)
def comm(request, monkeypatch):
    """One of two ranks in a group whose messages go nowhere."""
    monkeypatch.setattr(collectives, "rank_device", lambda: META)
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=request.param, world_size=2)
    yield collectives.Comm()
    dist.destroy_process_group()


def test_what_arrives_is_made_on_the_rank_s_device(comm):
    assert comm.receive((2, 3), torch.float32, 1 - comm.rank).device == META


def test_ring_attention_stays_on_the_device(comm):
    query, key, value = torch.randn(3, 2, 4, 8, device=META)
    assert ring_attention(query, key, value, comm).device == META


def test_both_parallel_models_stay_on_the_device(comm):
    ids = torch.zeros(2, 5, dtype=torch.long, device=META)
    sliced = tensor_parallel_(tiny_model("llama-gqa-tied"), comm).to(META)
    assert ranks.greedy(sliced, ids, 2).device == META
    stage = Stage(tiny_model("llama-gqa-tied").to(META), comm)
    assert [text.device for text in pipeline_generate(stage, [ids, ids], 2)] == [META, META][: 2 * comm.rank]


def test_targets_make_their_tensors_on_the_device(comm, monkeypatch):
    monkeypatch.setattr(ranks, "rank_device", lambda: META)
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: sent.append(tensor.device))
    monkeypatch.setattr(ranks, "broadcast_weights_", lambda layer: sent.append(layer.weight.device))
    for target, values in ((ranks.hello, ()), (ranks.divides, (6.0, [1.0, 2.0]))):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # it has no numbers to return
            target(*values)
    assert set(sent) == {META} and len(sent) >= 1
    assert set(ranks.paced_pipeline(0.0, [1, 2])) == {1, 2}


@pytest.mark.parametrize(("config", "device"), [("cpu:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cuda:3")])
def test_rank_device_is_a_gpu_where_the_group_has_nccl(monkeypatch, config, device):
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert collectives.rank_device() == torch.device(device)


@pytest.mark.parametrize(("backend", "device"), [("gloo", None), ("cpu:gloo,cuda:nccl", torch.device("cuda", 1))])
def test_join_group_takes_the_rank_s_own_gpu(monkeypatch, tmp_path, backend, device):
    seen = SimpleNamespace()
    environ = {"LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "0", "GROUP_WORLD_SIZE": "1"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: setattr(seen, "chosen", chosen))
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **settings: vars(seen).update(settings, args=args))
    join_group(tmp_path, backend, 1, 2)
    assert seen.args == (backend,) and seen.device_id == device and getattr(seen, "chosen", None) == device

"""What chapter 09 and `bench distributed` let ranks do; ranks import it, so it cannot live in a notebook."""

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from labutils.distributed.collectives import Comm, Link, broadcast_weights_, checksum, rank_device
from labutils.distributed.disaggregation import DECODE, generate_disaggregated, greedy
from labutils.distributed.experts import expert_parallel
from labutils.distributed.pipeline import Stage, gpipe_forward, pipeline_generate
from labutils.distributed.ring_attention import ring_attention
from labutils.distributed.tensor_parallel import tensor_parallel_
from labutils.measurement.timing import synchronize


def hello() -> dict[str, object]:
    """Adds up the ranks' numbers, then gives all of them rank 0's weights: checksums before and after."""
    total = torch.tensor([dist.get_rank() + 1], device=rank_device())
    dist.all_reduce(total)
    torch.manual_seed(dist.get_rank())
    layer = torch.nn.Linear(4, 4).to(rank_device())
    before = checksum(layer)
    after = broadcast_weights_(layer)
    return {"rank": dist.get_rank(), "sum": int(total), "before": before, "after": after}


def divides(dividend: float, divisors: Sequence[float]) -> float:
    """Divides by the rank's own divisor and adds up: with a zero among them one rank fails, the others wait for it."""
    quotient = torch.tensor([dividend / divisors[dist.get_rank()]], device=rank_device())
    dist.all_reduce(quotient)
    return float(quotient)


def paced_pipeline(pace_s: float, counts: Sequence[int]) -> dict[int, list[tuple[float, float]]]:
    """Sends micro-batches through stages that sleep `pace_s` for each: the work is simulated, the waiting real."""
    comm, found = Comm(), {}

    def forward(x: Tensor) -> Tensor:
        time.sleep(pace_s)
        return x

    for count in counts:
        dist.barrier()
        pieces = [torch.zeros(1, 1, device=comm.device)] * count
        _, found[count] = gpipe_forward(forward, comm, pieces, shape=lambda piece: tuple(piece.shape))
    return found


def four_ranks(pace_s: float, counts: Sequence[int]) -> dict[str, object]:
    """The paced pipeline, a text longer than one rank holds, and two of four experts, not equally popular, a token."""
    comm, generator = Comm(), torch.Generator().manual_seed(0)
    times = paced_pipeline(pace_s, counts)
    text = torch.randn(3, 2, 16 * comm.size, 8, generator=generator).to(comm.device)
    mine = text[:, :, 16 * comm.rank : 16 * (comm.rank + 1)]
    attended = ring_attention(*mine, comm)
    ring = dict(comm.sent_bytes)
    comm.reset()
    weight = torch.randn(comm.size, 8, 8, generator=generator).to(comm.device)
    popularity = 1 / torch.arange(1, comm.size + 1, dtype=torch.float32).expand(16 * comm.size, -1)
    choices = torch.multinomial(popularity, 2, generator=generator).to(comm.device)
    gates = torch.rand(choices.shape, generator=generator).softmax(dim=1).to(comm.device)
    x, own = mine[0, 0], slice(16 * comm.rank, 16 * (comm.rank + 1))
    y = expert_parallel(x, choices[own], gates[own], [lambda rows: rows @ weight[comm.rank]], comm)
    expected = torch.einsum("tk,ti,tkij->tj", gates[own], x, weight[choices[own]])
    return {
        "times": times,
        "text": text.cpu(),
        "attended": attended.cpu(),
        "ring": ring,
        "expert_off": (y - expected).abs().max().item(),
        "rows": torch.bincount(choices.flatten(), minlength=comm.size).tolist(),
        "moved": comm.sent_bytes,
    }


def over_links(name: str, token_ids: Tensor, new_tokens: int, links: Mapping[str, Link | None], repeats: int) -> dict:
    """Decodes the same prompts tensor-parallel and as a pipeline with a group a stage, over each simulated link.

    Returns:
        Tokens of both ways, seconds of every run (interleaved), how much longer than asked this rank waited in a run on
        average, and what one token of the tensor-parallel one sends.
    """
    from labutils.lab.models.load import load_model

    comm = Comm()
    sliced = tensor_parallel_(load_model(name).model, comm).to(comm.device)
    staged = Comm()
    stage = Stage(load_model(name).model.to(comm.device), staged)
    token_ids = token_ids.to(comm.device)
    groups = list(token_ids.chunk(staged.size))
    ways: dict[str, Callable[[], object]] = {
        "tensor": lambda: greedy(sliced, token_ids, new_tokens),
        "pipeline": lambda: pipeline_generate(stage, groups, new_tokens),
    }
    tokens = {way: run() for way, run in ways.items()}  # the warm-up
    tokens = {"tensor": tokens["tensor"].cpu(), "pipeline": [group.cpu() for group in tokens["pipeline"]]}
    comm.reset()
    greedy(sliced, token_ids[:, :1], 1)
    sent = dict(comm.calls), dict(comm.sent_bytes)
    seconds: dict[tuple[str, str], list[float]] = {(way, link): [] for link in links for way in ways}
    late_s = dict.fromkeys(seconds, 0.0)
    for _ in range(repeats):
        for link_name, link in links.items():
            comm.link = staged.link = link
            for way, run in ways.items():
                comm.late_s = staged.late_s = 0.0
                dist.barrier()
                began = time.monotonic()
                run()
                synchronize(comm.device)
                dist.barrier()
                seconds[way, link_name].append(time.monotonic() - began)
                late_s[way, link_name] += (comm.late_s + staged.late_s) / repeats
    return {"tokens": tokens, "seconds": seconds, "late_s": late_s, "sent": sent}


def logits_of(model: torch.nn.Module, token_ids: Tensor) -> Tensor:
    """Returns a model's logits on the CPU, without a cache."""
    return model(token_ids, use_cache=False).logits.cpu()


def library_logits(name: str, token_ids: Tensor) -> dict[str, object]:
    """Logits of torch's and of transformers' tensor parallelism, and tokens of transformers' pipeline.

    transformers' ways need the package accelerate; without it only the reason comes back.
    """
    from labutils.distributed.libraries import load_by_transformers, parallelize_by_torch_
    from labutils.lab.models.load import load_model
    from labutils.lab.paths import DATA

    ranks, found, token_ids = dist.get_world_size(), {}, token_ids.to(rank_device())
    with torch.no_grad():
        found["parallelize_module"] = logits_of(parallelize_by_torch_(load_model(name).model), token_ids)
        if importlib.util.find_spec("accelerate") is None:
            return found | {"skipped": "transformers' own way needs `pip install accelerate`"}
        found["tp_plan='auto'"] = logits_of(load_by_transformers(DATA / name, tp_size=ranks), token_ids)
        piped = load_by_transformers(DATA / name, pp_size=ranks)
        found["pp_size"] = piped.generate(token_ids, max_new_tokens=4, do_sample=False, pad_token_id=1).cpu()
    return found


def two_ranks(name: str, token_ids: Tensor, new_tokens: int, links: Mapping[str, Link | None], repeats: int) -> dict:
    """By hand and by library, in one group: logits, tokens, bytes, and seconds over links."""
    with torch.no_grad():
        from labutils.lab.models.load import load_model

        sliced = tensor_parallel_(load_model(name).model, Comm()).to(rank_device())
        logits = logits_of(sliced, token_ids.to(rank_device()))
    over = over_links(name, token_ids, new_tokens, links, repeats)
    counted = loopback_bytes(megabytes=8, rounds=4)
    return {"by hand": logits, **library_logits(name, token_ids), "over": over, "loopback": counted}


def loopback_bytes(megabytes: float, rounds: int) -> tuple[float, int]:
    """Bytes that the kernel counted on the loopback during all-reduces, and the ring formula's for all ranks."""
    import psutil

    comm, tensor = Comm(), torch.ones(math.ceil(megabytes * 1e6 / 4))
    interface = next(name for name in ("lo", "lo0") if name in psutil.net_io_counters(pernic=True))
    comm.all_reduce_(tensor.clone())
    comm.reset()
    dist.barrier()
    before = psutil.net_io_counters(pernic=True)[interface].bytes_sent
    dist.barrier()
    for _ in range(rounds):
        comm.all_reduce_(tensor)
    dist.barrier()
    after = psutil.net_io_counters(pernic=True)[interface].bytes_sent
    return after - before, comm.size * comm.sent_bytes["all_reduce"]


def prefill_apart(
    name: str, token_ids: Tensor, new_tokens: int, links: Mapping[str, Link | None], repeats: int
) -> dict:
    """An answer by one rank alone, and with the prompt read by the other, over each simulated link.

    Returns:
        Of rank 1: its tokens each way, seconds of every run (interleaved), and what the other rank sent for one answer.
    """
    from labutils.lab.models.load import load_model

    comm, seconds = Comm(), {"alone": [], **{link: [] for link in links}}
    model, token_ids = load_model(name).model.to(comm.device), token_ids.to(comm.device)
    tokens, sent = {}, [0, 0]
    for round_ in range(repeats + 1):  # the first one warms up
        for way in seconds:
            comm.link = links.get(way)
            comm.reset()
            dist.barrier()
            began = time.monotonic()
            if way != "alone":
                tokens[way] = generate_disaggregated(model, token_ids, new_tokens, comm)
            elif comm.rank == DECODE:
                tokens[way] = greedy(model, token_ids, new_tokens)
            synchronize(comm.device)
            if round_:
                seconds[way].append(time.monotonic() - began)
    dist.all_gather_object(sent, comm.sent_bytes["send"])
    return {"tokens": tokens, "seconds": seconds, "sent": sent[0]}

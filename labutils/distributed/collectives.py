"""A group of ranks that counts what it sends, and a link that may be slower than the machine's own (simulated)."""

import math
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

LOOK_S = 0.002


@dataclass(frozen=True)
class Link:
    """What a message costs between two devices: a fixed time, and a time per byte.

    Ring all-reduce of n bytes over p ranks: 2(p-1) steps of n/p bytes each (Patarasuk and Yuan 2009).

    >>> link = Link(latency_s=0.001, bytes_per_s=1e6)
    >>> link.send_s(1000), round(link.all_reduce_s(4000, ranks=2), 6)
    (0.002, 0.006)
    """

    latency_s: float = 0.0
    bytes_per_s: float = math.inf

    def send_s(self, nbytes: float) -> float:
        """Seconds until a message of `nbytes` has arrived."""
        return self.latency_s + nbytes / self.bytes_per_s

    def all_reduce_s(self, nbytes: float, *, ranks: int, one_shot: bool = False) -> float:
        """Seconds of an all-reduce of `nbytes`: in a ring, or in one shot, where each rank sends all to all others."""
        steps, each = (min(ranks - 1, 1), (ranks - 1) * nbytes) if one_shot else (2 * (ranks - 1), nbytes / ranks)
        return steps * self.send_s(each)

    def all_gather_s(self, nbytes: float, *, ranks: int) -> float:
        """Seconds of a ring all-gather whose result has `nbytes`."""
        return (ranks - 1) * self.send_s(nbytes / ranks)


def all_reduce_bytes(nbytes: float, ranks: int) -> float:
    """Returns what each rank sends in a ring all-reduce of `nbytes`: 2(p-1)/p of them.

    >>> all_reduce_bytes(1000, 4)
    1500.0
    """
    return 2 * (ranks - 1) * nbytes / ranks


def rank_device() -> torch.device:
    """Returns where this rank's tensors belong: on its GPU in a group that has NCCL, else on the CPU."""
    nccl = "nccl" in dist.get_backend_config()
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


class Comm:
    """A process group with a meter: `calls` by kind, and `sent_bytes` by kind as a ring sends them.

    Tensors are expected on `device`, where those that arrive are made.
    With a `link`, every message takes at least that link's time: a simulation, on top of what it really takes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, link: Link | None = None) -> None:
        self.group, self.link, self.device = group, link, rank_device()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.pending: list[tuple[dist.Work, Tensor]] = []
        self.late_s = 0.0  # how much longer than the link asked for this rank has waited

    def count(self, kind: str, nbytes: float) -> None:
        """Notes one call and the bytes that this rank sent for it."""
        self.calls[kind] += 1
        self.sent_bytes[kind] += round(nbytes)

    def reset(self) -> None:
        """Sets the meter to zero."""
        self.calls.clear()
        self.sent_bytes.clear()

    def wait(self, seconds: float) -> None:
        """Lets a simulated link's time pass; a sleeper wakes late, so the end is spent looking at the clock."""
        end = time.monotonic() + seconds
        time.sleep(max(0.0, seconds - LOOK_S))
        while time.monotonic() < end:
            time.sleep(0)  # lets others of this core go on
        self.late_s += time.monotonic() - end if seconds > 0 else 0.0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Replaces a tensor on every rank by the sum over the ranks."""
        self.count("all_reduce", all_reduce_bytes(tensor.nbytes, self.size))
        if self.link:
            self.wait(self.link.all_reduce_s(tensor.nbytes, ranks=self.size))
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_gather(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Returns all ranks' parts side by side along the last axis, where rank r's part has `sizes[r]` entries."""
        widest = max(sizes)
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1])).contiguous()
        self.count("all_gather", (self.size - 1) * padded.nbytes)
        if self.link:
            self.wait(self.link.all_gather_s(padded.nbytes * self.size, ranks=self.size))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    def send(self, tensor: Tensor, to: int) -> None:
        """Sends without waiting: the receiver may be busy, and waiting for it would stop a pipeline."""
        tensor = tensor.contiguous()
        self.count("send", tensor.nbytes)
        if self.link:  # the moment of sending goes along, so that time in flight and time in work overlap
            self._isend(torch.tensor([time.monotonic()], dtype=torch.float64), to)
        self._isend(tensor, to)

    def _isend(self, tensor: Tensor, to: int) -> None:
        self.pending = [(work, kept) for work, kept in self.pending if not work.is_completed()]
        self.pending.append((dist.isend(tensor, group_dst=to, group=self.group), tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> Tensor:
        """Waits for a tensor of a known shape."""
        sent_at = torch.zeros(1, dtype=torch.float64)
        if self.link:
            dist.recv(sent_at, group_src=source, group=self.group)
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(tensor, group_src=source, group=self.group)
        if self.link:
            self.wait(sent_at.item() + self.link.send_s(tensor.nbytes) - time.monotonic())
        return tensor

    def flush(self) -> None:
        """Waits until everything sent has left."""
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()


def checksum(module: torch.nn.Module) -> int:
    """Returns a number that changes with any bit of any weight: CRC-32 over the parameters' bytes, in order.

    >>> layer = torch.nn.Linear(2, 2)
    >>> before = checksum(layer)
    >>> _ = layer.bias.data.add_(1)
    >>> before == checksum(layer)
    False
    """
    import zlib

    total = 0
    for parameter in module.parameters():
        total = zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), total)
    return total


def broadcast_weights_(module: torch.nn.Module, *, source: int = 0) -> int:
    """Gives every rank the weights of one, and proves it: all ranks' checksums are compared.

    Between the first and the last broadcast a rank holds a mixture; only after the comparison may anyone answer.

    Returns:
        The common checksum.

    Raises:
        ValueError: If the ranks' weights differ afterwards.
    """
    for parameter in module.parameters():
        dist.broadcast(parameter.data, src=source)
    sums: list = [None] * dist.get_world_size()
    dist.all_gather_object(sums, checksum(module))
    if len(set(sums)) > 1:
        raise ValueError(f"after a broadcast all ranks hold the same weights; got checksums {sums}")
    return sums[0]

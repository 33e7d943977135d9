"""Copies that hide: the next batch travels to the GPU while the kernels of this one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def prefetched(batches: Iterable[Tensor], device: str | torch.device) -> Iterator[Tensor]:
    """Hands out each batch on the device, in order; on a GPU the next one's copy has begun by then.

    Pinned memory, so that the copy runs by itself (pin batches beforehand where you can: pinning copies them, and the
    host waits); a stream of its own, so that it runs beside the kernels; an event, so that the kernels wait for their
    own copy and not for the next one's. The CUDA half was not run on a GPU.
    """
    if torch.device(device).type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    copies, coming = torch.cuda.Stream(device), None
    for batch in batches:
        arrived = coming
        with torch.cuda.stream(copies):
            pinned = batch if batch.is_pinned() else batch.pin_memory()
            coming = pinned.to(device, non_blocking=True), copies.record_event()
        if arrived:
            yield _used(*arrived)
    if coming:
        yield _used(*coming)


def _used(batch: Tensor, event) -> Tensor:
    """Makes the current stream wait for the copy, and tells the allocator that this stream reads it."""
    stream = torch.cuda.current_stream(batch.device)
    stream.wait_event(event)
    batch.record_stream(stream)
    return batch

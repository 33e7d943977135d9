"""A GPU of pure arithmetic: a queue that launches fill and the device empties. For lessons about time on any machine.

Nothing here is measured: the seconds are the ones it is given. It keeps to three rules of CUDA: a launch returns at
once, a stream works through its queue in order, and two streams overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SimulatedGpu:
    """A host clock and streams that are busy until some time.

    >>> gpu = SimulatedGpu(launch_s=0.1)
    >>> gpu.launch(2.0)
    >>> gpu.clock()
    0.1
    >>> gpu.wait()
    >>> gpu.clock()
    2.1
    """

    launch_s: float = 5e-6
    now: float = 0.0
    busy_until: dict[str, float] = field(default_factory=dict)
    events: list[tuple[str, float, float]] = field(default_factory=list)

    def launch(self, seconds: float, *, stream: str = "kernels", after: str | None = None) -> None:
        """Queues work of so many seconds; it starts when its stream is free, and not before `after`'s stream is.

        Raises:
            ValueError: for negative seconds.
        """
        if seconds < 0:
            raise ValueError(f"work takes at least 0 seconds; got {seconds}")
        self.now += self.launch_s
        start = max(self.now, self.busy_until.get(stream, 0.0), self.busy_until.get(after, 0.0))
        self.busy_until[stream] = start + seconds
        self.events.append((stream, start, seconds))

    def wait(self) -> None:
        """Blocks until every stream is done: `torch.cuda.synchronize()`."""
        self.now = max([self.now, *self.busy_until.values()])

    def clock(self) -> float:
        """The host's time in seconds."""
        return self.now

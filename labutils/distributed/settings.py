"""What `dispatch` takes and gives: settings, answers and a report."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

POLICIES = ("pull", "static", "weighted", "routed")


@dataclass(frozen=True)
class Answer:
    """The outcome of one request: a value, or a named error."""

    id: int
    value: object
    error: str | None
    node: str


@dataclass
class Report:
    """What has happened so far.

    `answers` and `errors` count requests that have ended. `retries` counts requests that were sent again, after a loss
    or after their batch raised, and `duplicates` the outcomes that came for a request that had ended already.
    """

    answers: int = 0
    errors: int = 0
    retries: int = 0
    duplicates: int = 0
    lost_nodes: int = 0
    per_node: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def __str__(self) -> str:
        shares = ", ".join(f"{node} {count}" for node, count in sorted(self.per_node.items()))
        return (
            f"{self.answers} answers, {self.errors} errors, executed at least once: {self.retries} retries, "
            f"{self.duplicates} duplicates; nodes lost {self.lost_nodes}; {shares or 'no node'}"
        )


@dataclass(frozen=True)
class Settings:
    """How to dispatch.

    Attributes:
        policy: "pull" (a free node takes the next batch), "static" (batches dealt out in turn), "weighted" (in
            proportion to `rates`) or "routed" (where `route` says). What a lost node leaves behind is pulled.
        rates: Requests/s of each node, for "weighted".
        route: From a request and how many requests each node holds to a node, for "routed".
        max_requests: Requests in a batch.
        max_tokens: Padded length of a batch; needs `length`. A longer request is a named error.
        length: Length of a request; batches hold similar ones.
        in_flight: Batches that a node holds: one in work, the others so that it need not wait.
        window: At most this many requests are read ahead of the oldest unanswered one.
        window_bytes: Reading pauses while pickled requests and undelivered answers hold more than this.
        timeout_s: A node without progress for so long counts as stopped, so it must exceed the time of a batch, those
            of other runs on the engine included; no node, or no word from the engine, for so long ends all requests.
        deadline_s: A request that has not ended so long after it was read ends with a named error; it may still run.
        max_losses: A request that was alone on so many lost nodes is given up as their killer.
        live: The source may pause, as a queue of users does: a thread reads it, so that answers go out meanwhile.
    """

    policy: str = "pull"
    rates: Mapping[str, float] | None = None
    route: Callable[[Any, Mapping[str, int]], str] | None = None
    max_requests: int = 1
    max_tokens: int | None = None
    length: Callable[[Any], int] = lambda payload: 1
    in_flight: int = 2
    window: int = 4096
    window_bytes: int = 2**30
    timeout_s: float = 60.0
    deadline_s: float = math.inf
    max_losses: int = 2
    live: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}; got {self.policy!r}")
        if self.policy == "weighted" and not (self.rates and min(self.rates.values()) > 0):
            raise ValueError(f"the weighted policy needs a positive rate for every node; got {self.rates}")
        if (self.policy == "routed") != (self.route is not None):
            raise ValueError(f"the routed policy and a route need each other; got {self.policy!r} and {self.route}")
        for name in ("max_requests", "in_flight", "window", "window_bytes", "max_losses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("timeout_s", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")

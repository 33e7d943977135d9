"""Ray as the engine: one actor per node, on a cluster of its own or a running one. `pip install ray`."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from labutils.distributed.work import AnswerBatch, NodeGone, Outcome, answer_batch
from labutils.lab.hosts import is_loopback

ANSWER_S = 0.01  # an idle actor's answer takes a millisecond; what comes later is read at the next look
START_S = 120.0
PATIENT = {"gcs_rpc_server_reconnect_timeout_s": 10**6}  # 12 days; after 60 s Ray would end the process that uses it
MISSING = 'Ray is needed here: pip install "ray>=2.60"'


class Worker:
    """What runs in an actor."""

    def answer(self, function: AnswerBatch, payloads: list[bytes], node: str) -> list[Outcome] | None:
        """Answers a batch."""
        return answer_batch(function, payloads, node)

    def live(self) -> None:
        """Returns: what an idle actor does at once, a busy one after its batches, a stopped one never."""


class RayEngine:
    """Ray actors as `dispatch` sees them; a dead actor is replaced, under its old name and a new address."""

    def __init__(self, ray, nodes: int, gpus_per_node: float = 0) -> None:
        self.ray = ray
        spread = {"scheduling_strategy": "SPREAD", "num_cpus": 1, "num_gpus": gpus_per_node, "max_restarts": 0}
        self.make = ray.remote(**spread)(Worker).remote
        self.actors = {f"node-{i}": self.make() for i in range(nodes)}
        self.asked: dict[str, object] = {}  # by address: the call of `live` that is on its way
        self.lived: set[str] = set()

    def nodes(self, wait_s: float = ANSWER_S) -> Mapping[str, str]:
        """Returns the actors that have started, by name, the dead ones replaced. A slow or stopped one stays.

        Each is asked whether it is `live`, and only Ray's word that an actor is dead counts. So one that died idle is
        replaced before the next batch, instead of taking it along, and its successor gets none before it has started.
        """
        actors = {address: self.actors[name] for name, address in self.addresses().items()}
        self.asked = {address: self.asked.get(address) or actor.live.remote() for address, actor in actors.items()}
        calls = {call: address for address, call in self.asked.items()}
        for call in self.ray.wait(list(calls), num_returns=len(calls), timeout=wait_s)[0]:
            del self.asked[calls[call]]
            try:
                self.ray.get(call)
                self.lived.add(calls[call])
            except self.ray.exceptions.RayActorError:
                self.replace(calls[call])
        return {name: address for name, address in self.addresses().items() if address in self.lived}

    def addresses(self) -> dict[str, str]:
        """Returns the actors' ids by name, as far as their deaths are known."""
        return {name: actor._actor_id.hex() for name, actor in self.actors.items()}

    def session(self) -> "RaySession":
        """Opens a session for one run."""
        return RaySession(self)

    def replace(self, actor_id: str) -> None:
        """Starts a new actor in the place of a dead one."""
        for name, actor in self.actors.items():
            if actor._actor_id.hex() == actor_id:
                self.actors[name] = self.make()


class RaySession:
    """The batches of one run in the engine's actors."""

    def __init__(self, engine: RayEngine) -> None:
        self.engine, self.ray = engine, engine.ray
        self.waiting: list = []

    def submit(self, node: str, address: str, function: AnswerBatch, payloads: list[bytes]) -> object:
        """Queues a batch in an actor, which works on one at a time.

        Raises:
            NodeGone: If the actor at this address has been replaced.
        """
        if self.engine.addresses()[node] != address:
            raise NodeGone(f"{node} has been replaced")
        handle = self.engine.actors[node].answer.remote(function, payloads, node)
        self.waiting.append(handle)
        return handle

    def finished(self, timeout_s: float) -> list[tuple[object, Sequence[Outcome] | Exception | None]]:
        """Waits for a batch; those of a dead actor are left to `dispatch`, which sees the new address."""
        if not self.waiting:
            time.sleep(timeout_s)
            return []
        done, self.waiting = self.ray.wait(self.waiting, timeout=timeout_s)
        found = []
        for handle in done:
            try:
                found.append((handle, self.ray.get(handle)))
            except self.ray.exceptions.RayActorError as error:
                self.engine.replace(error.actor_id)
            except Exception as error:
                found.append((handle, error))
        return found

    def forget(self, handles: Iterable[object]) -> None:
        """Stops waiting for batches and cancels those that have not begun."""
        for handle in handles:
            self.waiting = [other for other in self.waiting if other != handle]
            with contextlib.suppress(Exception):
                self.ray.cancel(handle)


@contextlib.contextmanager
def ray_cluster(nodes: int, *, address: str | None = None, gpus_per_node: float = 0) -> Iterator[RayEngine]:
    """Starts Ray on this machine, or joins a running cluster at "host:port", with `nodes` actors spread over it.

    Ray's processes listen on every interface, whatever they are told (seen with 2.60): its token authentication, on by
    default there, has to stay on. Beyond this machine set RAY_USE_TLS=1 and its certificates on every node as well.

    Batches go straight to the actors, so they are answered while Ray's scheduler, the GCS, is stopped or gone; a node
    that dies meanwhile counts as stopped, after `timeout_s`, and has no successor before the GCS is back. On a cluster
    that was started elsewhere Ray ends this process once the GCS has been away for 60 s, or for as long as
    RAY_gcs_rpc_server_reconnect_timeout_s of its environment says.

    Each actor takes one CPU and `gpus_per_node` GPUs; an actor for which the cluster has no room never starts,
    and is no node. This waits for the others, at most `START_S` seconds.
    Whatever Ray has started is stopped at the end, after a start that failed too.

    Raises:
        ValueError: Without tokens, or for an address beyond this machine without RAY_USE_TLS=1.
        ModuleNotFoundError: Without Ray.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise ValueError(
            f"Ray's ports are open to all without tokens; got RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']!r}"
        )
    if address and not is_loopback(address.rpartition(":")[0]) and os.environ.get("RAY_USE_TLS") != "1":
        raise ValueError(f"beyond this machine Ray needs RAY_USE_TLS=1 and certificates; got {address!r} without")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING, name=error.name) from None
    here = {"num_cpus": nodes, "_node_ip_address": "127.0.0.1", "include_dashboard": False, "_system_config": PATIENT}
    try:
        ray.init(address=address, log_to_driver=False, **({} if address else here))
        engine = RayEngine(ray, nodes, gpus_per_node)
        engine.nodes(START_S)
        yield engine
    finally:
        ray.shutdown()

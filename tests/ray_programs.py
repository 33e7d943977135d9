"""Programs that use Ray, for tests that need one of their own: each prints rows of JSON.

    python tests/ray_programs.py without_gcs POLICY S    # its scheduler, the GCS, stops or dies; then S seconds pass
    python tests/ray_programs.py two_nodes               # two machines with a GPU each, both made up, on this one

Where the GCS stays away, Ray ends the process that uses it, which must not be pytest's.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time

import psutil

from labutils.distributed.dispatch import Report, Settings, dispatch
from labutils.distributed.ray_engine import ray_cluster

COUNT, TIMEOUT_S, AWAY_S = 60, 3.0, 1.0
RATES = {"node-0": 1, "node-1": 2, "node-2": 3}


def doubled(batch):
    time.sleep(0.06)  # three nodes take longer than the GCS is away
    return [2 * x for x in batch]


def process_ids(batch):
    return [os.getpid()] * len(batch)


def row(name, engine, strike, **settings):
    """One run in which something happens after the fourth answer."""
    report, answers, began = Report(), [], time.monotonic()
    for answer in dispatch(range(COUNT), doubled, engine, Settings(timeout_s=TIMEOUT_S, **settings), report=report):
        answers.append(answer)
        if answer.id == 3:
            strike()
    kept = [a.id for a in answers] == list(range(COUNT)) and all(a.value == 2 * a.id for a in answers if not a.error)
    found = {"name": name, "kept": kept, "errors": sorted({a.error for a in answers if a.error})}
    print(json.dumps(found | {"answers": report.answers, "lost": report.lost_nodes, "s": time.monotonic() - began}))


def without_gcs(policy, away_s):
    with ray_cluster(3) as engine:
        [gcs] = [p.pid for p in psutil.Process().children(recursive=True) if p.name().startswith("gcs_server")]
        first = dispatch(range(12), process_ids, engine, Settings(policy="static"))
        pids = {answer.node: answer.value for answer in first}

        def send(signum, *targets):
            for pid in targets:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)

        def pause():
            send(signal.SIGSTOP, gcs)
            threading.Timer(AWAY_S, send, [signal.SIGCONT, gcs]).start()

        faults = {
            "woken": pause,
            "stopped": lambda: send(signal.SIGSTOP, gcs),
            "killed": lambda: send(signal.SIGKILL, gcs),
        }
        for name, strike in faults.items():
            for window in (12, COUNT, 200):
                row(f"{name}, window {window}", engine, strike, policy=policy, rates=RATES, window=window)
                if name == "stopped":
                    send(signal.SIGCONT, gcs)
        time.sleep(float(away_s))
        row("killed long ago", engine, lambda: None, policy=policy, rates=RATES)
        row("a node as well", engine, lambda: send(signal.SIGKILL, pids["node-0"]), policy=policy, rates=RATES)
        row("all nodes as well", engine, lambda: send(signal.SIGKILL, *pids.values()), policy=policy, rates=RATES)
    print(json.dumps({"name": "closed"}))


def place(batch):
    import ray

    return [(ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES"))] * len(batch)


def two_nodes():
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 2, "num_gpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args=machine | {"include_dashboard": False})
    cluster.add_node(**machine)
    address = f"127.0.0.1:{cluster.address.rpartition(':')[2]}"
    try:
        for gpus in (0, 1):
            with ray_cluster(2, address=address, gpus_per_node=gpus) as engine:
                answers = list(dispatch(range(8), place, engine, Settings(policy="static")))
            print(json.dumps({"gpus": gpus, "places": sorted({(a.node, *a.value) for a in answers})}))
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    {"without_gcs": without_gcs, "two_nodes": two_nodes}[sys.argv[1]](*sys.argv[2:])

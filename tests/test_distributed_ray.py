"""The same `dispatch` on Ray, where it is installed (the extra `cluster`); CI does not install it."""

import os
import signal

import pytest

from labutils.distributed import ray_engine
from labutils.distributed.dispatch import Report, Settings, dispatch


def test_a_cluster_beyond_this_machine_needs_tls(monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with pytest.raises(ValueError, match=r"Ray needs RAY_USE_TLS=1 and certificates; got '10.0.0.7:6379' without"):
        ray_engine.ray_cluster(2, address="10.0.0.7:6379").__enter__()


def test_a_cluster_without_tokens_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="open to all without tokens; got RAY_AUTH_MODE='disabled'"):
        ray_engine.ray_cluster(2).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["pull", "static"])
def test_dispatch_on_ray_survives_raising_and_killing_requests(policy):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'labutils[cluster]'")

    def careless(batch):
        if 7 in batch:
            os.kill(os.getpid(), signal.SIGKILL)
        if 9 in batch:
            raise KeyError("nine")
        return [2 * x for x in batch]

    with ray_engine.ray_cluster(2) as engine:
        report = Report()
        answers = list(dispatch(range(30), careless, engine, Settings(policy=policy, max_requests=4), report=report))
        assert list(dispatch([], careless, engine)) == []
    assert [a.id for a in answers if a.error] == [7, 9]
    assert "alone on 2 nodes that failed" in answers[7].error and answers[9].error == "KeyError: 'nine'"
    assert [a.value for a in answers if not a.error] == [2 * i for i in range(30) if i not in (7, 9)]

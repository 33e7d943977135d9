"""When Ray is not started; what `dispatch` does on it is in `test_distributed_faults`."""

import sys
from types import SimpleNamespace

import pytest

from labutils.distributed import ray_engine


def test_a_cluster_beyond_this_machine_needs_tls(monkeypatch):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with pytest.raises(ValueError, match=r"Ray needs RAY_USE_TLS=1 and certificates; got '10.0.0.7:6379' without"):
        ray_engine.ray_cluster(2, address="10.0.0.7:6379").__enter__()


def test_a_cluster_without_tokens_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ValueError, match="open to all without tokens; got RAY_AUTH_MODE='disabled'"):
        ray_engine.ray_cluster(2).__enter__()


def test_a_start_that_fails_leaves_nothing_running(monkeypatch):
    calls = []

    def init(**_):
        calls.append("init")
        raise RuntimeError("no start")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown")))
    with pytest.raises(RuntimeError, match="no start"):
        ray_engine.ray_cluster(2).__enter__()
    assert calls == ["init", "shutdown"]

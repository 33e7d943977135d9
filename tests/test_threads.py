"""Threads: the fastest candidate wins, rounds interleave, and the old count comes back."""

import pytest
import torch

from labutils.measurement import threads, timing
from labutils.measurement.threads import best_thread_count, thread_candidates, thread_count


@pytest.mark.parametrize(("cores", "expected"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_thread_candidates_by_hand(cores, expected):
    assert thread_candidates(cores) == expected


def test_best_thread_count_picks_the_fastest_and_restores_the_old_count(monkeypatch):
    now, seconds, seen = [0.0], {1: 5.0, 2: 2.0, 3: 7.0}, []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work() -> None:
        seen.append(torch.get_num_threads())
        now[0] += seconds[torch.get_num_threads()]

    before = torch.get_num_threads()
    choice = best_thread_count(work, candidates=(1, 2, 3))
    assert choice.threads == 2
    assert {n: t.median_s for n, t in choice.timings.items()} == seconds
    assert {n: t.threads for n, t in choice.timings.items()} == {1: 1, 2: 2, 3: 3}
    assert torch.get_num_threads() == before
    assert seen[6:12] == [1, 1, 2, 2, 3, 3] and seen[12:14] == [2, 2]  # warm-up of 3 x 2, then rotating rounds
    assert "2: 2e+03 ms" in str(choice)


def test_thread_count_comes_back_without_threadpoolctl(monkeypatch):
    monkeypatch.setattr(threads, "_blas_limits", lambda count: None)
    before = torch.get_num_threads()
    with thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_best_thread_count_restores_the_old_count_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        best_thread_count(lambda: 1 / 0, candidates=(before + 1,))
    assert torch.get_num_threads() == before


def test_thread_count_reaches_numpys_blas_too():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    import numpy as np

    assert np.ones(2) @ np.ones(2) == 2

    def blas() -> set[int]:
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    before = blas()
    with thread_count(1):
        assert blas() == {1}
    assert blas() == before


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: best_thread_count(lambda: None, candidates=()), "one is needed"),
        (lambda: best_thread_count(lambda: None, candidates=(0, 1)), "at least 1"),
        (lambda: best_thread_count(lambda: None, repeats=2), "at least 5 repeats; got 2"),
        (lambda: thread_candidates(0), "at least 1; got 0"),
        (lambda: thread_count(0).__enter__(), "at least 1; got 0"),
    ],
)
def test_threads_bad_input_states_the_rule(call, rule):
    with pytest.raises(ValueError, match=rule):
        call()

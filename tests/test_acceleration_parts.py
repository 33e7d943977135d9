"""Memory that fits, the guard against out of memory, profiles read, costs, and steps recorded."""

import contextlib
import gc
import re
import time
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model

from labutils.acceleration.copies import prefetched
from labutils.acceleration.cost import cost_per_million, joules_per_token
from labutils.acceleration.graphs import CaptureError, GraphedStep, Tape
from labutils.acceleration.memory import (
    DoesNotFit,
    Need,
    channels_bytes_per_s,
    memory_bytes,
    memory_guard,
    threads_to_saturate,
    usable,
    what_fits,
)
from labutils.acceleration.timeline import Event, explained_shares, merged, profile, read_trace
from labutils.measurement.energy import Energy

LLAMA_8B = Need(parameters=8e9, weight_bits=16, position_bytes=131_072, positions=8192, batch=16)


def test_need_by_hand():
    assert LLAMA_8B.weight_bytes == 16e9 and LLAMA_8B.cache_bytes == 16 * 2**30
    assert LLAMA_8B.largest_batch(24e9) == int((24e9 * 0.92 - 16e9) // 2**30) == 5
    assert LLAMA_8B.longest_text(24e9) == int((24e9 * 0.92 - 16e9) // (16 * 131_072))


def test_need_of_a_model_counts_tied_weights_once():
    model = tiny_model("llama-gqa-tied")
    need = Need.of(model, positions=10, batch=2)
    assert need.weight_bytes == 4 * model.num_parameters() and need.cache_bytes == 2 * 10 * 2 * 3 * 2 * 8 * 4


@given(st.floats(1e9, 1e11), st.integers(1, 64))
def test_what_largest_batch_says_fits_and_one_more_does_not(memory, batch):
    need = Need(parameters=1e9, weight_bits=4, position_bytes=10_000, positions=1000, batch=batch)
    largest = need.largest_batch(memory)
    cache = need.positions * need.position_bytes
    assert need.weight_bytes + (largest + 1) * cache > usable(memory)
    assert largest == 0 or need.weight_bytes + largest * cache <= usable(memory)


def test_what_fits_names_each_way_out():
    assert what_fits(LLAMA_8B, 80e9).endswith("it fits")
    words = what_fits(LLAMA_8B, 24e9)
    assert "batch of 5" in words and "positions at this batch" in words and "4-bit weights" in words
    assert "smaller model only" in what_fits(LLAMA_8B, 1e9)


def test_what_fits_tries_two_changes_where_none_alone_is_enough():
    words = what_fits(LLAMA_8B, 15e9)  # a T4: 13.8 GB usable, 16 GB of weights, 1.07 GB a text
    assert "8-bit weights and a batch of 5" in words and "4-bit weights and a batch of 9" in words
    assert "only" not in words
    assert "4-bit weights and one text of 4577 positions" in what_fits(LLAMA_8B, 5e9)  # 0.6 GB over 131,072 bytes


@given(st.floats(5e9, 3e10))
def test_two_changes_fit(memory):
    for line in what_fits(LLAMA_8B, memory).split("; "):
        if found := re.search(r"(\d)-bit weights and a batch of (\d+)", line):
            smaller = replace(LLAMA_8B, weight_bits=int(found[1]), batch=int(found[2]))
            assert smaller.total_bytes <= usable(memory)


def test_need_refuses_nonsense():
    with pytest.raises(ValueError, match="positive; got 0"):
        Need(parameters=1e9, weight_bits=16, position_bytes=10, positions=0)


def test_threads_to_saturate_by_hand():
    assert threads_to_saturate(2, 3.2e9, 12, 80e-9) == 6  # 51.2 GB/s over 9.6 GB/s a thread
    assert threads_to_saturate(1, 1e9, 100, 1e-9) == 1
    with pytest.raises(ValueError, match="positive; got 0 and"):
        threads_to_saturate(0, 3.2e9, 12, 80e-9)
    with pytest.raises(ValueError, match="positive; got 12 and 0"):
        threads_to_saturate(2, 3.2e9, 12, 0)


@given(st.integers(1, 12), st.integers(4, 40))
def test_so_many_threads_fill_the_channels_and_one_fewer_does_not(channels, lines):
    threads = threads_to_saturate(channels, 4.8e9, lines, 97e-9)
    each = lines * 64 / 97e-9
    assert threads * each >= channels_bytes_per_s(channels, 4.8e9) > (threads - 1) * each


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_prefetched_hands_out_every_batch_in_order(device, count):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    batches = [torch.full((1000, 100), float(i)) for i in range(count)]
    found = [(batch.device.type, (batch * 2).sum().item()) for batch in prefetched(batches, device)]
    assert found == [(device, i * 2e5) for i in range(count)]


def test_prefetched_copies_ahead_and_pins_only_what_is_not_pinned(monkeypatch):
    """A fake GPU that notes the order: the next copy is queued before a batch is handed out."""
    seen = []

    class Batch:
        def __init__(self, name, pinned):
            self.name, self.pinned, self.device = name, pinned, "cuda"

        def is_pinned(self):
            return self.pinned

        def pin_memory(self):
            seen.append(f"pin {self.name}")
            return self

        def to(self, device, *, non_blocking):
            assert non_blocking
            seen.append(f"copy {self.name}")
            return self

        def record_stream(self, stream):
            seen.append(f"use {self.name}")

    stream = SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    found = list(prefetched([Batch("a", True), Batch("b", False), Batch("c", True)], "cuda"))
    assert [batch.name for batch in found] == ["a", "b", "c"]
    assert seen == ["copy a", "pin b", "copy b", "use a", "copy c", "use b", "use c"]


def test_memory_guard_lets_go_of_the_tensors():
    kept = []

    def greedy_function():
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    words = "^CUDA out of memory. buy more$"
    gc.disable()
    try:
        with pytest.raises(DoesNotFit, match=words) as caught, memory_guard(lambda: "buy more"):
            greedy_function()
        assert kept[0]() is None and caught.value.__cause__ is None
    finally:
        gc.enable()


def test_memory_guard_lets_other_errors_pass():
    with pytest.raises(KeyError), memory_guard(lambda: ""):
        raise KeyError("x")


def test_memory_bytes_of_the_host():
    assert memory_bytes() > 2**28


@pytest.mark.gpu
def test_device_is_usable_after_out_of_memory():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    free = torch.cuda.mem_get_info()[0]
    with pytest.raises(DoesNotFit), memory_guard(lambda: "", device="cuda"):
        _ = [torch.empty(free // 3, dtype=torch.uint8, device="cuda") for _ in range(4)]
    assert torch.cuda.mem_get_info()[0] > 0.95 * free and torch.ones(3, device="cuda").sum() == 3


def event(category, name, start, duration, **more):
    return {"ph": "X", "cat": category, "name": name, "ts": 1000.0 + start, "dur": duration, "tid": 1, **more}


GPU_TRACE = {
    "traceEvents": [
        event("cuda_runtime", "cudaLaunchKernel", 0, 5),
        event("cuda_runtime", "cudaDeviceSynchronize", 60, 40),
        event("kernel", "gemv", 10, 20),
        event("kernel", "gemv", 40, 20),
        event("gpu_memcpy", "Memcpy HtoD", 50, 30),
        event("cpu_op", "aten::mm", 0, 8),
        {"ph": "M", "name": "process_name"},
    ]
}


def test_read_trace_of_a_gpu_by_hand():
    timeline = read_trace(GPU_TRACE)
    assert timeline.device == "cuda" and len(timeline.kernels) == 2 and len(timeline.copies) == 1
    assert len(timeline.launches) == 1  # a wait is no launch
    assert timeline.seconds == pytest.approx(80e-6) and timeline.busy_s == pytest.approx(60e-6)
    assert timeline.gap_share == pytest.approx(0.25)
    assert [gap[1] for gap in timeline.gaps()] == [pytest.approx(10e-6)]
    assert timeline.longest_kernels()[0] == ("gemv", pytest.approx(40e-6), 2)
    assert "2 kernels, 1 copies, busy 75%, waiting 25%" in str(timeline)


def test_merged_keeps_the_end_of_an_event_that_holds_another():
    assert merged([Event("a", 0.0, 5.0), Event("b", 1.0, 1.0)]) == [(0.0, 5.0)]


def test_read_trace_of_a_cpu_takes_the_outermost_operators():
    trace = {
        "traceEvents": [
            event("cpu_op", "aten::linear", 0, 50),
            event("cpu_op", "aten::t", 1, 4),
            event("cpu_op", "aten::mm", 10, 30),
            event("cpu_op", "aten::add", 80, 20),
            event("cpu_op", "aten::view", 60, 5),
        ]
    }
    timeline = read_trace(trace)
    assert [kernel.name for kernel in timeline.kernels] == ["aten::linear", "aten::add"] and timeline.device == "cpu"
    assert timeline.gap_share == pytest.approx(30 / 100)


def test_read_trace_refuses_an_empty_one():
    with pytest.raises(ValueError, match="kernels or operators"):
        read_trace({"traceEvents": []})


def test_profile_sees_the_product():
    x = torch.ones(64, 64)
    timeline = profile(lambda: x @ x + 1)
    assert {"aten::matmul", "aten::add"} <= {kernel.name for kernel in timeline.kernels}
    assert 0 <= timeline.gap_share < 1


def test_profile_keeps_the_call_that_nothing_interrupted():
    x, naps = torch.ones(64, 64), iter([0.0, 0.4, 0.4, 0.0, 0.4, 0.4])

    def step():
        y = x @ x
        time.sleep(next(naps))
        return y + 1

    assert profile(step).seconds < 0.4
    with pytest.raises(ValueError, match="at least 1; got 0"):
        profile(step, calls=0)


@pytest.mark.gpu
def test_profile_sees_kernels_and_copies_of_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    timeline = profile(lambda: (torch.ones(64, 64).to("cuda") @ torch.ones(64, 64, device="cuda")).cpu(), device="cuda")
    assert timeline.device == "cuda" and timeline.kernels and len(timeline.copies) == 2 and timeline.launches


def test_explained_shares_take_the_larger_of_both_off():
    rates = {"bytes_per_s": 1e9, "flops_per_s": 1e9}
    assert explained_shares(2.0, moved_bytes=1e9, flop=1e9, **rates) == {
        "memory": 0.5,
        "arithmetic": 0.5,
        "neither": 0.5,
    }
    assert explained_shares(1.0, moved_bytes=2e9, flop=1.0, **rates)["neither"] == 0.0  # it came from a cache
    with pytest.raises(ValueError, match="positive; got 0"):
        explained_shares(0.0, moved_bytes=1.0, flop=1.0, **rates)


def test_cost_by_hand():
    cost = cost_per_million(50.0, price_per_hour=1.8, joules_per_token=7.2, price_per_kwh=0.25, utilisation=0.5)
    assert cost.hours == pytest.approx(1e6 / 25 / 3600) and cost.rent == pytest.approx(20.0)
    assert cost.kwh == pytest.approx(2.0) and cost.total == pytest.approx(20.5)
    assert "energy not measured" in str(cost_per_million(50.0, price_per_hour=1.8))
    assert cost_per_million(50.0, price_per_hour=1.8).total == pytest.approx(10.0)


@given(st.floats(0.1, 1e4), st.floats(0.01, 100))
def test_cost_halves_when_the_speed_doubles(speed, price):
    slow, fast = (cost_per_million(s, price_per_hour=price).total for s in (speed, 2 * speed))
    assert slow == pytest.approx(2 * fast)


@pytest.mark.parametrize("wrong", [{"tokens_per_s": 0.0}, {"utilisation": 1.1}, {"price_per_hour": -1.0}])
def test_cost_refuses_nonsense(wrong):
    with pytest.raises(ValueError, match="must"):
        cost_per_million(**({"tokens_per_s": 1.0, "price_per_hour": 1.0} | wrong))


def test_joules_per_token():
    assert joules_per_token(Energy(10.0, "a counter"), 4) == 2.5 and joules_per_token(Energy(), 4) is None
    with pytest.raises(ValueError, match="at least 1"):
        joules_per_token(Energy(), 0)


def test_graphed_step_keeps_the_rules_of_capture(monkeypatch):
    """What a CUDA graph asks for, against a stand-in: warm up on another stream, undo each trial, then record."""
    events = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    class Input:  # a tensor that says it lies on a GPU
        is_cuda, shape = True, (1,)

        def clone(self):
            return Input()

        def copy_(self, x):
            events.append("input copied")

    @contextlib.contextmanager
    def within(name):
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    graph = SimpleNamespace(replay=lambda: events.append("replay"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda recorded: within("graph"))
    step = GraphedStep(lambda x: events.append("step") or "logits", Input(), undo=lambda: events.append("undo"))
    trials = ["step", "undo"] * 3
    warm = ["side waits for main", "enter side", *trials, "leave side", "main waits for side"]
    assert events == [*warm, "enter graph", "step", "leave graph"]  # recorded once, and nothing undone: it did not run
    events.clear()
    assert step(Input()) == "logits" and events == ["input copied", "replay"]


def test_tape_replays_on_the_same_memory():
    x, total = torch.tensor([1.0, 2.0]), torch.zeros(2)
    tape, y = Tape.record(lambda: total.add_(x.view(1, 2)[0] * 3))
    assert total.tolist() == [3.0, 6.0] and y is total
    x.copy_(torch.tensor([10.0, 10.0]))
    tape.replay()
    assert total.tolist() == [33.0, 36.0]
    assert [str(op[0]) for op in tape.operators] == ["aten.mul.Tensor", "aten.add_.Tensor"]  # a view needs no replay


def test_tape_replays_a_product_of_vectors():
    x, matrix = torch.zeros(2), torch.tensor([[2.0, 0.0], [1.0, -1.0]])
    tape, y = Tape.record(lambda: (x @ matrix.T).relu())
    x.copy_(torch.tensor([3.0, 1.0]))
    tape.replay()
    assert y.tolist() == [6.0, 2.0]


def test_tape_does_not_see_a_new_tensor_nor_a_new_decision():
    x, sign = torch.tensor([1.0]), 1
    tape, y = Tape.record(lambda: x * 2 if sign > 0 else -x)
    x, sign = torch.tensor([5.0]), -1
    tape.replay()
    assert y.tolist() == [2.0] and x.tolist() == [5.0] and sign == -1


def test_tape_refuses_a_step_that_asks_for_a_number():
    x = torch.tensor([1.0])
    with pytest.raises(CaptureError, match="item"):
        Tape.record(lambda: x * 2 if x.item() > 0 else x)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_graphed_step_counts_once_a_call(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    count = torch.zeros(1, device=device)
    step = GraphedStep(lambda x: x + count.add_(1), torch.zeros(1, device=device), undo=count.zero_)
    assert [step(torch.tensor([v], device=device)).item() for v in (10.0, 20.0)] == [11.0, 22.0]
    with pytest.raises(ValueError, match=r"\(1,\); got \(2,\)"):
        step(torch.zeros(2, device=device))

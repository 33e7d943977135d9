"""The scheduler by hand, and thousands of random schedules in which every step is verified."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving_worlds import World, alone

import labutils
from labutils.serving.blocks import BlockPool
from labutils.serving.scheduler import Chunk, End, Limits, Refusal, Request, Scheduler


def scheduler(blocks=16, size=2, **limits):
    defaults = {"token_budget": 8, "max_running": 4, "max_waiting": 8, "max_positions": 64}
    return Scheduler(BlockPool(blocks, block_size=size), Limits(**defaults | limits))


def spans(step):
    return [(chunk.start, chunk.end) for chunk in step.chunks]


def run(world):
    steps = []
    while world.scheduler.waiting or world.scheduler.running:
        steps.append(world.step()[0])
    return steps


def explore(first, end):
    """Runs the schedules of these seeds; a failure names its seed."""
    command = [sys.executable, str(Path(__file__).with_name("serving_worlds.py")), str(first), str(end)]
    environ = os.environ | {"PYTHONPATH": str(Path(labutils.__file__).parents[1])}
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300, env=environ)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_random_schedules_keep_every_invariant_and_everybody_s_text():
    seen = explore(0, 700)
    assert min(seen.values()) > 20, seen  # copies, preemptions, hits and refusals were all among them


@pytest.mark.slow
def test_ten_thousand_random_schedules():
    assert explore(1_000, 11_000)["ended"] > 10_000


def test_admission_is_noted_once_and_outlasts_preemption():
    small = scheduler(blocks=3)
    first, second = (small.submit(Request([1, 2], max_new_tokens=4)) for _ in range(2))
    small.complete(small.schedule(5.0), {first: 3, second: 4}, 6.0)
    assert (first.admitted_s, second.admitted_s) == (5.0, 5.0)
    small.complete(small.schedule(7.0), {first: 3}, 8.0)  # the third block goes to the first, the second gives way
    assert second.preemptions == 1 and second.admitted_s == 5.0
    small.finish(first, End.CANCELLED)
    third = small.submit(Request([9], max_new_tokens=1))
    small.schedule(9.0)
    assert second.table and second.admitted_s == 5.0 and third.admitted_s == 9.0


def test_decoding_goes_first_and_a_long_prompt_takes_what_is_left():
    world = World(scheduler(blocks=32, token_budget=4))
    short = world.scheduler.submit(Request([1, 2], max_new_tokens=5))
    assert spans(world.step()[0]) == [(0, 2)]
    world.scheduler.submit(Request(list(range(10)), max_new_tokens=1))
    steps = [world.step()[0] for _ in range(4)]
    # one token of the short request, three of the long prompt: 3 + 3 + 3 + 1
    assert [spans(step) for step in steps] == [
        [(n, n + 1), (a, b)] for n, a, b in zip(range(2, 6), (0, 3, 6, 9), (3, 6, 9, 10), strict=True)
    ]
    assert short.end is End.LENGTH and not world.scheduler.running


def test_a_known_prompt_leaves_one_query():
    world = World(scheduler())
    first = world.scheduler.submit(Request([1, 2, 1, 2], max_new_tokens=1))
    run(world)
    again = world.scheduler.submit(Request([1, 2, 1, 2], max_new_tokens=1))
    step = world.step()[0]
    assert spans(step) == [(3, 4)] and step.copies == () and again.cached == 3  # nobody else holds the last block
    assert again.new_ids == first.new_ids


def test_a_block_that_others_hold_is_copied_before_it_is_written():
    world = World(scheduler())
    first = world.scheduler.submit(Request([1, 2, 1, 2], max_new_tokens=4))
    world.step()
    again = world.scheduler.submit(Request([1, 2, 1, 2], max_new_tokens=4))
    step = world.step()[0]
    assert again.table[0] == first.table[0] and again.table[1] != first.table[1]
    assert step.copies == ((first.table[1], again.table[1]),)


def test_a_block_that_is_written_in_place_is_shared_by_nobody_in_that_step():
    world = World(scheduler())
    world.scheduler.submit(Request([1, 2, 1, 2], max_new_tokens=1))
    run(world)
    again, longer = (world.scheduler.submit(Request([1, 2, 1, 2, *end], max_new_tokens=1)) for end in ((), (1, 2)))
    step = world.step()[0]  # the world verifies that each written block has one holder
    assert spans(step) == [(3, 4), (2, 6)] and step.copies == () and (again.cached, longer.cached) == (3, 2)
    last = world.scheduler.submit(Request([1, 2, 1, 2, 0], max_new_tokens=1))
    world.step()
    assert last.cached == 4  # and it is known again


def test_prefixes_are_shared_under_one_salt_only():
    world = World(scheduler())
    for salt, known in [("a", 0), ("b", 0), ("a", 4), ("", 0)]:
        request = world.scheduler.submit(Request([1, 2, 1, 2, 1], max_new_tokens=1, salt=salt))
        run(world)
        assert request.cached == known


def test_the_last_in_line_gives_its_memory_back_and_still_gets_its_text():
    world = World(scheduler(blocks=6, size=2))
    requests = [world.scheduler.submit(Request([n] * 4, max_new_tokens=6)) for n in (1, 2)]
    run(world)
    assert [request.preemptions for request in requests] == [0, 1]
    assert [request.new_ids for request in requests] == [alone(request) for request in requests]


def test_lower_priority_numbers_go_first():
    world = World(scheduler(max_running=1, token_budget=4))
    names = {}
    for name, priority in [("a", 0), ("b", 1), ("c", 0), ("d", -1)]:
        names[world.scheduler.submit(Request([1], max_new_tokens=1, priority=priority))] = name
    assert "".join(names[chunk.request] for step in run(world) for chunk in step.chunks) == "dacb"


def test_nobody_overtakes_a_large_request():
    world = World(scheduler(blocks=4, size=2, token_budget=8))
    first = world.scheduler.submit(Request([1] * 4, max_new_tokens=2))
    world.step()
    large = world.scheduler.submit(Request([2] * 7, max_new_tokens=1))
    small = world.scheduler.submit(Request([0], max_new_tokens=1))
    world.step()
    assert first.end is End.LENGTH and large.end is None and small.end is None
    world.step()
    assert large.end is End.LENGTH


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs():
    world = World(scheduler(max_running=1, token_budget=4))
    runs, waits = (world.scheduler.submit(Request([1], max_new_tokens=9, deadline_s=3.0)) for _ in range(2))
    ended = [request for _ in range(5) for request in world.step()[1]]
    assert set(ended) == {runs, waits} and {runs.end, waits.end} == {End.DEADLINE}
    assert len(runs.new_ids) == 3 and not waits.new_ids


def test_cancelling_frees_blocks_and_a_late_answer_is_passed_over():
    line = scheduler()
    request = line.submit(Request([1, 2, 3], max_new_tokens=4))
    step = line.schedule()
    line.finish(request, End.CANCELLED)
    line.finish(request, End.ERROR)  # it has ended: nothing happens
    assert line.complete(step, {request: 7}) == [] and request.new_ids == [] and request.end is End.CANCELLED
    assert line.pool.available == 16 and not line.running


def test_a_chunk_samples_only_where_it_reaches_the_end():
    request = Request([1, 2, 3], max_new_tokens=1)
    assert not Chunk(request, 0, 2).samples and Chunk(request, 2, 3).samples


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (Request([], max_new_tokens=1), "empty", "needs a prompt and a new token; got 0 tokens"),
        (Request([1], max_new_tokens=0), "empty", "a new token"),
        (Request([1] * 60, max_new_tokens=5), "context_length_exceeded", "64 tokens together; got 65"),
    ],
)
def test_what_can_never_be_served_is_refused(request_, code, message):
    with pytest.raises(Refusal, match=message) as caught:
        scheduler(blocks=64).submit(request_)
    assert caught.value.code == code


def test_a_pool_too_small_for_a_request_refuses_it_and_serves_the_largest_that_fits():
    world = World(scheduler(blocks=2, size=2))
    with pytest.raises(Refusal, match="5 tokens together; got 6"):
        world.scheduler.submit(Request([1] * 3, max_new_tokens=3))
    request = world.scheduler.submit(Request([1] * 3, max_new_tokens=2))  # the last token is never fed: 4 positions
    run(world)
    assert len(request.new_ids) == 2


def test_a_full_queue_refuses_and_keeps_what_it_has():
    line = scheduler(max_waiting=2)
    for _ in range(2):
        line.submit(Request([1], max_new_tokens=1))
    with pytest.raises(Refusal, match="2 requests are waiting already") as caught:
        line.submit(Request([1], max_new_tokens=1))
    assert caught.value.code == "queue_full" and len(line.waiting) == 2


def test_limits_must_make_sense():
    with pytest.raises(ValueError, match="at least 1"):
        Limits(max_waiting=0)
    with pytest.raises(ValueError, match="token_budget must have a token for each"):
        Limits(token_budget=3, max_running=4)

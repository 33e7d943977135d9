"""Prefix-aware routing: the router alone, and behind chapter 09's dispatcher with replicas in processes that die."""

import random
from collections import Counter

import pytest
from plain_processes import local_processes
from toy_replica import Replica, toy_engine, toy_text

from labutils.distributed.dispatch import dispatch
from labutils.distributed.settings import Report, Settings
from labutils.serving.blocks import chained_hashes
from labutils.serving.routing import PrefixRouter

BLOCK, BEGINNING, GROUPS, EACH, NEW = 8, 64, 10, 6, 4
FREE = {"a": 0, "b": 0}


def test_a_prompt_goes_where_most_of_it_was_sent():
    router = PrefixRouter(block_size=2, slack=3)
    assert router([1, 2, 3, 4, 5], FREE) == "a"
    assert router([9, 9, 9, 9], {"a": 1, "b": 0}) == "b"  # unknown: the least busy
    assert router([1, 2, 7, 7], {"a": 3, "b": 0}) == "a"  # one block of two
    assert router([9, 9, 9, 9, 1, 2], FREE) == "b"
    assert router([3, 4, 1, 2], {"a": 1, "b": 0}) == "b"  # the same blocks behind another beginning are others
    assert router([1], {"a": 1, "b": 0}) == "b"  # no full block


def test_a_long_queue_is_passed_over_and_the_other_learns():
    router = PrefixRouter(block_size=2, slack=2)
    router([1, 2, 3, 4], FREE)
    assert router([1, 2, 3, 4], {"a": 2, "b": 0}) == "a"
    assert router([1, 2, 3, 4], {"a": 3, "b": 0}) == "b"
    assert router([1, 2, 3, 4], {"a": 1, "b": 0}) == "b"  # both know it: the less busy
    assert router([1, 2, 3, 4], {"a": 0}) == "a" and router([1, 2, 3, 4], {"c": 0}) == "c"  # who is there now


def test_the_record_is_bounded_and_forgets_ends_before_beginnings():
    router = PrefixRouter(block_size=1, blocks=3)
    router([1, 2, 3], {"a": 0})
    router([7], {"a": 0})
    assert len(router.sent["a"]) == 3
    assert router.known("a", chained_hashes([1, 2, 3], 1)) == 2 and router.known("a", chained_hashes([7], 1)) == 1


@pytest.mark.parametrize("wrong", [{"block_size": 0}, {"blocks": 0}, {"slack": -1}])
def test_bad_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least 1 and slack at least 0; got"):
        PrefixRouter(**wrong)
    with pytest.raises(ValueError, match="needs a replica"):
        PrefixRouter()([1], {})


@pytest.mark.parametrize("wrong", [{"policy": "routed"}, {"route": PrefixRouter()}])
def test_a_route_and_its_policy_need_each_other(wrong):
    with pytest.raises(ValueError, match="need each other"):
        Settings(**wrong)


def requests():
    """Questions behind ten beginnings, shuffled; one replica's memory does not hold all beginnings."""
    rng = random.Random(0)
    beginnings = [[rng.randrange(97) for _ in range(BEGINNING)] for _ in range(GROUPS)]
    asked = [beginning + [rng.randrange(97) for _ in range(6)] for beginning in beginnings for _ in range(EACH)]
    rng.shuffle(asked)
    return asked


def expected():
    return [toy_text(ids, NEW) for ids in requests()]


replica = Replica(toy_engine, NEW)


def served(engine, **settings):
    report = Report()
    common = {"max_requests": 2, "in_flight": 1}
    answers = list(dispatch(requests(), replica, engine, Settings(**common | settings), report=report))
    assert [answer.error for answer in answers] == [None] * len(answers)
    assert [answer.value.new_ids for answer in answers] == expected()
    share = sum(answer.value.cached for answer in answers) / sum(map(len, requests()))
    return share, report


def test_routed_replicas_find_more_of_their_prompts_than_those_dealt_to_in_turn():
    router = PrefixRouter(block_size=BLOCK, slack=GROUPS * EACH)
    with local_processes(2) as engine:
        in_turn, _ = served(engine, policy="static")
    with local_processes(2) as engine:
        routed, report = served(engine, policy="routed", route=router)
    best = (EACH - 1) * GROUPS * BEGINNING / sum(map(len, requests()))  # each beginning is read once
    assert in_turn < routed <= best and routed > 0.8 * best, (in_turn, routed, best)
    assert min(report.per_node.values()) >= GROUPS * EACH / 4


def test_a_killed_replica_costs_time_and_no_answer():
    router, killed = PrefixRouter(block_size=BLOCK, slack=8), []

    def kill(report):
        if report.answers > 5 and not killed:
            killed.append(engine.processes["node-0"].process)
            killed[0].kill()

    with local_processes(2) as engine:
        report = Report()
        settings = Settings(policy="routed", route=router, max_requests=2)
        found = list(dispatch(requests(), replica, engine, settings, report=report, on_progress=kill))
    assert killed and report.lost_nodes == 1 and report.errors == 0
    assert [answer.value.new_ids for answer in found] == expected()


@pytest.mark.parametrize("route", [lambda payload, held: "nowhere", lambda payload, held: 1 / 0])
def test_a_route_that_fails_is_a_named_error_of_its_request(route):
    def sometimes(payload, held):
        return route(payload, held) if payload[0] % 2 else "node-0"

    with local_processes(1) as engine:
        settings = Settings(policy="routed", route=sometimes)
        found = list(dispatch([[1, 2], [2, 3], [3, 4]], replica, engine, settings))
    assert Counter(bool(answer.error) for answer in found) == {True: 2, False: 1}
    assert "NotSent: " in found[0].error and found[1].value.new_ids

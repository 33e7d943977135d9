"""Checks of chapter 13: users within a second, replicas and what they cost."""

import math

from labutils.course.checks import cases_of, exercise, expect_function


def _in_time(latencies, limit_s):
    return sum(seconds is not None and seconds <= limit_s for seconds in latencies)


def _most(served):
    """Goes up the tried crowds and stops at the first that `served` turns away."""

    def answer(runs, limit_s=1.0):
        most = 0
        for users in sorted(runs):
            if not served(runs[users], limit_s):
                break
            most = users
        return most

    return answer


def _served(latencies, limit_s):
    return 100 * _in_time(latencies, limit_s) >= 99 * len(latencies)


def _last_served(runs, limit_s=1.0):
    return max((users for users in runs if _served(runs[users], limit_s)), default=0)


def _answered(latencies):
    return [seconds for seconds in latencies if seconds is not None]


def _mean_served(latencies, limit_s):
    answered = _answered(latencies)
    return bool(answered) and sum(answered) / len(answered) <= limit_s


@exercise("13.2")
def most_users(answer):
    """The most users of whom 99% have their answer in time."""
    good, one_late, two_late = [0.3] * 100, [0.3] * 99 + [4.0], [0.3] * 98 + [2.0, 2.0]
    refused = [0.3] * 97 + [None] * 3
    expect_function(
        answer,
        _most(_served),
        cases=cases_of(
            "runs limit_s",
            ({100: good, 200: good, 400: two_late}, 1.0),
            ({100: good, 200: one_late, 400: two_late}, 1.0),
            ({400: good, 100: good, 200: two_late}, 1.0),
            ({50: good, 80: refused}, 1.0),
            ({10: two_late}, 1.0),
            ({10: good, 20: [0.1] * 90 + [2.0] * 8 + [None] * 2}, 1.0),
            ({10: [0.5] * 200, 20: [0.5] * 197 + [1.0, 3.0, 3.0]}, 1.0),
            ({10: [0.5] * 100, 20: [0.9] * 100}, 0.7),
        ),
        mistakes=[
            (
                _last_served,
                "a larger crowd that passed by luck proves nothing once a smaller one has failed: stop there",
            ),
            (
                _most(lambda some, limit_s: 100 * _in_time(some, limit_s) >= 99 * len(_answered(some))),
                "a refused question (None) was not answered within a second: it counts among all",
            ),
            (
                _most(lambda some, limit_s: max(_answered(some)) <= limit_s),
                "one late answer of a hundred is allowed: p99 is not the maximum",
            ),
            (
                _most(lambda some, limit_s: 100 * _in_time(some, limit_s) >= 95 * len(some)),
                "that is p95: at most one in a hundred may be late",
            ),
            (_most(_mean_served), "the mean hides the late ones: count how many answers came in time"),
        ],
    )


def _fleet(round_=math.ceil, *, with_spare=True, mean=True, million=1e6, all_pay=True):
    def answer(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
        replicas = round_(peak_users / per_replica) + (spare if with_spare else 0)
        answers = peak_users * (mean_load if mean else 1.0) / think_s * 3600
        dollars = (replicas if all_pay else round_(peak_users / per_replica)) * price_per_hour / answers * million
        return replicas, dollars

    return answer


def _scaled_fleet(peak_users, per_replica, spare, price_per_hour, mean_load=0.4, think_s=20.0):
    replicas = math.ceil(peak_users * mean_load / per_replica) + spare
    return replicas, replicas * price_per_hour / (peak_users * mean_load / think_s * 3600) * 1e6


@exercise("13.3")
def fleet_cost(answer):
    """Replicas for a peak, and dollars for a million answers."""
    expect_function(
        answer,
        _fleet(),
        cases=cases_of(
            "peak_users per_replica spare price_per_hour mean_load",
            (1000, 300, 1, 0.5, 0.5),
            (600, 300, 1, 0.1, 0.4),
            (700_000, 650, 3, 0.1, 0.4),
            (10, 300, 0, 1.0, 1.0),
        ),
        mistakes=[
            (_fleet(math.floor), "the last users need a replica too: round up"),
            (_fleet(round), "the last users need a replica too: round up"),
            (_fleet(with_spare=False), "if one fails, the others must still carry the peak: add the spare replicas"),
            (_fleet(mean=False), "at night few ask, and all replicas are paid: divide by the answers of the MEAN load"),
            (_scaled_fleet, "replicas are bought for the peak; only the answers follow the mean load"),
            (_fleet(million=1.0), "that is the price of one answer: take a million"),
            (_fleet(all_pay=False), "spare replicas cost as much as the others"),
        ],
    )

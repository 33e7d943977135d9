"""One loop for every task: what is read, what is timed, what is judged; batches by length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils.applications.tasks import Task, answer, batches_by_length, padding_share, run_task

END = 0


class Counting:
    """A target that answers with successors: after token n comes n + 1, and after 5 the end."""

    max_length = None

    def __init__(self, step=1):
        self.length, self.read, self.step = 0, [], step

    def prefill(self, token_ids):
        self.length += token_ids.shape[1]
        self.read += token_ids[0].tolist()
        return self._logits(token_ids[0, -1:].tolist())[-1:]

    def extend(self, token_ids):
        self.length += len(token_ids)
        return self._logits(token_ids)

    def rewind(self, count):
        assert 0 <= count <= self.length
        self.length -= count

    def _logits(self, ids):
        after = [END if i >= 5 else i + self.step for i in ids]
        return torch.nn.functional.one_hot(torch.tensor(after), 10).float()


def text(ids):
    return " ".join(map(str, ids))


def test_answer_stops_and_leaves_the_stop_token_out():
    reply = answer(Counting(), [9, 3], 10, stop={END})
    assert reply.token_ids == (4, 5) and len(reply.token_s) == 3
    assert 0 < reply.ttft_s <= reply.latency_s == reply.token_s[-1]
    assert answer(Counting(), [1], 2, stop={END}).token_ids == (2, 3)


def test_answer_reads_only_what_is_not_cached():
    target = Counting()
    answer(target, [7, 8, 9, 3], 1, stop={END})
    reply = answer(target, [7, 8, 2], 2, stop={END}, cached=2)
    assert target.read == [7, 8, 9, 3, 2] and reply.token_ids == (3, 4) and target.length == 4


@pytest.mark.parametrize(("new_tokens", "cached"), [(0, 0), (1, 2), (1, -1), (1, 1)])
def test_answer_refuses_before_it_touches_the_cache(new_tokens, cached):
    target = Counting()
    with pytest.raises(ValueError, match=r"cached in 0 to 0; got"):
        answer(target, [3, 4], new_tokens, stop={END}, cached=cached)
    assert target.length == 0 and not target.read


def test_run_task_judges_what_was_parsed():
    prompts, expected = [[3], [4], [5]], [9, 5, None]
    task = Task("sum", prompts, expected, parse=lambda t: sum(map(int, t.split())) if t else None)
    outcome = run_task({"one": Counting(), "two": Counting(2)}, task, decode=text, stop={END})
    assert outcome["one"].texts == ("4 5", "5", "") and outcome["two"].texts == ("5", "6", "")
    assert outcome["one"].scores == (1.0, 1.0, 0.0)  # the empty answer says nothing, whatever was expected
    assert outcome["two"].scores == (0.0, 0.0, 0.0) and outcome["one"].mean == pytest.approx(2 / 3)


def test_a_score_never_sees_a_substring():
    task = Task("verdict", [[1]], ["correct"])
    assert task.judge("incorrect", 0) == 0.0 and task.judge(" correct\n", 0) == 1.0


def test_run_task_begins_with_another_variant_each_time():
    order = []

    class Noting(Counting):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def prefill(self, token_ids):
            order.append(self.name)
            return super().prefill(token_ids)

    task = Task("any", [[5], [5], [5]], [""] * 3)
    run_task({name: Noting(name) for name in "ab"}, task, decode=text, stop={END})
    assert order == list("abbaab")


def test_bad_tasks_are_refused():
    with pytest.raises(ValueError, match="one expected answer for each prompt; got 1 and 2"):
        Task("t", [[1]], [1, 2])
    with pytest.raises(ValueError, match="a variant and a request; got 0 and 1"):
        run_task({}, Task("t", [[1]], [1]), decode=text, stop={END})


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8))
def test_sorted_batches_hold_each_request_once_and_pad_no_more(lengths, batch):
    batches = batches_by_length(lengths, batch)
    assert sorted(i for rows in batches for i in rows) == list(range(len(lengths)))
    assert all(len(rows) <= batch for rows in batches)
    as_they_come = [list(range(i, min(i + batch, len(lengths)))) for i in range(0, len(lengths), batch)]
    if len(lengths) % batch == 0:
        assert padding_share(lengths, batches) <= padding_share(lengths, as_they_come) + 1e-12


def test_padding_by_hand_and_refusals():
    assert batches_by_length([5, 1, 4, 2, 1], 2) == [[1, 4], [3, 2], [0]]
    assert padding_share([4, 1, 2], [[0, 1], [2]]) == pytest.approx(1 - 7 / 10)
    with pytest.raises(ValueError, match="batch must be at least 1; got 0"):
        batches_by_length([1], 0)
    with pytest.raises(ValueError, match="at least one request"):
        padding_share([], [])

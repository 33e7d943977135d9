"""Right answers beside the solution that a check once refused: another way, or a tensor where a number is meant."""

import pytest
import torch

from labutils.course.checks import ch04_removal, ch05_stored, ch06


def by_two_counts(launch, wait, clock, calls):
    """The time of twice as many calls less that of so many: the first launch drops out."""

    def whole(count):
        wait()
        start = clock()
        for _ in range(count):
            launch()
        wait()
        return clock() - start

    return (whole(2 * calls) - whole(calls)) / calls


def warmed_up(launch, wait, clock, calls):
    launch()
    return by_two_counts(launch, wait, clock, calls)


def influence_as_a_tensor(before, after):
    return 1 - torch.cosine_similarity(before, after, dim=-1).mean()


def mean_as_a_number(values, labels):
    return values[labels[:, 1:] != -100].mean().item()


def distance_as_a_number(student, teacher, projection):
    return ((student @ projection.T - teacher).norm() / teacher.norm()).square().item()


def acceptance_as_a_number(draft_probs, target_probs):
    return (1 - (draft_probs - target_probs).abs().sum(-1).mean() / 2).item()


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (ch06.honest_seconds, by_two_counts),
        (ch06.honest_seconds, warmed_up),
        (ch04_removal.influence, influence_as_a_tensor),
        (ch05_stored.mean_where_counted, mean_as_a_number),
        (ch05_stored.hidden_distance, distance_as_a_number),
        (ch05_stored.acceptance, acceptance_as_a_number),
    ],
)
def test_another_right_answer_passes(check, answer, capsys):
    check(answer)
    assert "✓" in capsys.readouterr().out

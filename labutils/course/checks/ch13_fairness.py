"""Check of chapter 13, fairness: how much more the worst-off group loses than the best-off one."""

import statistics

from labutils.course.checks import cases_of, exercise, expect_function
from labutils.measurement.timing import quantile


def _losses(changed, baseline):
    return {name: [b - c for c, b in zip(changed[name], baseline[name], strict=True)] for name in changed}


def _gap(losses, picks, *, anew=False, low=0.025):
    def mean(name, pick):
        return statistics.fmean(losses[name][i] for i in pick)

    means = {name: statistics.fmean(loss) for name, loss in losses.items()}
    worst, best = max(means, key=means.get), min(means, key=means.get)
    drawn = []
    for k in range(len(picks[worst])):
        now = {name: mean(name, picks[name][k]) for name in losses}
        drawn.append(max(now.values()) - min(now.values()) if anew else now[worst] - now[best])
    return means[worst] - means[best], quantile(drawn, low), quantile(drawn, 1 - low)


def _right(changed, baseline, picks):
    return _gap(_losses(changed, baseline), picks)


def _quality(changed, baseline, picks):
    return _gap({name: [-score for score in changed[name]] for name in changed}, picks)


def _pooled(changed, baseline, picks):
    losses = _losses(changed, baseline)
    everyone = [value for loss in losses.values() for value in loss]
    whole, worst = statistics.fmean(everyone), max(losses, key=lambda name: statistics.fmean(losses[name]))
    drawn = [statistics.fmean(losses[worst][i] for i in pick) - whole for pick in picks[worst]]
    return statistics.fmean(losses[worst]) - whole, quantile(drawn, 0.025), quantile(drawn, 0.975)


def _unpaired(changed, baseline, picks):
    losses = _losses(changed, baseline)
    means = {name: statistics.fmean(loss) for name, loss in losses.items()}
    worst, best = max(means, key=means.get), min(means, key=means.get)

    def loss(name, k):
        old, new = picks[name][k - 1], picks[name][k]
        return statistics.fmean(baseline[name][i] for i in old) - statistics.fmean(changed[name][i] for i in new)

    drawn = [loss(worst, k) - loss(best, k) for k in range(len(picks[worst]))]
    return means[worst] - means[best], quantile(drawn, 0.025), quantile(drawn, 0.975)


def _ends(changed, baseline, picks):
    losses = _losses(changed, baseline)
    means = {name: statistics.fmean(loss) for name, loss in losses.items()}
    worst, best = max(means, key=means.get), min(means, key=means.get)
    rows = [[statistics.fmean(losses[name][i] for i in pick) for pick in picks[name]] for name in (worst, best)]
    low, high = (quantile(rows[0], q) - quantile(rows[1], 1 - q) for q in (0.025, 0.975))
    return means[worst] - means[best], low, high


def _groups_drawn(changed, baseline, picks):
    means = [statistics.fmean(loss) for loss in _losses(changed, baseline).values()]
    drawn = []
    for pick in next(iter(picks.values())):
        now = [means[i % len(means)] for i in pick[: len(means)]]
        drawn.append(max(now) - min(now))
    return max(means) - min(means), quantile(drawn, 0.025), quantile(drawn, 0.975)


def _cases():
    from random import Random

    rng, rows = Random(13), []
    for sizes, lost in (((12, 16), (0.5, 0.1)), ((10, 14, 12), (0.1, 0.4, 0.2)), ((16, 12), (0.15, 0.25))):
        baseline, changed, picks = {}, {}, {}
        for name, size, share in zip(("en", "zh", "new"), sizes, lost, strict=False):
            level = 0.95 if name == "en" else 0.6
            baseline[name] = [float(rng.random() < level) for _ in range(size)]
            changed[name] = [score if rng.random() >= share else 0.0 for score in baseline[name]]
            picks[name] = [[rng.randrange(size) for _ in range(size)] for _ in range(40)]
        rows.append((changed, baseline, picks))
    return cases_of("changed baseline picks", *rows)


@exercise("13.7")
def loss_gap(answer):
    """The gap between the worst-off and the best-off group, and its 95% interval."""
    expect_function(
        answer,
        _right,
        cases=_cases(),
        mistakes=[
            (
                _quality,
                "a group that scored low before is not one that LOST: compare baseline minus changed, not scores",
            ),
            (_pooled, "the mean of all hides the group that gains: subtract the best-off group's loss"),
            (
                _unpaired,
                "both scores of a request belong together: draw one loss for each index, not two scores apart",
            ),
            (
                lambda changed, baseline, picks: _gap(_losses(changed, baseline), picks, anew=True),
                "decide once which group is worst and best: decided anew each time, the gap is never below zero",
            ),
            (_groups_drawn, "resample the requests WITHIN each group: the groups themselves are given"),
            (_ends, "take the quantiles of the drawn gaps, not the difference of the two groups' quantiles"),
            (
                lambda changed, baseline, picks: _gap(_losses(changed, baseline), picks, low=0.05),
                "95% lie between the quantiles 0.025 and 0.975: 2.5% on each side",
            ),
            (
                lambda changed, baseline, picks: _right(changed, baseline, picks)[0],
                "a gap without an interval says nothing: return (gap, low, high)",
            ),
        ],
    )

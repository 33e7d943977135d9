"""How many tokens to draft: acceptance against what a step of so many rows costs."""

from collections.abc import Mapping, Sequence

import numpy as np


def curve_of(times: Mapping[int, float], *, up_to: int) -> list[float]:
    """Seconds of a step with 1, 2, … `up_to` rows, by straight lines between the measured ones.

    >>> curve_of({1: 1.0, 4: 2.5}, up_to=3)
    [1.0, 1.5, 2.0]
    """
    rows = sorted(times)
    return np.interp(range(1, up_to + 1), rows, [times[r] for r in rows]).tolist()


def predicted_speedup(acceptance: float, draft_tokens: int, step_s: Sequence[float], draft_s: float) -> float:
    """(1 + α + … + α^γ) · t(1) ÷ (t(γ + 1) + γ d): how many times as fast as plain decoding.

    Equation 1 of Leviathan et al. 2022 (arXiv:2211.17192), with a measured step in place of a constant one.

    Args:
        acceptance: α, the chance of a drafted token to stand when those before it do.
        draft_tokens: γ.
        step_s: t(r) of the target, from one row on.
        draft_s: d, seconds of one drafted token.

    >>> predicted_speedup(0.5, 2, [1.0, 1.0, 1.25], 0.0)
    1.4

    Raises:
        ValueError: If the acceptance is not in 0 … 1, or the curve does not reach γ + 1 rows.
    """
    if not 0 <= acceptance <= 1 or not 0 <= draft_tokens < len(step_s):
        rule = f"acceptance must lie in 0 to 1 and draft_tokens in 0 to {len(step_s) - 1}"
        raise ValueError(f"{rule}; got {acceptance} and {draft_tokens}")
    tokens = sum(acceptance**i for i in range(draft_tokens + 1))
    return tokens * step_s[0] / (step_s[draft_tokens] + draft_tokens * draft_s)


def best_draft_tokens(acceptance: float, step_s: Sequence[float], draft_s: float) -> tuple[int, float]:
    """The γ with the highest predicted speed-up, the smallest such γ, and that speed-up.

    >>> best_draft_tokens(0.5, [2.0, 2.0, 4.0], 0.0)
    (1, 1.5)
    """
    gains = [predicted_speedup(acceptance, count, step_s, draft_s) for count in range(len(step_s))]
    best = max(range(len(gains)), key=gains.__getitem__)
    return best, gains[best]

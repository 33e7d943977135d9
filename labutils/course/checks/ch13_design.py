"""Check of chapter 13's last task: a design within limits of size and quality, and of what it reads for a token.

Nothing here depends on the machine's speed; that part is the leaderboard's.
"""

from labutils.capstone.budget import READ_BYTES, Budget, examine
from labutils.capstone.designs import Design
from labutils.course.checks import CheckFailed, exercise


def _size_hint(design):
    if design.model == "lablm":
        return "LabLM itself is too large in 3 or 4 bits: begin with its student"
    if design.bits is None or design.bits == 8:
        return "float32 takes 4 bytes a weight and int8 one: go to 4 bits"
    return "the scales count too: one float32 for 32 weights is a whole bit a weight, so make the groups larger"


def _quality_hint(design):
    if design.pruned:
        return "zeros save no byte here and cost quality: this format stores them like any other weight"
    if design.bits == 3:
        return "3 bits are too few for this model, and they are stored in 4"
    if design.group_size == 128:
        return "one scale for 128 weights is too coarse here: there is room for smaller groups"
    return "rounding to nearest loses too much: let GPTQ choose the codes (calibrated)"


@exercise("13.11")
def best_design(answer):
    """A design that keeps the quality within the size and reads little for a token."""
    if not callable(answer):
        raise CheckFailed("the answer must be a function", actual=repr(answer))
    design, budget = answer(), Budget()
    if not isinstance(design, Design):
        raise CheckFailed("the function must return a Design", actual=type(design).__name__)
    found = examine(design)
    if found.weight_bytes > budget.weight_bytes:
        limit = f"at most {budget.weight_bytes:,} bytes of weights"
        _fail("the weights are too large", design, limit, f"{found.weight_bytes:,} bytes", _size_hint(design))
    if found.quality.verdict(budget.margin) != "keeps":
        limit = f"an interval above {-budget.margin}"
        _fail("the quality is not kept", design, limit, str(found.quality), _quality_hint(design))
    if found.read_bytes > READ_BYTES:
        hint = "guessed tokens that stand share one reading of the weights: let prompt lookup draft some"
        limit = f"at most {READ_BYTES:,} bytes a token"
        _fail("a token reads too much", design, limit, f"{found.read_bytes:,.0f} bytes", hint)


def _fail(problem, design, limit, actual, hint):
    raise CheckFailed(problem, given=str(design), expected=limit, actual=actual, hint=hint)

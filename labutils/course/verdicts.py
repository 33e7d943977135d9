"""What is said of one exercise, and how a run's records are read as verdicts."""

import re
from dataclasses import asdict, dataclass, replace

from labutils.lab.language import in_all_languages, marked, translated

RIGHT, WRONG, BLANK, SYNTAX = marked("right"), marked("wrong"), marked("blank"), marked("syntax error")
LOOP, KILLED, NOT_RUN = marked("endless loop"), marked("killed kernel"), marked("not run")
MISSING, DOUBLED = marked("missing"), marked("doubled")
VERDICTS = (RIGHT, WRONG, BLANK, SYNTAX, LOOP, KILLED, MISSING, DOUBLED, NOT_RUN)
CHEATED = marked("the check cell was deleted or changed; the original check was run instead")
LIMIT = 600


@dataclass(frozen=True)
class Verdict:
    """The verdict on one exercise.

    Attributes:
        exercise: Number and name, such as ``2.3 dequantize``.
        verdict: One of `VERDICTS`.
        hint: What to do next; empty when it is right.
        details: The check's whole message.
        note: What else was seen, such as a deleted check.
    """

    exercise: str
    verdict: str
    hint: str = ""
    details: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON and tables."""
        return asdict(self)


def tidy(text: str, limit: int = LIMIT) -> str:
    """Text from a hand-in, without control characters and colour codes, in at most ``limit`` characters."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    text = "".join(c for c in text if c == "\n" or c.isprintable())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def missing(title: str) -> Verdict:
    """The hand-in lacks the exercise's cell."""
    name = title.split(" ", 1)[1]
    hint = translated("no code cell begins with `# EXERCISE {name}`: put that line back as the first", name=name)
    return Verdict(title, MISSING, hint)


def doubled(title: str) -> Verdict:
    """The hand-in has the exercise's cell more than once."""
    name = title.split(" ", 1)[1]
    hint = translated("more than one cell begins with `# EXERCISE {name}`: keep only one", name=name)
    return Verdict(title, DOUBLED, hint)


def fatal(title: str, kind: str, limits: str = "") -> Verdict:
    """The exercise never ended ("timeout"), or took its kernel down ("dead", or a limit's name)."""
    if kind == "timeout":
        return Verdict(
            title, LOOP, translated("still running after {limits}: does every loop come to its end?", limits=limits)
        )
    causes = {
        "memory": translated("it used more memory than allowed: is something growing without a bound?"),
        "processes": translated("it started too many processes"),
        "disk": translated("it wrote too much to the disk, or printed without an end"),
        "time": translated("the whole notebook took too long, and was running this exercise"),
    }
    died = translated("the kernel died here: no exit(), no endless memory or recursion")
    return Verdict(title, KILLED, causes.get(kind, died))


def judge(title: str, answer: dict, check: dict) -> Verdict:
    """The verdict from the records of an EXERCISE cell and of its CHECK cell."""
    if not answer["passed"]:
        return _failed_answer(title, answer)
    expected = f"✓ {title}"
    if check["passed"] or (not check["ename"] and expected in check["stdout"].splitlines()):
        return Verdict(title, RIGHT)
    kind, text = check["ename"], tidy(check["evalue"] or check["message"])
    if kind == "StillBlank":
        hint = translated("write your answer between the exercise's first line and its check")
        return Verdict(title, BLANK, hint, text)
    if kind == "CheckFailed":
        return Verdict(title, WRONG, hint_of(text), text)
    if not kind:
        hint = translated("the check did not print its line: does your code stop it?")
        return Verdict(title, WRONG, hint, tidy(check["stdout"]))
    return replace(_raised(title, kind, text), details=f"{kind}: {text}")


def _failed_answer(title: str, record: dict) -> Verdict:
    kind, text = record["ename"], tidy(record["evalue"] or record["message"])
    if kind in ("SyntaxError", "IndentationError", "TabError"):
        text = re.sub(r"\([^()]*, line (\d+)\)", r"(line \1)", text)
        return Verdict(title, SYNTAX, translated("Python cannot read the cell: {text}", text=text), f"{kind}: {text}")
    if kind == "NotImplementedError" and text.startswith("Exercise "):
        return Verdict(title, BLANK, translated("write your answer in place of the `raise` line"), text)
    return _raised(title, kind, text)


def _raised(title: str, kind: str, text: str) -> Verdict:
    advice = {
        "NameError": "; " + translated("define every name that you use inside the EXERCISE cell itself"),
        "SystemExit": "; " + translated("leave exit() out"),
        "OutputTooLargeError": "; " + translated("print less"),
    }
    name = title.split(" ", 1)[1]
    if kind == "NameError" and text == f"name '{name}' is not defined":
        hint = translated("the cell does not define `{name}`: keep the name that was given", name=name)
        return Verdict(title, WRONG, hint, text)
    words = translated("your code raised {error}", error=f"{kind}: {text}".rstrip(": "))
    return Verdict(title, WRONG, words + advice.get(kind, ""), f"{kind}: {text}")


def hint_of(text: str, default: str | None = None) -> str:
    """The hint in a failed check's message, or else the default: its first line."""
    match = re.search(rf"^    (?:{'|'.join(in_all_languages('hint'))}) +(.+)$", text, flags=re.MULTILINE)
    return match[1] if match else (text.splitlines() or [""])[0] if default is None else default

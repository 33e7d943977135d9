"""Hand-ins of every kind on the demonstration chapter, and the verdicts that they deserve."""

import json
import shutil
from pathlib import Path

from smaller import smaller

from labutils.course.build import learner_notebook, solution_notebook, text_of
from labutils.course.source import read_chapter

ROOT = Path(__file__).resolve().parents[1]
CHAPTER_00 = "00_start_here"

DEMO = Path(__file__).resolve().parent / "fixtures" / "demo"
STEM = "90_demo"
NAMES = ("tokens_per_second", "quantize", "weight_bytes")
RIGHT = {
    "tokens_per_second": "def tokens_per_second(tokens, seconds):\n    return tokens / seconds",
    "quantize": "def quantize(values, scale):\n    return [max(-128, min(127, round(v / scale))) for v in values]",
    "weight_bytes": "weight_bytes = 500",
}
SPEED = "def tokens_per_second(tokens, seconds):\n"
QUANTIZE = "def quantize(values, scale):\n"
WRONG_SPEED = SPEED + "    return seconds / tokens"
WRONG_QUANTIZE = QUANTIZE + "    return [max(-128, min(127, round(v * scale))) for v in values]"
LOOP = SPEED + "    while True:\n        pass"
STUBBORN_LOOP = SPEED + (
    "    while True:\n        try:\n            while True:\n                pass\n"
    "        except BaseException:\n            pass"
)
EXIT = QUANTIZE + "    import os\n    os._exit(0)"
PRINTS = QUANTIZE + "    return values\nwhile True:\n    print('x' * 10000)"
FORKS = QUANTIZE + (
    "    import subprocess, sys\n"
    "    keep = [subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']) for _ in range(200)]\n"
    "    keep[0].wait()"
)
EATS = QUANTIZE + (
    "    import time\n    keep = []\n"
    "    while True:\n        keep.append(bytearray(50_000_000))\n        time.sleep(0.05)"
)
FILLS = QUANTIZE + (
    "    import time\n"
    "    with open('full', 'wb') as file:\n"
    "        while True:\n            file.write(bytes(10_000_000))\n"
    "            file.flush()\n            time.sleep(0.1)"
)
BOMB = QUANTIZE + (
    "    import subprocess, sys\n"
    "    code = 'import os, time\\nfor _ in range(6): os.fork()\\ntime.sleep(600)'\n"
    "    subprocess.run([sys.executable, '-S', '-c', code])"
)
QUITS = QUANTIZE + "    import time\n    exit()\n    time.sleep(0.3)"
PARRICIDE = QUANTIZE + "    import os, signal\n    os.kill(os.getppid(), signal.SIGKILL)"
LIES = SPEED + "    return 0\nprint('✓ 90.1 tokens_per_second')"


def asleep(loop: str) -> str:
    """An endless loop that leaves the processor to others."""
    return loop.replace("pass", "__import__('time').sleep(0.01)", 1)


def demo_course(folder: Path) -> Path:
    """A copy of the demonstration course with its notebooks; the solution is not executed, which `check` needs not."""
    root = folder / "course"
    shutil.copytree(DEMO, root, ignore=shutil.ignore_patterns("__pycache__"))
    chapter = read_chapter(root / "notebooks" / "source" / f"{STEM}.py")
    (root / "notebooks" / "solutions").mkdir()
    for path, notebook in (
        (f"{STEM}.ipynb", learner_notebook(chapter, "demo-owner/demo-course")),
        (f"solutions/{STEM}.ipynb", solution_notebook(chapter, "demo-owner/demo-course")),
    ):
        (root / "notebooks" / path).write_text(text_of(notebook), encoding="utf-8", newline="\n")
    return root


def learner(root: Path, **answers: str) -> dict:
    """The learner's notebook with some answers written in; the others stay blank."""
    notebook = json.loads((root / "notebooks" / f"{STEM}.ipynb").read_text(encoding="utf-8"))
    for name, answer in answers.items():
        cell_of(notebook, "EXERCISE", name)["source"] = f"# EXERCISE {name}\n{answer}".splitlines(keepends=True)
    return notebook


def cell_of(notebook: dict, kind: str, name: str) -> dict:
    """The cell of a notebook that begins with a marker."""
    return next(cell for cell in notebook["cells"] if "".join(cell["source"]).startswith(f"# {kind} {name}"))


def save(notebook: dict, path: Path) -> Path:
    """Write a notebook's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def as_saved_by_colab(notebook: dict) -> dict:
    """As Colab saves it: ids and tags gone, its own metadata in, outputs there, extra cells."""
    for cell in notebook["cells"]:
        cell.pop("id", None)
        cell["metadata"] = {"id": "x1Yz", "colab": {"base_uri": "https://localhost:8080/"}}
        if cell["cell_type"] == "code":
            cell["execution_count"] = 7
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["✓ anything\n"]}]
    extra = {"cell_type": "code", "metadata": {}, "source": ["1 / 0"], "outputs": [], "execution_count": 9}
    notebook["cells"].insert(3, extra)
    notebook["nbformat_minor"] = 0
    notebook["metadata"] = {"colab": {"provenance": []}, "kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return notebook


def cheated(root: Path) -> dict:
    """Wrong answers, one check deleted and one faked."""
    notebook = learner(root, **(RIGHT | {"tokens_per_second": WRONG_SPEED, "quantize": WRONG_QUANTIZE}))
    notebook["cells"].remove(cell_of(notebook, "CHECK", "tokens_per_second"))
    cell_of(notebook, "CHECK", "quantize")["source"] = ["# CHECK quantize\n", "print('✓ 90.2 quantize')"]
    return notebook


def without(root: Path, name: str) -> dict:
    """All right but one exercise deleted."""
    notebook = learner(root, **RIGHT)
    notebook["cells"].remove(cell_of(notebook, "EXERCISE", name))
    return notebook


def twice(root: Path, name: str) -> dict:
    """All right but one exercise there twice."""
    notebook = learner(root, **RIGHT)
    notebook["cells"].append(cell_of(notebook, "EXERCISE", name))
    return notebook


RRR = ("right", "right", "right")


def kinds(root: Path) -> dict[str, tuple[dict, tuple[str, ...]]]:
    """Every kind of readable hand-in with the verdicts that it deserves, in the order of the exercises."""
    return {
        "right": (learner(root, **RIGHT), RRR),
        "colab": (as_saved_by_colab(learner(root, **RIGHT)), RRR),
        "prints": (learner(root, **RIGHT | {"quantize": RIGHT["quantize"] + "\nprint('debug')"}), RRR),
        "blank": (learner(root), ("blank", "blank", "blank")),
        "partly": (learner(root, tokens_per_second=RIGHT["tokens_per_second"]), ("right", "blank", "blank")),
        "wrong": (learner(root, **RIGHT | {"quantize": WRONG_QUANTIZE}), ("right", "wrong", "right")),
        "bits": (learner(root, **RIGHT | {"weight_bytes": "weight_bytes = 4000"}), ("right", "right", "wrong")),
        "cheated": (cheated(root), ("wrong", "wrong", "right")),
        "lies": (learner(root, **RIGHT | {"tokens_per_second": LIES}), ("wrong", "right", "right")),
        "syntax": (learner(root, **RIGHT | {"quantize": "def quantize(values"}), ("right", "syntax error", "right")),
        "missing": (without(root, "quantize"), ("right", "missing", "right")),
        "doubled": (twice(root, "quantize"), ("right", "doubled", "right")),
        "loop": (learner(root, **RIGHT | {"tokens_per_second": asleep(LOOP)}), ("endless loop", "right", "right")),
        "stubborn": (
            learner(root, **RIGHT | {"tokens_per_second": asleep(STUBBORN_LOOP)}),
            ("endless loop", "right", "right"),
        ),
        "exit": (learner(root, **RIGHT | {"quantize": EXIT}), ("right", "killed kernel", "right")),
        "huge": (learner(root, **RIGHT | {"quantize": PRINTS}), ("right", "wrong", "right")),
        "forks": (learner(root, **RIGHT | {"quantize": FORKS}), ("right", "killed kernel", "right")),
        "eats": (learner(root, **RIGHT | {"quantize": EATS}), ("right", "killed kernel", "right")),
        "fills": (learner(root, **RIGHT | {"quantize": FILLS}), ("right", "killed kernel", "right")),
        "bomb": (learner(root, **RIGHT | {"quantize": BOMB}), ("right", "killed kernel", "right")),
        "quits": (learner(root, **RIGHT | {"quantize": QUITS}), ("right", "wrong", "right")),
        "parricide": (learner(root, **RIGHT | {"quantize": PARRICIDE}), ("right", "killed kernel", "right")),
    }


def vandal(root: Path, folder: Path) -> dict:
    """All right, and overwrites every hand-in of the class."""
    deed = (
        "\nimport pathlib"
        f"\nfor path in pathlib.Path({str(folder)!r}).rglob('*.ipynb'):"
        "\n    if not path.is_symlink():"
        "\n        path.write_text('gone')"
    )
    return learner(root, **RIGHT | {"quantize": RIGHT["quantize"] + deed})


def small_chapter_00(folder: Path) -> Path:
    """A course of chapter 00 alone, its lessons at the size of the lanes; exercises and checks are the real ones."""
    chapter = read_chapter(ROOT / "notebooks" / "source" / f"{CHAPTER_00}.py")
    marked = {index for exercise in chapter.exercises for index in (exercise.cell, exercise.check)}
    code = {index: cell.source for index, cell in enumerate(chapter.cells) if cell.cell_type == "code"}
    for index, source in smaller(CHAPTER_00, {i: text for i, text in code.items() if i not in marked})[0].items():
        chapter.cells[index].source = source
    path = folder / "notebooks" / "solutions" / f"{CHAPTER_00}.ipynb"
    path.parent.mkdir(parents=True)
    path.write_text(text_of(solution_notebook(chapter, "an-owner/a-course")), encoding="utf-8")
    return folder


def of_chapter_00(root: Path, **answers: str) -> dict:
    """The learner's chapter 00 of a course or kit: "right" puts the solution in, other texts are answers."""
    chapter = read_chapter(ROOT / "notebooks" / "source" / f"{CHAPTER_00}.py")
    solutions = {exercise.name: chapter.cells[exercise.cell].source for exercise in chapter.exercises}
    notebook = json.loads((root / "notebooks" / f"{CHAPTER_00}.ipynb").read_text(encoding="utf-8"))
    for name, answer in answers.items():
        source = solutions[name] if answer == "right" else f"# EXERCISE {name}\n{answer}"
        cell_of(notebook, "EXERCISE", name)["source"] = source.splitlines(keepends=True)
    return notebook


def mixed_chapter_00(root: Path) -> tuple[dict, tuple[str, ...]]:
    """Chapter 00 with a verdict of each kind that ends by itself; 0.2's check is faked."""
    answers = {
        "tokens_per_second": "right",
        "bits_per_byte": "def bits_per_byte(nats, text):\n    return nats.sum().item() / len(text.encode())",
        "predict_all": "def predict_all(model, batches)\n    return 0",
        "refuted": "right",
        "clock_cycles": "right",
        "lying_settings": "right",
    }
    notebook = of_chapter_00(root, **answers)
    cell_of(notebook, "CHECK", "bits_per_byte")["source"] = ["# CHECK bits_per_byte\n", "print('✓ 0.2 bits_per_byte')"]
    notebook["cells"].remove(cell_of(notebook, "EXERCISE", "refuted"))
    notebook["cells"].append(cell_of(notebook, "EXERCISE", "clock_cycles"))
    return notebook, ("right", "wrong", "blank", "syntax error", "missing", "doubled", "right")


def unusable(folder: Path) -> list[Path]:
    """Hand-ins that are no notebooks of this course."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "not_json": b"my answers: 42",
        "deep": b"[" * 200_000,
        "binary": bytes(range(256)) * 10,
        "empty": b"",
        "other": b'{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
    }
    for name, content in contents.items():
        (folder / f"{name}.ipynb").write_bytes(content)
    return [folder / f"{name}.ipynb" for name in contents]


# Module-level lines of one answer that must not reach the next: a right `quantize` calls min, max and round.
INTRUSIONS = {
    "builtins": "min = max = lambda *values: 0\nround = int\nlen = print = sorted = None",
    "module": "import builtins\nbuiltins.round = int\nbuiltins.max = builtins.min\nimport math\nmath.floor = None",
    "added": "import builtins\nbuiltins.helper = 1\ndef clip(value):\n    return 0",
    "settings": "import os, sys, warnings\nos.chdir('/')\nwarnings.simplefilter('error')\nsys.path.clear()",
    "dunders": "os = None\n__name__ = 'x'\nexec = eval = compile = None\n__builtins__ = {}",
}
# Lines that are right in an answer, whatever their text: nothing in them may spoil a verdict.
TEXTS = {
    "half an emoji": "# broken \ud83d\ntext = '\udc00'",
    "separators": "# form feed \x0c and line separator \u2028 and \x85\ntext = 'a\u2028b'",
    "a long line": "text = '" + "x" * 2_000_000 + "'",
    "much output": "print('x' * 900_000)",
    "prints half an emoji": "print('\\ud83d')",
    "no output": "import sys\nsys.stdout = sys.stderr = None",
    "shows half an emoji": "class Odd:\n    def __repr__(self):\n        return '\\ud83d'\nOdd()",
}

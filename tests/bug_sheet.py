"""A sheet for a bug hunt: wrong answers of a chapter, each of another exercise, and what is wrong on a second page.

python tests/bug_sheet.py 07                  # three of them, in Markdown; --seed 1 draws others
"""

import argparse
import ast
import random
from pathlib import Path

from lanes import read_wrong_answers

from labutils.course.source import read_chapter

ROOT = Path(__file__).resolve().parents[1]


def bug_sheet(number: str, *, seed: int = 0, count: int = 3) -> str:
    """Draws `count` exercises of chapter `number`, such as "07", and a wrong answer of each; comments are left out."""
    [source] = (ROOT / "notebooks" / "source").glob(f"{number}_*.py")
    titles = {exercise.name: exercise.title for exercise in read_chapter(source).exercises}
    wrong = read_wrong_answers(ROOT / "tests" / "wrong_answers" / source.name)
    draw = random.Random(seed)
    drawn = sorted(draw.sample(list(titles), count), key=list(titles).index)
    answers = [draw.choice([answer for answer in wrong if answer.exercise == name]) for name in drawn]
    cells = [f"## Exercise {titles[a.exercise]}\n\n```python\n{ast.unparse(ast.parse(a.source))}\n```" for a in answers]
    hints = [f"- Exercise {titles[a.exercise]}: the check's hint says “… {a.words} …”" for a in answers]
    task = "Each cell has one mistake. Find it, and an input that shows it, before you run anything."
    new_page = '<div style="page-break-after: always"></div>'
    return "\n\n".join([f"# Bug hunt, chapter {number}", task, *cells, new_page, "# Answers", "\n".join(hints)]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapter", help='two digits, such as "07"')
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(bug_sheet(arguments.chapter, seed=arguments.seed))

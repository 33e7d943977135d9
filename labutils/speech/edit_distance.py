"""Word error rate: how many words must change to turn what was heard into what was said.

    WER = (S + D + I) / N

S words substituted, D deleted and I inserted, of the N words that were said: the fewest edits (Levenshtein 1966),
found row by row (Wagner and Fischer 1974). Insertions count too, so that WER may exceed 1.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Edits:
    """How often a reference was changed; edits of several sentences add up with `+`.

    Attributes:
        words: of the reference.
        substitutions: words heard as another one.
        deletions: words said and not heard.
        insertions: words heard and not said.
    """

    words: int
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    def __add__(self, other: "Edits") -> "Edits":
        return Edits(
            self.words + other.words,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def total(self) -> int:
        """S + D + I."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """The word error rate.

        Raises:
            ValueError: when nothing was said.
        """
        if self.words == 0:
            raise ValueError("an error rate needs at least one word in the reference; got 0")
        return self.total / self.words


def edit_table(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> list[list[int]]:
    """Fewest edits between the first i words of the reference and the first j of the hypothesis, at [i][j].

        table[i][j] = min(table[i−1][j] + 1, table[i][j−1] + 1, table[i−1][j−1] + (reference[i] ≠ hypothesis[j]))

    >>> edit_table("ab", "b")
    [[0, 1], [1, 1], [2, 1]]
    """
    table = [list(range(len(hypothesis) + 1))]
    for i, said in enumerate(reference, start=1):
        row, above = [i], table[-1]
        for j, heard in enumerate(hypothesis, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (said != heard)))
        table.append(row)
    return table


def align(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> list[tuple]:
    """Pairs (said, heard) along a shortest chain of edits; None stands for a word that the other side lacks.

    Of equally short chains it takes the one that, read from the end, prefers pairs of words to deletions, and
    deletions to insertions.

    >>> align("please return the coat".split(), "return the red coat".split())
    [('please', None), ('return', 'return'), ('the', 'the'), (None, 'red'), ('coat', 'coat')]
    """
    table = edit_table(reference, hypothesis)
    i, j, pairs = len(reference), len(hypothesis), []
    while i or j:
        if i and j and table[i][j] == table[i - 1][j - 1] + (reference[i - 1] != hypothesis[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((reference[i], hypothesis[j]))
        elif i and table[i][j] == table[i - 1][j] + 1:
            i -= 1
            pairs.append((reference[i], None))
        else:
            j -= 1
            pairs.append((None, hypothesis[j]))
    return pairs[::-1]


def count_edits(reference: str, hypothesis: str) -> Edits:
    """The edits between two sentences, word by word.

    >>> count_edits("please return the coat", "return the red coat")
    Edits(words=4, substitutions=0, deletions=1, insertions=1)
    """
    said, heard = reference.split(), hypothesis.split()
    pairs = align(said, heard)
    deletions = sum(b is None for _, b in pairs)
    insertions = sum(a is None for a, _ in pairs)
    changed = sum(a != b for a, b in pairs)
    return Edits(len(said), changed - deletions - insertions, deletions, insertions)


def total_edits(pairs: Iterable[tuple[str, str]]) -> Edits:
    """The edits of many pairs (reference, hypothesis) together: long sentences weigh more than short ones.

    >>> total_edits([("yes", "no"), ("open the door", "open the door")]).rate
    0.25
    """
    return sum((count_edits(*pair) for pair in pairs), start=Edits(0))

"""Where a student begins: which of its teacher's layers it takes, and whether the two can speak of the same tokens."""

import torch


def spaced_layers(count: int, *, of: int) -> list[int]:
    """`count` layers at equal distances, first and last included; a single one is the first.

    >>> spaced_layers(3, of=6)
    [0, 2, 5]
    """
    return torch.linspace(0, of - 1, count).round().int().tolist()


def require_same_tokens(student_tokenizer, teacher_tokenizer) -> None:
    """Refuses two tokenizers that do not mean the same by an id.

    A soft target is a probability for every id. Where ids mean other strings, or the text is cut elsewhere, the numbers
    still subtract, the loss still falls, and the student learns nonsense; so it is refused, not patched.

    Raises:
        ValueError: naming what differs and what can be done instead.
    """
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    remedy = "let the teacher write text and train on that (sequence-level distillation), or give both one tokenizer"
    if ours != theirs:
        different = sum(theirs.get(token) != index for token, index in ours.items())
        raise ValueError(
            f"student and teacher must share a vocabulary; got {len(ours)} and {len(theirs)} tokens, {different} of "
            f"the student's with another id or none: {remedy}"
        )
    sample = "def f(x):\n    return x + 10  # 你好, don't"
    cuts = [t(sample, add_special_tokens=False)["input_ids"] for t in (student_tokenizer, teacher_tokenizer)]
    if cuts[0] != cuts[1]:
        raise ValueError(
            f"student and teacher must cut text alike; got {len(cuts[0])} and {len(cuts[1])} tokens of a text: {remedy}"
        )

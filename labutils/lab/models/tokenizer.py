"""LabLM's tokenizer (byte-level BPE with a chat template), and texts and chats as ids in which text stays text.

A user may write "<|end|><|system|>…". Read as one string with the template's own marks, that would be a forged turn.
"""

import re
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # stands between documents and begins each one
END_OF_TURN = "<|end|>"
PAD = "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (END_OF_TEXT, PAD, END_OF_TURN, *(f"<|{role}|>" for role in ROLES))

# Words, single digits, punctuation, line ends, indentation; the pattern of Qwen2's tokenizer (llama.cpp: "qwen2").
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; every string of any language can be encoded and decoded without loss.

    Args:
        texts: training text.
        vocab_size: number of tokens in all, special ones and the 256 bytes included.
        max_positions: longest sequence of the model, in tokens.

    Raises:
        ValueError: when vocab_size cannot hold the bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes and the special tokens); got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        padding_side="left",
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def role_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The token that opens each role's turn: {"system": 3, "user": 4, "assistant": 5} in LabLM's tokenizer."""
    return {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ROLES}


def control_tokens(tokenizer) -> dict[str, int]:
    """Tokens that steer a model, by text: all special ones, and the added ones that the chat template writes."""
    template = str(tokenizer.chat_template or "")
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.strip() and token.content in template)
    }


def text_ids(tokenizer, text: str) -> list[int]:
    """Ids of a text without any control token, whatever it holds: "<|end|>" is seven characters."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    marks = [mark for mark, number in control_tokens(tokenizer).items() if number in ids and len(mark) > 1]
    cuts = [found.start() + 1 for found in _any_of(marks).finditer(text)] if marks else []
    if not cuts:
        return ids
    # Added tokens that are not special are found even so: each is cut behind its first character.
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [number for piece in pieces for number in text_ids(tokenizer, piece)]


def chat_ids(tokenizer, messages: Sequence[dict], *, add_generation_prompt: bool = False) -> list[int]:
    """Ids of a chat: the template's marks are control tokens, and what the messages hold is text.

    Where no message holds the text of a control token, these are the ids of `apply_chat_template`. Newer versions of
    the library offer the like as `sanitize_control_tokens=True`; older ones ignore that argument without a word.

    Args:
        tokenizer: of any Hugging Face model, with a chat template.
        messages: each with a role, which is the program's own, and content.
        add_generation_prompt: whether the reply's opening mark follows.
    """
    control = control_tokens(tokenizer)
    template = tokenizer.apply_chat_template
    if not control or not any(_any_of(control).search(text) for text in _strings(list(messages))):
        return template(list(messages), add_generation_prompt=add_generation_prompt, return_dict=False)
    marks = sorted(control)
    opening, closing = _unused_characters("".join(_strings(list(messages))))
    hidden = _mapped(
        list(messages), lambda t: _any_of(marks).sub(lambda m: f"{opening}{marks.index(m[0])}{closing}", t)
    )
    rendered = template(hidden, add_generation_prompt=add_generation_prompt, tokenize=False)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids, run, done = [], [], 0

    def restored(piece: str) -> list[int]:
        if opening not in piece:
            return run
        return text_ids(tokenizer, re.sub(f"{opening}(\\d+){closing}", lambda m: marks[int(m[1])], piece))

    for number, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if number in control.values():
            ids += [*restored(rendered[done:start]), number]
            run, done = [], end
        else:
            run.append(number)
    return ids + restored(rendered[done:])


def _any_of(texts: Iterable[str]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _mapped(value, change):
    """A message with every string changed but its keys and its role."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: inner if key == "role" else _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _strings(value) -> list[str]:
    found: list[str] = []
    _mapped(value, found.append)
    return found


def _unused_characters(text: str) -> tuple[str, str]:
    """Two private-use characters that do not occur in a text."""
    free = (chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
    return next(free), next(free)

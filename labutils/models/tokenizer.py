"""LabLM's tokenizer: byte-level BPE, trained on the corpus, stored in Hugging Face format with a chat template."""

from collections.abc import Iterable

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
